"""The walk: for each model class what it loads, what it builds, and the reason where it does neither.

Every step is a process of its own, forked from one that has imported everything: SGLang builds models from globals of the process.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.schemes.table import SCHEMES, UMBRELLA
from tests.model_classes.configs import config_class, meta_model, save, small_config
from tests.model_classes.export import RECIPES, NoExport, Recipe, write

SECONDS = 180
"""Longest time of one step."""

BACKENDS = ("torch_native", "triton", "intel_amx")
"""SGLang's attention on a CPU, and others that classes ask for."""

NEED_OPERATORS = ("sglang.srt.models.qwen3_5", "sglang.srt.models.grok")
"""Modules of classes that name operators of SGLang's CPU kernels when they are imported; nothing calls them here."""

LOADED = "loads"
LONGEST = 240
"""Most characters of a reason."""


@dataclass
class Found:
    """What the walk found of one class.

    Attributes:
        loads: by algorithm, :data:`LOADED` or the reason why an export does not load; empty where none can be described.
        export: the reason why no export can be described, empty where it can.
        builds: by algorithm, the reason why the class cannot be built with dummy weights; the empty string where it can.
        kv_cache: the reason why this package's KV caches are not served with it; the empty string where they are.
    """

    loads: dict[str, str] = field(default_factory=dict)
    export: str = ""
    builds: dict[str, str] = field(default_factory=dict)
    kv_cache: str = ""


class StepFailed(Exception):
    """A step ended with an error; the message is its type and first line."""


def forked(step: Callable[[], Any], log: Path) -> Any:
    """Return the result of ``step``, which JSON can hold, computed in a process of its own.

    Raises:
        StepFailed: it raised, was killed, or took more than :data:`SECONDS`.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(file, 1)
        os.dup2(file, 2)
        signal.alarm(SECONDS)
        try:
            answer = {"result": step()}
        except BaseException as error:  # whatever SGLang raises is the result
            traceback.print_exc()
            answer = {"failed": one_line(error)}
        sys.stdout.flush()
        os.write(writing, json.dumps(answer).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(child, 0)
    answer = json.loads(data) if data else {"failed": f"ended by signal {os.WTERMSIG(status)}"}
    if "failed" in answer:
        raise StepFailed(answer["failed"])
    return answer["result"]


def one_line(error: BaseException) -> str:
    """Return the type and first line of an error, and the file of another package that raised it."""
    text = clean((str(error).strip().splitlines() or [""])[0])
    *_, place = traceback.extract_tb(error.__traceback__)[-1].filename.rpartition("site-packages/")
    if isinstance(error, (ModelOptExtError, NoExport)):
        return text
    return (
        f"{type(error).__name__}: {text} ({place})" if not place.startswith("/") else f"{type(error).__name__}: {text}"
    )


def clean(text: str) -> str:
    """Return a message without the folder that the export was written to."""
    text = re.sub(r"/\S*/export(-\w+)?(/|: )", "", text)
    return re.sub(r"/\S*/export(-\w+)?", "DIR", text)[:LONGEST]


def preload() -> None:
    """Import all that a step needs, SGLang's model classes among it."""
    for module in NEED_OPERATORS:
        _define_operators_of(module)
    import transformers  # noqa: F401
    from sglang.srt.models.registry import ModelRegistry
    from sglang.srt.plugins import load_plugins

    import sglang_modelopt_ext.integration.rehearsal  # noqa: F401

    load_plugins()
    ModelRegistry.get_supported_archs()


_KEPT: list[torch.library.Library] = []


def _define_operators_of(module: str) -> None:
    """Import ``module``, and define each operator without a function that it asks for."""
    library = torch.library.Library("sgl_kernel", "FRAGMENT")
    _KEPT.append(library)
    while True:
        try:
            importlib.import_module(module)
        except AttributeError as error:
            library.define(f"{error.name}(Tensor x) -> Tensor")
        else:
            return


def walk(architecture: str, folder: Path, recipes: Iterable[Recipe] = RECIPES) -> Found:
    """Return what is found of one class; ``folder`` is an empty one for exports and logs."""
    from sglang.srt.models.registry import ModelRegistry

    found = Found()
    log = folder / "log"
    if architecture not in ModelRegistry.models:
        found.export = "its module in SGLang is imported on a GPU only, or with packages that SGLang does not install"
        return found
    cls = config_class(architecture)
    if cls is None:
        found.export = "its configuration is code of the checkpoint, which neither transformers nor SGLang has"
        return found
    try:
        found.builds, found.kv_cache = _with_a_backend(partial(_build, folder / "export", architecture, cls), log)
    except StepFailed as error:
        found.builds = dict.fromkeys(SCHEMES, str(error))
    shutil.rmtree(folder / "export", ignore_errors=True)
    for recipe in recipes:
        export = folder / f"export-{recipe.algo}"
        try:
            if not forked(partial(_write, export, architecture, cls, recipe), log):
                found.export = "transformers has no class of this name, whose tensors a checkpoint would have"
                break
        except StepFailed as error:
            found.loads[recipe.algo] = f"no export: {error}"
            continue
        found.loads[recipe.algo] = _load(export, log)
        shutil.rmtree(export)
    if any(reason not in (LOADED, "") for reason in found.loads.values()):
        _explain(found, folder / "export", architecture, cls, log)
    return found


