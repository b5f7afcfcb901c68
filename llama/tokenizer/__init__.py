"""Turn text into token ids and back, whatever file the tokenizer comes in. Knows no model and no chat format."""

from llama.tokenizer.stream import StreamDecoder
from llama.tokenizer.tokenizer import Tokenizer, find_tokenizer

__all__ = ["StreamDecoder", "Tokenizer", "find_tokenizer"]
