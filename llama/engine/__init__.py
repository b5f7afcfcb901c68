"""Requests become tokens: what is loaded, which rows run together, and the runners that compute their steps."""
