"""Small Hugging Face tokenizer folders of every kind, made here: what the tests of tokenizer.json run on."""

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tests.unit.test_tokenizer import LLAMA3_SPLIT, PARAGRAPHS

SPACE = "▁"
KINDS = ["llama3", "llama2", "llama2_new", "smollm", "yi", "code_llama", "unigram", "saved"]


def special(*texts: str) -> list[AddedToken]:
    return [AddedToken(text, special=True, normalized=False) for text in texts]


def bos_template(tokenizer: tokenizers.Tokenizer, bos: str) -> processors.TemplateProcessing:
    ids = [(bos, tokenizer.token_to_id(bos))]
    return processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=ids)


def write(folder: Path, tokenizer: tokenizers.Tokenizer, config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def llama3(folder: Path, bpe: tokenizers.Tokenizer) -> Path:
    """With a piece that no merge leads to, which ignore_merges finds."""
    model = json.loads(bpe.to_str())["model"]
    vocab = model["vocab"] | {"Ġqqqq": len(model["vocab"])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, [tuple(m) for m in model["merges"]], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "special"))
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), bos_template(tokenizer, "<|begin_of_text|>")]
    )
    config = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    return write(folder, tokenizer, config)


def converted(spm_path: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a SentencePiece model as transformers converts them, control pieces included."""
    from transformers.tokenization_utils_base import generate_merges

    sp = sentencepiece.SentencePieceProcessor(model_file=str(spm_path))
    vocab = {sp.id_to_piece(i): i for i in range(sp.vocab_size())}
    return vocab, generate_merges(vocab, {sp.id_to_piece(i): sp.get_score(i) for i in range(sp.vocab_size())})


def sentencepiece_like(spm_path: Path, *added: str, prefix: bool = True) -> tokenizers.Tokenizer:
    vocab, merges = converted(spm_path)
    for text in added:
        vocab.setdefault(text, len(vocab))
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace] if prefix else [replace])
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * prefix)
    tokenizer.add_special_tokens(special("<unk>", "<s>", "</s>", *added))
    if prefix:
        tokenizer.post_processor = bos_template(tokenizer, "<s>")
    return tokenizer


def llama2(folder: Path, spm_path: Path) -> Path:
    """With tokens added behind the vocabulary: one special, one found in text."""
    tokenizer = sentencepiece_like(spm_path)
    tokenizer.add_special_tokens(special("<pad>"))
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    names = {"bos_token": {"content": "<s>", "__type": "AddedToken"}, "eos_token": "</s>", "pad_token": "<pad>"}
    return write(folder, tokenizer, names | {"unk_token": "<unk>", "tokenizer_class": "PreTrainedTokenizerFast"})


def llama2_new(folder: Path, spm_path: Path) -> Path:
    """Saved by transformers 5's own class: Metaspace at the first place of a text."""
    from transformers import LlamaTokenizer

    vocab, merges = converted(spm_path)
    tokenizer = LlamaTokenizer(vocab=vocab, merges=merges)
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    tokenizer.add_bos_token = True  # type: ignore[misc]  # it can be set, whatever its type says
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def smollm(folder: Path) -> Path:
    """Special tokens are the first pieces of the vocabulary; a few bytes are missing."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(PARAGRAPHS * 3, trainer)
    tokenizer.add_tokens([AddedToken("<tool_call>", normalized=False)])
    config = {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "add_prefix_space": False,
        "add_bos_token": True,
        "chat_template": "{{ messages }}",
        "tokenizer_class": "GPT2Tokenizer",
    }
    return write(folder, tokenizer, config)


def yi(folder: Path, spm_path: Path) -> Path:
    tokenizer = sentencepiece_like(spm_path, "<|startoftext|>", "<|endoftext|>", "<|im_end|>", prefix=False)
    names = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<unk>"}
    return write(folder, tokenizer, names | {"add_bos_token": False, "tokenizer_class": "PreTrainedTokenizerFast"})


def code_llama(folder: Path, spm_path: Path) -> Path:
    tokenizer = sentencepiece_like(spm_path, "▁<PRE>", "▁<MID>", "▁<SUF>", "▁<EOT>")
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return write(folder, tokenizer, names | {"tokenizer_class": "PreTrainedTokenizerFast"})


def unigram(folder: Path) -> Path:
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(SPACE, prepend_scheme="always")
    specials = ["<unk>", "<s>", "</s>"]
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=specials, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(PARAGRAPHS * 3, trainer)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return write(folder, tokenizer, names | {"tokenizer_class": "PreTrainedTokenizerFast"})


def saved(folder: Path, source: Path) -> Path:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = {"default": "{{ 1 }}", "tool_use": "{{ 2 }}"}
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory, bpe: tokenizers.Tokenizer, spm_path: Path) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hf")
    made = {
        "llama3": llama3(root / "llama3", bpe),
        "llama2": llama2(root / "llama2", spm_path),
        "llama2_new": llama2_new(root / "llama2_new", spm_path),
        "smollm": smollm(root / "smollm"),
        "yi": yi(root / "yi", spm_path),
        "code_llama": code_llama(root / "code_llama", spm_path),
        "unigram": unigram(root / "unigram"),
    }
    return made | {"saved": saved(root / "saved", made["llama3"])}


def reference(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, split_special_tokens=True)
