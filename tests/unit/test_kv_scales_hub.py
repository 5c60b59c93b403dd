"""The KV cache of a model on the hub: what is known before its weights are downloaded, and after."""

from __future__ import annotations

import functools
import http.server
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("sglang")

from sglang_modelopt_ext.checkpoint import hub as hub_module
from sglang_modelopt_ext.checkpoint.hub import hub_model, hub_tensor_names
from sglang_modelopt_ext.checkpoint.tensors import read_headers, tensor_names
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.integration.kv import scales as kv_scales
from sglang_modelopt_ext.integration.kv.layers import served_attention
from tests.support import edits
from tests.support.kv_exports import kv_export
from tests.support.kv_runtime import Runtime, plain_names, weights
from tests.support.kv_trees import attention_model, kv_folder, layers, scales_of


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    return Runtime(monkeypatch)


class Hub:
    """The cache of a hub that cannot be reached, and a model in it that comes file by file."""

    NAME, REVISION = "someone/model", "0" * 40

    def __init__(self, root: Path, source: Path) -> None:
        self.source = source
        self.snapshot = root / "models--someone--model" / "snapshots" / self.REVISION
        self.snapshot.mkdir(parents=True)
        refs = root / "models--someone--model" / "refs"
        refs.mkdir()
        (refs / "main").write_text(self.REVISION)

    def fetch(self, *patterns: str) -> None:
        for pattern in patterns:
            for file in self.source.glob(pattern):
                shutil.copyfile(file, self.snapshot / file.name)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Hub]:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    return lambda source: Hub(tmp_path / "hub", source)


def test_the_first_start_of_a_hub_model_has_the_scales_of_the_second(
    runtime: Runtime, hub: Callable[[Path], Hub], tmp_path: Path
) -> None:
    """Nothing but the configuration is there when the arguments are settled; the weights come with the scheduler."""
    folder = kv_folder(tmp_path / "source", layers("model.layers.{}.self_attn", (0, 1)))
    cache = hub(folder)
    cache.fetch("*.json")
    found = []
    for _ in range(2):
        runtime.start(Hub.NAME)
        cache.fetch("*.safetensors")
        model = attention_model(scales=True)
        assert runtime.load(model, Hub.NAME, weights(folder)) == plain_names(folder)
        found.append(scales_of(model)["model.layers.1.self_attn"])
    assert found == [(1.5, 1.25)] * 2


def test_a_pool_of_ours_likewise(runtime: Runtime, hub: Callable[[Path], Hub], tmp_path: Path) -> None:
    folder = kv_folder(tmp_path / "source", layers("model.layers.{}.self_attn", (0, 1)))
    cache = hub(folder)
    cache.fetch("*.json")
    runtime.start(Hub.NAME, device="cpu")
    assert runtime.model.kv_cache_dtype == "modelopt_fp8"
    cache.fetch("*.safetensors")
    runtime.load(attention_model(scales=True), Hub.NAME, weights(folder))
    plan = kv_scales.served_plan(runtime.args, "modelopt_fp8")
    assert plan.resolve(served_attention(attention_model(scales=True))).layers[1].k_scale == 1.5


