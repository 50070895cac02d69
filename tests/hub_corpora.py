"""Data sets for tests/hub_server.py, laid out as the Hub has LibriSpeech and CHiME-3, of sounds as tiny.py makes them."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import tiny

SPEECH, NOISE = "openslr/librispeech_asr", "chimechallenge/chime3-background-noise"
SPLITS = {"train.100": [[8, 8, 3], [5]], "validation": [[3]], "test": [[2]]}
"""Rows of each row group of each file, in the configuration `clean`."""
CARD = "---\nconfigs:\n- config_name: clean\n  data_files:\n" + "".join(
    f"  - {{split: {split}, path: clean/{split}/*.parquet}}\n" for split in SPLITS
)
TYPES = {
    "file": {"dtype": "string", "_type": "Value"},
    "audio": {"sampling_rate": 16000, "_type": "Audio"},
    "text": {"dtype": "string", "_type": "Value"},
    "speaker_id": {"dtype": "int64", "_type": "Value"},
    "id": {"dtype": "string", "_type": "Value"},
}
NOISE_SECONDS = 30


def write_speech(folder: Path) -> dict[str, dict[str, bytes]]:
    """Write LibriSpeech: {split: {id: FLAC}}."""
    written: dict[str, dict[str, bytes]] = {}
    draw = np.random.default_rng(0)
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(CARD + "---\n")
    for split, files in SPLITS.items():
        own = written[split] = {}
        (folder / "clean" / split).mkdir(parents=True)
        for number, groups in enumerate(files):
            tables = []
            for count in groups:
                clips = {f"{split}-{len(own) + n:04d}": _flac(draw) for n in range(count)}
                tables.append(_table(clips))
                own |= clips
            path = folder / "clean" / split / f"{number:04d}.parquet"
            with pq.ParquetWriter(path, tables[0].schema) as writer:
                for table in tables:
                    writer.write_table(table)
    return written


def _table(clips: dict[str, bytes]) -> pa.Table:
    rows = [
        {"file": f"/x/{clip}.flac", "audio": {"bytes": flac, "path": f"{clip}.flac"}}
        | {"text": "A WORD " * 20, "speaker_id": int(clip[-4:]) // 4, "id": clip}
        for clip, flac in clips.items()
    ]
    notes = {"huggingface": json.dumps({"info": {"features": TYPES}})}
    return pa.Table.from_pylist(rows).replace_schema_metadata(notes)


def _flac(draw: np.random.Generator) -> bytes:
    file = io.BytesIO()
    wave = tiny.tone(draw.uniform(0.5, 1.0), 16_000, draw, draw.uniform(100, 400))
    soundfile.write(file, wave, 16_000, format="FLAC")
    return file.getvalue()


def write_noise(folder: Path) -> None:
    """Write CHiME-3's backgrounds as WAV files."""
    draw = np.random.default_rng(3)
    (folder / "data").mkdir(parents=True)
    for environment in ("BUS", "CAF", "PED", "STR"):
        noise = 0.3 * draw.normal(size=NOISE_SECONDS * 16_000).clip(-3, 3)
        name = f"BGD_900101_010_{environment}.CH1.wav"
        soundfile.write(folder / "data" / name, noise, 16_000, "PCM_16")


def words(folder: Path | None = None, **remote: float) -> list[str]:
    """Words of corpora on the Hub, or of the same files below a folder, read by the same rules."""
    speech, noise = (name if folder is None else folder / name for name in (SPEECH, NOISE))
    source = (
        f"{{path: {speech}, config: clean, split: train.100, columns: {{speaker: speaker_id}}}}"
    )
    told = ["--corpora.librispeech.sources", f"[{source}]"]
    told += ["--corpora.chime3.sources", f"[{{path: {noise}}}]"]
    return told + [
        word for name, value in remote.items() for word in (f"--remote.{name}", str(value))
    ]
