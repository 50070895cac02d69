"""The tiny corpora as data sets on tests/hub_server.py, laid out as on the Hub, and the laws of asking for them."""

import shutil
from itertools import groupby
from pathlib import Path

SPLITS = {
    "fsdkaggle2018": {"train": "train", "test": "test"},
    "librispeech": {"train.100": "train-clean-100"},
    "chime3": {"train": "train", "validation": "validation", "test": "test"},
}
"""{corpus: {split on the Hub: split as prepared}}, each in the configuration `clean`."""
FOLDERS = {"fsdkaggle2018": "FSDKaggle2018", "librispeech": "LibriSpeech", "chime3": "CHiME3"}


def publish(prepared: Path, hub: Path) -> Path:
    """Lay out what tests/sharded.py prepared as data sets lab/CORPUS below `hub`; return their folder."""
    for corpus, splits in SPLITS.items():
        folder = hub / "lab" / corpus
        files = [f"  - {{split: {s}, path: clean/{s}/*.parquet}}" for s in splits]
        for split, name in splits.items():
            (folder / "clean" / split).mkdir(parents=True)
            for path in (prepared / FOLDERS[corpus]).glob(f"{name}-*.parquet"):
                shutil.copy(path, folder / "clean" / split / path.name)
        card = ["---", "configs:", "- config_name: clean", "  data_files:", *files, "---", ""]
        (folder / "README.md").write_text("\n".join(card))
    return hub / "lab"


def words(place: str | Path, **remote: float) -> list[str]:
    """Words that name the data sets at `place`: lab for the Hub's, or a folder, by the same rules, on this disk."""
    told = []
    for corpus, splits in SPLITS.items():
        sources = [f"{{path: {place}/{corpus}, config: clean, split: {s}}}" for s in splits]
        told += [f"--corpora.{corpus}.sources", f"[{', '.join(sources)}]"]
        for name, value in remote.items():
            told += [f"--corpora.{corpus}.remote.{name}", str(value)]
    return told


def block_reads(experiment, rounds: int) -> int:
    """Return how many blocks the lanes of all tasks read in the first `rounds` rounds, where nothing is kept longer.

    A lane reads a block once for all rows of it that follow each other there.
    """
    count, batch = 0, experiment.config.train.global_batch
    for name in experiment.tasks:
        table = experiment.table(name)
        blocks, order = table.blocks(), order_of(experiment, name)
        rows = [row for _, row in order.rows(iter(range(rounds * batch)))]
        for lane in range(batch):
            count += sum(1 for _ in groupby(blocks[rows[lane::batch]]))
    return count


def order_of(experiment, task: str):
    """Return the order in which a task's clips come."""
    from mtl_dist.streams.order import Order

    seed, batch = experiment.config.run.seed, experiment.config.train.global_batch
    return Order(experiment.table(task).blocks(), batch, (seed, task))
