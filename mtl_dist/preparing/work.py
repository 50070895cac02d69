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
SETTINGS = "settings.json"
FORMAT = 1


class Work:
    """The folder OUT and what is known of it. One process at a time: a second one is refused."""

    def __init__(self, out: Path, settings: dict):
        """Open OUT for `settings` {option: value}.

        Raises:
            ValueError: OUT holds something else, was begun with other settings, or is being written.
        """
        self.out, self.folder, self.settings = out, out / ".preparing", settings
        if out.exists() and not out.is_dir():
            raise ValueError(f"OUT: {out} is not a folder")
        finished = (out / MANIFEST).exists()
        if out.is_dir() and any(out.iterdir()) and not finished and not self.folder.is_dir():
            raise ValueError(
                f"OUT: {out} is not empty and not a prepared corpus; name a new or an empty folder"
            )
        self.manifest = read_manifest(out) if finished else None
        if not finished:
            self._lock()
        self._require(settings)

    def _lock(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.folder / "lock", "w", encoding="utf-8")
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by workers
        except (BlockingIOError, PermissionError):
            raise ValueError(f"OUT: another process is preparing {self.out}") from None

    def begin(self, files: str) -> None:
        """Bind what is written from now on to the settings and the digest of the list of files.

        Raises:
            ValueError: there are whole shards of another list.
        """
        self._require({"FROM": files})
        self.settings = self.settings | {"FROM": files}
        if self._bound() is None:
            for path in (*self.out.glob("*.parquet"), *self.out.glob(".*.partial")):
                path.unlink()  # renamed and not yet noted, or cut off: of other settings maybe
            write_atomically(self.folder / SETTINGS, json.dumps(self.settings))

    def _bound(self) -> dict | None:
        """Return the settings of what is finished, or of the shards that are whole; None where there are none."""
        if self.manifest is not None:
            return self.manifest["settings"]
        if not any(self.folder.glob("*-of-*.json")):
            return None
        return json.loads((self.folder / SETTINGS).read_text(encoding="utf-8"))

    def _require(self, settings: dict) -> None:
        bound = self._bound() or {}
        for field, value in settings.items():
            if bound.get(field, value) == value:
                continue
            what = (
                "holds other files than"
                if field == "FROM"
                else f"is {value!r} and was {bound[field]!r}"
            )
            raise ValueError(
                f"{field}: {what} when {self.out} was begun; name another OUT, or remove this one to begin anew"
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
        if self.folder.is_dir():
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


def size(count: float) -> str:
    """Return a number of bytes as text."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def describe(manifest: dict, out: Path) -> str:
    """Return the counts of a manifest as text."""
    lines = [f"{out}: {manifest['kind']}"]
    for split, part in manifest["splits"].items():
        groups = sum(shard["row_groups"] for shard in part["shards"])
        lines.append(
            f"  {split}: {part['clips']} clips, {part['hours']:.2f} h, {len(part['shards'])} shards of {groups} row groups"
        )
    lines.append(
        f"  in {size(manifest['bytes_in'])}, out {size(manifest['bytes_out'])}; {len(manifest['skipped'])} skipped; "
        f"{manifest['clipped_samples']} samples clipped"
    )
    return "\n".join(lines)
