"""A checkpoint is data: no pickle is opened, no code runs unasked, no name leads out of its folder or controls a terminal."""

from __future__ import annotations

import json
import os
import pickle
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("modelopt")

from sglang_modelopt_ext.checkpoint.quant_config import read_quant_config
from sglang_modelopt_ext.checkpoint.tensors import MOST_JSON_BYTES, read_headers, read_json_object
from sglang_modelopt_ext.cli.main import main
from sglang_modelopt_ext.errors import LONGEST, ModelOptExtError
from sglang_modelopt_ext.workflow.autoquant.layers import read_linears
from sglang_modelopt_ext.workflow.common.text import load_tokenizer
from sglang_modelopt_ext.workflow.repair.run import repair
from sglang_modelopt_ext.workflow.verify.reference import ReferenceModel
from tests.support import edits
from tests.support.exports import export
from tests.support.models import TinyModel, model_dir

SMALL = TinyModel(hidden=128, intermediate=128, heads=2, kv_heads=1, vocab=320, layers=1)
W4A8 = "W4A8_NVFP4_FP8_CFG"
Q = "model.layers.0.self_attn.q_proj"
_watched: list[set[str]] = []


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if _watched and event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
        _watched[-1].add(os.fsdecode(arguments[0]))
    if _watched and event == "pickle.find_class":
        _watched[-1].add(f"pickle: {arguments}")


@pytest.fixture
def opened() -> Iterator[set[str]]:
    """Return the set of the files that Python opens, and of the classes that pickles name, while the test runs."""
    if not getattr(sys, "_modelopt_ext_watched", False):
        sys.addaudithook(_watch)  # for the life of the process
        sys._modelopt_ext_watched = True  # type: ignore[attr-defined]
    _watched.append(set())
    yield _watched[-1]
    _watched.pop()


class Bomb:
    """An object whose unpickling writes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.marker),)


def add_bombs(folder: Path, marker: Path) -> None:
    """Add files that engines read as pickles."""
    content = pickle.dumps(Bomb(marker))
    for name in (
        "pytorch_model.bin",
        "model.pt",
        "consolidated.pth",
        "tokenizer.pkl",
        "modelopt_state.pth",
        "training_args.bin",
    ):
        (folder / name).write_bytes(content)


def add_code(folder: Path, marker: Path) -> None:
    """Make config and tokenizer ask for code of the folder, which writes a file."""
    code = f"import os\nos.makedirs({str(marker)!r}, exist_ok=True)\n"
    (folder / "evil.py").write_text(code + "class EvilConfig: ...\nclass EvilModel: ...\nclass EvilTokenizer: ...\n")
    edits.set_fields(
        "config.json",
        {"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}},
    )(folder)
    edits.set_fields(
        "tokenizer_config.json",
        {"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": ["evil.EvilTokenizer", None]}},
    )(folder)


def test_pickles_in_a_checkpoint_are_not_opened(tmp_path: Path, opened: set[str]) -> None:
    folder, marker = edits.copy_with(export(model_dir(SMALL), W4A8), tmp_path / "source"), tmp_path / "marker"
    add_bombs(folder, marker)
    opened.clear()
    read_headers(folder)
    assert main(["inspect", str(folder), "--headers-only", "--scales"]) == 0
    ReferenceModel(folder, torch.float32)
    assert main(["repair", str(folder)]) == 0
    assert str(folder / edits.CONFIG) in opened, "the test sees what is opened"
    assert not [file for file in opened if file.startswith("pickle") or file.endswith((".bin", ".pt", ".pth", ".pkl"))]
    assert not marker.exists()


def test_a_checkpoint_of_pickles_alone_is_no_checkpoint(tmp_path: Path) -> None:
    folder, marker = edits.copy_with(export(model_dir(SMALL), W4A8), tmp_path / "source"), tmp_path / "marker"
    add_bombs(folder, marker)
    (folder / edits.WEIGHTS).unlink()
    with pytest.raises(ModelOptExtError, match="at least one safetensors file"):
        read_headers(folder)
    model = edits.copy_with(model_dir(SMALL), tmp_path / "model")
    add_bombs(model, marker)
    (model / edits.WEIGHTS).unlink()
    assert main(["quantize", str(model), "--recipe", "mxfp4", "--output", str(tmp_path / "out")]) == 2
    assert not marker.exists()


def test_code_of_a_model_does_not_run_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal too, where transformers would ask."""
    monkeypatch.setattr("builtins.input", lambda *words: "y")
    folder, marker = edits.copy_with(export(model_dir(SMALL), W4A8), tmp_path / "source"), tmp_path / "marker"
    add_code(folder, marker)
    main(["inspect", str(folder), "--headers-only"])
    main(["repair", str(folder)])
    for load in (load_tokenizer, lambda path: ReferenceModel(path, torch.float32)):
        with pytest.raises(ModelOptExtError, match="trust_remote_code"):
            load(folder)
    model = edits.copy_with(model_dir(SMALL), tmp_path / "model")
    add_code(model, marker)
    with pytest.raises(ModelOptExtError, match="trust_remote_code"):
        read_linears(model)
    text = tmp_path / "text.txt"
    text.write_text("some text\n" * 100)
    for recipe in ("mxfp4", "fp8"):
        command = ["quantize", str(model), "--recipe", recipe, "--data", str(text), "--output", str(tmp_path / "out")]
        assert main([*command, "--device", "cpu"]) == 2
    assert not marker.exists()
    assert not (tmp_path / "out").exists()


