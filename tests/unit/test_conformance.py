"""The conformance run without an engine: an independent reading of the checkpoint, in bf16, answers in its place."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_modelopt_ext.checkpoint.ownership import decide
from sglang_modelopt_ext.checkpoint.reader import read_checkpoint
from sglang_modelopt_ext.device import Device
from tests.conformance import drive, large, pack, report
from tests.conformance.cases import CASES, LEFT_TO_SGLANG, RANKS, Case, case, chosen
from tests.conformance.drive import Drive, Scored
from tests.conformance.exports import EXPORTS, Export
from tests.conformance.judge import Judge, Judgement, compare, compared, in_doubt
from tests.conformance.reading import Reader, Reading, first_raw, read_check
from tests.conformance.run import reason
from tests.support import edits
from tests.support.models import random_ids
from tests.support.reference import Reference

pytest.importorskip("modelopt", reason="needs nvidia-modelopt to make exports")

GPU = 90


class Engine:
    """A stand-in for an engine on a GPU before Blackwell, whose cache holds whole prompts until it is flushed."""

    def __init__(self, folder: Path, case: Case, reading: Reading) -> None:
        self.reader = Reader(folder, reading, torch.bfloat16)
        self.chunk = case.chunk or drive.WHOLE
        self.own_chunk = reading.own_chunk
        self.cache: list[list[int]] = []

    def flush_cache(self) -> SimpleNamespace:
        """Forget all prompts."""
        self.cache = []
        return SimpleNamespace(success=True)

    def generate(
        self,
        input_ids: Sequence[Sequence[int]],
        sampling_params: dict[str, Any],
        return_logprob: bool,
        logprob_start_len: int = -1,
    ) -> list[dict[str, Any]]:
        """Return one answer for each prompt."""
        answers = []
        for ids in input_ids:
            limit = len(ids) - 1 if logprob_start_len < 0 else logprob_start_len
            cached = min(limit, max((_common(ids, known) for known in self.cache), default=0))
            sequence, entries = list(ids), []
            for _ in range(sampling_params["max_new_tokens"]):
                scores = self._next(sequence, self._first_raw(len(sequence), len(ids), cached))
                entries.append((float(scores.max()), int(scores.argmax()), None))
                sequence.append(entries[-1][1])
            scores = self.reader.scores(ids, self._first_raw(len(ids), len(ids), cached))
            values = [None, *scores.tolist()][max(limit, 0) :]
            scored = [(value, token, None) for value, token in zip(values, ids[-len(values) :], strict=True)]
            info = {"input_token_logprobs": scored, "output_token_logprobs": entries, "cached_tokens": cached}
            answers.append({"meta_info": info})
        self.cache += [list(ids) for ids in input_ids]
        return answers

    def _first_raw(self, length: int, prompt: int, cached: int) -> list[int] | None:
        return None if self.own_chunk else first_raw(length, prompt, cached, self.chunk)

    def _next(self, sequence: list[int], raw: Sequence[int] | None) -> torch.Tensor:
        if self.reader._rounding is not None:
            self.reader._rounding["raw_from"] = raw
        return self.reader.reference.logprobs(sequence)[-1]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@pytest.fixture(autouse=True)
def few_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reduce the requests to fewer and shorter ones of each kind."""
    for name, value in {"SINGLES": (33, 65), "LONG": (300,), "BATCH": 4, "PREFIXES": 1, "FOLLOW": 2}.items():
        monkeypatch.setattr(drive, name, value)


def judged(served: Case, reading: Reading, told: Reading | None = None, folder: Path | None = None) -> Judgement:
    """Return the verdict on an engine that answers as ``told`` of the case's export; by default as it should."""
    reads = EXPORTS[served.reads].make()
    engine = Engine(folder or served.of.make(), served, told or reading)
    known = read_check(reads, reading, pack.check_prompts()), pack.check_prompts()
    asked = Drive(engine, served)
    with torch.inference_mode():
        found = Judge(reads, served, reading, "cpu", known).judge(asked.all())
    assert asked.repeats == 1.0
    return found


