"""Pictures of results: spectrograms side by side, confusion matrices. matplotlib without a screen."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib import mlab
from matplotlib.figure import Figure

WINDOW = 512
"""Window of spectrograms in samples."""

LOUDEST_DB, DYNAMIC_RANGE_DB = -40.0, 80.0
"""Spectrograms show powers from LOUDEST_DB (dB of full scale per Hz) down to this much below."""


def spectrograms(waves: dict[str, torch.Tensor], rate: int) -> Figure:
    """Draw the spectrograms of waves (T,) at `rate` Hz one above the other, on one colour scale in dB."""
    figure, axes = plt.subplots(
        len(waves), 1, figsize=(7, 2.1 * len(waves)), sharex=True, sharey=True, layout="constrained"
    )
    for axis, (what, wave) in zip(np.atleast_1d(axes), waves.items(), strict=True):
        samples = np.pad(wave.numpy(), (0, max(0, WINDOW - len(wave))))
        power, hertz, _ = mlab.specgram(samples, NFFT=WINDOW, noverlap=WINDOW * 3 // 4, Fs=rate)
        image = axis.imshow(
            10 * np.log10(np.maximum(power, 1e-15)),
            extent=(0, len(samples) / rate, hertz[0], hertz[-1]),
            origin="lower",
            aspect="auto",
            vmin=LOUDEST_DB - DYNAMIC_RANGE_DB,
            vmax=LOUDEST_DB,
        )
        axis.set_ylabel("Hz")
        axis.set_title(what, loc="left", fontsize=9)
    np.atleast_1d(axes)[-1].set_xlabel("seconds")
    figure.colorbar(image, ax=axes, label="dB re full scale per Hz")
    return figure


def confusion_matrix(counts: torch.Tensor, classes: list[str], title: str) -> Figure:
    """Draw counts (K, K): rows are the true classes, columns the guesses; colour is the share of the row."""
    size = max(4.0, 0.28 * len(classes) + 2.5)
    figure, axis = plt.subplots(figsize=(size, size), layout="constrained")
    share = (counts / counts.sum(dim=1, keepdim=True).clamp(min=1)).numpy()
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axis.set_xticks(range(len(classes)), classes, rotation=90, fontsize=8)
    axis.set_yticks(range(len(classes)), classes, fontsize=8)
    axis.set_xlabel("guess")
    axis.set_ylabel("truth")
    axis.set_title(title, fontsize=10)
    for i, j in np.argwhere(counts.numpy() > 0):
        colour = "white" if share[i, j] > 0.5 else "black"
        axis.text(j, i, int(counts[i, j]), ha="center", va="center", fontsize=7, color=colour)
    return figure
