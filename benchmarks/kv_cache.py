"""Measure the accuracy cost of the KV cache recipes: run ``python -m benchmarks.kv_cache`` from the repository root.

The model in ``examples/stdlib_lm`` comes in three forms, equal in their outputs (or nearly so) and different in keys and values:

* as trained;
* with outlier channels in its keys, as in trained models: pairs of channels that a position embedding rotates together, scaled up
  in the keys and down in the queries;
* with offsets: a constant in the values, subtracted after attention, and one in the slowest-rotating channels of the keys.

Each is calibrated on text by ModelOpt, exported with every KV recipe and nothing else quantized, and read by the fp32 reference of
the tests, with which served log probabilities are compared. Prints perplexity and the KL divergence from the form without a
quantized cache, the mean and by position in the context.
"""

from __future__ import annotations

import itertools
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "examples" / "stdlib_lm"))

from corpus import read_heldout  # noqa: E402 - found through the line above

from sglang_modelopt_ext.workflow.common import modelopt_cpu  # noqa: E402
from sglang_modelopt_ext.workflow.common.text import encode, load_tokenizer  # noqa: E402
from tests.support.cache import one_thread  # noqa: E402
from tests.support.kv_exports import PRESETS, UNQUANTIZED  # noqa: E402
from tests.support.reference import Reference  # noqa: E402

MODEL = ROOT / "examples" / "stdlib_lm" / "model"
OUTLIER, OUTLIER_PAIRS = 12.0, 3
VALUE_OFFSET, KEY_OFFSET, SLOW_PAIRS = 6.0, 12.0, 6
"""In units of the root mean square of the values, and of the keys."""

CALIBRATION, SHORT, LONG = 8, (8, 512), (3, 2048)
"""Windows to calibrate on; windows and their length for the first table and for the second."""


