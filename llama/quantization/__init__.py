"""Quantized weights: blocks as GGUF stores them, and the layouts that kernels read."""
