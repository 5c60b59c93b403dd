"""The rows of a linear layer: which stored layers they come from, and which of them this rank holds.

SGLang builds a linear layer from partitions (q, k and v; gate and up), a checkpoint stores it as linear layers of its own. One
stored layer may cover several partitions (Phi-3's ``qkv_proj``), be one of them (Llama's ``q_proj``), or be a part of one (the two
projections behind latent attention's ``fused_qkv_a_proj_with_mqa``). A rank holds a slice of every partition.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

_QKV = {"q": 0, "k": 1, "v": 2}


@dataclass(frozen=True)
class Partition:
    """A part of a layer's rows that is split over the ranks by itself.

    Attributes:
        rows: its rows over all ranks.
        start: the first of this rank's rows.
        count: this rank's rows.
        held: rows that this rank has room for; more than ``count`` where SGLang pads a vocabulary.
    """

    rows: int
    start: int
    count: int
    held: int

    @property
    def is_whole(self) -> bool:
        """Whether this rank holds exactly the stored rows."""
        return self.rows == self.count == self.held


@dataclass(frozen=True)
class Shard:
    """One stored linear layer of a layer of SGLang's.

    Attributes:
        start: its first row among the layer's rows over all ranks.
        parts: the partitions that it covers, or the part of one.
    """

    start: int
    parts: tuple[Partition, ...]

    @property
    def rows(self) -> int:
        """Its rows in the checkpoint."""
        return sum(part.rows for part in self.parts)

    @property
    def held(self) -> int:
        """The rows that this rank has room for."""
        return sum(part.held for part in self.parts)

    @property
    def is_whole(self) -> bool:
        """Whether this rank holds exactly the stored rows."""
        return all(part.is_whole for part in self.parts)


@dataclass(frozen=True)
class Layout:
    """The rows and columns of a linear layer on this rank.

    Attributes:
        partitions: SGLang's, in order.
        shards: the stored layers, in order.
        k: input features over all ranks.
        k_start: the first of this rank's.
        k_rank: this rank's input features.
    """

    partitions: tuple[Partition, ...]
    shards: tuple[Shard, ...]
    k: int
    k_start: int
    k_rank: int

    def rows_of(self, shard_id: Any) -> tuple[int, int]:
        """Return the first row, and the row behind the last, of SGLang's ``shard_id``.

        Args:
            shard_id: ``"q"``, ``"k"`` or ``"v"``, the number of a partition, several numbers, or None for the whole layer.

        Raises:
            ValueError: there is no such partition, or the partitions are not adjacent.
        """
        numbers = partition_numbers(shard_id, len(self.partitions))
        if list(numbers) != list(range(numbers[0], numbers[0] + len(numbers))) or numbers[-1] >= len(self.partitions):
            raise ValueError(f"adjacent shards of {len(self.partitions)} expected, {shard_id!r} given")
        start = sum(partition.rows for partition in self.partitions[: numbers[0]])
        return start, start + sum(self.partitions[number].rows for number in numbers)


def partition_numbers(shard_id: Any, count: int) -> tuple[int, ...]:
    """Return the numbers of the partitions, of ``count``, that SGLang's ``shard_id`` names; all for None."""
    if shard_id is None:
        return tuple(range(count))
    if isinstance(shard_id, (tuple, list)):
        return tuple(number for one in shard_id for number in partition_numbers(one, count))
    return (int(_QKV.get(shard_id, shard_id)),)


def full_sizes(layer: Any, partition_sizes: Sequence[int]) -> list[int] | None:
    """Return N of each partition of a linear layer over all ranks, by the model's configuration; None for an unknown kind."""
    if hasattr(layer, "total_num_kv_heads"):  # QKVParallelLinear; its output_sizes count replicated KV heads
        head, v_head = layer.head_size, layer.v_head_size
        return [layer.total_num_heads * head, layer.total_num_kv_heads * head, layer.total_num_kv_heads * v_head]
    if hasattr(layer, "org_vocab_size"):  # embeddings and lm_head, padded by SGLang
        return [layer.org_vocab_size]
    if hasattr(layer, "output_sizes"):
        return list(layer.output_sizes)
    return [layer.output_size] if len(partition_sizes) == 1 and hasattr(layer, "output_size") else None


def read_layout(
    layer: Any, partition_sizes: Sequence[int], k: int, k_rank: int, stored: Sequence[int] | None = None
) -> Layout:
    """Return the layout of a layer of SGLang's.

    Args:
        layer: the layer, with its sizes and its group of ranks.
        partition_sizes: rows of each partition on this rank.
        k: input features over all ranks.
        k_rank: input features on this rank.
        stored: N of each stored layer in the order of the layer's rows, None for one for each partition.

    Raises:
        ValueError: the stored layers are not the partitions, several of them, or parts of one that every rank holds whole.
    """
    from sglang.srt.distributed.utils import get_group_rank_size

    rank, _ = get_group_rank_size(getattr(layer, "tp_group", None))
    presharded = bool(getattr(layer, "use_presharded_weights", False))
    full = full_sizes(layer, partition_sizes)
    sizes = list(partition_sizes) if full is None or presharded else full
    partitions = []
    for number, (rows, held) in enumerate(zip(sizes, partition_sizes, strict=True)):
        if hasattr(layer, "org_vocab_size"):
            indices = layer.shard_indices
            start, stop = (0, held) if presharded else (indices.org_vocab_start_index, indices.org_vocab_end_index)
            partitions.append(Partition(rows, start, min(stop - start, rows), held))
            continue
        own = rank
        if number and hasattr(layer, "total_num_kv_heads"):
            own = get_group_rank_size(layer.kv_tp_group)[0] // layer.num_kv_head_replicas
        partitions.append(Partition(rows, own * held if held < rows else 0, held, held))
    shards = tuple(_cut(partitions, [partition.rows for partition in partitions] if stored is None else stored))
    k_all = k_rank if presharded else k
    return Layout(tuple(partitions), shards, k_all, rank * k_rank if k_rank < k_all else 0, k_rank)


def _cut(partitions: Sequence[Partition], stored: Sequence[int]) -> Iterator[Shard]:
    """Yield the stored layers with their partitions. Raises ValueError where they do not fit."""
    if sum(stored) != sum(partition.rows for partition in partitions):
        raise ValueError("other rows in all")
    rest, start, inside = list(partitions), 0, False
    for rows in stored:
        first = start
        parts: list[Partition] = []
        while rows:
            part = rest.pop(0)
            if part.rows > rows or inside:
                if parts or part.rows < rows or not part.is_whole:
                    raise ValueError("a stored layer ends inside a partition")
                inside = part.rows > rows
                if inside:
                    left = part.rows - rows
                    rest.insert(0, Partition(left, 0, left, left))
                part = Partition(rows, 0, rows, rows)
            parts.append(part)
            start += part.rows
            rows -= part.rows
        yield Shard(first, tuple(parts))
