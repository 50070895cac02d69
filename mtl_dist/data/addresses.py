"""Files by their addresses: a path, or a URL of any fsspec file system."""

import os

import fsspec


def is_local(name: str) -> bool:
    """Return whether it is a path, not a URL."""
    return "://" not in name


def stamp(name: str) -> tuple[int, int] | None:
    """Return (bytes, time of change in ns) of a file on a disk; None where it is not there."""
    if not is_local(name):
        return None
    try:
        found = os.stat(name)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def size(name: str) -> int:
    """Return the bytes of a file, 0 where they are not known."""
    system, path = fsspec.url_to_fs(name)
    return (system.size(path) or 0) if system.exists(path) else 0


def key(name: str) -> str:
    """Return what tells a file at a URL from another state of it; a Hub's is pinned by the commit in its name."""
    if is_local(name):
        return "shard"
    if name.startswith("hf://"):
        return name.split("@")[1].split("/")[0] if "@" in name else name
    system, path = fsspec.url_to_fs(name)
    return str(system.ukey(path))
