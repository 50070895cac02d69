"""What `mtl-dist prepare` is given: a folder as published, or the published archives, which are unpacked first."""

import hashlib
import logging
import tarfile
import zipfile
import zlib
from pathlib import Path

from tqdm import tqdm

from mtl_dist.corpora.base import Listing, require_label
from mtl_dist.corpora.chime3 import Chime3
from mtl_dist.corpora.folder import Folder
from mtl_dist.corpora.fsdkaggle2018 import META, FSDKaggle2018
from mtl_dist.corpora.librispeech import LibriSpeech
from mtl_dist.preparing.encoding import Workers, measure
from mtl_dist.preparing.pieces import Piece, cut, name_within

log = logging.getLogger("mtl_dist")

LAYOUTS = {
    "fsdkaggle2018": (f"{META}/*.csv", ("FSDKaggle2018.*.zip",)),
    "librispeech": ("*/*/*/*-*-*.flac", ("*.tar.gz",)),
    "chime3": ("**/BGD_*", ("*.zip", "*.tar.gz")),
    "folder": ("", ()),
}
"""{kind: (files that tell the published folder, archives that it is published as)}."""

MD5 = {
    "FSDKaggle2018.audio_train.zip": "a8b47ff4b52022c178f88fa5c6f080d0",
    "FSDKaggle2018.audio_test.zip": "f85c8665c3fc39311ea1b748e194a81d",
    "FSDKaggle2018.meta.zip": "f16828ac8be0e5285b9175a12f90d784",
    "train-clean-100.tar.gz": "2a93770f6d5c6c964bc36631d331a522",
    "train-other-500.tar.gz": "d1a0fd59409feb2c614ce4d30c387708",
}
"""As published by Zenodo (record 2552860) and openslr.org/12."""

HEADERS = 64
"""Headers read by a process at a time."""

DONE = ".{}.unpacked"
"""Name of the empty file that says that an archive is unpacked to its end."""


def published(kind: str, source: Path) -> Path | None:
    """Return the folder as published: `source`, or LibriSpeech or FSDKaggle2018 in it; None where neither is one."""
    tell, _ = LAYOUTS[kind]
    folders = [source, *(source / name for name in ("FSDKaggle2018", "LibriSpeech"))]
    return next((f for f in folders if not tell or next(f.glob(tell), None)), None)


def look(kind: str, source: Path) -> tuple[Path | None, list[Path]]:
    """Return (the folder as published, or None; the archives beside it).

    Raises:
        ValueError: `source` has neither.
    """
    if not source.is_dir():
        what = "is a file; name the folder that holds it" if source.exists() else "does not exist"
        raise ValueError(f"FROM: {source} {what}")
    folder, (tell, patterns) = published(kind, source), LAYOUTS[kind]
    archives = sorted({path for pattern in patterns for path in source.glob(pattern)})
    if folder is None and not archives:
        raise ValueError(
            f"FROM: {source} is not {kind} as published: it holds neither {tell} nor an archive {' or '.join(patterns)}"
        )
    return folder, archives


def unpack_all(kind: str, archives: list[Path], target: Path) -> Path:
    """Unpack the archives that are not unpacked yet, and return the folder as published. Raises ValueError."""
    for archive in archives:
        unpack(archive, target)
    folder = published(kind, target)
    if folder is None:
        names = ", ".join(archive.name for archive in archives)
        raise ValueError(
            f"FROM: there is no {LAYOUTS[kind][0]} in {names}: not {kind} as published"
        )
    return folder


def unpack(archive: Path, target: Path) -> None:
    """Unpack a zip or tar into `target` once, checked against its md5 if that is known; begun again if it was cut off.

    Raises:
        ValueError: another md5 than the published one, or an archive that is broken.
    """
    done = target / DONE.format(archive.name)
    if done.exists():
        return
    if archive.name in MD5:
        print(f"checking {archive}", flush=True)
        with open(archive, "rb") as file:
            found = hashlib.file_digest(file, "md5").hexdigest()
        if found != MD5[archive.name]:
            raise ValueError(
                f"{archive}: its md5 is {found}, that of the published file {MD5[archive.name]}; download it again"
            )
    else:
        log.warning("%s is taken unchecked: its md5 is not known", archive)
    print(f"unpacking {archive}", flush=True)
    target.mkdir(parents=True, exist_ok=True)
    try:
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as file:
                file.extractall(target)
        else:
            with tarfile.open(archive) as file:
                file.extractall(target, filter="data")
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error) as error:
        raise ValueError(f"{archive}: cannot be unpacked ({error}); download it again") from error
    done.touch()


def list_clips(kind: str, folder: Path, manifest: Path | None, labelled: bool) -> Listing:
    """List a published folder by the code that training lists it with; every row has a split.

    Raises:
        ValueError: what is wrong with a folder, table or row; or two clips have one id.
    """
    root = str(folder)
    if kind == "fsdkaggle2018":
        corpus = FSDKaggle2018(root=root)
    elif kind == "librispeech":
        splits = sorted({path.parts[-4] for path in folder.glob(LAYOUTS[kind][0])})
        corpus = LibriSpeech(root=root, splits=splits)
    elif kind == "chime3":
        corpus = Chime3(root=root)
    else:
        corpus = Folder(
            root=root, manifest=None if manifest is None else str(manifest), labelled=labelled
        )
    listing = corpus.listing(kind)
    seen: set[str] = set()
    for row in listing.rows:
        row["split"] = row["split"] or "train"
        if row["id"] in seen:
            raise ValueError(f"{row['path']}: another clip has the id {row['id']!r} too")
        seen.add(row["id"])
    if kind == "folder":
        listing.classes = sorted(
            {row["label"] for row in listing.rows if row["label"] and row["split"] == "train"}
        )
        for row in listing.rows:
            if row["label"]:
                require_label(
                    row["label"], listing.classes, f"{row['path']}, not among the training labels"
                )
    return listing


def survey(
    kind: str, encoding: str, folder: Path, listing: Listing, workers: Workers
) -> tuple[list[Piece], dict[str, int], list[dict]]:
    """Read all headers: (pieces, {path: bytes}, {"file", "reason"} of what is to be skipped)."""
    paths = [str(row["path"]) for row in listing.rows]
    lots = [paths[i : i + HEADERS] for i in range(0, len(paths), HEADERS)]
    pieces, sizes, unusable, found = [], {}, [], []
    with tqdm(total=len(paths), desc="headers", unit="file", disable=None) as bar:
        for lot in workers.in_order(measure, lots):
            found += lot
            bar.update(len(lot))
    for row, header in zip(listing.rows, found, strict=True):
        name = name_within(folder, Path(row["path"]))
        if isinstance(header, str):
            unusable.append({"file": name, "reason": header})
            continue
        frames, rate, sizes[str(row["path"])] = header
        pieces += cut(row, name, frames, rate, kind, encoding)
    for path in (path for paths in listing.missing.values() for path in paths):
        unusable.append({"file": name_within(folder, Path(path)), "reason": "is not there"})
    return pieces, sizes, sorted(unusable, key=lambda entry: entry["file"])
