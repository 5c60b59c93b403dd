"""A measurement of every dense recipe on the shipped model by served log probabilities; writes docs/quality.md.

python examples/quality.py            # all recipes: about 40 s each on 2 CPU cores
python examples/quality.py NVFP4_AWQ_LITE FP8_DEFAULT
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from demo import HERE, SHIPPED_MODEL, hardware, make_plan, quantize, versions, write_calibration
from pages import replace_part

from sglang_modelopt_ext.env import W4A8_MATH
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.workflow.evaluate.measure import Logprobs, Plan, Row, measure
from sglang_modelopt_ext.workflow.server.process import ServerProcess

OUTPUT = HERE.parent / "docs" / "quality.md"
RECIPES = (
    "W4A8_NVFP4_FP8",
    "W4A8_MXFP4_FP8",
    "W4A8_AWQ_BETA",
    "INT4_AWQ",
    "INT4_BLOCKWISE_WEIGHT_ONLY",
    "NVFP4_DEFAULT",
    "NVFP4_FOUR_OVER_SIX",
    "NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP",
    "NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN",
    "NVFP4_AWQ_CLIP",
    "NVFP4_AWQ_LITE",
    "NVFP4_SVDQUANT_DEFAULT",
    "W4A16_NVFP4",
    "NVFP4_MLP_WEIGHT_ONLY",
    "MXFP4_DEFAULT",
    "MXFP8_DEFAULT",
    "FP8_DEFAULT",
    "FP8_PER_CHANNEL_PER_TOKEN",
    "FP8_2D_BLOCKWISE_WEIGHT_ONLY",
    "INT8_DEFAULT",
    "INT8_SMOOTHQUANT",
    "INT8_WEIGHT_ONLY",
)
FP8_MATH = {"W4A8_NVFP4_FP8": "W4A8_NVFP4_FP8, math fp8"}
"""Recipes served a second time with weights rounded to E4M3."""

CONTEXT, WINDOWS = 512, 12


@contextlib.contextmanager
def math_setting(value: str) -> Iterator[None]:
    """Set the numerics of servers started while the block runs."""
    previous = os.environ.get(W4A8_MATH.variable)
    os.environ[W4A8_MATH.variable] = value
    try:
        yield
    finally:
        if previous is None:
            del os.environ[W4A8_MATH.variable]
        else:
            os.environ[W4A8_MATH.variable] = previous


def serve(model: Path, plan: Plan, reference: list[Logprobs] | None, log: Path) -> tuple[Row, list[Logprobs]]:
    """Start a server without a flag, measure it and stop it."""
    with ServerProcess(model, log=log, record=True) as server:
        return measure(server, plan, reference)


def render(rows: list[tuple[str, Row]], plan: Plan, command: str) -> str:
    """Return the part of the page."""
    lines = [
        "ModelOpt quantized the model that ships with the repository with each recipe; SGLang served the result, and the",
        f"figures are from the served log probabilities. Perplexity is over {plan.scored_tokens} held-out tokens in",
        f"{len(plan.windows)} windows, KL(bf16 || recipe) over the whole vocabulary at {plan.compared_tokens} of them. Bits are",
        "stored bits for each weight of the quantized linear layers. The model is small: the order of the recipes on it says",
        "little about large models.",
        "",
        "| recipe | algorithm | bits/weight | perplexity | KL (nats) |",
        "|---|---|---|---|---|",
    ]
    for name, row in rows:
        divergence = "-" if row.divergence is None else f"{row.divergence:.5f}"
        lines.append(f"| {name} | {row.name} | {row.bits:.2f} | {row.perplexity:.3f} | {divergence} |")
    return "\n".join(
        [*lines, "", f"Made by `{command}`, {datetime.date.today()}, on:", "", hardware(), "", versions(), ""]
    )


def main() -> int:
    """Measure the recipes named on the command line, or all, and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipes", nargs="*", default=RECIPES, help="ModelOpt configurations (default: all)")
    parser.add_argument("--output", type=Path, default=HERE / "quality-output", help="where checkpoints and logs go")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / ".gitignore").write_text("*\n", encoding="utf-8")
    texts = write_calibration(args.output / "calibration")
    plan = make_plan(SHIPPED_MODEL, CONTEXT, WINDOWS)
    try:
        row, reference = serve(SHIPPED_MODEL, plan, None, args.output / "bf16.log")
        rows = [("bf16", row)]
        for recipe in args.recipes:
            folder = args.output / recipe
            quantize(SHIPPED_MODEL, recipe, texts, folder, args.output / f"{recipe}-quantize.log")
            rows.append((recipe, serve(folder, plan, reference, args.output / f"{recipe}.log")[0]))
            if recipe in FP8_MATH:
                with math_setting("fp8"):
                    rows.append(
                        (FP8_MATH[recipe], serve(folder, plan, reference, args.output / f"{recipe}-fp8.log")[0])
                    )
            print(f"{rows[-1][0]}: perplexity {rows[-1][1].perplexity:.3f}", flush=True)
    except ModelOptExtError as error:
        print(error.one_line(), file=sys.stderr)
        return 1
    replace_part(OUTPUT, "shipped", render(rows, plan, " ".join(["python examples/quality.py", *sys.argv[1:]])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
