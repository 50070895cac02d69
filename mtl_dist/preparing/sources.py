"""What `mtl-dist prepare` is given: a folder as published, or the published archives, which are unpacked first."""

import hashlib
import logging
import tarfile
import zipfile
import zlib
from pathlib import Path

from mtl_dist.corpora.base import Listing, require_label
from mtl_dist.corpora.chime3 import Chime3
from mtl_dist.corpora.folder import Folder
from mtl_dist.corpora.fsdkaggle2018 import META, FSDKaggle2018
from mtl_dist.corpora.librispeech import LibriSpeech

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

DONE = ".{}.unpacked"
"""Name of the empty file that says that an archive is unpacked to its end."""


def published(kind: str, source: Path) -> Path | None:
    """Return the folder as published: `source`, or LibriSpeech or FSDKaggle2018 in it; None where neither is one."""
    tell, _ = LAYOUTS[kind]
    folders = [source, *(source / name for name in ("FSDKaggle2018", "LibriSpeech"))]
    return next((f for f in folders if not tell or next(f.glob(tell), None)), None)


def find_source(kind: str, source: Path, unpacked: Path) -> Path:
    """Return the folder as published, unpacking the archives in `source` into `unpacked` if there is none.

    Raises:
        ValueError: neither is in `source`, or an archive is broken or not the published one.
    """
    if not source.is_dir():
        what = "is a file; name the folder that holds it" if source.exists() else "does not exist"
        raise ValueError(f"FROM: {source} {what}")
    _, patterns = LAYOUTS[kind]
    archives = sorted({path for pattern in patterns for path in source.glob(pattern)})
    folder = published(kind, source)
    if folder is not None:
        if archives:
            log.warning(
                "%s is read as it is; its archives are left alone: %s", folder, archives[0].name
            )
        return folder
    for archive in archives:
        unpack(archive, unpacked)
    folder = published(kind, unpacked) if archives else None
    if folder is None:
        raise ValueError(
            f"FROM: {source} is not {kind} as published: there is no {LAYOUTS[kind][0]} in it"
            + (f", nor in its archives {', '.join(a.name for a in archives)}" if archives else "")
            + f", and no other archive such as {' or '.join(patterns)}"
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
        log.warning("checking %s", archive)
        with open(archive, "rb") as file:
            found = hashlib.file_digest(file, "md5").hexdigest()
        if found != MD5[archive.name]:
            raise ValueError(
                f"{archive}: its md5 is {found}, that of the published file {MD5[archive.name]}; download it again"
            )
    else:
        log.warning("%s is taken unchecked: its md5 is not known", archive)
    log.warning("unpacking %s", archive)
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
