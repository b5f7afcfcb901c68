"""The models on this disk that have names: what there is, when it was used, and how to remove it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llama.config import read_json_object
from llama.hub.cache import cache_folder, cached_repos, files_in, repo_folder
from llama.hub.choice import Choice, choose, gguf_type, is_model_file, split_of
from llama.hub.demo import find_demo, places
from llama.hub.names import DEMO, ModelName, parse_name


@dataclass(frozen=True)
class LocalModel:
    """A model on this disk.

    name: what --ckpt_dir takes.
    kind: its architecture, where config.json says it, and its format.
    nbytes: of its files; several models of a repository may share some.
    last_used: seconds since the epoch, as exact as the file system keeps it.
    path: what the name stands for.
    files: all of it.
    """

    name: str
    kind: str
    nbytes: int
    last_used: float
    path: Path
    files: frozenset[Path] = field(repr=False)


def local_models() -> list[LocalModel]:
    """Return the demo model, if it is there, and the models in the hub's cache, by name."""
    demo = find_demo()
    models = [_model(DEMO, "llama, GGUF Q4_1", demo, [demo])] if demo is not None else []
    for repo in cached_repos():
        models += _models_of(repo)
    return models


def removal(text: str) -> tuple[int, Callable[[], None]]:
    """Return how many bytes the removal of what a name stands for frees, and what does it.

    A repository's name alone is all of it, with all revisions; a type, a part or a revision is just that. Raise
    FileNotFoundError where nothing of that name is on this disk.
    """
    name = parse_name(text)
    if text == DEMO:
        found = [path for path in places() if path.is_file()]
        if found:
            return sum(path.stat().st_size for path in found), lambda: _unlink(found)
    elif name is not None and name.repo in cached_repos():
        everything = _models_of(name.repo)
        if str(name) == name.repo:
            return _remove_repo(name.repo)
        models = [model for model in everything if _is_meant(name, model)]
        if models and len(models) == len(everything):
            return _remove_repo(name.repo)
        if models:
            others = (model.files for model in everything if model not in models)
            return _remove_files(frozenset().union(*(model.files for model in models)).difference(*others))
    raise FileNotFoundError(f"{text} is none of the models on this disk: llama list tells their names")


def _is_meant(name: ModelName, model: LocalModel) -> bool:
    found = parse_name(model.name)
    assert found is not None
    is_revision = name.revision in ("main", found.revision)
    return is_revision and (name.part in ("", found.part)) and (name.type or "").upper() in ("", found.type)


def _model(name: str, kind: str, path: Path, files: Collection[Path]) -> LocalModel:
    stats = [file.stat() for file in {file.resolve() for file in files}]
    last_used = max((max(stat.st_atime, stat.st_mtime) for stat in stats), default=0.0)
    return LocalModel(name, kind, sum(stat.st_size for stat in stats), last_used, path, frozenset(files))


def _models_of(repo: str) -> list[LocalModel]:
    folder = repo_folder(repo)
    references = {
        path.read_text(encoding="utf-8").strip(): path.relative_to(folder / "refs").as_posix()
        for path in sorted((folder / "refs").rglob("*"), key=lambda path: path.name == "main")
        if path.is_file()
    }
    models = []
    for snapshot in sorted((folder / "snapshots").glob("*")):
        revision = references.get(snapshot.name, snapshot.name[:12])
        models += _models_in(ModelName(repo, revision=revision), snapshot)
    if incomplete := list((folder / "blobs").glob("*.incomplete")):
        models.append(_model(repo, "incomplete download", folder, incomplete))
    return models


def _models_in(name: ModelName, snapshot: Path) -> list[LocalModel]:
    """Return the models in a snapshot: each type of GGUF files is one, and so are weights in folders' layouts."""
    files = files_in(snapshot)
    models: list[LocalModel] = []

    def add(part: str, kind: str | None, what: str, choice: Choice) -> None:
        found = ModelName(name.repo, part, kind, name.revision)
        paths = [snapshot / file for file in choice.files if file in files]
        models.append(_model(str(found), what, snapshot / choice.opened, paths))

    for part in ["", *sorted({file.rpartition("/")[0] for file in files if "/" in file})]:
        try:
            choice = choose(ModelName(name.repo, part), files)
        except ValueError:
            continue
        if not choice.opened.endswith(".gguf"):
            suffix = max(Path(file).suffix for file in choice.files)
            add(part, None, ", ".join(filter(None, (_architecture(snapshot / part), suffix[1:]))), choice)
    ggufs = {split_of(file)[0] for file in files if is_model_file(file)}
    types = [gguf_type(file) for file in ggufs]
    for file in sorted(ggufs):
        kind = gguf_type(file)
        is_type = types.count(kind) == 1 and parse_name(f"{name.repo}:{kind}") is not None
        choice = Choice(tuple(split_of(file)), file)
        add("" if is_type else file, kind if is_type else None, f"GGUF {kind}", choice)
    if not models:
        models.append(_model(str(name), "no weights", snapshot, [snapshot / file for file in files]))
    return models


def _architecture(folder: Path) -> str:
    try:
        return str(read_json_object(folder / "config.json").get("model_type") or "")
    except (OSError, ValueError):
        return ""


def _remove_repo(repo: str) -> tuple[int, Callable[[], None]]:
    folder = repo_folder(repo)
    pointers = frozenset(path for path in (folder / "snapshots").rglob("*") if path.is_file())
    freed, remove_files = _remove_files(pointers)
    incomplete = sum(path.stat().st_size for path in (folder / "blobs").glob("*.incomplete"))

    def remove() -> None:
        remove_files()
        for path in (folder, cache_folder() / ".locks" / folder.name):
            shutil.rmtree(path, ignore_errors=path != folder and not path.exists())

    return freed + incomplete, remove


def _remove_files(pointers: Collection[Path]) -> tuple[int, Callable[[], None]]:
    """Remove files of snapshots, and their blobs unless others lead there; the hub's library knows all that may."""
    from huggingface_hub import scan_cache_dir

    scanned = scan_cache_dir(cache_folder())
    every = [file for repo in scanned.repos for revision in repo.revisions for file in revision.files]
    chosen = [file for file in every if file.file_path in pointers]
    if hasattr(scanned, "delete_files"):
        strategy = scanned.delete_files(*chosen)
        return strategy.expected_freed_size, strategy.execute
    # Before version 2, where blobs are of one repository alone.
    kept = {file.blob_path for file in every if file.file_path not in pointers}
    blobs = {file.blob_path: file.size_on_disk for file in chosen if file.blob_path not in kept}
    return sum(blobs.values()), lambda: _unlink([*(file.file_path for file in chosen), *blobs])


def _unlink(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def sum_of(models: Sequence[LocalModel]) -> int:
    """Return the bytes of all models, those that several share once."""
    files = {file.resolve() for model in models for file in model.files}
    return sum(file.stat().st_size for file in files)