def test_a_sound_engine_is_right() -> None:
    one = case("fp8-blocks")
    found = judged(one, Reading.of(one, GPU))
    assert found.verdict == "right", found
    assert set(found.groups) == {
        *("batch of 16", "up to 200", "300", "decode, 1", "decode, 16"),
        *("cached prefix", "cached prefix, fresh"),
    }
    assert any("the same 2 of 2 tokens follow" in note for note in found.notes)


def test_a_wrong_scale_in_one_layer_is_found() -> None:
    one = next(case for case in CASES if case.name == "wrong-scale")
    found = judged(one, Reading.of(one, GPU))
    assert found.verdict == "wrong"
    assert not found.faults, "by its figures, and not for another reason"


def test_a_tie_of_the_routing_does_not_count(tmp_path: Path) -> None:
    """An engine as sound as bf16, whose one wrong token is in doubt; another that is not; and a wrong scale everywhere."""
    one = case("moe-fp8-blocks")
    reads, reading = EXPORTS[one.reads].make(), Reading.of(one, GPU)
    judge = Judge(reads, one, reading, "cpu")
    ids = random_ids(65, seed=3, vocab=drive.VOCAB)
    scale = edits.scale_tensors({"*.experts.*.down_proj.weight_scale": 1.25})
    wrong = edits.copy_with(reads, tmp_path / "wrong", [scale])

    def verdict(values: torch.Tensor) -> Judgement:
        return judge.judge([Scored("65", ids, 1, values.tolist(), len(ids))])

    with torch.inference_mode():
        sound, rough = judge.rough.scores_and_routing(ids)
        _, exact = judge.exact.scores_and_routing(ids)
        doubt = in_doubt(exact, rough, 2)
        tie = next(place for place in range(1, len(doubt)) if doubt[place] and not doubt[place - 1])
        found = {}
        for place in (tie, tie - 1):
            values = sound.clone()
            values[place] -= 5
            found[place] = verdict(values)
        assert found[tie].verdict == "right", found
        assert found[tie].groups["65"].tokens == 64 - int(doubt.sum())
        assert any(f"{int(doubt.sum())} of 64 (65)" in note for note in found[tie].notes)
        assert found[tie - 1].verdict == "wrong", found
        values = sound.clone()
        values[tie] = float("nan")
        assert verdict(values).verdict == "wrong", "no tie explains NaN"
        assert verdict(Reader(wrong, reading, torch.bfloat16).scores(ids)).verdict == "wrong"


def test_tokens_in_doubt() -> None:
    """A margin below NOISE_FACTOR * 2 * eps = 0.4 in any mixture; the others are not in doubt."""
    exact = torch.tensor([[3.0, 2.0, 1.61, 0.0], [3.0, 2.0, 1.59, 0.0], [2.1, 2.0, 0.0, 0.0]])
    rough = exact + torch.tensor([0.1, -0.05, 0.0, 0.0])
    assert in_doubt([exact], [rough], 2).tolist() == [True, False, False]
    # The second token met another expert in the first mixture: how far it is off in the next is not rounding.
    ahead = torch.tensor([[3.0, 2.0, 1.0, 0.0], [3.0, 2.5, 2.0, 0.0]])
    rounded = [ahead + torch.tensor(moved) for moved in ([[0.0], [0.2]], [[0.1], [9.0]])]
    assert in_doubt([ahead, ahead], rounded, 2).tolist() == [False, True]
    assert in_doubt([exact], [rough + 9], 4).tolist() == [False] * 3, "all experts are chosen"


def test_where_most_tokens_are_in_doubt_all_are_compared() -> None:
    """The ties in the noise bound the engine's mean; one expert that is wrong is beyond it, though not by the median."""
    exact, tied = torch.zeros(9), torch.tensor([5.0, *[0.1] * 8])
    doubt = torch.arange(9) < 5
    served = torch.tensor([0.15, 5.0, *[0.15] * 7])
    found = compared(served, exact, tied, doubt)
    assert found.right
    assert found.tokens == 9
    assert not compared(torch.full((9,), 0.3), exact, tied, doubt).right
    served[6:] = 4.0
    found = compared(served, exact, tied, doubt)
    assert found.median <= 2 * found.noise_median
    assert not found.right