def test_weights_that_are_not_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their scales are not replaced by those of an uncalibrated cache, except for dummy weights, which have none."""
    monkeypatch.setattr(kv_scales, "downloaded_folder", lambda *_: None)
    fields = {"model_path": str(kv_export("nvfp4")), "revision": None, "download_dir": None}
    with pytest.raises(ModelOptExtError, match="k_scale, v_scale: expected the weights that were loaded, got no such"):
        kv_scales.served_plan(SimpleNamespace(load_format="auto", **fields), "modelopt_nvfp4")
    assert kv_scales.served_plan(SimpleNamespace(load_format="dummy", **fields), "modelopt_nvfp4").stored is None
    assert kv_scales.scales_for_sglang(SimpleNamespace(**fields), None, "nvfp4") is None


def test_biases_are_known_from_the_index_of_a_hub_model(
    runtime: Runtime, hub: Callable[[Path], Hub], tmp_path: Path
) -> None:
    cache = hub(edits.copy_with(kv_export("fp8_affine"), tmp_path / "source", [edits.shard()]))
    cache.fetch("*.json")
    runtime.start(Hub.NAME)
    assert runtime.model.kv_cache_dtype == "modelopt_fp8_affine"


class HubServer(http.server.SimpleHTTPRequestHandler):
    """The hub's answers for files, whole whatever range is asked for."""

    def translate_path(self, path: str) -> str:
        prefix = f"/{Hub.NAME}/resolve/{Hub.REVISION}/"
        return str(Path(self.directory) / path.removeprefix(prefix)) if path.startswith(prefix) else "/nothing"

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], None]]:
    """A hub that can be reached, with one model."""
    import huggingface_hub.constants as constants

    with ExitStack() as stack:

        def serve(source: Path) -> None:
            handler = functools.partial(HubServer, directory=str(source))
            server = stack.enter_context(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
            stack.callback(server.shutdown)
            threading.Thread(target=server.serve_forever, daemon=True).start()
            files = f"http://127.0.0.1:{server.server_port}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
            monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

        hub_tensor_names.cache_clear()
        yield serve
        hub_tensor_names.cache_clear()


def test_biases_are_known_from_the_header_of_a_hub_model_of_one_file(
    runtime: Runtime, hub: Callable[[Path], Hub], online: Callable[[Path], None], tmp_path: Path
) -> None:
    """The first start chooses the recipe of the second, and downloads no weights for it."""
    folder = kv_export("fp8_affine")
    cache = hub(folder)
    cache.fetch("*.json")
    online(folder)
    assert set(tensor_names(cache.snapshot)) == set(read_headers(folder))
    assert not list(cache.snapshot.glob("*.safetensors"))
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:  # the configuration's files come from the cache
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        runtime.start(Hub.NAME)
    assert runtime.model.kv_cache_dtype == "modelopt_fp8_affine"


def test_a_hub_that_does_not_have_the_file(
    hub: Callable[[Path], Hub], online: Callable[[Path], None], tmp_path: Path
) -> None:
    cache = hub(kv_export("fp8_affine"))
    cache.fetch("*.json")
    online(tmp_path)
    assert list(tensor_names(cache.snapshot)) == []


def test_biases_that_nobody_knew_of_before_the_download(
    runtime: Runtime, hub: Callable[[Path], Hub], tmp_path: Path
) -> None:
    """Offline, without an index, FP8 was taken for plain: one line, and the second start knows. Never FP8 without the bias."""
    folder = kv_export("fp8_affine")
    cache = hub(folder)
    cache.fetch("*.json")
    runtime.start(Hub.NAME)
    assert runtime.model.kv_cache_dtype == "auto"
    cache.fetch("*.safetensors")
    with pytest.raises(
        ModelOptExtError, match=r"k_bias, v_bias: expected no biases, as the recipe was chosen before the download"
    ):
        runtime.load(attention_model(scales=True), Hub.NAME, weights(folder))
    runtime.start(Hub.NAME)
    assert runtime.model.kv_cache_dtype == "modelopt_fp8_affine"


def test_a_servers_processes_have_the_answer_of_the_launching_one(
    hub: Callable[[Path], Hub], online: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = kv_export("fp8_affine")
    cache = hub(folder)
    cache.fetch("*.json")
    monkeypatch.setenv("SGLANG_MODELOPT_EXT_ERROR_FILE", str(tmp_path / "error"))
    assert list(tensor_names(cache.snapshot)) == []  # offline
    online(folder)
    hub_tensor_names.cache_clear()  # another process, which could ask
    assert list(tensor_names(cache.snapshot)) == []


def test_the_first_answer_counts_for_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks may ask at once where the launching process had no reason to."""
    monkeypatch.setenv("SGLANG_MODELOPT_EXT_ERROR_FILE", str(tmp_path / "error"))
    hub_tensor_names.cache_clear()

    def slower(name: str, revision: str) -> list[str]:
        monkeypatch.setattr(hub_module, "ask_hub", lambda *_: ["of the faster"])
        assert set(hub_tensor_names.__wrapped__(name, revision)) == {"of the faster"}
        return ["of the slower"]

    monkeypatch.setattr(hub_module, "ask_hub", slower)
    assert set(hub_tensor_names(Hub.NAME, Hub.REVISION)) == {"of the faster"}
    assert [file.suffix for file in tmp_path.iterdir()] == [".json"]
    hub_tensor_names.cache_clear()


@pytest.mark.parametrize(
    ("folder", "model"),
    [
        ("models--someone--model/snapshots/abc", ("someone/model", "abc")),
        ("models--someone--a--b/snapshots/abc", ("someone/a--b", "abc")),
        ("models--gpt2/snapshots/abc", ("gpt2", "abc")),
        ("datasets--someone--text/snapshots/abc", None),
        ("models--someone--model/refs/abc", None),
        ("model", None),
    ],
)
def test_the_name_of_a_hub_model_by_its_folder(folder: str, model: tuple[str, str] | None) -> None:
    assert hub_model(Path("/cache", folder)) == model
