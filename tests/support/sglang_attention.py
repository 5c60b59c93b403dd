"""SGLang's FlashInfer and TensorRT-LLM backends on a CPU: its own code and pools, with PyTorch in place of the kernels.

Only what needs the hardware is replaced, each by the computation in its source: FlashInfer's attention, SGLang's fused FP8
write (``fused_fp8_qkv_kv_cache.cuh``) and the NVFP4 quantizer, scatter and dequantizer. Attention runs in float64 over the bytes of
the pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_modelopt_kernels.formats.nvfp4 import NVFP4DynamicBlock
from tests.support.recipes import decode_fp4, to_e4m3

E4M3 = torch.float8_e4m3fn
PAGE = 16


def softmax_product(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return attention in float64: ``[M, Hq, D]`` over ``[N, H, D]`` under ``mask`` ``[M, N]``, and the log-sum-exp."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(groups, dim=1) for x in (k, v))
    logits = torch.einsum("mhd,nhd->mhn", q.double(), k) * scale
    logits = logits.masked_fill(~mask[:, None, :], -torch.inf)
    return torch.einsum("mhn,nhd->mhd", torch.softmax(logits, -1), v), torch.logsumexp(logits, -1)


def causal(new: int, total: int, window: int = -1) -> torch.Tensor:
    """Return the mask of the last ``new`` of ``total`` tokens; with a window, the keys from p - window on."""
    query = torch.arange(total - new, total)[:, None]
    key = torch.arange(total)[None, :]
    seen = key <= query
    return seen & (query <= key + window) if window >= 0 else seen


@dataclass
class Batch:
    """One forward pass: for each request the slots of all its tokens, and how many of them are new."""

    slots: Sequence[torch.Tensor]
    new: Sequence[int]

    @property
    def prefixes(self) -> list[int]:
        """Return the number of cached tokens of each request."""
        return [len(slots) - new for slots, new in zip(self.slots, self.new, strict=True)]

    @property
    def write(self) -> torch.Tensor:
        """Return the slots of the new tokens."""
        return torch.cat([slots[len(slots) - new :] for slots, new in zip(self.slots, self.new, strict=True)])

    def parts(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return the rows of new tokens by request."""
        return list(torch.split(x, list(self.new)))


def _pages(buffer: torch.Tensor) -> torch.Tensor:
    """Return ``[pages, H, page, width]`` as rows of slots ``[slots, H, width]``."""
    return buffer.permute(0, 2, 1, 3).flatten(0, 1)


def _plain_v_scales(native: torch.Tensor) -> torch.Tensor:
    """Return V's block scales ``[pages, H, page, D / 16]`` in token order, by SGLang's own coordinates."""
    from sglang.srt.layers.quantization.nvfp4_kv_cache import nvfp4_v_scale_swizzle_indices

    page, width = native.shape[2:]
    token, index = torch.meshgrid(torch.arange(page), torch.arange(width), indexing="ij")
    return native[:, :, *nvfp4_v_scale_swizzle_indices(token, index, width)]


def decode_kv(kv: Any, scales: Any, native: bool) -> list[torch.Tensor]:
    """Return the keys and values that a TensorRT-LLM kernel gets, float32 ``[slots, H, D]``, without their scales."""
    if scales is None:
        return [_pages(x.view(torch.uint8)).view(E4M3).float() for x in kv]
    found = []
    for side, (codes, scale) in enumerate(zip(kv, scales, strict=True)):
        scale = scale.view(torch.uint8)
        rows = _pages(_plain_v_scales(scale) if native and side else scale).view(E4M3).float()
        packed = _pages(codes.view(torch.uint8))
        values = decode_fp4(packed.reshape(-1, packed.shape[-1])).view(*packed.shape[:-1], -1)
        found.append(values * rows.repeat_interleave(16, dim=-1))
    return found


