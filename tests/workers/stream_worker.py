"""A rank writes what it hears: python stream_worker.py OUT ROUNDS WORKERS FIRST_ROUND WORDS OF THE CONFIGURATION"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from sharded import heard

from mtl_dist.config import load_config
from mtl_dist.experiment import build_together
from mtl_dist.phases import Phases
from mtl_dist.runtime import leave, start, world_of

out, rounds, workers, first, *words = sys.argv[1:]
accelerator = start("no")
experiment = build_together(accelerator, load_config(words), Phases())
told = heard(experiment, world_of(accelerator), int(rounds), int(workers), int(first))
Path(out, f"rank_{accelerator.process_index}.json").write_text(json.dumps(told))
leave(accelerator)
