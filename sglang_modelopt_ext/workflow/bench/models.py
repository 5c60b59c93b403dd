"""Checkpoints with random weights and the sizes of well-known models, in the layout of a ModelOpt export.

Speed depends on sizes and formats, not on what a model says. Weights are drawn on the GPU where there is one, and quantized by the
formats' own reference quantizers, so that every code and scale is legal. No tokenizer is written.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sglang_modelopt_ext.checkpoint.tensors import INDEX_NAME
from sglang_modelopt_ext.schemes.table import SCHEMES
from sglang_modelopt_ext.workflow.bench.options import RECIPES, Recipe
from sglang_modelopt_kernels.formats import WEIGHT_FORMATS, e4m3, nvfp4
from sglang_modelopt_kernels.formats.base import ActivationFormat, WeightFormat

WEIGHT_STD = 0.02
INPUT_AMAX = 6.0
"""The largest input of a layer behind a norm; down_proj, which is behind none, gets ``DOWN_AMAX``."""
DOWN_AMAX = 18.0
INPUT_RANGE = {"fp8_static": e4m3.MAX, "nvfp4_dynamic": nvfp4.FULL_RANGE}
"""By activation format: ``input_scale`` is amax / range."""
DISTINCT_EXPERTS = 8
"""Experts drawn for a layer; the others repeat them, at other addresses and thus at the same cost."""
SHARD_BYTES = 4 << 30
PRODUCER = {"name": "modelopt", "version": "0.47.0"}


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama, or with ``experts`` of a Qwen3 mixture whose ``intermediate`` is that of one expert."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    positions: int = 131072
    experts: int = 0
    top_k: int = 0


SHAPES: dict[str, Shape] = {
    "8b": Shape(4096, 14336, 32, 32, 8, 128, 128256),
    "70b": Shape(8192, 28672, 80, 64, 8, 128, 128256),
    "30b-a3b": Shape(2048, 768, 48, 32, 4, 128, 151936, experts=128, top_k=8),
    "tiny": Shape(256, 512, 2, 4, 2, 64, 512, 2048),
    "tiny-moe": Shape(256, 256, 2, 4, 2, 64, 512, 2048, experts=4, top_k=2),
}
"""Llama 3.1 8B and 70B, Qwen3-30B-A3B, and two for a CPU."""


def attention_sizes(shape: Shape) -> dict[str, tuple[int, int]]:
    """Return the linear layers of an attention block, ``(N, K)`` by the end of their names."""
    width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return {
        "self_attn.q_proj": (width, shape.hidden),
        "self_attn.k_proj": (kv_width, shape.hidden),
        "self_attn.v_proj": (kv_width, shape.hidden),
        "self_attn.o_proj": (shape.hidden, width),
    }


def mlp_sizes(shape: Shape) -> dict[str, tuple[int, int]]:
    """Return the linear layers of an MLP or of one expert, ``(N, K)`` by the end of their names."""
    return {
        "gate_proj": (shape.intermediate, shape.hidden),
        "up_proj": (shape.intermediate, shape.hidden),
        "down_proj": (shape.hidden, shape.intermediate),
    }


def router_size(shape: Shape) -> tuple[int, int]:
    """Return ``(N, K)`` of the router, ``(0, 0)`` for a dense model."""
    return (shape.experts, shape.hidden) if shape.experts else (0, 0)


def norm_sizes(shape: Shape) -> dict[str, int]:
    """Return the norms of a decoder layer: their entries by name."""
    sizes = dict.fromkeys(("input_layernorm", "post_attention_layernorm"), shape.hidden)
    return sizes | (dict.fromkeys(("self_attn.q_norm", "self_attn.k_norm"), shape.head_dim) if shape.experts else {})


def parameter_count(shape: Shape) -> int:
    """Return the number of weights of the whole model, embeddings and norms included."""
    per_mlp = sum(n * k for n, k in mlp_sizes(shape).values())
    attention = sum(n * k for n, k in attention_sizes(shape).values())
    router = router_size(shape)[0] * router_size(shape)[1]
    layer = attention + router + max(1, shape.experts) * per_mlp + sum(norm_sizes(shape).values())
    return shape.layers * layer + 2 * shape.vocab * shape.hidden + shape.hidden


def model_folder(root: Path, shape: str, recipe: str, dummy: bool = False) -> Path:
    """Return where a model, or with ``dummy`` its configuration, is kept under ``root``.

    The name changes with its sizes, its recipe and this file.
    """
    key = json.dumps([asdict(SHAPES[shape]), asdict(RECIPES[recipe])]).encode() + Path(__file__).read_bytes()
    kind = f"{recipe}-dummy" if dummy else recipe
    return root / f"{shape}-{kind}-{hashlib.sha256(key).hexdigest()[:8]}"


def make_models(root: Path, shape: str, recipes: list[str], dummy: bool = False) -> None:
    """Write the models that are not under ``root`` yet, with ``dummy`` only their configurations, and print their sizes."""
    for recipe in recipes:
        target = model_folder(root, shape, recipe, dummy)
        if target.is_dir():
            continue
        root.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        # Renamed when it is whole: an interrupted run leaves nothing that the next one would take for a model.
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=root))
        try:
            if not dummy:
                write_weights(scratch, SHAPES[shape], RECIPES[recipe], "cuda" if torch.cuda.is_available() else "cpu")
            write_configuration(scratch, SHAPES[shape], RECIPES[recipe])
            scratch.chmod(0o755)
            scratch.rename(target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        size = sum(file.stat().st_size for file in target.iterdir())
        seconds = time.monotonic() - began
        print(f"{target.name}: {size / 1e9:.2f} GB written in {seconds:.1f} s", file=sys.stderr, flush=True)


def write_weights(folder: Path, shape: Shape, recipe: Recipe, device: str) -> None:
    """Write the weights of a model to an existing ``folder``."""
    writer = _ShardWriter(folder)
    draw = _Draw(shape, recipe, device)
    embeddings = (shape.vocab, shape.hidden)
    writer.add({"model.embed_tokens.weight": draw.normal(*embeddings), "lm_head.weight": draw.normal(*embeddings)})
    writer.add({"model.norm.weight": torch.ones(shape.hidden, dtype=torch.bfloat16)})
    for layer in range(shape.layers):
        writer.add(draw.layer(f"model.layers.{layer}."))
    writer.close()


def write_configuration(folder: Path, shape: Shape, recipe: Recipe) -> None:
    """Write config and quantization config of a model to an existing ``folder``."""
    quantization = _quantization(shape, recipe)
    config = _config(shape)
    if quantization is not None:
        _write_json(folder / "hf_quant_config.json", {"producer": PRODUCER, "quantization": quantization})
        ignored = {"ignore": quantization["exclude_modules"], "producer": PRODUCER, "quant_method": "modelopt"}
        config["quantization_config"] = {
            key: value for key, value in quantization.items() if value is not None
        } | ignored
        del config["quantization_config"]["exclude_modules"]
    _write_json(folder / "config.json", config)


class _Draw:
    """Random tensors of a model, from one seed: recipes of one shape get equal weights."""

    def __init__(self, shape: Shape, recipe: Recipe, device: str) -> None:
        self.shape, self.device = shape, device
        self.generator = torch.Generator(device=device).manual_seed(0)
        self.weights: WeightFormat | None = None
        self.inputs: ActivationFormat | None = None
        if recipe.algo is not None:
            scheme = SCHEMES[recipe.algo]
            self.weights = WEIGHT_FORMATS[scheme.weights[0]]
            self.inputs = scheme.activation_format(("input_scale",) if recipe.calibrated else ())

    def normal(self, rows: int, columns: int) -> torch.Tensor:
        """Return a bf16 weight ``[N, K]``."""
        values = torch.randn(rows, columns, generator=self.generator, device=self.device)
        return (values * WEIGHT_STD).to(torch.bfloat16)

    def linear(self, kind: str, rows: int, columns: int) -> dict[str, torch.Tensor]:
        """Return the tensors of a linear layer by their last names; ``kind`` is the last name of the layer."""
        weight = self.normal(rows, columns)
        if self.weights is None:
            return {"weight": weight}
        stored = self.weights.quantize(weight)
        if self.inputs is not None:
            amax = DOWN_AMAX if kind == "down_proj" else INPUT_AMAX
            for spec in self.inputs.tensors:
                stored[spec.name] = torch.tensor(amax / INPUT_RANGE[self.inputs.name])
        return stored

    def layer(self, prefix: str) -> dict[str, torch.Tensor]:
        """Return the tensors of a decoder layer by their full names."""
        tensors = {
            f"{prefix}{name}.weight": torch.ones(size, dtype=torch.bfloat16)
            for name, size in norm_sizes(self.shape).items()
        }
        for name, size in attention_sizes(self.shape).items():
            tensors |= _named(f"{prefix}{name}", self.linear(name.rpartition(".")[2], *size))
        if not self.shape.experts:
            for name, size in mlp_sizes(self.shape).items():
                tensors |= _named(f"{prefix}mlp.{name}", self.linear(name, *size))
            return tensors
        tensors[f"{prefix}mlp.gate.weight"] = self.normal(*router_size(self.shape))
        for name, size in mlp_sizes(self.shape).items():
            drawn = [self.linear(name, *size) for _ in range(min(DISTINCT_EXPERTS, self.shape.experts))]
            for expert in range(self.shape.experts):
                tensors |= _named(f"{prefix}mlp.experts.{expert}.{name}", drawn[expert % len(drawn)])
        return tensors


@dataclass
class _ShardWriter:
    """Safetensors files of about ``SHARD_BYTES``, and their index."""

    folder: Path
    pending: dict[str, torch.Tensor] = field(default_factory=dict)
    weight_map: dict[str, str] = field(default_factory=dict)
    pending_bytes: int = 0
    total_bytes: int = 0

    def add(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take tensors to the CPU, and write a file when enough of them wait."""
        for name, tensor in tensors.items():
            # Each tensor in memory of its own, as safetensors wants it: experts repeat others.
            copy = tensor.detach().cpu() if tensor.is_cuda else tensor.detach().clone()
            self.pending[name] = copy.contiguous()
            self.pending_bytes += copy.numel() * copy.itemsize
        if self.pending_bytes >= SHARD_BYTES:
            self._flush()

    def close(self) -> None:
        """Write what waits, and the index."""
        self._flush()
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": self.weight_map}
        _write_json(self.folder / INDEX_NAME, index)

    def _flush(self) -> None:
        if not self.pending:
            return
        file = f"model-{len(set(self.weight_map.values())) + 1:05d}.safetensors"
        save_file(self.pending, self.folder / file, metadata={"format": "pt"})
        self.weight_map |= dict.fromkeys(self.pending, file)
        self.total_bytes += self.pending_bytes
        self.pending, self.pending_bytes = {}, 0


def _named(module: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{module}.{name}": tensor for name, tensor in tensors.items()}


def _quantization(shape: Shape, recipe: Recipe) -> dict[str, Any] | None:
    """Return the section ``quantization`` of hf_quant_config.json, None for bf16."""
    if recipe.algo is None:
        return None
    routers = [f"model.layers.{layer}.mlp.gate" for layer in range(shape.layers)] if shape.experts else []
    section = {"quant_algo": recipe.algo, "kv_cache_quant_algo": None, "exclude_modules": ["lm_head", *routers]}
    group_size = WEIGHT_FORMATS[SCHEMES[recipe.algo].weights[0]].group_size
    return section | ({"group_size": group_size} if group_size else {})


def _config(shape: Shape) -> dict[str, Any]:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "num_hidden_layers": shape.layers,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.positions,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    if shape.experts:
        config |= {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "moe_intermediate_size": shape.intermediate,
            "num_experts": shape.experts,
            "num_experts_per_tok": shape.top_k,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "rope_theta": 1000000.0,
        }
    return config


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=1), encoding="utf-8")
