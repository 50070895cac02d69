"""A rank evaluates an untrained model on the test clips of every task, on all and on 7 of them.

accelerate launch --config_file launch_configs/two_cpu_processes.yaml tests/workers/evaluation_worker.py OUT WORDS...
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
experiment, told = build_experiment(load_config(sys.argv[2:])), []
heard = tiny.listen(experiment)
for limit in (None, 7):
    experiment.config.evaluation.max_clips = limit
    result = evaluate(accelerator, experiment.build_model(), experiment, "test")
    metrics = {t: {n: v.tolist() for n, v in ms.items()} for t, ms in result.metrics.items()}
    ids = {task: list(own) for task, own in heard.items()}
    told.append({"heard": ids, "clips": result.clips, "metrics": metrics, "bad": result.bad})
    for own in heard.values():
        own.clear()
Path(sys.argv[1], f"rank_{accelerator.process_index}.json").write_text(json.dumps(told))
leave(accelerator)
