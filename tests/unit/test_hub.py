"""Models by name, against a server on this machine that speaks the hub's protocol: what is downloaded, and told."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants, hf_hub_download, scan_cache_dir

from llama import Llama
from llama.checkpoint import open_checkpoint
from llama.cli import get, make, rm
from llama.cli import list as list_command
from llama.hub import demo
from llama.hub.find import local_path
from tests.hub_server import Hub

WEIGHTS = os.urandom(100_000)
HALF = 50_000
BYTES = {"model.safetensors": WEIGHTS, "config.json": b"{}", "tokenizer.json": b"{ }", "pytorch_model.bin": b"other"}
GGUFS = {"m-Q4_K_M.gguf": os.urandom(5000), "m-Q8_0.gguf": os.urandom(9000), "README.md": b"hello"}


@pytest.fixture(scope="module")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A whole model of Hugging Face's layout."""
    folder = tmp_path_factory.mktemp("made") / "tiny"
    make.main(folder, preset="tiny", format="hf", dtype="float32")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and nobody's token. huggingface_hub reads the environment when it is imported."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


@pytest.fixture
def hub(cache: Path, model_files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub({"org/bytes": BYTES, "org/ggufs": GGUFS, "org/tiny": model_files}) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield server


def test_a_model_is_built_by_its_name(hub: Hub) -> None:
    llm = Llama.build("org/tiny", max_seq_len=32, device="cpu", mute=False)
    by_path = Llama.build(local_path("org/tiny"), max_seq_len=32, device="cpu", mute=False)
    prompts = ["Hello world"]
    found, expected = (each.text_completion(prompts, temperature=0, max_gen_len=4) for each in (llm, by_path))
    assert found == expected
    draft = Llama.build("org/tiny", "org/tiny", 32, device="cpu", draft_ckpt_dir="org/tiny", mute=False)
    assert draft.text_completion(prompts, temperature=0, max_gen_len=4) == expected


def test_a_model_is_downloaded_once_and_only_what_is_needed_of_it(hub: Hub, cache: Path) -> None:
    path = Path(local_path("org/bytes"))
    assert {file.name: file.read_bytes() for file in path.iterdir()} == {
        name: content for name, content in BYTES.items() if name != "pytorch_model.bin"
    }
    sent = dict(hub.sent)
    assert sent["model.safetensors"] == len(WEIGHTS) and "pytorch_model.bin" not in sent
    assert local_path("org/bytes") == path
    assert {name: hub.sent[name] for name in BYTES if name in sent} == {
        name: sent[name] for name in BYTES if name in sent
    }


def test_other_libraries_find_what_was_downloaded_and_the_other_way_round(
    hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache is huggingface_hub's: nobody wants 140 GB twice."""
    path = Path(local_path("org/bytes"))
    ours = hf_hub_download("org/bytes", "model.safetensors", cache_dir=cache, local_files_only=True)
    assert Path(ours) == path / "model.safetensors"
    [repo] = scan_cache_dir(cache).repos
    assert repo.repo_id == "org/bytes" and repo.size_on_disk == len(WEIGHTS) + 5 and repo.refs.keys() == {"main"}
    theirs = hf_hub_download("org/ggufs", "m-Q8_0.gguf", cache_dir=cache, endpoint=hub.address)
    sent = hub.sent["m-Q8_0.gguf"]
    assert local_path("org/ggufs:q8_0") == Path(theirs)
    assert hub.sent["m-Q8_0.gguf"] == sent


def test_a_connection_that_breaks_is_made_again_from_there(hub: Hub) -> None:
    hub.cut["model.safetensors"] = HALF
    path = Path(local_path("org/bytes"))
    assert (path / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.sent["model.safetensors"] == len(WEIGHTS)


def test_a_download_that_was_ended_goes_on_in_the_next_run(hub: Hub, cache: Path) -> None:
    """huggingface_hub 2 itself begins anew: a Ctrl-C at 39 of 40 GB lost all of them."""
    hub.cut["model.safetensors"] = HALF
    hub.answers = [0, 403]
    with pytest.raises(OSError, match=r"answers 403 \(not now\) for org/bytes"):
        local_path("org/bytes")
    [part] = cache.rglob("*.incomplete")
    assert part.stat().st_size == HALF
    assert (Path(local_path("org/bytes")) / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.sent["model.safetensors"] == len(WEIGHTS)


def test_a_server_without_ranges_is_asked_for_all_again(hub: Hub) -> None:
    hub.knows_ranges = False
    hub.cut["model.safetensors"] = HALF
    assert (Path(local_path("org/bytes")) / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.sent["model.safetensors"] == len(WEIGHTS) + HALF


def test_a_mirror_that_tells_no_sizes_works(hub: Hub) -> None:
    hub.tells_sizes = False
    assert (Path(local_path("org/bytes")) / "model.safetensors").read_bytes() == WEIGHTS
    assert "pytorch_model.bin" not in hub.sent


def test_a_server_that_is_busy_is_asked_again(hub: Hub) -> None:
    hub.answers = [503]
    assert (Path(local_path("org/bytes")) / "model.safetensors").read_bytes() == WEIGHTS


def test_what_comes_damaged_is_told_and_comes_anew(hub: Hub, cache: Path) -> None:
    """What an interrupted run left may be of a file system that lost some of it."""
    hub.answers = [0, 403]
    hub.cut["model.safetensors"] = HALF
    with pytest.raises(OSError, match="403"):
        local_path("org/bytes")
    [part] = cache.rglob("*.incomplete")
    part.write_bytes(bytes(HALF))
    with pytest.raises(OSError, match=r"model.safetensors of org/bytes came damaged, .*: run this again"):
        local_path("org/bytes")
    assert (Path(local_path("org/bytes")) / "model.safetensors").read_bytes() == WEIGHTS


def test_a_disk_without_room_is_told_before_anything_comes(hub: Hub, cache: Path) -> None:
    hub.claimed["model.safetensors"] = 10**18
    with pytest.raises(OSError, match=r"org/bytes needs 1000000000.00 GB, and the disk of .* has .* free: make room"):
        local_path("org/bytes")
    assert not hub.sent["model.safetensors"] and not list(cache.rglob("*.incomplete"))


def test_a_cache_that_cannot_be_written_is_told(hub: Hub, cache: Path) -> None:
    cache.write_text("a file in the place of the folder")
    with pytest.raises(OSError, match=r"cannot write to the cache .*: name a folder that you may write to by HF_HOME"):
        local_path("org/bytes")


def test_gated_private_and_missing_models_say_what_to_do(
    hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = hub.address
    hub.gated, hub.private = {"org/bytes"}, {"org/ggufs"}
    told = {
        "org/bytes": f"org/bytes is gated: ask for access at {page}/org/bytes, make a token at {page}/settings/tokens",
        "org/ggufs": f"org/ggufs is neither a path here nor a model of the hub ({page}/models?search=ggufs finds names)"
        f"; if it is private, give HF_TOKEN a token of {page}/settings/tokens",
        "org/tiny@v2": f"org/tiny has no revision 'v2': {page}/org/tiny/commits shows which it has",
        "org/tiny:Q4_K_M": "org/tiny has no GGUF files, and so none of type Q4_K_M",
    }
    for name, words in told.items():
        with pytest.raises((OSError, ValueError)) as caught:
            local_path(name)
        assert words in str(caught.value)
    assert not [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"], "leaves nothing"
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert Path(local_path("org/ggufs")).name == "m-Q4_K_M.gguf"
    assert Path(local_path("org/bytes")).is_dir()
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(PermissionError, match=r"does not take the token of HF_TOKEN or `hf auth login` \(401\)"):
        local_path("org/tiny")


def test_a_mistyped_path_is_told_with_what_lies_beside_it(hub: Hub, tmp_path: Path) -> None:
    """`models/Lama` looks like a name."""
    (tmp_path / "models" / "Llama").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"models/Lama is neither a path here nor .*; models has Llama/$"):
        open_checkpoint("models/Lama")


def test_names_without_an_organisation_suggest_one(hub: Hub) -> None:
    local_path("org/bytes")
    with pytest.raises(FileNotFoundError, match=r"^ckpt_dir bites does not exist; .*; did you mean org/bytes\?$"):
        open_checkpoint("bites")


def test_a_revision_is_a_tag_or_a_commit_and_stays(hub: Hub) -> None:
    first = hub.commit("org/bytes")
    hub.tags["org/bytes"] = "v1"
    path = Path(local_path("org/bytes@v1"))
    assert path.name == first
    hub.repos["org/bytes"]["config.json"] = b'{"new": 1}'
    new = Path(local_path("org/bytes"))
    assert new != path and (new / "config.json").read_bytes() != (path / "config.json").read_bytes()
    assert hub.sent["model.safetensors"] == len(WEIGHTS), "what did not change came once"
    requests = hub.requests.total()
    assert local_path(f"org/bytes@{first}") == path
    assert hub.requests.total() == requests, "a commit never changes"


@pytest.mark.parametrize("way", ["offline", "no server"])
def test_what_is_in_the_cache_runs_without_a_network(
    way: str, hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = local_path("org/bytes")
    local_path("org/ggufs:Q8_0")
    if way == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    why = "HF_HUB_OFFLINE is set" if way == "offline" else "http://127.0.0.1:9 cannot be reached"
    assert local_path("org/bytes") == path
    assert Path(local_path("org/ggufs")).name == "m-Q8_0.gguf"
    assert (why in caplog.text) == (way == "no server")
    for name, words in {
        "org/tiny": "org/tiny is not in the cache .*, which has org/bytes, org/ggufs",
        "org/bytes@dev": "org/bytes@dev is not in the cache",
        "org/ggufs:Q4_K_M": "what is in the cache does not do .*no GGUF file of type Q4_K_M: .* has Q8_0",
    }.items():
        with pytest.raises(OSError, match=f"^{why}.*, and {words}"):
            local_path(name)
    (Path(path) / "model.safetensors").unlink()
    (Path(path) / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-1-of-1.safetensors"}})
    )
    with pytest.raises(OSError, match=r"org/bytes is incomplete in the cache .*: model-1-of-1.safetensors is missing"):
        local_path("org/bytes")


def test_without_links_files_lie_in_the_snapshot(
    hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On Windows only administrators and developers may make links."""

    def refused(*args: object, **kwargs: object) -> None:
        raise OSError("a required privilege is not held by the client")

    monkeypatch.setattr(os, "symlink", refused)
    path = Path(local_path("org/bytes"))
    assert not (path / "model.safetensors").is_symlink()
    assert (path / "model.safetensors").read_bytes() == WEIGHTS
    sent = hub.sent["model.safetensors"]
    assert local_path("org/bytes") == path and hub.sent["model.safetensors"] == sent
    rm.main(["org/bytes"], yes=True)
    assert not list(cache.glob("models--*"))


def test_models_are_listed_and_removed_by_the_names_that_load_them(
    hub: Hub,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(demo, "__file__", str(cache / "a" / "b" / "demo.py"))  # no checkout
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent))
    get.main(["org/tiny", "org/ggufs", "org/ggufs:Q8_0"])
    list_command.main(json=True)
    listed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(each["name"], each["type"], each["bytes"]) for each in listed[:2]] == [
        ("org/ggufs:Q4_K_M", "GGUF Q4_K_M", 5000),
        ("org/ggufs:Q8_0", "GGUF Q8_0", 9000),
    ]
    assert (listed[2]["name"], listed[2]["type"]) == ("org/tiny", "llama, safetensors")
    for each in listed:
        assert local_path(each["name"]) == Path(each["path"])
    list_command.main()
    assert (
        "org/ggufs:Q8_0    GGUF Q8_0           0.0 MB  today  hub/models--org--ggufs"
        in capsys.readouterr().out.replace(f"{cache.parent}/", "")
    )
    rm.main(["org/ggufs:q8_0"], yes=True)
    names = ["m-Q4_K_M.gguf", "m-Q8_0.gguf"]
    assert [len(list(cache.rglob(name))) for name in names] == [1, 0]
    assert sum(path.stat().st_size for path in (cache / "models--org--ggufs" / "blobs").iterdir()) == 5000
    rm.main(["org/ggufs:Q4_K_M", "org/tiny"], yes=True)
    assert not list(cache.glob("models--*")), "nothing is left of a repository without models"
    list_command.main()
    assert capsys.readouterr().out.splitlines()[-1] == "none: llama get NAME downloads one"
    with pytest.raises(FileNotFoundError, match="org/tiny is none of the models on this disk: llama list"):
        rm.main(["org/tiny"], yes=True)


def test_one_revision_of_two_is_removed_with_what_it_alone_needs(hub: Hub, cache: Path) -> None:
    hub.tags["org/bytes"] = "v1"
    old = Path(local_path("org/bytes@v1"))
    hub.repos["org/bytes"]["model.safetensors"] = os.urandom(60_000)
    new = Path(local_path("org/bytes"))
    rm.main(["org/bytes@v1"], yes=True)
    assert not (old / "model.safetensors").exists() and (new / "model.safetensors").stat().st_size == 60_000
    blobs = [path.stat().st_size for path in (cache / "models--org--bytes" / "blobs").iterdir()]
    assert sorted(blobs) == [2, 3, 60_000]


@pytest.mark.parametrize("answer", ["y\n", "\n"])
def test_a_removal_is_asked_for_on_a_terminal_alone(
    answer: str, hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    local_path("org/ggufs")
    monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
    with pytest.raises(ValueError, match="stdin is no terminal: give --yes"):
        rm.main(["org/ggufs"])
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    rm.main(["org/ggufs"])
    assert capsys.readouterr().err == "Remove org/ggufs (0.0 MB)? [y/N] "
    assert bool(list(cache.glob("models--*"))) == (answer != "y\n")


def test_a_name_that_is_none_is_told_before_anything_is_downloaded(hub: Hub) -> None:
    with pytest.raises(ValueError, match="'tiny' is no model's name: give org/name"):
        get.main(["org/tiny", "tiny"])
    assert not hub.requests
