"""Strict loading: every tensor of the checkpoint is checked and used, and every parameter of the model is loaded.

SGLang's model classes handle unknown tensors differently: some drop them with a warning, some silently, some fail. Here the weights
pass through :class:`StrictLoad`, which sees each tensor when it is read and each parameter when it is written.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from typing import Any
from weakref import WeakValueDictionary

import torch

from sglang_modelopt_ext.checkpoint.experts import is_expert
from sglang_modelopt_ext.checkpoint.leftovers import BUFFERS, LAYER_COUNT, MTP_COUNTS, ServedLayers
from sglang_modelopt_ext.checkpoint.quant_config import canonical_name
from sglang_modelopt_ext.checkpoint.reader import Checkpoint, is_kv_cache_tensor, standard_name
from sglang_modelopt_ext.checkpoint.values import check_values
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.integration.config import ModelOptExtConfig
from sglang_modelopt_ext.integration.exchange import used_and_fault
from sglang_modelopt_ext.integration.hooks import Hook
from sglang_modelopt_ext.integration.layout import full_sizes, partition_numbers
from sglang_modelopt_ext.integration.linear_method import ModelOptExtLinearMethod
from sglang_modelopt_ext.integration.mapping import Loader, expert_names, own_heads, replaced_loaders
from sglang_modelopt_ext.integration.moe_method import ExtFusedMoEMethod, shards_of
from sglang_modelopt_ext.integration.parameters import (
    ExpertParameter,
    MixedExpertParameter,
    StoredParameter,
    check_order,
    load_stored,
)
from sglang_modelopt_ext.integration.plain_linear import PlainLinear
from sglang_modelopt_ext.integration.provenance import Copies, Provenance, is_reordered
from sglang_modelopt_ext.integration.row_order import RowOrder
from sglang_modelopt_ext.integration.streaming import in_memory_of_their_own

logger = logging.getLogger(__name__)


POOLER = "pooler"
"""The name of the module of encoders behind the first token's state."""

CLASSIFIER = "score"
"""The name of the head of sequence classifiers and reward models."""


def quantized_modules(
    model: torch.nn.Module,
) -> list[tuple[torch.nn.Module, ModelOptExtLinearMethod | ExtFusedMoEMethod]]:
    """Return the linear layers and the layers of experts of ``model`` that this package serves, with their methods."""
    found = []
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        # LoRA wrappers have the method of the layer inside, which is listed itself.
        if isinstance(method, (ModelOptExtLinearMethod, ExtFusedMoEMethod)) and not hasattr(module, "base_layer"):
            found.append((module, method))
    return found


def ext_config(model: torch.nn.Module) -> ModelOptExtConfig | None:
    """Return this package's config that ``model`` was built with, None for any other model."""
    for module in model.modules():
        config = getattr(module, "quant_config", None)
        if isinstance(config, ModelOptExtConfig):
            return config
    return None


def unquantized_shape(
    module: torch.nn.Module, name: str, shard: Any, all_experts: bool = False
) -> tuple[int, ...] | None:
    """Return the shape that a stored ``weight`` of an unquantized layer, or ``bias`` of any linear layer, must have.

    SGLang's loaders assert shapes on a GPU, but pad short tensors with zeros on a CPU.

    Args:
        module: the layer.
        name: the parameter's name in the layer.
        shard: SGLang's id of the shard that is loaded (``"q"``, ``0``, ``(0, 1)``, ``"w1"``), None for all of them.
        all_experts: whether it is loaded for all experts at once, gate and up together.

    Returns:
        None for parameters that are checked elsewhere.
    """
    from sglang.srt.layers.linear import LinearBase
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

    if isinstance(module, FusedMoE) and name in ("w13_weight", "w2_weight"):
        if isinstance(module.quant_method, ExtFusedMoEMethod):
            return None
        hidden, intermediate = module.hidden_size, module.intermediate_size_per_partition * module.moe_tp_size
        if all_experts:
            of_one = (hidden, intermediate) if name == "w2_weight" else (2 * intermediate, hidden)
            return (module.num_experts, *of_one)
        return (hidden, intermediate) if name == "w2_weight" else (intermediate, hidden)
    if not isinstance(module, LinearBase) or name not in ("weight", "bias"):
        return None
    if name == "weight" and isinstance(module.quant_method, ModelOptExtLinearMethod):
        return None
    sizes = full_sizes(module, [0])
    if sizes is None or getattr(module, "use_presharded_weights", False):
        return None
    try:
        numbers = partition_numbers(shard, len(sizes)) if len(sizes) > 1 else (0,)
    except ValueError:  # a shard that a class loads in a way of its own
        return None
    rows = sum(sizes[number] for number in numbers)
    if name == "bias":
        return (rows,)
    # Convolutions are built as linear layers with a dimension more, and load themselves.
    return (rows, module.input_size) if module.weight.dim() == 2 else None


