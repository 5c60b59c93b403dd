"""``sglang-modelopt repair``: each rule on an export with its fault, sound exports left alone, nothing guessed without a rule."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_modelopt_ext.checkpoint.quant_config import read_quant_config
from sglang_modelopt_ext.checkpoint.reader import check_all_values, read_checkpoint
from sglang_modelopt_ext.checkpoint.tensors import read_headers
from sglang_modelopt_ext.cli.main import main
from tests.support import edits
from tests.support.exports import export
from tests.support.kv_exports import cast_export, kv_export
from tests.support.models import TinyModel, model_dir
from tests.support.moe import mixed_checkpoint, tiny

NVFP4, W4A8, FP8, MXFP4 = "NVFP4_DEFAULT_CFG", "W4A8_NVFP4_FP8_CFG", "FP8_DEFAULT_CFG", "W4A8_MXFP4_FP8_CFG"
EXPERTS = "model.layers.0.mlp.experts"
Q = "model.layers.0.self_attn.q_proj"
SENTINEL = ".\x00backbone.pt_name_sentinel"


def moe(tmp_path: Path, *changes: edits.Edit, recipe: str = NVFP4) -> Path:
    """Return a changed export of a mixture of four experts."""
    return edits.copy_with(export(model_dir(tiny("qwen3_moe")), recipe), tmp_path / "source", changes)


def dense(tmp_path: Path, *changes: edits.Edit, recipe: str = W4A8) -> Path:
    """Return a changed export of a Llama."""
    return edits.copy_with(export(model_dir(TinyModel()), recipe), tmp_path / "source", changes)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir() if file.is_file()}


def run(capsys: pytest.CaptureFixture[str], folder: Path, *args: object, code: int = 0) -> dict[str, Any]:
    """Return the JSON of ``repair``; check that it never changes the checkpoint."""
    before = digests(folder)
    capsys.readouterr()
    assert main(["repair", str(folder), *map(str, args), "--json"]) == code
    assert digests(folder) == before
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def repaired(capsys: pytest.CaptureFixture[str], folder: Path, *args: object) -> tuple[Path, dict[str, list[str]]]:
    """Repair a folder; return the new one, which the strict reader takes whole, and the subjects by rule."""
    planned = run(capsys, folder, *args, code=1)
    assert (planned["output"], planned["problems"]) == (None, [])
    output = folder.parent / "repaired"
    done = run(capsys, folder, "--output", output, *args)
    assert done["steps"] == planned["steps"], "what it would do is what it does"
    assert run(capsys, output)["steps"] == []
    check_all_values(read_checkpoint(output))
    assert json.loads((output / "repairs.json").read_text())["steps"] == done["steps"]
    rules: dict[str, list[str]] = {}
    for step in done["steps"]:
        rules.setdefault(step["rule"], []).append(step["subject"])
    return output, rules


@pytest.mark.parametrize("recipe", [NVFP4, W4A8, FP8, MXFP4, "INT4_AWQ_CFG", "MXFP8_DEFAULT_CFG"])
def test_a_sound_export_is_left_alone(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, export(model_dir(TinyModel()), recipe))["steps"] == []


def test_sound_mixtures_mixes_and_caches_are_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (
        export(model_dir(tiny("qwen3_moe")), W4A8),
        export(model_dir(tiny("mixtral")), W4A8),
        mixed_checkpoint("qwen3_moe", tmp_path / "mixed"),
        kv_export("fp8"),
        kv_export("nvfp4_affine", weights=W4A8),
        cast_export("nvfp4", weights=W4A8),
    ):
        assert run(capsys, folder)["steps"] == [], folder


class TestScales:
    def test_an_expert_without_tokens_gets_the_largest_of_the_others(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = moe(tmp_path, edits.drop_tensors(f"{EXPERTS}.3.*_proj.input_scale"))
        output, rules = repaired(capsys, folder)
        names = [f"{EXPERTS}.3.{name}.input_scale" for name in ("gate_proj", "up_proj", "down_proj")]
        assert rules == {"other-experts": names}
        old, new = edits.read_tensors(folder), edits.read_tensors(output)
        assert new.keys() - old.keys() == set(names)
        assert all(torch.equal(_bytes(tensor), _bytes(new[name])) for name, tensor in old.items())
        down = [old[f"{EXPERTS}.{number}.down_proj.input_scale"] for number in range(3)]
        assert new[names[2]] == max(down)
        gate_up = [old[f"{EXPERTS}.{n}.{side}_proj.input_scale"] for n in range(3) for side in ("gate", "up")]
        assert new[names[0]] == new[names[1]] == max(gate_up)

    def test_up_reads_what_gate_reads(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        folder = moe(tmp_path, edits.drop_tensors(f"{EXPERTS}.3.up_proj.input_scale"))
        output, rules = repaired(capsys, folder)
        assert rules == {"same-input": [f"{EXPERTS}.3.up_proj.input_scale"]}
        new = edits.read_tensors(output)
        assert new[f"{EXPERTS}.3.up_proj.input_scale"] == new[f"{EXPERTS}.3.gate_proj.input_scale"]

    def test_shards_of_a_dense_layer(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        folder = dense(tmp_path, edits.drop_tensors(f"{Q}.input_scale"))
        output, rules = repaired(capsys, folder)
        assert rules == {"same-input": [f"{Q}.input_scale"]}
        new = edits.read_tensors(output)
        assert new[f"{Q}.input_scale"] == new[Q.replace("q_proj", "k_proj") + ".input_scale"]

    @pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), -1.0])
    def test_a_scale_that_is_no_scale_is_replaced_in_place(
        self, value: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        name = f"{EXPERTS}.2.down_proj.input_scale"
        folder = moe(tmp_path, edits.map_tensors(name, lambda tensor: torch.full_like(tensor, value)), edits.shard())
        output, rules = repaired(capsys, folder)
        assert rules == {"other-experts": [name]}
        files = {file.name: file for file in output.glob("*.safetensors")}
        assert files.keys() == {file.name for file in folder.glob("*.safetensors")}
        changed = read_headers(folder)[name].file.name
        same = {file for file in files if (folder / file).stat().st_ino == files[file].stat().st_ino}
        assert same == files.keys() - {changed}, "only the file with the value is copied"
        others = [edits.read_tensors(output)[f"{EXPERTS}.{n}.down_proj.input_scale"] for n in (0, 1, 3)]
        assert edits.read_tensors(output)[name] == max(others)

    def test_several_files_keep_their_names(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        folder = moe(tmp_path, edits.drop_tensors(f"{EXPERTS}.3.*_proj.input_scale"), edits.shard())
        output, _ = repaired(capsys, folder)
        kept = {file.name for file in folder.glob("*.safetensors")}
        assert {file.name for file in output.glob("*.safetensors")} == kept | {"model-repaired-1.safetensors"}
        assert all((output / name).stat().st_ino == (folder / name).stat().st_ino for name in kept)
        index = json.loads((output / edits.INDEX).read_text())["weight_map"]
        assert set(index) == set(edits.read_tensors(output))

    @pytest.mark.parametrize(
        ("pattern", "recipe"),
        [
            (f"{EXPERTS}.*.down_proj.input_scale", NVFP4),
            (f"{EXPERTS}.1.down_proj.weight_scale", NVFP4),
            (f"{EXPERTS}.1.down_proj.weight_scale_2", NVFP4),
            ("model.layers.0.self_attn.o_proj.input_scale", NVFP4),
        ],
        ids=["every expert", "block scale", "global scale", "alone"],
    )
    def test_what_no_other_layer_tells_stays_a_problem(
        self, pattern: str, recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = moe(tmp_path, edits.drop_tensors(pattern), recipe=recipe)
        output = tmp_path / "out"
        found = run(capsys, folder, "--output", output, code=1)
        assert found["steps"] == []
        assert found["output"] is None
        assert any(pattern.rpartition(".")[2] in problem for problem in found["problems"])
        assert all(str(folder) in problem for problem in found["problems"])
        assert {file.name for file in tmp_path.iterdir()} == {"source"}

    def test_a_repair_that_leaves_a_fault_writes_nothing(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        changes = (
            edits.drop_tensors(f"{EXPERTS}.3.up_proj.input_scale"),
            edits.drop_tensors("model.layers.1.mlp.experts.0.up_proj.weight_scale"),
        )
        found = run(capsys, moe(tmp_path, *changes), "--output", tmp_path / "out", code=1)
        assert len(found["steps"]) == 1
        assert found["problems"]
        assert not (tmp_path / "out").exists()

    def test_values_are_checked_before_anything_is_written(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Of a dry run too, all but block scales, which take reading them."""

        def spoil(tensor: torch.Tensor) -> torch.Tensor:
            raw = tensor.view(torch.uint8).clone()
            raw[0, 0] = 0x7F
            return raw.view(tensor.dtype)

        changes = (
            edits.drop_tensors(f"{EXPERTS}.3.up_proj.input_scale"),
            edits.map_tensors(f"{EXPERTS}.0.up_proj.weight_scale", spoil),
        )
        folder = moe(tmp_path, *changes)
        (problem,) = run(capsys, folder, "--output", tmp_path / "out", code=1)["problems"]
        assert f"{folder}/model.safetensors: {EXPERTS}.0.up_proj.weight_scale: expected finite e4m3" in problem.replace(
            "model-00001-of-00002", "model"
        )
        assert {file.name for file in tmp_path.iterdir()} == {"source"}


