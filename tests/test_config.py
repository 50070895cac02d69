"""Recipes, overrides, and what a wrong field or value is told."""

import functools
import json
import re

import pytest
import tiny
import yaml
from entry import enter, refused

from mtl_dist.config import ConfigError, build_parser, differences, flatten, load_config
from mtl_dist.experiment import build_experiment, plan_rounds
from mtl_dist.preparse import recipe_names
from mtl_dist.tasks import TASKS

TABLE_3 = {
    "model.blocks": 3,
    "model.layers": 6,
    "model.channels": 64,
    "optim.learning_rate": 3e-4,
    "optim.decay_epochs": 5,
    "optim.decay_factor": 0.95,
    "tasks.audio_tagging.hidden": [512],
    "tasks.audio_tagging.learning_rate": 5.37e-5,
    "tasks.next_step.hidden": [128],
    "tasks.next_step.filter_width": 1,
    "tasks.next_step.learning_rate": 5e-3,
    "tasks.noise_reduction.hidden": [128],
    "tasks.noise_reduction.filter_width": 11,
    "tasks.noise_reduction.learning_rate": 5e-3,
    "tasks.upsampling.hidden": [128],
    "tasks.upsampling.filter_width": 11,
    "tasks.upsampling.learning_rate": 5e-3,
    **{f"tasks.{task}.decay_epochs": 5 for task in TASKS},
    **{f"tasks.{task}.decay_factor": 0.95 for task in TASKS},
}
"""Table 3 of the paper. Its one layer of the tagging head and two of the others are built in (test_model.py)."""

SECTION_4 = {
    "train.global_batch": 48,
    "optim.beta1": 0.9,
    "optim.beta2": 0.99,
    "optim.eps": 1e-8,
    "data.sample_rate": 16_000,
    "data.crop_seconds": 2.0,
    "corpora.fsdkaggle2018.validation_share": 0.1,
    "corpora.librispeech.splits": ["train-clean-100"],
    "corpora.chime3.environments": ["BUS", "CAF", "PED", "STR"],
    "tasks.noise_reduction.snr_db": [10.0, 15.0],
    "tasks.upsampling.low_rate": 4000,
    **{f"tasks.{task}.weight": 1.0 for task in TASKS},
    **{f"tasks.{task}.crop_seconds": "data" for task in TASKS},
}
"""Sections 3.2.3, 4.1, 4.2 and 5 of the paper, and the published backgrounds."""


@functools.cache
def paper() -> dict[str, object]:
    return load_config(["--config", "paper"]).flat()


@pytest.mark.parametrize("field", TABLE_3)
def test_the_paper_recipe_has_the_number_of_table_3(field):
    assert paper()[field] == TABLE_3[field]


@pytest.mark.parametrize("field", SECTION_4)
def test_the_paper_recipe_has_the_value_of_the_text(field):
    assert paper()[field] == SECTION_4[field]


@pytest.mark.parametrize("recipe", recipe_names())
def test_what_print_config_shows_loads_again_and_is_equal(recipe, tmp_path):
    shown = enter("--config", recipe, "--print_config")
    assert shown.code == 0
    (tmp_path / "again.yaml").write_text(shown.text)
    again = load_config(["--config", str(tmp_path / "again.yaml")])
    assert differences(load_config(["--config", recipe]), again.text) == []
    assert flatten(yaml.safe_load(shown.text)) == again.flat()


def test_a_run_from_before_a_field_was_there_goes_on_with_its_default():
    saved = yaml.safe_load(load_config([]).text)
    del saved["tasks"]["audio_tagging"]["augment"]
    text = yaml.safe_dump(saved)
    assert differences(load_config([]), text) == []
    louder = load_config(["--tasks.audio_tagging.augment.gain_db", "[-6, 0]"])
    assert differences(louder, text) == ["tasks.audio_tagging.augment.gain_db: None -> [-6.0, 0.0]"]


