"""The plan of a search: its candidate formats, tried, and what each costs every group of layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sglang_modelopt_ext.device import Device
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.workflow.autoquant import formats as candidate_formats
from sglang_modelopt_ext.workflow.autoquant.latency import timed
from sglang_modelopt_ext.workflow.autoquant.layers import plan_groups, read_linears
from sglang_modelopt_ext.workflow.autoquant.request import Request
from sglang_modelopt_ext.workflow.autoquant.rules import Rules, SearchRecipe, read_search
from sglang_modelopt_ext.workflow.autoquant.state import Format, Group, Latency, State
from sglang_modelopt_ext.workflow.common import modelopt_cpu
from sglang_modelopt_ext.workflow.common.processes import Processes
from sglang_modelopt_ext.workflow.common.progress import elapsed_progress


@dataclass(frozen=True)
class Candidates:
    """The candidates of a search, and what they cost in every group."""

    formats: list[candidate_formats.Candidate]
    rules: Rules
    gpu: Device
    dtype: torch.dtype
    rows: tuple[Format, ...]
    groups: tuple[Group, ...]
    latency: Latency | None


def plan_candidates(
    request: Request, recipe: SearchRecipe | None, folder: Path, device: str, processes: Processes
) -> Candidates:
    """Try the formats of a request or a recipe, and return what they cost every group of the model in ``folder``.

    Times that are missing are measured, and written, by the first process.

    Raises:
        ModelOptExtError: a format that cannot be searched over or served, or a time that is missing and cannot be measured here.
    """
    modelopt_cpu.install(device)
    rules = Rules(excluded=request.excluded, lm_head=request.lm_head) if recipe is None else recipe.rules
    with elapsed_progress("trying the formats", request.progress):
        formats = try_formats(request.formats, recipe, device)
        linears = read_linears(folder)
        gpu = request.gpu or candidate_formats.this_gpu()
        everywhere = [candidate.name for candidate in formats] if recipe is None else recipe.all_layers
        rows, groups, schemes = plan_groups(linears, formats, gpu, rules, everywhere)
    latency = None
    if (times := request.times) is not None:
        groups, latency = processes.from_first(lambda: timed(folder, groups, schemes, gpu, linears.dtype, times))
    return Candidates(formats, rules, gpu, linears.dtype, rows, groups, latency)


def try_formats(names: Sequence[str], recipe: SearchRecipe | None, device: str) -> list[candidate_formats.Candidate]:
    """Return the candidates of these names, or all of a recipe, tried by ModelOpt. Raises ModelOptExtError."""
    if recipe is None:
        return candidate_formats.find_formats(names, device)
    return [candidate_formats.try_format(name, config, device) for name, config in recipe.formats.items()]


def recipe_of(file: Path, state: State) -> SearchRecipe | None:
    """Return the recipe that the state in ``file`` was made of. Raises ModelOptExtError where it is another one now."""
    if state.recipe is None:
        return None
    recipe = read_search(state.recipe)
    if recipe.sha256 != state.recipe_sha256:
        expected = f"the recipe of {file} (sha256 {str(state.recipe_sha256)[:12]})"
        raise ModelOptExtError.at("--recipe", state.recipe, expected, recipe.sha256[:12])
    return recipe
