"""Decode attention: one new token of each request over its packed cache, split over programs (flash decoding)."""

from sglang_modelopt_kernels.attention.decode.decode import DecodeScratch, decode_attention
from sglang_modelopt_kernels.attention.decode.naive import naive_decode

__all__ = ["DecodeScratch", "decode_attention", "naive_decode"]
