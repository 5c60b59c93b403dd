"""The wording of docstrings and identifiers.

A docstring stands alone in ``help()``: it leans on no neighbour, and a function's begins with an imperative. Neither it nor an
identifier has one of the words that docs/glossary.md lists as not used.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = (
    "benchmarks",
    "cpu_runtime",
    "examples",
    "kernels",
    "sglang_modelopt_ext",
    "tests/conformance",
    "tests/support",
    "tools",
)
"""Folders that the rules are applied to."""

LEANING = re.compile(r"(Likewise|The same|As|What)\b")
"""Beginnings of a docstring that only a neighbour explains, or that are no name for a thing."""

THIRD_PERSON = re.compile(r"[A-Z][a-z]*[^s\W]s\b")
"""A first word such as "Returns" or "Checks"; "Pass" and "Compress" are imperatives."""

NO_VERB = re.compile(r"(The|A|An|Whether|How|Which|Where|None|One|Every|Up to)\b")
"""Beginnings of a noun phrase, which names a property but does not tell what a function does."""

RETIRED = {
    "decay": "alpha",
    "in tiles": "swizzled",
    "likewise": "the statement itself",
    "meet": "is multiplied with",
    "meets": "is multiplied with",
    "nobody": "invalid expert",
    "passed over": "rejected",
    "processors": "SMs",
    "refusal": "not supported",
    "refuse": "reject",
    "refused": "not supported, or rejected",
    "refuses": "rejects",
    "rising": "m_new",
    "say once": "warn once",
    "taking": "candidates",
    "turned": "rotated, or transposed",
    "wide": "fp32",
}
"""Words of docs/glossary.md that are not used, and the word for each.

Its other words (numbers, inputs, outputs, takes, following, layout, and tiled, which is right of a product in tiles) have uses of
their own that no pattern tells apart.
"""
RETIRED_PATTERN = re.compile(rf"\b({'|'.join(RETIRED)})\b", re.IGNORECASE)

EXCEPTIONS: dict[tuple[str, str], str] = {
    ("examples/stdlib_lm/train.py", "decay"): "weight decay, the optimizer's",
    ("examples/stdlib_lm/train.py", "weight_decay"): "torch's argument",
    ("sglang_modelopt_ext/backends/timings.py", "refused"): "a field of tuning files",
}
"""By file and identifier or word: why it stays."""


class Docstring(NamedTuple):
    """A docstring with its place, and whether it is a function's that is called, unlike a property's."""

    place: str
    text: str
    is_call: bool


def files() -> list[str]:
    """Return the paths of the Python files that the rules are applied to, relative to the repository."""
    return sorted(str(path.relative_to(ROOT)) for name in FOLDERS for path in (ROOT / name).rglob("*.py"))


def docstrings(tree: ast.Module, name: str) -> Iterator[Docstring]:
    """Yield every docstring of a module, those after an assignment included."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
                yield Docstring(f"{name}:{getattr(node, 'lineno', 1)}", text, is_function and not _is_property(node))
        body = getattr(node, "body", None)
        for before, after in pairwise(body) if isinstance(body, list) else ():
            if isinstance(before, (ast.Assign, ast.AnnAssign)) and isinstance(after, ast.Expr):
                constant = after.value
                if isinstance(constant, ast.Constant) and isinstance(constant.value, str):
                    yield Docstring(f"{name}:{after.lineno}", constant.value, False)


def _is_property(node: ast.AST) -> bool:
    decorators = getattr(node, "decorator_list", ())
    return any(ast.unparse(decorator).rpartition(".")[2] in ("property", "cached_property") for decorator in decorators)


def identifiers(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Yield the names that a module defines, with their lines: functions, classes, arguments, variables, attributes."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno


def faults(source: str, name: str) -> list[str]:
    """Return a line for each docstring and identifier of ``source`` that breaks a rule, with its place in the file ``name``."""
    tree = ast.parse(source)
    found = []
    for docstring in docstrings(tree, name):
        if LEANING.match(docstring.text) or (
            docstring.is_call and (THIRD_PERSON.match(docstring.text) or NO_VERB.match(docstring.text))
        ):
            found.append(f"{docstring.place}: {docstring.text.splitlines()[0]}")
        for match in RETIRED_PATTERN.finditer(" ".join(docstring.text.split())):
            if (name, match[0]) not in EXCEPTIONS:
                found.append(f"{docstring.place}: {match[0]!r}, for which the word is {RETIRED[match[0].lower()]!r}")
    for identifier, line in identifiers(tree):
        if (name, identifier) not in EXCEPTIONS and (match := RETIRED_PATTERN.search(identifier.replace("_", " "))):
            found.append(f"{name}:{line}: {identifier}, for which the word is {RETIRED[match[0].lower()]!r}")
    return found


@pytest.mark.parametrize("path", files())
def test_wording(path: str) -> None:
    assert not faults((ROOT / path).read_text(encoding="utf-8"), path)


@pytest.mark.parametrize(
    "source",
    [
        '"""The same for the experts."""',
        'X = 1\n"""An expert, likewise."""',
        '"""What a checkpoint says."""',
        'X = 1\n"""As above."""',
        'def f() -> None:\n    """Checks the launch."""',
        'def f() -> int:\n    """The number of layers."""',
        'class C:\n    """An option that is refused."""',
        "def f(wide: int) -> None: ...",
        "class C:\n    def f(self) -> None:\n        self.say_once = 1",
    ],
)
def test_faults_are_found(source: str) -> None:
    assert len(faults(source, "file.py")) == 1


def test_what_is_right_is_no_fault() -> None:
    source = (
        '"""A module."""\nX = 1\n"""The largest value."""\n'
        'class C:\n    """A thing."""\n    @property\n    def f(self) -> int:\n        """The number of layers."""\n'
        '    def g(self) -> None:\n        """Pass the returned width."""\n'
    )
    assert faults(source, "file.py") == []


def test_every_exception_is_used() -> None:
    for name, word in EXCEPTIONS:
        text = (ROOT / name).read_text(encoding="utf-8")
        assert word in text, (name, word)
        assert RETIRED_PATTERN.search(word.replace("_", " ")), word