def test_a_run_keeps_its_length_where_its_learning_rates_hang_on_it():
    words = ["--optim.schedule", "cosine", "--train.rounds", "40"]
    longer = load_config([*words[:-1], "50"])
    assert differences(longer, load_config(words).text) == ["train.rounds: 40 -> 50"]
    assert (
        differences(
            load_config(["--train.rounds", "50"]), load_config(["--train.rounds", "40"]).text
        )
        == []
    )


def test_the_command_line_wins_over_the_recipe_and_the_recipe_over_the_default(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "train: {rounds: 3, epochs: 7}\ntasks: {audio_tagging: {sources: [folder]}}\n"
    )
    config = load_config(["--config", str(recipe), "--train.rounds=9"])
    assert (config.train.rounds, config.train.epochs, config.train.global_batch) == (9, 7.0, 48)
    assert config.tasks["audio_tagging"].sources == ["folder"]


WRONG = {
    "--train.global_bach 3": "did you mean 'train.global_batch'?",
    "--tasks.next_step.lerning_rate 1": "did you mean 'tasks.next_step.learning_rate'?",
    "--corpora.fsdkagle2018.root x": "did you mean 'corpora.fsdkaggle2018.root'?",
    "--train.global_batch many": "train.global_batch: Expected int. Got value: many",
    "--train.global_batch 0": "train.global_batch: 0 is not allowed; use 1 or more",
    "--train.epochs .inf": "train.epochs: inf is not allowed",
    "--train.schedule both": "train.schedule: Expected one of ['round_robin', 'joint']",
    "--train.tasks [audio_taging]": "train.tasks: unknown task 'audio_taging', did you mean 'audio_tagging'?",
    "--train.tasks []": "train.tasks: [] is not allowed; use at least one task",
    "--train.main_task next_stp": "train.main_task: 'next_stp' is not among train.tasks, did you mean 'next_step'?",
    "--tasks.next_step.sources []": "tasks.next_step.sources: is empty",
    "--tasks.next_step.sources [librispech]": "unknown corpus 'librispech', did you mean 'librispeech'?",
    "--tasks.noise_reduction.noise chme3": "tasks.noise_reduction.noise: unknown corpus 'chme3', did you mean 'chime3'?",
    "--tasks.next_step.weight -1": "tasks.next_step.weight: -1.0 is not allowed",
    "--tasks.upsampling.filter_width 10": "tasks.upsampling.filter_width: 10 is not allowed; use an odd number",
    "--tasks.audio_tagging.hidden [8,0]": "tasks.audio_tagging.hidden: [8, 0] is not allowed; use 1 or more for each layer",
    "--tasks.next_step.augment.gain_db [6,-6]": "tasks.next_step.augment.gain_db: (6.0, -6.0) is not allowed",
    "--tasks.next_step.augment.gain_db [0,.nan]": "augment.gain_db: (0.0, nan) is not allowed; use [lowest, highest]",
    "--tasks.next_step.augment.pitch_semitones [-99,0]": "within -24 to 24, or null",
    "--tasks.next_step.augment.noise_snr_db [5,1e9]": "augment.noise_snr_db: (5.0, 1000000000.0) is not allowed",
    "--tasks.next_step.augment.shift_probability 1.5": "augment.shift_probability: 1.5 is not allowed; use 0 to 1",
    "--tasks.next_step.augment.noise chime3": "use it together with augment.noise_snr_db",
    "--tasks.next_step.augment.noise chme3 --tasks.next_step.augment.noise_snr_db [1,2]": (
        "tasks.next_step.augment.noise: unknown corpus 'chme3', did you mean 'chime3'?"
    ),
    "--tasks.next_step.augment.gain_bd [1,2]": "did you mean 'tasks.next_step.augment.gain_db'?",
    "--optim.learning_rate .nan": "optim.learning_rate: nan is not allowed",
    "--data.crop_seconds 1e-9": "data.crop_seconds: 1e-09 is not allowed",
    "--data.lanes 0": "data.lanes: 0 is not allowed; use 1 or more, or null",
    "--remote.retries 0": "remote.retries: 0 is not allowed; use more than 0",
    "--remote.patience_seconds 600": "600 is not allowed beside run.timeout_seconds 600",
    "--corpora.librispeech.hours 0": "corpora.librispeech.hours: 0.0 is not allowed",
    "--run.resume yes": "run.resume: 'yes' is not allowed; use no or auto",
    "--run.seed -1": "run.seed: -1 is not allowed",
    "--run.plugins nowhere.py": "run.plugins: the file",
    "--run.plugins [": "run.plugins: name Python files",
    "--config": "--config: '' is neither a file nor a recipe (demo, large, paper, sample)",
    "--config nowhere.yaml": "--config: 'nowhere.yaml' is neither a file nor a recipe",
}


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_word_stops_with_the_fields_name_and_what_is_allowed(words):
    with pytest.raises(ConfigError) as caught:
        load_config(words.split())
    assert WRONG[words] in str(caught.value)


