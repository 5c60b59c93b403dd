"""The strict reader: a checkpoint folder as a typed description of every quantized layer, or an error that names the fault.

It reads configuration files and safetensors headers, and with :func:`check_scalar_values` the per-tensor scales; seconds suffice
for any model. Block scales are checked where they are loaded (:mod:`sglang_modelopt_ext.integration.loading`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path

import torch

from sglang_modelopt_ext.checkpoint.experts import ExpertLayer, is_expert, packed_layer, read_experts
from sglang_modelopt_ext.checkpoint.leftovers import ServedLayers
from sglang_modelopt_ext.checkpoint.linears import QuantizedLinear
from sglang_modelopt_ext.checkpoint.names import FUSED_SHARDS as FUSED_SHARDS
from sglang_modelopt_ext.checkpoint.names import canonical_name, is_vocabulary
from sglang_modelopt_ext.checkpoint.packed import PackedExperts, PackedProjection, declared, packed_tensors, read_packed
from sglang_modelopt_ext.checkpoint.quant_config import LayerQuantization, QuantConfig, read_quant_config, text_config
from sglang_modelopt_ext.checkpoint.tensors import StoredTensor, read_headers, read_tensors
from sglang_modelopt_ext.checkpoint.values import check_values, check_zero_blocks
from sglang_modelopt_ext.env import MXFP4_ACTIVATIONS
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.schemes.base import BIAS, LORA_A, LORA_B, PRE_QUANT_SCALE, LayerScheme, Scheme, is_fp4
from sglang_modelopt_ext.schemes.table import FP8, SCHEMES, find_scheme
from sglang_modelopt_kernels.formats import ACTIVATION_FORMATS, WEIGHT_FORMATS
from sglang_modelopt_kernels.formats.base import ActivationFormat, TensorSpec, ValueRule

_SCALE_NAMES = frozenset(
    {PRE_QUANT_SCALE.name, LORA_A, LORA_B}
    | {spec.name for weight in WEIGHT_FORMATS.values() for spec in weight.tensors}
    | {spec.name for activation in ACTIVATION_FORMATS.values() for spec in activation.tensors}
) - {"weight"}

_ALIASES = {f".weight_quantizer._{name}": f".{name}" for name in (LORA_A, LORA_B)}
"""The internal names of the low-rank factors that ModelOpt 0.47 exports, and TensorRT-LLM's names, which are used here."""


KV_CACHE_NAMES = frozenset({"k_scale", "v_scale", "k_bias", "v_bias"})
"""Last parts of the names of a quantized KV cache's tensors, stored beside ``k_proj`` and ``v_proj``."""


def is_kv_cache_tensor(tensor: str) -> bool:
    """Return whether a stored tensor, by its name, belongs to the KV cache and not to a linear layer."""
    return tensor.rpartition(".")[2] in KV_CACHE_NAMES


