"""Exports are made once, reproducibly, and leave no trace; edits change what they say."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support import cache, edits
from tests.support.exports import Variant, export
from tests.support.models import random_ids

Builder = Callable[..., Path]
NVFP4 = "W4A8_NVFP4_FP8_CFG"
QUERY = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(cache.ENVIRONMENT, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def copy(tiny_export: Builder, tmp_path: Path) -> Callable[..., Path]:
    """Return ``copy(edit, ...)``: a copy of an export with the edits."""
    return lambda *changes: edits.copy_with(tiny_export(NVFP4), tmp_path / "copy", changes)


def test_an_export_is_reproducible_and_leaves_transformers_alone(
    tiny_model: Builder, tiny_export: Builder, empty_cache: Path
):
    from transformers import AutoModelForCausalLM

    ids = torch.tensor([random_ids(32, seed=0)])

    @torch.no_grad()
    def logits() -> torch.Tensor:
        return AutoModelForCausalLM.from_pretrained(model)(ids).logits

    model = tiny_model_outside(tiny_model, empty_cache)
    before = logits()
    state = torch.get_rng_state()
    first = export(model, NVFP4)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(logits(), before)
    assert first.is_relative_to(empty_cache)
    written = (first / "model.safetensors").stat().st_mtime_ns
    assert export(model, NVFP4) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == written
    digest = cache.folder_digest(first)
    first.rename(first.with_name("moved"))
    assert cache.folder_digest(export(model, NVFP4)) == digest


def tiny_model_outside(tiny_model: Builder, empty_cache: Path) -> Path:
    """Return a model in the empty cache."""
    folder = tiny_model()
    assert folder.is_relative_to(empty_cache)
    return folder


def test_variants(tiny_export: Builder):
    plain = tiny_export(NVFP4)
    other_data = tiny_export(NVFP4, variant=Variant(calibration_seed=1))
    name = f"{QUERY}.input_scale"
    assert edits.read_tensors(plain)[name] != edits.read_tensors(other_data)[name]

    varied = tiny_export(NVFP4, variant=Variant(kv_cache="FP8_KV_CFG", exclude=("*layers.0.mlp*",)))
    section = json.loads((varied / edits.QUANT_CONFIG).read_text())["quantization"]
    assert section["kv_cache_quant_algo"] == "FP8"
    assert "model.layers.0.mlp*" in section["exclude_modules"]
    assert "model.layers.0.mlp.up_proj.weight_scale" not in edits.read_tensors(varied)

    several = tiny_export(NVFP4, variant=Variant(max_shard_size="300KB"))
    assert (several / edits.INDEX).exists()
    assert same(edits.read_tensors(several), edits.read_tensors(plain))


def test_a_recipe_may_be_a_configuration(tiny_export: Builder):
    import modelopt.torch.quantization as mtq

    folder = tiny_export(mtq.W4A8_MXFP4_FP8_CFG)
    assert folder != tiny_export("W4A8_MXFP4_FP8_CFG")
    assert same(edits.read_tensors(folder), edits.read_tensors(tiny_export("W4A8_MXFP4_FP8_CFG")))


def test_concurrent_makers_agree(empty_cache: Path):
    """Everyone gets the whole folder, whoever was first, and nothing else stays."""
    together = threading.Barrier(4)
    results = []

    def make(folder: Path) -> None:
        together.wait(timeout=10)
        (folder / "content").write_text("x" * 1000)

    def work() -> None:
        folder = cache.cached_folder("kind", "name", make)
        results.append((folder / "content").read_text())

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert results == ["x" * 1000] * 4
    assert [path.name for path in (empty_cache / "kind").iterdir()] == ["name"]


def test_a_failed_maker_leaves_nothing(empty_cache: Path):
    def fail(folder: Path) -> None:
        (folder / "half").write_text("")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        cache.cached_folder("kind", "name", fail)
    assert not list((empty_cache / "kind").iterdir())


def same(a: edits.Tensors, b: edits.Tensors) -> bool:
    """Return whether names, dtypes, shapes and values agree."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name].float(), b[name].float()) for name in a
    )


