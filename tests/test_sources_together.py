"""Sources of one corpus go together or are refused; root and manifest are the short form of one."""

import json
import shutil

import pytest
import sharded
import tars
import tiny

from mtl_dist.corpora import CORPORA
from mtl_dist.streams.sources import Source


@pytest.fixture(scope="module")
def prepared(corpora_root, tmp_path_factory):
    return sharded.prepare(corpora_root, tmp_path_factory.mktemp("prepared"))


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        *((kind, "published") for kind in ("fsdkaggle2018", "librispeech", "chime3", "folder")),
        *((kind, "prepared") for kind in ("fsdkaggle2018", "librispeech", "chime3")),
    ],
)
def test_root_is_the_short_form_of_one_source(corpora_root, prepared, kind, form):
    base = corpora_root if form == "published" else prepared
    root = str(base / sharded.LAYOUTS.get(kind, "CHiME3"))
    short, long = (
        CORPORA[kind](**where).load(kind, 0)
        for where in ({"root": root}, {"sources": [Source(path=root)]})
    )
    assert sharded.splits_of(short) == sharded.splits_of(long)
    assert (short.classes, short.in_pieces) == (long.classes, long.in_pieces)
    assert sum(map(len, long.splits.values())) > 3


def test_manifest_is_the_short_form_of_one_source(corpora_root, tmp_path):
    audio = corpora_root / "FSDKaggle2018/FSDKaggle2018.audio_train"
    lines = [f"{path},{'ab'[n % 2]}" for n, path in enumerate(sorted(audio.iterdir()))]
    (tmp_path / "clips.csv").write_text("\n".join(["path,label", *lines, "gone.wav,a"]))
    table = str(tmp_path / "clips.csv")
    short = CORPORA["folder"](manifest=table).load("folder", 0)
    long = CORPORA["folder"](sources=[Source(path=table)]).load("folder", 0)
    assert sharded.splits_of(short) == sharded.splits_of(long)
    assert short.missing == long.missing == {"any": [str(tmp_path / "gone.wav")]}
    assert short.classes == long.classes == ["a", "b"]


def fsd_tar(corpora_root, path, label: str = "cls") -> Source:
    """Pack three training clips of FSDKaggle2018 under other names."""
    audio = corpora_root / "FSDKaggle2018/FSDKaggle2018.audio_train"
    files = []
    for number, name in enumerate(tiny.CLASSES):
        about = json.dumps({"split": "train", "name": f"more{number}.wav"}).encode()
        files.append((f"{number}.wav", (audio / f"train{number:03d}.wav").read_bytes()))
        files += [(f"{number}.cls", name.encode()), (f"{number}.json", about)]
    return Source(path=str(tars.pack(path, files)), columns={"id": "json.name", "label": label})


def fsd(*sources: Source):
    return CORPORA["fsdkaggle2018"](sources=list(sources)).load("fsdkaggle2018", 0)


def test_labelled_sources_of_several_kinds_share_their_classes(corpora_root, tmp_path):
    folder = Source(path=str(corpora_root / "FSDKaggle2018"))
    corpus = fsd(folder, fsd_tar(corpora_root, tmp_path / "more.tar"))
    assert corpus.classes == sorted(tiny.CLASSES)
    rows = {row["id"]: row for part in corpus.splits.values() for row in part}
    for number, label in enumerate(tiny.CLASSES):
        row = rows[f"fsdkaggle2018/more{number}.wav"]
        assert (corpus.classes[row["label"]], row["source"]) == (label, 1)
        assert rows[f"fsdkaggle2018/train{number:03d}.wav"]["source"] == 0


def test_sources_that_do_not_go_together_are_refused(corpora_root, prepared, tmp_path):
    other = tmp_path / "FSDKaggle2018"
    shutil.copytree(corpora_root / "FSDKaggle2018", other)
    for table in (other / "FSDKaggle2018.meta").iterdir():
        table.write_text(table.read_text().replace("Bark", "Bork"))
    root, noise = str(corpora_root / "FSDKaggle2018"), str(corpora_root / "CHiME3")
    folder, shards = Source(path=root), Source(path=str(prepared / "FSDKaggle2018"))
    pieces = Source(path=str(prepared / "CHiME3"))
    wrong = fsd_tar(corpora_root, tmp_path / "a.tar", label="json.split")
    for sources, message in (
        (
            (folder, Source(path=str(other))),
            r"\[1\] has other classes than sources\[0\].*Bark, Bork",
        ),
        ((folder, shards), r"103 ids stand twice, such as t\w+\.wav"),
        ((folder, wrong), "more0.wav: unknown label 'train'"),
        ((folder, Source(path=noise)), r"sources\[1\]: the folder .*audio_train does not exist"),
        ((Source(path=root, columns={"label": "x"}),), r"\[0\].columns: a folder of audio has no"),
        ((pieces,), r"sources\[0\]: .*CHiME3 was prepared as 'chime3'"),
        ((Source(path=root, weight=1), shards), "give every source a weight, or none"),
        ((Source(path="gone.csv"),), r"sources\[0\]: the file gone.csv does not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            fsd(*sources)
    with pytest.raises(
        ValueError, match=r"corpora\.chime3\.sources\[1\] holds pieces .*prepare both"
    ):
        CORPORA["chime3"](sources=[Source(path=noise), pieces]).load("chime3", 0)
