"""Map the weights of a folder, or of one file of them, whatever the files are: safetensors or pickled state dicts."""

from __future__ import annotations

import bisect
import ctypes
import functools
import logging
import mmap
import re
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from llama.checkpoint.base import WEIGHT_DTYPES
from llama.checkpoint.names import UNNEEDED
from llama.checkpoint.torch_pickle import map_pickle
from llama.config import read_json_object
from llama.files import cannot_map, check_content

log = logging.getLogger("llama")

# What a folder has its weights in, the preferred first: a whole file, or the index of a split one.
Layouts = tuple[tuple[str, str], ...]

BYTES_DTYPE = "U8"  # safetensors' name of bytes, which may be blocks


def map_folder(folder: Path, layouts: Layouts, any_dtype: bool = False) -> dict[str, Tensor]:
    """Map every tensor of a folder's weights, by the name it has there; see `weight_files` and `map_weights`."""
    tensors: dict[str, Tensor] = {}
    for file in weight_files(folder, layouts):
        for name, tensor in map_weights(file, any_dtype).items():
            if name in tensors:
                raise ValueError(f"{folder}: tensor {name} is in two files, one of them {file.name}")
            tensors[name] = tensor
    return tensors


def weight_files(folder: Path, layouts: Layouts) -> list[Path]:
    """Return the files that hold a folder's weights: the first of the layouts that is there, as transformers does.

    Raise FileNotFoundError when there are none, or when an index names one that is missing.
    """
    names = [name for layout in layouts for name in layout]
    there = [name for name in names if (folder / name).is_file()]
    if not there:
        for name in names:
            if (folder / name).is_symlink():
                raise FileNotFoundError(f"{folder / name} is a link to a file that is not there: download it again")
        raise FileNotFoundError(f"{folder} has no weights: looked for {', '.join(names)}")
    if len(there) > 1:
        log.info("%s: %s is read, and not %s", folder, there[0], ", ".join(there[1:]))
    first = folder / there[0]
    return _indexed_files(first) if first.suffix == ".json" else [first]


def _indexed_files(index: Path) -> list[Path]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index} must have a weight_map from tensors to files")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{index} names {name!r}: only files beside it are read")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise FileNotFoundError(f"{index} names {missing[0]}{more}, which is not in the folder: download it")
    return [index.parent / name for name in names]


def map_weights(file: Path, any_dtype: bool = False) -> dict[str, Tensor]:
    """Map every tensor of a safetensors, .bin or .pth file, by the name it has there; raise ValueError for damage.

    any_dtype: take what is neither floats nor bytes, too, as quantized releases have it.
    """
    return _map_safetensors(file, any_dtype) if file.suffix == ".safetensors" else map_pickle(file)


def _map_safetensors(file: Path, any_dtype: bool) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    check_content(file, is_binary=True)
    try:
        with safe_open(file, "pt") as mapped:
            dtypes = {name: mapped.get_slice(name).get_dtype() for name in mapped.keys()}  # noqa: SIM118
            for name, dtype in () if any_dtype else dtypes.items():
                if dtype not in (*WEIGHT_DTYPES, BYTES_DTYPE) and not UNNEEDED.fullmatch(name):
                    raise ValueError(f"{file}: {name} has dtype {dtype}, only {', '.join(WEIGHT_DTYPES)} are supported")
            return {name: mapped.get_tensor(name) for name in dtypes}
    except SafetensorError as error:
        raise ValueError(f"{file} is not a usable safetensors file ({error}): download it again") from None
    except (MemoryError, RuntimeError) as error:
        raise cannot_map(file, error) from None


class MappedMemory:
    """The parts of this process's memory that are files, mapped as the readers here do: privately, to be read only.

    Pages that were read count as the process's memory until they are released, or the file is closed. Whether memory is
    a file's is the system's word, as anonymous memory that is released loses what it holds. Elsewhere than on Linux
    nothing is released.
    """

    def __init__(self) -> None:
        """Take down what is mapped now; only of tensors that are there already may pages be released."""
        try:
            maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
        except OSError:
            maps = ""
        found = re.findall(r"^([0-9a-f]+)-([0-9a-f]+) r..p [0-9a-f]+ \S+ [1-9]\d* ", maps, re.MULTILINE)
        self._spans = [(int(start, 16), int(stop, 16)) for start, stop in found]

    def release(self, tensor: Tensor) -> None:
        """Let the pages from a tensor's first value to its last leave the memory, but not the system's cache of files.

        Whoever reads what lies between, or the tensor again, gets them again.
        """
        last_value = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        n_bytes = (last_value + 1) * tensor.itemsize if tensor.numel() else 0
        start, stop = tensor.data_ptr(), tensor.data_ptr() + n_bytes
        first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE
        at = bisect.bisect(self._spans, start, key=lambda span: span[0]) - 1
        if first < last and at >= 0 and stop <= self._spans[at][1]:
            _madvise()(first, last - first, mmap.MADV_DONTNEED)


@functools.cache
def _madvise() -> Callable[[int, int, int], int]:
    """Return the system's madvise, of an address, bytes and an advice."""
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return madvise
