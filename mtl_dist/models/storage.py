"""What is kept of a forward for its backward: less by computing again, or by rounding. Tested by tests/test_recompute.py."""

import functools

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import WeakTensorKeyDictionary

recomputed = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
"""recomputed(function, *arguments): its result, of which only the arguments are kept for the backward."""


def kept_in_bf16() -> saved_tensors_hooks:
    """Return a context in which float32 activations are kept for the backward in bf16: relative rounding of 2^-9.

    Weights, which are there anyway, and other types are kept as they are.
    """
    rounded = WeakTensorKeyDictionary()  # several operations keep one tensor: it is rounded once

    def pack(tensor: Tensor) -> tuple[Tensor, bool]:
        if tensor.dtype != torch.float32 or (tensor.is_leaf and tensor.requires_grad):
            return tensor, False
        if tensor not in rounded:
            rounded[tensor] = tensor.bfloat16()
        return rounded[tensor], True

    def unpack(kept: tuple[Tensor, bool]) -> Tensor:
        tensor, was_float32 = kept
        return tensor.float() if was_float32 else tensor

    return saved_tensors_hooks(pack, unpack)
