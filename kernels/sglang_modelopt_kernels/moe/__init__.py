"""Mixtures of experts: routing of tokens to experts, the product of all experts, its activation, and the weighted sum.

A *pair* is a token and one of its ``top_k`` experts: pair ``r`` is choice ``r % top_k`` of token ``r // top_k``.
"""