def standard_name(tensor: str) -> str:
    """Return the name of a stored tensor as ``<module>.<spec name>``, with ModelOpt's internal names replaced."""
    for alias, name in _ALIASES.items():
        if tensor.endswith(alias):
            return tensor.removesuffix(alias) + name
    return tensor


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read, with its quantized layers described.

    Attributes:
        folder: the checkpoint's folder.
        config: its declared quantization.
        tensors: the header of every tensor, by name.
        linears: every quantized linear layer, by :func:`canonical_name`; each projection of an expert is one, unless packed.
        experts: the quantized experts of each layer, by :func:`canonical_name` of the module around them.
    """

    folder: Path
    config: QuantConfig
    tensors: Mapping[str, StoredTensor]
    linears: Mapping[str, QuantizedLinear]
    experts: Mapping[str, ExpertLayer] = field(default_factory=dict)

    @functools.cached_property
    def packed(self) -> Mapping[str, tuple[PackedProjection, str]]:
        """The projection and the spec name of each tensor of packed experts, by the tensor's name."""
        return {tensor: (part, name) for experts in _packed(self) for tensor, part, name in experts.tensors()}

    @property
    def layers(self) -> list[QuantizedLinear]:
        """Every quantized linear layer, and each projection of packed experts: N and K of one expert, the headers of all."""
        packed = [part for experts in _packed(self) for part in experts.projections]
        headers = [{name: part.stored[name] for name in part.one.stored} for part in packed]
        of_packed = [dataclasses.replace(part.one, stored=of) for part, of in zip(packed, headers, strict=True)]
        return [*self.linears.values(), *of_packed]

    def linear_of(self, tensor: str) -> QuantizedLinear | None:
        """Return the quantized linear layer of a stored tensor by its name, None for others and for packed experts."""
        return self.linears.get(canonical_name(standard_name(tensor).rpartition(".")[0]))

    def spec_of(self, tensor: str) -> TensorSpec | None:
        """Return the spec of a stored tensor by its name, None when it belongs to no quantized layer."""
        if tensor in self.packed:
            projection, name = self.packed[tensor]
            return projection.specs.get(name)
        linear, name = self.linear_of(tensor), standard_name(tensor).rpartition(".")[2]
        if linear is None:
            return None
        return next((spec for spec in linear.scheme.tensors if spec.name == name), None)

    def leaves_out(self, tensor: str) -> bool:
        """Return whether ``tensor`` is a scale that a quantized layer does not use, since its activations are not rounded here."""
        if tensor in self.packed:
            projection, name = self.packed[tensor]
            return name not in projection.one.stored
        module, _, name = standard_name(tensor).rpartition(".")
        linear = self.linears.get(canonical_name(module))
        return linear is not None and name in _SCALE_NAMES and name not in linear.stored


def _packed(checkpoint: Checkpoint) -> list[PackedExperts]:
    return [layer.packed for layer in checkpoint.experts.values() if layer.packed is not None]


def layer_scheme(
    config: QuantConfig, quantization: LayerQuantization, stored: Mapping[str, StoredTensor] | None = None
) -> LayerScheme:
    """Return the scheme of a layer, from its algorithm's row in the table and from its tensors.

    The tensors decide the group size, smoothing, the low-rank branch's rank, and static or dynamic activation scales where the
    algorithm allows several.

    Args:
        config: the checkpoint's configuration, named in errors.
        quantization: the configuration's entry for the layer.
        stored: the layer's headers by spec name, None without a checkpoint (dummy weights).

    Raises:
        ModelOptExtError: the configuration and the tensors disagree, or neither decides.
    """
    scheme = find_scheme(quantization.algo, config.file)
    found = _stored_group_size(scheme, stored or {})
    declared = quantization.group_size
    if found is not None and declared is not None and found != declared:
        raise ModelOptExtError.at(config.file, "group_size", f"{found}, as the tensors have it", declared)
    # ModelOpt also exports a group size for formats without groups (8-bit ones), where it means nothing.
    group_size = (found if found is not None else declared) if any(scheme.group_sizes) else None
    lora = stored.get(LORA_A) if stored else None
    return LayerScheme(
        scheme.algo,
        scheme.weight_format(group_size, config.file, "group_size"),
        _activation(scheme, config, stored or ()),
        smoothing=stored is not None and PRE_QUANT_SCALE.name in stored,
        low_rank=lora.shape[0]
        if scheme.low_rank and lora is not None and len(lora.shape) == 2
        else int(scheme.low_rank),
    )


def _activation(scheme: Scheme, config: QuantConfig, stored: Collection[str]) -> ActivationFormat | None:
    if not scheme.activation_in_doubt:
        return scheme.activation_format(stored)
    choice = MXFP4_ACTIVATIONS.read()
    if config.rounds_activations is not None:
        recorded = "mxfp4" if config.rounds_activations else "none"
        if choice not in ("", recorded):
            expected = f"{recorded}, as {config.file.name} records"
            raise ModelOptExtError.at("environment", MXFP4_ACTIVATIONS.variable, expected, choice)
        choice = recorded
    return None if choice == "none" else scheme.activation_format(stored)


