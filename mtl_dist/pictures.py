"""Pictures of results: spectrograms side by side, confusion matrices. matplotlib without a screen."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure

DYNAMIC_RANGE_DB = 80.0
"""Spectrograms show this much below their loudest point."""


def spectrograms(waves: dict[str, torch.Tensor], rate: int) -> Figure:
    """Draw the spectrograms of waves (T,) at `rate` Hz one above the other, on one colour scale in dB."""
    figure, axes = plt.subplots(
        len(waves), 1, figsize=(7, 2.1 * len(waves)), sharex=True, sharey=True, layout="constrained"
    )
    window = np.hanning(512)
    for axis, (what, wave) in zip(np.atleast_1d(axes), waves.items(), strict=True):
        samples = np.pad(wave.numpy(), (0, max(0, 512 - len(wave))))
        _, _, _, image = axis.specgram(
            samples + 1e-9,
            NFFT=512,
            noverlap=384,
            Fs=rate,
            window=window,
            vmin=-40 - DYNAMIC_RANGE_DB,
            vmax=-40,
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
