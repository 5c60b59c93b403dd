"""Rounding of keys and values and their writing to the cache in one launch, and the rotation of queries."""

from sglang_modelopt_kernels.attention.store.naive import naive_rotate_queries, naive_store_kv
from sglang_modelopt_kernels.attention.store.store import rotate_queries, store_kv

__all__ = ["naive_rotate_queries", "naive_store_kv", "rotate_queries", "store_kv"]
