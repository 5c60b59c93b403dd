"""SGLang's Triton attention backend around our kernels: its own decode step, on a CPU, where a recorder stands for the kernel."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_modelopt_ext.integration.kv import backend as module
from sglang_modelopt_ext.integration.kv.backend import ModelOptExtTritonBackend
from sglang_modelopt_kernels.attention.decode import DecodeScratch, decode_attention

HEADS, GROUP, HEAD_DIM, MOST = 2, 4, 64, 5


@pytest.fixture
def backend() -> ModelOptExtTritonBackend:
    """Return a backend with the fields of a decode step; its constructor needs a GPU's kernels."""
    made = object.__new__(ModelOptExtTritonBackend)
    made.scratch = DecodeScratch(MOST, GROUP * HEADS, HEADS, HEAD_DIM, 132, "cpu")
    made.max_kv_splits = 1
    made.decode_attention_fwd = made._decode
    for name in ("use_mla", "enable_deterministic", "enable_lean_attention", "use_pdl", "is_draft_runner"):
        setattr(made, name, False)
    made.dcp_size = made.page_size = 1
    made.token_to_kv_pool = SimpleNamespace(get_key_buffer=lambda _: "keys", get_value_buffer=lambda _: "values")
    made.forward_metadata = SimpleNamespace(
        **dict.fromkeys(("swa_out_cache_loc", "swa_attn_logits", "lean_Mp", "lean_Lp", "lean_Op", "lean_locks")),
        uneven_batch=None,
        kv_indptr="indptr",
        kv_indices="indices",
        attn_logits="SGLang's",
        attn_lse="SGLang's",
        num_kv_splits="SGLang's",
    )
    return made


def decode(backend: ModelOptExtTritonBackend, requests: int) -> torch.Tensor:
    layer = SimpleNamespace(
        tp_q_head_num=GROUP * HEADS,
        tp_k_head_num=HEADS,
        qk_head_dim=HEAD_DIM,
        v_head_dim=HEAD_DIM,
        layer_id=3,
        scaling=0.125,
        sliding_window_size=-1,
        logit_cap=30.0,
        logit_capping_method="tanh",
        k_scale=None,
        v_scale=None,
        xai_temperature_len=-1,
    )
    q = torch.zeros(requests, GROUP * HEADS * HEAD_DIM)
    batch = SimpleNamespace(batch_size=requests, seq_lens_sum=7 * requests)
    out: torch.Tensor = backend.forward_decode(q, q, q, layer, batch, save_kv_cache=False)
    return out


@pytest.mark.parametrize("requests", [1, 3, MOST])
def test_a_decode_step_reaches_the_kernel(
    backend: ModelOptExtTritonBackend, monkeypatch: pytest.MonkeyPatch, requests: int
) -> None:
    calls: list[dict[str, Any]] = []

    def record(*arguments: Any, **options: Any) -> None:
        calls.append(dict(inspect.signature(decode_attention).bind(*arguments, **options).arguments))

    monkeypatch.setattr(module, "decode_attention", record)
    out = decode(backend, requests)
    (call,) = calls
    partial, lse = backend.scratch.of(requests, GROUP * HEADS)
    assert call["attn_logits"].data_ptr() == partial.data_ptr()
    assert call["attn_logits"].shape == partial.shape
    assert call["attn_lse"].shape == lse.shape
    assert call["max_kv_splits"] == partial.shape[2] > 1
    assert (call["k_buffer"], call["v_buffer"]) == ("keys", "values")
    assert (call["kv_indptr"], call["kv_indices"]) == ("indptr", "indices")
    assert (call["sm_scale"], call["k_scale"], call["v_scale"], call["logit_cap"]) == (0.125, 1.0, 1.0, 30.0)
    assert call["q"].shape == call["o"].shape == (requests, GROUP * HEADS, HEAD_DIM)
    assert call["o"].data_ptr() == out.data_ptr()


def test_a_larger_batch_than_the_pool_has_requests_is_refused(backend: ModelOptExtTritonBackend) -> None:
    with pytest.raises(ValueError, match="5 requests, not 6"):
        decode(backend, MOST + 1)