def assumption(config: QuantConfig) -> str | None:
    """Return a one-line warning where the export leaves open whether activations are rounded, None where it does not."""
    in_doubt = [algo for algo in config.algorithms if algo in SCHEMES and SCHEMES[algo].activation_in_doubt]
    if not in_doubt or config.rounds_activations is not None or MXFP4_ACTIVATIONS.read():
        return None
    return (
        f"{config.file}: quant_algo {in_doubt[0]} does not say whether activations are rounded: taken for MXFP4_DEFAULT, which "
        f"rounds them ({MXFP4_ACTIVATIONS.variable}=mxfp4). For a weight-only export (MXFP4_MLP_WEIGHT_ONLY) set it to none"
    )


def read_checkpoint(folder: Path, config: QuantConfig | None = None, *, rounds_fp4: bool = True) -> Checkpoint:
    """Read and validate the checkpoint in ``folder``.

    Args:
        folder: the checkpoint.
        config: its declared quantization, read from ``folder`` when None.
        rounds_fp4: whether FP4 activations are rounded here; where not, their scales are not needed.

    Raises:
        ModelOptExtError: a file or the configuration is wrong, or a tensor's name, shape or dtype differs from its scheme's.
    """
    checkpoint, problems = survey_checkpoint(folder, config, rounds_fp4=rounds_fp4)
    if problems:
        raise problems[0]
    return checkpoint


def survey_checkpoint(
    folder: Path, config: QuantConfig | None = None, *, rounds_fp4: bool = True
) -> tuple[Checkpoint, list[ModelOptExtError]]:
    """Read the checkpoint in ``folder`` without stopping at a wrong layer: return the correct layers, and an error for every fault.

    Args:
        folder: the checkpoint.
        config: its declared quantization, read from ``folder`` when None.
        rounds_fp4: whether FP4 activations are rounded here. Where not, their scales are not needed: a checkpoint that lacks
            some is read as if it had none.

    Raises:
        ModelOptExtError: the files or the configuration cannot be read.
    """
    config = config or read_quant_config(folder)
    if config is None:
        raise ModelOptExtError.at(folder, "quantization_config", "a checkpoint exported by ModelOpt", "none")
    tensors = read_headers(folder)
    served = ServedLayers.of(text_config(folder))
    linears, problems, incomplete = {}, [], set()
    modules, packed = _quantized_modules(tensors), packed_tensors(tensors)
    asked = [(config.layer(module), stored) for module, stored in modules.items()] if not rounds_fp4 else []
    asked += [(declared(config, layer, part), packed[layer][part]) for layer in packed for part in packed[layer]]
    keeps = not rounds_fp4 and any(_lacks_fp4_scale(quantization, stored) for quantization, stored in asked)
    for module, stored in modules.items():
        try:
            linears[canonical_name(module)] = _describe(
                module, stored, config.layer(module, stored=True), config=config, keeps_fp4=keeps
            )
        except ModelOptExtError as error:
            if not served.leaves_out(module):
                problems.append(error)
            incomplete.add(canonical_name(module))
    experts: dict[str, ExpertLayer] = {}
    try:
        wanted = {name: linear for name, linear in linears.items() if not served.leaves_out(linear.name)}
        faulty = any(is_expert(name) and not served.leaves_out(name) for name in incomplete)
        experts = {} if faulty else read_experts(wanted, tensors)
    except ModelOptExtError as error:
        problems.append(error)
    for layer, parts in packed.items():
        try:
            if not served.leaves_out(layer):
                found = read_packed(layer, parts, config, functools.partial(_describe, config=config, keeps_fp4=keeps))
                experts[canonical_name(layer)] = packed_layer(found)
        except ModelOptExtError as error:
            problems.append(error)
    checkpoint = Checkpoint(folder, config, tensors, linears, experts)
    problems += _fused_problems(checkpoint, incomplete, served)
    kv_cache = next((name for name in sorted(tensors) if is_kv_cache_tensor(name)), None)
    if kv_cache and config.kv_cache_algo is None:
        problems.append(
            ModelOptExtError.at(
                tensors[kv_cache].file,
                kv_cache,
                f"no KV cache tensors: {config.file.name} declares no kv_cache_quant_algo",
                "one",
            )
        )
    return checkpoint, problems