def test_a_reading_of_another_checkpoint_is_a_fault() -> None:
    one = case("fp8-blocks")
    reads, reading = EXPORTS[one.reads].make(), Reading.of(one, GPU)
    known = [value + 0.1 for value in read_check(reads, reading, pack.check_prompts())]
    judge = Judge(reads, one, reading, "cpu", (known, pack.check_prompts()))
    found = Judgement({})
    judge._check_reading(found)
    assert found.faults


@pytest.mark.full
@pytest.mark.parametrize("export", ["kv-nvfp4-affine", "kv-nvfp4-rotate"])
def test_a_cache_is_judged_by_what_meets_it_rounded(export: str) -> None:
    """Right where a chunk attends to itself unrounded, the rest rounded; wrong where a chunk is rounded too, or nothing is."""
    one = next(case for case in CASES if case.name == export)
    reading = Reading.of(one, GPU)
    assert not reading.own_chunk
    found = judged(one, reading)
    assert found.verdict == "right", found
    assert judged(one, reading, Reading.of(one, None)).verdict == "wrong"
    unrounded = Reading(reading.math, reading.activation, "unquantized")
    wrong = judged(one, reading, unrounded)
    assert wrong.verdict == "wrong"
    assert not wrong.groups["decode, 16"].right, "decoding alone tells it"
    assert not wrong.groups["cached prefix"].right


def test_a_cache_of_two_precisions_is_read_by_layer() -> None:
    """The same tensors, and another recipe for the second layer."""
    one = next(case for case in CASES if case.name == "kv-nvfp4-and-fp8")
    ids = random_ids(64, seed=5, vocab=511)
    with torch.inference_mode():
        mixed, uniform = (
            Reader(EXPORTS[name].make(), Reading.of(one, None), torch.float32).scores(ids)
            for name in (one.export, "kv-nvfp4")
        )
    assert float((mixed - uniform).abs().median()) > 1e-3


def test_fp8_attention_of_sglang_rounds_queries() -> None:
    one = case("kv-fp8")
    reading = Reading.of(one, GPU, "fa3")
    assert reading.fp8_attention
    assert reading.own_chunk
    assert not Reading.of(one, GPU, "triton").fp8_attention
    assert judged(one, reading).verdict == "right"


def test_first_raw() -> None:
    assert first_raw(8, 6, 0, 4) == [0, 0, 0, 0, 4, 4, 7, 8]
    assert first_raw(8, 8, 3, 4) == [0, 0, 0, 3, 3, 3, 3, 7]


@pytest.mark.parametrize(
    "export", [export for export in EXPORTS.values() if export.large], ids=lambda export: export.algo
)
def test_large_checkpoints_are_read(export: Export, tmp_path: Path) -> None:
    """The strict reader and the independent one take what is made where it is served."""
    large.make(tmp_path / "out", export.algo, "cpu", shrink=16)
    assert read_checkpoint(tmp_path / "out").config.algo == export.algo
    reading = Reading("exact", "keep_fp4", "none")
    assert bool(torch.isfinite(Reader(tmp_path / "out", reading, torch.float32).scores([5, 6, 7, 8])).all())


def test_the_pack_gives_back_what_went_in(tmp_path: Path) -> None:
    names = ["w4a8-nvfp4-llama", "w4a8-nvfp4-kv-nvfp4-affine", "fp8-blocks"]
    pack.build(tmp_path / "pack", names)
    entries = pack.unpack(tmp_path / "pack", tmp_path / "out")
    assert list(entries) == names
    for name in names:
        for file in EXPORTS[name].make().iterdir():
            assert (tmp_path / "out" / name / file.name).read_bytes() == file.read_bytes()
    manifest = tmp_path / "pack" / pack.MANIFEST
    content = json.loads(manifest.read_text(encoding="utf-8"))
    content["exports"][names[0]]["digest"] = "0"
    manifest.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(pack.StalePack, match=names[0]):
        pack.unpack(tmp_path / "pack", tmp_path / "again")


