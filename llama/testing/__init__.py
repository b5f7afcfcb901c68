"""Random checkpoints of real shapes, for tools and tests."""
