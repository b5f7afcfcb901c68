"""Map a pickled state dict, as torch.save writes it, without reading it into memory and without running its code."""

from __future__ import annotations

import logging
import pickle
import re
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from llama.files import cannot_map, check_content

log = logging.getLogger("llama")

# What describes the tensors of an archive has about 100 bytes a tensor, and is the one part that is read whole.
MAX_PICKLE_BYTES = 64 << 20


def map_pickle(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a state dict by name, as views of the mapped file.

    Raise ValueError when the file is damaged, or refused because it would run code, or holds what no weights are.
    """
    check_content(file, is_binary=True)
    zipped = zipfile.is_zipfile(file)  # False for the format before torch 1.6, which cannot be mapped
    is_whole = True
    if zipped:
        is_whole = _check_archive(file)
    elif _starts_with(file, b"PK"):
        raise ValueError(f"{file} is truncated ({file.stat().st_size} bytes): download it again")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            raise ValueError(f"{file} is refused: it would run code when loaded ({code[1]})") from None
        raise ValueError(f"{file} is not a checkpoint, or is damaged: download it again") from None
    except OSError:
        raise
    except Exception as error:  # of any type: torch.load takes what it unpickles for what it wrote
        if "unable to mmap" in str(error):
            raise cannot_map(file, error) from None
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{file} is damaged ({reason}): download it again") from None
    if not isinstance(state, dict):
        raise ValueError(f"{file} must hold a dictionary of tensors and nothing else, not {type(state).__name__}")
    others = [key for key, value in state.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if others:
        raise ValueError(
            f"{file} must hold a dictionary of tensors and nothing else, but has {str(others[0])[:80]!r}: save the "
            "model's state alone"
        )
    for name, tensor in state.items():
        problem = _unusable(tensor)
        if problem is not None:
            raise ValueError(f"{file}: {name} {problem}, not plain weights")
    if not is_whole:  # no error, as archives may be written without checksums
        log.warning("%s: the checksum of its data.pkl is wrong: download it again if the model makes no sense", file)
    return state


def _check_archive(file: Path) -> bool:
    """Raise ValueError for an archive with compressed records, which cannot be mapped, or with too large a pickle.

    Return whether the checksum of the pickle, which says where the tensors lie, is right; torch looks at none.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OverflowError, NotImplementedError) as error:
        raise ValueError(f"{file} is damaged ({error}): download it again") from None
    for record in records:
        if record.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{file} is damaged: {record.filename} is compressed, which torch.save never does")
        if record.filename.endswith("data.pkl") and record.file_size > MAX_PICKLE_BYTES:
            raise ValueError(
                f"{file} is refused: its {record.filename} has {record.file_size} bytes, at most {MAX_PICKLE_BYTES} "
                "are expected"
            )
    return all(_is_whole(file, record) for record in records if record.filename.endswith("data.pkl"))


def _is_whole(file: Path, record: zipfile.ZipInfo) -> bool:
    """Tell whether the checksum of an archive's record is right."""
    try:
        with zipfile.ZipFile(file) as archive:
            archive.read(record)
    except (zipfile.BadZipFile, OSError, EOFError):
        return False
    return True


def _unusable(tensor: Tensor) -> str | None:
    """Return what a tensor is that does not lie in the file, value by value."""
    if tensor.is_nested or tensor.layout != torch.strided:
        return f"is {'nested' if tensor.is_nested else str(tensor.layout).removeprefix('torch.')}"
    if tensor.device.type != "cpu":
        return f"is on the device {tensor.device}, without values"
    stored = tensor.untyped_storage().nbytes()
    return f"of shape {tuple(tensor.shape)} repeats {stored} stored bytes" if tensor.nbytes > stored else None


def _starts_with(file: Path, magic: bytes) -> bool:
    with file.open("rb") as stream:
        return stream.read(len(magic)) == magic
