"""The quantized KV cache inside SGLang: its buffers, and the numbers of each attention layer."""
