"""Pictures of a study as {"png": bytes, "svg": bytes}: scores and gains with their intervals, learning curves."""

import io
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from mtl_dist.experiments.study import Run, Study

if TYPE_CHECKING:
    from mtl_dist.experiments.report import Row

Formats = dict[str, bytes]


def saved(figure: Figure) -> Formats:
    """Return a figure in both formats, and close it."""
    formats = {}
    for name in ("png", "svg"):
        file = io.BytesIO()
        figure.savefig(file, format=name, dpi=130)
        formats[name] = file.getvalue()
    plt.close(figure)
    return formats


def _rows_of(count: int) -> tuple[Figure, plt.Axes]:
    return plt.subplots(figsize=(7.5, 1.2 + 0.42 * count), layout="constrained")


def draw_scores(study: Study, rows: Sequence["Row"]) -> Formats | None:
    """Draw each variant's score with its interval, and the published value as a hollow mark."""
    known = [row for row in rows if row.score is not None]
    if not known:
        return None
    figure, axis = _rows_of(len(known))
    for place, row in enumerate(known):
        low, high = row.score.mean - row.score.low, row.score.high - row.score.mean
        axis.errorbar(row.score.mean, place, xerr=[[low], [high]], fmt="o", color="C0", capsize=3)
        published = row.variant.published.get(study.metric)
        if published is not None:
            axis.plot(published, place, "D", color="C1", fillstyle="none")
    axis.plot([], [], "o", color="C0", label="here, 95 % interval")
    if any(study.metric in row.variant.published for row in known):
        axis.plot([], [], "D", color="C1", fillstyle="none", label="published")
    axis.legend(fontsize=8)
    _name_rows(axis, [f"{row.variant.name} ({len(row.runs)})" for row in known])
    axis.set_xlabel(f"{study.metric} (number of seeds beside each name)")
    return saved(figure)


def draw_gains(study: Study, rows: Sequence["Row"]) -> Formats | None:
    """Draw each variant's gain with its interval, and the published gain as a hollow mark."""
    known = [row for row in rows if row.gain is not None]
    if not known:
        return None
    figure, axis = _rows_of(len(known))
    axis.axvline(0, color="0.6", linewidth=1)
    for place, row in enumerate(known):
        low, high = row.gain.mean - row.gain.low, row.gain.high - row.gain.mean
        colour = "C0" if row.gain.decided() else "0.5"
        axis.errorbar(row.gain.mean, place, xerr=[[low], [high]], fmt="o", color=colour, capsize=3)
        if row.published_gain is not None:
            axis.plot(row.published_gain, place, "D", color="C1", fillstyle="none")
    _name_rows(axis, [f"{row.variant.name} - {row.variant.against}" for row in known])
    axis.set_xlabel(
        f"difference in {study.metric}, 95 % interval (grey: 0 is inside; hollow: published)"
    )
    return saved(figure)


def _name_rows(axis: plt.Axes, names: Sequence[str]) -> None:
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.grid(axis="x", alpha=0.3)


def draw_learning_curves(study: Study, runs: Sequence[Run]) -> Formats | None:
    """Draw the validations of all runs, finished or not: a colour for each variant, a line for each seed."""
    figure, axis = plt.subplots(figsize=(7.5, 4), layout="constrained")
    colours = {name: f"C{place % 10}" for place, name in enumerate(study.variants)}
    for run in runs:
        points = _validations(run, f"validation/{study.task}/{study.metric}")
        if points:
            first = run.variant.name not in axis.get_legend_handles_labels()[1]
            label = run.variant.name if first else None
            axis.plot(*zip(*points, strict=True), color=colours[run.variant.name], label=label)
    if not axis.lines:
        plt.close(figure)
        return None
    axis.set_xlabel("optimizer step")
    axis.set_ylabel(f"{study.metric}, validation")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return saved(figure)


def _validations(run: Run, name: str) -> list[tuple[int, float]]:
    path = run.folder / "metrics.jsonl"
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    entries = [json.loads(line) for line in lines if line.endswith("\n")]
    return [(entry["round"], entry[name]) for entry in entries if name in entry]
