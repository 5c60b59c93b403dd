"""Sources of GPU packages, parsed without import: their folder, their functions and this package's calls of them."""

from __future__ import annotations

import ast
import copy
import functools
import os
import sys
from collections.abc import Callable
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest

FOLDER = "SGLANG_MODELOPT_EXT_TEST_CONTRACTS"


def source_folder() -> Path:
    """Return the folder of the unpacked sources. A missing folder fails the test."""
    folder = Path(os.environ.get(FOLDER) or Path(sys.prefix) / "contracts")
    if not folder.is_dir():
        pytest.fail(f"no sources of GPU packages at {folder}: run `make setup`, or name another folder in {FOLDER}")
    return folder


def version_of(distribution: str) -> str:
    """Return the version of an unpacked distribution. A missing one fails the test."""
    found = sorted(source_folder().glob(f"{distribution.replace('-', '_')}-*.dist-info/METADATA"))
    if len(found) != 1:
        pytest.fail(f"{len(found)} unpacked distributions of {distribution} in {source_folder()}: run `make setup`")
    return Parser().parsestr(found[0].read_text(encoding="utf-8"))["Version"]


@functools.cache
def parse(path: str) -> ast.Module:
    """Return an unpacked module, by its path in the sources."""
    return ast.parse((source_folder() / path).read_text(encoding="utf-8"))


def function(path: str, name: str) -> ast.FunctionDef:
    """Return a function of an unpacked module. Raises LookupError when there is none of that name."""
    for node in parse(path).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return node
    raise LookupError(f"{path} has no function {name}")


def parameters(node: ast.FunctionDef) -> dict[str, str | None]:
    """Return the parameters of a function with their defaults as source, None where one must be given."""
    positional = [*node.args.posonlyargs, *node.args.args]
    missing: list[ast.expr | None] = [None] * (len(positional) - len(node.args.defaults))
    defaults = [*missing, *node.args.defaults, *node.args.kw_defaults]
    names = [argument.arg for argument in [*positional, *node.args.kwonlyargs]]
    return {
        name: None if default is None else ast.unparse(default) for name, default in zip(names, defaults, strict=True)
    }


def bind(call: ast.Call, node: ast.FunctionDef) -> dict[str, str]:
    """Return the arguments of ``call`` by parameter of ``node``, as source. Raises TypeError when Python would."""
    positional = [argument.arg for argument in [*node.args.posonlyargs, *node.args.args]]
    if len(call.args) > len(positional):
        raise TypeError(f"{node.name} takes {len(positional)} positional arguments, the call has {len(call.args)}")
    bound = {name: ast.unparse(value) for name, value in zip(positional, call.args, strict=False)}
    known = parameters(node)
    for keyword in call.keywords:
        if keyword.arg is None or keyword.arg not in known or keyword.arg in bound:
            raise TypeError(f"{node.name} does not take {keyword.arg} there")
        bound[keyword.arg] = ast.unparse(keyword.value)
    missing = [name for name, default in known.items() if default is None and name not in bound]
    if missing:
        raise TypeError(f"{node.name} needs {', '.join(missing)}")
    return bound


def calls(module: Path, name: str) -> list[ast.Call]:
    """Return the calls of ``name`` in one of our own modules."""
    tree = ast.parse(module.read_text(encoding="utf-8"))
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name
    ]


def decorator(node: ast.FunctionDef, name: str) -> ast.Call:
    """Return the decorator ``@name(...)`` of a function. Raises LookupError when it has none."""
    for item in node.decorator_list:
        if isinstance(item, ast.Call) and isinstance(item.func, ast.Name) and item.func.id == name:
            return item
    raise LookupError(f"{node.name} has no decorator {name}")


def method(path: str, cls: str, name: str, **scope: Any) -> Callable[..., Any]:
    """Return a method of an unpacked class that runs alone: its body sees only ``scope``."""
    for node in parse(path).body:
        if isinstance(node, ast.ClassDef) and node.name == cls:
            (found,) = [item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == name]
            return _run_alone(path, [found], scope)[0]
    raise LookupError(f"{path} has no class {cls}")


def assigned(path: str, name: str, cls: str | None = None) -> Any:
    """Return the literal that an unpacked module or its class assigns to ``name``. Raises LookupError without one."""
    body = parse(path).body
    if cls is not None:
        (body,) = [node.body for node in body if isinstance(node, ast.ClassDef) and node.name == cls]
    for node in body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [name]:
            return ast.literal_eval(node.value)
    raise LookupError(f"{path} does not assign {name}")


def evaluate(path: str, *names: str, **scope: Any) -> list[Callable[..., Any]]:
    """Return functions of an unpacked module that run alone: their bodies see only ``scope`` and each other."""
    return _run_alone(path, [function(path, name) for name in names], scope)


def _run_alone(path: str, functions: list[ast.FunctionDef], scope: dict[str, Any]) -> list[Callable[..., Any]]:
    nodes = [copy.deepcopy(node) for node in functions]
    for node in nodes:
        node.decorator_list = []
        node.returns = None
        for argument in [*node.args.args, *node.args.kwonlyargs]:
            argument.annotation = None
    namespace: dict[str, Any] = dict(scope)
    exec(compile(ast.Module([*nodes], type_ignores=[]), path, "exec"), namespace)
    return [namespace[node.name] for node in nodes]
