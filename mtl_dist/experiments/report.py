"""`mtl-dist report DIR`: what a study has found so far, as report.md, report.html (one file) and pictures.

    mtl-dist report runs/table1

Tables of means over seeds with 95 % intervals, paired differences, the published values beside them, and in words what the
interval allows one to conclude. Works while runs are missing. Tested by tests/test_report.py.
"""

import argparse
import base64
import dataclasses
import html
import statistics
from collections.abc import Sequence
from pathlib import Path

import markdown

from mtl_dist.experiments.compare import (
    Interval,
    aligned,
    clip_scores,
    clips_needed,
    interval,
    paired,
)
from mtl_dist.experiments.figures import draw_gains, draw_learning_curves, draw_scores
from mtl_dist.experiments.study import Run, Study, Variant, load_study, runs_in
from mtl_dist.run_folder import write_atomically

FEW_SEEDS = 5
STYLE = (
    "body{font:16px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}table{border-collapse:collapse}"
    "td,th{border-bottom:1px solid #ccc;padding:.3em .8em;text-align:right}td:first-child,th:first-child{text-align:left}"
    "img{max-width:100%}"
)


@dataclasses.dataclass(kw_only=True)
class Row:
    """What is known of a variant: its finished runs by seed, its score, its gain over the variant it is compared with."""

    variant: Variant
    runs: dict[int, Run]
    planned: int
    score: Interval | None = None
    gain: Interval | None = None
    gain_seeds: Sequence[int] = ()
    clips: int = 0
    needed: int | None = None
    """Test clips that would show the published gain."""
    published_gain: float | None = None


def add_report(commands) -> None:
    """Declare `mtl-dist report`."""
    text = "tables, intervals and pictures of a study, finished or not"
    command = commands.add_parser("report", allow_abbrev=False, help=text, description=text)
    command.add_argument("folder", metavar="DIR", type=Path, help="folder of a study")
    command.set_defaults(act=run_report)


def run_report(options: argparse.Namespace, overrides: list[str]) -> None:
    """Write the report into the study's folder. Raises ValueError or OSError; nothing is half written."""
    if overrides:
        raise ValueError(f"{overrides[0]}: not known; see mtl-dist report --help")
    out = options.folder
    if not (out / "study.yaml").is_file():
        raise ValueError(f"{out}: there is no study.yaml in it; name a folder of mtl-dist study")
    study = load_study(str(out / "study.yaml"))
    runs = runs_in(study, out)
    rows = [analyse(study, variant, runs) for variant in study.variants.values()]
    if not any(row.runs for row in rows):
        raise ValueError(f"{out}: none of its {len(runs)} runs is finished")
    pictures = {
        "scores": draw_scores(study, rows),
        "gains": draw_gains(study, rows),
        "learning_curves": draw_learning_curves(study, runs),
    }
    pictures = {name: figure for name, figure in pictures.items() if figure is not None}
    text = report_text(study, rows, list(pictures))
    for name, formats in pictures.items():
        for suffix, content in formats.items():
            write_atomically(out / f"{name}.{suffix}", content)
    write_atomically(out / "report.md", text)
    inside = {name: formats["png"] for name, formats in pictures.items()}
    write_atomically(out / "report.html", as_html(study.name, text, inside))
    print(f"{text}\nwritten: {out}/report.md, report.html and pictures as PNG and SVG")


def analyse(study: Study, variant: Variant, runs: Sequence[Run]) -> Row:
    """Score a variant's finished runs, and pair them with those it is compared with by seed.

    Raises:
        ValueError: runs were scored on other clips, or have no predictions.
    """
    finished = _by_seed(variant.name, runs)
    planned = sum(run.variant.name == variant.name for run in runs)
    row = Row(variant=variant, runs=finished, planned=planned)
    if not finished:
        return row
    paths = {run.folder: run for run in finished.values()}
    scores = aligned({path: clip_scores(path, study.task, study.metric) for path in paths})
    row.score, row.clips = interval(scores), scores.shape[1]
    other = study.variants[variant.against]
    if other.name == variant.name:
        return row
    base = {seed: run.folder for seed, run in _by_seed(other.name, runs).items()}
    ours = {seed: run.folder for seed, run in finished.items()}
    found = paired(ours, base, study.task, study.metric)
    if found is None:
        return row
    row.gain_seeds, differences = found
    row.gain = interval(differences)
    published = [v.published.get(study.metric) for v in (variant, other)]
    if None not in published and published[0] != published[1]:
        row.published_gain = published[0] - published[1]
        row.needed = clips_needed(differences, row.published_gain)
    return row


def _by_seed(name: str, runs: Sequence[Run]) -> dict[int, Run]:
    return {run.seed: run for run in runs if run.variant.name == name and run.finished()}


