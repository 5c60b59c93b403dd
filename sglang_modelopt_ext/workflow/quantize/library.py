"""The recipe files of ModelOpt: those of its library ``modelopt_recipes`` by name, and the user's own by path.

A recipe file says what it is in ``metadata.recipe_type``. Two kinds quantize a model: a PTQ recipe, which ``quantize`` runs, and a
search over formats, which ``auto-quantize`` runs. All others are errors that say why.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.workflow.common.base_model import import_modelopt

PTQ, SEARCH = "ptq", "auto_quantize"
COMMANDS = {PTQ: "quantize", SEARCH: "auto-quantize"}
"""The commands of ``sglang-modelopt`` that run each kind of recipe."""

SUFFIXES = (".yaml", ".yml")


@cache
def library() -> dict[str, str]:
    """Return the kind of every recipe of ModelOpt's library that quantizes a model, by name, in the order of the names."""
    kinds = {name: recipe_type(file) for name, file in files().items()}
    return {name: kind for name, kind in kinds.items() if kind in COMMANDS}


def files() -> dict[str, Path]:
    """Return every YAML file of ModelOpt's library by its name, a path without suffix; most are parts of recipes."""
    import_modelopt()
    from modelopt.torch.opt.config_loader import BUILTIN_CONFIG_ROOT

    root = Path(str(BUILTIN_CONFIG_ROOT))
    found = (file for suffix in SUFFIXES for file in root.rglob(f"*{suffix}"))
    return {without_suffix(file.relative_to(root).as_posix()): file for file in sorted(found)}


def recipe_type(file: Path) -> str | None:
    """Return ``metadata.recipe_type`` of a YAML file; None for one without, such as a part that recipes import."""
    import yaml

    try:
        content = next(iter(yaml.safe_load_all(file.read_text(encoding="utf-8"))), None)
    except (OSError, ValueError, yaml.YAMLError):
        return None
    metadata = content.get("metadata") if isinstance(content, dict) else None
    found = metadata.get("recipe_type") if isinstance(metadata, dict) else None
    return found if isinstance(found, str) else None


def without_suffix(name: str) -> str:
    """Return the name of a recipe file without ``.yaml`` or ``.yml``."""
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    return name


def find_file(name: str) -> tuple[str, Path] | None:
    """Return a recipe file or folder, with or without suffix in ``name``, and its name to record; None where there is none.

    ModelOpt's library comes before the user's files, as in ModelOpt's own loader.
    """
    import_modelopt()
    from modelopt.recipe.loader import _resolve_recipe_path

    found = Path(str(_resolve_recipe_path(name)))
    known = {file: own for own, file in files().items()}
    if found in known:
        return known[found], found
    return (name, found) if found.is_file() or found.is_dir() else None


def load(name: str, wanted: str) -> tuple[str, Any]:
    """Return the name to record, and ModelOpt's own object of a recipe file.

    Args:
        name: of the library, or a path; with or without suffix.
        wanted: the kind that the caller runs.

    Raises:
        ModelOptExtError: no such file, one that ModelOpt cannot load, or a recipe of another kind; the message names the command
            that runs it, if one does.
    """
    found = find_file(name)
    if found is None:
        raise ModelOptExtError.at("--recipe", name, "a recipe of ModelOpt's library or a recipe file", "no such file")
    recorded, file = found
    kind = recipe_type(file)
    kind = recipe_type(file) if file.is_file() else PTQ  # a folder is a PTQ recipe in two files
    if kind is None:
        raise ModelOptExtError.at("--recipe", name, "a recipe file", "one without metadata.recipe_type")
    if kind not in COMMANDS:
        raise ModelOptExtError.at("--recipe", name, "a recipe that quantizes a model", f"one of {kind}")
    if kind != wanted:
        command = f"sglang-modelopt {COMMANDS[kind]} MODEL --recipe {recorded} --data FILE --output DIR"
        raise ModelOptExtError.at("--recipe", name, f"a recipe of {wanted}", f"one of {kind}: run {command}")
    from modelopt.recipe import load_recipe

    try:
        with quiet():
            recipe = load_recipe(file)
    except Exception as error:  # YAML, an import, pydantic
        raise ModelOptExtError.at("--recipe", name, "a recipe ModelOpt can load", first_line(error)) from error
    return recorded, recipe


def first_line(error: Exception) -> str:
    """Return the type of an exception and the first three lines of its message, as one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])}"[:300]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Discard ModelOpt's prints while the block runs: standard output carries the result."""
    with contextlib.redirect_stdout(None):
        yield