def test_sglang_loads_published_block_scales() -> None:
    """SGLang's own FP8 layer takes the tensors of q, k and v."""
    from sglang.srt.layers.linear import QKVParallelLinear
    from sglang.srt.layers.quantization.fp8 import Fp8Config

    from tests.layers.harness import parallel_rank

    attention = "model.layers.0.self_attn"
    tensors = edits.read_tensors(EXPORTS["mix-block-fp8-inv"].make())
    q, k, v = (tensors[f"{attention}.{one}_proj.weight_scale_inv"] for one in "qkv")
    assert q.dtype == torch.float32
    blocks = Fp8Config(is_checkpoint_fp8_serialized=True, activation_scheme="dynamic", weight_block_size=[128, 128])
    rows, columns = tensors[f"{attention}.k_proj.weight"].shape
    heads = tensors[f"{attention}.q_proj.weight"].shape[0] // rows
    with parallel_rank(0, 1):
        layer = QKVParallelLinear(
            columns, rows, heads, 1, bias=False, quant_config=blocks, prefix=f"{attention}.qkv_proj"
        )
    for name, parameter in layer.named_parameters():
        for shard in "qkv":
            parameter.weight_loader(parameter, tensors[f"{attention}.{shard}_proj.{name}"], shard)
    assert torch.equal(layer.weight_scale_inv, torch.cat([q, k, v]))


@pytest.mark.full
@pytest.mark.parametrize("name", LEFT_TO_SGLANG)
def test_what_is_left_to_sglang_is(name: str) -> None:
    """Else a case would compare this package with SGLang, where it is to compare SGLang with itself."""
    assert decide(EXPORTS[name].make(), None, Device.cuda(GPU)).family is None


def test_modelopts_own_block_scales_are_served_here() -> None:
    """SGLang stops at their shape, though its class accepts their name."""
    found = decide(EXPORTS["mix-block-fp8-deepseek-v3"].make(), None, Device.cuda(GPU))
    assert found.family == "modelopt_ext"


def test_block_inputs_are_read_rounded_where_sglang_rounds_them() -> None:
    """Rounded by token and 128 inputs an answer is right by the reading of SGLang's case, and wrong by that of ours."""
    theirs = next(one for one in CASES if one.name == "mix-block-fp8-inv")
    ours = next(one for one in CASES if one.name == "mix-block-fp8")
    assert theirs.reads == "mix-block-fp8-rounded"
    reading = Reading.of(theirs, GPU)
    sent = [random_ids(length, seed=length, vocab=drive.VOCAB) for length in (33, 65, 200)]
    with torch.inference_mode():
        judges = {one.name: Judge(EXPORTS[one.reads].make(), one, reading, "cpu") for one in (theirs, ours)}
        scored = [Scored("some", ids, 1, judges[theirs.name].rough.scores(ids).tolist(), len(ids)) for ids in sent]
        assert judges[theirs.name].judge(scored).verdict == "right"
        assert judges[ours.name].judge(scored).verdict == "wrong"


