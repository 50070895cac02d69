"""Train in a process that may take only so many more bytes of address space: python tests/workers/little_memory.py BYTES
WORDS OF THE ENTRY..."""

import importlib
import resource
import runpy
import sys
from pathlib import Path

import psutil

ENTRY = Path(__file__).parent.parent.parent / "mtl_dist" / "train.py"
for name in ("trainer", "pictures", "micro_batch"):  # libraries take address space, too
    importlib.import_module(f"mtl_dist.{name}")
for name in ("torch._dynamo", "torch.utils.tensorboard", "matplotlib.pyplot"):
    importlib.import_module(name)
limit = psutil.Process().memory_info().vms + int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
sys.argv = [str(ENTRY), *sys.argv[2:]]
runpy.run_path(str(ENTRY), run_name="__main__")
