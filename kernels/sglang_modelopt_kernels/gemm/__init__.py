"""Matrix products with quantized weights, one folder each, every one beside its naive twin."""
