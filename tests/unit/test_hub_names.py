"""What names of models say, and which files of a repository they choose: by names alone, without a network."""

from __future__ import annotations

from pathlib import Path

import pytest

from llama.hub.choice import Choice, choose, choose_tokenizer, gguf_type
from llama.hub.find import local_path, meant
from llama.hub.names import ModelName, names_model, parse_name

NAMES = {
    "org/name": ModelName("org/name"),
    "org/name:Q4_K_M": ModelName("org/name", type="Q4_K_M"),
    "org/name:q4_k_m@v1.0": ModelName("org/name", type="q4_k_m", revision="v1.0"),
    "org/name@refs/pr/1:Q8_0": ModelName("org/name", type="Q8_0", revision="refs/pr/1"),
    "org/name/original": ModelName("org/name", "original"),
    "org/a-b_c.d/Q4_K_M/x-00001-of-00002.gguf": ModelName("org/a-b_c.d", "Q4_K_M/x-00001-of-00002.gguf"),
    "https://huggingface.co/org/name": ModelName("org/name"),
    "https://huggingface.co/org/name/tree/dev/original": ModelName("org/name", "original", revision="dev"),
    "hf.co/org/name/blob/main/m.Q8_0.gguf?x=1": ModelName("org/name", "m.Q8_0.gguf"),
    "hf://org/name:Q8_0": ModelName("org/name", type="Q8_0"),
}
PATHS = (
    "name",
    "./org/name",
    "../x",
    "/org/name",
    "~/name",
    "org/name/",
    "C:/models",
    "models/a.gguf",
    "a/b:c:d",
    "a/-b",
)


@pytest.mark.parametrize("text", NAMES)
def test_a_name_says_repository_part_type_and_revision(text: str) -> None:
    assert parse_name(text) == NAMES[text]


def test_a_name_is_shown_as_it_is_taken() -> None:
    for text in NAMES:
        name = parse_name(text)
        assert name is not None and parse_name(str(name)) == name


@pytest.mark.parametrize("text", PATHS)
def test_what_looks_like_a_path_is_no_name(text: str) -> None:
    """It would otherwise be looked up on the hub, although a folder of this disk was meant."""
    assert parse_name(text) is None
    assert local_path(text) == text


def test_a_path_that_exists_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert names_model("org/name") and names_model("demo")
    for path in (Path("org/name"), Path("demo")):
        path.mkdir(parents=True)
        assert not names_model(str(path)) and local_path(path) == path


def test_a_path_that_is_not_there_suggests_a_name() -> None:
    names = ["org/Llama-3.2-1B", "org/other"]
    assert meant(Path("llama-3.2-1b"), names) == "; did you mean org/Llama-3.2-1B?"
    assert meant(Path("demmo"), names) == "; did you mean demo?"
    assert meant(Path("xyz"), names) == "; a model of the hub is named org/name"
    assert meant(Path("folder/xyz"), names) == ""


BESIDE = ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"]
PARTS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
BINS = ["pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"]
META = ["consolidated.00.pth", "consolidated.01.pth", "params.json", "tokenizer.model"]
OTHERS = [
    "README.md",
    "LICENSE",
    ".gitattributes",
    "model.onnx",
    "tf_model.h5",
    "flax_model.msgpack",
    "training_args.bin",
]
LLAMA = [*BESIDE, *PARTS, *BINS, *OTHERS, *(f"original/{file}" for file in META)]


def chosen(text: str, files: list[str]) -> tuple[set[str], str]:
    name = parse_name(text)
    assert name is not None
    choice = choose(name, files)
    return set(choice.files), choice.opened


def test_only_the_files_that_are_needed_are_chosen() -> None:
    """A repository of Meta's has everything three times, and 70B three times are 420 GB."""
    assert chosen("org/name", LLAMA) == ({*BESIDE, *PARTS}, "")
    assert chosen("org/name/original", LLAMA) == ({f"original/{file}" for file in META}, "original")
    without = [file for file in LLAMA if file not in PARTS]
    assert chosen("org/name", without) == ({*BESIDE, *BINS}, "")
    assert chosen("org/name", ["model.safetensors", *LLAMA])[0] == {*BESIDE, "model.safetensors"}
    assert chosen("org/name", [*META, *OTHERS]) == (set(META), "")
    mistral = ["consolidated.safetensors", "params.json", "tekken.json"]
    assert chosen("org/name", [*mistral, *OTHERS]) == (set(mistral), "")
    assert "consolidated.safetensors" not in chosen("org/name", [*mistral, *BESIDE, *PARTS])[0]


def test_parts_with_names_of_their_own_are_chosen_by_their_index() -> None:
    files = ["a-1.safetensors", "a-2.safetensors", "model.safetensors.index.json", "config.json"]
    assert chosen("org/name", [*files, "sub/b.safetensors"])[0] == set(files)


