"""Rounded activations handed over from a module to the product after it: observed, taken once, never of another tensor."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sglang_modelopt_ext.layers import handover
from sglang_modelopt_ext.layers.handover import OBSERVED_PASSES, Producer, Rounding, hand_over, observe, take

WANTED = Rounding(None, None, torch.float8_e4m3fn)


@pytest.fixture(autouse=True)
def no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover._Products, "present", False)


def test_a_module_learns_from_the_product_that_gets_its_output() -> None:
    producer, x = Producer(), torch.ones(2, 4)
    observe(x, producer)
    assert take(x, WANTED) is None
    assert producer.wanted is WANTED


@pytest.mark.parametrize("change", [lambda x: x.add_(1), lambda x: x.mul_(0)])
def test_an_output_that_was_changed_teaches_nothing(change) -> None:  # type: ignore[no-untyped-def]
    producer, x = Producer(), torch.ones(2, 4)
    observe(x, producer)
    change(x)
    assert take(x, WANTED) is None
    assert producer.wanted is None


@pytest.mark.parametrize("inference", [False, True])
def test_a_view_of_the_whole_output_gets_what_lies_beside_it(inference: bool) -> None:
    """As blocks of experts pass their input on; once, and also as the tensor that a module learns from."""
    with torch.inference_mode(inference):
        producer, x = Producer(), torch.ones(2, 4)
        observe(x, producer)
        assert take(x.view(-1, 4), WANTED) is None
        assert producer.wanted is WANTED
        values = x.to(torch.float8_e4m3fn)
        hand_over(x, producer, WANTED, values, torch.ones(2, 1))
        found = take(x.view(-1, 4), WANTED)
        assert found is not None
        assert found[0] is values
        assert take(x.view(-1, 4), WANTED) is None
        assert take(x, WANTED) is None


def test_a_view_of_an_output_that_was_changed_gets_nothing() -> None:
    producer, x = Producer(WANTED), torch.ones(2, 4)
    hand_over(x, producer, WANTED, x.to(torch.float8_e4m3fn), torch.ones(2, 1))
    view = x.view(2, 4)
    view.mul_(2)
    assert take(view, WANTED) is None


@pytest.mark.parametrize(
    "other",
    [
        lambda x: x.clone(),
        lambda x: x[:2],
        lambda x: x.t(),
        lambda x: x.view(2, 8),
        lambda x: x.view(torch.int32),
    ],
)
def test_another_tensor_gets_nothing(other: Callable[[torch.Tensor], torch.Tensor]) -> None:
    producer, x = Producer(WANTED), torch.ones(4, 4)
    hand_over(x, producer, WANTED, x.to(torch.float8_e4m3fn), torch.ones(4, 1))
    assert take(other(x), WANTED) is None
    assert take(x, WANTED) is not None


def test_what_was_taken_lives_as_long_as_the_output() -> None:
    """Another stream may still read it, which SGLang joins before it lets go of the output."""
    producer, x = Producer(WANTED), torch.ones(4, 4)
    values = x.to(torch.float8_e4m3fn)
    alive = weakref.ref(values)
    hand_over(x, producer, WANTED, values, torch.ones(4, 1))
    del values
    found = take(x.view(4, 4), WANTED)
    assert found is not None
    del found
    assert alive() is not None
    del x
    assert alive() is None


def test_what_lay_beside_an_output_goes_with_it() -> None:
    """A later tensor may have its memory."""
    with torch.inference_mode():  # in which a view does not keep it
        producer, x = Producer(WANTED), torch.ones(4, 4)
        view = x.view(4, 4)
        hand_over(x, producer, WANTED, x.to(torch.float8_e4m3fn), torch.ones(4, 1))
        del x
        assert take(view, WANTED) is None


def test_values_are_taken_once_and_only_as_wanted() -> None:
    producer, x = Producer(WANTED), torch.ones(2, 4)
    values, row_scale = x.to(torch.float8_e4m3fn), torch.ones(2, 1)
    same = Rounding(None, None, torch.float8_e4m3fn)
    hand_over(x, producer, WANTED, values, row_scale)
    found = take(x, same)
    assert found is not None
    assert found[0] is values
    assert found[1] is row_scale
    assert take(x, same) is None
    for other in (
        Rounding(torch.ones(4), None, torch.float8_e4m3fn),
        Rounding(None, torch.ones(()), torch.float8_e4m3fn),
        Rounding(None, None, torch.float16),
    ):
        hand_over(x, producer, WANTED, values, row_scale)
        assert take(x, other) is None


def test_values_of_a_tensor_that_was_changed_since_are_not_taken() -> None:
    producer, x = Producer(WANTED), torch.ones(2, 4)
    hand_over(x, producer, WANTED, x.to(torch.float8_e4m3fn), torch.ones(2, 1))
    x.mul_(2)
    assert take(x, WANTED) is None
    assert producer.wanted is WANTED


def test_a_consumer_with_new_tensors_is_learned_again() -> None:
    """After an update of its weights a product has other tensors; equal values in another tensor are not the same scale."""
    old, new = (Rounding(None, torch.ones(()), torch.float8_e4m3fn) for _ in range(2))
    producer, x = Producer(old, left=0), torch.ones(2, 4)
    hand_over(x, producer, old, x.to(torch.float8_e4m3fn), torch.ones(()))
    assert take(x, new) is None
    assert producer.wanted is None
    observe(x, producer)
    assert take(x, new) is None
    assert producer.wanted is new


def test_an_output_that_no_product_takes_is_not_observed_for_ever() -> None:
    producer = Producer()
    for _ in range(OBSERVED_PASSES):
        observe(torch.ones(2, 4), producer)
    x = torch.ones(2, 4)
    observe(x, producer)
    assert take(x, WANTED) is None
    assert producer.wanted is None


def test_modules_are_left_alone_in_a_process_without_a_product() -> None:
    assert not handover.wants_handover()
    handover.announce_product()
    assert handover.wants_handover()


SCRIPT = """
import torch
from types import SimpleNamespace
from sglang_modelopt_ext.integration import rounding
from sglang_modelopt_ext.layers import handover
from sglang_modelopt_kernels.quantize.fp8 import naive_quantize_fp8
from sglang.srt.layers.activation import SiluAndMul
from sglang.srt.layers.layernorm import RMSNorm

