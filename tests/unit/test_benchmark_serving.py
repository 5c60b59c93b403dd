"""``sglang-modelopt bench`` without SGLang: its models, its load against a server of a few lines, its report."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sglang_modelopt_ext.checkpoint.ownership import decide
from sglang_modelopt_ext.checkpoint.reader import check_all_values, read_checkpoint
from sglang_modelopt_ext.checkpoint.tensors import read_headers
from sglang_modelopt_ext.cli import bench
from sglang_modelopt_ext.cli.main import main
from sglang_modelopt_ext.device import Device
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.workflow.bench import report
from sglang_modelopt_ext.workflow.bench import run as running
from sglang_modelopt_ext.workflow.bench import server as measuring
from sglang_modelopt_ext.workflow.bench.load import Deadline, Load, Plan, steps, warm_up
from sglang_modelopt_ext.workflow.bench.models import SHAPES, make_models, model_folder, parameter_count
from sglang_modelopt_ext.workflow.bench.options import RECIPES, Option, parse_option
from sglang_modelopt_ext.workflow.bench.run import Request
from sglang_modelopt_ext.workflow.bench.server import Result, Settings, measure, measure_together, memory, served_by
from tests.support.stub_server import EACH, FIRST, Stub, running_stub

VOCABULARY = 1000
INFO = {"internal_states": [{"memory_usage": {"weight": 5.5, "kvcache": 100.0, "token_capacity": 4000}}]}


@pytest.fixture
def stub() -> Iterator[Stub]:
    with running_stub() as server:
        yield server


@pytest.fixture
def load(stub: Stub) -> Iterator[Load]:
    made = Load(stub.port, VOCABULARY, seed=0, threads=8)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("shape", "parameters"), [("8b", 8_030_261_248), ("70b", 70_553_706_496), ("30b-a3b", 30_532_122_624)]
)
def test_shapes_have_the_parameters_of_their_models(shape: str, parameters: int) -> None:
    assert parameter_count(SHAPES[shape]) == parameters


@pytest.mark.parametrize("shape", ["tiny", "tiny-moe"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_models_are_valid_and_have_the_owner_that_their_recipe_should_have(
    shape: str, recipe: str, tmp_path: Path
) -> None:
    make_models(tmp_path, shape, [recipe])
    folder = model_folder(tmp_path, shape, recipe)
    found = decide(folder, None, Device.cuda(90))
    assert not found.in_doubt
    assert (found.family is None) == (recipe in ("bf16", "fp8", "nvfp4-w4a4"))
    headers = read_headers(folder)
    if recipe == "bf16":
        assert sum(tensor.num_bytes for tensor in headers.values()) == 2 * parameter_count(SHAPES[shape])
        return
    checkpoint = read_checkpoint(folder)
    check_all_values(checkpoint)
    sizes = SHAPES[shape]
    assert len(checkpoint.linears) == sizes.layers * (4 + 3 * max(1, sizes.experts))
    assert {linear.scheme.algo for linear in checkpoint.linears.values()} == {RECIPES[recipe].algo}
    stored = any(name.endswith("input_scale") for name in headers)
    assert stored == (recipe not in ("mxfp4",))


def test_a_model_is_written_once_and_in_files_of_limited_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sglang_modelopt_ext.workflow.bench.models.SHARD_BYTES", 300_000)
    make_models(tmp_path, "tiny", ["nvfp4"])
    make_models(tmp_path, "tiny", ["nvfp4"])
    assert capsys.readouterr().err.count("written") == 1
    (folder,) = tmp_path.iterdir()
    assert len(list(folder.glob("*.safetensors"))) == 3
    check_all_values(read_checkpoint(folder))


def test_a_model_without_weights_has_the_configuration_of_the_one_with_them(tmp_path: Path) -> None:
    for dummy in (False, True):
        make_models(tmp_path, "tiny", ["nvfp4"], dummy)
    whole, bare = (model_folder(tmp_path, "tiny", "nvfp4", dummy) for dummy in (False, True))
    assert {file.name for file in bare.iterdir()} == {"config.json", "hf_quant_config.json"}
    for file in bare.iterdir():
        assert file.read_text() == (whole / file.name).read_text()


def test_servers_draw_weights_that_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(
        running, "measure", lambda option, model, settings, *_: seen.append([*settings.arguments, str(model)])
    )
    settings = Settings(Plan(), ["--tp", "1"], tmp_path, None, print)
    running.run(Request(["nvfp4"], settings, "tiny", tmp_path, dummy=True))
    model = model_folder(tmp_path, "tiny", "nvfp4", dummy=True)
    assert model.is_dir()
    assert seen == [["--tp", "1", "--load-format", "dummy", str(model)]]
    with pytest.raises(ModelOptExtError, match="--dummy"):
        running.run(Request(["nvfp4"], settings, "tiny-moe", tmp_path, dummy=True))


def test_recipes_of_a_shape_get_equal_weights(tmp_path: Path) -> None:
    make_models(tmp_path, "tiny", ["mxfp4", "mxfp4-static"])
    first, second = (
        load_file(model_folder(tmp_path, "tiny", recipe) / "model-00001.safetensors")
        for recipe in ("mxfp4", "mxfp4-static")
    )
    assert set(second) - set(first) == {name for name in second if name.endswith("input_scale")}
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_options() -> None:
    option = parse_option("nvfp4+fp8math+kv-nvfp4")
    assert (option.recipe, option.folder) == ("nvfp4", None)
    assert option.arguments == ("--kv-cache-dtype", "modelopt_nvfp4")
    assert option.environment == {"SGLANG_MODELOPT_EXT_W4A8_MATH": "fp8"}


def test_an_option_may_be_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert parse_option(f"{tmp_path}+kv-fp8").folder == tmp_path


@pytest.mark.parametrize("text", ["int3", "bf16+fast", "/no/such/folder"])
def test_an_unknown_option_is_an_error(text: str) -> None:
    with pytest.raises(ModelOptExtError, match="command line"):
        parse_option(text)


def test_arguments_and_those_of_the_servers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Request] = []

    def record(request: Request) -> tuple[report.Run, list[Result]]:
        asked.append(request)
        return RUN, [Result("bf16"), Result("fp8", problems=["no GPU"])]

    monkeypatch.setattr(bench, "run", record)
    words = ["bf16", "fp8", "--long", "4x100", "--concurrency", "2", "--profile", "--json", "--", "--tp", "2"]
    assert main(["bench", *words]) == 1, "one figure is missing"
    settings = asked[0].settings
    assert (asked[0].options, settings.profile, settings.arguments) == (["bf16", "fp8"], 1, ["--tp", "2"])
    assert (settings.plan.long, settings.plan.concurrency) == ([(4, 100)], [2])
    assert settings.plan.first_token == Plan().first_token
    assert json.loads(capsys.readouterr().out)["results"][1]["problems"] == ["no GPU"]
    assert bench.parse_long("32x8000") == (32, 8000)


@pytest.mark.parametrize("words", [["bench", "fp8", "--long"], ["fp8", "--long"]])
def test_the_report_has_the_command_that_can_be_given_again(words: list[str]) -> None:
    assert bench._command(words) == "sglang-modelopt bench fp8 --long"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["int3"], "command line: option: expected one of bf16, fp8"),
        (["bf16", "--baseline", "fp8"], "command line: --baseline: expected one of bf16, got fp8"),
        (["bf16", "--profile"], "command line: --profile: expected a GPU"),
        (["bf16", "--output", "1"], "command line: --output: expected 2 or more, got 1"),
        (["bf16", "--long-output", "1"], "command line: --long-output: expected 2 or more, got 1"),
    ],
)
def test_a_wrong_command_line_is_one_line(
    words: list[str], error: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sglang_modelopt_ext.workflow.bench.run.has_gpu", lambda: False)
    assert main(["bench", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"ModelOptExtError: {error}")


def test_requests_are_sent_together_and_are_the_same_for_a_seed(stub: Stub, load: Load) -> None:
    prompts = load.prompts("a", 6, 5)
    answers = load.ask(prompts, 3, Deadline(30))
    assert stub.most == 6
    assert FIRST < answers.seconds < 6 * FIRST
    assert sorted(body["input_ids"] for body in stub.bodies) == sorted(prompts)
    expected = {"temperature": 0.0, "max_new_tokens": 3, "ignore_eos": True}
    assert all(body["sampling_params"] == expected for body in stub.bodies)
    assert all(0 <= token < VOCABULARY for prompt in prompts for token in prompt)
    assert prompts == Load(1, VOCABULARY, seed=0, threads=1).prompts("a", 6, 5)
    assert prompts != load.prompts("b", 6, 5)
    assert prompts != Load(1, VOCABULARY, seed=1, threads=1).prompts("a", 6, 5)


def test_steps_measure_what_the_server_does(stub: Stub, load: Load) -> None:
    plan = Plan(
        first_token=(64,), concurrency=(1, 4), prompt=16, output=100, long=((4, 600),), long_output=100, repeats=1
    )
    warm_up(load, plan, Deadline(30))
    assert not stub.seen
    stub.delay = 0.4
    figures: dict[str, float] = {}
    for step in steps(load, plan):
        figures |= step.measure(Deadline(30))
        assert not stub.seen  # flushed behind each step
    # Each request is decoded at 1 / EACH tokens a second. Wide bounds, for a busy machine; a rate with the time of the first token
    # in it would be below them, and so would one of a single request of four.
    assert 1e3 * (FIRST + stub.delay) < figures["TTFT, 64 tokens (ms)"] < 2e3 * (FIRST + stub.delay)
    assert 0.4 / EACH < figures["decode, 1 x 16 (tok/s)"] < 2.5 / EACH
    assert 0.4 * 4 / EACH < figures["decode, 4 x 16 (tok/s)"] < 2.5 * 4 / EACH
    assert 0.4 * 4 * 600 / (FIRST + stub.delay) < figures["prefill, 4 x 600 (tok/s)"] < 4 * 600 / (FIRST + stub.delay)
    assert 0.4 * 4 / EACH < figures["decode, 4 x 600 (tok/s)"] < 2.5 * 4 / EACH


def test_a_cache_that_does_not_hold_the_prompts_gives_no_decode_rate(stub: Stub, load: Load) -> None:
    stub.caches = False
    step = list(steps(load, Plan(first_token=(), concurrency=(), long=((2, 600),), repeats=1)))[-1]
    with pytest.raises(ModelOptExtError, match="cached tokens"):
        step.measure(Deadline(30))


def test_an_answer_of_another_length_is_an_error(stub: Stub, load: Load) -> None:
    stub.extra_tokens = 1
    with pytest.raises(ModelOptExtError, match="completion_tokens: expected 3, got 4"):
        load.ask(load.prompts("a", 1, 5), 3, Deadline(30))


def test_a_deadline_ends_a_request(stub: Stub, load: Load) -> None:
    stub.delay = 5.0
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        load.ask(load.prompts("a", 2, 5), 1, Deadline(0.3))
    with pytest.raises(TimeoutError):
        load.ask(load.prompts("a", 2, 5), 1, Deadline(0))
    assert time.monotonic() - began < 3


class FakeProcess:
    """A ServerProcess in whose place the stub answers."""

    def __init__(self, stub: Stub, model: Path, log: Path) -> None:
        self.port, self.model, self.log = stub.port, model, log
        self.command = ["python", "-m", "sglang.launch_server"]

        self.running = False

    def start(self) -> None:
        """Start."""
        self.running = True

    def wait_until_ready(self) -> None:
        """Be ready, if there is a log that says so."""
        if not self.log.exists():
            raise ModelOptExtError.at(self.log, "server", "it to be running", "exit code 1")

    def stop(self) -> None:
        """End."""
        self.running = False

    def __enter__(self) -> FakeProcess:
        self.start()
        return self

    def __exit__(self, *args: object) -> None:
        self.stop()

    def server_info(self) -> dict[str, Any]:
        return INFO


@pytest.fixture
def settings(stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": VOCABULARY}))
    log = tmp_path / "log"
    log.write_text("[now] modelopt_ext: 14 linear layers W4A8, math exact, kernel triton\n[now] ready\n")
    monkeypatch.setattr(measuring, "_server", lambda *args: FakeProcess(stub, tmp_path, log))
    plan = Plan(first_token=(8,), concurrency=(2,), prompt=8, output=20, long=(), repeats=1, step_seconds=20)
    return Settings(plan, (), tmp_path, None, lambda line: None)


def measured(settings: Settings, budget: float) -> Result:
    result = Result("bf16")
    measure(parse_option("bf16"), settings.logs, settings, Deadline(budget), result)
    return result


def test_an_option_is_measured(settings: Settings) -> None:
    result = measured(settings, 60)
    assert result.problems == []
    assert list(result.figures) == [
        *("start (s)", "weights (GiB)", "KV cache (GiB)", "KV cache (tokens)"),
        *("TTFT, 8 tokens (ms)", "decode, 2 x 8 (tok/s)"),
    ]
    assert result.figures["KV cache (tokens)"] == 4000
    assert result.served == ["14 linear layers W4A8, math exact, kernel triton"]


def test_servers_that_start_together_are_measured_one_after_another(
    stub: Stub, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["bf16", "fp8", "mxfp4"]
    made: list[FakeProcess] = []

    def fake(option: Option, *args: object) -> FakeProcess:
        made.append(FakeProcess(stub, tmp_path, tmp_path / ("missing" if option.name == "fp8" else "log")))
        return made[-1]

    monkeypatch.setattr(measuring, "_server", fake)
    results = [Result(name) for name in names]
    running: list[list[bool]] = []
    measure_together(
        [parse_option(name) for name in names],
        dict.fromkeys(names, tmp_path),
        settings,
        Deadline(60),
        results,
        lambda: running.append([server.running for server in made]),
    )
    assert running == [[False, True, True], [False, False, True], [False, False, False]]
    assert results[1].problems
    assert not results[1].figures
    for result in (results[0], results[2]):
        assert result.problems == []
        assert list(result.figures) == [
            *("KV cache (GiB)", "KV cache (tokens)"),
            *("TTFT, 8 tokens (ms)", "decode, 2 x 8 (tok/s)"),
        ]


@pytest.mark.parametrize("together", [False, True])
def test_an_interrupted_run_keeps_what_it_has(
    together: bool, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was measured is written and printed; what was not says why."""
    drive, said = measuring._drive, []

    def interrupted(server: Any, result: Result, *args: Any) -> None:
        if result.name == "fp8":
            raise KeyboardInterrupt
        drive(server, result, *args)

    monkeypatch.setattr(measuring, "_drive", interrupted)
    monkeypatch.setattr(running, "prepare", lambda options, *_: ("GPU", {one.name: tmp_path for one in options}))
    names, file = ("bf16", "fp8", "mxfp4"), tmp_path / "results.json"
    noted = dataclasses.replace(settings, say=said.append)
    with pytest.raises(KeyboardInterrupt):
        running.run(Request(names, noted, "8b", tmp_path, together=together, json_file=file))
    found = {one["name"]: one["problems"] for one in json.loads(file.read_text())["results"]}
    ended = ["ended by a signal or an error"]
    assert found == {"bf16": [], "fp8": ended} | ({"mxfp4": ended} if together else {})
    assert "ended by a signal or an error" in said[-1]


