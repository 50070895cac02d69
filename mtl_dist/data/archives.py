"""What `mtl-dist prepare` is given: a folder as published, or the published archives, which are unpacked first.

Tested by tests/test_prepare.py.
"""

import hashlib
import logging
import shutil
import tarfile
import zipfile
import zlib
from pathlib import Path

log = logging.getLogger("mtl_dist")

LAYOUTS = {
    "fsdkaggle2018": ("FSDKaggle2018.meta/*.csv", ("FSDKaggle2018.*.zip",)),
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

BROKEN = (shutil.ReadError, zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error)


def look(kind: str, source: Path) -> tuple[Path | None, list[Path]]:
    """Return (the folder as published, or None; the archives beside it). Raises ValueError if there is neither."""
    if not source.is_dir():
        what = "is a file; name the folder that holds it" if source.exists() else "does not exist"
        raise ValueError(f"FROM: {source} {what}")
    folder, (tell, patterns) = _published(kind, source), LAYOUTS[kind]
    archives = sorted({path for pattern in patterns for path in source.glob(pattern)})
    if folder is None and not archives:
        raise ValueError(
            f"FROM: {source} is not {kind} as published: it holds neither {tell} nor an archive {' or '.join(patterns)}"
        )
    if folder is not None and archives:
        log.warning("%s is read as it is; archives such as %s are left alone", folder, archives[0])
    return folder, archives


def _published(kind: str, source: Path) -> Path | None:
    folders = [source, source / "FSDKaggle2018", source / "LibriSpeech"]
    tell = LAYOUTS[kind][0]
    return next((f for f in folders if not tell or next(f.glob(tell), None)), None)


def unpack_all(kind: str, archives: list[Path], target: Path) -> Path:
    """Unpack what is not unpacked yet, and return the folder as published. Raises ValueError."""
    target.mkdir(parents=True, exist_ok=True)
    for archive in archives:
        done = target / f".{archive.name}.unpacked"  # an archive that was cut off is begun again
        if not done.exists():
            _unpack(archive, target)
            done.touch()
    folder = _published(kind, target)
    if folder is None:
        names = ", ".join(archive.name for archive in archives)
        raise ValueError(f"FROM: no {LAYOUTS[kind][0]} in {names}: not {kind} as published")
    return folder


def _unpack(archive: Path, target: Path) -> None:
    print(f"checking and unpacking {archive}", flush=True)
    with open(archive, "rb") as file:
        found, known = hashlib.file_digest(file, "md5").hexdigest(), MD5.get(archive.name)
    if known is None:
        log.warning("%s is taken unchecked: its md5 is not known", archive)
    elif found != known:
        raise ValueError(
            f"{archive}: its md5 is {found}, that of the published file {known}; download it again"
        )
    try:
        only_data = {} if archive.suffix == ".zip" else {"filter": "data"}
        shutil.unpack_archive(archive, target, **only_data)
    except BROKEN as error:
        raise ValueError(f"{archive}: cannot be unpacked ({error}); download it again") from error
