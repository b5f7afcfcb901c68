"""Llama 2's tags, which are plain text in its vocabulary, under Meta's names."""

B_INST, E_INST = "[INST]", "[/INST]"
B_SYS, E_SYS = "<<SYS>>\n", "\n<</SYS>>\n\n"
SPECIAL_TAGS = [B_INST, E_INST, "<<SYS>>", "<</SYS>>"]

# The answer of Meta's code to a dialog that spells them out.
UNSAFE_ERROR = "Error: special tags are not allowed as part of the prompt."
