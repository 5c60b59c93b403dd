"""Matrix products with quantized weights, one folder each, every kernel beside its naive twin."""
