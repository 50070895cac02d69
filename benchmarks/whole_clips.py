"""Whole clips against crops of 2 s on the 300-clip sample: tagging alone, three seeds, the same number of rounds.

    python benchmarks/whole_clips.py build/whole_clips --jobs 2        (six runs of the recipe `sample`, one thread each)

A run that has its results.json is not run again. Both are scored on whole-clip averages (map@3, accuracy: of windows of 2 s,
or of the clip at once) and on one crop of 2 s. 300-clip sample, not FSDKaggle2018.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sample import ROOT, SEEDS, run, table

BOTH = ["--train.tasks", "[audio_tagging]", "--data.crop_seconds", "2"]
ARMS = {
    "crops of 2 s": [],
    # a clip at a time: no padding, and the least memory; the gradient is that of all at once
    "whole clips": ["--tasks.audio_tagging.crop_seconds", "null", "--train.micro_batch", "1"],
}


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder for the runs")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--rounds", type=int, default=1000, help="of every run (default: 1000)")
    parser.add_argument("--sample", type=Path, default=ROOT / "build/sample", help="as unpacked")
    options, words = parser.parse_known_args()
    out = options.out / f"{options.rounds}_rounds"
    common = [*BOTH, "--train.rounds", str(options.rounds)]
    common += ["--corpora.fsdkaggle2018.root", str(options.sample / "FSDKaggle2018")]
    jobs = [(arm, seed) for seed in SEEDS for arm in ARMS]
    with ThreadPoolExecutor(options.jobs) as pool:
        scores = pool.map(lambda job: run(out, *job, [*common, *ARMS[job[0]], *words]), jobs)
        done = dict(zip(jobs, scores, strict=True))
    print(f"300-clip sample, not FSDKaggle2018: {options.rounds} rounds, test side of 79 clips\n")
    print(table(out, {arm: {seed: done[arm, seed] for seed in SEEDS} for arm in ARMS}))


if __name__ == "__main__":
    main()
