"""The command ``auto-quantize``: plan, search, choose, measure, export, report."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from sglang_modelopt_ext.checkpoint.reader import Checkpoint, bits_per_weight
from sglang_modelopt_ext.device import Device
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.files.disk import full_disk
from sglang_modelopt_ext.files.whole import move_into_place, partial_folder
from sglang_modelopt_ext.workflow.autoquant import formats as candidate_formats
from sglang_modelopt_ext.workflow.autoquant.decoded import check_decodable, decoded_choice
from sglang_modelopt_ext.workflow.autoquant.kv import (
    check_recipes,
    chosen_cache,
    insert_cache_quantizers,
    search_cache,
)
from sglang_modelopt_ext.workflow.autoquant.kv_choice import check_kv_target, choose_kv
from sglang_modelopt_ext.workflow.autoquant.layers import model_digest
from sglang_modelopt_ext.workflow.autoquant.measure import (
    SCORE_SAMPLES,
    check_choice,
    load_texts,
    part,
    perplexity,
    stored_bits,
)
from sglang_modelopt_ext.workflow.autoquant.parallel import first_one_shows, process_groups
from sglang_modelopt_ext.workflow.autoquant.plan import plan_candidates, recipe_of, try_formats
from sglang_modelopt_ext.workflow.autoquant.plots import draw, matplotlib_figure
from sglang_modelopt_ext.workflow.autoquant.request import Request
from sglang_modelopt_ext.workflow.autoquant.rules import BASELINE, read_search
from sglang_modelopt_ext.workflow.autoquant.search import Scoring, Search, group_scores
from sglang_modelopt_ext.workflow.autoquant.state import (
    FILE_NAME,
    MODEL_OF,
    UNQUANTIZED,
    Choice,
    Measured,
    Report,
    Result,
    State,
    Target,
    check_target,
    choose,
    read_report,
    write_json,
)
from sglang_modelopt_ext.workflow.autoquant.work_folder import Work, shared_work
from sglang_modelopt_ext.workflow.common import modelopt_cpu
from sglang_modelopt_ext.workflow.common.base_model import activations_checked, device_for, find_model, load_model
from sglang_modelopt_ext.workflow.common.processes import Processes
from sglang_modelopt_ext.workflow.common.progress import elapsed_progress
from sglang_modelopt_ext.workflow.common.text import load_tokenizer, spread
from sglang_modelopt_ext.workflow.quantize.calibration import CalibrationData
from sglang_modelopt_ext.workflow.quantize.export import check_output, export_checkpoint
from sglang_modelopt_ext.workflow.quantize.recipes import Changes, build
from sglang_modelopt_ext.workflow.quantize.record import Origin, Record, package_versions, read_record

RECIPE = "auto_quantize"


def search(request: Request, processes: Processes | None = None) -> Report | None:
    """Search, then choose, measure and export for every target of the request.

    Args:
        request: the inputs.
        processes: those that share the windows, all in the same call with the same request; the first one does the rest. None
            for this one alone.

    Returns:
        The result; None in every process but the first.

    Raises:
        ModelOptExtError: any wrong input, before the model is loaded where that is possible.
    """
    processes = processes or Processes()
    with process_groups(processes, used=False), first_one_shows(processes):
        return _search(_quiet(request, processes), processes)


def _quiet(request: Request, processes: Processes) -> Request:
    return dataclasses.replace(request, progress=request.progress and processes.is_first)


def _search(request: Request, processes: Processes) -> Report | None:
    matplotlib_figure()
    device = device_for(request.device)
    folder = find_model(request.model)
    output = request.output
    processes.from_first(lambda: _check_place(folder, output, request))
    recipe = None if request.recipe is None else read_search(request.recipe)
    targets = request.targets or ((Target(recipe.target),) if recipe is not None else ())
    request = dataclasses.replace(request, targets=targets)
    candidates = plan_candidates(request, recipe, folder, device, processes)
    formats, rules, texts = candidates.formats, candidates.rules, request.texts
    if request.scored_as == "export":
        check_decodable(formats, candidates.groups)
    calibration, held_out = load_texts(
        texts.data,
        texts.held_out,
        load_tokenizer(folder),
        samples=texts.samples,
        sequence_length=texts.sequence_length,
        seed=texts.seed,
        progress=request.progress,
    )
    calibration.check_shares(processes.world)
    wanted = texts.score_samples or (SCORE_SAMPLES if recipe is None else recipe.score_samples)
    scored = part(calibration, spread(calibration.windows, wanted))
    plan = State(
        model=request.model,
        model_sha256=model_digest(folder),
        method=request.method if recipe is None else recipe.method,
        loss_scale=request.loss_scale or 0.0,
        calibration=calibration.record,
        scored=scored.record,
        gpu=candidates.gpu.flag,
        lm_head=rules.lm_head,
        excluded=(*rules.excluded, *rules.disabled),
        unquantized_bits=candidates.dtype.itemsize * 8,
        simulation="cuda" if device.startswith("cuda") else modelopt_cpu.NAME,
        versions=package_versions(),
        formats=candidates.rows,
        groups=candidates.groups,
        recipe=None if recipe is None else recipe.name,
        recipe_sha256=None if recipe is None else recipe.sha256,
        cost_model=rules.cost_model,
        latency=candidates.latency,
        scored_as=request.scored_as,
        kv_formats=check_recipes(folder, request.kv_formats, rules.fixed),
    )
    check_kv_target(plan.kv_formats, request.kv_target)
    for target in request.targets:
        check_target(plan, target)
    with shared_work(processes, output, plan, resume=request.resume, overwrite=request.overwrite) as work:
        run = _Run(request, folder, device, formats, rules.fixed, calibration, held_out, work, plan, processes)
        return run.all_targets(scored)


def measure_times(request: Request) -> Path:
    """Measure what the file of times lacks for the request's model and formats, and return the file. Raises ModelOptExtError."""
    assert request.times is not None, "a request with a file"
    device = device_for(request.device)
    recipe = None if request.recipe is None else read_search(request.recipe)
    plan_candidates(request, recipe, find_model(request.model), device, Processes())
    return request.times.file