WRONG_RECIPES = {
    "train: {global_bach: 3}": "'global_bach'; did you mean 'train.global_batch'?",
    "trian: {global_batch: 3}": "'trian.global_batch' is not accepted; did you mean 'train.global_batch'?",
    "tasks: {next_stp: {weight: 3}}": "did you mean 'tasks.next_step.weight'?",
    "train: {global_batch: many}": "train.global_batch: Expected int. Got value: many",
    "train: {global_batch: 0}": "train.global_batch: 0 is not allowed; use 1 or more",
    "train: [1, 2": "cannot be read as YAML",
    "run: {resume: no}": "run.resume: Expected str. Got value: False; YAML reads an unquoted no as false",
    "train: {mixed_precision: no}": "YAML reads an unquoted no as false: write 'no'",
    "run: hello": "run: ",
    "- 1": "holds no sections",
    "": "holds no sections",
}


@pytest.mark.parametrize("text", WRONG_RECIPES)
def test_a_wrong_recipe_stops_with_the_fields_name_and_what_is_allowed(text, tmp_path):
    (tmp_path / "wrong.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(["--config", str(tmp_path / "wrong.yaml")])
    assert WRONG_RECIPES[text] in str(caught.value)


def test_every_field_in_help_has_an_explanation():
    helped = enter("--help").text
    assert "Clips of every task in a round" in " ".join(helped.split())
    for action in build_parser()._actions:
        if action.option_strings and "." in action.dest and not action.dest.endswith("__"):
            assert (action.help or "").strip() not in ("", "%(default)s"), action.dest
    for field in [*TABLE_3, *SECTION_4]:
        assert re.search(rf"--{re.escape(field)} ", helped), field


@pytest.mark.parametrize(
    ("ranks", "micro", "arithmetic"),
    [
        (3, None, "8 = 3 ranks x micro_batch 2 x accumulation 1.33333 does not come out whole"),
        (1, 3, "8 = 1 ranks x micro_batch 3 x accumulation 2.66667 .*micro_batch of 1, 2, 4, 8"),
        (16, None, "8 = 16 ranks x micro_batch 0 .*global_batch that is a multiple of 16"),
    ],
)
def test_a_global_batch_that_does_not_divide_is_refused_with_the_arithmetic(
    ranks, micro, arithmetic
):
    words = [] if micro is None else ["--train.micro_batch", str(micro)]
    with pytest.raises(ConfigError, match=f"train.global_batch: {arithmetic}"):
        plan_rounds(load_config(words), 100, ranks)


@pytest.mark.parametrize(("ranks", "micro", "accumulation"), [(1, None, 1), (2, 2, 2), (4, 1, 2)])
def test_ranks_times_micro_batch_times_accumulation_is_the_global_batch(ranks, micro, accumulation):
    words = [] if micro is None else ["--train.micro_batch", str(micro)]
    plan = plan_rounds(load_config([*words, "--train.epochs", "16"]), 100, ranks)
    assert plan.accumulation == accumulation
    assert ranks * plan.micro_batch * plan.accumulation == 8
    assert plan.rounds == 200  # 16 epochs of 100 / 8 rounds


@pytest.mark.parametrize(
    ("lanes", "ranks", "fit"), [(3, 1, "1, 2, 4, 8"), (16, 1, "1, 2, 4, 8"), (1, 2, "2, 4, 8")]
)
def test_lanes_that_do_not_go_with_batch_and_ranks_are_refused_with_those_that_do(
    lanes, ranks, fit
):
    config = load_config(["--data.lanes", str(lanes)])
    with pytest.raises(ConfigError, match=rf"data\.lanes: {lanes} lanes, .* of 8 .*; use {fit}$"):
        plan_rounds(config, 100, ranks)
    for good in map(int, fit.split(", ")):
        assert plan_rounds(load_config(["--data.lanes", str(good)]), 100, ranks).rounds


PLUGIN = '''
import dataclasses
from mtl_dist.tasks import next_step
from mtl_dist.tasks.base import register_task

@register_task("echo")
class Echo(next_step.NextStep):
    @dataclasses.dataclass(kw_only=True)
    class Config(next_step.NextStep.Config):
        loudness: float = 1.0
        """How loud."""
'''


@pytest.fixture
def plugin(tmp_path):
    """A file that registers the task `echo`, which is forgotten afterwards."""
    (tmp_path / "echo.py").write_text(PLUGIN)
    yield tmp_path / "echo.py"
    TASKS.pop("echo", None)


def test_a_plugin_registers_a_task_that_is_configured_built_and_trained_like_the_others(
    plugin, corpora_root, tmp_path
):
    words = tiny.tiny_words(corpora_root, "--train.tasks", "[audio_tagging,echo]")
    words += ["--run.plugins", f"[{plugin}]", "--tasks.echo.sources", "[librispeech]"]
    words += ["--tasks.echo.loudness", "2.5", "--tasks.echo.hidden", "[4]", "--train.rounds", "1"]
    config = load_config(words)
    assert config.tasks["echo"].loudness == 2.5
    assert set(build_experiment(config).build_model().heads.heads) == {"audio_tagging", "echo"}
    ended = enter(*words, "--run.dir", str(tmp_path / "run"), "--train.validate_every", "1")
    assert ended.code == 0, ended.text
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["test"]["echo"]["clips"] > 0


def test_two_plugins_of_one_file_name_are_both_imported(plugin, tmp_path):
    other = tmp_path / "other" / "echo.py"
    other.parent.mkdir()
    other.write_text("raise RuntimeError('imported')")
    with pytest.raises(RuntimeError, match="imported"):
        load_config(["--run.plugins", f"[{plugin}, {other}]"])


def test_a_wrong_word_ends_the_entry_with_one_line_and_no_traceback():
    assert "did you mean 'train.rounds'?" in refused("--train.runds", "3")


def test_epochs_that_a_recipe_in_rounds_would_not_hear_are_refused():
    with pytest.raises(
        ConfigError,
        match=r"no effect beside the recipe's train.rounds 1000; add --train.rounds null",
    ):
        load_config(["--config", "sample", "--train.epochs=3"])
    words = ["--config", "sample", "--train.epochs", "3", "--train.rounds", "null"]
    assert load_config(words).train.rounds is None
    assert load_config(["--config", "demo", "--train.epochs", "3"]).train.epochs == 3


def test_hyper_parameters_are_those_in_use():
    words = [
        "--train.tasks",
        "[audio_tagging, noise_reduction]",
        "--corpora.librispeech.hours",
        "5",
    ]
    shown = load_config(["--config", "paper", *words]).hyper_parameters()
    assert {"run.seed", "train.tasks", "optim.learning_rate", "model.blocks"} <= set(shown)
    assert shown["corpora.librispeech.hours"] == 5
    assert "tasks.noise_reduction.weight" in shown
    assert "corpora.chime3.root" in shown
    assert not [name for name in shown if "upsampling" in name or "corpora.folder" in name]
