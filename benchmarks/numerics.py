"""Measure the accuracy cost of choices of numerics: run ``python -m benchmarks.numerics`` from the repository root.

On the model in ``examples/stdlib_lm`` and its held-out text, with the independent fp32 reference of the tests:

* W4A8_NVFP4_FP8 with exact products against weights rounded to E4M3 (``SGLANG_MODELOPT_EXT_W4A8_MATH``);
* W4A8_MXFP4_FP8 as ModelOpt's preset exports it, uncalibrated, with activations scaled per token, as served, against per tensor, as
  ModelOpt simulates them: per tensor, a token's result depends on the rest of its batch, here one window; and calibrated, with the
  static scale that the export then stores. Exports are calibrated on random tokens, as in the tests.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "examples" / "stdlib_lm"))

from corpus import read_heldout  # noqa: E402 - found through the line above

from sglang_modelopt_ext.workflow.common.text import begin_token, encode, load_tokenizer, split_windows, spread  # noqa: E402
from tests.support.exports import DEFAULT, Variant, export  # noqa: E402
from tests.support.reference import Reference  # noqa: E402

MODEL = ROOT / "examples" / "stdlib_lm" / "model"
WINDOWS, CONTEXT = 12, 512
VARIANTS = (
    ("W4A8_NVFP4_FP8, math exact", "W4A8_NVFP4_FP8_CFG", DEFAULT, {}),
    ("W4A8_NVFP4_FP8, math fp8", "W4A8_NVFP4_FP8_CFG", DEFAULT, {"math": "fp8"}),
    ("W4A8_MXFP4_FP8, per token", "W4A8_MXFP4_FP8_CFG", DEFAULT, {}),
    ("W4A8_MXFP4_FP8, per tensor", "W4A8_MXFP4_FP8_CFG", DEFAULT, {"activation": "per_tensor"}),
    ("W4A8_MXFP4_FP8, calibrated", "W4A8_MXFP4_FP8_CFG", Variant(algorithm="max"), {}),
)


def main() -> None:
    """Print the perplexity of each variant and its mean KL divergence from the unquantized model, both in fp32."""
    tokenizer = load_tokenizer(MODEL)
    documents = encode(tokenizer, [document.text for document in read_heldout(ROOT / "examples/stdlib_lm/heldout.txt")])
    windows = spread(split_windows(documents, CONTEXT, begin_token(tokenizer)), WINDOWS)
    plain = [Reference(MODEL).logprobs(ids) for ids in windows]
    scored = sum(len(ids) - 1 for ids in windows)
    print(f"{scored} held-out tokens in {len(windows)} windows, float32, torch {torch.__version__}, CPU")
    print(f"{'variant':28}  perplexity  KL (nats)")
    rows = [("bf16 weights", plain)]
    for name, recipe, variant, options in VARIANTS:
        reference = Reference(export(MODEL, recipe, variant), **options)  # type: ignore[arg-type]
        rows.append((name, [reference.logprobs(ids) for ids in windows]))
    for name, tables in rows:
        loss, divergence = 0.0, []
        for ids, table, other in zip(windows, tables, plain, strict=True):
            loss -= float(table[:-1].gather(1, torch.tensor(ids[1:]).unsqueeze(1)).double().sum())
            divergence.append((other.double().exp() * (other.double() - table.double())).sum(dim=-1))
        print(f"{name:28}  {math.exp(loss / scored):10.3f}  {float(torch.cat(divergence).mean()):9.5f}")


if __name__ == "__main__":
    main()
