"""What happens to the command line before the parser exists: recipes by name, and plugins, which add fields to it."""

import hashlib
import importlib.util
import sys
from pathlib import Path

import yaml

RECIPES = Path(__file__).parent / "recipes"
DEFAULT_RECIPE = "demo"


class ConfigError(ValueError):
    """A mistake in the configuration; the message names field, value and remedy."""


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def name_recipe(words: list[str]) -> list[str]:
    """Replace the name of a recipe by its file, and add the default recipe where none is given."""
    words = [
        part
        for word in words
        for part in (word.split("=", 1) if word.startswith("--config=") else [word])
    ]
    if "--config" not in words:
        return ["--config", str(RECIPES / f"{DEFAULT_RECIPE}.yaml"), *words]
    for place, word in enumerate(words):
        if word != "--config":
            continue
        name = words[place + 1] if place + 1 < len(words) else ""
        if name in recipe_names():
            words[place + 1] = str(RECIPES / f"{name}.yaml")
        elif not Path(name).is_file():
            raise ConfigError(
                f"--config: {name!r} is neither a file nor a recipe ({', '.join(recipe_names())})"
            )
    return words


def plugins_of(words: list[str]) -> list[str]:
    """Find run.plugins in the recipe and the words, before the parser that needs them exists."""
    found: object = []
    for place, word in enumerate(words):
        following = words[place + 1] if place + 1 < len(words) else ""
        if word == "--config":
            run = read_recipe(Path(following)).get("run")
            found = (run.get("plugins") if isinstance(run, dict) else None) or found
        elif word == "--run.plugins" or word.startswith("--run.plugins="):
            found = word.split("=", 1)[1] if "=" in word else following
    try:
        found = yaml.safe_load(found) if isinstance(found, str) else found
    except yaml.YAMLError:
        found = None
    found = [found] if isinstance(found, str) else found
    if not isinstance(found, list) or not all(isinstance(path, str) for path in found):
        raise ConfigError("run.plugins: name Python files, such as [my_task.py]")
    return found


def read_recipe(path: Path) -> dict:
    """Return the sections of a recipe. Raises ConfigError if it is not YAML or holds none."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"--config: {path} cannot be read as YAML ({error})") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"--config: {path} holds no sections; see --print_config")
    return tree


def import_plugin(path: str) -> None:
    """Import a Python file that registers tasks or corpora. Raises ConfigError if it is not there."""
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise ConfigError(f"run.plugins: the file {file} does not exist")
    name = f"mtl_dist_plugin_{file.stem}_{hashlib.blake2b(str(file).encode(), digest_size=4).hexdigest()}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None:
        raise ConfigError(f"run.plugins: {file} is not a Python file (*.py)")
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
