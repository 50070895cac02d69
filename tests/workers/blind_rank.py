"""Train, while rank 1 cannot see what rank 0 sees:

accelerate launch ... tests/workers/blind_rank.py FOLDER WORDS OF THE ENTRY..."""

import os
import runpy
import sys
from pathlib import Path

ENTRY = Path(__file__).parent.parent.parent / "mtl_dist" / "train.py"
hidden, words = sys.argv[1], sys.argv[2:]
if os.environ["RANK"] == "1":
    words = [word.replace(hidden, "/not/mounted/here") for word in words]
sys.argv = [str(ENTRY), *words]
runpy.run_path(str(ENTRY), run_name="__main__")
