"""SGLang parameters for stored tensors: from a :class:`TensorSpec` to the parameter class that slices and loads it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from sglang.srt.layers.parameter import BasevLLMParameter

from sglang_modelopt_ext.integration.layout import Layout, Partition
from sglang_modelopt_kernels.formats.base import TensorSpec


class StoredParameter(BasevLLMParameter):
    """One tensor of every stored layer of a linear layer, those of this rank's rows and columns, concatenated along dimension 0.

    It is loaded by the ids of SGLang's partitions, whatever stored tensors the model's class offers: one for several partitions,
    several that the class concatenated, or a part of one.
    """

    def __new__(cls, spec: TensorSpec, layout: Layout) -> StoredParameter:
        """Return an unset parameter.

        Floating-point parameters start as NaN, so that an entry that is never loaded cannot pass for a scale.

        Raises:
            ValueError: a block does not fit the layer's sizes on this rank.
        """
        shapes = [spec.shape(shard.held, layout.k_rank) or (1,) for shard in layout.shards]
        data = torch.cat([_unset(shape, spec.dtypes[0]) for shape in shapes])
        parameter: StoredParameter = super().__new__(cls, data=data)
        return parameter

    def __init__(self, spec: TensorSpec, layout: Layout) -> None:
        super().__init__(data=self.data, weight_loader=load_stored)
        self.spec = spec
        self.layer_layout = layout

    @property
    def output_dim(self) -> int | None:
        """The dimension with one entry per output feature, None without one; read by loaders of SGLang's model classes."""
        first = self.spec.dims[0] if self.spec.dims else None
        return 0 if first is not None and first.axis == "N" and first.per == 1 else None

    def shard(self, index: int) -> torch.Tensor:
        """Return this rank's part of the tensor of stored layer ``index``, a view; ``[]`` for a scalar."""
        if self.spec.is_scalar:
            return self.data[index]
        lengths = [self.spec.shape(shard.held, self.layer_layout.k_rank)[0] for shard in self.layer_layout.shards]
        part: torch.Tensor = self.data.narrow(0, sum(lengths[:index]), lengths[index])
        return part

    def load(self, loaded: torch.Tensor, shard_id: Any = None) -> None:
        """Copy this rank's part of ``loaded``, the stored rows of the partitions ``shard_id`` (:meth:`Layout.rows_of`).

        Raises:
            ValueError: the tensor has another shape, or this rank's part cuts through a block.
        """
        first, last = self.layer_layout.rows_of(shard_id)
        found = [
            index
            for index, shard in enumerate(self.layer_layout.shards)
            if shard.start < last and shard.start + shard.rows > first
        ]
        if self.spec.is_scalar:
            if loaded.numel() != len(found):
                raise ValueError(f"one value for each of {len(found)} stored layers expected, {loaded.numel()} stored")
            for index, value in zip(found, loaded.reshape(-1), strict=True):
                self.data[index].copy_(value)
        elif self.spec.dim_of("N") is None:
            self._load_columns(loaded, found)
        else:
            self._load_rows(loaded, found, first, last)

    def _load_columns(self, loaded: torch.Tensor, found: Sequence[int]) -> None:
        """Load a tensor without rows of the weight: one for each stored layer in ``found``, concatenated."""
        shape = self.spec.shape(0, self.layer_layout.k)
        _check_shape(loaded, (len(found) * shape[0], *shape[1:]))
        for index, part in zip(found, loaded.split(shape[0]), strict=True):
            self.shard(index).copy_(self._columns(part))

    def _load_rows(self, loaded: torch.Tensor, found: Sequence[int], first: int, last: int) -> None:
        """Load rows ``first`` to ``last`` of the layer."""
        shards = [self.layer_layout.shards[index] for index in found]
        if all(shard.is_whole and first <= shard.start and shard.start + shard.rows <= last for shard in shards):
            # Whole tensors need no cut, and may end in a short block.
            shapes = [self.spec.shape(shard.rows, self.layer_layout.k) for shard in shards]
            _check_shape(loaded, (sum(shape[0] for shape in shapes), *shapes[0][1:]))
            parts = loaded.split([shape[0] for shape in shapes])
            for index, part in zip(found, parts, strict=True):
                self.shard(index).copy_(self._columns(part))
            return
        _check_shape(loaded, self.spec.shape(last - first, self.layer_layout.k))
        for index in found:
            shard, row, own = self.layer_layout.shards[index], self.layer_layout.shards[index].start, 0
            for part in shard.parts:
                if first <= row and row + part.rows <= last:
                    self._load_part(loaded, self.shard(index), row - first, own, part)
                row, own = row + part.rows, own + part.held

    def _load_part(self, loaded: torch.Tensor, target: torch.Tensor, row: int, own: int, part: Partition) -> None:
        """Copy this rank's rows of a partition that starts at ``row`` of ``loaded``, to row ``own`` of ``target``."""
        start, count = self._blocks(row + part.start, part.count)
        dim = self.spec.dims[0]
        if own % dim.per:
            raise ValueError(f"N = {own} cuts through blocks of {dim.per}")
        held = dim.size(part.held, 0)
        place = target.narrow(0, own // dim.per, held)
        place[:count].copy_(self._columns(loaded.narrow(0, start, count)))
        if held > count:
            place[count:].zero_()

    def _blocks(self, start: int, rows: int) -> tuple[int, int]:
        """Return the first entry, and the number of entries, of rows ``start`` to ``start + rows`` along dimension 0.

        Raises:
            ValueError: the rows are neither whole blocks nor inside one block that may be short.
        """
        dim = self.spec.dims[0]
        if dim.partial and start // dim.per == (start + rows - 1) // dim.per:
            return start // dim.per, 1
        for extent in (start, rows):
            if extent % dim.per:
                raise ValueError(f"N = {extent} cuts through blocks of {dim.per}")
        return start // dim.per, rows // dim.per

    def _columns(self, loaded: torch.Tensor) -> torch.Tensor:
        """Return this rank's columns of a stored tensor."""
        layout, position = self.layer_layout, self.spec.dim_of("K")
        if position is None or layout.k_rank == layout.k:
            return loaded
        dim = self.spec.dims[position]
        if layout.k_rank % dim.per:
            raise ValueError(f"a rank's K = {layout.k_rank} cuts through blocks of {dim.per}")
        return loaded.narrow(position, layout.k_start // dim.per, layout.k_rank // dim.per)


def load_stored(parameter: StoredParameter, loaded_weight: torch.Tensor, loaded_shard_id: Any = None) -> None:
    """Load ``parameter``: the weight loader that SGLang's model classes call."""
    parameter.load(loaded_weight, loaded_shard_id)


def check_order(parameter: StoredParameter, specs: Iterable[TensorSpec]) -> None:
    """Raise ValueError for a weight whose rows a model's class reorders, unless it alone of the layer's ``specs`` has rows."""
    others = [spec.name for spec in specs if spec.name != parameter.spec.name and spec.dim_of("N") is not None]
    if others:
        raise ValueError(f"rows in the stored order expected, as those of {others[0]} are, others stored by its class")


def _check_shape(loaded: torch.Tensor, expected: tuple[int, ...]) -> None:
    if tuple(loaded.shape) != expected:
        raise ValueError(f"shape {list(expected)} expected, {list(loaded.shape)} stored")


def copy_slice(
    spec: TensorSpec, loaded: torch.Tensor, target: torch.Tensor, n: int, k: int, n_rank: int, k_rank: int
) -> None:
    """Copy this rank's slice of a stored tensor.

    Args:
        spec: the tensor's spec.
        loaded: the stored tensor, of the whole layer.
        target: this rank's tensor, which is written.
        n, k: output and input features of this rank.
        n_rank, k_rank: the index of this rank's slice along N and along K.

    Raises:
        ValueError: the slice cuts through a block, or does not fit.
    """
    for position, dim in enumerate(spec.dims):
        if dim.axis is None or loaded.shape[position] == target.shape[position]:
            continue
        extent = n if dim.axis == "N" else k
        if extent % dim.per:
            raise ValueError(f"a rank's {dim.axis} = {extent} cuts through blocks of {dim.per}")
        rank = n_rank if dim.axis == "N" else k_rank
        loaded = loaded.narrow(position, rank * target.shape[position], target.shape[position])
    if loaded.shape != target.shape:
        raise ValueError(f"shape {tuple(loaded.shape)} does not fit {tuple(target.shape)}")
    target.copy_(loaded)


class ExpertParameter(torch.nn.Parameter):
    """A parameter with one tensor of all experts of this rank: ``[experts, shards, *shape]``."""

    def __new__(cls, spec: TensorSpec, experts: int, shards: int, n: int, k: int) -> ExpertParameter:
        """Return an unset parameter.

        Args:
            spec: the tensor's spec.
            experts: the number of experts on this rank.
            shards: 2 for gate and up, 1 for down.
            n, k: output and input features of one shard on this rank.

        Raises:
            ValueError: a block does not fit ``n`` or ``k``.
        """
        # Of several types, the widest holds the values of all.
        dtype = max(spec.dtypes, key=lambda dtype: dtype.itemsize)
        data = _unset((experts, shards, *spec.shape(n, k)), dtype)
        parameter: ExpertParameter = torch.nn.Parameter._make_subclass(cls, data, False)
        return parameter

    def __init__(self, spec: TensorSpec, experts: int, shards: int, n: int, k: int) -> None:
        self.spec = spec
        self.n = n
        self.k = k

    def of(self, expert: int, shard: int) -> torch.Tensor:
        """Return the tensor of one expert and shard, a view."""
        return self.data[expert, shard]

    def load(self, loaded: torch.Tensor, expert: int, shard: int, n_rank: int, k_rank: int) -> None:
        """Copy one expert's stored tensor, sliced for this rank; a scalar may have the shape ``[1]``."""
        target = self.of(expert, shard)
        if self.spec.is_scalar:
            loaded = loaded.reshape(())
        copy_slice(self.spec, loaded, target, self.n, self.k, n_rank, k_rank)


class MixedExpertParameter(ExpertParameter):
    """A parameter of a layer whose experts have several schemes: one :class:`ExpertParameter` for those of each.

    It has no values of its own. SGLang finds it by the name that all of them share.
    """

    def __new__(cls, parts: Sequence[tuple[ExpertParameter, Sequence[int]]]) -> MixedExpertParameter:
        """Return a parameter of some experts.

        Args:
            parts: parameters, each with the numbers of its experts on this rank in order.
        """
        del parts
        parameter: MixedExpertParameter = torch.nn.Parameter._make_subclass(cls, torch.empty(0), False)
        return parameter

    def __init__(self, parts: Sequence[tuple[ExpertParameter, Sequence[int]]]) -> None:
        self._places = {
            member: (parameter, place) for parameter, members in parts for place, member in enumerate(members)
        }

    @property
    def is_needed(self) -> bool:
        """Whether some expert of this rank stores such a tensor: its experts may all be of the other schemes."""
        return bool(self._places)

    def of(self, expert: int, shard: int) -> torch.Tensor:
        """Return the tensor of one expert and shard, a view."""
        parameter, place = self._places[expert]
        return parameter.of(place, shard)

    def load(self, loaded: torch.Tensor, expert: int, shard: int, n_rank: int, k_rank: int) -> None:
        """Copy one expert's stored tensor. Raises ValueError for an expert that stores no such tensor."""
        if expert not in self._places:
            raise ValueError(f"no such tensor of expert {expert} on this rank expected, one stored")
        parameter, place = self._places[expert]
        parameter.load(loaded, place, shard, n_rank, k_rank)


def _unset(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    if dtype.is_floating_point:
        return torch.full(shape, float("nan"), dtype=torch.float32).to(dtype)
    return torch.empty(shape, dtype=dtype)
