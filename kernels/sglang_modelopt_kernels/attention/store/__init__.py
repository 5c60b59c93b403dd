"""Rounding keys and values and writing them to their slots, in one launch."""

from sglang_modelopt_kernels.attention.store.store import store_kv, turn_queries

__all__ = ["store_kv", "turn_queries"]
