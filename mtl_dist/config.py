"""The configuration: typed sections, recipes as their named values, overrides on the command line.

`--config RECIPE` is a file or the name of a recipe in mtl_dist/recipes; without it the demo recipe is used. Later words
override: `--section.field value`. `--print_config` shows everything, `--help` explains it. Tested by tests/test_config.py.
"""

import dataclasses
import difflib
import functools
import re
from typing import get_args, get_type_hints

import jsonargparse
import yaml

from mtl_dist.data.corpora import CORPORA
from mtl_dist.data.faults import RemoteConfig
from mtl_dist.preparse import (
    DEFAULT_RECIPE,
    ConfigError,
    import_plugin,
    name_recipe,
    plugins_of,
    recipe_names,
)
from mtl_dist.sections import (
    DataConfig,
    EvaluationConfig,
    MemoryConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    check,
)
from mtl_dist.tasks import TASKS, TaskConfig

SECTIONS = {
    "run": RunConfig,
    "train": TrainConfig,
    "model": ModelConfig,
    "memory": MemoryConfig,
    "optim": OptimConfig,
    "data": DataConfig,
    "remote": RemoteConfig,
    "evaluation": EvaluationConfig,
}
FREE_TO_CHANGE = {
    "run.dir",
    "run.resume",
    "run.timeout_seconds",
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
    "model.initial",
    "model.kernel",
    "data.workers",
    "data.max_bad_share",
    "evaluation.max_clips",
    "evaluation.examples",
    "evaluation.checkpoint",
}
"""Fields that may differ when a run goes on: they do not change what is learned from a given round."""

PLACES = re.compile(r"corpora\.\w+\.(root|manifest|sources)|remote\.\w+|memory\.\w+")
"""Fields that say where a corpus lies and how it is fetched: it may have moved. And where memory ends."""

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


@dataclasses.dataclass(kw_only=True)
class Config:
    """The whole configuration. `text` is its complete YAML, as saved with the run."""

    run: RunConfig
    train: TrainConfig
    model: ModelConfig
    memory: MemoryConfig
    optim: OptimConfig
    data: DataConfig
    remote: RemoteConfig
    evaluation: EvaluationConfig
    corpora: dict[str, object]
    tasks: dict[str, TaskConfig]
    text: str

    def flat(self) -> dict[str, object]:
        """Return {"section.field": value} of everything."""
        return flatten(yaml.safe_load(self.text))

    def corpora_heard(self) -> list[str]:
        """Return the corpora of the trained tasks, each once: their sources and their noise."""
        heard = [self.tasks[task].corpora() for task in self.train.tasks]
        return list(dict.fromkeys(corpus for task in heard for _, corpus in task))

    def patience(self) -> float:
        """Return how many seconds a read of data may take before the run ends."""
        return self.remote.patience_seconds or self.run.timeout_seconds / 2

    def hyper_parameters(self) -> dict[str, object]:
        """Return `flat` without the tasks and corpora that this run does not use."""
        used = {"tasks": self.train.tasks, "corpora": self.corpora_heard()}
        flat = self.flat()
        parts = {name: name.split(".") for name in flat}
        kept = [n for n, (section, sub, *_) in parts.items() if sub in used.get(section, [sub])]
        return {name: flat[name] for name in kept}


def build_parser() -> jsonargparse.ArgumentParser:
    """Return the parser with every registered task and corpus; it is made again when there are others."""
    return _parser_with(tuple(CORPORA.items()), tuple(TASKS.items()))


@functools.lru_cache(maxsize=1)
def _parser_with(corpora: tuple, tasks: tuple) -> jsonargparse.ArgumentParser:
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
    for name, corpus in corpora:
        parser.add_class_arguments(corpus, f"corpora.{name}")
    for name, task in tasks:
        parser.add_class_arguments(task.Config, f"tasks.{name}")
    return parser


def load_config(words: list[str]) -> Config:
    """Parse command-line words into a checked Config.

    Raises:
        ConfigError: an unknown field, a wrong value, or fields that do not fit together.
        SystemExit: after --help or --print_config.
    """
    words = name_recipe(words)
    for plugin in plugins_of(words):
        import_plugin(plugin)
    parser = build_parser()
    try:
        parsed = parser.parse_args(words)
    except (jsonargparse.ArgumentError, TypeError) as error:
        raise ConfigError(_explain(str(error), parser)) from None
    text = parser.dump(parsed, skip_unset=False)
    sections = {name: _make(kind, parsed[name], name) for name, kind in SECTIONS.items()}
    corpora = {n: _make(k, parsed["corpora"][n], f"corpora.{n}") for n, k in CORPORA.items()}
    tasks = {n: _make(t.Config, parsed["tasks"][n], f"tasks.{n}") for n, t in TASKS.items()}
    config = Config(**sections, corpora=corpora, tasks=tasks, text=text)
    _check_together(config)
    _check_length(words, config)
    return config