def solve_again(file: Path, targets: Sequence[Target], kv_target: float | None = None) -> Report:
    """Solve new targets from the state in ``file`` alone: no model, no text, seconds. Raises ModelOptExtError."""
    state = read_report(file).state
    nothing = Measured(folder=None, algo=None, stored_bits=None, quantized_bits=None, perplexity=None)
    results = tuple(Result(choice=_choose(state, target, kv_target), measured=nothing) for target in targets)
    return Report(state=state, results=results, held_out=None, unquantized_perplexity=None)


def export_again(file: Path, request: Request, processes: Processes | None = None) -> Report | None:
    """Solve new targets from the state in ``file``, measure and export them. Only calibration is repeated.

    ``request`` names the model and text of the search; its other settings come from the state. ``processes`` and the result are
    those of :func:`search`.

    Raises:
        ModelOptExtError: the state is of another model or of other text.
    """
    processes = processes or Processes()
    with process_groups(processes, used=False), first_one_shows(processes):
        return _export_again(file, _quiet(request, processes), processes)


def _export_again(file: Path, request: Request, processes: Processes) -> Report | None:
    matplotlib_figure()
    state = read_report(file).state
    device = device_for(request.device)
    folder = find_model(request.model)
    processes.from_first(lambda: _check_place(folder, request.output, request))
    choices = [_choose(state, target, request.kv_target) for target in request.targets]
    if (digest := model_digest(folder)) != state.model_sha256:
        raise ModelOptExtError.at(
            folder, "model", f"the one {file} was made of ({state.model_sha256[:12]})", digest[:12]
        )
    texts = request.texts
    calibration, held_out = load_texts(
        texts.data or state.calibration.data,
        texts.held_out,
        load_tokenizer(folder),
        samples=state.calibration.samples,
        sequence_length=state.calibration.sequence_length,
        seed=state.calibration.seed,
        progress=request.progress,
    )
    if calibration.record.sha256 != state.calibration.sha256:
        expected = f"the text {file} was calibrated on (sha256 {state.calibration.sha256[:12]})"
        raise ModelOptExtError.at(
            "--data", ", ".join(calibration.record.data), expected, calibration.record.sha256[:12]
        )
    calibration.check_shares(processes.world)
    modelopt_cpu.install(device)
    recipe = recipe_of(file, state)
    used = [row.name for row in state.formats if any(row.name in choice.formats.values() for choice in choices)]
    with elapsed_progress("trying the formats", request.progress):
        formats = try_formats(used, recipe, device)
    fixed = None if recipe is None else recipe.rules.fixed
    run = _Run(request, folder, device, formats, fixed, calibration, held_out, None, state, processes)
    return run.all_targets(None)


