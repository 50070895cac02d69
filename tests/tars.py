"""Tars as WebDataset writes them, and the index of NVIDIA DALI's wds2idx, written with the standard library alone."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np

COUNTS = [37, 3, 20]
"""Samples of the tars that `write` writes."""


def members(first: int, count: int, size: int = 6000) -> list[tuple[str, bytes]]:
    """(name, bytes) of samples of a flac and a JSON member each; every fifth has a txt, too."""
    found = []
    for number in range(first, first + count):
        key, draw = f"part.one/clip-{number:04d}", np.random.default_rng(number)
        about = {
            "speaker": number % 4,
            "label": f"class {number % 3}",
            "seconds": number / 8,
            "x": 1,
        }
        found.append((f"{key}.flac", draw.bytes(int(draw.integers(size // 2, size)))))
        found.append((f"{key}.json", json.dumps(about).encode()))
        if number % 5 == 0:
            found.append((f"{key}.txt", f"said {number}\n".encode()))
    return found


def pack(path: Path, files: list[tuple[str, bytes]], index: bool = False) -> Path:
    """Write a tar of (name, bytes), and an index beside it if it shall have one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines: dict[str, list[str]] = {}
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
            offset = tar.offset - -(-len(data) // 512) * 512
            folder, _, base = name.rpartition("/")
            key, _, extension = base.partition(".")
            lines.setdefault(f"{folder}/{key}", []).append(
                f"{extension} {offset} {len(data)} {name}"
            )
    if index:
        text = [f"v1.2 {len(lines)}", *(" ".join(line) for line in lines.values())]
        path.with_suffix(".idx").write_text("\n".join(text) + "\n")
    return path


def pack_librispeech(root: Path, out: Path, per_tar: int = 7, **about) -> Path:
    """Pack a folder as published into tars, with its ids for keys and JSON members of {"speaker", **about}."""
    paths = sorted(root.glob("*/*/*/*.flac"))
    for number, first in enumerate(range(0, len(paths), per_tar)):
        files = []
        for path in paths[first : first + per_tar]:
            key = f"{path.parts[-4]}/{path.stem}"
            said = {"speaker": path.parts[-3]} | {n: of(path) for n, of in about.items()}
            files += [
                (f"{key}.json", json.dumps(said).encode()),
                (f"{key}.flac", path.read_bytes()),
            ]
        pack(out / f"train-{number:05d}.tar", files, index=number % 2 == 0)
    return out


def write(folder: Path) -> Path:
    """Write three tars of COUNTS samples, the first of them with an index."""
    for number, count in enumerate(COUNTS):
        pack(folder / f"train-{number:05d}.tar", members(100 * number, count), index=number == 0)
    return folder
