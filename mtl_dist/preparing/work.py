"""A prepared corpus while it is being written: where it stands, what it was begun with, and its manifest at the end.

OUT/.preparing/settings.json             what it was begun with
OUT/.preparing/train-00003-of-00027.json a shard that is whole: counts, checksum, what was skipped
OUT/manifest.json                        written last; .preparing is removed after it
"""

import fcntl
import json
import shutil
from pathlib import Path

from mtl_dist.preparing.pieces import RATE, Shard
from mtl_dist.run_folder import write_atomically

MANIFEST = "manifest.json"
FORMAT = 1


class Work:
    """The folder OUT and what is known of it. One process at a time: a second one is refused."""

    def __init__(self, out: Path, settings: dict):
        """Open OUT for `settings` {option: value}.

        Raises:
            ValueError: OUT holds something else, was begun with other settings, or is being written.
        """
        self.out, self.folder = out, out / ".preparing"
        begun = (out / MANIFEST).exists() or self.folder.is_dir()
        if out.exists() and not out.is_dir():
            raise ValueError(f"OUT: {out} is not a folder")
        if out.is_dir() and any(out.iterdir()) and not begun:
            raise ValueError(
                f"OUT: {out} is not empty and not a prepared corpus; name a new or an empty folder"
            )
        self.manifest = read_manifest(out) if (out / MANIFEST).exists() else None
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock()
        path = self.folder / "settings.json"
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else settings
        self.settings = self.manifest["settings"] if self.manifest else before
        for field, value in settings.items():
            self.require(field, value)
        self._save_settings()

    def _lock(self) -> None:
        self.lock = open(self.folder / "lock", "w", encoding="utf-8")
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by workers
        except (BlockingIOError, PermissionError):
            raise ValueError(f"OUT: another process is preparing {self.out}") from None

    def _save_settings(self) -> None:
        write_atomically(self.folder / "settings.json", json.dumps(self.settings))

    def require(self, field: str, value: object) -> None:
        """Raise ValueError unless OUT was begun with this value; remember it if it is new."""
        if field not in self.settings:
            self.settings[field] = value
            self._save_settings()
        elif self.settings[field] != value:
            raise ValueError(
                f"{field}: {self.out} was begun with {self.settings[field]!r} and this is {value!r}; use another OUT, or "
                "remove it to begin anew"
            )

    def record(self, shard: Shard) -> dict | None:
        """Return what was noted of a shard if it is whole, else None."""
        note, path = self._note(shard), self.out / shard.file
        if not note.exists() or not path.exists():
            return None
        facts = json.loads(note.read_text(encoding="utf-8"))
        return facts if facts["bytes"] == path.stat().st_size else None

    def note(self, shard: Shard, facts: dict) -> None:
        """Say that a shard is whole."""
        write_atomically(self._note(shard), json.dumps(facts))

    def _note(self, shard: Shard) -> Path:
        return self.folder / f"{Path(shard.file).stem}.json"

    def finish(self, manifest: dict) -> None:
        """Write the manifest, which makes it a prepared corpus, and remove what was only needed on the way."""
        text = json.dumps(manifest | {"settings": self.settings}, indent=1, ensure_ascii=False)
        write_atomically(self.out / MANIFEST, text + "\n")
        self.tidy()

    def tidy(self) -> None:
        """Remove what was only needed on the way."""
        shutil.rmtree(self.folder)


def make_manifest(
    kind: str, classes: list[str], seed: int, records: list[tuple[Shard, dict]], bytes_in: int
) -> dict:
    """Return the manifest of the shards with their records; `skipped` comes from these, in order of the shards."""
    splits: dict[str, dict] = {}
    for shard, facts in records:
        part = splits.setdefault(shard.split, {"clips": 0, "hours": 0.0, "shards": []})
        part["clips"] += facts["rows"]
        part["hours"] += facts["seconds"] / 3600
        fields = ("file", "rows", "row_groups", "bytes", "blake2b")
        part["shards"].append({field: facts[field] for field in fields})
    return {
        "format": FORMAT,
        "kind": kind,
        "classes": classes,
        "rate": RATE,
        "seed": seed,
        "splits": splits,
        "skipped": [entry for _, facts in records for entry in facts["skipped"]],
        "clipped_samples": sum(facts["clipped_samples"] for _, facts in records),
        "bytes_in": bytes_in,
        "bytes_out": sum(facts["bytes"] for _, facts in records),
    }


def read_manifest(out: Path) -> dict:
    """Return OUT/manifest.json. Raises ValueError naming what is wrong with it."""
    path = out / MANIFEST
    if not path.is_file():
        what = "was not prepared to its end" if (out / ".preparing").exists() else "is not prepared"
        raise ValueError(f"{out} {what}: there is no {path}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    fields = ("format", "kind", "classes", "rate", "seed", "splits", "settings")
    absent = [field for field in fields if not isinstance(manifest, dict) or field not in manifest]
    if absent:
        raise ValueError(f"{path}: field {', '.join(absent)} is missing")
    if manifest["format"] != FORMAT:
        raise ValueError(f"{path}: format is {manifest['format']!r}; {FORMAT} is known")
    return manifest
