"""The subcommands ``quantize`` and ``serve``: exit codes, standard output, and the server's command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sglang_modelopt_ext.checkpoint.reader import read_checkpoint
from sglang_modelopt_ext.cli.command import BAD_INPUT, INTERRUPTED, OK
from sglang_modelopt_ext.cli.main import main
from sglang_modelopt_ext.workflow import serve as serve_module
from sglang_modelopt_ext.workflow.quantize import run as quantize_module
from tests.serving.checks import check_logprobs
from tests.support.models import TinyModel, model_dir
from tests.support.server import Server

pytest.importorskip("modelopt")

SMALL = TinyModel(dtype="float32", hidden=128, intermediate=256, heads=2, kv_heads=1)


@pytest.fixture(scope="module")
def model() -> Path:
    """Return a tiny random Llama."""
    return model_dir(SMALL)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Return a file of calibration text."""
    file = tmp_path / "data" / "text.txt"
    file.parent.mkdir()
    file.write_text("import os\nprint(os.name)\n" * 20)
    return file


def arguments(model: Path, data: Path) -> list[str]:
    """Return the arguments that all commands here share."""
    return [str(model), "--data", str(data), "--sequence-length", "32", "--device", "cpu"]


class TestQuantize:
    def test_json(self, model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Standard output is the result and nothing else, whatever ModelOpt prints."""
        code = main(
            [
                "quantize",
                *arguments(model, data),
                "--recipe",
                "fp8",
                "--kv",
                "fp8",
                "--json",
                "--export-dir",
                str(tmp_path / "out"),
                "--exclude",
                "*down_proj",
            ]
        )
        assert code == OK
        result = json.loads(capsys.readouterr().out)
        assert (result["quant_algo"], result["linears"], result["resumed_from"]) == ("FP8", 12, 0)
        assert result["record"]["kv_cache_recipe"] == "fp8"
        assert result["record"]["selection"]["exclude"] == ["*down_proj"]
        assert len(read_checkpoint(tmp_path / "out").linears) == 12
        assert result["folder"] == str(tmp_path / "out")

    def test_text(self, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["quantize", str(model), "--recipe", "mxfp8", "--output", str(tmp_path / "out")]) == OK
        assert capsys.readouterr().out.startswith(
            f"{tmp_path / 'out'}: MXFP8, 14 linear layers, 8.25 bits per weight, "
        )

    @pytest.mark.parametrize(
        ("extra", "message"),
        [
            (["--recipe", "nvpf4"], "ModelOptExtError: --recipe: nvpf4: expected a known name, such as nvfp4"),
            ([], "ModelOptExtError: command line: --recipe: expected a recipe, or a KV cache's with --kv, got neither"),
            (["--kv", "none"], "ModelOptExtError: command line: --recipe: expected a recipe"),
            (
                ["--recipe", "fp8", "--samples", "0"],
                "ModelOptExtError: command line: --samples: expected 1 or more, got 0",
            ),
        ],
    )
    def test_bad_input(
        self,
        model: Path,
        data: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        extra: list[str],
        message: str,
    ) -> None:
        assert main(["quantize", *arguments(model, data), "--output", str(tmp_path / "out"), *extra]) == BAD_INPUT
        assert capsys.readouterr().err.splitlines()[-1].startswith(message)

    def test_interrupted(
        self,
        model: Path,
        data: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        """By SIGTERM, which otherwise ends a process without tidying up."""
        monkeypatch.setattr(quantize_module, "load_model", lambda *args, **kwargs: os.kill(os.getpid(), 15))
        code = main(["quantize", *arguments(model, data), "--recipe", "fp8", "--output", str(tmp_path / "out")])
        assert code == INTERRUPTED
        assert capsys.readouterr().err.splitlines()[-1] == "interrupted"
        assert {path.name for path in tmp_path.iterdir()} == {"data"}

    def test_missing_modelopt_is_one_line(
        self,
        model: Path,
        data: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "modelopt"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "modelopt", None)
        assert (
            main(["quantize", *arguments(model, data), "--recipe", "fp8", "--output", str(tmp_path / "out")])
            == BAD_INPUT
        )
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("ModelOptExtError: modelopt: import: expected NVIDIA ModelOpt (pip install")

    def test_arguments_behind_dashes_are_the_servers(self, model: Path) -> None:
        with pytest.raises(SystemExit) as raised:
            main(["quantize", str(model), "--recipe", "fp8", "--", "--port", "1"])
        assert raised.value.code == BAD_INPUT


class TestServe:
    @pytest.fixture
    def runs(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
        """Return the folders that :func:`quantize` was called for."""
        called: list[Path] = []
        plain = serve_module.quantize

        def counted(model: str, output: Path, *args: Any, **kwargs: Any) -> Any:
            called.append(output)
            return plain(model, output, *args, **kwargs)

        monkeypatch.setattr(serve_module, "quantize", counted)
        return called

    def test_quantizes_once_by_content(
        self, model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], runs: list[Path]
    ) -> None:
        def serve(*extra: str) -> Any:
            command = ["serve", *arguments(model, data), "--recipe", "fp8", "--cache-dir", str(tmp_path / "cache")]
            assert main([*command, "--dry-run", "--json", *extra]) == OK
            return json.loads(capsys.readouterr().out)

        first = serve("--", "--port", "30123")
        assert (first["cached"], len(runs)) == (False, 1)
        assert first["command"][1:5] == ["-m", "sglang.launch_server", "--model-path", first["folder"]]
        assert first["command"][-2:] == ["--port", "30123"]
        read_checkpoint(Path(first["folder"]))
        moved = data.rename(data.with_name("other.txt"))
        moved.rename(data)
        again = serve("--", "--max-total-tokens", "512")
        assert (again["cached"], again["folder"], len(runs)) == (True, first["folder"], 1)
        assert again["command"].count("--max-total-tokens") == 1, "what the user says about the server holds"
        data.write_text(data.read_text() + "more\n")
        other = serve()
        assert (other["cached"], len(runs)) == (False, 2), "other data, another checkpoint"
        assert other["folder"] != first["folder"]
        assert not serve("--seed", "1")["cached"]

    def test_cached_checkpoint_that_was_damaged(
        self, model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        command = [
            "serve",
            *arguments(model, data),
            "--recipe",
            "fp8",
            "--cache-dir",
            str(tmp_path / "cache"),
            "--dry-run",
        ]
        assert main([*command, "--json"]) == OK
        folder = Path(json.loads(capsys.readouterr().out)["folder"])
        with (folder / "model.safetensors").open("r+b") as file:
            file.truncate(1000)
        assert main(command) == BAD_INPUT
        assert "expected a readable safetensors file" in capsys.readouterr().err

    @pytest.mark.parametrize("flag", ["--quantization", "--model-path=x", "--kv-cache-dtype"])
    def test_what_the_checkpoint_decides(
        self, model: Path, data: Path, capsys: pytest.CaptureFixture[str], flag: str
    ) -> None:
        assert main(["serve", *arguments(model, data), "--recipe", "fp8", "--dry-run", "--", flag]) == BAD_INPUT
        assert f"{flag}: expected arguments that the checkpoint does not decide" in capsys.readouterr().err

    @pytest.mark.full
    @pytest.mark.server
    def test_fp8_smoothquant_is_served_right(self, model: Path, data: Path, tmp_path: Path) -> None:
        """The printed command starts the stock server; its log probabilities are those of the smoothed FP8 model."""
        command = ["serve", *arguments(model, data), "--recipe", "fp8", "--kv", "nvfp4_rotate"]
        command += ["--calibration-algorithm", "smoothquant", "--alpha", "0.5", "--cache-dir", str(tmp_path / "cache")]
        done = subprocess.run(
            [sys.executable, "-m", "sglang_modelopt_ext.cli", *command, "--dry-run", "--json"],
            capture_output=True,
            text=True,
            check=True,
        )
        folder = Path(json.loads(done.stdout)["folder"])
        with Server(folder, dtype="float32") as server:
            check_logprobs(server, folder, "float32", kv_cache="nvfp4_rotate")

    @pytest.mark.full
    @pytest.mark.server
    def test_exit_code_is_the_servers(self, model: Path, data: Path, tmp_path: Path) -> None:
        command = ["serve", *arguments(model, data), "--recipe", "fp8", "--cache-dir", str(tmp_path / "cache")]
        done = subprocess.run(
            [sys.executable, "-m", "sglang_modelopt_ext.cli", *command, "--", "--no-such-argument"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2, "argparse's, in SGLang"
        assert "sglang.launch_server --model-path" in done.stdout
        assert "--no-such-argument" in done.stderr.splitlines()[-1]
