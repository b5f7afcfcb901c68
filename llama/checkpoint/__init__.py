"""Read checkpoints of every format behind one protocol of whole tensors, and give each rank its part of them."""

from llama.checkpoint.base import Checkpoint, StoredCheckpoint
from llama.checkpoint.load import load_weights
from llama.checkpoint.lora_files import with_adapters
from llama.checkpoint.open import open_checkpoint

__all__ = ["Checkpoint", "StoredCheckpoint", "load_weights", "open_checkpoint", "with_adapters"]
