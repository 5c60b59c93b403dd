"""Weight updates from tensors: SGLang's own updater over layers of a real export, in this process."""

from __future__ import annotations

import functools
import pkgutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers import io_struct
from sglang.srt.managers.scheduler_components import weight_updater as managers
from sglang.srt.model_executor.model_runner_components import weight_updater as updaters
from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

from sglang_modelopt_ext.integration import loading, updates
from sglang_modelopt_ext.integration.loading import ext_config, quantized_modules
from tests.layers import harness
from tests.layers.test_recipes import layer_inputs
from tests.support import edits
from tests.support.exports import export
from tests.support.models import TinyModel, model_dir

W4A8 = "W4A8_NVFP4_FP8_CFG"
LAYER = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def folders() -> tuple[Path, Path]:
    """Return two exports of one recipe: the one that is served, and the one whose tensors arrive."""
    served, arriving = (export(model_dir(TinyModel("llama", seed=seed)), W4A8) for seed in (0, 5))
    return served, arriving


@pytest.fixture(scope="module")
def _group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def _wrapped(hook: Any, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        return hook.around(original, *args, **kwargs)

    return call


class Server:
    """A scheduler's updater over the layers of a checkpoint, with the hooks of this package."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.model, checkpoint = harness.build(folder)
        config = ext_config(self.model)
        assert config is not None
        config.used = frozenset(checkpoint.tensors)
        for hook in (*updates.HOOKS, *loading.HOOKS[:1]):
            owner, _, name = hook.target.rpartition(".")
            place = pkgutil.resolve_name(owner)
            is_static = isinstance(place.__dict__[name], staticmethod)
            wrapped = _wrapped(hook, getattr(place, name))
            monkeypatch.setattr(place, name, staticmethod(wrapped) if is_static else wrapped)
        self.parallel = SimpleNamespace(pp_size=1, tp_rank=0)
        monkeypatch.setattr("sglang.srt.runtime_context.get_parallel", lambda: self.parallel)
        monkeypatch.setattr(updaters, "get_parallel", lambda: self.parallel)
        # It changes how every tensor of a process is pickled, to a way for CUDA alone.
        monkeypatch.setattr(updaters, "monkey_patch_torch_reductions", lambda: None)
        monkeypatch.setattr(updaters, "get_model", lambda: SimpleNamespace(weight_cache_mode="off"))
        runner = SimpleNamespace(
            device="cpu", **dict.fromkeys(("decode_cuda_graph_runner", "prefill_cuda_graph_runner"))
        )
        fields: dict[str, Any] = {
            "custom_weight_loaders": {},
            "update_model_fields": None,
            "recapture_cuda_graph": None,
        }
        runner.weight_updater = updaters.WeightUpdater(
            tp_rank=0,
            device="cpu",
            gpu_id=0,
            model_config=SimpleNamespace(dtype=torch.float32),
            get_model=lambda: self.model,
            get_model_runner=lambda: runner,
            **fields,
        )
        self.updater = runner.weight_updater
        self.manager = object.__new__(managers.SchedulerWeightUpdaterManager)
        self.manager.tp_worker = SimpleNamespace(weight_update_runners=lambda: [("target", runner)])
        self.manager.draft_worker = self.manager.tp_cpu_group = self.manager._session = None
        self.idle = True
        self.manager.flush_cache = lambda **_: self.idle

    def outputs(self) -> list[torch.Tensor]:
        """Return the output of every layer for one input."""
        return outputs(self.model)

    def begin(self) -> tuple[bool, str]:
        answer = self.manager.begin_weight_update(io_struct.BeginWeightUpdateReqInput(selector="all"))
        return answer.success, answer.message

    def end(self) -> tuple[bool, str]:
        answer = self.manager.end_weight_update(io_struct.EndWeightUpdateReqInput())
        return answer.success, answer.message


def outputs(model: torch.nn.Module) -> list[torch.Tensor]:
    return [
        method.apply(module, layer_inputs(module.input_size, torch.float32))
        for module, method in quantized_modules(model)
    ]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture
def server(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, _group: None) -> Server:
    return Server(folders[0], monkeypatch)


@pytest.mark.parametrize("way", ["tensors", "bucket", "distributed"])
def test_all_tensors_in_several_calls(way: str, server: Server, folders: tuple[Path, Path]) -> None:
    """The old weights serve until the session ends, and a second session replaces the first one's."""
    for folder in (folders[1], folders[0]):
        before, expected = server.outputs(), outputs(harness.build(folder)[0])
        assert server.begin() == (True, "Success")
        named = list(edits.read_tensors(folder).items())
        for part in (named[::2], named[1::2]):
            if way == "bucket":
                bucket = FlattenedTensorBucket(named_tensors=part)
                content = {"flattened_tensor": bucket.get_flattened_tensor(), "metadata": bucket.get_metadata()}
                assert server.updater.update_weights_from_tensor(content, "flattened_bucket")[0]
            elif way == "distributed":
                assert server.updater.load_weights_from_distributed(part)[0]
            else:
                assert server.updater.update_weights_from_tensor(part)[0]
            for _, tensor in part:
                tensor.reshape(-1).view(torch.uint8).zero_()  # the sender's memory is its own again
            assert same(server.outputs(), before)
        assert server.end() == (True, "Success")
        assert same(server.outputs(), expected)


def test_the_cache_is_of_the_old_weights(server: Server, folders: tuple[Path, Path]) -> None:
    server.begin()
    server.updater.update_weights_from_tensor(list(edits.read_tensors(folders[1]).items()))
    server.idle = False
    success, message = server.end()
    assert success
    assert "the cache was not flushed because requests are still running" in message


Change = Callable[[dict[str, torch.Tensor]], None]


def _nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{LAYER}.weight_scale"].view(torch.uint8)[0, 0] = 0x7F


def _zero_block(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{LAYER}.weight_scale"].view(torch.uint8)[:] = 0


def _drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[f"{LAYER}.input_scale"], tensors["model.norm.weight"]


def _widen(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{LAYER}.weight"] = tensors[f"{LAYER}.weight"].repeat(1, 2)


def _cast(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()


def _rename(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.7.mlp.down_proj.weight"] = tensors[f"{LAYER}.weight"]


def _cache(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.self_attn.k_proj.k_scale"] = torch.ones(())


FAULTS: dict[str, tuple[Change, str]] = {
    "NaN scale": (_nan, f"weight update: {LAYER}.weight_scale: expected finite e4m3 block scales, got NaN"),
    "zero scale": (_zero_block, f"{LAYER}.weight_scale: expected a zero block scale only over all-zero codes"),
    "missing": (_drop, f"{LAYER}.input_scale: expected every tensor of the served checkpoint, got none (and 1 more)"),
    "shape": (_widen, f"{LAYER}.weight: expected uint8 [256, 256], got uint8 [256, 512]"),
    "type": (_cast, "model.norm.weight: expected bfloat16 [256], got float32 [256]"),
    "unknown": (
        _rename,
        "model.layers.7.mlp.down_proj.weight: expected a tensor of the served checkpoint, got an unknown",
    ),
    "KV cache": (_cache, "k_proj.k_scale: expected a tensor of the served checkpoint, got an unknown one"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_session_changes_nothing(fault: str, server: Server, folders: tuple[Path, Path]) -> None:
    change, expected = FAULTS[fault]
    before = server.outputs()
    tensors = {name: tensor.clone() for name, tensor in edits.read_tensors(folders[1]).items()}
    change(tensors)
    assert server.begin()[0]
    arrived, message = server.updater.update_weights_from_tensor(list(tensors.items()))
    success, ended = server.end()
    assert not success
    assert expected in ended
    assert arrived or expected in message
    assert same(server.outputs(), before)
    assert server.begin()[0], "a session that failed is closed"


def test_a_fault_of_another_rank(server: Server, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """No rank changes anything where one finds a fault."""

    def gather(found: list[str | None], mine: str | None, group: Any) -> None:
        assert mine is None
        found[:] = [mine, "ModelOptExtError: theirs"]

    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    before = server.outputs()
    server.begin()
    server.updater.update_weights_from_tensor(list(edits.read_tensors(folders[1]).items()))
    assert server.end() == (False, "ModelOptExtError: theirs")
    assert same(server.outputs(), before)


def test_what_is_refused_at_once(server: Server, folders: tuple[Path, Path]) -> None:
    part = list(edits.read_tensors(folders[1]).items())[:1]
    assert "session: expected an open one" in server.updater.update_weights_from_tensor(part)[1]
    assert server.begin()[0]
    assert server.updater.update_weights_from_tensor(part)[0]
    assert "expected one copy in a session" in server.updater.update_weights_from_tensor(part)[1]
    assert (
        "load_format: expected none or flattened_bucket" in server.updater.update_weights_from_tensor(part, "direct")[1]
    )
    assert "update_weights_from_ipc" in server.updater.update_weights_from_ipc(None)[1]
    server.end()
    server.parallel.pp_size = 2
    success, message = server.begin()
    assert not success
    assert "--pp-size: expected 1" in message
