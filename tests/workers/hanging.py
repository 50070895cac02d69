"""Train, and hang for ever on one rank, as a lost disk, a deadlock or a frozen node would have it:

python tests/workers/hanging.py RANK start|data|validation|frozen ROUND WORDS OF THE ENTRY..."""

import os
import runpy
import signal
import sys
import time
from pathlib import Path

from mtl_dist.phases import Phases

RANK, HOW, ROUND = sys.argv[1], sys.argv[2], int(sys.argv[3])
ENTRY = Path(__file__).parent.parent.parent / "mtl_dist" / "train.py"
enter = Phases.enter


def hang(self, phase, round_=None):
    """Enter the phase as always, and never leave it."""
    enter(self, phase, round_)
    if self.sign.round == ROUND and phase == ("data" if HOW == "frozen" else HOW):
        print(f"hangs since {time.time()}", flush=True)
        time.sleep(1)  # the last sign of life is posted
        while True:
            if HOW == "frozen":
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(1)


if os.environ["RANK"] == RANK:
    Phases.enter = hang
sys.argv = [str(ENTRY), *sys.argv[4:]]
runpy.run_path(str(ENTRY), run_name="__main__")