@dataclass
class Kernels:
    """Stand-ins for FlashInfer's functions; ``batch`` is the current pass, ``calls`` the recorded arguments."""

    batch: Batch | None = None
    native: bool = False
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def trtllm(self, name: str, **given: Any) -> torch.Tensor:
        """Return stand-ins for ``trtllm_batch_decode_with_kv_cache`` and ``trtllm_batch_context_with_kv_cache``."""
        self.calls.append((name, given))
        assert given["sinks"] is None
        keys, values = decode_kv(given["kv_cache"], given["kv_cache_sf"], self.native)
        query, lengths = given["query"], given["seq_lens"].tolist()
        starts = given["cum_seq_lens_q"].tolist() if "cum_seq_lens_q" in given else list(range(len(lengths) + 1))
        rows = []
        for index, total in enumerate(lengths):
            pages = given["block_tables"][index].long()
            slots = (pages[:, None] * PAGE + torch.arange(PAGE)).flatten()[:total]
            q = query[starts[index] : starts[index + 1]].float()
            mask = causal(len(q), total, given["window_left"])
            rows.append(softmax_product(q, keys[slots], values[slots], given["bmm1_scale"], mask)[0])
        result = torch.cat(rows) * given["bmm2_scale"]
        out = given["out"]
        if out is None:
            return result.to(given["out_dtype"])
        out.copy_(to_e4m3(result.float()) if out.dtype == E4M3 else result)
        return out

    def paged(self, q: torch.Tensor, kv: Any, indices: Sequence[torch.Tensor], **given: Any) -> Any:
        """Return a stand-in for FlashInfer's paged wrappers (page size 1): all queries see cached tokens unless causal."""
        self.calls.append(("paged", given))
        assert self.batch is not None
        keys, values = (x.view(E4M3).float() for x in kv)
        rows, sums = [], []
        for part, slots in zip(self.batch.parts(q), indices, strict=True):
            mask = causal(len(part), len(slots)) if given["causal"] else torch.ones(len(part), len(slots), dtype=bool)
            scale = given["sm_scale"] * (given["k_scale"] or 1.0)
            row, lse = softmax_product(part.float(), keys[slots], values[slots], scale, mask)
            rows.append(row.nan_to_num(0.0) * (given["v_scale"] or 1.0))
            sums.append(lse)
        return torch.cat(rows).to(q.dtype), torch.cat(sums)

    def ragged(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **given: Any) -> Any:
        """Return a stand-in for FlashInfer's ragged wrapper: the new tokens among themselves, unquantized."""
        self.calls.append(("ragged", given))
        assert self.batch is not None
        found = [
            softmax_product(*parts, given["sm_scale"], causal(len(parts[0]), len(parts[0])))
            for parts in zip(*map(self.batch.parts, (q, k, v)), strict=True)
        ]
        return torch.cat([row for row, _ in found]).to(q.dtype), torch.cat([lse for _, lse in found])


def merge_state(out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor) -> Any:
    """Merge two attentions over different keys, like FlashInfer."""
    both = torch.logaddexp(lse_a, lse_b)
    merged = out_a.double() * torch.exp(lse_a - both)[..., None] + out_b.double() * torch.exp(lse_b - both)[..., None]
    return merged.to(out_a.dtype), both


def _fused_write(
    q: torch.Tensor | None,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_loc: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
) -> torch.Tensor | None:
    for x, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        rows = to_e4m3(x.float() * (1.0 / scale.float())).to(E4M3)
        cache.view(torch.uint8)[cache_loc] = rows.view(torch.uint8)
    return None if q is None else to_e4m3(q.float()).to(E4M3)


