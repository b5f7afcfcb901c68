"""The hub's cache on this disk, as huggingface_hub documents it: blobs, and snapshots whose files link to them."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from llama.config import read_json_object
from llama.hub.choice import INDEX, Choice, choose, choose_tokenizer
from llama.hub.names import ModelName

COMMIT = re.compile(r"[0-9a-f]{40}")
ABBREVIATED = re.compile(r"[0-9a-f]{7,40}")


def cache_folder() -> Path:
    """Return where the hub's libraries keep models: HF_HUB_CACHE, or hub/ in HF_HOME, by default in ~/.cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).resolve()


def repo_folder(repo: str) -> Path:
    """Return the folder of a repository in the cache."""
    return cache_folder() / f"models--{repo.replace('/', '--')}"


def cached_repos() -> list[str]:
    """Return the names of all models of which the cache has something, sorted."""
    things = [*cache_folder().glob("models--*--*/snapshots/*"), *cache_folder().glob("models--*--*/blobs/*.incomplete")]
    return sorted({path.parents[1].name.removeprefix("models--").replace("--", "/", 1) for path in things})


def snapshot(name: ModelName) -> Path | None:
    """Return the folder of a model's revision in the cache; None where it is not there."""
    folder = repo_folder(name.repo)
    reference = folder / "refs" / name.revision
    if reference.is_file():
        found = [folder / "snapshots" / reference.read_text(encoding="utf-8").strip()]
    else:
        found = list((folder / "snapshots").glob(f"{name.revision}*")) if ABBREVIATED.fullmatch(name.revision) else []
    return found[0] if len(found) == 1 and found[0].is_dir() else None


def files_in(folder: Path) -> set[str]:
    """Return the files of a snapshot as the repository names them; a link to a blob that is gone is none."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def find_cached(name: ModelName, tokenizer_only: bool) -> Path:
    """Return the path of a model, or of its tokenizer's folder, in the cache.

    Raise FileNotFoundError where it is not there or incomplete; the message goes on from "not in the cache ...".
    """
    folder = snapshot(name)
    if folder is None:
        others = [each for each in cached_repos() if each != name.repo]
        raise FileNotFoundError(
            f"{name} is not in the cache {cache_folder()}" + (f", which has {_few(others)}" * bool(others))
        )
    files = files_in(folder)
    try:
        choice = (choose_tokenizer if tokenizer_only else choose)(name, files)
    except ValueError as error:
        raise FileNotFoundError(f"what is in the cache does not do ({error})") from error
    if missing := sorted(missing_files(folder, choice) - files):
        raise FileNotFoundError(f"{name} is incomplete in the cache {folder}: {missing[0]} is missing")
    return folder / choice.opened


def missing_files(folder: Path, choice: Choice) -> set[str]:
    """Return the files that the chosen ones and their indexes name and that are not there."""
    named = set(choice.files)
    for file in choice.files:
        if file.endswith(INDEX) and (folder / file).is_file():
            weights = read_json_object(folder / file).get("weight_map")
            parent = file.rpartition("/")[0]
            if isinstance(weights, dict):
                named |= {f"{parent}/{each}" if parent else str(each) for each in weights.values()}
    return {file for file in named if not (folder / file).is_file()}


def add_to_snapshot(repo: str, commit: str, file: str, blob: Path) -> None:
    """Have a file of a snapshot be a blob: by a link, or where there are none, as on Windows, by moving it there."""
    target = repo_folder(repo) / "snapshots" / commit / file
    target.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        try:
            target.symlink_to(os.path.relpath(blob, target.parent))
        except FileExistsError:
            if target.exists():  # another process was first
                return
            target.unlink()  # it led to a blob that is gone
            target.symlink_to(os.path.relpath(blob, target.parent))
        except OSError:
            os.replace(blob, target)


def set_reference(name: ModelName, commit: str) -> None:
    """Note which commit a branch or tag was at."""
    if name.revision != commit:
        reference = repo_folder(name.repo) / "refs" / name.revision
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(commit, encoding="utf-8")


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
