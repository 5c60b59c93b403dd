"""The check before serving reaches every launch and configuration that M chooses, on every architecture."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sglang_modelopt_ext.backends import self_test, tokens
from sglang_modelopt_ext.backends.base import Backend, LinearRequest, PreparedT, PreparedWeight, ShardWeight, tensors_of
from sglang_modelopt_ext.backends.experts.base import ExpertBackend, ExpertRequest
from sglang_modelopt_ext.backends.select import BACKENDS, EXPERT_BACKENDS, served_scheme
from sglang_modelopt_ext.device import Device
from sglang_modelopt_ext.schemes.base import LayerScheme
from sglang_modelopt_ext.schemes.table import SCHEMES
from sglang_modelopt_kernels.formats import WEIGHT_FORMATS
from sglang_modelopt_kernels.gemm.common.launch import machine

CAPABILITIES = (80, 89, 90, 100, 103, 120)
SMS = 132
SMALL, LARGE = 512, 4096
"""N and K of what is prepared, and of the check."""
OWN = [b for b in BACKENDS if type(b).check_tokens is not Backend.check_tokens]
OWN_EXPERTS = [b for b in EXPERT_BACKENDS if type(b).check_tokens is not ExpertBackend.check_tokens]

Path = Callable[[int], Hashable]


def on_a_gpu(whole: PreparedT, half: PreparedT) -> PreparedT:
    """A weight without values on a GPU, as ``whole`` but for N and K of :data:`LARGE`: ``half`` tells which sizes grow."""
    others, grown = tensors_of(half), {}
    with FakeTensorMode():
        for name, tensor in tensors_of(whole).items():
            sizes = zip(tensor.shape, others[name].shape, strict=True)
            shape = [size * LARGE // SMALL if size != other else size for size, other in sizes]
            grown[name] = torch.empty(shape, dtype=tensor.dtype, device="cuda")
    return dataclasses.replace(whole, **grown)


def shard(weight: str, size: int, math: Any) -> ShardWeight:
    number = WEIGHT_FORMATS[weight]
    x = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    return ShardWeight(number, number.quantize(x.to(torch.bfloat16)), math)


def asked_for(kind: type, algo: str, weight: str, capability: int, **fields: Any) -> Any:
    device, row = Device.cuda(capability), SCHEMES[algo]
    scheme = served_scheme(LayerScheme(algo, WEIGHT_FORMATS[weight], row.activation_format()), device)
    return kind(scheme, device, LARGE, LARGE, **fields)


@dataclass(frozen=True)
class Check:
    """The check of one kind of layer: the path that each M runs, from 1 on, and the check's numbers of tokens."""

    where: str
    paths: list[Hashable]
    numbers: tuple[int, ...]

    def changes(self) -> set[int]:
        """The numbers of tokens from which another path is taken."""
        return {m + 1 for m in range(1, len(self.paths)) if self.paths[m] != self.paths[m - 1]}


