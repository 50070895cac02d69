"""Sources of one corpus go together or are refused; root and manifest are the short form of one."""

import shutil

import kinds
import pytest
import tiny

from mtl_dist.data.corpora.base import CORPORA
from mtl_dist.data.sources import SPLITS, Source


def sides(corpus) -> dict[str, list]:
    return {
        split: sorted((row["id"], row["label"]) for row in corpus.stream(split))
        for split in SPLITS
        if corpus.parts[split]
    }


@pytest.mark.parametrize(
    ("kind", "folder"),
    [
        ("fsdkaggle2018", "FSDKaggle2018"),
        ("librispeech", "LibriSpeech"),
        ("chime3", "CHiME3"),
        ("folder", "CHiME3"),
    ],
)
def test_root_is_the_short_form_of_one_source(corpora_root, kind, folder):
    root = str(corpora_root / folder)
    short, long = (
        CORPORA[kind](**where).open(kind, 0)
        for where in ({"root": root}, {"sources": [Source(path=root)]})
    )
    assert sides(short) == sides(long)
    assert short.classes == long.classes
    assert sum(map(len, sides(long).values())) > 3


def test_manifest_is_the_short_form_of_one_source(corpora_root, tmp_path):
    audio = corpora_root / "FSDKaggle2018/FSDKaggle2018.audio_train"
    lines = [f"{path},{'ab'[n % 2]}" for n, path in enumerate(sorted(audio.iterdir()))]
    (tmp_path / "clips.csv").write_text("\n".join(["path,label", *lines, "gone.wav,a"]))
    table = str(tmp_path / "clips.csv")
    short = CORPORA["folder"](manifest=table).open("folder", 0)
    long = CORPORA["folder"](sources=[Source(path=table)]).open("folder", 0)
    assert sides(short) == sides(long)
    assert short.missing == long.missing == {"any": [str(tmp_path / "gone.wav")]}
    assert short.classes == long.classes == ["a", "b"]


def test_sources_that_do_not_go_together_are_refused(corpora_root, tmp_path):
    other = shutil.copytree(corpora_root / "FSDKaggle2018", tmp_path / "FSDKaggle2018")
    for table in (other / "FSDKaggle2018.meta").iterdir():
        table.write_text(table.read_text().replace("Bark", "Bork"))
    root, noise = str(corpora_root / "FSDKaggle2018"), str(corpora_root / "CHiME3")
    rows = kinds.clips(6, labels=tiny.CLASSES)
    again = [row | {"id": f"train{n:03d}.wav"} for n, row in enumerate(rows)]
    twice = Source(path=str(kinds.parquet(tmp_path / "twice.parquet", again)))
    wrong = Source(path=str(kinds.parquet(tmp_path / "wrong.parquet", kinds.clips(6))))
    folder = Source(path=root)
    for sources, message in (
        ((folder, Source(path=str(other))), "sources: their classes differ in Bark, Bork"),
        ((folder, twice), r"two clips have the id 'train00\d.wav'"),
        ((folder, wrong), "unknown label '(cat|dog)'"),
        ((folder, Source(path=noise)), r"sources\[1\]: the folder .*audio_train does not exist"),
        ((Source(path=root, columns={"label": "x"}),), r"\[0\].columns: a folder of audio has no"),
        ((Source(path=root, weight=1), folder), "give every source a weight, or none"),
        ((Source(path="gone.csv"),), r"sources\[0\]: the file gone.csv does not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            CORPORA["fsdkaggle2018"](sources=list(sources)).open("fsdkaggle2018", 0)
