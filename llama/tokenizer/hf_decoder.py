"""What a `tokenizer.json` says beside its vocabulary: how text is prepared, where BOS goes, how pieces become bytes.

A pipeline is the file's normalizer, pre-tokenizer, post-processor and decoder, each as the list of its steps in JSON.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from llama.tokenizer.hf_limits import check_growth, check_part, check_steps

Pipeline = dict[str, list[dict[str, Any]]]
# Each part of a pipeline, and the key under which a sequence of its kind has the steps.
PARTS = dict(normalizer="normalizers", pre_tokenizer="pretokenizers", post_processor="processors", decoder="decoders")


def library_tokenizer(pipeline: Pipeline, model: Any = None, added: Sequence[Any] = ()) -> Any:
    """Return a `tokenizers.Tokenizer`; its model is shared and not copied, or takes every word for an "a"."""
    import tokenizers

    frame = {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}
    sequences = {name: {"type": "Sequence", PARTS[name]: steps} for name, steps in pipeline.items()}
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(frame | sequences))
    tokenizer.model = model or tokenizer.model
    tokenizer.add_tokens(list(added))
    return tokenizer


def parse_pipeline(content: dict[str, Any]) -> Pipeline:
    """Return the pipeline of a parsed tokenizer.json as the library writes it: no key is missing or mistyped.

    Raises ValueError for a part that the library does not know, or that could take it too much memory or time.
    """
    pipeline = {}
    for name, part in ((name, content.get(name)) for name in PARTS):
        try:
            check_part(part)
            written = library_tokenizer({name: [] if part is None else [part]}).to_str()
            pipeline[name] = list(_steps(json.loads(written)[name], PARTS[name]))
            check_steps(pipeline[name])
        except Exception as error:
            said = f"the tokenizers library knows no such {name}" if "untagged enum" in str(error) else error
            raise ValueError(f"its {name} is {part!r:.80}: {said}") from None
    check_growth([*pipeline["normalizer"], *pipeline["pre_tokenizer"]])
    return pipeline


def _steps(node: dict[str, Any], key: str) -> Iterator[dict[str, Any]]:
    """Yield the steps of a part in order, with its sequences flattened."""
    if node["type"] != "Sequence":
        yield node
    for inner in node.get(key, ()):
        yield from _steps(inner, key)


def without_prefix_space(pipeline: Pipeline) -> Pipeline:
    """Return a pipeline that puts no space before a text, and otherwise does the same."""
    never: dict[str, Any] = {"prepend_scheme": "never", "add_prefix_space": False}
    plain = [{key: never.get(key, value) for key, value in step.items()} for step in pipeline["pre_tokenizer"]]
    normalizer = [step for step in pipeline["normalizer"] if step["type"] != "Prepend"]
    return pipeline | {"normalizer": normalizer, "pre_tokenizer": plain}


def has_prefix_space_after_special(pipeline: Pipeline) -> bool:
    """Return whether text after an added token gets a prefix space too: what transformers calls legacy."""
    return any(
        step["type"] == "Prepend" or step.get("prepend_scheme") == "always" or step.get("add_prefix_space", False)
        for step in (*pipeline["normalizer"], *pipeline["pre_tokenizer"])
    )


def bos_of(pipeline: Pipeline) -> int | None:
    """Return the id that the post-processor puts before every text; None when it puts none.

    transformers goes by the post-processor alone as well: it ignores add_bos_token beside a tokenizer.json.
    """
    for step in pipeline["post_processor"]:
        if sum("Sequence" in item for item in step.get("single", ({"Sequence": "A"},))) != 1:
            raise ValueError(f"its post_processor is {step!r:.80}: expected a text's tokens once")
    encoding = library_tokenizer({"post_processor": pipeline["post_processor"]}).encode("a")
    before: list[int] = encoding.ids[: encoding.special_tokens_mask.index(0)]
    if len(before) > 1:
        raise ValueError(f"its post_processor begins a text with the ids {before!r:.60}: expected one token")
    return before[0] if before else None


def decoder_steps(pipeline: Pipeline) -> list[dict[str, Any]]:
    """Return the steps of the decoder or, where the file has none, those that undo how it prepares text.

    Raises ValueError for a step that does not decode each piece by itself, or that could make a piece very long.
    """
    undo = [step for step in pipeline["pre_tokenizer"] if step["type"] in ("ByteLevel", "Metaspace")]
    spaces = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    steps = pipeline["decoder"] or undo or [spaces, {"type": "ByteFallback"}]
    for step in steps:
        kind = step["type"]
        strips_one = kind == "Strip" and (step["start"], step["stop"]) in ((0, 0), (1, 0))
        replaces = kind == "Replace" and len(step["content"]) <= len(step["pattern"].get("String", "")) > 0
        if not (kind in ("ByteLevel", "ByteFallback", "Fuse", "Metaspace") or strips_one or replaces):
            raise ValueError(
                f"its decoder has the step {step!r:.80}: supported are ByteLevel, ByteFallback, Fuse, Metaspace, "
                "Strip of one character at the start, and Replace of a text by one no longer"
            )
    return steps
