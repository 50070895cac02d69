"""A world that meets, and ends at once after a collective, TIMES times: python leaver.py TIMES"""

import os
import sys

import torch
from accelerate.state import AcceleratorState, GradientState

from mtl_dist.runtime import collect, leave, start

for number in range(int(sys.argv[1])):
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)  # a part of the store of its own
    accelerator = start("no")
    model = accelerator.prepare(torch.nn.Linear(2, 2))
    collect(accelerator, [accelerator.process_index])
    leave(accelerator)
    del model, accelerator
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
print("left every time")
