"""What makes CUDA devices fast: kernels in Triton, layers that run by them, and CUDA graphs of whole steps."""
