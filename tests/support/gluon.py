"""Functions in Gluon run on NumPy: their own text, with arrays for tensors and with copies that arrive only when waited for.

Triton's interpreter has no Gluon. What this shows is a kernel's arithmetic of indices, its ring of stages (a stage is garbage from
the moment a copy to it is issued until its group is waited for), its masks, and that it reads nothing but what it may before it
waits for the kernels ahead. Layouts mean nothing here: Triton checks them when it compiles.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from triton.runtime.jit import KernelInterface

GARBAGE = {"u": 0xEE, "i": -(1 << 20), "f": float("nan")}


class Array(np.ndarray):
    """A tensor of the language: operators make new ones."""

    def to(self, dtype: Any, bitcast: bool = False) -> Array:
        """Keep the values: NumPy has them in float64."""
        del dtype, bitcast
        return self

    def __iadd__(self, other: Any) -> Array:  # type: ignore[misc, override]
        return self + other

    def broadcast_to(self, shape: list[int]) -> Array:
        """Repeat along dimensions of one."""
        return array(np.broadcast_to(self, shape))


def array(values: Any) -> Array:
    """View values as a tensor of the language."""
    return np.asarray(values).view(Array)


class Pointer:
    """Places in a tensor's memory. ``early`` ones may be read before the kernels ahead have ended."""

    def __init__(self, memory: np.ndarray, early: bool, at: Any = 0) -> None:
        self.memory, self.early, self.at = memory, early, at
        self.dtype = types.SimpleNamespace(element_ty=None)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.early, self.at + offset)


class Shared:
    """Shared memory."""

    def __init__(self, memory: np.ndarray) -> None:
        self.memory = memory

    def index(self, place: Any) -> Shared:
        """Return one entry of the first dimension."""
        return Shared(self.memory[int(place)])

    def load(self, layout: Any) -> Array:
        """Read all of it."""
        del layout
        return array(self.memory.copy())

    def permute(self, order: list[int]) -> Array:
        """Read all of it, transposed."""
        return array(self.memory.transpose(order).copy())


class Machine:
    """A GPU that runs one program after the other.

    Args:
        functions: replacements of functions, by name.
    """

    def __init__(self, functions: dict[str, Callable[..., Any]]) -> None:
        self.functions = functions
        self.waited = False
        self.program = (0, 0, 0)
        self.groups: list[list[tuple[np.ndarray, np.ndarray]]] = []
        self.open: list[tuple[np.ndarray, np.ndarray]] = []

    def launch(
        self, kernel: KernelInterface[Any], grid: tuple[int, ...], late: frozenset[str], **arguments: Any
    ) -> None:
        """Run ``kernel`` for every program of ``grid``; tensors named in ``late`` must not be touched before the wait."""
        bound = {
            name: Pointer(value.view(-1).numpy(), name not in late) if isinstance(value, torch.Tensor) else value
            for name, value in arguments.items()
        }
        run = self._translated(kernel)
        for z in range(grid[2]):
            for y in range(grid[1]):
                for x in range(grid[0]):
                    self.program, self.waited, self.groups, self.open = (x, y, z), False, [], []
                    run(**bound)

    def _translated(self, function: Any) -> Callable[..., Any]:
        """Return a jitted function with this machine's names in place of the language's."""
        text = function.fn
        names = dict(text.__globals__)
        for name, value in names.items():
            if isinstance(value, KernelInterface):
                names[name] = _Later(self, value)
        names |= {"gl": self, "tl": self, "async_copy": self, "range": lambda *ends: range(*(int(end) for end in ends))}
        names |= self.functions | {"after_previous": self._wait, "fence_async_shared": lambda: None}
        return types.FunctionType(text.__code__, names, closure=text.__closure__)

    def _wait(self, pdl: bool) -> None:
        del pdl
        self.waited = True

    def _at(self, pointer: Pointer) -> Any:
        assert self.waited or pointer.early, "touched before the kernels ahead have ended"
        return pointer.at

    def load(self, pointer: Pointer, mask: Any = True, other: Any = 0, cache_modifier: str = "") -> Array:
        """Read where ``mask`` says."""
        del cache_modifier
        at, inside = np.broadcast_arrays(self._at(pointer), mask)
        return array(np.where(inside, pointer.memory[np.where(inside, at, 0)], other))

    def store(self, pointer: Pointer, value: Any, mask: Any = True) -> None:
        """Write where ``mask`` says."""
        at, inside, values = np.broadcast_arrays(self._at(pointer), mask, value)
        pointer.memory[at[inside]] = values[inside]

    def atomic_add(self, pointer: Pointer, value: int, sem: str) -> int:
        """Add to one place, and return what was there."""
        del sem
        before = int(pointer.memory[self._at(pointer)])
        pointer.memory[pointer.at] += value
        return before

    def async_copy_global_to_shared(self, target: Shared, pointer: Pointer, mask: Any = True) -> None:
        """Issue a copy: what it brings is there once its group was waited for."""
        value = np.asarray(self.load(pointer, mask))
        target.memory[...] = GARBAGE[target.memory.dtype.kind]
        self.open.append((target.memory, value))

    def commit_group(self) -> None:
        """Close a group of copies."""
        self.groups.append(self.open)
        self.open = []

    def wait_group(self, left: int) -> None:
        """Let all but the newest groups arrive."""
        while len(self.groups) > left:
            for target, value in self.groups.pop(0):
                target[...] = value

    def allocate_shared_memory(self, dtype: Any, shape: list[int], layout: Any) -> Shared:
        """Return memory full of garbage."""
        del layout
        kind = np.dtype(np.uint8 if "int8" in str(dtype) else np.float64)
        return Shared(np.full(shape, GARBAGE[kind.kind], kind))

    def program_id(self, axis: int) -> Array:
        """Return the program's place on an axis of the grid."""
        return array(self.program[axis])

    def arange(self, first: int, end: int, layout: Any = None) -> Array:
        """Count."""
        del layout
        return array(np.arange(first, end))

    def zeros(self, shape: tuple[int, ...], dtype: Any, layout: Any) -> Array:
        """Return zeros."""
        del dtype, layout
        return array(np.zeros(shape))

    def cast(self, value: Any, dtype: Any) -> Any:
        """Keep the value."""
        del dtype
        return value

    def num_warps(self) -> int:
        """Return four, a warpgroup."""
        return 4

    def static_range(self, *ends: int) -> range:
        """Count."""
        return range(*ends)

    def static_assert(self, holds: bool) -> None:
        """Check."""
        assert holds

    def barrier(self) -> None:
        """Do nothing: one program is one thread."""

    debug_barrier = barrier
    minimum = staticmethod(lambda a, b: array(np.minimum(a, b)))
    maximum = staticmethod(lambda a, b: array(np.maximum(a, b)))
    where = staticmethod(lambda condition, a, b: array(np.where(condition, a, b)))
    cdiv = staticmethod(lambda a, b: -(-a // b))
    expand_dims = staticmethod(lambda values, axis: array(np.expand_dims(values, axis)))

    def __getattr__(self, name: str) -> Any:
        """Return something for names of types and layouts, which mean nothing here."""
        if name.startswith("_"):
            raise AttributeError(name)
        return _Word(name)


class _Word:
    """A name of the language without a meaning here: a type or a layout."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *arguments: Any) -> _Word:
        return self

    def __str__(self) -> str:
        return self.name


class _Later:
    """A jitted function that another one calls: translated when it is called."""

    def __init__(self, machine: Machine, function: KernelInterface[Any]) -> None:
        self.machine, self.function = machine, function

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self.machine._translated(self.function)(*arguments, **named)
