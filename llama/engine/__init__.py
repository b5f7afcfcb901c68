"""Requests become tokens: loading a model, scheduling sequences, and the runners that compute decode steps."""
