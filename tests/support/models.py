"""Tiny random models in bf16, saved the way a Hugging Face checkpoint is, with the traits that catch wrong arithmetic.

* **Outlier channels**: a few channels of the input of every linear layer are much larger than the rest.
* **Different scales**: q, k, v, o, gate, up and down have weights whose magnitudes lie up to three decades apart.
* **Uneven blocks**: runs of 16 weights differ in magnitude, so that block scales read in a wrong order are noticed.
* **Inputs outside the range of an unscaled E4M3**: some inputs mostly vanish in it, others overflow.
* **Peaked logits** that depend on every layer: log probabilities move when a single layer is wrong.

The same :class:`TinyModel` gives the same bytes every time. Other seeds and other dimensions make held-out models.
"""

from __future__ import annotations

import itertools
import string
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from tests.support.cache import cached_folder, digest, source_digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Family = Literal[
    "llama", "mistral", "qwen2", "qwen3", "phi3", "glm4", "qwen3_moe", "mixtral", "qwen2_moe", "classifier"
]
FAMILIES: tuple[Family, ...] = ("llama", "mistral", "qwen2", "qwen3")
FUSED_FAMILIES: tuple[Family, ...] = ("phi3", "glm4")
"""Families whose checkpoints store q, k and v, or gate and up, as one layer."""
MOE_FAMILIES: tuple[Family, ...] = ("qwen3_moe", "mixtral")
"""Besides these there is Qwen2-MoE, which has a shared expert beside the routed ones."""

PAD, BOS, EOS = 0, 1, 2
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")

EMBEDDING_STD = 0.25
LOGIT_STD = 3.0
OUTLIER_SHARE = 0.04
BLOCK = 16
BIAS_SHARE = {"q_proj": 0.5, "k_proj": 1.0, "v_proj": 0.3}
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Layers that some families store fused, and the parts of each."""


@dataclass(frozen=True)
class TinyModel:
    """Everything that decides the bytes of a model.

    Head counts and sizes are such that two tensor-parallel ranks get whole quantization blocks and one KV head each.
    ``experts`` and ``top_k`` are those of a mixture, whose experts have ``intermediate`` features each.
    """

    family: Family = "llama"
    seed: int = 0
    tied: bool = False
    hidden: int = 256
    intermediate: int = 512
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    vocab: int = 512
    max_position: int = 2048
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    experts: int = 8
    top_k: int = 2

    @property
    def name(self) -> str:
        """Return a readable folder name, for people; the cache key is a hash of all fields."""
        return f"{self.family}-s{self.seed}-h{self.hidden}-l{self.layers}" + ("-tied" if self.tied else "")


def model_dir(spec: TinyModel) -> Path:
    """Return the folder of the model, built on the first call on this machine."""
    import transformers

    key = digest(asdict(spec), transformers.__version__, source_digest(Path(__file__)))
    return cached_folder("models", f"{spec.name}-{key}", lambda folder: save_model(spec, folder))


def save_model(spec: TinyModel, folder: Path) -> None:
    """Write config, weights and tokenizer of the model to ``folder``."""
    build_model(spec).save_pretrained(folder)
    build_tokenizer(spec.vocab).save_pretrained(folder)


def random_ids(length: int, seed: int, vocab: int = 512) -> list[int]:
    """Return a prompt of ordinary tokens, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(len(SPECIAL_TOKENS), vocab, (length,), generator=generator).tolist()


