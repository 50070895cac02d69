"""A study's report: scores of clips, intervals and numbers of clips beside independent truths; what cannot be compared."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
import yaml

from mtl_dist import cli
from mtl_dist.experiments import compare, report
from mtl_dist.run_folder import RunFolder

CLASSES = ["Bark", "Chime", "Squeak", "Thump"]
STUDY = {
    "recipe": "demo",
    "metric": "audio_tagging/map@3",
    "against": "TAG",
    "variants": {
        "TAG": {"published": {"map@3": 0.637, "accuracy": 0.553}},
        "MTL": {"published": {"map@3": 0.671, "accuracy": 0.584}},
        "later": {},
    },
}


def write_run(folder, sure: float, seed: int, clips: int = 60, first: int = 0) -> None:
    """Write a finished run whose right classes have, on average, `sure` more of log probability."""
    rng = np.random.default_rng([seed, clips])
    rows = []
    for number in range(first, first + clips):
        label = number % len(CLASSES)
        logits = rng.normal(size=(2, len(CLASSES)))
        logits[:, label] += sure
        windows, single = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        row = {"id": f"c/{number:04d}", "label": CLASSES[label]}
        row |= {"probabilities": windows.tolist(), "probabilities_single_crop": single.tolist()}
        rows.append(row)
    run = RunFolder(folder)
    folder.mkdir(parents=True)
    run.save_predictions("test", {"audio_tagging": rows}, {"audio_tagging": CLASSES})
    scores = compare.clip_scores(folder, "audio_tagging", "map@3")
    right = compare.clip_scores(folder, "audio_tagging", "accuracy")
    numbers = {"map@3": np.mean([*scores.values()]), "accuracy": np.mean([*right.values()])}
    run.save_results({"test": {"audio_tagging": numbers | {"clips": clips}}})
    run.save_status("finished")
    line = {"round": 5, "validation/audio_tagging/map@3": numbers["map@3"]}
    run.metrics.write_text(json.dumps(line) + "\n")


@pytest.fixture
def study(tmp_path):
    """Two seeds of TAG and three of a better MTL; a third variant has only begun."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "study.yaml").write_text(yaml.safe_dump(STUDY | {"name": "mine"}, sort_keys=False))
    for seed in (0, 1):
        write_run(out / "TAG" / f"seed_{seed}", 0.3, seed)
    for seed in (0, 1, 2):
        write_run(out / "MTL" / f"seed_{seed}", 2.0, seed)
    (out / "later" / "seed_0").mkdir(parents=True)
    return out


def test_a_clips_score_is_that_of_its_rank(study):
    """Brute force, by sorting."""
    folder = study / "TAG" / "seed_0"
    rows = pq.read_table(folder / "predictions" / "test.parquet").to_pylist()
    for metric, column in (
        ("map@3", "probabilities"),
        ("map@3_single_crop", "probabilities_single_crop"),
    ):
        found = compare.clip_scores(folder, "audio_tagging", metric)
        assert found.keys() == {row["id"] for row in rows}
        for row in rows:
            ranked = [CLASSES[n] for n in np.argsort(-np.array(row[column]))]
            place = ranked.index(row["label"]) + 1
            assert found[row["id"]] == pytest.approx(1 / place if place <= 3 else 0)


@pytest.mark.parametrize(("seeds", "of_seeds"), [(1, 0.0), (40, 0.0), (40, 0.5)])
def test_the_interval_is_that_of_the_normal_distribution_where_there_is_much(seeds, of_seeds):
    """Two kinds of chance: that of the clips, shared by all seeds, and that of the seeds."""
    rng = np.random.default_rng(3)
    clips = 900
    scores = rng.normal(0.2, 1, clips) + rng.normal(0, of_seeds, (seeds, 1))
    found = compare.interval(scores)
    assert found.mean == pytest.approx(scores.mean())
    variance = scores.mean(axis=0).var() / clips + scores.mean(axis=1).var() / seeds
    half = 1.96 * np.sqrt(variance)
    assert found.low == pytest.approx(found.mean - half, abs=0.06 * half)
    assert found.high == pytest.approx(found.mean + half, abs=0.06 * half)