def _fits(stored: tuple[int, ...], expected: tuple[int, ...], padded: Mapping[int, int]) -> bool:
    """Return whether a stored shape is the expected one, but for sizes that are padded."""
    return len(stored) == len(expected) and all(
        size in (wanted, padded.get(wanted)) for size, wanted in zip(stored, expected, strict=True)
    )


def left_out(model: torch.nn.Module, checkpoint: Checkpoint) -> set[str]:
    """Return the stored tensors that ``model`` does not need: MTP blocks, buffers, scales of unrounded inputs, what it skips.

    An encoder's pooler (BERT) is needed by a classifier, and no embedding model of SGLang's has it. A module that the model does
    have under such a name is loaded.
    """
    # Llama 4's, of a vision tower that was not built.
    skips: Callable[[str], bool] = getattr(model, "_should_skip_weight", lambda name: False)
    unused = {name for name in checkpoint.tensors if checkpoint.leaves_out(name) or skips(name)}
    config = getattr(model, "config", None)
    text = getattr(config, "text_config", None) or config
    served = ServedLayers.of({name: getattr(text, name, None) for name in (LAYER_COUNT, *MTP_COUNTS)})
    modules = {canonical_name(name) for name, _ in model.named_modules()}
    return unused | {
        name
        for name in checkpoint.tensors
        if (served.leaves_out(name) or POOLER in name.split(".")[:2])
        and canonical_name(name).rpartition(".")[0] not in modules
    }


