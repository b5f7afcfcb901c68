"""Write any checkpoint as a Meta folder, a Hugging Face folder or a GGUF file."""
