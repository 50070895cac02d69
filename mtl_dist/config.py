"""The configuration: typed sections, recipes as their named values, overrides on the command line.

`--config RECIPE` is a file or the name of a recipe in mtl_dist/recipes; without it the demo recipe is used. Later words
override: `--section.field value`. `--print_config` shows everything, `--help` explains it. Tested by tests/test_config.py.
"""

import dataclasses
import difflib
import importlib.util
import re
import sys
from pathlib import Path

import jsonargparse
import yaml

from mtl_dist.corpora import CORPORA
from mtl_dist.sections import (
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    check,
)
from mtl_dist.tasks import TASKS, TaskConfig

RECIPES = Path(__file__).parent / "recipes"
DEFAULT_RECIPE = "demo"
SECTIONS = {
    "run": RunConfig,
    "train": TrainConfig,
    "model": ModelConfig,
    "optim": OptimConfig,
    "data": DataConfig,
    "evaluation": EvaluationConfig,
}
FREE_TO_CHANGE = {
    "run.dir",
    "run.resume",
    "train.epochs",
    "train.rounds",
    "train.micro_batch",
    "train.schedule",
    "train.mixed_precision",
    "train.validate_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.patience",
    "train.log_every",
    "train.max_nonfinite",
    "train.stop_after_rounds",
    "data.workers",
    "data.max_bad_share",
    "evaluation.max_clips",
    "evaluation.examples",
}
"""Fields that may differ when a run goes on: they do not change what is learned from a given round."""

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


class ConfigError(ValueError):
    """A mistake in the configuration; the message names field, value and remedy."""


@dataclasses.dataclass(kw_only=True)
class Config:
    """The whole configuration. `text` is its complete YAML, as saved with the run."""

    run: RunConfig
    train: TrainConfig
    model: ModelConfig
    optim: OptimConfig
    data: DataConfig
    evaluation: EvaluationConfig
    corpora: dict[str, object]
    tasks: dict[str, TaskConfig]
    text: str

    def flat(self) -> dict[str, object]:
        """Return {"section.field": value} of everything."""
        return flatten(yaml.safe_load(self.text))


def build_parser() -> jsonargparse.ArgumentParser:
    """Return the parser with every registered task and corpus."""
    parser = jsonargparse.ArgumentParser(
        prog="mtl_dist/train.py",
        description="Train the multitask WaveNet. Without arguments: the embedded demo.",
        exit_on_error=False,
    )
    parser.add_argument(
        "--config",
        action="config",
        help=f"Recipe: a YAML file, or one of {', '.join(recipe_names())} (default: {DEFAULT_RECIPE}).",
    )
    for name, section in SECTIONS.items():
        parser.add_class_arguments(section, name)
    for name, corpus in CORPORA.items():
        parser.add_class_arguments(corpus, f"corpora.{name}")
    for name, task in TASKS.items():
        parser.add_class_arguments(task.Config, f"tasks.{name}")
    return parser


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_config(words: list[str]) -> Config:
    """Parse command-line words into a checked Config.

    Raises:
        ConfigError: an unknown field, a wrong value, or fields that do not fit together.
        SystemExit: after --help or --print_config.
    """
    words = _name_recipe(words)
    for plugin in _plugins(words):
        import_plugin(plugin)
    parser = build_parser()
    try:
        parsed = parser.parse_args(words)
    except (jsonargparse.ArgumentError, TypeError) as error:
        raise ConfigError(_explain(str(error), parser)) from None
    text = parser.dump(parsed, skip_none=False)
    values = yaml.safe_load(text)
    sections = {name: _make(kind, parsed[name], name) for name, kind in SECTIONS.items()}
    corpora = {n: _make(k, parsed["corpora"][n], f"corpora.{n}") for n, k in CORPORA.items()}
    tasks = {n: _make(t.Config, parsed["tasks"][n], f"tasks.{n}") for n, t in TASKS.items()}
    assert set(values) >= set(SECTIONS), "the dump holds every section"
    config = Config(**sections, corpora=corpora, tasks=tasks, text=text)
    _check_together(config)
    return config


def _make(kind: type, values: jsonargparse.Namespace, section: str):
    try:
        return kind(**{name: getattr(values, name) for name in vars(values)})
    except ValueError as error:
        raise ConfigError(f"{section}.{error}") from None


