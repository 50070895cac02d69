"""Two processes: evaluate an untrained model on the test clips of every task.

accelerate launch --config_file launch_configs/two_cpu_processes.yaml tests/workers/evaluation_worker.py CORPORA OUT
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import tiny
from accelerate import Accelerator

from mtl_dist.config import load_config
from mtl_dist.evaluation import evaluate
from mtl_dist.experiment import build_experiment
from mtl_dist.runtime import leave

accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
whole = ["--evaluation.max_clips", "null"]
experiment = build_experiment(load_config(tiny.tiny_words(Path(sys.argv[1]), *whole)))
heard = tiny.listen(experiment)
result = evaluate(accelerator, experiment.build_model(), experiment, "test")
found = {
    "heard": heard,
    "clips": result.clips,
    "metrics": {
        task: {n: v.tolist() for n, v in ms.items()} for task, ms in result.metrics.items()
    },
}
out = Path(sys.argv[2]) / f"rank_{accelerator.process_index}.json"
out.write_text(json.dumps(found))
leave(accelerator)
