"""Where ours spends its time on a clip: cProfile over some batches without workers, and the way from a worker by itself.

    python benchmarks/rivals/stages.py build/loading

after benchmarks/loading.py has written its files there. cProfile makes what consists of many small calls look dearer: the
first two lines say by how much.
"""

import argparse
import cProfile
import pstats
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from torch.utils.data import DataLoader, IterableDataset

sys.path.insert(0, str(Path(__file__).parent.parent))

from loading import cpu_seconds

from rivals import common, ours_folders, ours_prepared, ours_prepared_wav

STAGES = {
    "rows, and their blocks": ("lanes.py", "__next__", None),
    "- reading blocks (speech and noise)": ("faults.py", "call_with_timeout", None),
    "keyed generators": ("keys.py", "generator", None),
    "the crop: open, ends, read, normalise": ("batches.py", "read_crops", None),
    "- finding the sounding span": ("reading.py", "sounding_span", None),
    "- reading the stretch": ("reading.py", "read_stretch", "crop"),
    "- normalising": ("transforms.py", "peak_normalise", None),
    "the task: noise, mix, held input, padding": ("ours.py", "prepare", None),
    "- cutting noise": ("clips.py", "cut", None),
    "- mixing": ("transforms.py", "mix_at_snr", None),
    "- held 4 kHz input": ("transforms.py", "hold_samples", None),
    "- padding to tensors": ("base.py", "pad_waves", None),
    "opening files (crop and noise)": ("reading.py", "open_clip", None),
    "seeking (crop and noise)": ("soundfile.py", "seek", None),
    "reading samples (crop and noise)": ("soundfile.py", "read", None),
    "putting clips together": ("~", "<built-in method torch.cat>", None),
}
"""{what: (end of the file's name, function, its caller, or None for all)}."""


class Same(IterableDataset):
    """The same batch again and again, copied as if it were made anew."""

    def __init__(self, batch: common.Batch):
        self.batch = batch

    def __iter__(self):
        while True:
            yield tuple(wave.clone() for wave in self.batch)


def milliseconds_a_clip(act: Callable[[], object], clips: int) -> tuple[float, float]:
    """Return (milliseconds, of the processor) of a call that makes so many clips, over their number."""
    began, cpu = time.perf_counter(), cpu_seconds()
    act()
    return 1e3 * (time.perf_counter() - began) / clips, 1e3 * (cpu_seconds() - cpu) / clips


def spent(stats: pstats.Stats, file: str, function: str, caller: str | None) -> tuple[float, int]:
    """Return (seconds, calls) in a function and what it calls."""
    seconds, calls = 0.0, 0
    for (name, _, found), (_, count, _, whole, callers) in stats.stats.items():
        if name.endswith(file) and found == function:
            for (_, _, by), (_, n, _, part) in callers.items() if caller else ():
                seconds, calls = (seconds + part, calls + n) if by == caller else (seconds, calls)
            if not caller:
                seconds, calls = seconds + whole, calls + count
    return seconds, calls


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("work", type=Path)
    kinds = {"folders": ours_folders, "flac": ours_prepared, "wav": ours_prepared_wav}
    parser.add_argument("--from", dest="kind", choices=kinds, default="folders")
    parser.add_argument("--batches", type=int, default=20)
    options = parser.parse_args()
    contender, number = kinds[options.kind], options.batches
    clips, batches = number * common.BATCH, contender.batches(options.work, 0)
    batch = next(batches)
    whole, cpu = milliseconds_a_clip(lambda: list(islice(batches, number)), clips)
    print(
        f"| without the profiler | {whole:.2f} ms a clip, of the processor {cpu:.2f} | |\n|---|---|---|"
    )
    profile = cProfile.Profile(time.process_time)
    profile.enable()
    whole, cpu = milliseconds_a_clip(lambda: list(islice(batches, number)), clips)
    profile.disable()
    print(f"| under the profiler | {whole:.2f}, of the processor {cpu:.2f} | calls a clip |")
    stats = pstats.Stats(profile)
    for what, place in STAGES.items():
        seconds, calls = spent(stats, *place)
        print(f"| {what} | {1e3 * seconds / clips:.3f} | {calls / clips:.1f} |")
    loader = iter(DataLoader(Same(batch), batch_size=None, num_workers=1))
    list(islice(loader, 5))
    _, cpu = milliseconds_a_clip(lambda: list(islice(loader, 100)), 100 * common.BATCH)
    print(f"| from a worker, of the processor of both | {cpu:.3f} | |")


if __name__ == "__main__":
    main()