def _quantized_modules(tensors: Mapping[str, StoredTensor]) -> dict[str, dict[str, StoredTensor]]:
    """Return the headers, by last part of the name, of each module that has a scale or a weight of a one-byte type."""
    modules: dict[str, dict[str, StoredTensor]] = {}
    for tensor in tensors.values():
        if is_kv_cache_tensor(tensor.name):
            continue
        module, _, name = standard_name(tensor.name).rpartition(".")
        modules.setdefault(module, {})[name] = tensor
    return {
        module: stored
        for module, stored in modules.items()
        if _SCALE_NAMES & stored.keys() or ("weight" in stored and stored["weight"].dtype.itemsize == 1)
    }


def _lacks_fp4_scale(quantization: LayerQuantization | None, stored: Mapping[str, StoredTensor]) -> bool:
    """Return whether a layer whose recipe has FP4 activations stores no scale for them."""
    scheme = SCHEMES.get(quantization.algo) if quantization is not None else None
    activation = scheme.activation_format() if scheme is not None else None
    return is_fp4(activation) and any(spec.name not in stored and not spec.optional for spec in activation.tensors)


def _describe(
    module: str,
    stored: Mapping[str, StoredTensor],
    quantization: LayerQuantization | None,
    *,
    config: QuantConfig,
    keeps_fp4: bool,
) -> QuantizedLinear:
    """Return the description of one layer. Raises ModelOptExtError where it is not as its scheme declares.

    Args:
        module: the layer's name in the checkpoint.
        stored: its headers, by last part of the name.
        quantization: its entry in the configuration, None where it is declared as not quantized.
        config: the checkpoint's configuration.
        keeps_fp4: whether FP4 activations are kept in the model's type: the scheme then has no activation format, and their
            scales are dropped.
    """
    some = next(iter(stored.values()))
    if quantization is None:
        extra = next(tensor for name, tensor in sorted(stored.items()) if name in _SCALE_NAMES or name == "weight")
        raise ModelOptExtError.at(
            some.file, extra.name, f"no quantized tensors: {config.file.name} says the layer is not quantized", "one"
        )
    scheme = layer_scheme(config, quantization, stored)
    if scheme.algo == FP8 and is_vocabulary(module) and not stored.keys() & _scales_of_input(scheme):
        scheme = dataclasses.replace(
            scheme, activation=None
        )  # ModelOpt exports a weight-only head or embedding as FP8 too
    if keeps_fp4 and is_fp4(scheme.activation):
        dropped = {spec.name for spec in scheme.activation.tensors}
        stored = {name: tensor for name, tensor in stored.items() if name not in dropped}
        scheme = dataclasses.replace(scheme, activation=None)
    specs = {spec.name: spec for spec in scheme.tensors}
    for name, tensor in stored.items():
        if name not in specs and name != BIAS.name:
            raise ModelOptExtError.at(
                tensor.file, tensor.name, f"only the tensors of {scheme.describe()}", "an unknown one"
            )
    for name, spec in specs.items():
        if name not in stored and not spec.optional:
            raise ModelOptExtError.at(some.file, f"{module}.{name}", f"a tensor of {scheme.describe()}", "none")
        if name in stored and stored[name].dtype not in spec.dtypes:
            dtypes = " or ".join(str(dtype).removeprefix("torch.") for dtype in spec.dtypes)
            raise ModelOptExtError.at(
                stored[name].file, stored[name].name, dtypes, str(stored[name].dtype).removeprefix("torch.")
            )
    n, k = _weight_shape(stored["weight"], specs["weight"])
    for name, spec in specs.items():
        if name in stored:
            _check_shape(stored[name], spec, n, k)
    return QuantizedLinear(module, scheme, n, k, stored)


def _scales_of_input(scheme: LayerScheme) -> frozenset[str]:
    return frozenset(spec.name for spec in scheme.activation.tensors) if scheme.activation else frozenset()


