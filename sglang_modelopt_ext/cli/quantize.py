"""``sglang-modelopt quantize``: make a checked checkpoint from an unquantized model."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from sglang_modelopt_ext.cli.command import Command, Result
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.workflow.quantize import calibration
from sglang_modelopt_ext.workflow.quantize.listing import KVRow, RecipeRow, format_recipes, list_kv_caches, list_recipes
from sglang_modelopt_ext.workflow.quantize.recipes import ALGORITHMS, NONE, Changes
from sglang_modelopt_ext.workflow.quantize.record import Record, Selection
from sglang_modelopt_ext.workflow.quantize.run import Options, quantize


class QuantizeResult(Result, frozen=True, kw_only=True, tag="quantized"):
    """A checkpoint that was made.

    Attributes:
        folder: its path.
        quant_algo: its declared algorithm; None where only the KV cache is quantized.
        linears: number of quantized linear layers.
        bits_per_weight: stored bits per quantized weight, scales included.
        size: bytes of its weights.
        layerwise: whether it was calibrated layer by layer.
        resumed_from: number of decoder layers that an earlier, interrupted run had done.
        record: the metadata recorded in the checkpoint.
    """

    folder: str
    quant_algo: str | None
    linears: int
    bits_per_weight: float | None
    size: int
    layerwise: bool
    resumed_from: int
    record: Record

    def text(self) -> str:
        """Return one line."""
        parts = [f"{self.quant_algo}, {self.linears} linear layers"] if self.quant_algo else []
        if self.bits_per_weight is not None:
            parts.append(f"{self.bits_per_weight:.2f} bits per weight")
        if self.record.kv_cache_recipe:
            parts.append(f"KV cache {self.record.kv_cache_recipe}")
        if self.resumed_from:
            parts.append(f"resumed after {self.resumed_from} layers")
        return f"{self.folder}: {', '.join([*parts, f'{self.size / 1e6:.1f} MB'])}"


class RecipeList(Result, frozen=True, kw_only=True, tag="recipes"):
    """The lists that ``--list`` shows.

    Attributes:
        recipes: for layers.
        kv_caches: for the KV cache.
    """

    recipes: list[RecipeRow]
    kv_caches: list[KVRow]

    def text(self) -> str:
        """Return two tables."""
        return format_recipes(self.recipes, self.kv_caches)


class OtherProcess(Result, frozen=True, kw_only=True, tag="other process"):
    """The result of a process that only took part in the calibration."""

    rank: int

    def text(self) -> str:
        """Return one line."""
        return f"process {self.rank}: done; the first process wrote the checkpoint"


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that select a recipe and its data, shared with ``serve``."""
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument(
        "--recipe", help="name of a ModelOpt configuration, preset or recipe, or a recipe file (see --list)"
    )
    recipe.add_argument(
        "--kv",
        help=f"recipe of the KV cache, such as fp8 or nvfp4_rotate; {NONE} for an unquantized cache (see --list)",
    )
    recipe.add_argument(
        "--calibration-algorithm", metavar="NAME", help=f"algorithm instead of the recipe's: {', '.join(ALGORITHMS)}"
    )
    recipe.add_argument("--alpha", type=float, help="SmoothQuant's alpha, 0 to 1: how much moves into the weights")
    recipe.add_argument("--mlp-only", action="store_true", help="quantize the linear layers of the MLPs only")
    recipe.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave these layers unquantized; may be repeated",
    )
    recipe.add_argument(
        "--override",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a field of the recipe, such as algorithm.alpha_step=0.05; may be repeated",
    )
    data = parser.add_argument_group("calibration")
    data.add_argument(
        "--data", nargs="+", default=[], help=f"{', '.join(calibration.SUFFIXES)} files, or names of data sets"
    )
    data.add_argument(
        "--samples",
        type=int,
        help=f"windows of data to run (default: {calibration.SAMPLES}, or all if there are fewer)",
    )
    data.add_argument(
        "--sequence-length",
        type=int,
        default=calibration.SEQUENCE_LENGTH,
        help="tokens per window (default: %(default)s)",
    )
    data.add_argument(
        "--batch-size",
        type=int,
        help=f"windows per forward pass (default: {calibration.BATCH_SIZE}; on a GPU {calibration.BATCH_TOKENS} tokens of them)",
    )
    data.add_argument(
        "--seed", type=int, default=calibration.SEED, help="another seed runs other windows (default: %(default)s)"
    )
    data.add_argument("--device", help="cpu, cuda, or auto for all GPUs (default: cuda where there is a GPU)")
    data.add_argument(
        "--layerwise",
        action=argparse.BooleanOptionalAction,
        help="calibrate layer by layer, with progress to resume from, or the whole model at once (default: layer by layer, but "
        "for max on a GPU)",
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")


def options(args: argparse.Namespace) -> Options:
    """Return the options of the parsed arguments. Raises ModelOptExtError without a recipe."""
    if args.recipe is None and args.kv in (None, NONE):
        raise ModelOptExtError.at("command line", "--recipe", "a recipe, or a KV cache's with --kv", "neither")
    return Options(
        recipe=args.recipe or NONE,
        changes=Changes(args.kv, args.calibration_algorithm, args.alpha, tuple(args.override)),
        selection=Selection(mlp_only=args.mlp_only, exclude=tuple(args.exclude)),
        data=tuple(args.data),
        samples=args.samples,
        sequence_length=args.sequence_length,
        batch_size=args.batch_size,
        seed=args.seed,
        device=args.device,
        trust_remote_code=args.trust_remote_code,
        layerwise=args.layerwise,
    )


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="folder or Hugging Face name of the unquantized model")
    parser.add_argument("--list", action="store_true", help="show the recipes and exit")
    add_recipe_arguments(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--output", "--export-dir", type=Path, help="output folder")
    output.add_argument("--overwrite", action="store_true", help="replace the checkpoint in --output")


def _run(args: argparse.Namespace) -> Result:
    if args.list:
        return RecipeList(recipes=list_recipes(), kv_caches=list_kv_caches())
    for name, value in (("MODEL", args.model), ("--output", args.output)):
        if value is None:
            raise ModelOptExtError.at("command line", name, "a value", "none")
    done = quantize(args.model, args.output, options(args), overwrite=args.overwrite)
    if done is None:
        return OtherProcess(rank=int(os.environ["RANK"]))
    exported = done.exported
    return QuantizeResult(
        folder=str(exported.folder),
        quant_algo=exported.checkpoint.config.algo,
        linears=len(exported.checkpoint.layers),
        bits_per_weight=exported.record.bits_per_weight,
        size=exported.size,
        layerwise=done.outcome.layerwise,
        resumed_from=done.outcome.resumed_from,
        record=exported.record,
    )


COMMAND = Command("quantize", "Quantize a model with NVIDIA ModelOpt.", _add_arguments, _run, QuantizeResult)
