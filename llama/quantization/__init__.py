"""Quantized weights: blocks as GGUF stores them, and the orders in which kernels read them."""