def _stored_group_size(scheme: Scheme, stored: Mapping[str, StoredTensor]) -> int | None:
    """Return the group size by the tensors' shapes, K of the weight / columns of the block scale; None without block scales."""
    weight, scale = stored.get("weight"), stored.get("weight_scale")
    if weight is None or scale is None or len(weight.shape) != 2 or len(scale.shape) != 2:
        return None
    per_byte = next(dim.per for dim in WEIGHT_FORMATS[scheme.weights[0]].tensors[0].dims if dim.axis == "K")
    k, blocks = weight.shape[1] * per_byte, scale.shape[1]
    group_size = k // blocks if blocks and k % blocks == 0 else None
    # A group size that no format has is a wrong shape, for which the shape check has the better error.
    return group_size if group_size in scheme.group_sizes else None


def _weight_shape(weight: StoredTensor, spec: TensorSpec) -> tuple[int, int]:
    if len(weight.shape) != len(spec.dims) or 0 in weight.shape:
        raise ModelOptExtError.at(weight.file, weight.name, f"{len(spec.dims)} dimensions", list(weight.shape))
    n_dim, k_dim = spec.dim_of("N"), spec.dim_of("K")
    assert n_dim is not None, "every weight has N"
    assert k_dim is not None, "every weight has K"
    return weight.shape[n_dim] * spec.dims[n_dim].per, weight.shape[k_dim] * spec.dims[k_dim].per


def _check_shape(tensor: StoredTensor, spec: TensorSpec, n: int, k: int) -> None:
    try:
        expected = spec.shape(n, k)
    except ValueError as error:
        raise ModelOptExtError.at(
            tensor.file, tensor.name, f"a layer whose sizes the blocks divide: {error}", (n, k)
        ) from error
    # ModelOpt and its peers store a scalar as [] or [1].
    if tensor.shape != expected and not (spec.is_scalar and tensor.shape == (1,)):
        raise ModelOptExtError.at(tensor.file, tensor.name, f"shape {list(expected)}", list(tensor.shape))


def _fused_problems(checkpoint: Checkpoint, incomplete: Set[str], served: ServedLayers) -> list[ModelOptExtError]:
    """Return an error for each served layer that SGLang fuses and whose shards differ.

    Layers with a shard in ``incomplete`` are skipped: that shard has an error already. Experts are :func:`read_experts`'s. Shards
    are fused in blocks that have them all in some layer: a model without any gate (Nemotron-H) has an up projection alone, and the
    gate of an attention's output (AFMoE) has none beside it. A shard that no layer has is missed when the model is loaded.
    """
    problems = []
    blocks: dict[str, set[str]] = {}
    for name in checkpoint.tensors:
        *_, block, layer, _ = ("", "", *name.split("."))
        blocks.setdefault(block, set()).add(layer)
    for shards in FUSED_SHARDS.values():
        owners = {
            name.removesuffix(shard) for name in checkpoint.linears for shard in shards if name.endswith("." + shard)
        }
        for owner in sorted(owners):
            if (
                not blocks[owner.split(".")[-2]].issuperset(shards)
                or served.leaves_out(owner)
                or is_expert(owner + shards[0])
                or any(owner + shard in incomplete for shard in shards)
            ):
                continue
            try:
                _check_fused(checkpoint, owner, shards)
            except ModelOptExtError as error:
                problems.append(error)
    return problems


def _check_fused(checkpoint: Checkpoint, owner: str, shards: tuple[str, ...]) -> None:
    """Raise ModelOptExtError unless the shards of a layer that SGLang fuses have equal schemes, optional tensors and K."""
    present = [checkpoint.linears.get(owner + shard) for shard in shards]
    first = next(linear for linear in present if linear is not None)
    for shard, linear in zip(shards, present, strict=True):
        name = first.name.rpartition(".")[0] + "." + shard
        file = next(iter(first.stored.values())).file
        if linear is None:
            if f"{name}.weight" in checkpoint.tensors:
                raise ModelOptExtError.at(
                    file, f"{name}.weight", f"{first.scheme.algo}, as {first.name}", "unquantized"
                )
            raise ModelOptExtError.at(file, f"{name}.weight", f"a shard beside {first.name}", "none")
        _check_same(first, linear)


