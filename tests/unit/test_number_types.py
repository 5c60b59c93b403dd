"""Formats declare their number types, and backends match these: what a new format or a new recipe of known parts gets."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sglang_modelopt_ext.backends import packages, select, self_test
from sglang_modelopt_ext.backends.base import (
    Backend,
    LinearRequest,
    ShardWeight,
    merge_blocks,
    tensors_of,
    without_tensors,
)
from sglang_modelopt_ext.backends.experts.base import ExpertRequest
from sglang_modelopt_ext.backends.experts.fused import FusedRequest
from sglang_modelopt_ext.backends.experts.grouped import GroupedDecoded, GroupedMxfp4
from sglang_modelopt_ext.backends.linear.block_scaled import BlockScaled
from sglang_modelopt_ext.backends.linear.dense import Dense
from sglang_modelopt_ext.backends.linear.flashinfer import FlashInferMxfp8
from sglang_modelopt_ext.backends.linear.humming import Humming
from sglang_modelopt_ext.backends.linear.weight_only import blocks_of_16
from sglang_modelopt_ext.checkpoint.reader import read_checkpoint
from sglang_modelopt_ext.checkpoint.tensors import read_tensors
from sglang_modelopt_ext.device import Device
from sglang_modelopt_ext.layers.linear import LinearProduct
from sglang_modelopt_ext.schemes.base import LayerScheme, Scheme
from sglang_modelopt_ext.schemes.table import SCHEMES, UMBRELLA
from sglang_modelopt_kernels.formats import ACTIVATION_FORMATS, WEIGHT_FORMATS
from sglang_modelopt_kernels.formats.base import BlockWeight, NumberType
from sglang_modelopt_kernels.formats.fp8 import FP8BlockWeight
from sglang_modelopt_kernels.formats.mxfp4 import MXFP4Weight
from sglang_modelopt_kernels.formats.mxfp8 import MXFP8Weight
from sglang_modelopt_kernels.formats.nvfp4 import FULL_RANGE, NVFP4Weight
from sglang_modelopt_kernels.gemm.mxfp4_fp8_blackwell import pair_blocks
from sglang_modelopt_kernels.gemm.mxfp4_fp8_hopper import fold
from sglang_modelopt_kernels.gemm.reference import naive_linear
from sglang_modelopt_kernels.gemm.w4_decode import pack
from sglang_modelopt_kernels.gemm.w8_decode import float_blocks, mxfp8, whole
from sglang_modelopt_kernels.moe import grouped

ROOT = Path(__file__).resolve().parents[2]
N, K = 192, 256
CAPABILITIES = (80, 89, 90, 100, 103, 110, 120, 121)
TOLERANCE = 2.0**-20
"""Relative, of a float32 result."""


class NVFP4Narrow(NVFP4Weight):
    """NVFP4 in blocks of 8, which no kernel reads."""

    def __init__(self) -> None:
        super().__init__("nvfp4_bs8", 16, FULL_RANGE)
        self.number_type = NumberType("e2m1", (1, 8), "e4m3")


NARROW = Scheme("W4A16_NVFP4_BS8", weights=("nvfp4_bs8",), activation=None, flag=UMBRELLA)
BY_TOKEN = Scheme("NVFP4_FP8_PER_TOKEN", weights=("nvfp4",), activation="fp8_per_token", flag=UMBRELLA)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> Iterator[NVFP4Narrow]:
    number = NVFP4Narrow()
    monkeypatch.setitem(WEIGHT_FORMATS, number.name, number)
    monkeypatch.setitem(SCHEMES, NARROW.algo, NARROW)
    self_test._passed.clear()
    yield number
    self_test._passed.clear()


@pytest.fixture
def by_token(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scheme]:
    monkeypatch.setitem(SCHEMES, BY_TOKEN.algo, BY_TOKEN)
    self_test._passed.clear()
    yield BY_TOKEN
    self_test._passed.clear()


def random_weight(seed: int = 0) -> torch.Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def checkpoint_of(folder: Path, scheme: Scheme) -> Path:
    """A checkpoint of one quantized layer, with the configuration that ModelOpt would write."""
    weight = WEIGHT_FORMATS[scheme.weights[0]]
    folder.mkdir()
    name = "model.layers.0.self_attn.o_proj"
    save_file(
        {f"{name}.{part}": tensor for part, tensor in weight.quantize(random_weight()).items()},
        folder / "model.safetensors",
    )
    quantization = {"quant_algo": scheme.algo, "group_size": weight.group_size, "exclude_modules": ["lm_head"]}
    content = {"producer": {"name": "modelopt", "version": "0.47.0"}, "quantization": quantization}
    (folder / "hf_quant_config.json").write_text(json.dumps(content))
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    return folder


def error_of_a_layer(folder: Path, scheme: Scheme) -> tuple[float, str]:
    """Read the one layer of a checkpoint, prepare and compute it on a CPU; the relative error, and the backend's name."""
    checkpoint = read_checkpoint(folder)
    (linear,) = checkpoint.linears.values()
    assert linear.scheme.algo == scheme.algo
    assert (linear.n, linear.k) == (N, K)
    stored = {item.name.rpartition(".")[2]: t for item, t in read_tensors(list(checkpoint.tensors.values()))}
    product, module = LinearProduct(linear.scheme, folder, linear.name, "exact", torch.float32), torch.nn.Module()
    product.prepare(module, [stored], N, K)
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(1))
    right = rounded(x, scheme) @ decoded(stored, K // stored["weight_scale"].shape[1]).T
    error = (product.apply(module, x).double() - right).norm(dim=1) / right.norm(dim=1)
    return float(error.max()), product.backend.name


def decoded(stored: dict[str, torch.Tensor], block: int) -> torch.Tensor:
    """An NVFP4 weight in float64, by a table of its codes, apart from the formats' own code."""
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    table = torch.cat([values, -values])
    codes = torch.stack([stored["weight"] & 15, stored["weight"] >> 4], dim=-1).flatten(1).long()
    scale = stored["weight_scale"].double().repeat_interleave(block, dim=1)
    return table[codes] * scale * stored["weight_scale_2"].double()


def rounded(x: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Activations as the recipe rounds them, float64."""
    if scheme.activation is None:
        return x.double()
    scale = x.abs().amax(dim=1, keepdim=True) / 448
    return (x * (1 / scale)).to(torch.float8_e4m3fn).double() * scale.double()


def test_a_new_block_size_is_right_on_the_reference_path(narrow: NVFP4Narrow, tmp_path: Path) -> None:
    """One class and one row: the layer is read, prepared and computed."""
    error, backend = error_of_a_layer(checkpoint_of(tmp_path / "checkpoint", NARROW), NARROW)
    assert backend == "dense_float32"
    assert error < TOLERANCE


def asked(scheme: Scheme, capability: int, activation: str | None = None, **fields: Any) -> LinearRequest:
    chosen = ACTIVATION_FORMATS[activation] if activation else scheme.activation_format()
    layer = LayerScheme(scheme.algo, WEIGHT_FORMATS[scheme.weights[0]], chosen)
    arguments = {"n": 4096, "k": 4096, "packages": packages.VERSIONS} | fields
    return LinearRequest(layer, Device.cuda(capability), **arguments)


@pytest.mark.parametrize("activation", [None, *ACTIVATION_FORMATS])
@pytest.mark.parametrize(
    "backend", [one for one in select.BACKENDS if not isinstance(one, Dense)], ids=lambda one: one.name
)
def test_every_other_backend_refuses_it_by_its_properties(
    backend: Backend, activation: str | None, narrow: NVFP4Narrow
) -> None:
    """On every GPU, whatever the activations; where the GPU is one of its own, the reason names the blocks."""
    reasons = [backend.supports(asked(NARROW, capability, activation)) for capability in CAPABILITIES]
    assert None not in reasons
    assert any("E2M1 in blocks of 8 under E4M3 scales" in str(reason) for reason in reasons), reasons


def test_backends_of_experts_refuse_it_by_its_properties(narrow: NVFP4Narrow) -> None:
    fields = {"experts": 8, "top_k": 2}
    for capability in CAPABILITIES:
        one = asked(NARROW, capability, "fp8_static")
        request = ExpertRequest(**{item.name: getattr(one, item.name) for item in dataclasses.fields(one)}, **fields)
        reasons = [backend.supports(request) for backend in (GroupedDecoded(), GroupedMxfp4())]
        reasons += [backend.supports(FusedRequest(request, request)) for backend in select.FUSED_BACKENDS]
        assert None not in reasons
        assert "blocks of 8" in str(reasons[0])


@pytest.mark.parametrize(
    "backend", [one for one in select.BACKENDS if not isinstance(one, Dense)], ids=lambda one: one.name
)
def test_no_backend_packs_it(backend: Backend, narrow: NVFP4Narrow) -> None:
    """Asked in spite of its objection, a backend raises before it reads a code."""
    with pytest.raises(ValueError, match=r"expected .* got .*E2M1 in blocks of 8 under E4M3 scales"):
        backend.prepare([ShardWeight(narrow, narrow.quantize(random_weight()))])


def test_packing_refuses_what_it_cannot_hold(narrow: NVFP4Narrow) -> None:
    """Block size, element and type of scales; the message has what was expected and given."""
    shard = ShardWeight(narrow, narrow.quantize(random_weight()))
    blocks = merge_blocks([shard])
    with pytest.raises(ValueError, match=r"expected E2M1 in blocks of 16 .* got E2M1 in blocks of 8 under E4M3"):
        pack(blocks)
    with pytest.raises(ValueError, match="got nvfp4_bs8"):
        blocks_of_16([shard])
    codes, one = torch.zeros(4, 128, dtype=torch.uint8), torch.ones(())
    for scale, group, got in (
        (torch.ones(4, 8), 16, "E2M1 in blocks of 16 under float32"),
        (torch.full((4, 8), 127, dtype=torch.uint8), 16, "E2M1 in blocks of 16 under UE8M0"),
        (torch.ones(4, 2).to(torch.float8_e4m3fn), 64, "E2M1 in blocks of 64 under E4M3"),
        (torch.ones(4, 8, dtype=torch.bfloat16), 16, "torch.bfloat16"),
        (torch.ones(4, 4).to(torch.float8_e4m3fn), 16, r"\[4, 4\]"),
    ):
        with pytest.raises(ValueError, match=f"expected .*got .*{got}"):
            pack(BlockWeight(codes, scale, one, "e2m1", group))
    with pytest.raises(ValueError, match="got INT4 in blocks of 32 under float32 scales"):
        pack(BlockWeight(codes.to(torch.int8), torch.ones(4, 4), one, "int4", 32))


def test_packing_of_stored_tensors_refuses_other_types() -> None:
    e4m3, uint8 = torch.zeros(4, 128).to(torch.float8_e4m3fn), torch.zeros(4, 64, dtype=torch.uint8)
    exponents, rows = torch.full((4, 4), 127, dtype=torch.uint8), torch.ones(4)
    refused = (
        lambda: fold(uint8, exponents[:, :2]),
        lambda: fold(e4m3[:, :64], exponents),
        lambda: fold(uint8, torch.ones(4, 4).to(torch.float8_e4m3fn)),
        lambda: pair_blocks(uint8[:, :48]),
        lambda: pair_blocks(e4m3[:, :64]),
        lambda: grouped.mxfp4_as_stored(uint8, exponents.repeat(1, 2)),
        lambda: grouped.float_blocks(e4m3, torch.ones(4, 2)),
        lambda: grouped.whole(torch.zeros(4, 128), rows),
        lambda: mxfp8(e4m3, exponents[:, :2]),
        lambda: mxfp8(e4m3.view(torch.uint8), exponents),
        lambda: float_blocks([(e4m3, torch.ones(1, 4))]),
        lambda: float_blocks([(e4m3, torch.ones(1, 1).bfloat16())]),
        lambda: whole(torch.zeros(4, 128, dtype=torch.bfloat16), rows),
        lambda: whole(e4m3, torch.ones(())),
    )
    for one in refused:
        with pytest.raises(ValueError, match=r"expected .* got "):
            one()


def test_a_recipe_of_known_parts_is_one_row(by_token: Scheme, tmp_path: Path) -> None:
    """NVFP4 weights with FP8 activations scaled by token: read, prepared and computed on the reference path."""
    error, backend = error_of_a_layer(checkpoint_of(tmp_path / "checkpoint", by_token), by_token)
    assert backend == "dense_float32"
    assert error < TOLERANCE


def test_its_backends_are_those_whose_properties_match(by_token: Scheme) -> None:
    for capability in CAPABILITIES:
        names = [backend.name for backend in select.candidates(asked(by_token, capability), "layer")]
        streamed = ["gluon_streamed"] if capability == 90 else []
        assert names == [*streamed, "triton_block_scaled", "dense_bfloat16", "dense_float32"]


def interpreted_error() -> float:
    """Run the row's layer through the block-scaled backend in Triton's interpreter; the worst relative error of a token."""
    backend, worst = BlockScaled(), 0.0
    number, activation = WEIGHT_FORMATS[BY_TOKEN.weights[0]], BY_TOKEN.activation_format()
    assert activation is not None
    stored = number.quantize(random_weight())
    for capability in (80, 90):
        request = asked(BY_TOKEN, capability)
        assert backend.supports(request) is None
        x = torch.randn(5, K, generator=torch.Generator().manual_seed(1))
        values, row_scale = activation.quantize(x, None)
        y = backend.matmul(
            backend.prepare([ShardWeight(number, stored)]),
            values.to(backend.operand(request)),
            row_scale,
            None,
            torch.float32,
        )
        right = rounded(x, BY_TOKEN) @ decoded(stored, 16).T
        assert torch.equal(naive_linear(x, number.decode(stored), activation, None), right)
        worst = max(worst, float(((y.double() - right).norm(dim=1) / right.norm(dim=1)).max()))
    return worst


def test_its_kernel_in_the_interpreter() -> None:
    script = "from tests.unit.test_number_types import interpreted_error; print(interpreted_error())"
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert float(done.stdout) < TOLERANCE


class _Scaled:
    """A known format under one more scale, of all its outputs."""

    output_scale = "weight_scale_2"

    def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        return super().quantize(weight) | {"weight_scale_2": torch.tensor(0.75)}  # type: ignore[misc]

    def decode(self, tensors: dict[str, torch.Tensor]) -> Any:
        return dataclasses.replace(super().decode(tensors), out_scale=tensors["weight_scale_2"])  # type: ignore[misc]

    def blocks(self, tensors: dict[str, torch.Tensor]) -> Any:
        found = super().blocks(tensors)  # type: ignore[misc]
        return None if found is None else dataclasses.replace(found, out_scale=tensors["weight_scale_2"])


class ScaledMXFP4(_Scaled, MXFP4Weight):
    pass


class ScaledMXFP8(_Scaled, MXFP8Weight):
    pass


class ScaledBlocks(_Scaled, FP8BlockWeight):
    pass


@pytest.mark.parametrize("number", [ScaledMXFP4(), ScaledMXFP8(), ScaledBlocks()], ids=lambda one: one.name)
def test_a_scale_of_outputs_is_never_lost(number: Any) -> None:
    """A known number type under a scale of all outputs: every backend that reads the type keeps the scale, or rejects it."""
    stored = number.quantize(random_weight())
    plain = WEIGHT_FORMATS[number.name]
    kept = refused = 0
    for backend in select.BACKENDS:
        try:
            expected = backend.prepare([ShardWeight(plain, stored)]).out_scale * 0.75
        except (ValueError, KeyError, ImportError):  # another number type, no low-rank branch, no package
            continue
        if isinstance(backend, FlashInferMxfp8):
            with pytest.raises(ValueError, match="expected no scale of outputs, got weight_scale_2"):
                backend.prepare([ShardWeight(number, stored)])
            refused += 1
            continue
        assert torch.equal(backend.prepare([ShardWeight(number, stored)]).out_scale, expected), backend.name
        kept += 1
    assert (kept, refused) == {"mxfp4": (10, 0), "mxfp8": (3, 1), "fp8_block": (2, 0)}[number.name]
    for experts in (GroupedDecoded(), GroupedMxfp4()):
        try:
            expected = experts.prepare([[ShardWeight(plain, stored)]]).out_scale * 0.75
        except ValueError:
            continue
        assert torch.equal(experts.prepare([[ShardWeight(number, stored)]]).out_scale, expected)
    with pytest.raises(ValueError, match="expected no scale of outputs"):
        Humming().prepare([ShardWeight(ScaledMXFP4(), ScaledMXFP4().quantize(random_weight()))])


@pytest.mark.parametrize("algo", SCHEMES)
def test_a_prepared_weight_is_built_from_its_tensors_alone(algo: str) -> None:
    """Layers keep the static part; the tensors are their parameters, and nothing else holds them."""
    scheme = SCHEMES[algo]
    number = WEIGHT_FORMATS[scheme.weights[0]]
    stored = number.quantize(random_weight())
    for capability in (80, 90, 100, 120):
        for backend in select.candidates(asked(scheme, capability, n=N, k=K, packages={}), "layer"):
            weight = backend.prepare([ShardWeight(number, stored)])
            build, tensors = without_tensors(weight), tensors_of(weight)
            assert not any(isinstance(value, torch.Tensor) for value in build.keywords.values())  # type: ignore[attr-defined]
            assert build(**tensors) == weight
            assert weight.out_scale.shape == (N,)


@pytest.mark.parametrize("activation", ACTIVATION_FORMATS.values(), ids=lambda one: one.name)
def test_activations_store_a_scale_where_they_say_so(activation: Any) -> None:
    assert bool(activation.tensors) == (activation.row_scale == "static") == (activation.calibrated_range is not None)
    assert (activation.token_amax(torch.ones(1, 128)) is not None) == (activation.row_scale == "token")
    values, row_scale = activation.quantize(torch.ones(2, 128), torch.ones(()) if activation.tensors else None)
    assert (row_scale is None) == (activation.row_scale is None)
    block = activation.blocks(torch.ones(2, 128), torch.ones(()) if activation.tensors else None)
    size = activation.number_type.block
    assert (block is None) == (size is None)
    if block is not None:
        assert block.scale.shape == (2, 128 // size[1])
        assert block.codes.shape[1] * 8 == 128 * activation.number_type.bits
    assert values.shape == (2, 128)


@pytest.mark.parametrize("number", WEIGHT_FORMATS.values(), ids=lambda one: one.name)
def test_weights_store_what_they_say(number: Any) -> None:
    """Bits to an element, the size and type of block scales, and the scale of outputs."""
    specs = {spec.name: spec for spec in number.tensors}
    stored = number.quantize(random_weight())
    assert stored["weight"].nbytes * 8 == N * K * number.number_type.bits
    if number.number_type.block is not None:
        rows, columns = number.number_type.block
        assert stored["weight_scale"].numel() == -(-N // rows) * (K // columns)
        dtype = {"e4m3": torch.float8_e4m3fn, "ue8m0": torch.uint8, "float32": torch.float32}
        assert stored["weight_scale"].dtype == dtype[number.number_type.block_scale]
    scale = number.decode(stored).out_scale
    if number.output_scale is None:
        assert torch.equal(scale, torch.ones(()))
    else:
        assert torch.equal(scale.reshape(-1), stored[number.output_scale].reshape(-1))
        assert specs[number.output_scale].is_scalar == (scale.dim() == 0)


@pytest.mark.parametrize(("block", "scale"), [((1, 16), None), (None, "e4m3"), ((1, 0), "e4m3")])
def test_half_a_number_type_is_none(block: Any, scale: Any) -> None:
    with pytest.raises(ValueError, match="blocks and their scales come together"):
        NumberType("e2m1", block, scale)


FORMAT_NAMES = frozenset({*WEIGHT_FORMATS, *ACTIVATION_FORMATS})
OWN_NAMES = FORMAT_NAMES - {"fp8", "int4_awq", "mxfp4", "mxfp8", "nvfp4"}
"""Names of nothing but formats: the others also name KV formats, flags, ModelOpt's formats and kernels' kinds."""
OF_A_FORMAT = ("weight", "activation", "format", "number", "number_format")
"""Names that a weight or activation format goes by."""
OTHER_NAMES: dict[str, tuple[int, str]] = {
    "sglang_modelopt_ext/integration/kv/hooks.py": (1, "KV formats go by the names of --kv-cache-dtype"),
    "sglang_modelopt_ext/workflow/bench/models.py": (3, "a benchmark makes one model for each of its recipes, by name"),
    "sglang_modelopt_ext/workflow/bench/options.py": (1, "a benchmark's own names of its recipes"),
    "sglang_modelopt_ext/workflow/quantize/checks.py": (1, "names of ModelOpt's exporter, some of which are ours too"),
}
"""Files with comparisons of names that are not those of weight or activation formats: how many, and whose names they are."""


def comparisons_of_names(source: str) -> Iterator[int]:
    """Lines that compare the ``name`` of a format, look something up by it, or write one down, as keys of a dictionary or alone."""

    def is_name(node: ast.expr) -> bool:
        return (
            isinstance(node, ast.Attribute)
            and node.attr == "name"
            and (
                (isinstance(node.value, ast.Attribute) and node.value.attr in OF_A_FORMAT)
                or (isinstance(node.value, ast.Name) and node.value.id in OF_A_FORMAT)
            )
        )

    def holds_names(node: ast.expr) -> bool:
        return any(is_name(one) for one in ast.walk(node) if isinstance(one, ast.expr))

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            if any(holds_names(side) for side in (node.left, *node.comparators)):
                yield node.lineno
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            looked_up = node.func.attr in ("get", "startswith", "endswith", "removeprefix", "split")
            if looked_up and any(is_name(one) for one in (node.func.value, *node.args)):
                yield node.lineno
        elif isinstance(node, ast.Subscript):
            if is_name(node.slice):
                yield node.lineno
        elif isinstance(node, ast.Dict):
            keys = {key.value for key in node.keys if isinstance(key, ast.Constant)}
            if len(keys & FORMAT_NAMES) > 1:
                yield node.lineno
        elif isinstance(node, ast.Constant) and node.value in OWN_NAMES:
            yield node.lineno


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("if scheme.weight.name == 'nvfp4': pass", True),
        ("if activation is not None and activation.name in FP8: pass", True),
        ("if (scheme.weight.name, a) != (b, c): pass", True),
        ("scheme.weight.name.startswith('nvfp4')", True),
        ("KINDS.get(request.scheme.weight.name)", True),
        ("KINDS[shards[0].format.name]", True),
        ("KINDS = {'fp8': 'e4m3', 'mxfp8': 'e4m3_exponent'}", True),
        ("FP8_ACTIVATIONS = ('fp8_static', 'fp8_per_token')", True),
        ("f'{scheme.weight.name} weights'", False),
        ("if scheme.weight.number_type == NVFP4: pass", False),
        ("if spec.name in stored: pass", False),
    ],
)
def test_comparisons_of_names_are_found(source: str, found: bool) -> None:
    assert bool(list(comparisons_of_names(source))) == found


def test_formats_are_matched_by_their_properties() -> None:
    """A name says which format a recipe has, in messages, tables of schemes and files of timings; it decides nothing."""
    formats = ROOT / "kernels" / "sglang_modelopt_kernels" / "formats"
    rows = ROOT / "sglang_modelopt_ext" / "schemes" / "table.py"
    found = {
        str(path.relative_to(ROOT)): list(comparisons_of_names(path.read_text(encoding="utf-8")))
        for folder in ("sglang_modelopt_ext", "kernels/sglang_modelopt_kernels")
        for path in (ROOT / folder).rglob("*.py")
        if formats not in path.parents and path != rows
    }
    assert len(found) > 200
    assert {path: len(lines) for path, lines in found.items() if lines} == {
        path: count for path, (count, _) in OTHER_NAMES.items()
    }, {path: lines for path, lines in found.items() if lines}