def _choose(state: State, target: Target, kv_target: float | None) -> Choice:
    return msgspec.structs.replace(choose(state, target), kv=choose_kv(state, kv_target))


def _check_place(model: Path, output: Path, request: Request) -> None:
    if len(request.targets) > 1 or not request.export:
        holds = output.is_dir() and any(output.iterdir())
        if holds and not request.overwrite and not request.resume:
            raise ModelOptExtError.at(
                output, "output", "an empty folder, a new one or --overwrite", "a folder with files"
            )
        if holds and not request.resume and not (output / FILE_NAME).is_file():
            raise ModelOptExtError.at(
                output, "output", "the result of an earlier search to overwrite", "something else"
            )
    elif not (request.resume and output.is_dir()):
        check_output(model, output, request.overwrite)


@dataclass
class _Run:
    request: Request
    folder: Path
    device: str
    formats: list[candidate_formats.Candidate]
    fixed: dict[str, Any] | None
    calibration: CalibrationData
    held_out: CalibrationData
    work: Work | None
    state: State
    processes: Processes
    unquantized: float | None = None
    model: Any = None

    def all_targets(self, scored: CalibrationData | None) -> Report | None:
        request = self.request
        self._load()
        with activations_checked(self.model, self.folder):
            if self.processes.is_first:
                self.unquantized = self._perplexity("perplexity, unquantized")
            self._search_cache(scored)
        results = []
        for target in request.targets:
            together = self._is_shared(scored)
            if together or self.processes.is_first:
                result = self._one_target(target, scored, self.processes if together else Processes())
                results += [] if result is None else [result]
            self.model = None
        if not self.processes.is_first:
            return None
        report = self._report(results)
        if not request.export:
            with partial_folder(request.output) as scratch:
                scratch.chmod(0o777 & ~_umask())
                self._write(scratch, report)
                move_into_place(scratch, request.output)
        elif len(request.targets) > 1:
            self._write(request.output, report)
        return report

    def _is_shared(self, scored: CalibrationData | None) -> bool:
        """Return whether the processes share work for the next target: windows to score, or a calibration that is not kept."""
        return self.work is None or scored is None or self.work.progress.windows < len(scored.windows)

    def _load(self) -> None:
        if self.model is None:
            self.model, simulation = load_model(self.folder, self.device, progress=self.request.progress)
            assert self.work is None or simulation == self.state.simulation, "one device, one simulation"

    def _perplexity(self, label: str) -> float:
        return perplexity(self.model, self.held_out.batches(), self.device, label=label, progress=self.request.progress)

    def _search_cache(self, scored: CalibrationData | None) -> None:
        """Measure the candidates for the KV cache, where they were not."""
        if not self.state.kv_formats or scored is None or self.work is None:
            return
        if self.work.progress.kv is None:
            texts = (self.calibration.batches(), scored.batches())
            formats, method, progress = self.state.kv_formats, self.state.method, self.request.progress
            found = search_cache(
                self.model, self.folder, formats, method, *texts, self.device, progress, self.processes
            )
            self.work.save(msgspec.structs.replace(self.work.progress, kv=found))

    def _take_scores(self) -> None:
        """Take the scores from the work folder into the state."""
        if self.work is not None:
            scores = group_scores(self.work.plan.groups, self.work.progress)
            state = self.work.plan.with_scores(scores, self.work.progress.loss_scale)
            self.state = msgspec.structs.replace(state, kv=self.work.progress.kv)

    def _one_target(self, target: Target, scored: CalibrationData | None, processes: Processes) -> Result | None:
        """Return the result for a target; None in every process but the first of ``processes``, which share the search."""
        scoring = None
        if self.work is not None and scored is not None:
            if self.work.progress.windows == len(scored.windows):  # an interrupted run had scored all windows
                self._take_scores()
                choice = _choose(self.state, target, self.request.kv_target)
                if (before := _exported_before(self._folder(target), self.state, choice)) is not None:
                    return before
            scoring = Scoring(scored.batches(), self.request.loss_scale, self.work.progress, self.work.save)
        self._load()
        chosen: Choice | None = None

        def pick() -> dict[str, str]:
            nonlocal chosen
            self._take_scores()
            chosen = processes.from_first(lambda: _choose(self.state, target, self.request.kv_target))
            return chosen.formats

        try:
            Search(
                model=self.model,
                method=self.state.method,
                groups=self.state.groups,
                formats=self.formats,
                calibration=self.calibration.batches(),
                scoring=scoring,
                checkpoint=self.work.checkpoint if self.work is not None else None,
                pick=pick,
                device=self.device,
                fixed=self.fixed,
                served=Device.parse(self.state.gpu) if self.state.scored_as == "export" else None,
                processes=processes,
            ).run()
        except (ModelOptExtError, KeyboardInterrupt):
            raise
        except Exception as error:  # ModelOpt raises assertions and errors of every kind
            reason = f"{type(error).__name__}: {error}"
            full = full_disk(self.request.output.parent, error)
            raise full or ModelOptExtError.at(self.folder, RECIPE, "ModelOpt to search over it", reason) from error
        assert chosen is not None, "ModelOpt asked for the choice"
        if not processes.is_first:
            return None
        with chosen_cache(self.model, self.state.kv, chosen.kv), self._as_served(chosen):
            quality = self._perplexity(f"perplexity at {target.name}")
        if not self.request.export:
            return Result(choice=chosen, measured=_measured(quality))
        return self._export(chosen, quality)

    def _as_served(self, choice: Choice) -> contextlib.AbstractContextManager[None]:
        """Compute the layers as exported, where that is scored, while the block runs."""
        if self.state.scored_as == "simulation":
            return contextlib.nullcontext()
        schemes = {candidate.name: candidate.scheme for candidate in self.formats}
        return decoded_choice(self.model, self.state.groups, choice.formats, schemes, Device.parse(self.state.gpu))

    def _export(self, choice: Choice, quality: float) -> Result:
        request = self.request
        several, output = len(request.targets) > 1, self._folder(choice.asked)
        result = Result(choice=choice, measured=_measured(quality))

        def finish(scratch: Path, checkpoint: Checkpoint, record: Record) -> Record:
            nonlocal result
            check_choice(checkpoint, self.state, choice.formats)
            measured = Measured(
                folder=output.name if several else ".",
                algo=checkpoint.config.algo,
                stored_bits=stored_bits(checkpoint, self.state),
                quantized_bits=bits_per_weight(checkpoint),
                perplexity=quality,
            )
            result = Result(choice=choice, measured=measured)
            if not several:
                self._write(scratch, self._report([result]))
            return msgspec.structs.replace(record, search=_recorded(self.state, result))

        used = [candidate for candidate in self.formats if candidate.name in choice.formats.values()]
        steps = [{"format": candidate.name, **candidate.algorithm} for candidate in used]
        if BASELINE in choice.formats.values():
            assert self.fixed is not None, "a baseline is chosen where there is one"
            steps += [{"format": BASELINE, **step} for step in build(self.fixed, Changes())["algorithm"]]
        origin = Origin(
            recipe=RECIPE,
            base_model=request.model,
            algorithm=tuple(steps),
            calibration=self.calibration.record,
            simulation=self.state.simulation,
            smoothed=sum(
                len(group.modules)
                for group in self.state.groups
                for candidate in used
                if candidate.scheme.smoothing and choice.formats[group.name] == candidate.name
            ),
            search=_recorded(self.state, result),
        )
        export_checkpoint(
            self.model,
            self.folder,
            output,
            origin,
            overwrite=request.overwrite,
            quality=self._quality(quality),
            kv_layers=insert_cache_quantizers(self.model, self.state.kv, choice.kv),
            finish=finish,
            progress=request.progress,
        )
        return result

    def _folder(self, target: Target) -> Path:
        output = self.request.output
        return output / target.name if len(self.request.targets) > 1 else output

    def _quality(self, quality: float) -> dict[str, float]:
        """Return the perplexities for record and model card, of the choice and unquantized, on the same windows."""
        figures = {f"perplexity ({MODEL_OF[self.state.scored_as]}, held-out text)": quality}
        if self.unquantized is not None:
            figures["perplexity (unquantized, held-out text)"] = self.unquantized
        return figures

    def _report(self, results: Sequence[Result]) -> Report:
        return Report(
            state=self.state,
            results=tuple(results),
            held_out=self.held_out.record,
            unquantized_perplexity=self.unquantized,
        )

    def _write(self, folder: Path, report: Report) -> None:
        with elapsed_progress("drawing", self.request.progress):
            draw(folder, report)
        write_json(folder / FILE_NAME, report)


