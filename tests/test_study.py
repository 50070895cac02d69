"""Studies: what is wrong with one is named; runs are real, skipped when finished, tried again when failed or stopped."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import yaml

from mtl_dist import cli
from mtl_dist.config import load_config
from mtl_dist.experiments.study import load_study, plan_runs, study_names

SHORT = ["--train.rounds", "1", "--train.validate_every", "1", "--evaluation.max_clips", "5"]
TWO = {
    "recipe": str(tiny.REPOSITORY / "tests" / "tiny.yaml"),
    "metric": "audio_tagging/map@3",
    "against": "alone",
    "variants": {
        "alone": {"set": {"train.tasks": ["audio_tagging"]}, "published": {"map@3": 0.5}},
        "with UP": {"set": {"train.tasks": ["audio_tagging", "upsampling"]}},
    },
}
"""The second needs LibriSpeech, the first does not."""


def written(folder: Path, **changes) -> str:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(TWO | changes, sort_keys=False))
    return str(path)


def roots(corpora: Path) -> list[str]:
    return tiny.tiny_words(corpora)[2:]


def study(*words: object) -> subprocess.CompletedProcess:
    return tiny.run_process(["-m", "mtl_dist.cli", "study", *map(str, words)])


@pytest.mark.parametrize("name", study_names())
def test_every_study_that_comes_along_can_be_planned(name, tmp_path):
    found = load_study(name)
    runs = plan_runs(found, [0, 1], tmp_path)
    assert len(runs) == 2 * len(found.variants)
    assert len({run.folder for run in runs}) == len(runs)


def test_table_1_has_the_papers_eight_rows():
    found = load_study("table1").variants
    assert [(n, *v.published.values()) for n, v in found.items()] == [
        ("TAG", 0.637, 0.5531),
        ("TAG + NS", 0.665, 0.5815),
        ("TAG + NR", 0.665, 0.5777),
        ("TAG + UP", 0.669, 0.5854),
        ("TAG + NS + NR", 0.664, 0.5788),
        ("TAG + UP + NR", 0.664, 0.5814),
        ("TAG + NS + UP", 0.669, 0.5827),
        ("TAG + NS + UP + NR", 0.671, 0.5840),
    ]
    short = {"NS": "next_step", "NR": "noise_reduction", "UP": "upsampling", "TAG": "audio_tagging"}
    for name, variant in found.items():
        assert {short[word] for word in name.split(" + ")} == set(variant.settings["train.tasks"])


def test_the_command_line_wins_over_what_is_common_and_a_variant_over_the_command_line(tmp_path):
    words = ["--train.rounds", "9", "--corpora.fsdkaggle2018.train_share", "0.7"]
    found = dataclasses.replace(load_study("labels"), overrides=words)
    runs = plan_runs(found, [0], tmp_path)
    configs = {run.variant.name: load_config(run.words) for run in runs}
    assert {config.train.rounds for config in configs.values()} == {9}
    assert {config.optim.schedule for config in configs.values()} == {"cosine"}
    shares = {n: c.corpora["fsdkaggle2018"].train_share for n, c in configs.items()}
    assert shares == {n: int(n.split()[1]) / 100 for n in found.variants}
    assert {v.name: v.against for v in found.variants.values()} == {
        name: f"TAG {name.split()[1]}" if name.startswith("MTL") else "TAG 100" for name in shares
    }


@pytest.mark.slow
def test_failed_runs_are_named_and_tried_again_and_finished_ones_are_not(corpora_root, tmp_path):
    """LibriSpeech is not there at first; two runs at a time, each through accelerate launch."""
    corpora = tmp_path / "corpora"
    shutil.copytree(corpora_root, corpora)
    (corpora / "LibriSpeech").rename(corpora / "away")
    out = tmp_path / "out"
    words = written(tmp_path), "--out", out, "--seeds", "0,1", "--jobs", "2", *SHORT
    first = study(*words, *roots(corpora))
    assert first.returncode == 1
    for seed in (0, 1):
        assert f"failed: {out}/withUP/seed_{seed}: exit code 1; error: corpora.lib" in first.stderr
    assert "try these once more" in first.stderr
    results = {path: path.stat().st_mtime_ns for path in out.rglob("results.json")}
    assert {path.parent.parent.name for path in results} == {"alone"}
    (corpora / "away").rename(corpora / "LibriSpeech")
    again = study(*words, *roots(corpora))
    assert again.returncode == 0, again.stderr
    assert all(path.stat().st_mtime_ns == then for path, then in results.items())
    scores = {}
    for path in out.rglob("results.json"):
        score = json.loads(path.read_text())["test"]["audio_tagging"]["map@3"]
        scores.setdefault(path.parent.parent.name, []).append(score)
    rows = [line.split() for line in again.stdout.splitlines()[2:]]
    mean = {name: sum(found) / 2 for name, found in scores.items()}
    assert rows[0][:3] == ["alone", "2", f"{mean['alone']:.4f}"]
    assert rows[0][-1] == "0.500"
    assert rows[1][:4] == ["with", "UP", "2", f"{mean['withUP']:.4f}"]
    assert rows[1][-2:] == [f"{mean['withUP'] - mean['alone']:+.4f}", "alone"]
    cli.main(["report", str(out)])
    text = (out / "report.md").read_text()
    assert "4 runs finished; map@3 of audio_tagging on 5 test clips" in text
    assert f"| with UP | 2 | {mean['withUP']:.3f} [" in text
    shown = study(*words, *roots(corpora), "--dry_run")
    assert shown.stdout.count("# finished") == 4


@pytest.mark.slow
def test_a_study_that_is_stopped_saves_its_runs_and_goes_on(corpora_root, tmp_path):
    out = tmp_path / "out"
    one = {"variants": {"alone": TWO["variants"]["alone"]}}
    words = written(tmp_path, **one), "--out", out, *SHORT, "--train.rounds", "400"
    words = [*words, "--train.validate_every", "400", *roots(corpora_root)]
    log = open(tmp_path / "log", "w")
    command = [sys.executable, "-m", "mtl_dist.cli", "study", *map(str, words)]
    process = subprocess.Popen(command, cwd=tiny.REPOSITORY, stderr=log, stdout=log)
    metrics, end = out / "alone" / "seed_0" / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 128 + signal.SIGINT
    assert "start the same command again" in (tmp_path / "log").read_text()
    status = json.loads((metrics.parent / "status.json").read_text())
    assert status["state"] == "stopped"
    assert 0 < status["round"] < 400
    again = study(*words)
    assert again.returncode == 0, again.stderr
    assert f"(round {status['round']})" in (out / "alone" / "seed_0.log").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"against": "TAG"}, "against: 'TAG' is no variant (allowed: alone, with UP)"),
        ({"metric": "map@3"}, "metric: 'map@3'; write it as audio_tagging/map@3"),
        ({"varaints": {}}, "unknown field 'varaints'; did you mean 'variants'?"),
        ({"variants": {}}, "variants is missing, or empty"),
        ({"variants": {"alone": {"sett": {}}}}, "unknown field 'sett'; did you mean 'set'?"),
        ({"variants": {"alone": {"set": {"run.dir": "x"}}}}, "run.dir: a study sets it itself"),
        ({"variants": {"alone": {}, "a lone": {}}}, "would train in the same folder a"),
        ({"variants": {"alone": {"published": {"map@3": "x"}}}}, "'x' is not a number"),
        ({"variants": {"alone": {"set": {"train.tsks": []}}}}, "did you mean 'train.tasks'"),
        ({"metric": "next_step/loss"}, "variant alone does not train 'next_step'"),
    ],
)
def test_mistakes_in_a_study_are_named(corpora_root, tmp_path, changes, message):
    name = written(tmp_path, **changes)
    with pytest.raises(SystemExit) as stop:
        cli.main(["study", name, "--out", str(tmp_path / "out"), *roots(corpora_root)])
    assert message in str(stop.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nosuch"], "neither a file nor a study (figure3, labels, table1, table2)"),
        (["table1", "--seeds", "0,x"], "--seeds: '0,x'; write them as 0,1,2"),
        (["table1", "--seeds", "1,1"], "use each seed once"),
        (["table1", "--jobs", "0"], "--jobs: 0 is not allowed"),
        (["table1", "--launch", "/nowhere.yaml"], "--launch: the file /nowhere.yaml does not"),
        (["table1", "--train.ruonds", "3"], "did you mean 'train.rounds'"),
    ],
)
def test_mistakes_on_the_command_line_are_named(words, message):
    with pytest.raises(SystemExit) as stop:
        cli.main(["study", *words])
    assert message in str(stop.value)


def test_what_is_in_the_folder_already_is_never_mixed_up(corpora_root, tmp_path):
    name, out = written(tmp_path), tmp_path / "out"
    words = ["study", name, "--out", str(out), *roots(corpora_root)]
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match="is not empty and holds no study"):
        cli.main(words)
    (out / "notes.txt").unlink()
    changed = dataclasses.replace(load_study(name), overrides=["--optim.beta1", "0.5"])
    other = plan_runs(changed, [0], out)[0]
    other.folder.mkdir(parents=True)
    (other.folder / "config.yaml").write_text(load_config(other.words).text)
    with pytest.raises(SystemExit, match=r"holds a run of other settings \(optim.beta1: 0.5"):
        cli.main(words)
    shutil.rmtree(other.folder)
    told = dataclasses.replace(changed, recipe=TWO["recipe"])
    (out / "study.yaml").write_text(yaml.safe_dump(told.as_tree()))
    with pytest.raises(SystemExit, match=r"holds a study of other overrides \(\['--optim.beta1'"):
        cli.main(words)