def with_outliers(model: Any) -> None:
    """Scale pairs of key channels up and the same channels of the queries down; attention scores do not change."""
    config = model.config
    half = config.head_dim // 2
    for layer in model.model.layers:
        keys = layer.self_attn.k_proj.weight.data.view(config.num_key_value_heads, config.head_dim, -1)
        queries = layer.self_attn.q_proj.weight.data.view(config.num_attention_heads, config.head_dim, -1)
        for pair in range(0, half, half // OUTLIER_PAIRS)[:OUTLIER_PAIRS]:
            for channel in (pair, pair + half):
                keys[:, channel] *= OUTLIER
                queries[:, channel] /= OUTLIER


def with_offsets(model: Any) -> None:
    """Add biases: to the values, which ``o_proj``'s bias subtracts, and to the slowest-rotating channels of the keys."""
    config = model.config
    half, groups = config.head_dim // 2, config.num_attention_heads // config.num_key_value_heads
    generator = torch.Generator().manual_seed(0)
    for layer in model.model.layers:
        attention = layer.self_attn
        value_size = float(attention.v_proj.weight.data.norm(dim=1).square().mean().sqrt())
        offset = (
            VALUE_OFFSET * value_size * torch.randn(config.num_key_value_heads, config.head_dim, generator=generator)
        )
        attention.v_proj.bias.data.copy_(offset.flatten())
        spread = attention.v_proj.bias.data.view(-1, config.head_dim).repeat_interleave(groups, dim=0).flatten()
        attention.o_proj.bias.data.copy_(-(attention.o_proj.weight.data @ spread))
        key_size = float(attention.k_proj.weight.data.norm(dim=1).square().mean().sqrt())
        bias = torch.zeros(config.num_key_value_heads, config.head_dim)
        slow = torch.tensor([c + part for part in (0, half) for c in range(half - SLOW_PAIRS, half)])
        bias[:, slow] = KEY_OFFSET * key_size * torch.randn(bias.shape[0], len(slow), generator=generator)
        attention.k_proj.bias.data.copy_(bias.flatten())


FORMS = {"as trained": None, "outliers in K": with_outliers, "offsets in K and V": with_offsets}


def save_form(change: Any, folder: Path) -> None:
    """Write the model in one of its forms, in fp32, with its tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(MODEL)
    config.attention_bias = change is with_offsets
    model: Any = AutoModelForCausalLM.from_pretrained(MODEL, config=config, dtype=torch.float32).eval()
    if config.attention_bias:
        for layer in model.model.layers:
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                getattr(layer.self_attn, name).bias.data.zero_()
    if change is not None:
        change(model)
    model.save_pretrained(folder)


def export(source: Path, preset: str, windows: Sequence[Sequence[int]], folder: Path) -> None:
    """Calibrate the cache on text and export the model, nothing else quantized."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from modelopt.torch.quantization.utils import update_quant_cfg_with_kv_cache_quant
    from transformers import AutoModelForCausalLM

    modelopt_cpu.install()
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()

    def calibrate(quantized: Any) -> None:
        for ids in windows:
            quantized(torch.tensor([list(ids)]), use_cache=False)

    config = update_quant_cfg_with_kv_cache_quant(UNQUANTIZED, getattr(mtq, preset)["quant_cfg"])
    mtq.quantize(model, config, calibrate)
    export_hf_checkpoint(model, export_dir=folder)


def divergence(tables: Sequence[torch.Tensor], plain: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return KL(plain || table) of every position, ``[windows, T]``."""
    rows = [(b.double().exp() * (b.double() - a.double())).sum(-1) for a, b in zip(tables, plain, strict=True)]
    return torch.stack(rows)


def perplexity(tables: Sequence[torch.Tensor], windows: Sequence[Sequence[int]]) -> float:
    """Return the perplexity of the windows, without their first tokens."""
    losses = [
        -table[:-1].gather(1, torch.tensor(list(ids[1:])).unsqueeze(1)).double().mean()
        for table, ids in zip(tables, windows, strict=True)
    ]
    return math.exp(float(torch.stack(losses).mean()))


def measure(folder: Path, recipe: str, windows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Return log probabilities over the windows with the cache rounded by ``recipe``."""
    reference = Reference(folder, kv_cache=recipe)
    return [reference.logprobs(ids) for ids in windows]


def main() -> None:
    """Print both tables."""
    tokenizer = load_tokenizer(MODEL)
    documents = encode(tokenizer, [document.text for document in read_heldout(ROOT / "examples/stdlib_lm/heldout.txt")])
    joined = [token for document in documents for token in document]
    count, length = SHORT
    chunks = [joined[i * length : (i + 1) * length] for i in range(CALIBRATION + count)]
    calibration, scored = chunks[:CALIBRATION], chunks[CALIBRATION:]
    rest = joined[len(chunks) * length :]
    long = [rest[i * LONG[1] : (i + 1) * LONG[1]] for i in range(LONG[0])]
    edges = [0, 128, 256, 512, 1024, 2048]
    print(
        f"float32 reference, torch {torch.__version__}, CPU; {len(scored)} windows of {SHORT[1]}, {LONG[0]} of {LONG[1]}"
    )
    print(
        f"{'model':20} {'recipe':13} perplexity  KL (nats) | KL by position, {edges[-1]} tokens: "
        + " ".join(f"<{edge}" for edge in edges[1:])
    )
    with tempfile.TemporaryDirectory() as scratch, one_thread(), torch.no_grad():
        for form, change in FORMS.items():
            source = Path(scratch) / form.replace(" ", "-")
            save_form(change, source)
            plain, plain_long = measure(source, "none", scored), measure(source, "none", long)
            print(f"{form:20} {'unquantized':13} {perplexity(plain, scored):10.3f}", flush=True)
            for recipe, preset in PRESETS.items():
                folder = Path(scratch) / f"{source.name}-{recipe}"
                export(source, preset, calibration, folder)
                tables = measure(folder, recipe, scored)
                by_position = divergence(measure(folder, recipe, long), plain_long)
                parts = " ".join(f"{float(by_position[:, a:b].mean()):.5f}" for a, b in itertools.pairwise(edges))
                mean = float(divergence(tables, plain).mean())
                print(f"{form:20} {recipe:13} {perplexity(tables, scored):10.3f} {mean:10.5f} | {parts}", flush=True)


if __name__ == "__main__":
    main()
