"""Train, while rank 1 cannot see what rank 0 sees:

accelerate launch ... tests/workers/blind_rank.py FOLDER WORDS OF THE ENTRY..."""

import os
import runpy
import sys
from pathlib import Path

ENTRY = Path(__file__).parent.parent.parent / "mtl_dist" / "train.py"
hidden, words = sys.argv[1], sys.argv[2:]
stat = os.stat


def blind(path, *arguments, **named):
    """Say of everything below the hidden folder that it is not there."""
    if str(path).startswith(hidden):
        raise FileNotFoundError(2, "No such file or directory", str(path))
    return stat(path, *arguments, **named)


if os.environ["RANK"] == "1":
    os.stat = blind
sys.argv = [str(ENTRY), *words]
runpy.run_path(str(ENTRY), run_name="__main__")
