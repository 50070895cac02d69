"""Train where the CPU kernel cannot run on rank 1: accelerate launch ... tests/workers/uneven_kernel.py WORDS..."""

import os
import runpy
import sys
from pathlib import Path

from mtl_dist.models import kernels

ENTRY = Path(__file__).parent.parent.parent / "mtl_dist" / "train.py"
kernels.why_not = lambda name, where: "made up" if os.environ["RANK"] == "1" else None
sys.argv[0] = str(ENTRY)
runpy.run_path(str(ENTRY), run_name="__main__")
