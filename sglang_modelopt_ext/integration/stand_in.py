"""The ``weight`` of a prepared layer: SGLang's classes may ask for its shape and device, and for no value of it.

Classes look at a layer's ``weight`` to choose between kernels that read it themselves and the layer's own product. The stored codes
of a layer are deleted when it is prepared, and a kernel of SGLang's would read the prepared ones wrongly. A stand-in answers such
questions so that the layer's own product is chosen, and raises an error that names the layer wherever a value would be read.

It is neither a tensor nor a parameter: loaders, updates and what counts a model's memory do not see it.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch.utils._pytree import tree_leaves

from sglang_modelopt_ext.errors import ModelOptExtError


class UnreadableWeightError(ModelOptExtError, AttributeError):
    """A value of a prepared weight was asked for; an AttributeError, so that ``hasattr`` answers False."""


class _Unreadable:
    """An object that torch's functions, and unknown attributes, raise an error for.

    Args:
        layer: the layer's name, for errors.
    """

    def __init__(self, layer: str) -> None:
        self.layer = layer

    def __repr__(self) -> str:
        return f"<the stored codes of {self.__dict__.get('layer')}>"

    def __getattr__(self, name: str) -> NoReturn:
        _raise(self, name)

    def __getitem__(self, key: object) -> NoReturn:
        _raise(self, "values")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> NoReturn:
        """Raise UnreadableWeightError, for any function of torch's."""
        given = (leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, _Unreadable))
        _raise(next(given), getattr(func, "__name__", repr(func)))


def _raise(one: _Unreadable, what: str) -> NoReturn:
    expected = "no use of a prepared weight but in the layer's own product"
    # An object that is being copied has no attributes yet.
    raise UnreadableWeightError.at(one.__dict__.get("layer"), "weight", expected, what)


class CodesType(_Unreadable):
    """The type of a stand-in: equal to none of torch's, so that no kernel takes it, and no tensor can be converted to it.

    With the type of the stored bytes SGLang's classes would take them for those of its own formats, or make activations integers.
    """


class StandIn(_Unreadable):
    """The ``weight`` of a prepared layer.

    Attributes:
        shape: that of the stored codes on this rank.
        device: where the prepared weight is.
        dtype: a :class:`CodesType`.

    Args:
        layer: the layer's name, for errors.
        codes: the stored codes, of which shape and device are kept.
    """

    def __init__(self, layer: str, codes: torch.Tensor) -> None:
        super().__init__(layer)
        self.shape = codes.shape
        self.device = codes.device
        self.dtype = CodesType(layer)

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return len(self.shape)

    @property
    def is_cuda(self) -> bool:
        """Whether the prepared weight is on a GPU."""
        return self.device.type == "cuda"

    def dim(self) -> int:
        """Return the number of dimensions."""
        return self.ndim

    def size(self, dim: int | None = None) -> torch.Size | int:
        """Return the shape, or one entry of it."""
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        """Return the number of entries."""
        return self.shape.numel()

    def is_contiguous(self) -> bool:
        """Return False: no memory holds entries of that shape in a row."""
        return False
