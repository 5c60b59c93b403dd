"""Uses of SGLang in this package's own sources, found in their syntax."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import sglang_modelopt_ext
from sglang_modelopt_ext.integration.sources import Sources

PACKAGE = Path(str(sglang_modelopt_ext.__file__)).parent
ITSELF = {"contract.py", "contract_running.py", "contract_hybrid.py", "sources.py", "uses.py"}
DOTTED = re.compile(r"sglang(\.\w+)+")


@functools.cache
def trees() -> dict[Path, ast.Module]:
    """Return every module of the package but those that the contract is made of."""
    files = (file for file in sorted(PACKAGE.rglob("*.py")) if file.name not in ITSELF)
    return {file: ast.parse(file.read_text(encoding="utf-8")) for file in files}


def is_sglang(name: str | None) -> bool:
    return name == "sglang" or str(name).startswith("sglang.")


def scopes(tree: ast.Module) -> Iterator[ast.AST]:
    """Yield the module, and every function in it."""
    yield tree
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def imports(scope: ast.AST) -> Iterator[tuple[str, str]]:
    """``(local name, dotted path)`` of what is imported from SGLang in a module or a function, outside functions in it."""
    inner = {
        below
        for node in ast.walk(scope)
        if isinstance(node, ast.FunctionDef) and node is not scope
        for below in ast.walk(node)
    }
    for node in ast.walk(scope):
        if node in inner:
            continue
        if isinstance(node, ast.ImportFrom) and is_sglang(node.module):
            yield from ((alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Import):
            names = (alias for alias in node.names if is_sglang(alias.name))
            yield from ((alias.asname or alias.name, alias.name) for alias in names)


def attributes(tree: ast.AST, receiver: str) -> Iterator[str]:
    """Yield the attributes that are read of what ``receiver`` names, by ``getattr`` and ``hasattr`` too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == receiver:
            yield node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "_of"):
            owner, name, *_ = node.args
            if ast.unparse(owner) == receiver and isinstance(name, ast.Constant):
                yield str(name.value)


def symbols(sources: Sources) -> Iterator[tuple[str, str]]:
    """``(where, dotted path)`` of every symbol: imported, an attribute of what is imported, or written as a string."""
    for file, tree in trees().items():
        where = str(file.relative_to(PACKAGE))
        for scope in scopes(tree):
            for local, path in imports(scope):
                yield where, path
                found = sources.find(path)
                if found is None or not found.is_function:
                    yield from ((where, f"{path}.{name}") for name in attributes(scope, local))
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and DOTTED.fullmatch(node.value):
                yield where, node.value


@functools.cache
def words() -> frozenset[str]:
    """Return every name and every string that the package's sources have."""
    found: set[str] = set()
    for tree in trees().values():
        for node in ast.walk(tree):
            for field in ("id", "attr", "arg", "name", "asname"):
                name = getattr(node, field, None)
                found |= {name} if isinstance(name, str) else set()
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
            elif isinstance(node, ast.ImportFrom):
                found.add(str(node.module))
    return frozenset(found)
