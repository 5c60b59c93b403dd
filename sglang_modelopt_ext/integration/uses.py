"""The ways in which this package uses a symbol of SGLang, and how each is checked against SGLang's sources.

A row names a symbol by its dotted path, relative to ``sglang.srt`` unless it begins with ``sglang.``, and says why it is used.
``broken`` yields one clause for each difference from the row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sglang_modelopt_ext.integration.sources import Found, Sources

ROOT = "sglang"


@dataclass(frozen=True)
class Use:
    """A symbol that has to be there.

    Attributes:
        symbol: its dotted path.
        why: what it is used for.
    """

    symbol: str
    why: str

    @property
    def target(self) -> str:
        """The whole dotted path."""
        return self.symbol if self.symbol.startswith(f"{ROOT}.") else f"{ROOT}.srt.{self.symbol}"

    @property
    def words(self) -> tuple[str, ...]:
        """The names inside the symbol that this package writes somewhere: a test looks for each."""
        return ()

    def broken(self, sources: Sources) -> Iterator[str]:
        """Yield the differences of SGLang from the row, none where it holds."""
        found = sources.find(self.target)
        if found is None:
            yield "missing"
        else:
            yield from self._differences(sources, found)

    def _differences(self, sources: Sources, found: Found) -> Iterator[str]:
        del sources, found
        yield from ()


@dataclass(frozen=True)
class Called(Use):
    """A function, a method or a class that is called.

    Attributes:
        given: the parameters that are given by position, in order.
        named: the parameters that are given by name.
    """

    given: tuple[str, ...] = ()
    named: tuple[str, ...] = ()

    def _differences(self, sources: Sources, found: Found) -> Iterator[str]:
        parameters = sources.parameters(found)
        if parameters is None:
            yield "no function"
            return
        if parameters.positional[: len(self.given)] != self.given:
            yield f"takes ({', '.join(parameters.written)}), not ({', '.join(self.given)}) by position"
        known = {*parameters.positional[len(self.given) :], *parameters.named}
        for name in self.named:
            if name not in known and not parameters.takes_any:
                yield f"takes no {name}"
        for name in sorted(parameters.required - {*self.given, *self.named}):
            yield f"needs {name}"


@dataclass(frozen=True)
class Written(Use):
    """A function that this package wraps, or writes anew in a derived class.

    Attributes:
        parameters: all of them, as ``inspect.signature`` lists them.
        later: parameters that some versions have behind those; the function written here takes them too.
    """

    parameters: tuple[str, ...]
    later: tuple[str, ...] = ()

    def _differences(self, sources: Sources, found: Found) -> Iterator[str]:
        parameters = sources.parameters(found)
        if parameters is None or not found.is_function:
            yield "no function"
        elif parameters.written not in (self.parameters, self.parameters + self.later):
            yield f"parameters ({', '.join(parameters.written)}), not ({', '.join(self.parameters)})"


@dataclass(frozen=True)
class Object(Use):
    """A class whose attributes, or its objects', are read.

    Attributes:
        members: those attributes.
    """

    members: tuple[str, ...]

    @property
    def words(self) -> tuple[str, ...]:
        return self.members

    def _differences(self, sources: Sources, found: Found) -> Iterator[str]:
        if not found.is_class:
            yield "no class"
            return
        known = sources.members(found)
        for name in self.members:
            if name not in known:
                yield f"no attribute {name}"


@dataclass(frozen=True)
class Base(Object):
    """A class that this package derives from; ``members`` are the attributes it has from there and those it writes anew."""

    def _differences(self, sources: Sources, found: Found) -> Iterator[str]:
        yield from super()._differences(sources, found)
        if found.is_class:
            for name in sorted(sources.abstract(found) - {*self.members}):
                yield f"an abstract method more, {name}"


@dataclass(frozen=True)
class Fields(Use):
    """Attributes that SGLang makes of the classes of a module, or of all modules of a package.

    Attributes:
        members: those attributes.
    """

    members: tuple[str, ...]

    @property
    def words(self) -> tuple[str, ...]:
        return self.members

    def _differences(self, sources: Sources, found: Found) -> Iterator[str]:
        known: set[str] = set()
        for module in (found.module, *sources.submodules(found.module)):
            for definition in sources.names(module).values():
                one = Found(module, definition) if not isinstance(definition, str) else None
                known |= sources.members(one) if one is not None and one.is_class else set()
        for name in self.members:
            if name not in known:
                yield f"no field {name}"


@dataclass(frozen=True)
class Holds(Use):
    """A module-level variable, a function or a module in which strings occur: keys of a registry, steps, variables.

    Attributes:
        strings: those strings.
    """

    strings: tuple[str, ...] = ()

    @property
    def words(self) -> tuple[str, ...]:
        return self.strings

    def _differences(self, sources: Sources, found: Found) -> Iterator[str]:
        known = sources.strings(found) if self.strings else frozenset()
        for string in self.strings:
            if string not in known:
                yield f"no {string!r} in it"


@dataclass(frozen=True)
class Passes(Use):
    """A function or a class of SGLang's that calls with arguments of these names, which this package reads.

    Attributes:
        names: of the arguments.
    """

    names: tuple[str, ...]

    @property
    def words(self) -> tuple[str, ...]:
        return self.names

    def _differences(self, sources: Sources, found: Found) -> Iterator[str]:
        known = sources.keywords(found)
        for name in self.names:
            if name not in known:
                yield f"passes no {name}"