def _check_length(words: list[str], config: Config) -> None:
    """Refuse a length in epochs on the command line that the recipe's length in rounds would override unheard."""
    fields = {word.partition("=")[0] for word in words}
    unheard = "--train.epochs" in fields and "--train.rounds" not in fields
    if unheard and config.train.rounds is not None:
        raise ConfigError(
            f"train.epochs: has no effect beside the recipe's train.rounds {config.train.rounds}; add --train.rounds null"
        )


def _make(kind: type, values: jsonargparse.Namespace, section: str):
    """Build a section; first its fields that are dataclasses themselves, or lists of them."""
    types = get_type_hints(kind)
    try:
        return kind(
            **{name: _built(types.get(name), value) for name, value in vars(values).items()}
        )
    except ValueError as error:
        raise ConfigError(f"{section}.{error}") from None


def _built(kind: type, value):
    if isinstance(value, jsonargparse.Namespace):
        return kind(**vars(value))
    if isinstance(value, list) and any(isinstance(item, jsonargparse.Namespace) for item in value):
        return [_built(get_args(kind)[0], item) for item in value]
    return value


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
        for field, corpus in task.corpora():
            if corpus not in config.corpora:
                raise ConfigError(
                    f"tasks.{name}.{field}: unknown corpus {corpus!r}{_nearest(corpus, config.corpora)} "
                    f"(known: {', '.join(config.corpora)})"
                )
    patience, timeout = config.remote.patience_seconds, config.run.timeout_seconds
    if (
        patience is not None and patience >= timeout
    ):  # the rank that waits says so before others give up
        raise ConfigError(
            f"remote.patience_seconds: {patience:g} is not allowed beside run.timeout_seconds {timeout:g}, after which the "
            "other ranks end the run; lower the former or raise the latter"
        )
    main = config.train.main_task
    if main not in config.train.tasks:
        raise ConfigError(
            f"train.main_task: {main!r} is not among train.tasks{_nearest(main, config.train.tasks)} "
            f"(allowed: {', '.join(config.train.tasks)})"
        )


def differences(config: Config, saved_text: str) -> list[str]:
    """Return "field: saved -> now" for every field that a resumed run must not change."""
    defaults = flatten(
        build_parser().get_defaults().as_dict()
    )  # of fields that are newer than the run
    saved, now = defaults | flatten(yaml.safe_load(saved_text)), config.flat()
    bound = {"train.epochs", "train.rounds"} if config.optim.schedule == "cosine" else set()
    return [
        f"{key}: {saved.get(key)!r} -> {now.get(key)!r}"
        for key in sorted({*saved, *now} - (FREE_TO_CHANGE - bound))
        if saved.get(key) != now.get(key) and not PLACES.fullmatch(key)
    ]


def flatten(tree: dict, prefix: str = "") -> dict[str, object]:
    """Turn nested sections into {"a.b.c": value}."""
    flat: dict[str, object] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


FIELD_NOT_KNOWN = (
    r"unrecognized arguments: --([\w.@]+)",
    r"Option '([\w.]+)' is not accepted",
    r"Group '(?P<group>[\w.]+)' does not accept option '(?P<option>[\w.]+)'",
    r"""accept nested key ['"]([\w.@]+)['"]""",
)
"""How the parser says that it does not know a field, on the command line and in a recipe."""


def _explain(message: str, parser: jsonargparse.ArgumentParser) -> str:
    """Put a parser's message into plain words, and add "did you mean" where it is about an unknown field."""
    message = re.sub(r'Parser key "([\w.]+)":\s*', r"\1: ", message)
    message = re.sub(r"an? <class '(\w+)'>", r"\1", message).replace("a typing.Literal", "one of ")
    if message.endswith("Got value: False"):
        message += "; YAML reads an unquoted no as false: write 'no'"
    found = next(filter(None, (re.search(pattern, message) for pattern in FIELD_NOT_KNOWN)), None)
    known = list(flatten(parser.get_defaults().as_dict()))
    name = ".".join(found.groups()) if found else None
    if name is None or name in known:
        return message
    short = {key.split(".")[-1]: key for key in known}
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.7) or [
        short[key] for key in difflib.get_close_matches(name.split(".")[-1], short, n=1, cutoff=0.7)
    ]
    return f"{message}; did you mean {near[0]!r}?" if near else message


def _nearest(name: str, known) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {near[0]!r}?" if near else ""


__all__ = ["Config", "ConfigError", "check", "differences", "load_config", "recipe_names"]