def build_model(spec: TinyModel) -> PreTrainedModel:
    """Return the model in memory, in eval mode."""
    import transformers

    classes = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
        "phi3": (transformers.Phi3Config, transformers.Phi3ForCausalLM),
        "glm4": (transformers.Glm4Config, transformers.Glm4ForCausalLM),
        "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
        "mixtral": (transformers.MixtralConfig, transformers.MixtralForCausalLM),
        "qwen2_moe": (transformers.Qwen2MoeConfig, transformers.Qwen2MoeForCausalLM),
        "classifier": (transformers.Qwen2Config, transformers.Qwen2ForSequenceClassification),
    }
    config_class, model_class = classes[spec.family]
    without_head_dim = spec.family in ("qwen2", "qwen2_moe", "phi3", "classifier")
    if without_head_dim and spec.hidden != spec.heads * spec.head_dim:
        raise ValueError(f"{spec.family} has no head_dim of its own: hidden must be heads * head_dim")
    extra: dict[str, Any] = {} if without_head_dim else {"head_dim": spec.head_dim}
    if spec.family == "glm4":
        extra["attention_bias"] = True
    if spec.family in ("mistral", "mixtral", "phi3"):
        extra["sliding_window"] = None
    if spec.family == "qwen3_moe":
        extra |= {"num_experts": spec.experts, "moe_intermediate_size": spec.intermediate, "norm_topk_prob": True}
    if spec.family == "qwen2_moe":
        sizes = {"moe_intermediate_size": spec.intermediate, "shared_expert_intermediate_size": spec.intermediate}
        extra |= {"num_experts": spec.experts, "decoder_sparse_step": 1} | sizes
    if spec.family == "mixtral":
        extra["num_local_experts"] = spec.experts
    if spec.family in (*MOE_FAMILIES, "qwen2_moe"):
        extra["num_experts_per_tok"] = spec.top_k
    config = config_class(
        # ModelOpt's export reads architectures and fails without them.
        architectures=[model_class.__name__],
        hidden_size=spec.hidden,
        intermediate_size=spec.intermediate,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.kv_heads,
        vocab_size=spec.vocab,
        max_position_embeddings=spec.max_position,
        tie_word_embeddings=spec.tied,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        rms_norm_eps=1e-6,
        **extra,
    )
    model: PreTrainedModel = model_class(config).eval()
    weights = _Weights(spec)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights.make(name, tuple(parameter.shape)))
    model.tie_weights()
    return model.to(getattr(torch, spec.dtype))


