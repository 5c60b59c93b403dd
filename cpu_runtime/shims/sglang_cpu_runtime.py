"""Lets SGLang 0.5.23 import and serve on a CPU without its CUDA packages.

A ``.pth`` file calls :func:`activate` when an interpreter starts. It has to be that early, and in every process: SGLang
spawns its scheduler, which imports all of SGLang before any plugin loads.

Nothing is replaced. Three imports get help, each only where the real thing is missing:

- ``sglang``: ``SGLANG_USE_CPU_ENGINE`` defaults to 1, without which SGLang looks for a GPU.
- ``torchvision``: the wheel on PyPI is a CUDA build. Its operators do not load under a CPU build of torch, yet it
  registers fake kernels for two of them while it is imported. Declaring those two lets the import finish.
- ``sgl_kernel``: SGLang's CUDA kernels. SGLang imports some names from it that it never calls on a plain CPU path; a
  stand-in hands out functions that raise when called.

This module runs at the start of every process, ``pip`` included, so it imports next to nothing.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType

TYPE_CHECKING = False
if TYPE_CHECKING:  # importing typing would triple the cost of this module
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from typing import Any

KERNELS = "sgl_kernel"


def activate() -> None:
    """Add the two finders to ``sys.meta_path``, once."""
    if any(isinstance(finder, BeforeImport) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, BeforeImport())
    sys.meta_path.append(KernelStandIn())


class BeforeImport:
    """Finds nothing, but acts just before certain modules are imported."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> None:
        """Called by the import system for every module that is not loaded yet."""
        action = _ACTIONS.get(name)
        if action is not None:
            action()


class KernelStandIn:
    """Finds ``sgl_kernel`` where nothing else does. Its submodules stay missing, so SGLang's own fallbacks apply."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Called by the import system when the finders before this one found nothing."""
        if name != KERNELS or find_real_kernels() is not None:
            return None
        from importlib.machinery import ModuleSpec

        return ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]  # a loader without the base class

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Make the module. Part of the loader protocol."""
        return StandInModule(spec.name, "Import-only stand-in for SGLang's CUDA kernels.")

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing. Part of the loader protocol."""


class StandInModule(ModuleType):
    """A module in which every public name is a function that raises."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):  # what the import system and inspect probe for
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        qualified = f"{self.__name__}.{name}"

        def missing(*args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError(
                f"{qualified} needs the real {KERNELS} package; this is the CPU runtime's import-only stand-in"
            )

        missing.__name__ = missing.__qualname__ = name
        missing.__module__ = self.__name__
        setattr(self, name, missing)  # so that the same name is the same object
        return missing


def find_real_kernels() -> ModuleSpec | None:
    """Return the spec of an installed ``sgl_kernel``, wherever its finder stands in ``sys.meta_path``, or None."""
    for finder in sys.meta_path:
        if not isinstance(finder, (BeforeImport, KernelStandIn)):
            spec = finder.find_spec(KERNELS, None)
            # A spec without a loader is a namespace package: any folder of that name on sys.path.
            if spec is not None and spec.loader is not None:
                return spec
    return None


def _use_cpu_engine() -> None:
    if find_real_kernels() is None:
        os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")


_library: Any = None  # torch drops the declarations with the object that made them


def _declare_torchvision_ops() -> None:
    """Declare torchvision's operators, after it has tried to load them and before it registers fake kernels for them."""
    global _library
    extension = sys.modules.get("torchvision.extension")
    if _library is not None or extension is None or extension._has_ops():
        return
    import torch

    _library = torch.library.Library("torchvision", "DEF")
    for op in ("nms", "qnms"):
        _library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


_ACTIONS: dict[str, Callable[[], None]] = {
    "sglang": _use_cpu_engine,
    "torchvision._meta_registrations": _declare_torchvision_ops,
}