def _measured(quality: float) -> Measured:
    return Measured(folder=None, algo=None, stored_bits=None, quantized_bits=None, perplexity=quality)


def _recorded(state: State, result: Result) -> dict[str, Any]:
    """Return the record of the search that the checkpoint keeps."""
    return {
        "method": state.method,
        "recipe": state.recipe,
        "cost_model": state.cost_model,
        "target_bits": result.choice.target if result.choice.unit == "bits" else None,
        "target_us": result.choice.target if result.choice.unit == "us" else None,
        "chosen_bits": result.choice.bits,
        "chosen_us": result.choice.us,
        "latency": msgspec.to_builtins(state.latency),
        "scored_as": state.scored_as,
        "kv": msgspec.to_builtins(result.choice.kv),
        "stored_bits": result.measured.stored_bits,
        "lm_head": state.lm_head,
        "excluded": list(state.excluded),
        "loss_scale": state.loss_scale,
        "scored": msgspec.to_builtins(state.scored),
        "gpu": state.gpu,
        "state_sha256": state.digest,
        "groups": {
            group.name: {
                "format": result.choice.formats[group.name],
                "scores": {name: c.score for name, c in group.candidates.items() if name != UNQUANTIZED},
            }
            for group in state.groups
        },
        "measured": msgspec.to_builtins(result.measured),
    }


def _exported_before(output: Path, state: State, choice: Choice) -> Result | None:
    """Return an interrupted run's measurements of the same choice from the same state, if its checkpoint exists."""
    record = read_record(output) if output.is_dir() else None
    found = record.search if record is not None else None
    if found is None or found.get("state_sha256") != state.digest:
        return None
    if found.get(f"target_{choice.unit}") != choice.target or found.get("kv") != msgspec.to_builtins(choice.kv):
        return None
    return Result(choice=choice, measured=msgspec.convert(found["measured"], Measured))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
