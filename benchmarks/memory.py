"""What a rank holds of a model of 101 million parameters under every engine, on one and two CPU processes: GiB, a table.

    python benchmarks/memory.py build/memory                  a quarter of an hour on two cores, 8 GiB
    python benchmarks/memory.py build/memory FSDP2 ZeRO-3

The model is the trunk of the recipe `large` with one head, in fp32; two rounds are made on 8 clips of up to 60 made-up
samples, so that activations are small. Parameters and Adam (with DeepSpeed's own fp32 copy) are counted by storages of
tensors, after the second round; resident is what the process has grown by then, and at most during the round; copy is what
the whole model for an evaluation adds, where the engine needs one. What was measured before is not measured again.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import tiny

ROOT = Path(__file__).parent.parent
ENGINES = {"DDP": "", "FSDP2": "fsdp2_", "ZeRO-1": "zero1_", "ZeRO-2": "zero2_", "ZeRO-3": "zero3_"}
MODEL = "--model.blocks 3 --model.layers 8 --model.channels 1024 --model.input_gain 1".split()
MODEL += ["--train.tasks", "[audio_tagging]", "--tasks.audio_tagging.hidden", "[512]"]
"""The trunk of mtl_dist/recipes/large.yaml with one of its heads: 101 million parameters."""
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_TRIM_THRESHOLD_": str(2**20)}
"""Lets the C library give freed tensors back to the system, so that what is resident is what is used."""
COLUMNS = "engine, ranks, parameters, Adam, both, resident, resident at most, copy, copy seconds"
GIB = 2**30


def measure(out: Path, engine: str, ranks: int) -> dict:
    """Launch the worker, unless it has been run before, and return rank 0's figures."""
    place = out / f"{engine}_{ranks}"
    place.mkdir(parents=True, exist_ok=True)
    if not (place / "memory_0.json").exists():
        file = ROOT / "launch_configs" / f"{ENGINES[engine]}two_cpu_processes.yaml"
        options = ["--config_file", str(file), "--num_processes", str(ranks)]
        worker = [str(ROOT / "tests/workers/memory_worker.py"), str(out / "corpora"), str(place)]
        subprocess.run(
            ["accelerate", "launch", *options, *worker, *MODEL],
            check=True,
            cwd=ROOT,
            env=os.environ | MALLOC | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=(place / "log").open("w"),
        )
    return json.loads((place / "memory_0.json").read_text())


def main(out: Path, engines: list[str]) -> None:
    """Measure and print."""
    if not (out / "corpora").exists():
        tiny.write_corpora(out / "corpora")
    rows = [COLUMNS.split(", "), ["---"] * 9]
    for engine in engines:
        one, two = (measure(out, engine, ranks) for ranks in (1, 2))
        for ranks, found in ((1, one), (2, two)):
            rows.append([engine, str(ranks), *cells(found)])
        ratios = [two["held"][k] / one["held"][k] for k in ("parameters", "optimizer")]
        kept = sum(two["held"][k] for k in ("parameters", "optimizer"))
        ratios.append(kept / sum(one["held"][k] for k in ("parameters", "optimizer")))
        rows.append([engine, "2 : 1", *(f"{ratio:.3f}" for ratio in ratios), "", "", "", ""])
    for row in rows:
        print("| " + " | ".join(row) + " |")


def cells(found: dict) -> list[str]:
    """Return a row's figures in GiB."""
    held = found["held"]
    both = held["parameters"] + held["optimizer"]
    counts = [held["parameters"], held["optimizer"], both, found["resident"]]
    counts += [found["resident_peak"], found["copy_resident"]]
    return [*(f"{count / GIB:.2f}" for count in counts), f"{found['copy_seconds']:.1f}"]


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or list(ENGINES))
