"""A prepared corpus made known: its manifest and data set card, and the Hub. Tested by tests/test_prepare.py."""

import json
import re
from pathlib import Path

import huggingface_hub

from mtl_dist.data.shards import write_whole
from mtl_dist.data.verify import FORMAT, MANIFEST, RATE, describe, read_manifest

OF_FILE = ("file", "rows", "row_groups", "bytes", "blake2b")
LICENCES = {
    "fsdkaggle2018": "CC BY 4.0; every clip has a licence of its own besides, in the published tables",
    "librispeech": "CC BY 4.0 (openslr.org/12)",
    "chime3": "CC BY 4.0",
    "folder": "that of the files it was made of",
}
CARD = """---
configs:
- config_name: default
  data_files:
{data_files}
---
# {kind} at 16 kHz, mono, {encoding}

```
{counts}
```

Made by `mtl-dist prepare {kind}` with seed {seed}. Licence: {licence}.

A row has `id`, `audio` (`bytes` of an audio file, and `path`), `label`, `speaker`, `seconds`, and where its sound begins
and ends in samples: `sound_start`, `sound_stop`, above `silence_db` dBFS. `datasets.load_dataset` loads it. To train on
it, name this folder, or its id on the Hub, as a source of a corpus:

```yaml
sources: [{{path: FOLDER_OR_ID}}]
```
"""


def finish(out: Path, notes: list[dict], missing: list[dict], manifest: dict) -> None:
    """Complete and write the manifest, which makes OUT a prepared corpus; before it the card."""
    splits, data_files = {}, []
    for prefix in dict.fromkeys(note["split"] for note in notes):
        own = [note for note in notes if note["split"] == prefix]
        hours = sum(note["seconds"] for note in own) / 3600
        files = [{field: note[field] for field in OF_FILE} for note in own]
        split = re.sub(r"\W", ".", prefix)
        splits[split] = {"clips": sum(n["rows"] for n in own), "hours": hours, "files": files}
        data_files.append(f'  - split: {split}\n    path: "{prefix}-*.parquet"')
    skipped = [*missing, *(entry for note in notes for entry in note["skipped"])]
    manifest = {"format": FORMAT, "rate": RATE, "splits": splits, "skipped": skipped} | manifest
    manifest["clipped_samples"] = sum(note["clipped_samples"] for note in notes)
    manifest["bytes_out"] = sum(note["bytes"] for note in notes)
    settings = manifest["settings"]
    filled = {"data_files": "\n".join(data_files), "licence": LICENCES[settings["kind"]]}
    card = CARD.format(**settings, **filled, counts=describe(manifest, Path("Counts")))
    write_whole(out / "README.md", lambda file: file.write(card.encode()))
    write_json(out / MANIFEST, manifest)


def write_json(path: Path, content: dict) -> None:
    """Write a file, whole or not at all. Raises OSError naming it."""
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))


def push(out: Path, repo: str) -> None:
    """Upload a prepared corpus to the Hub. Raises ValueError saying why it could not be done, without any token."""
    read_manifest(out)
    api, kind = huggingface_hub.HfApi(), {"repo_id": repo, "repo_type": "dataset"}
    ours = {"allow_patterns": ["*.parquet", MANIFEST, "README.md"], "ignore_patterns": ["*/*"]}
    try:
        api.create_repo(**kind, exist_ok=True, private=True)
        api.upload_folder(**kind, folder_path=out, **ours, delete_patterns=["*.parquet"])
    except Exception as error:  # whatever its client and transport raise
        lines = str(error).strip().splitlines() or [""]
        text = re.sub(r"hf_\w+|(?<=Bearer )\S+", "...", f"{type(error).__name__}: {lines[0]}")
        raise ValueError(f"--push_to_hub: {repo} could not be uploaded ({text})") from None
    print(f'uploaded; load it by datasets.load_dataset("{repo}")')
