"""A driver of ModelOpt's ``mtq.auto_quantize``: its calibration, its scores, its selection of quantizers.

Subclasses replace ModelOpt 0.47's searchers during a call and extend their methods: groups are compared with the plan
before any work; windows are scored by several processes, and the sums over them saved every few seconds and resumed from there;
ModelOpt's state file is one, replaced atomically; and the selected formats are those that :mod:`.solve` chose from stored costs.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.nn.attention

from sglang_modelopt_ext.device import Device
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.workflow.autoquant.decoded import Quantized, decoded
from sglang_modelopt_ext.workflow.autoquant.formats import Candidate
from sglang_modelopt_ext.workflow.autoquant.parallel import process_groups, reduces, share_scales
from sglang_modelopt_ext.workflow.autoquant.rules import BASELINE
from sglang_modelopt_ext.workflow.autoquant.solve import Method
from sglang_modelopt_ext.workflow.autoquant.state import UNQUANTIZED, Group, KVSearch, Struct
from sglang_modelopt_ext.workflow.autoquant.sums import added, hparams, read_sums, restore_sums
from sglang_modelopt_ext.workflow.common.processes import Processes
from sglang_modelopt_ext.workflow.common.products import fast_products
from sglang_modelopt_ext.workflow.quantize.calibrate import modelopt_messages
from sglang_modelopt_ext.workflow.quantize.quantizers import fused_experts

SAVE_SECONDS = 5.0
_SCALE_STEP = 2.0**12
_SCALE_TRIES = 8
_ROUNDING = 1e-3


class Progress(Struct, frozen=True, kw_only=True):
    """Progress of scoring.

    Attributes:
        windows: number of scored windows.
        loss_scale: factor of the loss.
        sums: ModelOpt's sums over the scored windows by format and module, loss scale included.
        kv: what was measured of the KV cache; None before, and where it is not searched over.
    """

    windows: int = 0
    loss_scale: float = 1.0
    sums: dict[str, dict[str, float]] = msgspec.field(default_factory=dict)
    kv: KVSearch | None = None


def _own_attention() -> contextlib.AbstractContextManager[None]:
    """Attend by PyTorch's own kernels: where a machine's cuDNN is older than PyTorch's, cuDNN's backward pass is an error."""
    kernels = torch.nn.attention.SDPBackend
    return torch.nn.attention.sdpa_kernel([kernels.FLASH_ATTENTION, kernels.EFFICIENT_ATTENTION, kernels.MATH])


def group_scores(groups: Sequence[Group], progress: Progress) -> dict[str, dict[str, float]]:
    """Return the score of every group in every format, with the loss scale divided out.

    Raises:
        ModelOptExtError: a score is missing or not finite, or all of them are zero.
    """
    scores: dict[str, dict[str, float]] = {}
    for group in (group for group in groups if group.is_searched):
        for name in group.candidates.keys() - {UNQUANTIZED}:
            sums = progress.sums.get(name, {})
            parts = [sums[module] for module in group.modules if module in sums]
            value = sum(parts) / progress.loss_scale**2 if parts else math.nan
            if -_ROUNDING < value < 0:  # a divergence of zero, summed in float32
                value = 0.0
            if not 0 <= value < math.inf:
                raise ModelOptExtError.at("auto_quantize", f"{group.name}: {name}: score", "a finite number", value)
            scores.setdefault(group.name, {})[name] = value
    if not any(value for row in scores.values() for value in row.values()):
        raise ModelOptExtError.at(
            "auto_quantize", "scores", "some that are not zero", "zero for every layer and format"
        )
    return scores


@dataclass
class Scoring:
    """The windows to score and where to keep the sums.

    Attributes:
        batches: int64 ``[1, T]`` each.
        loss_scale: a fixed factor, or None to find one under which scores are of the order of 1.
        done: the progress, at first that of an earlier run.
        save: stores the progress; called after the first window and then every few seconds.
        saved: when that was, in seconds of the monotonic clock.
    """

    batches: Sequence[torch.Tensor]
    loss_scale: float | None
    done: Progress
    save: Callable[[Progress], None]
    saved: float = -math.inf

    def keep(self, progress: Progress) -> None:
        """Take progress over; store it where all windows are done, or a few seconds have passed."""
        self.done = progress
        if progress.windows == len(self.batches) or time.monotonic() - self.saved >= SAVE_SECONDS:
            self.save(progress)
            self.saved = time.monotonic()


@dataclass
class Search:
    """One call of ``mtq.auto_quantize``.

    Attributes:
        model: the unquantized model; it is quantized when the call is over.
        method: ModelOpt's scoring method.
        groups: the plan.
        formats: the candidates.
        calibration: int64 ``[B, T]`` each, all that the processes share.
        scoring: None to take ``pick`` without scoring.
        checkpoint: ModelOpt's own state file, in a private folder; None for no such file.
        pick: called after scoring, returns the format of each group by name.
        device: the model's.
        fixed: the configuration of groups without a choice that are quantized; None where there are none.
        served: the device on which layers are scored as they are exported and served; None to score ModelOpt's simulation.
        processes: those that share the windows, all in the same call.
    """

    model: Any
    method: Method
    groups: Sequence[Group]
    formats: Sequence[Candidate]
    calibration: Sequence[torch.Tensor]
    scoring: Scoring | None
    checkpoint: Path | None
    pick: Callable[[], Mapping[str, str]]
    device: str
    fixed: dict[str, Any] | None = None
    served: Device | None = None
    processes: Processes = field(default_factory=Processes)
    recipes: dict[Any, str] = field(default_factory=dict)
    in_scoring: bool = False
    in_parts: bool = False
    scale: float = 1.0

    def run(self) -> None:
        """Calibrate, score and quantize the model.

        Raises:
            ModelOptExtError: ModelOpt groups the layers differently, or a score is not finite.
        """
        import modelopt.torch.quantization as mtq
        from modelopt.torch.quantization.algorithms import QuantRecipe

        self.recipes = {QuantRecipe(quant_cfg=None): UNQUANTIZED}
        for candidate in self.formats:
            self.recipes[QuantRecipe(quant_cfg=candidate.config, name=candidate.name)] = candidate.name
        if self.fixed is not None:
            self.recipes[QuantRecipe(quant_cfg=self.fixed, name=BASELINE)] = BASELINE
        names = {candidate.name: candidate.config for candidate in self.formats}
        everywhere = {*names, UNQUANTIZED}
        spaces = [
            {
                "module_name_patterns": list(group.modules),
                "quantization_formats": [names[name] for name in self._offered(group)],
                "allow_no_quant": UNQUANTIZED in group.candidates,
            }
            for group in self.groups
            if self._offered(group) and (self.fixed is not None or group.candidates.keys() != everywhere)
        ]
        steps = len(self.scoring.batches) if self.scoring else 0
        with modelopt_messages(), _standing_in(self), fast_products(self.model.device), _own_attention():
            mtq.auto_quantize(
                self.model,
                constraints={"effective_bits": 16.0},
                quantization_formats=None if self.fixed is not None else list(names.values()),
                fixed_quantization_config=self.fixed,
                data_loader=_Loader(self),
                forward_step=self._forward,
                loss_func=self._loss,
                disabled_layers=self._left_alone(),
                num_calib_steps=len(self.calibration),
                num_score_steps=steps,
                method=self.method,
                checkpoint=None if self.checkpoint is None else str(self.checkpoint),
                module_search_spaces=spaces,
            )

    def calibrate(self, model: Any, algorithm: Any, run: Callable[[], Any]) -> Any:
        """Call ``run``, a calibration by ModelOpt, to the scales of one process.

        Where ModelOpt brings the maxima together, each process runs a part of the windows. Elsewhere each runs all of them. Experts
        also see them all: those that no token of a process reaches would have no maxima there.
        """
        if self.processes.world == 1:
            return run()
        experts = any(layer.experts for group in self.groups for layer in group.layers)
        self.in_parts = reduces(algorithm) and not experts
        with process_groups(self.processes, self.in_parts):
            result = run()
        if not self.in_parts:
            share_scales(model, self.processes)
        self.in_parts = False
        return result

    def _offered(self, group: Group) -> list[str]:
        return [candidate.name for candidate in self.formats if candidate.name in group.candidates]

    def _left_alone(self) -> list[str]:
        """Return the modules that stay unquantized, which ModelOpt would search over or quantize otherwise."""
        quantized = {
            module for group in self.groups if group.candidates.keys() - {UNQUANTIZED} for module in group.modules
        }
        kinds = (torch.nn.Linear, torch.nn.modules.conv._ConvNd)
        names = [name for name, module in self.model.named_modules() if isinstance(module, kinds)]
        names += [name for name, _ in fused_experts(self.model)]
        return [name for name in names if name not in quantized]

    def _forward(self, model: Any, batch: torch.Tensor) -> torch.Tensor:
        with contextlib.nullcontext() if self.in_scoring else torch.no_grad():
            logits: torch.Tensor = model(input_ids=batch, use_cache=False).logits
        return logits

    def _loss(self, logits: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        """Return the mean negative log probability of the tokens of ``batch``, times the loss scale."""
        return self.scale * torch.nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), batch[:, 1:].flatten()
        )

    def check_groups(self, searcher: Any) -> None:
        """Raise ModelOptExtError unless ModelOpt searches over the groups of the plan."""
        planned = {frozenset(group.modules) for group in self.groups if group.is_searched}
        found = {
            frozenset(hparam.quant_module_names) for _, hparam in hparams(searcher.model) if len(hparam.choices) > 1
        }
        if planned != found:
            differ = sorted(min(names) for names in planned ^ found)
            raise ModelOptExtError.at("auto_quantize", differ[0], "the groups of the plan", "other ones in ModelOpt")

    def estimate(self, searcher: Any, measure: Callable[[], None]) -> None:
        """Run ``measure``, ModelOpt's scoring, over the remaining windows, and keep the scores.

        Raises:
            ModelOptExtError: at every loss scale the scores are not finite or all zero.
        """
        if self.scoring is None:
            return
        self.in_scoring = True
        try:
            with self._as_served(searcher.model):
                self._score(searcher, measure, self.scoring)
        finally:
            self.in_scoring = False

    def _score(self, searcher: Any, measure: Callable[[], None], scoring: Scoring) -> None:
        done = scoring.done
        self.scale = done.loss_scale
        if done.windows == 0:
            self.scale = self.processes.from_first(lambda: self._find_scale(searcher, measure))
        restore_sums(searcher.model, self.recipes, self.method, {})
        if own := len(self.processes.share(scoring.batches[done.windows :])):
            searcher.config["num_score_steps"] = own
            measure()
        while scoring.done.windows < len(scoring.batches):
            self._add_windows(searcher.model, scoring)
        restore_sums(searcher.model, self.recipes, self.method, scoring.done.sums)

    def _add_windows(self, model: Any, scoring: Scoring) -> None:
        """Add the scores of one window of each process, in the order of the windows, whichever process has them."""
        rows = self.processes.gather(read_sums(model, self.recipes, self.method))
        restore_sums(model, self.recipes, self.method, {})
        done = scoring.done
        windows = min(done.windows + len(rows), len(scoring.batches))
        sums = added(done.sums, rows[: windows - done.windows])
        scoring.keep(msgspec.structs.replace(done, windows=windows, loss_scale=self.scale, sums=sums))

    @contextlib.contextmanager
    def _as_served(self, model: Any) -> Iterator[None]:
        """Make ModelOpt's quantizers of every candidate return what is served, where that is asked for, while the block runs."""
        with contextlib.ExitStack() as stack:
            names = {module: name for name, module in model.named_modules()}
            schemes = {candidate.name: candidate.scheme for candidate in self.formats}
            for _, hparam in hparams(model) if self.served is not None else ():
                for recipe, choices in hparam._all_quantizer_choices.items():
                    scheme = schemes.get(self.recipes.get(recipe, UNQUANTIZED))
                    if scheme is not None and self.served is not None:
                        layers = [Quantized(names[module], module, own) for module, own in choices.items()]
                        stack.enter_context(decoded(layers, scheme, self.served))
            yield

    def _find_scale(self, searcher: Any, measure: Callable[[], None]) -> float:
        """Return a power of two under which the largest score of one window is about 1; scores grow with its square.

        Gradients of a small loss underflow in half precision, and their squares in any.
        """
        assert self.scoring is not None
        if self.scoring.loss_scale is not None or self.method != "gradient":
            return self.scoring.loss_scale or 1.0
        searcher.config["num_score_steps"] = 1
        scale, every = 1.0, self.scoring.batches
        self.scoring.batches = every[:1]
        try:
            for _ in range(_SCALE_TRIES):
                self.scale = scale
                restore_sums(searcher.model, self.recipes, self.method, {})
                measure()
                rows = read_sums(searcher.model, self.recipes, self.method).values()
                sums = [value for row in rows for value in row.values()]
                if not all(math.isfinite(value) for value in sums):
                    scale /= _SCALE_STEP
                elif not any(sums):
                    scale *= _SCALE_STEP
                else:
                    return float(scale * 2.0 ** round(-math.log2(max(sums)) / 2))
        finally:
            self.scoring.batches = every
        raise ModelOptExtError.at(
            "auto_quantize", "scores", "finite ones that are not all zero, at some loss scale", sums[0]
        )

    def batches(self, model: Any) -> Iterator[torch.Tensor]:
        """Yield the windows of one pass of ModelOpt over its data loader."""
        if not self.in_scoring or self.scoring is None:
            calibration = self.processes.share(self.calibration) if self.in_parts else self.calibration
            yield from (batch.to(self.device) for batch in calibration)
            return
        own = self.processes.share(self.scoring.batches[self.scoring.done.windows :])
        for number, batch in enumerate(own):
            # When ModelOpt requests the next window, it has scored the one before.
            if number:
                self._add_windows(model, self.scoring)
            yield batch.to(self.device)

    def chosen(self, searcher: Any) -> dict[str, dict[str, Any]]:
        """Return ModelOpt's description of the picked formats."""
        picked = self.pick()
        info = {}
        for name, hparam in hparams(searcher.model):
            wanted = picked.get(hparam.name, UNQUANTIZED)
            recipe = next(recipe for recipe in hparam.choices if self.recipes[recipe] == wanted)
            info[name] = {"format": recipe, "costs": hparam.get_cost(recipe), "scores": 0.0}
        return info


