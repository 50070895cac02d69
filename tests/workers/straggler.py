"""Train, with one rank slower than the others in every forward:

accelerate launch ... tests/workers/straggler.py RANK SECONDS WORDS OF THE ENTRY..."""

import os
import runpy
import sys
import time
from pathlib import Path

from mtl_dist import round as rounds

RANK, SECONDS = sys.argv[1], float(sys.argv[2])
ENTRY = Path(__file__).parent.parent.parent / "mtl_dist" / "train.py"
scaled = rounds._scaled


def slowly(*arguments):
    """Take the sum of the losses as always, but later."""
    time.sleep(SECONDS)
    return scaled(*arguments)


if os.environ["RANK"] == RANK:
    rounds._scaled = slowly
sys.argv = [str(ENTRY), *sys.argv[3:]]
runpy.run_path(str(ENTRY), run_name="__main__")
