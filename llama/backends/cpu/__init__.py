"""The package's own CPU kernels: C++ that is compiled once for this machine, and cached."""
