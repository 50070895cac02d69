"""The command `mtl-dist`: what is done with a trained model.

    mtl-dist evaluate runs/demo --split test        one process; with several: accelerate launch -m mtl_dist.cli evaluate ...

Tested by tests/test_cli.py.
"""

import argparse
import csv
import logging
import sys
from pathlib import Path

from mtl_dist import checkpoint, pictures
from mtl_dist.config import ConfigError, load_config
from mtl_dist.corpora.base import SPLITS
from mtl_dist.evaluation import Evaluation, evaluate
from mtl_dist.experiment import Experiment, build_together
from mtl_dist.run_folder import RunFolder
from mtl_dist.runtime import LaunchError, start
from mtl_dist.tables import format_rows, per_class_rows, results_table


def add_evaluate(commands) -> None:
    """Declare `mtl-dist evaluate`."""
    command = commands.add_parser(
        "evaluate",
        help="score a checkpoint on a split",
        description="Score a checkpoint: MAP@3 and accuracy by averaged windows and by a single crop, per class, and "
        "every other task. Words such as --corpora.fsdkaggle2018.root DIR override the saved configuration.",
    )
    command.add_argument(
        "checkpoint",
        type=Path,
        help="checkpoint folder, or run folder",
    )
    command.add_argument(
        "--which", choices=("best", "last"), default="best", help="of a run folder (default: best)"
    )
    command.add_argument(
        "--split", choices=SPLITS, default="test", help="what to score (default: test)"
    )
    command.add_argument(
        "--out",
        type=Path,
        help="folder for results.json, per-class tables and confusion matrices (default: the run folder)",
    )
    command.set_defaults(act=run_evaluate)


def run_evaluate(options: argparse.Namespace, overrides: list[str]) -> None:
    """Evaluate, print the tables and write results.json, CSVs and pictures. Raises ValueError for a wrong path."""
    path = checkpoint.find(options.checkpoint, options.which)
    config = load_config(["--config", str(path / "config.yaml"), *overrides])
    accelerator = start(config.train.mixed_precision)
    try:
        experiment = build_together(accelerator, config)
        model = experiment.build_model().to(accelerator.device)
        checkpoint.load_weights(path, model)
        result = evaluate(accelerator, model, experiment, options.split)
        if accelerator.is_main_process:
            run = path.parent.parent if path.parent.name == "checkpoints" else path
            _report(result, experiment, options.split, path, options.out or run)
    finally:
        accelerator.end_training()


def _report(result: Evaluation, experiment: Experiment, split: str, path: Path, out: Path) -> None:
    folder = RunFolder(out)
    out.mkdir(parents=True, exist_ok=True)
    numbers = {split: result.numbers()}
    folder.save_results(numbers)
    print(f"{path}, {split}\n\n{results_table(numbers)}\n")
    for name, task in experiment.tasks.items():
        classes = task.class_names()
        if not classes or "confusion" not in result.metrics[name]:
            continue
        counts = result.confusion(name)
        rows = per_class_rows(counts, result.metrics[name]["map@3_per_class"], classes)
        print(f"{name}, per class\n\n{format_rows(rows)}\n")
        stem = f"{split}_{name}"
        with open(out / f"{stem}_per_class.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
        with open(out / f"{stem}_confusion.csv", "w", newline="", encoding="utf-8") as file:
            table = [[c, *map(int, row)] for c, row in zip(classes, counts.tolist(), strict=True)]
            csv.writer(file).writerows([["truth \\ guess", *classes], *table])
        figure = pictures.confusion_matrix(counts, classes, f"{name}, {split}")
        figure.savefig(out / f"{stem}_confusion.png", dpi=110)
        print(f"written: {out}/results.json, {stem}_per_class.csv, {stem}_confusion.csv and .png")


def main(words: list[str] | None = None) -> None:
    """Run a command of `mtl-dist`; mistakes of the user end with one line and exit code 1."""
    logging.basicConfig(format="%(levelname)s: %(message)s", stream=sys.stderr)
    parser = argparse.ArgumentParser(prog="mtl-dist", description="Use trained multitask models.")
    add_evaluate(parser.add_subparsers(required=True, metavar="COMMAND"))
    options, overrides = parser.parse_known_args(words)
    try:
        options.act(options, overrides)
    except (ConfigError, LaunchError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
