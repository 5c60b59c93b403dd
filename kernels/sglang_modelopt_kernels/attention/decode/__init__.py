"""One new token of each request over its packed cache, the cache split over programs."""

from sglang_modelopt_kernels.attention.decode.decode import DecodeScratch, decode_attention
from sglang_modelopt_kernels.attention.decode.naive import naive_decode

__all__ = ["DecodeScratch", "decode_attention", "naive_decode"]