def _quantize_fp4(x: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    codes, scales = NVFP4DynamicBlock().encode(x.float().reshape(-1, x.shape[-1]), scale.reshape(()))
    codes = codes.view(torch.uint8)
    packed = codes[:, 0::2] | codes[:, 1::2] << 4
    return packed.view(*x.shape[:-1], -1), scales.view(torch.uint8).view(*x.shape[:-1], -1).view(E4M3), scale


def _dequantize_fp4(packed: torch.Tensor, scales: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    values = decode_fp4(packed.reshape(-1, packed.shape[-1])).view(*packed.shape[:-1], -1)
    return (values * scales.view(E4M3).float().repeat_interleave(16, dim=-1) * scale).to(torch.bfloat16)


def _store_fp4(k: Any, v: Any, k_sf: Any, v_sf: Any, loc: torch.Tensor, *buffers: Any) -> None:
    from sglang.srt.layers.quantization.nvfp4_kv_cache import nvfp4_v_scale_swizzle_indices

    k_dst, v_dst, k_linear, v_linear, k_native, v_native, page = buffers
    k_dst[loc], v_dst[loc] = k, v
    if k_linear is not None:
        k_linear[loc], v_linear[loc] = k_sf, v_sf
    if k_native is not None:
        pages, offsets, width = loc // page, loc % page, k_sf.shape[-1]
        k_native[pages, :, offsets] = k_sf
        index = torch.arange(width).expand(len(loc), width)
        token, place = nvfp4_v_scale_swizzle_indices(offsets[:, None].expand_as(index), index, width)
        for head in range(v_sf.shape[1]):
            v_native[pages[:, None], head, token, place] = v_sf[:, head]


def replace_kernels(patch: pytest.MonkeyPatch) -> Kernels:
    """Put the stand-ins where SGLang looks for the kernels."""
    import sglang.kernels.ops.kvcache.fused_fp8_qkv_kv_cache as fused
    import sglang.srt.layers.attention.flashinfer_backend as flashinfer_backend
    import sglang.srt.layers.attention.trtllm_mha_backend as trtllm_backend
    import sglang.srt.layers.quantization.nvfp4_kv_cache as nvfp4
    from sglang.srt.layers.quantization.kvfp4_tensor import NVFP4KVQuantizeUtil

    kernels = Kernels()

    def named(name: str) -> Any:
        return lambda **given: kernels.trtllm(name, **given)

    decode, context = "trtllm_batch_decode_with_kv_cache", "trtllm_batch_context_with_kv_cache"
    package = SimpleNamespace(
        decode=SimpleNamespace(**{decode: named(decode)}), prefill=SimpleNamespace(**{context: named(context)})
    )
    patch.setattr(trtllm_backend, "flashinfer", package, raising=False)
    patch.setattr(flashinfer_backend, "_safe_merge_state", merge_state, raising=False)
    patch.setattr(fused, "fused_fp8_qkv_kv_cache", _fused_write)
    patch.setattr(NVFP4KVQuantizeUtil, "quantize", staticmethod(_quantize_fp4))
    patch.setattr(NVFP4KVQuantizeUtil, "dequantize", staticmethod(_dequantize_fp4))
    patch.setattr(nvfp4, "store_nvfp4_kv_cache", _store_fp4)
    return kernels


def make_pool(fp4: bool, backends: tuple[str, str], sm100: bool, heads: int, head_dim: int, pages: int) -> Any:
    """Return SGLang's FP8 or NVFP4 pool of one layer, made like its configurator makes it for these backends."""
    from sglang.srt.layers.quantization.fp4_kv_cache_quant_method import NVFP4KVCacheMethod
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    method = None
    if fp4:
        method = NVFP4KVCacheMethod(num_layers=1, device="cpu", page_size=PAGE, native_scale_layout=sm100)
        method.configure_attention_backends(*backends)
    return MHATokenToKVPool(
        pages * PAGE,
        page_size=PAGE,
        dtype=torch.float4_e2m1fn_x2 if fp4 else E4M3,
        head_num=heads,
        head_dim=head_dim,
        layer_num=1,
        device="cpu",
        enable_memory_saver=False,
        quant_method=method,
    )


def trtllm_backend(pool: Any, backends: tuple[str, str], sm100: bool, heads: int, dtype: torch.dtype) -> Any:
    """Return SGLang's TensorRT-LLM backend without its constructor, which needs a GPU, with the fields of its forwards."""
    from sglang.srt.layers.attention.trtllm_mha_backend import TRTLLMHAAttnBackend

    backend = object.__new__(TRTLLMHAAttnBackend)
    fp4 = pool.is_quantized_kv_cache
    native = {phase: fp4 and name == "trtllm_mha" for phase, name in zip(("prefill", "decode"), backends, strict=True)}
    vars(backend).update(
        token_to_kv_pool=pool,
        kv_cache_quant_method=pool.quant_method,
        data_type=pool.dtype,
        q_data_type=dtype,
        is_xqa_impl=not sm100,
        use_fmha_v2=not sm100,
        page_size=PAGE,
        max_context_len=1024,
        decode_uses_native_fp4=native["decode"],
        prefill_uses_native_fp4=native["prefill"],
        is_nvfp4_kvcache=fp4,
        uses_trtllm_gen_native_fp4=fp4 and sm100,
        decode_seq_len_splits=1,
        workspace_buffer=None,
        use_sliding_window_kv_pool=False,
        _swa_kv_pool=None,
        _xqa_spec_dec_mask=None,
        _multi_ctas_kv_counter_buffer=None,
        _default_kv_scale=torch.ones(1),
        _nvfp4_fp8_output=torch.empty(256, heads, pool.head_dim, dtype=E4M3),
    )
    return backend


def flashinfer_backend(pool: Any, kernels: Kernels) -> Any:
    """Return SGLang's FlashInfer backend without its constructor, which needs a GPU."""
    from sglang.srt.layers.attention.flashinfer_backend import FlashInferAttnBackend

    backend = object.__new__(FlashInferAttnBackend)
    vars(backend).update(
        token_to_kv_pool=pool,
        kv_cache_quant_method=pool.quant_method,
        prefill_uses_dequant_workspace=pool.is_quantized_kv_cache,
        decode_uses_dequant_workspace=False,
        page_size=PAGE,
        num_wrappers=1,
        is_dllm_model=False,
        prefill_wrapper_ragged=SimpleNamespace(
            forward=lambda q, k, v, **given: kernels.ragged(q, k, v, **given)[0], forward_return_lse=kernels.ragged
        ),
    )
    return backend


def forward(
    backend: Any,
    kernels: Kernels,
    batch: Batch,
    layer: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decode: bool,
    ragged: bool = True,
) -> torch.Tensor:
    """Run one pass of a layer through ``forward_decode`` or ``forward_extend``, with the metadata SGLang would make.

    ``ragged`` selects whether FlashInfer's prefill attends to the new tokens beside the cache or in it.
    """
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    kernels.batch = batch
    lengths = torch.tensor([len(slots) for slots in batch.slots])
    forward_batch = SimpleNamespace(
        forward_mode=ForwardMode.DECODE if decode else ForwardMode.EXTEND,
        out_cache_loc=batch.write,
        out_cache_loc_is_physical=False,
        batch_size=len(batch.slots),
        input_ids=None,
        _attn_output=None,
        req_pool_indices=torch.arange(len(batch.slots)),
        seq_lens_cpu=lengths,
        extend_prefix_lens_cpu=batch.prefixes,
        extend_seq_lens_cpu=list(batch.new),
    )
    if hasattr(backend, "prefill_wrapper_ragged"):
        _plan_flashinfer(backend, kernels, batch, forward_batch, decode, ragged)
    else:
        _plan_trtllm(backend, batch, lengths)
    call = backend.forward_decode if decode else backend.forward_extend
    return call(q.flatten(1), k, v, layer, forward_batch, save_kv_cache=True)


def _plan_trtllm(backend: Any, batch: Batch, lengths: torch.Tensor) -> None:
    from sglang.srt.layers.attention.trtllm_mha_backend import TRTLLMMHAMetadata

    pages = [slots[::PAGE] // PAGE for slots in batch.slots]
    counts = torch.tensor([0, *batch.new])
    backend.forward_metadata = TRTLLMMHAMetadata(
        cache_seqlens_int32=lengths.int(),
        max_seq_len_q=max(batch.new),
        cu_seqlens_q=counts.cumsum(0).int(),
        cu_seqlens_k=torch.tensor([0, *lengths.tolist()]).cumsum(0).int(),
        page_table=torch.nn.utils.rnn.pad_sequence(pages, batch_first=True).int(),
    )


def _plan_flashinfer(
    backend: Any, kernels: Kernels, batch: Batch, forward_batch: Any, decode: bool, ragged: bool
) -> None:
    table = torch.nn.utils.rnn.pad_sequence(list(batch.slots), batch_first=True)
    backend.req_to_token_pool = SimpleNamespace(req_to_token=table)
    backend._prepare_dequant_workspace_metadata_for_extend(forward_batch, ragged)
    indices = [
        slots[:prefix] if ragged and not decode else slots
        for slots, prefix in zip(batch.slots, batch.prefixes, strict=True)
    ]
    if backend.dq_page_table is not None and not decode:
        indices = list(torch.split(backend.dq_page_table[: sum(map(len, indices))].long(), list(map(len, indices))))

    def paged(q: torch.Tensor, kv: Any, **given: Any) -> Any:
        return kernels.paged(q, kv, indices, **{"causal": False, **given})

    wrapper = SimpleNamespace(forward=lambda q, kv, **given: paged(q, kv, **given)[0], forward_return_lse=paged)
    backend.forward_metadata = SimpleNamespace(
        prefill_wrappers=[wrapper],
        decode_wrappers=[wrapper],
        use_ragged=ragged,
        extend_no_prefix=not any(batch.prefixes),
        multi_item_params=None,
        swa_out_cache_loc=None,
    )
