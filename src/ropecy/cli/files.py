"""Files that the commands read, .npz or .safetensors with the arrays Q, K and V, and pictures that they write."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

_NAMES = ("Q", "K", "V")
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def read_rows(path: Path) -> dict[str, np.ndarray]:
    """The arrays Q and K, and V if there is one, of an .npz or a .safetensors file; bfloat16 is read as float32.

    Raises
    ------
    OSError, MemoryError
        The file can't be opened, or its arrays don't fit into memory.
    ValueError
        The file is of another kind, is broken, or has no Q or no K.
    """
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise ValueError(f"wants a file that ends in .npz or .safetensors, got {str(path)!r}")
    try:
        found, names = reader(path)
    except (OSError, MemoryError):
        raise
    except Exception as error:
        # Parsers may raise exceptions of almost any type when a file is broken.
        raise ValueError(f"{path} can't be read as {path.suffix}: {error or type(error).__name__}") from error
    if missing := {"Q", "K"} - set(found):
        raise ValueError(f"{path} wants arrays Q and K, (..., n, d), got {sorted(names)}: no {min(missing)}")
    return found


def check_plot(path: Path) -> None:
    """Raise ImportError or ValueError if no picture can be drawn to `path`. It is called before any work is done."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ImportError("--plot needs matplotlib: pip install matplotlib, or ropecy with its extra [plot]") from None
    if path.suffix.lower() != ".png":
        raise ValueError(f"--plot wants a name that ends in .png, got {str(path)!r}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--plot wants a file in a directory that exists, got {str(path)!r}")


def _read_npz(path: Path) -> tuple[dict[str, np.ndarray], list[str]]:
    arrays = np.load(path, allow_pickle=False)
    if not isinstance(arrays, np.lib.npyio.NpzFile):
        raise ValueError("it holds one array without a name")
    with arrays:
        found = {name: arrays[name] for name in arrays.files if name in _NAMES}
        # NumPy doesn't know bfloat16, and writes it as items of two bytes ("V2") without saying what they mean.
        found = {name: _widened(X.view("<u2")) if X.dtype == "V2" else X for name, X in found.items()}
        return found, arrays.files


def _read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], list[str]]:
    """The arrays of a file: eight bytes with the length of the header, the header in JSON, and the arrays' bytes."""
    with path.open("rb") as file:
        left = os.fstat(file.fileno()).st_size - 8
        length = int.from_bytes(file.read(8), "little")
        if length > left:
            raise ValueError(f"its header has {length} bytes of {max(left, 0)} that there are")
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        found = {name: _tensor(file, 8 + length, left - length, header[name]) for name in _NAMES if name in header}
    return found, list(header)


def _tensor(file: BinaryIO, start: int, size: int, entry: dict[str, Any]) -> np.ndarray:
    """The array that an entry of the header describes, of `size` bytes of arrays from `start` on."""
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"it holds {entry['dtype']}, and {', '.join(_DTYPES)} are read")
    first, last = entry["data_offsets"]
    dtype, shape = np.dtype(_DTYPES[entry["dtype"]]), entry["shape"]
    if not 0 <= first <= last <= size or last - first != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"bytes {first} to {last} of {size} are not an array of shape {shape}, {entry['dtype']}")
    file.seek(start + first)
    X = np.frombuffer(file.read(last - first), dtype).reshape(shape)
    return _widened(X) if entry["dtype"] == "BF16" else X


def _widened(bits: np.ndarray) -> np.ndarray:
    """The float32 numbers that these 16-bit bfloat16 numbers, given as integers, are the upper halves of."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


_READERS: dict[str, Callable[[Path], tuple[dict[str, np.ndarray], list[str]]]] = {
    ".npz": _read_npz,
    ".safetensors": _read_safetensors,
}
