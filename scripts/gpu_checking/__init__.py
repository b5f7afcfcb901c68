"""The parts of scripts/gpu_check.py: random models, checks, measurements, peers, and what is said of them."""
