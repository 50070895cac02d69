"""The command `mtl-dist`: what is done before a run, and with a trained model.

    mtl-dist evaluate runs/demo --split test        one process; with several: accelerate launch -m mtl_dist.cli evaluate ...
    mtl-dist plan --config demo --nodes 1 --gpus-per-node 2                                                    (planning.py)
    mtl-dist doctor --config demo                                                                              (doctor.py)
    mtl-dist prepare librispeech data/LibriSpeech prepared/librispeech                                  (data/prepare.py)
    mtl-dist study table1 --seeds 0,1,2 --out runs/table1                                        (experiments/runner.py)
    mtl-dist report runs/table1                                                                  (experiments/report.py)

Tested by tests/test_cli.py.
"""

import argparse
import csv
import json
import logging
import sys
from pathlib import Path

from safetensors import SafetensorError

from mtl_dist import checkpoint, pictures
from mtl_dist.config import ConfigError, load_config
from mtl_dist.data.faults import DataError, exit_with
from mtl_dist.data.prepare import add_prepare
from mtl_dist.data.sources import SPLITS
from mtl_dist.doctor import add_doctor
from mtl_dist.evaluation import Evaluation, evaluate
from mtl_dist.experiment import Experiment, build_together
from mtl_dist.experiments.report import add_report
from mtl_dist.experiments.runner import add_study
from mtl_dist.phases import Phases
from mtl_dist.planning import add_plan
from mtl_dist.run_folder import RunFolder
from mtl_dist.runtime import LaunchError, leave, start
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
        "--which",
        choices=("best", "last"),
        help="of a run folder (default: the run's evaluation.checkpoint)",
    )
    command.add_argument(
        "--split", choices=SPLITS, default="test", help="what to score (default: test)"
    )
    command.add_argument(
        "--out",
        type=Path,
        help="folder for results.json, predictions, per-class tables and confusion matrices (default: the run folder; "
        "RUN/evaluations/CHECKPOINT for another checkpoint than the run's own, or with other settings)",
    )
    command.set_defaults(act=run_evaluate)


def run_evaluate(options: argparse.Namespace, overrides: list[str]) -> None:
    """Evaluate, print the tables and write results.json, CSVs and pictures. Raises ValueError for what is wrong."""
    run, path, own = chosen(options.checkpoint, options.which)
    config = load_config(["--config", str(path / "config.yaml"), *overrides])
    accelerator = start(config.train.mixed_precision)
    try:
        experiment = build_together(accelerator, config, Phases())
        model = experiment.build_model().to(accelerator.device)
        check_classes(path, experiment)
        checkpoint.load_weights(path, model)
        result = evaluate(accelerator, model, experiment, options.split)
        if accelerator.is_main_process:
            beside = run if own and not overrides else run / "evaluations" / path.name
            _report(result, experiment, options.split, path, options.out or beside)
        problem = result.too_many_bad(config.data.max_bad_share)
        if problem is not None:
            raise ValueError(f"the results are not to be trusted: {problem}")
    finally:
        leave(accelerator)


def chosen(path: Path, which: str | None) -> tuple[Path, Path, bool]:
    """Return (run folder, checkpoint, whether the run's own results are of it) for a run or checkpoint folder.

    `which` (best or last) is by default the run's own evaluation.checkpoint. Raises ValueError if there is none.
    """
    run = path.resolve().parent.parent if path.resolve().parent.name == "checkpoints" else path
    newest = checkpoint.find(path, "last")
    own = load_config(["--config", str(newest / "config.yaml")]).evaluation.checkpoint
    if run == path:
        found = checkpoint.find(path, which or own)
        return run, found, which in (None, own)
    return run, newest, newest.name == checkpoint.find(run, own).name


def check_classes(path: Path, experiment: Experiment) -> None:
    """Raise ValueError if the corpora's classes are not those that a checkpoint was trained on."""
    about = json.loads((path / "model.json").read_text(encoding="utf-8"))
    for name, task in experiment.tasks.items():
        trained, now = about["tasks"][name]["classes"], task.class_names()
        if trained != now:
            other = sorted(set(trained) ^ set(now)) or ["their order"]
            raise ValueError(
                f"checkpoint {path}: tasks.{name} was trained on {len(trained)} classes and the corpus has {len(now)}; "
                f"they differ in {', '.join(other[:5])}"
            )


def _report(result: Evaluation, experiment: Experiment, split: str, path: Path, out: Path) -> None:
    numbers = {split: result.numbers()}
    print(f"{path}, {split}, {len(result.bad)} bad files\n\n{results_table(numbers)}\n")
    out.mkdir(parents=True, exist_ok=True)
    RunFolder(out).save_predictions(split, result.predictions, experiment.classes())
    RunFolder(out).save_results(numbers)
    for name, classes in experiment.classes().items():
        if "confusion" not in result.metrics[name]:
            continue
        counts = result.confusion(name)
        rows = per_class_rows(counts, result.metrics[name]["map@3_per_class"], classes)
        print(f"{name}, per class\n\n{format_rows(rows)}\n")
        _write_classes(counts, rows, classes, out, f"{split}_{name}")


def _write_classes(counts, rows: list[tuple], classes: list[str], out: Path, stem: str) -> None:
    """Write a labelled task's per-class table and confusion matrix (K, K) as CSV, and the matrix as a picture."""
    with open(out / f"{stem}_per_class.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    with open(out / f"{stem}_confusion.csv", "w", newline="", encoding="utf-8") as file:
        table = [[c, *map(int, row)] for c, row in zip(classes, counts.tolist(), strict=True)]
        csv.writer(file).writerows([["truth \\ guess", *classes], *table])
    figure = pictures.confusion_matrix(counts, classes, stem.replace("_", " ", 1))
    figure.savefig(out / f"{stem}_confusion.png", dpi=110)
    print(
        f"written: {out}/results.json, predictions/, {stem}_per_class.csv, {stem}_confusion.csv and .png"
    )


def main(words: list[str] | None = None) -> None:
    """Run a command of `mtl-dist`; mistakes of the user end with one line and exit code 1."""
    logging.basicConfig(format="%(levelname)s: %(message)s", stream=sys.stderr)
    parser = argparse.ArgumentParser(
        prog="mtl-dist", description="Prepare corpora, plan and check runs, use trained models."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_evaluate(commands)
    add_plan(commands)
    add_doctor(commands)
    add_prepare(commands)
    add_study(commands)
    add_report(commands)
    options, overrides = parser.parse_known_args(words)
    try:
        options.act(options, overrides)
    except (ConfigError, LaunchError, DataError, ValueError, OSError, SafetensorError) as error:
        exit_with(f"error: {error}")


if __name__ == "__main__":
    main()