def _check_together(config: Config) -> None:
    """Check what no section can check alone: every trained task exists and hears corpora that exist."""
    for name in config.train.tasks:
        if name not in config.tasks:
            raise ConfigError(
                f"train.tasks: unknown task {name!r}{_nearest(name, config.tasks)} (known: {', '.join(config.tasks)})"
            )
        task = config.tasks[name]
        if not task.sources:
            raise ConfigError(
                f"tasks.{name}.sources: is empty, so the task has nothing to hear; name corpora "
                f"({', '.join(config.corpora)}) or take the task out of train.tasks"
            )
        for corpus in [*task.sources, *([task.noise] if hasattr(task, "noise") else [])]:
            if corpus not in config.corpora:
                raise ConfigError(
                    f"tasks.{name}.sources: unknown corpus {corpus!r}{_nearest(corpus, config.corpora)} "
                    f"(known: {', '.join(config.corpora)})"
                )


def differences(config: Config, saved_text: str) -> list[str]:
    """Return "field: saved -> now" for every field that a resumed run must not change."""
    saved, now = flatten(yaml.safe_load(saved_text)), config.flat()
    return [
        f"{key}: {saved.get(key)!r} -> {now.get(key)!r}"
        for key in sorted({*saved, *now} - FREE_TO_CHANGE)
        if saved.get(key) != now.get(key)
    ]


def flatten(tree: dict, prefix: str = "") -> dict[str, object]:
    """Turn nested sections into {"a.b.c": value}."""
    flat: dict[str, object] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def import_plugin(path: str) -> None:
    """Import a Python file that registers tasks or corpora. Raises ConfigError if it is not there."""
    file = Path(path).resolve()
    if not file.is_file():
        raise ConfigError(f"run.plugins: the file {file} does not exist")
    name = f"mtl_dist_plugin_{file.stem}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, file)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


def _name_recipe(words: list[str]) -> list[str]:
    """Replace the name of a recipe by its file, and add the default recipe where none is given."""
    words = [
        part
        for word in words
        for part in (word.split("=", 1) if word.startswith("--config=") else [word])
    ]
    if "--config" not in words:
        return ["--config", str(RECIPES / f"{DEFAULT_RECIPE}.yaml"), *words]
    for place, word in enumerate(words[:-1]):
        if word == "--config" and words[place + 1] in recipe_names():
            words[place + 1] = str(RECIPES / f"{words[place + 1]}.yaml")
        elif word == "--config" and not Path(words[place + 1]).is_file():
            raise ConfigError(
                f"--config: {words[place + 1]} is neither a file nor a recipe ({', '.join(recipe_names())})"
            )
    return words


def _plugins(words: list[str]) -> list[str]:
    """Find run.plugins in the recipe and the words, before the parser that needs them exists."""
    found: list[str] = []
    for place, word in enumerate(words):
        following = words[place + 1] if place + 1 < len(words) else ""
        if word == "--config":
            tree = yaml.safe_load(Path(following).read_text(encoding="utf-8"))
            if not isinstance(tree, dict):
                raise ConfigError(f"--config: {following} holds no sections; see --print_config")
            found = (tree.get("run") or {}).get("plugins") or found
        elif word.startswith("--run.plugins"):
            value = yaml.safe_load(word.split("=", 1)[1] if "=" in word else following)
            found = value if isinstance(value, list) else [value]
    return found


def _explain(message: str, parser: jsonargparse.ArgumentParser) -> str:
    """Add "did you mean" to a parser's message about an unknown field."""
    known = list(flatten(parser.get_defaults().as_dict()))
    unknown = re.search(r"unrecognized arguments: --([\w.@]+)", message) or re.search(
        r"""[Kk]ey ['"]([\w.@]+)['"] (?:is not expected|.*not)""", message
    )
    nested = re.search(r"""accept nested key ['"]([\w.@]+)['"]""", message)
    name = nested[1] if nested else unknown[1] if unknown else None
    if name is None or name in known:
        return message
    short = {key.split(".")[-1]: key for key in known}
    near = difflib.get_close_matches(name, known, n=1) or [
        short[key] for key in difflib.get_close_matches(name.split(".")[-1], short, n=1)
    ]
    return f"{message}; did you mean {near[0]!r}?" if near else message


def _nearest(name: str, known) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {near[0]!r}?" if near else ""


__all__ = ["Config", "ConfigError", "check", "differences", "load_config", "recipe_names"]
