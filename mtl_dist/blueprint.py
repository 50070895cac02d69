"""What a run's model is made of, and what computes it: kernel, slices of time, what is kept for the backward.

Tested by tests/test_kernels.py, tests/test_slice_length.py and tests/test_auto_micro_batch.py.
"""

import functools
from collections.abc import Mapping

import torch

from mtl_dist.config import Config, ConfigError
from mtl_dist.models.kernels import REFERENCE, Choice, Where, choose_kernel, expected_kernel
from mtl_dist.models.multitask import MultitaskModel
from mtl_dist.models.storage import recomputed
from mtl_dist.models.wavenet import WaveNetTrunk
from mtl_dist.runtime import DTYPES
from mtl_dist.slice_length import slice_samples
from mtl_dist.tasks import Task


class Blueprint:
    """Makes a run's models for one device and precision. Without a device, where nobody trains, the reference computes."""

    def __init__(
        self,
        config: Config,
        tasks: Mapping[str, Task],
        device: torch.device | None,
        precision: str,
    ):
        self.config, self.tasks, self.device, self.precision = config, tasks, device, precision

    @functools.cached_property
    def kernel(self) -> Choice:
        """What computes the layers on the device; without one, what would on a machine that has it."""
        model, asked = self.config.model, self.config.model.kernel
        alone = not (model.skip_outputs or model.residual_projection)
        keeps = self.recompute != "layer"
        dtype = DTYPES.get(self.precision, torch.float32)
        if self.device is None:
            return expected_kernel(asked, model.channels, dtype, alone, keeps)
        return choose_kernel(asked, Where(self.device, model.channels, dtype), alone, keeps)

    @property
    def recompute(self) -> str:
        """What the backward computes again, as configured: none, layer or block. Some kernels do layer whatever is asked."""
        asked = self.config.memory.recompute
        if asked == "auto":
            return "none" if self.config.memory.budget_gb is None else "layer"
        return asked

    @functools.cached_property
    def slice_samples(self) -> int | None:
        """Length of a slice of time, or None. Raises ConfigError where there can be none."""
        try:
            return slice_samples(
                self.config, self._for_measuring, self.tasks, self.precision, self.device
            )
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def model(self) -> MultitaskModel:
        """Return a new model; its initial values depend on run.seed and the tasks alone."""
        return self._model(REFERENCE if self.device is None else self.kernel, self.slice_samples)

    def outline(self) -> MultitaskModel:
        """Return a new model for tensors without numbers (activations.pretended), for which nothing can be compiled."""
        return self._model(self._in_outline(), self.slice_samples)

    def _in_outline(self) -> Choice:
        return REFERENCE if self.kernel.name == "compile" else self.kernel

    def _for_measuring(self, samples: int, real: bool) -> MultitaskModel:
        return self._model(self.kernel if real else self._in_outline(), samples)

    def _model(self, kernel: Choice, slices: int | None) -> MultitaskModel:
        torch.manual_seed(self.config.run.seed)
        model, compute = self.config.model, kernel.kernel
        if self.recompute == "layer" and not kernel.recomputes:
            compute = functools.partial(recomputed, compute)
        trunk = WaveNetTrunk(
            blocks=model.blocks,
            layers=model.layers,
            channels=model.channels,
            residual_projection=model.residual_projection,
            skip_outputs=model.skip_outputs,
            input_gain=model.input_gain,
            kernel=compute,
            recompute_blocks=self.recompute == "block",
            bf16_storage=self.config.memory.storage == "bf16",
        )
        return MultitaskModel(trunk, self.tasks, slices)
