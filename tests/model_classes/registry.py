"""The model classes that SGLang registers, read from its sources: some of its modules are imported on a GPU only."""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path


def registered_classes() -> dict[str, str]:
    """Return the module of each class that a module of ``sglang.srt.models`` names in its ``EntryClass``."""
    spec = find_spec("sglang.srt")
    assert spec is not None
    assert spec.submodule_search_locations, "SGLang is installed"
    found = {}
    for file in sorted((Path(spec.submodule_search_locations[0]) / "models").glob("*.py")):
        for statement in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "EntryClass":
                entries = (
                    statement.value.elts if isinstance(statement.value, (ast.List, ast.Tuple)) else [statement.value]
                )
                found.update((entry.id, file.stem) for entry in entries if isinstance(entry, ast.Name))
    return found
