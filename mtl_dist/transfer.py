"""The weights that a run starts from, taken from another run (paper section 6): the trunk, and the heads that fit.

Tested by tests/test_transfer.py.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file
from torch import nn

from mtl_dist import checkpoint
from mtl_dist.checkpoint import Tensors

TRUNK = "trunk."


def transferred(
    initial: str, model: nn.Module, classes: Mapping[str, list[str]]
) -> tuple[Tensors, str]:
    """Return (all weights of a new `model`, with those of a run or checkpoint folder where they fit; what was taken).

    Of a run folder it is the best checkpoint. A head is taken whole, where all its tensors have the same shapes and, for a
    task with `classes`, where those are the same.

    Raises:
        ValueError: there is no whole checkpoint, or its trunk is another.
        SafetensorError, OSError: it cannot be read.
    """
    path = checkpoint.find(Path(initial))
    saved = load_file(path / "model.safetensors")
    about = json.loads((path / "model.json").read_text(encoding="utf-8"))
    weights = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    trunk = {name: value for name, value in weights.items() if name.startswith(TRUNK)}
    ours = {name: value for name, value in saved.items() if name.startswith(TRUNK)}
    checkpoint.check_fit(path, ours, {name: value.shape for name, value in trunk.items()})
    taken, new = ["trunk"], []
    weights |= ours
    for task in model.heads.heads:
        prefix = f"heads.heads.{task}."
        own = {n: v.shape for n, v in weights.items() if n.startswith(prefix)}
        theirs = {n: v for n, v in saved.items() if n.startswith(prefix)}
        same = own == {n: v.shape for n, v in theirs.items()}
        trained_on = about["tasks"].get(task, {}).get("classes")
        if same and trained_on == classes.get(task, []):
            taken.append(f"head of {task}")
            weights |= theirs
        else:
            new.append(f"head of {task}")
    return weights, f"{path}: {', '.join(taken)}" + (f"; new: {', '.join(new)}" if new else "")
