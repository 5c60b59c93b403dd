"""E2M1 codes in 16-bit elements of four planes: the layout that kernels decode in registers."""