def _build(folder: Path, architecture: str, cls: type[Any], backend: str) -> tuple[dict[str, str], str]:
    """Build the class with dummy weights of every algorithm; return the reason for each that fails, and for KV caches."""
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.model_loader.loader import _get_quantization_config, _initialize_model
    from sglang.srt.model_loader.utils import set_default_torch_dtype

    from sglang_modelopt_ext.integration.kv.hooks import NOT_BY_TRITON
    from sglang_modelopt_ext.integration.kv.hybrid import unserved_pool
    from sglang_modelopt_ext.integration.rehearsal import _resolve

    save(small_config(architecture, cls), folder)
    load, reasons, config, kv_cache = LoadConfig(load_format="dummy"), {}, None, ""
    for algo, row in SCHEMES.items():
        section = {"quant_algo": algo, "exclude_modules": ["lm_head"], "group_size": row.group_sizes[0] or None}
        content = {"producer": {"name": "modelopt"}, "quantization": section}
        (folder / "hf_quant_config.json").write_text(json.dumps(content))
        if config is None:
            config = _resolve(folder, ["--load-format", "dummy", "--attention-backend", backend])
        config.quantization = UMBRELLA
        try:
            quantization = _get_quantization_config(config, load)
            with set_default_torch_dtype(config.dtype), torch.device("meta"):
                _initialize_model(config, load, quantization)
            kv_cache = "SGLang's Triton attention" if architecture in NOT_BY_TRITON else unserved_pool(config) or ""
        except Exception as error:  # whatever SGLang raises is the result
            traceback.print_exc()
            reasons[algo] = one_line(error)
    return reasons, kv_cache


def _write(folder: Path, architecture: str, cls: type[Any], recipe: Recipe | None) -> bool:
    model = meta_model(architecture, small_config(architecture, cls))
    if model is None:
        return False
    write(folder, model, recipe)
    return True


def _load(export: Path, log: Path) -> str:
    """Return :data:`LOADED`, or the first error of this package, or of SGLang."""
    from sglang_modelopt_ext.integration.rehearsal import rehearse

    def load(backend: str) -> str:
        problems = rehearse(export, ["--attention-backend", backend], True)["problems"]
        return clean(problems[0]) if problems else LOADED

    try:
        return str(_with_a_backend(load, log))
    except StepFailed as error:
        return str(error)


def _with_a_backend(step: Callable[[str], Any], log: Path) -> Any:
    """Return the result of ``step`` with the first of :data:`BACKENDS` that SGLang takes.

    Raises:
        StepFailed: it fails with each; the error is the last that is no complaint about the backend.
    """
    failed: StepFailed | None = None
    for backend in BACKENDS:
        try:
            return forked(partial(step, backend), log)
        except StepFailed as error:
            if failed is None or "backend" in str(failed):
                failed = error
    assert failed is not None
    raise failed


def _explain(found: Found, export: Path, architecture: str, cls: type[Any], log: Path) -> None:
    """Say of each reason whether the unquantized class fails too: then it is SGLang's, on a machine without a GPU."""
    try:
        forked(lambda: _write(export, architecture, cls, None), log)
    except StepFailed as error:
        found.export = f"transformers: {error}"
        found.loads.clear()
        return
    try:
        _with_a_backend(lambda backend: _load_unquantized(export, backend), log)
    except StepFailed as error:
        for algo, old in found.loads.items():
            if old != LOADED and not old.startswith("no export"):
                found.loads[algo] = f"SGLang, unquantized too: {error}"
    shutil.rmtree(export, ignore_errors=True)


def _load_unquantized(export: Path, backend: str) -> None:
    from safetensors import safe_open
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.model_loader.loader import _initialize_model
    from sglang.srt.model_loader.utils import set_default_torch_dtype

    from sglang_modelopt_ext.integration.rehearsal import _resolve

    config = _resolve(export, ["--attention-backend", backend])
    with set_default_torch_dtype(config.dtype), torch.device("meta"):
        model = _initialize_model(config, LoadConfig(), None)

    def tensors() -> Iterable[tuple[str, torch.Tensor]]:
        for file in sorted(export.glob("*.safetensors")):
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    yield name, torch.empty(opened.get_slice(name).get_shape(), dtype=torch.bfloat16, device="meta")

    model.load_weights(tensors())


def walk_all(architectures: Iterable[str], recipes: Iterable[Recipe] = RECIPES) -> Iterable[tuple[str, Found]]:
    """Yield what is found of each class."""
    for architecture in architectures:
        folder = Path(tempfile.mkdtemp(prefix="model-class-"))
        try:
            yield architecture, walk(architecture, folder, recipes)
        finally:
            shutil.rmtree(folder)
