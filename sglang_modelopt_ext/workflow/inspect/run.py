"""Inspection of a checkpoint from its headers: its contents, the kernels that serve it, and its problems."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from sglang_modelopt_ext.backends.base import LinearRequest
from sglang_modelopt_ext.backends.select import objections, rounds_fp4, served_scheme
from sglang_modelopt_ext.checkpoint.kv_cache import read_plan
from sglang_modelopt_ext.checkpoint.leftovers import ServedLayers
from sglang_modelopt_ext.checkpoint.linears import QuantizedLinear
from sglang_modelopt_ext.checkpoint.names import EXPERT
from sglang_modelopt_ext.checkpoint.ownership import decide
from sglang_modelopt_ext.checkpoint.quant_config import (
    CONFIG_NAME,
    OWN_KEY,
    QUANT_CONFIG_NAME,
    QuantConfig,
    canonical_name,
    read_quant_config,
    text_config,
)
from sglang_modelopt_ext.checkpoint.reader import (
    Checkpoint,
    assumption,
    bits_per_weight,
    check_stored_values,
    is_kv_cache_tensor,
)
from sglang_modelopt_ext.checkpoint.tensors import StoredTensor, read_headers, read_json_object
from sglang_modelopt_ext.checkpoint.unserved import read_for_serving
from sglang_modelopt_ext.device import Device
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.schemes.stock import STOCK_BEHAVIOUR
from sglang_modelopt_ext.schemes.table import UMBRELLA, math_of
from sglang_modelopt_ext.workflow.common.models import served_dtype
from sglang_modelopt_ext.workflow.inspect.loading import Loading, not_checked, rehearse_loading
from sglang_modelopt_kernels.formats.base import ValueRule

OURS, STOCK = "sglang-modelopt-ext", "SGLang"
_VOCABULARY = ("lm_head", "embed_tokens")
_UE8M0_BIAS = 127


class Range(msgspec.Struct, frozen=True, kw_only=True):
    """The smallest and the largest value that a tensor, or all tensors of a group, store."""

    smallest: float
    largest: float


class LayerGroup(msgspec.Struct, frozen=True, kw_only=True):
    """Quantized layers that differ in their numbers only (one layer each with ``--layers``).

    Attributes:
        name: their shared name; ``[0-3,5]`` stands for the numbers that differ.
        count: number of layers.
        algo: ModelOpt's algorithm.
        weight, activation: the number formats; ``none`` where the input is not rounded.
        n, k: output and input features of each.
        group_size: K elements per block scale, 0 without blocks.
        smoothing: whether the layers store a ``pre_quant_scale``.
        low_rank: SVDQuant's rank, 0 for none.
        tensors: the tensors each layer stores, as ``dtype [shape]`` by name.
        bytes: size of all of them.
        kernel: the kernel that serves them on the target; None where none does or SGLang serves them itself.
        rejected: the kernels before it, or all where none serves, each with the reason.
        scales: with ``--scales``, the range of every floating-point tensor.
    """

    name: str
    count: int
    algo: str
    weight: str
    activation: str
    n: int
    k: int
    group_size: int
    smoothing: bool
    low_rank: int
    tensors: dict[str, str]
    bytes: int
    kernel: str | None
    rejected: dict[str, str]
    scales: dict[str, Range]


class PlainGroup(msgspec.Struct, frozen=True, kw_only=True):
    """Unquantized tensors that differ in their numbers only."""

    name: str
    count: int
    dtype: str
    shape: list[int]
    bytes: int


class KVCache(msgspec.Struct, frozen=True, kw_only=True):
    """The KV cache the checkpoint asks for.

    Attributes:
        recipe: as in ``--kv-cache-dtype modelopt_<recipe>``.
        source: origin of its scales.
        layers: number of attention layers that have scales of their own.
        bits: stored bits per key or value element, block scales included, at the model's head_dim; None without it.
    """

    recipe: str
    source: str
    layers: int
    bits: float | None


class Serving(msgspec.Struct, frozen=True, kw_only=True):
    """The owner of the checkpoint on the target: this package or SGLang.

    Attributes:
        target: ``cpu`` or such as ``sm90``.
        owner: this package or SGLang; None where the checkpoint is rejected.
        flags: the ``--quantization`` flags under which this package serves it.
        why: the reason, in one sentence.
        stock: the behaviour of SGLang without this package, by algorithm.
    """

    target: str
    owner: str | None
    flags: list[str]
    why: str
    stock: dict[str, str]


class Contents(msgspec.Struct, frozen=True, kw_only=True):
    """The result of :func:`inspect_checkpoint`.

    Attributes:
        folder: the checkpoint.
        architecture: of config.json, None without one.
        algo: ``quant_algo``, None for an unquantized checkpoint.
        files, bytes: of its weights.
        quantized_bytes: of the quantized layers.
        bits_per_weight: stored bits per weight of the quantized layers, scales included; None without such layers.
        exclude_modules: as declared.
        layers: the quantized layers.
        plain: the other tensors.
        kv_cache: None where the cache is not quantized.
        serving: the owner on the target.
        loading: the rehearsed load into SGLang's model class.
        record: the metadata that this package stored when it made the checkpoint.
        notes: assumptions where the checkpoint does not say.
        problems: every error that would stop a server of this package.
        remarks: objections of this package to a checkpoint that SGLang serves by itself.
    """

    folder: str
    architecture: str | None
    algo: str | None
    files: int
    bytes: int
    quantized_bytes: int
    bits_per_weight: float | None
    exclude_modules: list[str]
    layers: list[LayerGroup]
    plain: list[PlainGroup]
    kv_cache: KVCache | None
    serving: Serving
    loading: Loading
    record: dict[str, Any]
    notes: list[str]
    problems: list[str]
    remarks: list[str]


def inspect_checkpoint(
    folder: Path, target: Device, *, each_layer: bool = False, scales: bool = False, rehearse: bool = False
) -> Contents:
    """Read headers and configuration, and with ``scales`` every scale too.

    Args:
        folder: the checkpoint.
        target: the device that is to serve it.
        each_layer: list every layer and tensor separately.
        scales: read and check all scales, and return their ranges.
        rehearse: build SGLang's model without weights, in a process of its own, and load the headers into it.

    Raises:
        ModelOptExtError: the files are missing or cannot be read at all.
    """
    problems: list[ModelOptExtError] = []
    config = read_quant_config(folder)
    tensors = read_headers(folder)
    checkpoint = None
    if config is not None:
        rounded = rounds_fp4(target)
        checkpoint, found = read_for_serving(folder, config, rounds_fp4=rounded)
        problems += found or _left_unquantized(checkpoint)
    refusals: list[ModelOptExtError] = []
    serving = _serving(folder, config, target, refusals)
    problems = [*refusals, *problems]
    linears = checkpoint.layers if checkpoint else []
    ranges: dict[str, dict[str, Range]] = {}
    for linear in linears if scales else ():
        ranges[linear.name] = _scale_ranges(linear, problems)
    kv_problems: list[ModelOptExtError] = []
    kv_cache = _kv_cache(folder, config, kv_problems)
    # SGLang's own KV cache on a GPU handles a missing or wrong scale itself.
    stock_kv_cache = target.kind == "cuda" and config is not None and config.kv_cache_algo == "FP8"
    if kv_cache is not None and kv_cache.recipe != "fp8":
        stock_kv_cache = False
    layers = _layer_groups(linears, target, serving.owner, served_dtype(folder, "auto"), ranges, each_layer, problems)
    lines = list(dict.fromkeys(str(problem) for problem in problems))
    loading = _loading(folder, target, serving, stock_kv_cache, lines if rehearse else None)
    lines += [line for line in loading.problems if line not in lines]
    is_stock = serving.owner == STOCK
    remarks = lines if is_stock else []
    kv_lines = [str(problem) for problem in kv_problems]
    if is_stock or stock_kv_cache:
        remarks = [*remarks, *kv_lines]
    elif not loading.checked:  # the rehearsal includes this check
        lines += kv_lines
    architectures = (
        read_json_object(folder / CONFIG_NAME).get("architectures") if (folder / CONFIG_NAME).exists() else None
    )
    owned = {stored.name for linear in linears for stored in linear.stored.values()}
    files = {tensor.file for tensor in tensors.values()}
    return Contents(
        folder=str(folder),
        architecture=next(iter(architectures), None) if isinstance(architectures, list) else None,
        algo=config.algo if config else None,
        files=len(files),
        bytes=sum(tensor.num_bytes for tensor in tensors.values()),
        quantized_bytes=sum(tensors[name].num_bytes for name in owned),
        bits_per_weight=bits_per_weight(checkpoint) if checkpoint and linears else None,
        exclude_modules=list(config.exclude_modules) if config else [],
        layers=layers,
        plain=_plain_groups(tensors.values(), owned, each_layer),
        kv_cache=kv_cache,
        serving=serving,
        loading=loading,
        record=_record(folder),
        notes=[assumed] if config is not None and (assumed := assumption(config)) else [],
        problems=[] if is_stock else lines,
        remarks=remarks,
    )


def _loading(
    folder: Path, target: Device, serving: Serving, stock_kv_cache: bool, problems: Sequence[str] | None
) -> Loading:
    """Rehearse loading unless that is pointless.

    Args:
        problems: the known problems; None to skip the rehearsal.
    """
    if serving.owner == STOCK:
        return not_checked(f"SGLang serves it by itself on {target.flag}")
    if problems is None:
        return not_checked("headers only")
    if problems:
        return not_checked("a server would stop before it builds the model")
    return rehearse_loading(folder, target, stock_kv_cache)


def _left_unquantized(checkpoint: Checkpoint) -> list[ModelOptExtError]:
    """Return a problem for each layer that is declared as quantized, like its siblings, but stored unquantized."""
    config = checkpoint.config
    leaves = {name.rpartition(".")[2] for name in checkpoint.linears}
    served = ServedLayers.of(text_config(checkpoint.folder))
    problems = []
    for tensor in checkpoint.tensors.values():
        module, _, name = tensor.name.rpartition(".")
        # A layer that stores a scale is described, or is a problem, already.
        plain = name == "weight" and len(tensor.shape) == 2 and f"{module}.weight_scale" not in checkpoint.tensors
        known = canonical_name(module) in checkpoint.linears or module.rpartition(".")[2] not in leaves
        expert = EXPERT.fullmatch(module)  # one of a layer may be stored unquantized beside the others
        known = known or (expert is not None and canonical_name(expert["layer"]) in checkpoint.experts)
        if (
            plain
            and not known
            and not served.leaves_out(tensor.name)
            and tensor.dtype.itemsize > 1
            and config.layer(module) is not None
        ):
            expected = f"a {config.algo} layer, or it in exclude_modules"
            problems.append(ModelOptExtError.at(tensor.file, tensor.name, expected, "neither"))
    return problems


def _record(folder: Path) -> dict[str, Any]:
    file = folder / QUANT_CONFIG_NAME
    own = read_json_object(file).get(OWN_KEY) if file.exists() else None
    return dict(own) if isinstance(own, Mapping) else {}


def _serving(folder: Path, config: QuantConfig | None, target: Device, problems: list[ModelOptExtError]) -> Serving:
    def serving(owner: str | None, flags: Sequence[str], why: str) -> Serving:
        algorithms = config.algorithms if config else ()
        stock = {algo: STOCK_BEHAVIOUR.get(algo, "unknown to this package") for algo in algorithms}
        if config and config.algo is None and config.kv_cache_algo:
            stock["KV cache only"] = "rejected: it has no quant_algo"
        return Serving(target=target.flag, owner=owner, flags=list(flags), why=why, stock=stock)

    if config is None:
        return serving(STOCK, (), "it was not quantized by ModelOpt")
    try:
        found = decide(folder, None, target)
    except ModelOptExtError as error:
        problems.append(error)
        return serving(None, (), "no --quantization serves it (see the problems)")
    if found.family is None:
        doubt = "it is not understood here: " if found.in_doubt else ""
        flags = () if found.in_doubt or target.kind == "other" else (UMBRELLA,)
        return serving(STOCK, flags, doubt + found.why)
    return serving(OURS, [found.family, *({UMBRELLA} - {found.family})], found.why)


def _kv_cache(folder: Path, config: QuantConfig | None, problems: list[ModelOptExtError]) -> KVCache | None:
    try:
        plan = read_plan(folder, config, "auto")
        layers = plan.layers if plan is not None else {}
    except ModelOptExtError as error:
        problems.append(error)
        return None
    if plan is None:
        return None
    fields = text_config(folder)
    head_dim = fields.get("head_dim")
    if head_dim is None and fields.get("hidden_size") and fields.get("num_attention_heads"):
        head_dim = fields["hidden_size"] // fields["num_attention_heads"]
    stored = [plan.recipes.of(number).bytes_per_vector(head_dim) for number in layers] if head_dim else []
    if head_dim and not stored:
        stored = [plan.recipe.bytes_per_vector(head_dim)]
    bits = 8 * sum(stored) / len(stored) / head_dim if head_dim else None
    return KVCache(recipe=plan.describe(), source=plan.source, layers=len(layers), bits=bits)


def _scale_ranges(linear: QuantizedLinear, problems: list[ModelOptExtError]) -> dict[str, Range]:
    """Return the range of every floating-point tensor of a layer; add its illegal values to ``problems``."""
    found = {}
    for spec in linear.scheme.tensors:
        if spec.values is ValueRule.CODES or spec.name not in linear.stored:
            continue
        try:
            tensor = check_stored_values(linear, spec)
        except ModelOptExtError as error:
            problems.append(error)
            continue
        values = tensor.float()
        low, high = float(values.min()), float(values.max())
        if spec.values is ValueRule.BLOCK_SCALE_UE8M0:
            low, high = 2.0 ** (low - _UE8M0_BIAS), 2.0 ** (high - _UE8M0_BIAS)
        found[spec.name] = Range(smallest=low, largest=high)
    return found


def _layer_groups(
    linears: Iterable[QuantizedLinear],
    target: Device,
    owner: str | None,
    dtype: torch.dtype,
    ranges: Mapping[str, Mapping[str, Range]],
    each_layer: bool,
    problems: list[ModelOptExtError],
) -> list[LayerGroup]:
    groups: dict[Any, list[QuantizedLinear]] = {}
    for linear in linears:
        stored = tuple((name, tensor.dtype, tensor.shape) for name, tensor in sorted(linear.stored.items()))
        pattern = linear.name if each_layer else _pattern(linear.name)
        groups.setdefault((pattern, linear.scheme, linear.n, linear.k, stored), []).append(linear)
    described = []
    for members in groups.values():
        first = members[0]
        kernel: str | None = None
        rejected: dict[str, str] = {}
        if owner == OURS:
            kernel, rejected = _kernel(first, target, dtype)
            if kernel is None:
                why = "; ".join(f"{name} {reason}" for name, reason in rejected.items())
                problems.append(
                    ModelOptExtError.at(first.name, first.scheme.algo, f"a kernel that serves it on {target.flag}", why)
                )
        described.append(
            LayerGroup(
                name=_joined_name([linear.name for linear in members]),
                count=len(members),
                algo=first.scheme.algo,
                weight=first.scheme.weight.name,
                activation=first.scheme.activation.name if first.scheme.activation else "none",
                n=first.n,
                k=first.k,
                group_size=first.scheme.weight.group_size,
                smoothing=first.scheme.smoothing,
                low_rank=first.scheme.low_rank,
                tensors={name: _header(tensor) for name, tensor in first.stored.items()},
                bytes=sum(tensor.num_bytes for linear in members for tensor in linear.stored.values()),
                kernel=kernel,
                rejected=rejected,
                scales=_joined_ranges([ranges[linear.name] for linear in members if linear.name in ranges]),
            )
        )
    return described


def _kernel(linear: QuantizedLinear, target: Device, dtype: torch.dtype) -> tuple[str | None, dict[str, str]]:
    """Return the backend that dispatch tries first, and those before it with the reasons for rejecting them."""
    scheme = served_scheme(linear.scheme, target)
    vocabulary = linear.name.rpartition(".")[2] in _VOCABULARY
    request = LinearRequest(scheme, target, linear.n, linear.k, math_of(scheme), dtype, vocabulary)
    rejected: dict[str, str] = {}
    for name, reason in objections(request).items():
        if reason is None:
            return name, rejected
        rejected[name] = reason
    return None, rejected


def _plain_groups(tensors: Iterable[StoredTensor], owned: set[str], each_layer: bool) -> list[PlainGroup]:
    groups: dict[Any, list[StoredTensor]] = {}
    for tensor in tensors:
        if tensor.name not in owned and not is_kv_cache_tensor(tensor.name):
            pattern = tensor.name if each_layer else _pattern(tensor.name)
            groups.setdefault((pattern, tensor.dtype, tensor.shape), []).append(tensor)
    return [
        PlainGroup(
            name=_joined_name([tensor.name for tensor in members]),
            count=len(members),
            dtype=str(members[0].dtype).removeprefix("torch."),
            shape=list(members[0].shape),
            bytes=sum(tensor.num_bytes for tensor in members),
        )
        for members in groups.values()
    ]


def _header(tensor: StoredTensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _pattern(name: str) -> str:
    """Return ``name`` with every part that is a number replaced by ``*``."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _joined_name(names: Sequence[str]) -> str:
    """Return one name for several names of one pattern: ``model.layers.[0-3,5].mlp.up_proj``.

    Where several parts differ (layers and experts), each part lists its own numbers.
    """
    columns = list(zip(*(name.split(".") for name in names), strict=True))
    return ".".join(column[0] if len(set(column)) == 1 else f"[{_runs(map(int, column))}]" for column in columns)


def _runs(numbers: Iterable[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs)


def _joined_ranges(ranges: Sequence[Mapping[str, Range]]) -> dict[str, Range]:
    joined: dict[str, Range] = {}
    for layer in ranges:
        for name, found in layer.items():
            known = joined.get(name, found)
            joined[name] = Range(
                smallest=min(known.smallest, found.smallest), largest=max(known.largest, found.largest)
            )
    return joined
