"""Make random checkpoints of real shapes, for tools and tests."""
