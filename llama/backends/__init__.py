"""What computes a layer: torch's operations, Inductor, the CPU kernels or the Triton kernels."""
