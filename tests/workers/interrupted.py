"""Train, and get a signal right after a round, with all loader workers, as a scheduler sends it:

python tests/workers/interrupted.py SIGTERM 5 WORDS OF THE ENTRY..."""

import os
import runpy
import signal
import sys
from pathlib import Path

from mtl_dist.monitor import Monitor

NAME, ROUND = sys.argv[1], int(sys.argv[2])
ENTRY = Path(__file__).parent.parent.parent / "mtl_dist" / "train.py"
take_note = Monitor.round


def interrupted(self, number, *arguments):
    """Note the round as always, then signal this process and its children."""
    take_note(self, number, *arguments)
    if number == ROUND:
        self.writer.flush()  # TensorBoard's file is further than the last checkpoint
        os.killpg(os.getpgrp(), getattr(signal, NAME))


if "LAUNCHED" not in os.environ:
    os.setpgrp()  # a group of its own: nobody else is hit; a launcher has one already, and shall be hit
Monitor.round = interrupted
sys.argv = [str(ENTRY), *sys.argv[3:]]
runpy.run_path(str(ENTRY), run_name="__main__")