def test_config_edits(copy: Callable[..., Path]):
    folder = copy(
        edits.set_config({"quant_algo": "X"}),
        edits.set_file_config({"group_size": edits.REMOVE}),
        edits.set_embedded_config({"ignore": []}),
    )
    in_file = json.loads((folder / edits.QUANT_CONFIG).read_text())["quantization"]
    embedded = json.loads((folder / edits.CONFIG).read_text())["quantization_config"]
    assert (in_file["quant_algo"], embedded["quant_algo"]) == ("X", "X")
    assert "group_size" not in in_file
    assert embedded["ignore"] == []
    edits.drop_embedded_config(folder)
    edits.drop_file_config(folder)
    assert "quantization_config" not in json.loads((folder / edits.CONFIG).read_text())
    assert not (folder / edits.QUANT_CONFIG).exists()


def test_tensor_edits(copy: Callable[..., Path], tiny_export: Builder):
    folder = copy(
        edits.drop_tensors(f"{QUERY}.input_scale"),
        edits.add_tensors({"new": torch.arange(3)}),
        edits.scale_tensors({f"{QUERY}.weight_scale_2": 2.0}),
        edits.retype_tensors(f"{QUERY}.weight", torch.int8, bits=True),
        edits.retype_tensors("model.norm.weight", torch.float16),
    )
    before, after = edits.read_tensors(tiny_export(NVFP4)), edits.read_tensors(folder)
    assert before.keys() - after.keys() == {f"{QUERY}.input_scale"}
    assert after.keys() - before.keys() == {"new"}
    assert after[f"{QUERY}.weight_scale_2"] == 2 * before[f"{QUERY}.weight_scale_2"]
    assert after[f"{QUERY}.weight"].dtype == torch.int8
    assert after["model.norm.weight"].dtype == torch.float16
    with pytest.raises(KeyError, match="no tensor matches"):
        edits.drop_tensors("nothing")(folder)


def test_shards_with_a_duplicate(copy: Callable[..., Path], tiny_export: Builder):
    folder = copy(edits.shard(2, duplicate=f"{QUERY}.weight"))
    index = json.loads((folder / edits.INDEX).read_text())["weight_map"]
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert files == sorted(set(index.values()))
    assert len({index[f"{QUERY}.{part}"] for part in ("weight", "weight_scale")}) == 2
    from safetensors import safe_open

    for file in files:
        with safe_open(folder / file, "pt") as opened:
            assert f"{QUERY}.weight" in opened.keys()  # noqa: SIM118
    assert same(edits.read_tensors(folder), edits.read_tensors(tiny_export(NVFP4)))


def test_file_edits(copy: Callable[..., Path]):
    folder = copy()
    size = (folder / edits.WEIGHTS).stat().st_size
    edits.overwrite(edits.WEIGHTS, b"\xff\xff", offset=-2)(folder)
    assert (folder / edits.WEIGHTS).read_bytes()[-2:] == b"\xff\xff"
    edits.truncate(keep=0.5)(folder)
    assert (folder / edits.WEIGHTS).stat().st_size == size // 2
    edits.overwrite(edits.CONFIG, b"{")(folder)
    assert (folder / edits.CONFIG).read_bytes() == b"{"
    edits.delete(edits.CONFIG)(folder)
    assert not (folder / edits.CONFIG).exists()


def test_distinct_shard_scales(tiny_export: Builder, tmp_path: Path):
    before = edits.read_tensors(tiny_export(NVFP4))
    after = edits.read_tensors(
        edits.copy_with(tiny_export(NVFP4), tmp_path / "distinct", [edits.distinct_shard_scales])
    )
    prefix = "model.layers.1."
    for suffix in ("weight_scale_2", "input_scale"):
        for fused in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            assert len({float(before[f"{prefix}{name}.{suffix}"]) for name in fused}) == 1, "ModelOpt shares them"
            assert len({float(after[f"{prefix}{name}.{suffix}"]) for name in fused}) == len(fused)