class _Weights:
    """Draws each parameter from a generator of its own, so that no parameter depends on the order of another."""

    def __init__(self, spec: TinyModel) -> None:
        self.spec = spec

    def make(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Return the float32 values of the parameter called ``name``."""
        parts = name.split(".")
        layer = int(parts[2]) if parts[1] == "layers" else -1
        kind = parts[-2] if parts[-1] in ("weight", "bias") else parts[-1]
        if kind == "embed_tokens":
            return self._normal(name, shape) * EMBEDDING_STD
        if kind in ("lm_head", "score"):
            return self._normal(name, shape) * LOGIT_STD * self.spec.hidden**-0.5
        if kind == "norm":
            level = LOGIT_STD / (EMBEDDING_STD * self.spec.hidden**0.5) if self.spec.tied else 1.0
            return level * (1.0 + 0.1 * self._normal(name, shape))
        if kind in ("q_norm", "k_norm"):
            return self._target(kind[0] + "_proj", layer) * (1.0 + 0.2 * self._normal(name, shape))
        if kind in ("post_self_attn_layernorm", "post_mlp_layernorm"):  # GLM-4's, behind a block
            return 1.0 + 0.1 * self._normal(name, shape)
        if kind in FUSED and parts[-1] == "weight":  # the experts' is a parameter of that name
            return self._fused(name, kind, shape, layer)
        if kind in ("input_layernorm", "post_attention_layernorm"):
            return self._gain(name, shape[0], layer)
        if parts[-2] in ("gate", "shared_expert_gate"):
            return self._router(name, shape, layer)
        if parts[-2] == "experts":
            return self._experts(name, kind, shape, layer)
        if parts[-1] == "bias":
            return BIAS_SHARE[kind] * self._target(kind, layer) * self._normal(name, shape)
        return self._linear(name, shape, kind, layer)

    def _generator(self, name: str) -> torch.Generator:
        own = zlib.crc32(f"{self.spec.family}.{name}".encode())
        return torch.Generator().manual_seed(self.spec.seed * 1_000_003 + own)

    def _normal(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator(name))

    def _outliers(self, name: str, channels: int) -> torch.Tensor:
        """Return magnitudes of channels: 1 for most, 6 to 16 for a few."""
        generator = self._generator(name + ":outliers")
        factors = torch.ones(channels)
        chosen = torch.randperm(channels, generator=generator)[: max(1, round(channels * OUTLIER_SHARE))]
        factors[chosen] = 6.0 + 10.0 * torch.rand(len(chosen), generator=generator)
        return factors

    def _gain(self, name: str, channels: int, layer: int) -> torch.Tensor:
        """Return norm gains: attention reads small inputs, the MLP large ones, and every other layer the reverse."""
        small = ("input_layernorm" in name) == (layer % 2 == 0)
        spread = 1.0 + 0.2 * self._normal(name, (channels,))
        return (0.03 if small else 20.0) * spread * self._outliers(name, channels)

    def _target(self, kind: str, layer: int) -> float:
        """Return the standard deviation a projection's output should have, per channel, outlier channels aside."""
        odd = layer % 2
        return {
            "q_proj": (0.4, 3.0)[odd],
            "k_proj": (2.5, 0.4)[odd],
            "v_proj": (0.01, 0.3)[odd],
            "o_proj": 1.0,
            "gate_proj": 1.5,
            "up_proj": (0.3, 0.02)[odd],
            "down_proj": 1.0,
        }[kind]

    def _linear(self, name: str, shape: tuple[int, ...], kind: str, layer: int) -> torch.Tensor:
        """Return a weight with uneven blocks, scaled so that its output has the wanted standard deviation.

        The columns of outlier inputs are smaller, by the square root: both kinds of channel then matter.
        """
        rows, columns = shape
        block = torch.randn((rows, -(-columns // BLOCK)), generator=self._generator(name + ":blocks"))
        weight = self._normal(name, shape) * (0.5 * block).exp().repeat_interleave(BLOCK, dim=1)[:, :columns]
        magnitude = self._input_magnitude(name, kind, columns, layer)
        weight = weight * (magnitude / magnitude.median()).rsqrt()
        weight = weight / (weight * magnitude).norm(dim=1, keepdim=True)
        return weight * self._target(kind, layer) * self._output_outliers(name, kind, rows).unsqueeze(1)

    def _fused(self, name: str, kind: str, shape: tuple[int, ...], layer: int) -> torch.Tensor:
        """Return a weight stored fused: the parts that other families store apart, drawn as theirs are."""
        spec, parts = self.spec, FUSED[kind]
        sizes = (spec.heads * spec.head_dim, *[spec.kv_heads * spec.head_dim] * 2) if kind == "qkv_proj" else ()
        rows = sizes or (shape[0] // len(parts),) * len(parts)
        return torch.cat(
            [
                self._linear(name.replace(kind, part), (size, shape[1]), part, layer)
                for part, size in zip(parts, rows, strict=True)
            ]
        )

    def _router(self, name: str, shape: tuple[int, ...], layer: int) -> torch.Tensor:
        """Return a router with logits of standard deviation 1: a token's experts weigh alike, and all of them are used."""
        magnitude = self._input_magnitude(name.replace("gate.", "gate_proj."), "gate_proj", shape[1], layer)
        return self._normal(name, shape) / (magnitude * shape[1] ** 0.5)

    def _experts(self, name: str, kind: str, shape: tuple[int, ...], layer: int) -> torch.Tensor:
        """Return all experts' weights, each drawn like a dense layer's; those of the odd experts are larger."""
        parent = name.removesuffix(f".experts.{kind}")
        parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
        rows = (shape[1] // len(parts), shape[2])
        return torch.stack(
            [
                torch.cat([self._linear(f"{parent}.{expert}.{part}.weight", rows, part, layer) for part in parts])
                * (1.0, 1.6)[expert % 2]
                for expert in range(shape[0])
            ]
        )

    def _input_magnitude(self, name: str, kind: str, columns: int, layer: int) -> torch.Tensor:
        """Return the approximate magnitude of each input channel."""
        prefix = name.split(".mlp.")[0] if ".mlp." in name else name.rsplit(".", 3)[0]
        if kind in ("q_proj", "k_proj", "v_proj"):
            return self._gain(f"{prefix}.input_layernorm.weight", columns, layer)
        if kind in ("gate_proj", "up_proj"):
            return self._gain(f"{prefix}.post_attention_layernorm.weight", columns, layer)
        if kind == "down_proj":
            up = self._output_outliers(name.replace("down_proj", "up_proj"), "up_proj", columns)
            return up * self._target("up_proj", layer)
        spec = self.spec
        value = self._output_outliers(f"{prefix}.self_attn.v_proj.weight", "v_proj", spec.kv_heads * spec.head_dim)
        per_query = value.view(spec.kv_heads, 1, spec.head_dim).expand(-1, spec.heads // spec.kv_heads, -1)
        # Attention averages over a handful of tokens.
        return per_query.reshape(columns) * self._target("v_proj", layer) / 2

    def _output_outliers(self, name: str, kind: str, rows: int) -> torch.Tensor:
        return self._outliers(name, rows) if kind in ("v_proj", "up_proj") else torch.ones(rows)


def build_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer with ``vocab`` tokens: 3 special ones, 256 bytes, and pairs of letters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*SPECIAL_TOKENS, *alphabet]
    if vocab < len(tokens):
        raise ValueError(f"a byte-level tokenizer needs at least {len(tokens)} tokens, not {vocab}")
    letters = "Ġ" + string.ascii_lowercase + string.ascii_uppercase + string.digits
    merges = list(itertools.islice(itertools.product(letters, letters), vocab - len(tokens)))
    tokens += [first + second for first, second in merges]
    if len(tokens) != vocab:
        raise ValueError(f"no more than {len(tokens)} tokens, not {vocab}")
    bpe = models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges)
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    pad, bos, eos = SPECIAL_TOKENS
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos)