class StrictLoad:
    """One pass of a checkpoint's tensors into a model.

    A tensor counts as used when a parameter's loader is called with it, or with what the model's class made of it
    (:class:`Provenance`). Where that is not known, the call counts for the tensor that was read last. Some classes copy tensors
    into parameters themselves (attention sinks); that counts where it is known what they copy.

    Args:
        model: the model whose parameters are loaded.
        checkpoint: the description of the stored tensors.
        has_values: whether the tensors have values to check; in a rehearsal on the meta device they have none.
    """

    def __init__(self, model: torch.nn.Module, checkpoint: Checkpoint, *, has_values: bool = True) -> None:
        self.model = model
        self.checkpoint = checkpoint
        self.current: str | None = None
        self._stored: WeakValueDictionary[str, torch.Tensor] = WeakValueDictionary()
        self.used: set[str] = set()
        self.loads: dict[str, set[Any]] = {}
        self._provenance = Provenance(self._copied)
        own = (StoredParameter, ExpertParameter)
        self._row_order = RowOrder(model, checkpoint, lambda tensor: next(iter(self._sources(tensor)), None))
        self._copies = Copies((name, one) for name, one in model.named_parameters() if not isinstance(one, own))
        self._in_loader = threading.local()
        self._writers: dict[tuple[str, Any], str] = {}
        self._decoded: set[str] = set()
        self._lock = threading.Lock()
        self.has_values = has_values
        self.left_out = left_out(model, checkpoint)
        self._names = expert_names(model, checkpoint)
        self._own_head = {
            stored.name: getattr(head, spec)
            for head, linear in own_heads(model)
            for spec, stored in linear.stored.items()
            if spec != "bias"
        }
        config = ext_config(model)
        self._padded = config.padded_sizes if config is not None else {}
        self._packed = {
            name: (module, method)
            for module, method in quantized_modules(model)
            if isinstance(method, ExtFusedMoEMethod) and method.stored is not None and method.stored.packed is not None
            for name, projection, spec in method.stored.packed.tensors()
            if spec in projection.specs
        }
        """The layers that packed tensors of experts belong to: SGLang's models know none of a quantized layer but its weights."""

    def read(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield ``(name, tensor)`` of ``weights``, by the names that the model knows, after checking values of quantized layers.

        KV-cache tensors and those of :func:`left_out` are dropped.

        Raises:
            ModelOptExtError: a value is illegal, or a tensor was not found in the files' headers.
        """
        for name, tensor in weights:
            stored = self.checkpoint.tensors.get(name)
            if stored is None:
                raise ModelOptExtError.at(
                    self.checkpoint.folder, name, "a tensor found in the files' headers", "an unknown one"
                )
            if is_kv_cache_tensor(name) or name in self.left_out:
                continue  # integration.kv.scales reads a quantized KV cache's scales
            spec = self.checkpoint.spec_of(name)
            if spec is not None and self.has_values:
                check_values(stored.file, name, tensor, spec.values)
            self.current = name
            self._stored[name] = tensor
            self._provenance.add(tensor, name)
            if name in self._packed:
                module, method = self._packed[name]
                method.load_packed(module, name, tensor)
                continue
            if spec is not None and spec.is_scalar and not is_expert(name.rpartition(".")[0]):
                # Where a model's class concatenates such scales, they stay one for each stored layer.
                tensor = tensor.reshape(1)
            if name in self._own_head:  # a class whose embeddings are tied skips the head
                parameter = self._own_head[name]
                parameter.weight_loader(parameter, tensor)
                continue
            yield self._names(standard_name(name)), tensor

    def _sources(self, tensor: torch.Tensor) -> tuple[str, ...]:
        """Return the stored tensors that a tensor was made of; the one that was read last where that is not known."""
        return self._provenance.of(tensor) or ((self.current,) if self.current is not None else ())

    def _recording(self, parameter: str, loader: Loader) -> Loader:
        module_name, _, name = parameter.rpartition(".")
        module: Any = self.model.get_submodule(module_name)

        def load(target: torch.nn.Parameter, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            sources = self._sources(tensor)
            shard = args[0] if args else kwargs.get("loaded_shard_id")
            if "shard_id" in kwargs:  # the experts' loaders have the parameter's name as their first further argument
                shard = kwargs["shard_id"]
            expected = unquantized_shape(module, name, shard, "shard_id" in kwargs and "expert_id" not in kwargs)
            if expected is not None and not _fits(tuple(tensor.shape), expected, self._padded):
                raise ValueError(f"shape {list(expected)} expected, {list(tensor.shape)} stored")
            if not self.has_values and tensor.is_meta and not target.is_meta:  # built on a device that its class names
                tensor = torch.empty_like(tensor, device=target.device)
            is_known = len(sources) == 1 and sources[0] not in self._row_order.reordered
            stored = self._stored.get(sources[0]) if self.has_values and is_known else None
            if isinstance(target, StoredParameter) and stored is not None and is_reordered(tensor, stored):
                check_order(target, module.quant_method.scheme.tensors)
            # A class that cuts a tensor for several partitions (Qwen3.5) counts rows, and not those of packed codes or of blocks.
            is_cut = isinstance(target, StoredParameter) and isinstance(shard, tuple)
            call: Loader = load_stored if is_cut else loader
            self._in_loader.now = True
            try:
                result = call(target, tensor, *args, **kwargs)
            finally:
                self._in_loader.now = False
            written: set[Any]
            if isinstance(target, ExpertParameter):
                # The result lists no expert where another rank holds it: nothing was written here.
                written = {(expert, shard) for expert in result}
            elif "expert_id" in kwargs:
                written = {(kwargs["expert_id"], shard)}
            else:
                written = set(shard) if isinstance(shard, tuple) else {shard}
            if written:
                self.used.update(sources)
            if isinstance(target, StoredParameter):
                self._check_once(parameter, written, ", ".join(sources))
            self.loads.setdefault(parameter, set()).update(written)
            method = getattr(module, "quant_method", None)
            if isinstance(method, ModelOptExtLinearMethod) and method.is_absorbed:
                self._decode(module_name, module, method)
            return result

        return load

    def _copied(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Count a copy of a stored tensor into one of SGLang's parameters, which is loaded once all of it is written."""
        sources = () if getattr(self._in_loader, "now", False) else self._provenance.of(source)
        if not sources or target.numel() != source.numel():
            return
        name, is_whole = self._copies.add(target)
        if name is not None:
            self.used.update(sources)
        if name is not None and is_whole:
            self.loads.setdefault(name, set()).add(None)

    def _decode(self, name: str, layer: torch.nn.Module, method: ModelOptExtLinearMethod) -> None:
        """Decode an absorbed layer once all of its tensors are there: the model's class reads the weight when it has them all."""
        with self._lock:  # some classes load in several threads
            if all(f"{name}.{spec.name}" in self.loads for spec in method.scheme.tensors) and name not in self._decoded:
                self._decoded.add(name)
                method.decode(layer)

    def _check_once(self, parameter: str, written: set[Any], source: str) -> None:
        """Raise ValueError where another stored tensor was written to one of the shards ``written`` of a parameter of ours."""
        for shard in written:
            earlier = self._writers.setdefault((parameter, shard), source)
            if earlier != source:
                raise ValueError(f"one stored tensor for {parameter} expected, {earlier} was loaded before it")

    def run(
        self,
        load: Callable[[Iterable[tuple[str, torch.Tensor]]], None],
        weights: Iterable[tuple[str, torch.Tensor]],
        earlier: Set[str] | None = None,
    ) -> None:
        """Call ``load`` with the checked ``weights``, and require that all parameters are loaded and all tensors used.

        Args:
            load: the model's own loading code.
            weights: the stored tensors.
            earlier: the tensors that this rank used of a checkpoint with the same names: it must use these. None, at the start, has
                all ranks exchange what they used and what is wrong, and must be called on all of them at once.

        Raises:
            ModelOptExtError: a value is illegal, a parameter or shard is not loaded, or a tensor is unused; the error names it.
                At the start all ranks raise it, whichever found it.
        """
        try:
            self.load(load, weights)
            fault = next(self.missing(), None)
        except ModelOptExtError as error:
            fault = error
        if earlier is None:
            used, elsewhere = used_and_fault(self.used, str(fault) if fault else None)
        else:
            used, elsewhere = (self.checkpoint.tensors.keys() - earlier) | self.used, None
        if fault is not None or elsewhere is not None:
            raise fault or ModelOptExtError(str(elsewhere))
        for problem in self.left_over(used):
            raise problem

    def load(
        self, load: Callable[[Iterable[tuple[str, torch.Tensor]]], None], weights: Iterable[tuple[str, torch.Tensor]]
    ) -> None:
        """Call ``load`` with the checked ``weights``, and record which tensors and parameters it uses.

        Raises:
            ModelOptExtError: a value is illegal, or ``load`` fails; the error names the tensor that was read last.
        """
        with replaced_loaders(self.model, self._recording), self._provenance, self._row_order.followed():
            try:
                load(self.read(weights))
            except ModelOptExtError:
                raise
            except (AssertionError, AttributeError, KeyError, ValueError, RuntimeError, IndexError, TypeError) as error:
                stored = self.checkpoint.tensors.get(self.current or "")
                where = stored.file if stored else self.checkpoint.folder
                reason = str(error) or type(error).__name__
                if isinstance(error, KeyError):
                    reason = f"a name that {type(self.model).__name__} has no parameter for: {error}"
                raise ModelOptExtError.at(
                    where, self.current or "tensors", "a tensor this model can load", reason
                ) from error
        self._zero_head_bias()

    def _zero_head_bias(self) -> None:
        """Set a classifier head's bias to zero where the checkpoint has none: only SGLang's heads have a bias, set at random."""
        for name, module in self.model.named_modules():
            bias = getattr(module, "bias", None)
            if (
                not isinstance(module, (torch.nn.Linear, PlainLinear))
                or bias is None
                or name.rpartition(".")[2] != CLASSIFIER
            ):
                continue
            if f"{name}.weight" in self.loads and f"{name}.bias" not in self.checkpoint.tensors:
                bias.data.zero_()
                self.loads.setdefault(f"{name}.bias", set()).add(None)

    def missing(self) -> Iterator[ModelOptExtError]:
        """Yield an error for each parameter of this rank that was not written, or not in every shard."""
        modules = dict(self.model.named_modules())
        for name, parameter in self.model.named_parameters():
            if isinstance(parameter, MixedExpertParameter) and not parameter.is_needed:
                continue
            shards = self.loads.get(name)
            if not shards and (_is_stock_kv_scale(modules, name) or name.endswith(BUFFERS)):
                continue
            if not shards:
                yield ModelOptExtError.at(
                    self.checkpoint.folder, name, "a tensor for this parameter of the model", "none"
                )
                continue
            if None in shards:
                continue
            wanted = _wanted_shards(modules[name.rpartition(".")[0]], name.rpartition(".")[2], shards)
            missing = sorted(map(str, wanted - shards))
            if missing:
                yield ModelOptExtError.at(
                    self.checkpoint.folder, name, "a tensor for every shard", f"none for {', '.join(missing[:3])}"
                )

    def left_over(self, used: set[str]) -> Iterator[ModelOptExtError]:
        """Yield one error that names the first stored tensor outside ``used`` and counts the others, or nothing."""
        unused = self.unused(used)
        if unused:
            more = f" (and {len(unused) - 1} more)" if len(unused) > 1 else ""
            yield ModelOptExtError.at(
                self.checkpoint.tensors[unused[0]].file,
                unused[0],
                "a tensor the model uses",
                f"one nothing reads{more}",
            )

    def unused(self, used: set[str]) -> list[str]:
        """Return the stored tensors outside ``used`` that the model should have used, sorted."""
        tied = bool(getattr(getattr(self.model, "config", None), "tie_word_embeddings", False))
        return sorted(
            name
            for name in self.checkpoint.tensors.keys() - used - self.left_out
            if not is_kv_cache_tensor(name)
            and not (tied and name.endswith("lm_head.weight"))
            # A model with a rotary embedding is given the buffer, and its loader skips it.
            and not name.endswith(BUFFERS)
        )


def _wanted_shards(module: torch.nn.Module, parameter: str, found: set[Any]) -> set[Any]:
    """Return the shards that must have been loaded into a fused parameter; ``found``, those that were, tell its kind."""
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

    if isinstance(module, FusedMoE):
        # SGLang's own loader is called for every expert and drops those of other ranks.
        method = module.quant_method
        product, _, spec = parameter.partition("_")
        own = isinstance(method, ExtFusedMoEMethod)
        experts = method.members_with(product, spec) if own else range(module.num_experts)
        if not any(isinstance(entry, tuple) for entry in found):
            return found  # all experts at once
        shards = shards_of(module.moe_runner_config.is_gated).get(product, ())
        return {(expert, shard) for expert in experts for shard in shards}
    if found & {"q", "k", "v"}:
        return {"q", "k", "v"}
    return set(range(len(getattr(module, "output_sizes", ()))))


def _is_stock_kv_scale(modules: dict[str, torch.nn.Module], parameter: str) -> bool:
    """Return whether ``parameter`` is a scale of SGLang's FP8 KV cache, set by :mod:`sglang_modelopt_ext.integration.kv.scales`."""
    from sglang.srt.layers.radix_attention import RadixAttention

    module, _, name = parameter.rpartition(".")
    return name in ("k_scale", "v_scale") and isinstance(modules[module], RadixAttention)


def _load_weights_only(
    original: Callable[..., None],
    model: torch.nn.Module,
    weights: Iterable[tuple[str, torch.Tensor]],
    target_device: torch.device,
) -> None:
    config = ext_config(model)
    if config is None:
        return original(model, weights, target_device)
    if config.checkpoint is None:
        raise ModelOptExtError.at("--load-format", "dummy", "no weights to load", "weights")
    for module, method in quantized_modules(model):
        # Nothing to do at the start of a server, and where SGLang did it: 0.5.23 does for an update from disk, 0.5.22 does not.
        method.restore_weights_before_loading(module)
    strict = StrictLoad(model, config.checkpoint)
    # SGLang updates pipeline stages one after the other, so that they cannot gather what they used.
    own = in_memory_of_their_own(weights)
    strict.run(lambda checked: original(model, checked, target_device), own, config.used)
    config.used = frozenset(strict.used)
    for _, method in quantized_modules(model):
        method.verified = True
    if strict.left_out:
        from sglang.srt.utils import log_info_on_rank0

        some = min(strict.left_out)
        log_info_on_rank0(logger, f"modelopt_ext: {len(strict.left_out)} stored tensors are not needed, such as {some}")
    return None


def _initialize_dummy_weights(original: Callable[..., None], model: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
    original(model, *args, **kwargs)
    for module, method in quantized_modules(model):
        method.fill_dummy(module)


HOOKS = (
    Hook(
        "sglang.srt.model_loader.loader.DefaultModelLoader.load_weights_only",
        ("model", "weights", "target_device"),
        "tensors a model does not know would be dropped",
        _load_weights_only,
    ),
    Hook(
        "sglang.srt.model_loader.weight_utils.initialize_dummy_weights",
        ("model", "low", "high", "seed"),
        "dummy scales would be negative",
        _initialize_dummy_weights,
    ),
)