@pytest.fixture(scope="module", name="every_check")
def fixture_every_check() -> Iterator[dict[bool, list[Check]]]:
    """Every check of linear layers, and of experts under True."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield {experts: list(checks(monkeypatch, experts)) for experts in (False, True)}
    machine.cache_clear()


def checks(monkeypatch: pytest.MonkeyPatch, experts: bool) -> Iterator[Check]:
    """Yield the checks of every kind of layer that a backend of this package serves, on every architecture."""
    seen: list[list[Hashable]] = []

    def covering(path: Path) -> tuple[int, ...]:
        seen.append([path(m) for m in range(1, tokens.MOST + 1)])
        return tokens.covering(lambda m: seen[-1][m - 1])

    prepared: dict[Any, PreparedWeight] = {}
    for backend in OWN_EXPERTS if experts else OWN:
        for module in {importlib.import_module(kind.__module__) for kind in type(backend).__mro__[:-1]}:
            if hasattr(module, "covering"):
                monkeypatch.setattr(module, "covering", covering)
        for algo, row in SCHEMES.items():
            for weight, math in [(name, math) for name in row.weights for math in ("exact", "fp8")]:
                if math == "fp8" and not row.rounds_weight_to_fp8:
                    continue
                for capability in CAPABILITIES:
                    fields = {"experts": self_test.EXPERTS, "top_k": self_test.TOP_K} if experts else {}
                    kind = ExpertRequest if experts else LinearRequest
                    request = asked_for(kind, algo, weight, capability, math=math, packages={}, **fields)
                    if backend.supports(request) is not None:
                        continue
                    key = backend, weight, math
                    if key not in prepared:
                        whole, half = (prepare(backend, shard(weight, size, math)) for size in (SMALL, SMALL // 2))
                        prepared[key] = on_a_gpu(whole, half)
                    properties = SimpleNamespace(
                        major=capability // 10, minor=capability % 10, multi_processor_count=SMS
                    )
                    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, found=properties: found)
                    machine.cache_clear()
                    more = (self_test.TOP_K,) if experts else ()
                    numbers = backend.check_tokens(prepared[key], request, *more)
                    yield Check(f"{backend.name} {algo} {weight} {math} SM{capability}", seen[-1], numbers)


def prepare(backend: Backend | ExpertBackend, stored: ShardWeight) -> PreparedWeight:
    if isinstance(backend, ExpertBackend):
        return backend.prepare([[stored]] * self_test.EXPERTS)
    return backend.prepare([stored])


def test_every_backend_with_a_triton_product_says_what_it_chooses() -> None:
    for backend in (*BACKENDS, *EXPERT_BACKENDS):
        assert bool(backend.kernels) == (backend in (*OWN, *OWN_EXPERTS)), backend.name


@pytest.mark.parametrize("experts", [False, True])
def test_the_check_takes_every_path(every_check: dict[bool, list[Check]], experts: bool) -> None:
    for check in every_check[experts]:
        assert {check.paths[m - 1] for m in check.numbers} == set(check.paths), check.where
        assert len(check.numbers) <= len(tokens.SPREAD) + 2, f"{check.where}: as many products as elsewhere"
    names = {check.where.split()[0] for check in every_check[experts]}
    assert names == {backend.name for backend in (OWN_EXPERTS if experts else OWN)}


def thresholds(package: str) -> dict[str, tuple[int, ...]]:
    """Every constant of a package of kernels that names a number of tokens or of pairs to choose by."""
    found = {}
    root = importlib.import_module(f"sglang_modelopt_kernels.{package}")
    for module in pkgutil.walk_packages(root.__path__, f"{root.__name__}."):
        if module.name.endswith(".kernel"):
            continue
        for name, value in vars(importlib.import_module(module.name)).items():
            if name.isupper() and name.endswith(("_FROM", "_ABOVE")):
                values = value.values() if isinstance(value, dict) else (value,)
                found[f"{module.name}.{name}"] = tuple(values)
    return found


def test_both_sides_of_every_threshold_are_paths_of_the_check(every_check: dict[bool, list[Check]]) -> None:
    """A constant that no path depends on at its value is one that the check does not know."""
    known = thresholds("gemm")
    assert len(known) >= 5
    found = set().union(*(check.changes() for check in every_check[False]))
    for name, values in known.items():
        assert set(values) <= found, name


def test_both_sides_of_every_threshold_of_experts_are_paths_of_the_check(every_check: dict[bool, list[Check]]) -> None:
    """Thresholds are pairs to an expert; without ``_ABOVE`` the first that count, and with it, the last that do not."""
    known = thresholds("moe")
    assert len(known) >= 4
    found = set().union(*(check.changes() for check in every_check[True]))
    for name, values in known.items():
        for value in values:
            above = name.endswith("_ABOVE")
            pairs = value * self_test.EXPERTS + above
            assert -(-pairs // self_test.TOP_K) in found, name


@pytest.mark.parametrize("threshold", [100, 500, 3000])
def test_a_new_threshold_gets_a_number_on_both_sides(threshold: int) -> None:
    numbers = tokens.covering(lambda m: m >= threshold)
    assert numbers[0] == 1
    assert any(m >= threshold for m in numbers)
    assert len(tokens.covering(lambda m: 0)) == 2
