"""Tolerances for every test of a served model. Imports nothing."""

from __future__ import annotations

FP32_MEDIAN = 1e-3
"""Median over tokens of the largest |difference| of a token's log probabilities, for two float32 runs of one model.

Most tokens agree to about 1e-5. Where an activation lies within float32's 1e-7 of the middle between two codes, the runs may
round it apart; that token and those after it in the prompt then move by tenths, in either run alike. Over several short prompts
the median is untouched by that, while a wrong scale, a missing rounding or a scale of another shard moves every token
(tests/unit/test_support_reference.py: the median is then above 0.3).
"""

NOISE_FACTOR = 2.0
"""Allowed distance of a bf16 server from the float32 reference, in units of the same model run in bf16 by Hugging Face.

Both are one random draw of rounding errors; server and Hugging Face round in different places.
"""
