"""Sorting of pairs by expert, into blocks of one expert each."""

from sglang_modelopt_kernels.moe.route.naive import naive_route
from sglang_modelopt_kernels.moe.route.route import Routed, most_blocks, route, unsorted

__all__ = ["Routed", "most_blocks", "naive_route", "route", "unsorted"]