def report_text(study: Study, rows: Sequence[Row], pictures: Sequence[str]) -> str:
    """Return the report as Markdown."""
    done, planned = sum(len(row.runs) for row in rows), sum(row.planned for row in rows)
    clips = max(row.clips for row in rows)
    unfinished = f", {planned - done} begun and not finished" if planned > done else ""
    lines = [
        f"# Study {study.name}",
        "",
        f"Recipe {study.recipe}{' with ' + ' '.join(study.overrides) if study.overrides else ''}; {done} runs finished"
        f"{unfinished}; {study.metric} of {study.task} on {clips} test clips.",
        "",
        *_score_table(study, rows),
        "",
        "Intervals are of 95 %, by bootstrap over test clips and, where there are several, over seeds; differences are "
        "paired by clip and seed. With fewer than about five seeds the intervals are too narrow, as so few say little of "
        "how seeds differ. Published values are of the paper's data; beside runs on other data they are no comparison.",
        "",
        "## What can be concluded",
        "",
        *(f"- {line}" for row in rows if (line := conclusion(study, row))),
        "",
        *_other_tables(study, rows),
    ]
    for name in pictures:
        lines += [f"![{name.replace('_', ' ')}]({name}.png)", ""]
    return "\n".join(lines)


def _score_table(study: Study, rows: Sequence[Row]) -> list[str]:
    lines = [
        f"| variant | seeds | {study.metric} | difference | over | published | published difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        published = row.variant.published.get(study.metric)
        cells = [
            row.variant.name,
            str(len(row.runs)),
            _text(row.score),
            _text(row.gain, sign="+"),
            row.variant.against if row.gain else "",
            "" if published is None else f"{published:.3f}",
            "" if row.published_gain is None else f"{row.published_gain:+.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _text(found: Interval | None, sign: str = "") -> str:
    if found is None:
        return ""
    return f"{found.mean:{sign}.3f} [{found.low:{sign}.3f}, {found.high:{sign}.3f}]"


def conclusion(study: Study, row: Row) -> str:
    """Say in words what a variant's interval allows one to conclude; "" where there is nothing to compare."""
    gain, against = row.gain, row.variant.against
    if gain is None:
        return ""
    many = f"{len(row.gain_seeds)} seed{'s' * (len(row.gain_seeds) > 1)} and {row.clips} test clips"
    if gain.decided():
        word = "better" if gain.mean > 0 else "worse"
        text = f"**{row.variant.name}** is {word} than {against}: {_text(gain, '+')} with {many}."
        if len(row.gain_seeds) < FEW_SEEDS:
            text += " That is of these seeds: they are too few to speak for others."
    else:
        text = (
            f"**{row.variant.name}** against {against} is not decided: {_text(gain, '+')} with {many}; a gain above "
            f"{gain.high:.3f} or a loss above {max(0.0, -gain.low):.3f} is unlikely."
        )
    if row.needed is not None:
        enough = "is enough" if row.clips >= row.needed else "is too few"
        text += (
            f" The published difference of {row.published_gain:+.3f} would take {row.needed} test clips with as many seeds "
            f"to show (80 % power, by the clips' deviation here); {row.clips} {enough}."
        )
    return text


def _other_tables(study: Study, rows: Sequence[Row]) -> list[str]:
    """Return the other metrics of the task, and what the runs took."""
    finished = [run for row in rows for run in row.runs.values()]
    metrics = list(dict.fromkeys(m for run in finished for m in run.results()[study.task]))
    metrics = [m for m in metrics if m not in (study.metric, "clips")]
    lines = [
        "## Other metrics",
        "",
        "Means over seeds; the published value in brackets.",
        "",
        f"| variant | {' | '.join(metrics)} |",
        "|---|" + "---|" * len(metrics),
    ]
    for row in rows:
        cells = []
        for metric in metrics if row.runs else ():
            mean = statistics.mean(run.results()[study.task][metric] for run in row.runs.values())
            published = row.variant.published.get(metric)
            cells.append(f"{mean:.3f}" + ("" if published is None else f" ({published:.3f})"))
        if cells:
            lines.append(f"| {row.variant.name} | {' | '.join(cells)} |")
    return [*lines, ""]


def as_html(title: str, text: str, pictures: dict[str, bytes]) -> str:
    """Return the report as one HTML file with its pictures inside."""
    body = markdown.markdown(text, extensions=["tables"])
    for name, content in pictures.items():
        inside = f"data:image/png;base64,{base64.b64encode(content).decode()}"
        body = body.replace(f'src="{name}.png"', f'src="{inside}"')
    title = html.escape(title)
    return (
        f'<!doctype html><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>{body}\n'
    )
