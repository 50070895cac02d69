"""A rank writes what it hears from the start, and what it hears from positions on: rounds 0 .. 9 and FIRST .. STOP - 1.

python stream_worker.py OUT WORKERS FIRST STOP POSITIONS.json WORDS OF THE CONFIGURATION
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from hearing import heard, numbered

from mtl_dist.config import load_config
from mtl_dist.experiment import build_together
from mtl_dist.phases import Phases
from mtl_dist.runtime import leave, start, world_of

out, workers, first, stop, saved, *words = sys.argv[1:]
accelerator = start("no")
experiment = build_together(accelerator, load_config(words), Phases())
world, first, workers = world_of(accelerator), int(first), int(workers)
whole = heard(experiment.rounds(world, 1, 0, {}), 10, workers)
positions = numbered(json.loads(Path(saved).read_text()))
rest = heard(experiment.rounds(world, 1, first, positions), int(stop) - first, workers)
Path(out, f"rank_{world.rank}.json").write_text(json.dumps([whole, rest]))
leave(accelerator)