def test_w4afp8_is_read_as_its_codes_say(tmp_path: Path) -> None:
    """INT4 codes, low nibble first along the inputs, times their scales, are the reading's weights; other groups' are found."""
    one = next(case for case in CASES if case.name == "w4afp8")
    served, reads = edits.read_tensors(one.of.make()), EXPORTS[one.reads].make()
    weights = Reference(reads).weights
    modules = [name.removesuffix(".weight_scale_inv") for name in edits.matching(served, "*.experts.*_scale_inv")]
    assert len(modules) == 12
    for module in modules:
        packed = served[f"{module}.weight"].view(torch.uint8).to(torch.int32)
        codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)
        signed = torch.where(codes > 7, codes - 16, codes).to(torch.float32)
        scales = served[f"{module}.weight_scale_inv"].repeat_interleave(128, dim=1)
        assert torch.equal(signed * scales, weights[module])
        assert torch.equal(scales, scales.to(torch.bfloat16).to(torch.float32)), "SGLang's dtype for them"
    reading = Reading.of(one, GPU)
    wrong = edits.copy_with(reads, tmp_path / "wrong", [edits.map_tensors("*.experts.*.weight_scale", _swapped)])
    sent = [random_ids(length, seed=length, vocab=drive.VOCAB) for length in (33, 65, 200)]
    with torch.inference_mode():
        judge = Judge(reads, one, reading, "cpu")
        for reader, verdict in ((judge.rough, "right"), (Reader(wrong, reading, torch.bfloat16), "wrong")):
            scored = [Scored("some", ids, 1, reader.scores(ids).tolist(), len(ids)) for ids in sent]
            assert judge.judge(scored).verdict == verdict


def _swapped(scale: torch.Tensor) -> torch.Tensor:
    return scale.roll(1, dims=1)


def test_every_case_has_a_partner_and_every_recipe_a_case() -> None:
    from sglang_modelopt_ext.schemes.table import SCHEMES
    from tests.support.kv_exports import PRESETS

    names = [one.name for one in (*CASES, *RANKS)]
    assert len(names) == len(set(names))
    assert {one.same_as for one in (*CASES, *RANKS)} - {None} <= set(names)
    assert {one.of.algo for one in CASES} - {"none", "MIXED_PRECISION"} == SCHEMES.keys()
    assert {one.kv for one in CASES} - {"none"} == PRESETS.keys()
    assert {one.name for one in chosen(2, None)} >= {one.same_as for one in RANKS}


def test_results_are_added_to() -> None:
    def outcome(name: str, verdict: str) -> report.Outcome:
        judgement = {
            "verdict": verdict,
            "groups": {},
            "mean": 0.1,
            "median": 0.1,
            "noise_mean": 0.1,
            "noise_median": 0.1,
            "used": 0.5,
        }
        result = {"judgement": judgement, "gpu": "G", "capability": 90, "versions": {"torch": "1"}, "attention": "fa3"}
        return report.Outcome(next(one for one in CASES if one.name == name), verdict, result=result)

    first = report.as_json([outcome("fp8", "right"), outcome("nvfp4", "wrong")], "a")
    second = report.as_json([outcome("nvfp4", "right")], "b", first)
    assert [(row["case"], row["verdict"], row["commit"]) for row in second["rows"]] == [
        ("fp8", "right", "a"),
        ("nvfp4", "right", "b"),
    ]
    assert "2 right" in report.as_markdown(second)
    other = report.as_json([outcome("nvfp4", "right")], "b") | {"gpu": "H"}
    with pytest.raises(ValueError, match="cannot be added"):
        report.as_json([outcome("fp8", "right")], "c", other)


def test_twins_must_agree() -> None:
    one = next(case for case in CASES if case.same_as)
    answers = [{"ids": [1, 2, 3], "group": "300", "values": [-1.0, -2.0]}]
    apart = [{"ids": [1, 2, 3], "group": "300", "values": [-1.1, -2.2]}]
    assert compare(one, answers, answers, noise=0.1)["right"]
    assert not compare(one, answers, apart, noise=0.1)["right"]
    # An engine that differs from itself as much: mean 0.15 of 0.08 and 0.07.
    assert compare(one, answers, apart, noise=0.1, variation=0.08)["right"]
    assert not compare(one, answers, apart, noise=0.1, variation=0.07)["right"]


def test_the_reason_of_a_failure() -> None:
    log = "[10:00 TP0] fine\nTraceback\n  raise\nNameError: name 'x' is not defined\n[10:01] Killed\n"
    assert reason(log) == "NameError: name 'x' is not defined"
    assert reason(f"sglang.X\nModelOptExtError: a: b\n{log}") == "ModelOptExtError: a: b"
    assert reason("AssertionError\nend") == "AssertionError"
    assert reason("one\ntwo\n") == "two"
