"""Options: the recipe or checkpoint that a server is started on, and the settings that go with it.

An option is written ``RECIPE[+VARIANT...]`` or ``DIR[+VARIANT...]``. A recipe is served from random weights, a folder as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from sglang_modelopt_ext.env import W4A8_MATH
from sglang_modelopt_ext.errors import ModelOptExtError


@dataclass(frozen=True)
class Recipe:
    """Weights and activations of a checkpoint.

    Attributes:
        algo: ModelOpt's ``quant_algo``, None for bf16.
        calibrated: whether layers store an ``input_scale`` although the algorithm can do without.
    """

    algo: str | None
    calibrated: bool = False


RECIPES: dict[str, Recipe] = {
    "bf16": Recipe(None),
    "fp8": Recipe("FP8"),
    "mxfp4": Recipe("W4A8_MXFP4_FP8"),
    "mxfp4-static": Recipe("W4A8_MXFP4_FP8", calibrated=True),
    "nvfp4": Recipe("W4A8_NVFP4_FP8"),
    "nvfp4-w4a4": Recipe("NVFP4"),
}


@dataclass(frozen=True)
class Variant:
    """A server's arguments and environment variables that change how a checkpoint is served."""

    arguments: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


VARIANTS: dict[str, Variant] = {
    "fp8math": Variant(environment={W4A8_MATH.variable: "fp8"}),
    "kv-fp8": Variant(("--kv-cache-dtype", "fp8_e4m3")),
    "kv-nvfp4": Variant(("--kv-cache-dtype", "modelopt_nvfp4")),
}
"""A cache quantized by a flag has the scale of an amax of 448, so that a variant shares its recipe's weights."""


@dataclass(frozen=True)
class Option:
    """One server to measure.

    Attributes:
        name: as it was written.
        recipe: a key of ``RECIPES``, None for a checkpoint's folder.
        folder: the checkpoint, None for a recipe.
        arguments: of the server.
        environment: variables of the server.
    """

    name: str
    recipe: str | None
    folder: Path | None
    arguments: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


def parse_option(text: str) -> Option:
    """Read an option. Raises ModelOptExtError for an unknown recipe or variant, or a folder without a checkpoint."""
    base, *variants = text.split("+")
    unknown = next((variant for variant in variants if variant not in VARIANTS), None)
    if unknown is not None:
        raise ModelOptExtError.at("command line", text, f"variants out of {', '.join(VARIANTS)}", unknown)
    arguments = tuple(word for variant in variants for word in VARIANTS[variant].arguments)
    environment = {key: value for variant in variants for key, value in VARIANTS[variant].environment.items()}
    if base in RECIPES:
        return Option(text, base, None, arguments, environment)
    if not (Path(base) / "config.json").is_file():
        expected = f"one of {', '.join(RECIPES)}, or a folder with a config.json"
        raise ModelOptExtError.at("command line", "option", expected, base)
    return Option(text, None, Path(base).resolve(), arguments, environment)
