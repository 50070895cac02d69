"""Train, and let the disk of one rank stop answering:

python tests/workers/stalling_disk.py RANK READS WORDS OF THE ENTRY...

The first file that the rank (one of its workers) reads after READS others does not answer, like a pipe that nobody writes
to, which stands beside it as FILE.stalls; the other ranks read it as ever."""

import os
import runpy
import sys
from pathlib import Path

from mtl_dist.data.streams import StreamFiles

RANK, READS = sys.argv[1], int(sys.argv[2])
ENTRY = Path(__file__).parent.parent.parent / "mtl_dist" / "train.py"
read, opened = StreamFiles.read, []


def stalling(files, file, part):
    opened.append(file)
    pipe = f"{files.names[file]}.stalls"
    if len(opened) > READS:
        if not os.path.exists(pipe):
            os.mkfifo(pipe)
        open(pipe, "rb").close()
    yield from read(files, file, part)


if os.environ["RANK"] == RANK:
    StreamFiles.read = stalling
sys.argv = [str(ENTRY), *sys.argv[3:]]
runpy.run_path(str(ENTRY), run_name="__main__")
