"""With and without the self-supervised tasks on the 300-clip sample: runs, table and picture of the README.

    python benchmarks/sample.py build/results --jobs 2        (six runs of the recipe `sample`, one thread each)

A run that has its results.json is not run again. Not FSDKaggle2018: the sample is 221 + 79 clips of 10 classes.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
VARIANTS = {
    "tagging alone": ["--train.tasks", "[audio_tagging]"],
    "with all three auxiliary tasks": [],
}
SEEDS = (0, 1, 2)
METRICS = ("map@3", "accuracy", "map@3_single_crop", "accuracy_single_crop")


def folder_of(out: Path, variant: str, seed: int) -> Path:
    """Return a run's folder."""
    return out / f"{variant.replace(' ', '_')}_seed{seed}"


def run(out: Path, variant: str, seed: int, words: list[str]) -> dict:
    """Train one run unless it is there, and return its test results."""
    folder = folder_of(out, variant, seed)
    if not (folder / "results.json").exists():
        launch = [
            "accelerate",
            "launch",
            "--config_file",
            str(ROOT / "launch_configs/one_cpu.yaml"),
        ]
        entry = [str(ROOT / "mtl_dist/train.py"), "--config", "sample", "--run.resume", "auto"]
        options = ["--run.dir", str(folder), "--run.seed", str(seed), *words]
        out.mkdir(parents=True, exist_ok=True)
        with open(f"{folder}.log", "a") as log:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            subprocess.run(
                [*launch, *entry, *options], check=True, stderr=log, stdout=log, env=environment
            )
    return json.loads((folder / "results.json").read_text())["test"]


def table(out: Path, results: dict[str, dict[int, dict]]) -> str:
    """Return the README's table: a row per run, then mean and spread (largest - smallest) per variant."""
    lines = [
        "| run | " + " | ".join(METRICS) + " | minutes |",
        "|---|" + "---|" * (len(METRICS) + 1),
    ]
    for variant, runs in results.items():
        rows = [[run["audio_tagging"][metric] for metric in METRICS] for run in runs.values()]
        for seed, row in zip(runs, rows, strict=True):
            cells = " | ".join(f"{x:.3f}" for x in row)
            lines.append(
                f"| {variant}, seed {seed} | {cells} | {minutes(out, variant, seed):.0f} |"
            )
        columns = list(zip(*rows, strict=True))
        cells = [f"**{statistics.mean(c):.3f}** ({max(c) - min(c):.3f})" for c in columns]
        lines.append(f"| **{variant}, mean (spread)** | " + " | ".join(cells) + " | |")
    return "\n".join(lines)


def entries(out: Path, variant: str, seed: int) -> list[dict]:
    """Return what metrics.jsonl holds of a run."""
    text = (folder_of(out, variant, seed) / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def minutes(out: Path, variant: str, seed: int) -> float:
    """Return the time that a run trained and validated, final evaluation aside."""
    steps = [e for e in entries(out, variant, seed) if e["kind"] == "round"]
    rounds = [
        after["round"] - before["round"]
        for before, after in itertools.pairwise([{"round": 0}, *steps])
    ]
    seconds = [e["time/seconds_per_round"] for e in steps]
    return sum(s * n for s, n in zip(seconds, rounds, strict=True)) / 60


def auxiliary_table(runs: dict[int, dict]) -> str:
    """Return what the auxiliary tasks reached on held-out speech, per seed."""
    rows = {
        "noise reduction: SI-SDR improvement, dB": ("noise_reduction", "si_sdr_improvement"),
        "noise reduction: SI-SDR of the noisy input, dB": ("noise_reduction", "si_sdr_noisy"),
        "upsampling: log-spectral distance of its input, dB": ("upsampling", "lsd_input"),
        "upsampling: log-spectral distance of its output, dB": ("upsampling", "lsd_output"),
        "next step: prediction gain, dB": ("next_step", "prediction_gain"),
    }
    lines = [
        "| on held-out speakers | " + " | ".join(f"seed {seed}" for seed in runs) + " |",
        "|---|" + "---|" * len(runs),
    ]
    for name, (task, metric) in rows.items():
        cells = " | ".join(f"{run[task][metric]:.2f}" for run in runs.values())
        lines.append(f"| {name} | {cells} |")
    return "\n".join(lines)


def validation_curve(out: Path, variant: str, seed: int) -> tuple[list[float], list[float]]:
    """Return rounds and MAP@3 of a run's validations."""
    points = [
        (e["round"], e["validation/audio_tagging/map@3"])
        for e in entries(out, variant, seed)
        if e["kind"] == "validation"
    ]
    return tuple(zip(*points, strict=True))


def picture(out: Path, results: dict[str, dict[int, dict]], target: Path) -> None:
    """Draw the test MAP@3 of every run beside the validation curves."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.4), layout="constrained")
    for place, (variant, runs) in enumerate(results.items()):
        values = [run["audio_tagging"]["map@3"] for run in runs.values()]
        colour = f"C{place}"
        left.bar(place, statistics.mean(values), color=colour, alpha=0.45, width=0.6)
        left.scatter([place] * len(values), values, color=colour, zorder=3)
        left.text(place, 0.03, f"{statistics.mean(values):.3f}", ha="center", fontsize=11)
        for number, seed in enumerate(runs):
            curve = validation_curve(out, variant, seed)
            right.plot(*curve, color=colour, alpha=0.8, label=None if number else variant)
    left.set_xticks(range(len(results)), list(results))
    left.set_ylim(0, 1)
    left.set_ylabel("test MAP@3 (each seed, and mean)")
    left.set_title("300-clip sample, not FSDKaggle2018", fontsize=10)
    right.set_xlabel("round")
    right.set_ylabel("validation MAP@3")
    right.set_title("validation (19 clips)", fontsize=10)
    right.legend(fontsize=8, loc="lower right")
    figure.savefig(target, dpi=110)


def main() -> None:
    """Run what is missing, print the tables, draw the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder for the runs")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--picture", type=Path, default=ROOT / "benchmarks/sample_results.png")
    options, words = parser.parse_known_args()
    jobs = [(variant, seed) for seed in SEEDS for variant in VARIANTS]
    with ThreadPoolExecutor(options.jobs) as pool:
        done = dict(
            zip(
                jobs,
                pool.map(lambda job: run(options.out, *job, [*VARIANTS[job[0]], *words]), jobs),
                strict=True,
            )
        )
    results = {variant: {seed: done[variant, seed] for seed in SEEDS} for variant in VARIANTS}
    print(
        table(options.out, results),
        auxiliary_table(results["with all three auxiliary tasks"]),
        sep="\n\n",
    )
    picture(options.out, results, options.picture)


if __name__ == "__main__":
    main()