class TestConfigs:
    def test_the_tensors_decide_the_group_size(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        wrong = (edits.set_file_config({"group_size": 16}), edits.set_embedded_config({"group_size": 32}))
        output, rules = repaired(capsys, dense(tmp_path, *wrong))
        assert rules == {"disagreement": ["group_size"]}
        config = read_quant_config(output)
        assert config is not None
        assert config.group_size == 32

    @pytest.mark.parametrize("side", ["file", "embedded"])
    def test_the_tensors_decide_the_algorithm(
        self, side: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        change = {"file": edits.set_file_config, "embedded": edits.set_embedded_config}[side]
        output, rules = repaired(capsys, dense(tmp_path, change({"quant_algo": "FP8"})))
        assert rules == {"disagreement": ["quant_algo"]}
        for file, section in ((edits.QUANT_CONFIG, "quantization"), (edits.CONFIG, "quantization_config")):
            assert json.loads((output / file).read_text())[section]["quant_algo"] == "W4A8_NVFP4_FP8"

    def test_a_cache_that_one_file_states_is_stated_by_both(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = edits.copy_with(
            kv_export("fp8", weights=W4A8),
            tmp_path / "source",
            [edits.set_embedded_config({"kv_cache_scheme": edits.REMOVE})],
        )
        output, rules = repaired(capsys, folder)
        assert rules == {"disagreement": ["kv_cache_quant_algo"]}
        expected = json.loads((kv_export("fp8", weights=W4A8) / edits.CONFIG).read_text())["quantization_config"]
        assert json.loads((output / edits.CONFIG).read_text())["quantization_config"] == expected

    def test_scales_decide_whether_there_is_a_cache(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        change = edits.set_file_config({"kv_cache_quant_algo": None})
        folder = edits.copy_with(kv_export("fp8", weights=W4A8), tmp_path / "source", [change])
        output, _ = repaired(capsys, folder)
        config = read_quant_config(output)
        assert config is not None
        assert config.kv_cache_algo == "FP8"

    def test_what_the_tensors_do_not_decide_is_asked_for(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = edits.copy_with(
            kv_export("fp8", weights=W4A8),
            tmp_path / "source",
            [edits.set_file_config({"kv_cache_quant_algo": "NVFP4"})],
        )
        (problem,) = run(capsys, folder, code=1)["problems"]
        assert "--trust FILE, to say which is right: NVFP4 (hf_quant_config.json) or FP8 (config.json)" in problem
        output, rules = repaired(capsys, folder, "--trust", "config.json")
        assert rules == {"disagreement": ["kv_cache_quant_algo"]}
        config = read_quant_config(output)
        assert config is not None
        assert config.kv_cache_algo == "FP8"

    def test_files_that_both_do_not_fit_are_a_problem(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        wrong = (edits.set_file_config({"quant_algo": "FP8"}), edits.set_embedded_config({"quant_algo": "MXFP8"}))
        found = run(capsys, dense(tmp_path, *wrong), "--output", tmp_path / "out", code=1)
        assert found["problems"]
        assert not (tmp_path / "out").exists()

    def test_files_that_disagree_and_scales_that_are_missing(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        changes = (
            edits.set_file_config({"quant_algo": "FP8"}),
            edits.drop_tensors(f"{EXPERTS}.3.*_proj.input_scale"),
        )
        output, rules = repaired(capsys, moe(tmp_path, *changes))
        assert set(rules) == {"disagreement", "other-experts"}
        config = read_quant_config(output)
        assert config is not None
        assert config.algo == "NVFP4"

    def test_exclusions_become_equal(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Of two patterns that one file has, the one over a quantized layer goes and the other stays."""
        listed = json.loads((export(model_dir(TinyModel()), W4A8) / edits.QUANT_CONFIG).read_text())
        names = [*listed["quantization"]["exclude_modules"], Q, "vision_tower*"]
        folder = dense(tmp_path, edits.set_file_config({"exclude_modules": names}))
        output, rules = repaired(capsys, folder)
        assert set(rules) == {"exclusion"}
        one = json.loads((output / edits.QUANT_CONFIG).read_text())["quantization"]["exclude_modules"]
        other = json.loads((output / edits.CONFIG).read_text())["quantization_config"]["ignore"]
        assert one == other == [*listed["quantization"]["exclude_modules"], "vision_tower*"]

    def test_a_layer_stored_in_16_bits_is_excluded(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        module = "model.layers.1.mlp.down_proj"
        changes = (
            edits.drop_tensors(f"{module}.*"),
            edits.add_tensors({f"{module}.weight": torch.zeros(256, 512, dtype=torch.bfloat16)}),
        )
        output, rules = repaired(capsys, dense(tmp_path, *changes))
        assert set(rules) == {"exclusion"}
        config = read_quant_config(output)
        assert config is not None
        assert config.is_excluded(module)
        assert not config.is_excluded("model.layers.0.mlp.down_proj")

    @pytest.mark.parametrize(
        ("prefix", "fields", "pattern"),
        [
            ("mtp.layers.0.", {}, "mtp*"),
            ("model.layers.2.", {"num_nextn_predict_layers": 1}, "model.layers.2*"),
        ],
        ids=["beside", "behind"],
    )
    def test_a_prediction_block_in_16_bits_is_excluded(
        self, prefix: str, fields: dict[str, int], pattern: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        weight = torch.zeros(256, 512, dtype=torch.bfloat16)
        block = {f"{prefix}eh_proj.weight": weight, f"{prefix}mlp.down_proj.weight": weight.clone()}
        folder = dense(tmp_path, edits.add_tensors(block), edits.set_fields(edits.CONFIG, fields))
        output, rules = repaired(capsys, folder)
        assert set(rules) == {"mtp-exclusion"}
        config = read_quant_config(output)
        assert config is not None
        assert pattern in config.exclude_modules
        assert config.layer(f"{prefix}mlp.down_proj") is None
        assert config.layer("model.layers.1.mlp.down_proj") is not None

    def test_one_file_is_enough(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        changes = (edits.drop_file_config, edits.drop_tensors(f"{Q}.input_scale"))
        output, _ = repaired(capsys, dense(tmp_path, *changes))
        assert not (output / edits.QUANT_CONFIG).exists()


class TestSentinels:
    def test_names_lose_the_marker_and_keep_their_wildcard(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        names = [f"lm_head{SENTINEL}", f"vision{SENTINEL}*", f"audio{SENTINEL}.*", "lm_head"]
        folder = dense(
            tmp_path, edits.set_file_config({"exclude_modules": names}), edits.set_embedded_config({"ignore": names})
        )
        output, rules = repaired(capsys, folder)
        assert set(rules) == {"sentinel"}
        for file, section, key in (
            (edits.QUANT_CONFIG, "quantization", "exclude_modules"),
            (edits.CONFIG, "quantization_config", "ignore"),
        ):
            assert json.loads((output / file).read_text())[section][key] == ["lm_head", "vision*", "audio.*"]

    def test_listed_layers(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        def rename(content: dict[str, Any]) -> None:
            layers = content["quantization"]["quantized_layers"]
            content["quantization"]["quantized_layers"] = {name + SENTINEL: entry for name, entry in layers.items()}

        mixed = mixed_checkpoint("qwen3_moe", tmp_path / "mixed")
        folder = edits.copy_with(mixed, tmp_path / "source", [edits.edit_json(edits.QUANT_CONFIG, rename)])
        output, _ = repaired(capsys, folder)
        assert (output / edits.QUANT_CONFIG).read_text() == (mixed / edits.QUANT_CONFIG).read_text()

    def test_two_entries_that_become_one_are_a_problem(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def double(content: dict[str, Any]) -> None:
            layers = content["quantization"]["quantized_layers"]
            name = next(iter(layers))
            layers[name + SENTINEL] = {"quant_algo": "MXFP8"}

        mixed = mixed_checkpoint("qwen3_moe", tmp_path / "mixed")
        folder = edits.copy_with(mixed, tmp_path / "source", [edits.edit_json(edits.QUANT_CONFIG, double)])
        (problem,) = run(capsys, folder, code=1)["problems"]
        assert "one entry for a layer" in problem


class TestWriting:
    def test_copies_share_nothing(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        folder = dense(tmp_path, edits.drop_tensors(f"{Q}.input_scale"))
        (folder / "original").mkdir()
        (folder / "original" / "notes.txt").write_text("kept")
        run(capsys, folder, "--output", tmp_path / "out", "--copy")
        own = {file.stat().st_ino for file in folder.rglob("*")}
        assert not own & {file.stat().st_ino for file in (tmp_path / "out").rglob("*")}
        assert (tmp_path / "out" / "original" / "notes.txt").read_text() == "kept"
        assert {file.name for file in tmp_path.iterdir()} == {"source", "out"}

    def test_a_hub_cache_is_followed(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Its files are symbolic links."""
        folder = dense(tmp_path, edits.drop_tensors(f"{Q}.input_scale"))
        (tmp_path / "blobs").mkdir()
        for file in list(folder.iterdir()):
            file.rename(tmp_path / "blobs" / file.name)
            file.symlink_to(tmp_path / "blobs" / file.name)
        output, _ = repaired(capsys, folder)
        assert not any(file.is_symlink() for file in output.iterdir())

    @pytest.mark.parametrize("there", ["itself", "files"])
    def test_outputs_that_must_not_be_written(
        self, there: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = dense(tmp_path, edits.drop_tensors(f"{Q}.input_scale"))
        output = folder
        if there == "files":
            output = tmp_path / "out"
            output.mkdir()
            (output / "config.json").write_text("{}")
        assert main(["repair", str(folder), "--output", str(output)]) == 2
        assert "output: expected" in capsys.readouterr().err
        if there == "files":
            run(capsys, folder, "--output", output, "--overwrite")

    def test_files_that_cannot_be_read_are_bad_input(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        folder = dense(tmp_path, edits.truncate())
        assert main(["repair", str(folder)]) == 2
        (line,) = capsys.readouterr().err.splitlines()[-1:]
        assert re.match(r"ModelOptExtError: .*model\.safetensors: file: expected a readable safetensors file", line)

    def test_the_text_names_rules_and_what_was_written(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = dense(tmp_path, edits.drop_tensors(f"{Q}.input_scale"))
        capsys.readouterr()
        assert main(["repair", str(folder)]) == 1
        text = capsys.readouterr().out
        assert "same-input (1):" in text
        assert "the largest of the layers that read the same input" in text
        assert "nothing was written: --output NEW writes" in text
        assert main(["repair", str(folder), "--output", str(tmp_path / "out")]) == 0
        assert f"written and read back: {tmp_path / 'out'}" in capsys.readouterr().out