@dataclass
class _Loader:
    search: Search

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self.search.batches(self.search.model)


@contextlib.contextmanager
def _standing_in(search: Search) -> Iterator[None]:
    """Make ``mtq.auto_quantize`` use searchers that report to ``search`` while the block runs."""
    from modelopt.torch.quantization import model_quant
    from modelopt.torch.quantization.algorithms import QuantRecipe

    calibrate = model_quant.calibrate

    def calibrated(model: Any, algorithm: Any = "max", forward_loop: Any = None) -> Any:
        return search.calibrate(model, algorithm, lambda: calibrate(model, algorithm, forward_loop))

    names = ("AutoQuantizeGradientSearcher", "AutoQuantizeKLDivSearcher")
    originals = {name: getattr(model_quant, name) for name in names}
    name_of = QuantRecipe.get_auto_name_for_config

    def named(config: Any) -> str | None:
        own = next((candidate.name for candidate in search.formats if config == candidate.config), None)
        return own or name_of(config)

    try:
        QuantRecipe.get_auto_name_for_config = staticmethod(named)  # the label of these configurations in progress bars
        for name, original in originals.items():
            setattr(model_quant, name, _extend(original, search))
        model_quant.calibrate = calibrated
        yield
    finally:
        model_quant.calibrate = calibrate
        for name, original in originals.items():
            setattr(model_quant, name, original)
        QuantRecipe.get_auto_name_for_config = staticmethod(name_of)
        # ModelOpt disables the folding of smoothing during a search, and restores it only at the end.
        QuantRecipe.fold_pqs_to_weights(torch.nn.Identity())


