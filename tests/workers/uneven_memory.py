"""Train, with a memory budget of its own for every rank:

accelerate launch ... tests/workers/uneven_memory.py GB_OF_RANK_0,GB_OF_RANK_1 WORDS OF THE ENTRY..."""

import os
import runpy
import sys
from pathlib import Path

ENTRY = Path(__file__).parent.parent.parent / "mtl_dist" / "train.py"
budget = sys.argv[1].split(",")[int(os.environ["RANK"])]
sys.argv = [str(ENTRY), *sys.argv[2:], "--memory.budget_gb", budget]
runpy.run_path(str(ENTRY), run_name="__main__")
