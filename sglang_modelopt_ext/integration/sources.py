"""The sources of a package, read and never imported: the names in its modules and classes, and the parameters of its functions.

Importing SGLang takes seconds, and modules for a GPU fail where there is none. A module is parsed when something in it is first
asked for. Names that a module imports are followed to where they are defined.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Found:
    """A name that was found: the module that defines it, and its definition there; None for the module itself."""

    module: str
    node: Definition | None

    @property
    def is_class(self) -> bool:
        """Whether the definition is a class."""
        return isinstance(self.node, ast.ClassDef)

    @property
    def is_function(self) -> bool:
        """Whether the definition is a function or a method."""
        return isinstance(self.node, Function)


@dataclass(frozen=True)
class Parameters:
    """The parameters of a function as it is called, without ``self`` and ``cls``.

    Attributes:
        positional: those that may be given by position, in order.
        named: those that are given by name only.
        required: those without a default.
        takes_any: whether it has ``**kwargs``.
        bound: the name of the parameter left out, ``self`` or ``cls``, None for a function or a static method.
        written: all names in order, the bound one and ``*args`` and ``**kwargs`` included, as ``inspect.signature`` has them.
    """

    positional: tuple[str, ...]
    named: tuple[str, ...]
    required: frozenset[str]
    takes_any: bool
    bound: str | None
    written: tuple[str, ...]


class Sources:
    """The package in the folder ``root``, which has its name."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.package = root.name
        self._modules: dict[str, ast.Module | None] = {}
        self._names: dict[str, dict[str, Definition | str]] = {}
        self._members: dict[tuple[str, str], frozenset[str]] = {}

    def module(self, name: str) -> ast.Module | None:
        """Return the parsed module ``name``, None where there is none; a folder without ``__init__.py`` is an empty module."""
        if name not in self._modules:
            self._modules[name] = self._parse(name)
        return self._modules[name]

    def _parse(self, name: str) -> ast.Module | None:
        first, *rest = name.split(".")
        if first != self.package:
            return None
        folder = self.root.joinpath(*rest)
        for file in (folder / "__init__.py", *([folder.with_suffix(".py")] if rest else [])):
            if file.is_file():
                return ast.parse(file.read_text(encoding="utf-8"))
        return ast.Module([], []) if folder.is_dir() else None

    def submodules(self, name: str) -> Iterator[str]:
        """Yield the modules right inside the package ``name``."""
        folder = self.root.joinpath(*name.split(".")[1:])
        for file in sorted(folder.glob("*.py")):
            if file.stem != "__init__":
                yield f"{name}.{file.stem}"

    def find(self, target: str) -> Found | None:
        """Return the definition behind the dotted path ``target``, None where there is none."""
        parts = target.split(".")
        for count in range(len(parts), 0, -1):
            module = ".".join(parts[:count])
            if self.module(module) is None:
                continue
            found: Found | None = Found(module, None)
            for part in parts[count:]:
                found = self._inside(found, part) if found is not None else None
            return found
        return None

    def _inside(self, found: Found, name: str) -> Found | None:
        if found.node is None:
            definition = self.names(found.module).get(name)
            if isinstance(definition, str):
                return self.find(definition)
            return Found(found.module, definition) if definition is not None else self._starred(found.module, name)
        for owner in self.classes(found):
            assert isinstance(owner.node, ast.ClassDef)
            for statement in _top_level(owner.node.body):
                if name in _assigned(statement) and isinstance(statement, Definition):
                    return Found(owner.module, statement)
        return None

    def names(self, module: str) -> dict[str, Definition | str]:
        """Return the names at the top level of ``module``: their definitions, or the dotted path they are imported from."""
        if module not in self._names:
            tree = self.module(module)
            found: dict[str, Definition | str] = {}
            for statement in _top_level(tree.body if tree is not None else []):
                if isinstance(statement, ast.ImportFrom) and statement.module and not statement.level:
                    found.update(
                        (alias.asname or alias.name, f"{statement.module}.{alias.name}") for alias in statement.names
                    )
                elif isinstance(statement, ast.Import):
                    found.update((alias.asname, alias.name) for alias in statement.names if alias.asname)
                elif isinstance(statement, Definition):
                    # A class that is decorated by hand (`Name = make(Name)`) stays the class.
                    names = _assigned(statement)
                    found.update((name, statement) for name in names if not isinstance(found.get(name), ast.ClassDef))
            self._names[module] = found
        return self._names[module]

    def _starred(self, module: str, name: str) -> Found | None:
        """Find a name that ``module`` has by ``from ... import *``."""
        starred = self.names(module).get("*")
        return self.find(f"{starred.removesuffix('.*')}.{name}") if isinstance(starred, str) else None

    def classes(self, found: Found) -> Iterator[Found]:
        """Yield a class and its base classes, as far as they are of this package."""
        pending, seen = [found], set()
        while pending:
            one = pending.pop(0)
            if not isinstance(one.node, ast.ClassDef) or (one.module, one.node.name) in seen:
                continue
            seen.add((one.module, one.node.name))
            yield one
            for base in one.node.bases:
                parent = self.find(f"{one.module}.{ast.unparse(base)}")
                if parent is not None:
                    pending.append(parent)

    def members(self, found: Found) -> frozenset[str]:
        """Return the attributes of a class and of its instances: those that it and its bases define or assign to ``self``."""
        assert isinstance(found.node, ast.ClassDef)
        key = found.module, found.node.name
        if key not in self._members:
            names: set[str] = set()
            for owner in self.classes(found):
                assert isinstance(owner.node, ast.ClassDef)
                for statement in _top_level(owner.node.body):
                    names |= _assigned(statement)
                    if isinstance(statement, Function):
                        names |= _set_on_self(statement)
            self._members[key] = frozenset(names)
        return self._members[key]

    def abstract(self, found: Found) -> frozenset[str]:
        """Return the abstract methods of a class, which a derived class has to write."""
        defined: dict[str, bool] = {}
        for owner in self.classes(found):
            assert isinstance(owner.node, ast.ClassDef)
            for statement in owner.node.body:
                if isinstance(statement, Function):
                    is_abstract = any("abstractmethod" in ast.unparse(item) for item in statement.decorator_list)
                    defined.setdefault(statement.name, is_abstract)
        return frozenset(name for name, is_abstract in defined.items() if is_abstract)

    def parameters(self, found: Found) -> Parameters | None:
        """Return the parameters of a function, a method or the constructor of a class; None for anything else."""
        if isinstance(found.node, Function):
            return _parameters(found.node)
        if not isinstance(found.node, ast.ClassDef):
            return None
        init = self._inside(found, "__init__")
        if init is not None and isinstance(init.node, Function):
            return _parameters(init.node)
        return self._fields(found)

    def _fields(self, found: Found) -> Parameters:
        """Return the annotated fields of a data class, a named tuple or a struct, which are its constructor's parameters."""
        fields: dict[str, bool] = {}
        for owner in reversed(list(self.classes(found))):
            assert isinstance(owner.node, ast.ClassDef)
            for statement in owner.node.body:
                if isinstance(statement, ast.AnnAssign) and "ClassVar" not in ast.unparse(statement.annotation):
                    fields.update(dict.fromkeys(_assigned(statement), statement.value is None))
        required = frozenset(name for name, is_required in fields.items() if is_required)
        return Parameters(tuple(fields), (), required, False, "self", tuple(fields))

    def strings(self, found: Found) -> frozenset[str]:
        """Return the string constants of a value, and those in the decorators of its module, which may fill a registry."""
        tree = self.module(found.module)
        assert tree is not None
        roots: list[ast.AST] = [found.node if found.node is not None else tree]
        roots += [item for node in tree.body if isinstance(node, Function) for item in node.decorator_list]
        return frozenset(string for root in roots for string in _strings(root))

    def keywords(self, found: Found) -> frozenset[str]:
        """Return the names of the arguments in the calls inside a definition, or a whole module."""
        root = found.node if found.node is not None else self.module(found.module)
        assert root is not None
        return frozenset(node.arg for node in ast.walk(root) if isinstance(node, ast.keyword) and node.arg)


