"""Laws of sources: the same rows by the same laws from any kind of source, and what is read to find them."""

import csv
import itertools
import json
import pickle
from pathlib import Path

import datasets
import fsspec
import kinds
import pyarrow as pa
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from mtl_dist.data.columns import FEATURES
from mtl_dist.data.corpora import CORPORA, register_corpus
from mtl_dist.data.lanes import Blocks, Lane
from mtl_dist.data.sources import SPLITS, Source, expand_braces
from mtl_dist.data.streams import StreamFiles

ROWS = kinds.clips(37)
BY_JSON = {name: f"json.{name}" for name in ("id", "label", "speaker", "seconds")}


def open_corpus(kind: str = "folder", seed: int = 0, **settings):
    return CORPORA[kind](**settings).open("mine", seed)


def of(*sources: dict, kind: str = "unlabelled_folder", seed: int = 0, **settings):
    """A corpus of sources."""
    listed = [Source(**{**source, "path": str(source["path"])}) for source in sources]
    return open_corpus(kind, seed, sources=listed, **settings)


def ids(corpus, split: str) -> list[str]:
    return [row["id"] for row in corpus.stream(split)]


def write_listed(root: Path) -> Path:
    """Write audio files below clips/, and a CSV and a JSON lines file that name them by relative paths."""
    kinds.audio_files(root / "clips", ROWS)
    lines = [{"file": f"clips/{r['id']}"} | {n: r[n] for n in BY_JSON} for r in ROWS]
    with open(root / "clips.csv", "w", newline="") as table:
        writer = csv.DictWriter(table, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    (root / "clips.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return root


def write_arrow(root: Path) -> Path:
    for number, rows in enumerate(kinds.cut(ROWS, 20)):
        with pa.ipc.new_stream(str(root / f"train-{number}.arrow"), kinds.SCHEMA) as out:
            out.write_table(pa.Table.from_pylist(rows, kinds.SCHEMA))
    return root


def prepared(root: Path) -> Path:
    return kinds.card(kinds.shards(root, ROWS), train="train-*.parquet")


def saved(root: Path) -> Path:
    datasets.Dataset(pa.Table.from_pylist(ROWS, kinds.SCHEMA)).save_to_disk(str(root))
    return root


KINDS = {
    "folder": lambda root: {"path": kinds.audio_files(root, ROWS)},
    "prepared": lambda root: {"path": prepared(root)},
    "Parquet glob": lambda root: {"path": f"{kinds.shards(root, ROWS)}/train-*.parquet"},
    "Parquet URL": lambda root: {"path": kinds.to_memory(prepared(root), "prepared")},
    "tars": lambda root: {
        "path": f"{kinds.tars(root, ROWS)}/train-{{00000..00004}}.tar", "columns": BY_JSON,
    },
    "Arrow": lambda root: {"path": f"{write_arrow(root)}/*.arrow"},
    "JSON lines": lambda root: {
        "path": write_listed(root) / "clips.jsonl", "columns": {"audio": "file"},
    },
    "CSV": lambda root: {
        "path": write_listed(root) / "clips.csv", "columns": {"audio": "file", "id": "id"},
    },
    "save_to_disk": lambda root: {"path": saved(root)},
    "audio URL": lambda root: {"path": kinds.to_memory(kinds.audio_files(root, ROWS), "clips")},
    "plugin": lambda root: None,
}  # fmt: skip
NO_SHARES = {"validation_share": 0.0, "test_share": 0.0}
WITHOUT_SPEAKERS = ("folder", "audio URL")


@pytest.fixture
def radio(monkeypatch):
    """A corpus of a user's own: a function in a plugin."""
    monkeypatch.setattr("mtl_dist.data.corpora.base.CORPORA", CORPORA.copy())

    @register_corpus("radio")
    def radio(split: str, every: int = 1) -> datasets.IterableDataset | None:
        """Radio."""
        rows = [row for n, row in enumerate(ROWS) if (n % 9 == 0) == (split == "test")][::every]
        made = datasets.Dataset.from_list(rows) if split != "validation" else None
        return made and made.to_iterable_dataset(num_shards=2)

    from mtl_dist.data.corpora.base import CORPORA as known

    return known["radio"]


def content(audio: dict) -> bytes:
    if audio["bytes"] is not None:
        return audio["bytes"]
    with fsspec.open(audio["path"], "rb") as file:
        return file.read()


def follow(lane: Lane, rows: int) -> list[tuple]:
    return [(epoch, row.id) for epoch, row in itertools.islice(lane, rows)]


def check_laws(corpus, truth: dict) -> None:
    """Every row is in one split, and comes once an epoch from lanes of any number, which go on from where they were."""
    found, train = [], set()
    for split in [split for split in SPLITS if corpus.parts[split]]:
        stream = corpus.stream(split)
        assert isinstance(stream, datasets.IterableDataset)
        assert (stream.column_names, stream.features) == (list(FEATURES), FEATURES)
        for row in stream:
            train |= {row["id"]} if split == "train" else set()
            found.append((row["id"], (content(row["audio"]), row["label"], row["speaker"])))
    assert len(found) == len(dict(found)) == len(truth)
    assert dict(found) == truth
    assert len(train) == corpus.clips("train") < len(truth)
    blocks = Blocks(corpus.parts["train"])
    epochs: list[list[str]] = [[], []]
    for number in range(3):
        lane = Lane(blocks, 3, number, ("key",))
        for epoch, row in itertools.takewhile(lambda pair: pair[0] < 2, lane):
            clip = row.id.removeprefix("mine/")
            epochs[epoch].append(clip)
            assert (content(row.audio), corpus.classes[row.label]) == truth[clip][:2]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(train)
    lane = Lane(blocks, 1, 0, ("key",))
    every = follow(lane, len(train))
    assert [clip for _, clip in every] != sorted(clip for _, clip in every)
    for stop in (0, 1, 7, len(train)):
        lane = Lane(blocks, 1, 0, ("key",))
        assert follow(lane, stop) == every[:stop]
        assert follow(Lane(blocks, 1, 0, ("key",), lane.position), 12) == follow(lane, 12)


@pytest.mark.parametrize("kind", KINDS)
def test_same_rows_same_laws(kind, tmp_path, radio):
    fsspec.filesystem("memory").store.clear()
    source, truth = KINDS[kind](tmp_path), kinds.by_id(ROWS)
    if kind in WITHOUT_SPEAKERS:
        truth = {clip: (*known[:2], None) for clip, known in truth.items()}
    corpus = of(source, kind="folder", labelled=True) if source else radio().open("mine", 0)
    assert corpus.classes == ["cat", "dog"]
    check_laws(corpus, truth)
    assert corpus.sendable == (kind != "plugin")
    if corpus.sendable:
        check_laws(pickle.loads(pickle.dumps(corpus)), truth)


def test_a_function_has_its_own_settings_and_may_have_a_training_side_only(radio):
    assert radio(every=4).open("mine", 0).clips("train") == 8

    @register_corpus("talk")
    def talk(split: str) -> datasets.IterableDataset | None:
        rows = datasets.Dataset.from_list(ROWS)
        return rows.to_iterable_dataset() if split == "train" else None

    from mtl_dist.data.corpora.base import CORPORA as known

    assert sorted(ids(known["talk"]().open("mine", 0), "train")) == sorted(kinds.by_id(ROWS))


def test_columns_bring_names_and_types_to_ours(tmp_path):
    audio = [{"bytes": b"a", "path": None}, {"bytes": None, "path": None}, None]
    rows = {"sound": audio, "number": [1, 2, 3], "category": [1, 0, -1], "length": [0.5, 1.5, 2.5]}
    features = datasets.Features(
        {
            "sound": {"bytes": datasets.Value("large_binary"), "path": datasets.Value("string")},
            "number": datasets.Value("int32"),
            "category": datasets.ClassLabel(names=["dog", "cat"]),
            "length": datasets.Value("float32"),
        }
    )
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "a.parquet")
    names = {"audio": "sound", "id": "number", "label": "category", "seconds": "length"}
    found = list(
        of({"path": tmp_path / "a.parquet", "columns": names}, **NO_SHARES).stream("train")
    )
    told = [[row[name] for name in ("id", "label", "seconds")] for row in found]
    assert told == [["1", "cat", 0.5], ["2", "dog", 1.5], ["3", None, 2.5]]
    assert [row["audio"] and row["audio"]["bytes"] for row in found] == [b"a", None, None]
    path = kinds.parquet(tmp_path / "b.parquet", [{"wav": b"one"}, {"wav": None}], schema=None)
    found = list(of({"path": path}, **NO_SHARES).stream("train"))
    assert [row["audio"]["bytes"] for row in found] == [b"one", None]
    assert all(row[name] is None for row in found for name in FEATURES if name != "audio")


def test_braces_are_what_a_shell_makes_of_them():
    assert expand_braces("a{08..11}.tar") == ["a08.tar", "a09.tar", "a10.tar", "a11.tar"]
    assert expand_braces("{x,y}{1..2}") == ["x1", "x2", "y1", "y2"]


def hub_like(root: Path) -> Path:
    """A data set with two training splits and both other sides, of which a card says the files."""
    names = {
        "train.100": 16,
        "train.500": 12,
        "validation.clean": 5,
        "test.clean": 6,
        "test.other": 7,
    }
    for n, (split, count) in enumerate(names.items()):
        kinds.shards(root / split, kinds.clips(count, first=100 * n), name="clips")
    return kinds.card(root, **{split: f"{split}/*.parquet" for split in names})


@pytest.mark.parametrize(
    ("split", "numbers"),
    [
        ("train.100", {"train": [0], "validation": [2], "test": [3, 4]}),
        (None, {"train": [0, 1], "validation": [2], "test": [3, 4]}),
        ("test.other", {"train": [], "validation": [], "test": [4]}),
    ],
)
def test_a_data_sets_own_sides_are_taken_with_a_training_split(tmp_path, split, numbers):
    corpus = of({"path": hub_like(tmp_path), "split": split}, **NO_SHARES)
    for own, wanted in numbers.items():
        found = {int(clip[-9:-5]) // 100 for clip in ids(corpus, own)} if wanted else set()
        assert found == set(wanted)
        assert (corpus.parts[own] == []) == (wanted == [])
    assert corpus.notes == []


def test_a_file_of_any_training_split_that_changed_is_told_by_its_name(tmp_path):
    before = of({"path": hub_like(tmp_path)}, **NO_SHARES).fingerprint()
    kinds.parquet(tmp_path / "train.100/clips-00001-of-00002.parquet", ROWS[:5])
    now = of({"path": tmp_path}, **NO_SHARES).fingerprint()
    changed = {key for key in before if before[key] != now[key]}
    assert changed == {"source 0: clips-00001-of-00002.parquet"}


def test_whole_blocks_are_held_out_by_seed_and_the_log_says_so(tmp_path):
    kinds.shards(tmp_path, ROWS, size=7)  # 6 files of 3 blocks, of which one has 1
    first, again, other = (of({"path": tmp_path}, seed=seed) for seed in (0, 0, 1))
    sides = [set(ids(first, split)) for split in SPLITS]
    assert set.union(*sides) == set(kinds.by_id(ROWS))
    assert sum(map(len, sides)) == len(ROWS)
    assert [sum(len(part.blocks) for part in first.parts[split]) for split in SPLITS] == [14, 2, 2]
    assert min(map(len, sides)) >= 2
    assert "2 of 18 blocks held out for validation, by data.split_seed" in first.describe()
    assert [sorted(ids(again, split)) for split in SPLITS] == [*map(sorted, sides)]
    assert set(ids(other, "test")) != sides[2]


def test_labelled_streams_are_divided_label_by_label_and_sources_alike(tmp_path):
    rows = kinds.clips(60, labels="a b c d e f".split())
    both = [kinds.shards(tmp_path / str(n), own) for n, own in enumerate((rows[:30], rows[30:]))]
    corpus = of(*({"path": path} for path in both), kind="folder", validation_share=0.2)
    for split, of_label in (("train", 7), ("validation", 2), ("test", 1)):
        labels = sorted(row["label"] for row in corpus.stream(split))
        assert labels == sorted("abcdef" * of_label)
    files = kinds.audio_files(tmp_path / "files", rows)
    listed = of({"path": files}, kind="folder", labelled=True, validation_share=0.2)
    assert sorted(ids(listed, "test")) == sorted(ids(corpus, "test"))
    fewer = {"kind": "folder", "validation_share": 0.2, "train_share": 0.4}
    streamed = of(*({"path": path} for path in both), **fewer)
    listed = of({"path": files}, labelled=True, **fewer)
    assert sorted(row["label"] for row in streamed.stream("train")) == sorted("abcdef" * 3)
    assert sorted(ids(listed, "train")) == sorted(ids(streamed, "train"))
    assert (
        sorted(ids(listed, "test")) == sorted(ids(streamed, "test")) == sorted(ids(corpus, "test"))
    )


SPEECH = [row | {"label": None} for row in kinds.clips(64)]
TAR_NAMES = {"id": "json.id", "speaker": "json.speaker"}
HOURS = {
    "a column": lambda root: {"path": kinds.shards(root, SPEECH)},
    "headers": lambda root: {
        "path": kinds.shards(root, [row | {"seconds": None} for row in SPEECH])
    },
    "headers in tars": lambda root: {
        "path": f"{kinds.tars(root, SPEECH, size=2)}/*.tar", "columns": TAR_NAMES,
    },
}  # fmt: skip


@pytest.mark.parametrize("how", HOURS)
def test_hours_are_enough_and_at_most_a_block_too_much(tmp_path, how):
    source, kind = HOURS[how](tmp_path), "librispeech"
    seconds = {row["id"]: row["seconds"] for row in SPEECH}
    for hours in (1 / 3600, 5 / 3600):
        corpus = of(source, kind=kind, hours=hours)
        taken = ids(corpus, "train")
        block = max(sum(seconds[r["id"]] for r in own) for own in kinds.cut(SPEECH, 3))
        assert 0 <= sum(seconds[clip] for clip in taken) - hours * 3600 < block
        assert corpus.clips("train") == len(taken)
        assert sorted(ids(of(source, kind=kind, hours=hours), "train")) == sorted(taken)
    assert sorted(ids(of(source, kind=kind, hours=hours, seed=1), "train")) != sorted(taken)
    with pytest.raises(ValueError, match=r"corpora\.mine\.hours: 1 h asked for, but .* 0\.00 h"):
        of(source, kind=kind, hours=1)


class Opened(list):
    """The names of the files in fsspec's memory that are opened to be read."""

    def __init__(self, monkeypatch):
        fsspec.filesystem("memory").store.clear()
        open_file = MemoryFileSystem._open

        def note(system, path, mode="rb", **more):
            self.append(path)
            return open_file(system, path, mode, **more)

        monkeypatch.setattr(MemoryFileSystem, "_open", note)


def test_unlabelled_streams_are_not_listed_and_many_files_cost_one_block(monkeypatch, tmp_path):
    opened, system = Opened(monkeypatch), fsspec.filesystem("memory")
    file = kinds.parquet(tmp_path / "a.parquet", SPEECH[:6], group=2).read_bytes()
    for number in range(7000):
        system.pipe_file(f"/many/{number:05d}.parquet", file)
    opened.clear()
    corpus = of({"path": "memory://many"})
    assert len(set(opened)) <= 1 + 2 * 64
    block = sum(len(row["audio"]["bytes"]) for row in SPEECH[:2]) * 3
    sizes = {part.files.table_bytes for parts in corpus.parts.values() for part in parts}
    assert sizes == {block}
    assert sum(corpus.clips(split) for split in SPLITS) == 6 * 7000
    assert corpus.describe().startswith("mine: about ")
    opened.clear()
    blocks = Blocks(corpus.parts["train"])
    assert len(blocks) == 5600
    heard = [row.id for _, row in itertools.islice(Lane(blocks, 100, 3, ("key",)), 6)]
    assert sorted(heard) == sorted(f"mine/{row['id']}" for row in SPEECH[:6])
    assert len(set(opened)) == 1


@pytest.mark.parametrize("kind", ["Parquet", "tars"])
def test_opening_an_unlabelled_stream_reads_footers_and_one_block(monkeypatch, tmp_path, kind):
    opened, labels = Opened(monkeypatch), {"label": "json.label"} if kind == "tars" else {}
    write = {"Parquet": kinds.shards, "tars": kinds.tars}[kind]
    url = kinds.to_memory(write(tmp_path, ROWS, size=4), "few")
    monkeypatch.setattr(StreamFiles, "listing", None)
    opened.clear()
    corpus = of({"path": url, "columns": labels})
    assert len(set(opened)) == (10 if kind == "Parquet" else 1)
    assert len(opened) <= 30
    assert corpus.classes == []
    assert corpus.listed == 0


PUBLISHED = [f"BGD_150203_010_{e}.CH{c}" for e in ("BUS", "CAF", "STR") for c in (1, 2, 5)]


def test_recordings_of_a_stream_are_chosen_by_name_and_those_in_pieces_keep_to_their_split(
    tmp_path,
):
    rows = [row | {"id": name} for name, row in zip(PUBLISHED, SPEECH, strict=False)]
    other = [SPEECH[20] | {"id": "F01_050C0101_BUS.CH1"}]
    path = kinds.shards(tmp_path / "whole", rows + other)
    chosen = {"environments": ["BUS", "STR"], "channels": [2, 5]}
    whole = of({"path": path}, kind="chime3", **chosen)
    wanted = [n for n in PUBLISHED if n[-7:-4] in chosen["environments"] and n[-1] in "25"]
    assert sorted(ids(whole, "train")) == wanted
    spans = [whole.noise(split)[0].span for split in SPLITS]
    assert spans == [(0.0, 0.8), (0.8, 0.9), (0.9, 1.0)]
    for split, number in zip(SPLITS, (0, 3, 6), strict=True):
        pieces = [row | {"id": f"{row['id']}_{number:04d}"} for row in rows[number : number + 3]]
        kinds.shards(tmp_path / "pieces", pieces, name=split)
    pieces = of({"path": tmp_path / "pieces"}, kind="chime3", channels=[2])
    for split, environment in zip(SPLITS, ("BUS", "CAF", "STR"), strict=True):
        (part,) = pieces.noise(split)
        (clip,) = {row.id for _, row in itertools.islice(Lane(Blocks([part]), 1, 0, ()), 5)}
        assert f"_{environment}.CH2_" in clip
        assert part.span == (0.0, 1.0)
