"""Measured times as a cost: the products of each group on the target, and their times from a tuning file.

The file is read, and completed where the target is this machine's GPU; elsewhere a layer without a time is an error that
says where times are made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from sglang_modelopt_ext.backends.product import Product, Times
from sglang_modelopt_ext.backends.timings import TuningFile, gpu_of, merged, objection, read, write
from sglang_modelopt_ext.checkpoint.names import FUSED_SHARDS
from sglang_modelopt_ext.checkpoint.quant_config import CONFIG_NAME, text_config
from sglang_modelopt_ext.device import Device
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.schemes.base import LayerScheme
from sglang_modelopt_ext.workflow.autoquant.state import UNQUANTIZED, Group, Latency, Layer

Measure = Callable[[Sequence[Product], torch.dtype, Sequence[int]], TuningFile]
"""The function that times products on this machine's GPU, in a model of a type, for numbers of tokens."""

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
"""The numbers of tokens that a new file measures."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """The file of times of a search.

    Attributes:
        file: its path; it is made where it does not exist.
        tokens: the number of tokens at a time that the search counts.
        measure: times the products that the file lacks; None where nothing can be measured.
    """

    file: Path
    tokens: int
    measure: Measure | None = None


def products(layers: Sequence[Layer], scheme: LayerScheme | None, top_k: int) -> list[Product]:
    """Return the products that a server computes for the layers of one group in one format, fused ones as one.

    Args:
        layers: the layers.
        scheme: the format; None for unquantized.
        top_k: the experts that a token goes to, in a mixture.
    """
    experts = min((layer.count for layer in layers if layer.experts), default=0)
    found = []
    for layer in (layer for layer in layers if layer.experts):
        shards = layer.count // experts  # gates and ups are counted together
        found.append(Product(layer.name, scheme, layer.n * shards, layer.k, shards, experts, top_k))
    fused: dict[str, list[Layer]] = {}
    for layer in (layer for layer in layers if not layer.experts):
        parent, _, leaf = layer.name.rpartition(".")
        name = next((f"{parent}.{one}" for one, shards in FUSED_SHARDS.items() if leaf in shards), layer.name)
        fused.setdefault(name, []).append(layer)
    for name, parts in fused.items():
        found.append(Product(name, scheme, sum(part.n for part in parts), parts[0].k, len(parts)))
    return found


def timed(
    folder: Path,
    groups: Sequence[Group],
    schemes: Mapping[str, LayerScheme],
    device: Device,
    dtype: torch.dtype,
    table: Table,
) -> tuple[tuple[Group, ...], Latency]:
    """Return the groups with the time of every candidate, and what was measured.

    Unquantized experts are SGLang's own and are not measured: they have no time.

    Args:
        folder: the model.
        groups: the plan.
        schemes: by the name of each format.
        device: the target.
        dtype: the model's.
        table: where the times are.

    Raises:
        ModelOptExtError: a time is missing and cannot be measured here, or the file is of another target.
    """
    top_k = _top_k(folder, groups)
    wanted: dict[tuple[str, str], list[Product]] = {}
    for group in groups:
        for name in group.candidates:
            scheme = None if name == UNQUANTIZED else schemes[name]
            if scheme is not None or not group.layers[0].experts:
                wanted[group.name, name] = products(group.layers, scheme, top_k)
    content = _complete([one for every in wanted.values() for one in every], device, dtype, table)
    times = Times(content, table.tokens)
    found = []
    for group in groups:
        candidates = {}
        for name, candidate in group.candidates.items():
            us = [times.of(one.key(device, dtype)) for one in wanted.get((group.name, name), ())]
            total = sum(each for each in us if each is not None) if us and None not in us else None
            candidates[name] = msgspec.structs.replace(candidate, us=total)
        if all(candidate.us is None for candidate in candidates.values()):
            raise ModelOptExtError.at(table.file, group.name, "a time of some candidate", "no kernel that is right")
        found.append(msgspec.structs.replace(group, candidates=candidates))
    return tuple(found), Latency(gpu=content.gpu, tokens=table.tokens, versions=content.versions)


def _top_k(folder: Path, groups: Iterable[Group]) -> int:
    if not any(layer.experts for group in groups for layer in group.layers):
        return 0
    fields = text_config(folder)
    top_k = fields.get("num_experts_per_tok") or fields.get("moe_topk")
    if not isinstance(top_k, int):
        raise ModelOptExtError.at(folder / CONFIG_NAME, "num_experts_per_tok", "a number of experts", top_k)
    return top_k


def _complete(wanted: Sequence[Product], device: Device, dtype: torch.dtype, table: Table) -> TuningFile:
    """Return the times of the file, with those that it lacks measured and written to it.

    Raises:
        ModelOptExtError: the file is of another GPU or lacks the number of tokens, or a time is missing and this machine has no
            such GPU.
    """
    content = read(table.file) if table.file.exists() else None
    if content is not None and content.device != device.flag:
        got = content.device or f"{content.gpu}, made without the name of its architecture"
        raise ModelOptExtError.at(table.file, "device", f"times of {device.flag}, as --gpu says", got)
    if content is not None and table.tokens not in content.tokens:
        expected = f"one of {', '.join(map(str, content.tokens))}, which {table.file} has"
        raise ModelOptExtError.at("--latency-tokens", str(table.tokens), expected, table.tokens)
    known = set() if content is None else {result.layer for result in content.results}
    missing = {key: one for one in wanted if (key := one.key(device, dtype)) not in known}
    if content is not None and not missing:
        return content
    here = Device.here()
    can_measure = table.measure is not None and here == device
    other = objection(content, _gpu_here()) if content is not None and can_measure else None
    if table.measure is None or here != device or other is not None:
        got = "a file without them" if content is not None else f"no such file, and {here.name} at hand"
        first = next(iter(missing.values()))
        format_name = "unquantized" if first.scheme is None else first.scheme.describe()
        raise ModelOptExtError.at(
            table.file,
            f"{first.name}, {format_name}, {first.n} x {first.k}, and {len(missing) - 1} more",
            f"their times, which are measured on a GPU: run the command with --measure-only on a machine with {device.flag}"
            " and copy the file here",
            got if other is None else f"one that cannot be added to: it {other}",
        )
    tokens = TOKENS if content is None else content.tokens
    if table.tokens not in tokens:
        tokens = sorted({*tokens, table.tokens})
    added = table.measure(list(missing.values()), dtype, tokens)
    complete = added if content is None else merged(content, added)
    write(table.file, complete)
    return complete


def _gpu_here() -> str:
    return gpu_of(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
