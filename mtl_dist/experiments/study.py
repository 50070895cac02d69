"""A study: named variants of a recipe, their seeds, and what they are compared by. A YAML file says it:

    recipe: paper                      a recipe by name or file; --config overrides it
    metric: audio_tagging/map@3        task/metric of results.json, of the test side
    against: TAG                       the variant that the others are compared with
    set: {optim.schedule: cosine}      may be left out: fields of all variants, which the command line overrides
    variants:
      TAG: {set: {train.tasks: [audio_tagging]}, published: {map@3: 0.637}}
      ...                              `set`: fields as on the command line, which it overrides; `published`: metrics of the
                                       same task; `against`: where it is compared with another variant than the rest

Tested by tests/test_study.py.
"""

import dataclasses
import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from mtl_dist.config import ConfigError, differences, load_config

STUDIES = Path(__file__).parent.parent / "studies"
NEEDED = {"recipe": str, "metric": str, "against": str, "variants": dict}
FIELDS = NEEDED | {"set": dict, "name": str, "overrides": list}
"""The last two are in OUT/study.yaml, which is a study, too: what a folder of runs is about."""
FIELDS_OF_VARIANT = {"set": dict, "published": dict, "against": str}
OWN_FIELDS = ("run.dir", "run.seed", "run.resume")
"""What a study sets itself."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """One row of a study's table."""

    name: str
    settings: Mapping[str, object]
    published: Mapping[str, float]
    against: str

    @property
    def folder(self) -> str:
        """Name of the folder of its runs."""
        return re.sub(r"\s+", "", self.name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """Variants by name, and how they are compared."""

    name: str
    recipe: str
    task: str
    metric: str
    against: str
    settings: Mapping[str, object]
    variants: Mapping[str, Variant]
    overrides: Sequence[str] = ()

    def as_tree(self, published: bool = True) -> dict:
        """Return it as a study's YAML has it, with or without the published values."""
        variants = {}
        for name, own in self.variants.items():
            variants[name] = {"set": dict(own.settings), "against": own.against}
            variants[name] |= {"published": dict(own.published)} if published else {}
        return {
            "name": self.name,
            "recipe": self.recipe,
            "overrides": list(self.overrides),
            "metric": f"{self.task}/{self.metric}",
            "against": self.against,
            "set": dict(self.settings),
            "variants": variants,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One training run of a study: `words` are those of mtl_dist/train.py."""

    variant: Variant
    seed: int
    folder: Path
    words: Sequence[str]

    def status(self) -> dict:
        """Return what its status.json says; {} where there is none."""
        try:
            return json.loads((self.folder / "status.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    def finished(self) -> bool:
        """Return whether it has its results."""
        done = self.status().get("state") == "finished"
        return done and (self.folder / "results.json").is_file()

    def results(self) -> dict[str, dict[str, float]]:
        """Return {task: {metric: number}} of the test side."""
        return json.loads((self.folder / "results.json").read_text(encoding="utf-8"))["test"]

    def check(self) -> None:
        """Raise ValueError if its folder holds a run of other settings."""
        saved = self.folder / "config.yaml"
        if not saved.exists():
            return
        try:
            changed = differences(load_config(self.words), saved.read_text(encoding="utf-8"))
        except (yaml.YAMLError, AttributeError, OSError) as error:
            raise ValueError(f"{saved} is damaged ({error}); move it away") from error
        if changed:
            raise ValueError(
                f"{self.folder} holds a run of other settings ({'; '.join(changed)}); name another --out"
            )


def study_names() -> list[str]:
    """Return the names of the studies that come with the package."""
    return sorted(path.stem for path in STUDIES.glob("*.yaml"))


def load_study(name: str) -> Study:
    """Read a study by its name or file. Raises ValueError naming the file, the field and what is allowed."""
    path = STUDIES / f"{name}.yaml" if name in study_names() else Path(name)
    if not path.is_file():
        raise ValueError(f"{name!r} is neither a file nor a study ({', '.join(study_names())})")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as YAML ({error})") from error
    _check_fields(tree, FIELDS, f"{path}")
    missing = [field for field in NEEDED if field not in tree]
    if missing or not tree["variants"]:
        raise ValueError(f"{path}: {(missing or ['variants'])[0]} is missing, or empty")
    task, slash, metric = tree["metric"].partition("/")
    if not slash:
        raise ValueError(f"{path}, metric: {tree['metric']!r}; write it as audio_tagging/map@3")
    settings = tree.get("set", {})
    _refuse_own(settings, f"{path}, set")
    variants = {
        name: _variant(f"{path}, variants.{name}", name, own, tree["against"])
        for name, own in tree["variants"].items()
    }
    folders: dict[str, str] = {}
    for variant in variants.values():
        if variant.against not in variants:
            raise ValueError(
                f"{path}, against: {variant.against!r} is no variant (allowed: {', '.join(variants)})"
            )
        other = folders.setdefault(variant.folder.casefold(), variant.name)
        if other != variant.name:
            raise ValueError(
                f"{path}, variants: {other!r} and {variant.name!r} would train in the same folder {variant.folder}"
            )
    return Study(
        name=tree.get("name", path.stem),
        recipe=tree["recipe"],
        task=task,
        metric=metric,
        against=tree["against"],
        settings=settings,
        variants=variants,
        overrides=tree.get("overrides", []),
    )


def _variant(where: str, name: str, tree: object, against: str) -> Variant:
    _check_fields(tree, FIELDS_OF_VARIANT, where)
    settings, published = tree.get("set", {}), tree.get("published", {})
    if not isinstance(name, str) or not re.fullmatch(r"[\w.+\- ]+", name):
        raise ValueError(f"{where}: use letters, digits, spaces and . + - _ for its name")
    _refuse_own(settings, f"{where}.set")
    for metric, value in published.items():
        if not isinstance(value, (int, float)):
            raise ValueError(f"{where}.published.{metric}: {value!r} is not a number")
    against = tree.get("against", against)
    return Variant(name=name, settings=settings, published=published, against=against)


def _refuse_own(settings: Mapping[str, object], where: str) -> None:
    for field in OWN_FIELDS:
        if field in settings:
            raise ValueError(f"{where}.{field}: a study sets it itself")


def _words(settings: Mapping[str, object]) -> list[str]:
    """Return settings as on the command line."""
    return [
        word
        for field, value in settings.items()
        for word in (f"--{field}", value if isinstance(value, str) else json.dumps(value))
    ]


def _check_fields(tree: object, fields: Mapping[str, type], where: str) -> None:
    if not isinstance(tree, dict):
        raise ValueError(f"{where}: holds no fields ({', '.join(fields)})")
    for field, value in tree.items():
        if field not in fields:
            near = difflib.get_close_matches(str(field), fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(fields)}"
            raise ValueError(f"{where}: unknown field {field!r}; {hint}")
        if not isinstance(value, fields[field]):
            raise ValueError(f"{where}, {field}: {value!r} is not a {fields[field].__name__}")


def runs_in(study: Study, out: Path) -> list[Run]:
    """Return the runs that lie in a study's folder, variant by variant."""
    return [
        Run(variant=variant, seed=int(folder.name.removeprefix("seed_")), folder=folder, words=[])
        for variant in study.variants.values()
        for folder in sorted((out / variant.folder).glob("seed_*"))
        if folder.is_dir()
    ]


def plan_runs(study: Study, seeds: Sequence[int], out: Path) -> list[Run]:
    """Return the runs of all variants and seeds, variant by variant for each seed.

    Raises:
        ValueError: a variant or an override names an unknown field or a wrong value, or a folder holds another run.
    """
    runs = []
    for seed in seeds:
        for variant in study.variants.values():
            folder = out / variant.folder / f"seed_{seed}"
            own = ["--run.dir", str(folder), "--run.seed", str(seed), "--run.resume", "auto"]
            common, of_variant = _words(study.settings), _words(variant.settings)
            words = ["--config", study.recipe, *common, *study.overrides, *of_variant, *own]
            run = Run(variant=variant, seed=seed, folder=folder, words=words)
            try:
                config = load_config(words)
            except ConfigError as error:
                raise ValueError(f"study {study.name}, variant {variant.name}: {error}") from error
            if study.task not in config.train.tasks:
                raise ValueError(
                    f"study {study.name}, metric: variant {variant.name} does not train {study.task!r} "
                    f"(it trains: {', '.join(config.train.tasks)})"
                )
            run.check()
            runs.append(run)
    return runs