def test_what_says_how_weights_are_quantized_is_chosen() -> None:
    """Without it the folder says nothing of its codes, and is refused; the weights may have a name of AutoGPTQ's."""
    for beside in ("quantize_config.json", "quant_config.json", "hf_quant_config.json", "quantization_config.json"):
        assert chosen("org/name", [*BESIDE, beside, "model.safetensors", *OTHERS])[0] == {
            *BESIDE, beside, "model.safetensors",
        }  # fmt: skip
    own = [*BESIDE, "quantize_config.json", "gptq_model-4bit-128g.safetensors"]
    assert chosen("org/name", [*own, *OTHERS]) == (set(own), "")
    assert chosen("org/name", [*own, "m-Q4_K_M.gguf"])[0] == {"m-Q4_K_M.gguf"}


GGUFS = [
    *("m-Q2_K.gguf", "m-Q4_K_M.gguf", "m-UD-Q4_K_XL.gguf", "m-Q8_0.gguf", "m.BF16.gguf", "mmproj-m-Q4_K_M.gguf"),
    *("Q6_K/m-Q6_K-00001-of-00002.gguf", "Q6_K/m-Q6_K-00002-of-00002.gguf", "m.imatrix.gguf", "README.md"),
]


@pytest.mark.parametrize(
    ("text", "files"),
    [
        ("org/name", ["m-Q4_K_M.gguf"]),
        ("org/name:q8_0", ["m-Q8_0.gguf"]),
        ("org/name:bf16", ["m.BF16.gguf"]),
        ("org/name:Q4_K_XL", ["m-UD-Q4_K_XL.gguf"]),
        ("org/name:ud-q4_k_xl", ["m-UD-Q4_K_XL.gguf"]),
        ("org/name:Q6_K", ["Q6_K/m-Q6_K-00001-of-00002.gguf", "Q6_K/m-Q6_K-00002-of-00002.gguf"]),
        ("org/name/m-Q2_K.gguf", ["m-Q2_K.gguf"]),
        ("org/name/Q6_K", ["Q6_K/m-Q6_K-00001-of-00002.gguf", "Q6_K/m-Q6_K-00002-of-00002.gguf"]),
    ],
)
def test_a_type_chooses_its_gguf_file(text: str, files: list[str]) -> None:
    assert chosen(text, GGUFS) == (set(files), files[0])


def test_without_a_type_gguf_files_are_chosen_as_llama_cpp_does() -> None:
    """Q4_K_M, or else the first; and only where there is nothing else."""
    assert chosen("org/name", ["m-Q8_0.gguf", "m-F16.gguf"])[1] == "m-F16.gguf"
    assert chosen("org/name", [*GGUFS, *BESIDE, *PARTS])[1] == ""
    assert chosen("org/name:Q8_0", [*GGUFS, *BESIDE, *PARTS])[1] == "m-Q8_0.gguf"


@pytest.mark.parametrize(
    ("text", "files", "words"),
    [
        (
            "org/name:Q4_K",
            GGUFS,
            "no GGUF file of type Q4_K: did you mean :Q4_K_M? It has BF16, Q2_K, Q4_K_M, Q6_K, Q8_0, UD-Q4_K_XL",
        ),
        ("org/name:Q4_K_M", LLAMA, "org/name has no GGUF files, and so none of type Q4_K_M: leave :Q4_K_M out"),
        ("org/name/orginal", LLAMA, "org/name has no orginal: it has .gitattributes, LICENSE"),
        ("org/name/config.json", LLAMA, "is one file of a model: give org/name"),
        ("org/name", ["README.md", "data/x"], "no weights that can be read: looked for model.safetensors, "),
        ("org/name", ["adapter_config.json", "adapter_model.safetensors"], "org/name is a peft adapter"),
        ("org/name:Q6_K", ["m-Q6_K-00001-of-00002.gguf"], "one of 2 files, and m-Q6_K-00002-of-00002.gguf of them"),
    ],
)
def test_what_a_repository_lacks_is_told_with_what_it_has(text: str, files: list[str], words: str) -> None:
    with pytest.raises(ValueError) as caught:
        chosen(text, files)
    assert words in str(caught.value)


def test_a_tokenizers_files_are_chosen_without_weights() -> None:
    assert choose_tokenizer(ModelName("org/name"), LLAMA).files == tuple(
        sorted(file for file in BESIDE if file != "generation_config.json")
    )
    assert choose_tokenizer(ModelName("org/name", "original"), LLAMA).opened == "original"
    one = choose_tokenizer(ModelName("org/name", "original/tokenizer.model"), LLAMA)
    assert one == Choice(("original/tokenizer.model",), "original/tokenizer.model")
    with pytest.raises(ValueError, match=r"org/name has no tokenizer.json, .* it has Q6_K/, README.md"):
        choose_tokenizer(ModelName("org/name"), GGUFS)


@pytest.mark.parametrize(
    ("file", "kind"),
    [("a/M.q5_k_m.gguf", "Q5_K_M"), ("x-IQ4_XS.gguf", "IQ4_XS"), ("x-f16-00001-of-00009.gguf", "F16"), ("x.gguf", "x")],
)
def test_the_type_of_a_file_is_the_end_of_its_name(file: str, kind: str) -> None:
    assert gguf_type(file) == kind