def _check_same(first: QuantizedLinear, linear: QuantizedLinear) -> None:
    file = next(iter(linear.stored.values())).file
    # One of them may have no bias (Whisper's k_proj); a class that needs it misses it when the model is loaded.
    differ = sorted((set(first.stored) ^ set(linear.stored)) - {BIAS.name})
    # A tensor that only one of them stores may decide its scheme, so it is named before the schemes are compared.
    if differ and linear.scheme.algo == first.scheme.algo:
        owner, other = (first, linear) if differ[0] in first.stored else (linear, first)
        raise ModelOptExtError.at(
            file, f"{other.name}.{differ[0]}", f"a tensor, as {owner.name} it is fused with", "none"
        )
    if linear.scheme != first.scheme:
        raise ModelOptExtError.at(
            file, linear.name, f"{first.scheme.describe()}, as {first.name} it is fused with", linear.scheme.describe()
        )
    if linear.k != first.k:
        raise ModelOptExtError.at(file, f"{linear.name}.weight", f"K = {first.k}, as {first.name}", linear.k)


def check_scalar_values(checkpoint: Checkpoint) -> None:
    """Raise ModelOptExtError, naming the tensor, unless every per-tensor scale is finite, positive and normal."""
    scalars = []
    for linear in checkpoint.layers:
        for spec in linear.scheme.tensors:
            if spec.is_scalar and spec.name in linear.stored:
                scalars.append(linear.stored[spec.name])
    for stored, tensor in read_tensors(scalars):
        check_values(stored.file, stored.name, tensor, ValueRule.POSITIVE)


def bits_per_weight(checkpoint: Checkpoint) -> float:
    """Return the stored bits per weight of the quantized linear layers, scales included and biases not; 16 without such layers."""
    stored = sum(t.num_bytes for layer in checkpoint.layers for n, t in layer.stored.items() if n != BIAS.name)
    weights = sum(linear.n * linear.k for linear in checkpoint.linears.values())
    weights += sum(
        part.count * part.one.n * part.one.k for packed in _packed(checkpoint) for part in packed.projections
    )
    return 8 * stored / weights if weights else float(torch.bfloat16.itemsize * 8)


def _from_file(stored: StoredTensor) -> torch.Tensor:
    return next(read_tensors([stored]))[1]


def check_stored_values(
    linear: QuantizedLinear,
    spec: TensorSpec,
    read: Callable[[StoredTensor], torch.Tensor] = _from_file,
    where: object = None,
) -> torch.Tensor:
    """Return the stored tensor ``spec`` of a layer, read and checked. Raises ModelOptExtError naming it when a value is illegal.

    Args:
        linear: the layer.
        spec: the tensor's.
        read: the values of a stored tensor.
        where: the place that errors name, the tensor's file by default.
    """
    stored = linear.stored[spec.name]
    place = stored.file if where is None else where
    tensor = read(stored)
    check_values(place, stored.name, tensor, spec.values)
    if spec.values is ValueRule.BLOCK_SCALE_E4M3:
        codes = read(linear.stored["weight"])
        as_linear = linear.scheme.weight.tensors[0].shape(linear.n, linear.k)
        if codes.dim() > len(as_linear) and codes.shape[1:] != as_linear:  # packed experts as [E, K, N]
            codes, scale = codes.transpose(1, 2).contiguous(), tensor.view(torch.uint8).transpose(1, 2).contiguous()
            check_zero_blocks(place, stored.name, codes, scale)
        else:
            check_zero_blocks(place, stored.name, codes, tensor)
    return tensor


def check_all_values(checkpoint: Checkpoint) -> None:
    """Raise ModelOptExtError for an illegal scale or zero block of the checkpoint, with one layer in memory at a time."""
    check_scalar_values(checkpoint)
    for linear in checkpoint.layers:
        for spec in linear.scheme.tensors:
            if not spec.is_scalar and spec.values is not ValueRule.CODES and spec.name in linear.stored:
                check_stored_values(linear, spec)