def test_so_many_clips_show_the_difference_in_four_of_five_trials():
    rng = np.random.default_rng(4)
    pilot = rng.normal(0.0, 0.2, (1, 5000))
    needed = compare.clips_needed(pilot, 0.03)
    trials = rng.normal(0.03, 0.2, (4000, needed))
    t = trials.mean(axis=1) / (trials.std(axis=1, ddof=1) / np.sqrt(needed))
    assert np.mean(np.abs(t) > 1.96) == pytest.approx(0.8, abs=0.03)


def test_the_report_pairs_seeds_and_says_what_it_can(study, capsys):
    cli.main(["report", str(study)])
    text = (study / "report.md").read_text()
    assert text in capsys.readouterr().out
    table = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    rows = {cells[0]: cells for cells in table[:4]}
    results = {
        name: [
            json.loads((study / name / f"seed_{seed}" / "results.json").read_text())["test"]
            for seed in seeds
        ]
        for name, seeds in (("TAG", (0, 1)), ("MTL", (0, 1, 2)))
    }
    scores = {n: [r["audio_tagging"]["map@3"] for r in found] for n, found in results.items()}
    assert rows["TAG"][1] == "2"
    assert rows["TAG"][2].startswith(f"{np.mean(scores['TAG']):.3f} [")
    assert rows["MTL"][1] == "3"
    assert rows["MTL"][2].startswith(f"{np.mean(scores['MTL']):.3f} [")
    paired = np.mean(scores["MTL"][:2]) - np.mean(scores["TAG"])
    assert rows["MTL"][3].startswith(f"{paired:+.3f} [+")
    assert rows["MTL"][4:] == ["TAG", "0.671", "+0.034"]
    assert "5 runs finished, 1 begun and not finished" in text
    assert "**MTL** is better than TAG" in text
    assert "with 2 seeds and 60 test clips. That is of these seeds: they are too few" in text
    assert "is too few" in text
    page = (study / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "<table>" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    for name in ("scores", "gains", "learning_curves"):
        assert (study / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert b"<svg" in (study / f"{name}.svg").read_bytes()


def test_a_difference_that_may_be_chance_is_not_called_one(study):
    runs = study / "MTL"
    for seed in (0, 1, 2):
        shutil.rmtree(runs / f"seed_{seed}")
        write_run(runs / f"seed_{seed}", 0.35, 10 + seed)
    cli.main(["report", str(study)])
    assert "**MTL** against TAG is not decided" in (study / "report.md").read_text()


def test_runs_that_were_scored_on_other_clips_are_not_compared(study):
    shutil.rmtree(study / "MTL" / "seed_1")
    write_run(study / "MTL" / "seed_1", 2.0, 1, first=1)
    with pytest.raises(SystemExit, match=r"seed_1 was scored on other clips than .*: 2 differ"):
        cli.main(["report", str(study)])
    assert not (study / "report.md").exists()


def test_missing_predictions_and_folders_are_named_with_the_remedy(study, tmp_path):
    (study / "TAG" / "seed_0" / "predictions" / "test.parquet").unlink()
    with pytest.raises(SystemExit, match=r"write it with: mtl-dist evaluate .*seed_0 --split test"):
        cli.main(["report", str(study)])
    with pytest.raises(SystemExit, match=r"there is no study.yaml in it"):
        cli.main(["report", str(tmp_path)])
    for name in ("TAG", "MTL"):
        shutil.rmtree(study / name)
    with pytest.raises(SystemExit, match="none of its 1 runs is finished"):
        cli.main(["report", str(study)])


def test_a_full_disk_leaves_the_report_before_as_it_was(study, monkeypatch):
    cli.main(["report", str(study)])
    before = (study / "report.html").read_bytes()
    write = report.write_atomically

    def full(path, content):
        if path.name == "report.md":
            tiny.full_disk()
        write(path, content)

    monkeypatch.setattr(report, "write_atomically", full)
    with pytest.raises(SystemExit, match="No space left on device"):
        cli.main(["report", str(study)])
    assert (study / "report.html").read_bytes() == before