def test_code_runs_where_it_is_asked_for(tmp_path: Path) -> None:
    """So that the test above would notice code that runs."""
    model, marker = edits.copy_with(model_dir(SMALL), tmp_path / "model"), tmp_path / "marker"
    add_code(model, marker)
    command = ["quantize", str(model), "--recipe", "mxfp4", "--output", str(tmp_path / "out"), "--device", "cpu"]
    assert main([*command, "--trust-remote-code"]) == 2, "the code has no model in it"
    assert marker.exists()


@pytest.mark.parametrize(
    "name",
    ["../other/model.safetensors", "/etc/passwd", "..", ".", "", "a/../model.safetensors", "x" * 5000, "a\x00b", 7],
)
def test_an_index_names_files_beside_it_only(name: object, tmp_path: Path) -> None:
    folder = edits.copy_with(export(model_dir(SMALL), W4A8), tmp_path / "source", [edits.shard()])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.safetensors").write_bytes((folder / "model-00001-of-00002.safetensors").read_bytes())

    def point(content: dict[str, Any]) -> None:
        content["weight_map"][f"{Q}.weight"] = name

    edits.edit_json(edits.INDEX, point)(folder)
    for read in (read_headers, lambda path: repair(path, tmp_path / "out")):
        with pytest.raises(ModelOptExtError, match=r"index\.json: .*: expected the (name of a file|file .* beside it)"):
            read(folder)


@pytest.mark.parametrize("name", [edits.CONFIG, edits.QUANT_CONFIG, edits.WEIGHTS])
def test_pipes_and_devices_are_not_read(name: str, tmp_path: Path) -> None:
    """They never end."""
    for number, make in enumerate((os.mkfifo, lambda path: path.symlink_to("/dev/zero"))):
        folder = edits.copy_with(export(model_dir(SMALL), W4A8), tmp_path / str(number))
        (folder / name).unlink()
        make(folder / name)
        with pytest.raises(ModelOptExtError, match="got no regular file"):
            read_headers(folder) if name == edits.WEIGHTS else read_quant_config(folder)


def test_a_huge_configuration_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(MOST_JSON_BYTES + 1)  # sparse
    with pytest.raises(ModelOptExtError, match="expected a JSON object of at most"):
        read_json_object(tmp_path / "config.json")


def test_a_name_does_not_control_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = f"{Q}.\x1b]0;title\x07\x1b[2J\u202e\nforged line\r.input_scale"
    folder = edits.copy_with(
        export(model_dir(SMALL), W4A8), tmp_path / "source", [edits.add_tensors({name: torch.ones(())})]
    )
    capsys.readouterr()
    main(["inspect", str(folder), "--headers-only", "--layers"])
    main(["repair", str(folder)])
    printed = capsys.readouterr()
    shown = (printed.out + printed.err).replace("\n", "")
    assert not re.search(r"[\x00-\x1f\x7f\u202e]", shown)
    assert r"\x1b[2J" in shown


def test_an_error_is_one_line_of_limited_length() -> None:
    error = ModelOptExtError.at("x" * 10**6, "a\nb\x1b", "c", json.dumps({"d": "\ud800"}))
    assert len(str(error)) <= LONGEST + 4
    assert "\n" not in str(ModelOptExtError("a\nb"))
    assert str(ModelOptExtError("\ud800 \x1b[0m ä")) == r"\ud800 \x1b[0m ä"
