"""Checkpoints of every format behind one protocol of whole tensors, and the rule that gives each rank its part."""

from llama.checkpoint.base import Checkpoint, StoredCheckpoint
from llama.checkpoint.load import load_weights
from llama.checkpoint.open import open_checkpoint

__all__ = ["Checkpoint", "StoredCheckpoint", "load_weights", "open_checkpoint"]
