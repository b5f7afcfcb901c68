"""Backends, which compute the layers: torch's operations, Inductor, the CPU kernels or the Triton kernels."""