handover.announce_product()
torch.manual_seed(0)
norm, act = RMSNorm(64), SiluAndMul()
norm.weight.data = torch.randn(64).bfloat16()
wanted = handover.Rounding(None, None, torch.float8_e4m3fn)

def close(a, b):
    return torch.allclose(a.float(), b.float(), rtol=2.0**-7, atol=2.0**-7)

def norm_of(x, residual):
    return rounding.rms_norm(lambda self, *a: self.forward_native(*a[:2]), norm, x, residual)

for passes in range(3):
    x, residual = torch.randn(3, 64).bfloat16(), torch.randn(3, 64).bfloat16()
    right, right_residual = norm.forward_native(x.clone(), residual.clone())
    y, total = norm_of(x.clone(), residual.clone())
    found = handover.take(y, wanted)
    # The cast of Triton's interpreter to bf16 does not round to nearest.
    assert close(y, right) and close(total, right_residual), passes
    assert (found is not None) == (passes > 0), passes
    if found is not None:
        values, scale = naive_quantize_fp8(y, None, None, None)
        assert torch.equal(found[0].float(), values) and torch.equal(found[1], scale)
    h = torch.randn(3, 128).bfloat16()
    y = rounding.silu_and_mul(lambda self, h: self.forward_native(h), act, h)
    found = handover.take(y, wanted)
    assert close(y, act.forward_native(h)), passes
    assert (found is not None) == (passes > 0), passes

# What the kernel does not compute is SGLang's own, whatever was learned.
called = []
def original(self, *arguments):
    called.append(arguments)
    return arguments[0]
x = torch.randn(3, 64).bfloat16()
for arguments in ((x, None, x), (x.float(),), (x[:, ::2].new_ones(3, 32),), (x[:0],), (x.view(3, 1, 64),)):
    rounding.rms_norm(original, norm, *arguments)
norm.variance_size_override = 32
rounding.rms_norm(original, norm, x)
assert len(called) == 6, len(called)
print("done")
"""


def test_sglangs_modules_round_what_a_product_takes() -> None:
    """The hooks around SGLang's own modules, in Triton's interpreter."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=300, cwd=Path.cwd()
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "done"
