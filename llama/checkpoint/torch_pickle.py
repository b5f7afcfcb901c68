"""Map a pickled state dict, as torch.save writes it, without reading it into memory and without running its code."""

from __future__ import annotations

import logging
import pickle
import re
import zipfile
from pathlib import Path

import torch
from torch import Tensor

log = logging.getLogger("llama")

MAX_CHECKED_BYTES = 64 << 20  # a pickle has some 100 bytes for each tensor


def map_pickle(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a state dict by name, as views of the mapped file.

    Raise ValueError when the file is damaged, or refused because it would run code.
    """
    if file.stat().st_size == 0:
        raise ValueError(f"{file} is empty: download it again")
    zipped = zipfile.is_zipfile(file)  # False for the format before torch 1.6, which cannot be mapped
    if not zipped and _starts_with(file, b"PK"):
        raise ValueError(f"{file} is truncated ({file.stat().st_size} bytes): download it again")
    if zipped and not _is_pickle_whole(file):
        log.warning("%s: the checksum of its data.pkl is wrong: download it again if the model makes no sense", file)
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
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{file} is damaged ({reason}): download it again") from None
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()
    ):
        raise ValueError(f"{file} must hold a dictionary of tensors and nothing else")
    return state


def _is_pickle_whole(file: Path) -> bool:
    """Tell whether the checksum of what says where an archive's tensors lie is right; torch looks at none.

    Archives may be written without checksums, so a wrong one does not prove damage.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            for record in archive.infolist():
                if record.filename.endswith("/data.pkl") and record.file_size <= MAX_CHECKED_BYTES:
                    archive.read(record)
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, EOFError):
        return False
    return True


def _starts_with(file: Path, magic: bytes) -> bool:
    with file.open("rb") as stream:
        return stream.read(len(magic)) == magic