def _top_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements of a module or a class, those inside ``if``, ``try`` and ``with`` included."""
    for statement in body:
        if isinstance(statement, (ast.If, ast.Try, ast.With)):
            for part in ("body", "orelse", "finalbody"):
                yield from _top_level(getattr(statement, part, []))
            for handler in getattr(statement, "handlers", []):
                yield from _top_level(handler.body)
        else:
            yield statement


def _assigned(statement: ast.stmt) -> set[str]:
    """Return the names that a statement defines."""
    if isinstance(statement, Function | ast.ClassDef):
        return {statement.name}
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    return {
        node.id for target in targets if target is not None for node in ast.walk(target) if isinstance(node, ast.Name)
    }


def _set_on_self(function: Function) -> set[str]:
    """Return the attributes that a method assigns to its first parameter."""
    first = (*function.args.posonlyargs, *function.args.args)[:1]
    return {
        node.attr
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and [node.value.id] == [argument.arg for argument in first]
    }


def _parameters(node: Function) -> Parameters:
    args = node.args
    positional = [argument.arg for argument in (*args.posonlyargs, *args.args)]
    named = [argument.arg for argument in args.kwonlyargs]
    required = set(positional[: len(positional) - len(args.defaults)])
    required |= {name for name, default in zip(named, args.kw_defaults, strict=True) if default is None}
    written = [*positional, *([args.vararg.arg] if args.vararg else []), *named]
    bound = positional[0] if positional and positional[0] in ("self", "cls") else None
    return Parameters(
        positional=tuple(positional[1:] if bound else positional),
        named=tuple(named),
        required=frozenset(required - {bound}),
        takes_any=args.kwarg is not None,
        bound=bound,
        written=(*written, *([args.kwarg.arg] if args.kwarg else [])),
    )


def _strings(root: ast.AST) -> set[str]:
    return {node.value for node in ast.walk(root) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