def _extend(base: Any, search: Search) -> type:
    def insert(self: Any, *args: Any, **kwargs: Any) -> None:
        base.insert_hparams_after_merge_rules(self, *args, **kwargs)
        search.check_groups(self)

    def estimate(self: Any) -> None:
        # ModelOpt relies on the default of a defaultdict, but its state file gives back a plain dict.
        self.candidate_stats = defaultdict(dict, self.candidate_stats)
        search.estimate(self, lambda: base.estimate_sensitivity_scores(self))

    def choose(self: Any, max_weight_size: float, verbose: bool = False) -> tuple[dict[str, dict[str, Any]], bool]:
        del max_weight_size, verbose
        return search.chosen(self), True

    def load(self: Any) -> bool:
        found: bool = base.load_search_checkpoint(self)
        state = search.processes.from_first(lambda: self.state_dict() if found else None)
        for key, value in (state or {}).items():
            setattr(self, key, value)
        return state is not None

    def path(self: Any) -> Any:
        # ModelOpt's own is of one process, so that as many would have to resume.
        return self.config["checkpoint"]

    def save(self: Any, verbose: bool = False) -> None:
        checkpoint = self.config["checkpoint"]
        if checkpoint is None:
            return
        partial = Path(checkpoint).with_suffix(".partial.pth")
        self.config["checkpoint"] = str(partial)
        try:
            base.save_search_checkpoint(self, verbose)
        finally:
            self.config["checkpoint"] = checkpoint
        partial.replace(checkpoint)

    methods = {
        "insert_hparams_after_merge_rules": insert,
        "estimate_sensitivity_scores": estimate,
        "run_search_with_stats": choose,
        "load_search_checkpoint": load,
        "save_search_checkpoint": save,
        "_get_checkpoint_path": path,
    }
    return type(base.__name__, (base,), methods)
