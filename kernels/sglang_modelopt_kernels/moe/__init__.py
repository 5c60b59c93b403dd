"""Mixtures of experts: which rows an expert gets, the products of all experts at once, and what stands between and after them.

A *pair* is a token and one of its ``top_k`` experts: pair ``r`` is choice ``r % top_k`` of token ``r // top_k``.
"""