def test_a_budget_ends_with_what_is_known(stub: Stub, settings: Settings) -> None:
    stub.delay = 0.5
    result = measured(settings, 2.2)
    assert result.figures["weights (GiB)"] == 5.5
    assert "decode, 2 x 8 (tok/s)" not in result.figures
    assert "stopped after" in result.problems[0]
    assert all("stopped after" in problem or "budget is spent" in problem for problem in result.problems)
    assert "/abort_request" in stub.paths
    assert measured(settings, 0).problems == ["not started, the budget is spent"]


def test_a_failed_step_does_not_end_the_others(stub: Stub, settings: Settings) -> None:
    stub.extra_tokens = 1
    result = measured(settings, 60)
    assert len(result.problems) == 3
    assert all("completion_tokens" in problem for problem in result.problems)


def test_memory_and_kernels_of_a_server() -> None:
    assert memory(INFO) == {"weights (GiB)": 5.5, "KV cache (GiB)": 100.0, "KV cache (tokens)": 4000}
    log = "[x] modelopt_ext: left to SGLang: SGLang 0.5.23 serves FP8 there\n[x] modelopt_ext: 3 stored tensors are not needed"
    assert served_by(log) == ["left to SGLang: SGLang 0.5.23 serves FP8 there"]


TTFT, RATE, CACHE = "TTFT, 1024 tokens (ms)", "decode, 1 x 128 (tok/s)", "KV cache (GiB)"
RESULTS = [
    Result("bf16", ["/usr/bin/python", "-m", "sglang.launch_server"], figures={TTFT: 30.0, RATE: 200.0, CACHE: 50.0}),
    Result("fp8", figures={TTFT: 20.0, RATE: 2500.0, CACHE: 60.0}),
    Result("nvfp4", figures={RATE: 100.0}, problems=["profile: none"], environment={"MATH": "fp8"}),
]
RUN = report.Run("2026-11-29", "GPU", {"torch": "2.14"}, "8b", "sglang-modelopt bench bf16", "fp8", "Load.")


def test_ratios_are_above_one_for_the_better() -> None:
    assert report.cells(RESULTS, "fp8") == [
        ["", "bf16", "fp8", "nvfp4"],
        [TTFT, "30.0 (0.67)", "20.0", "-"],
        [RATE, "200.0 (0.08)", "2500", "100.0 (0.04)"],
        [CACHE, "50.0", "60.0", "-"],
    ]
    assert [row[1] for row in report.cells(RESULTS, "nvfp4")] == ["bf16", "30.0", "200.0 (2.00)", "50.0"]


def test_the_page_and_the_json(tmp_path: Path) -> None:
    report.write(RUN, RESULTS, tmp_path / "a" / "r.json", tmp_path / "r.md")
    content = json.loads((tmp_path / "a" / "r.json").read_text())
    assert content["run"]["baseline"] == "fp8"
    assert content["results"][0]["figures"][TTFT] == 30.0
    page = (tmp_path / "r.md").read_text()
    for part in ("2026-11-29, GPU. torch 2.14.", f"| {TTFT} | 30.0 (0.67) | 20.0 | - |", "- nvfp4: profile: none"):
        assert part in page
    assert "\npython -m sglang.launch_server\n" in page
