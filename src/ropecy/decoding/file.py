"""Files of a `DecodeState`: npz files that hold its arrays, and a header in JSON.

Files are not trusted: everything that is read is checked before a state is made of it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import secrets
import stat
import zipfile
from collections.abc import Iterator, Mapping
from typing import IO, Any

import numpy as np

from ..machine.memory import fits
from ..relative import RelativeBias
from ..rotary import Rotary
from .arguments import DecodeOptions

VERSION = 5
_OPTIONS = ("d", "d_v", "eps", "bound", "scale", "window", "near", "on_break")
_ROTARY = ("base", "pairing", "rotary_dim", "scaling", "length")
_HEADER = {"version", "options", "R", "slopes", "dtype", "lead", "degree", "largest", "asked", "folded"}
_HEADER |= {"lengths", "exact"}
# For each version of the format, the entries of the header that it lacks. Version 1 had no bias. Version 2 had no
# compensation, and added each token to the sums as soon as it left the window. Before version 4 all streams had one
# `length`, all were exact or none, and no option was `near`. In version 4 all heads had one `near` scale.
_LATER = {5: set(), 4: set(), 3: {"lengths", "exact"}}
_LATER[2] = _LATER[3] | {"folded", "asked"}
_LATER[1] = _LATER[2] | {"slopes"}
# Up to here float64 holds every position and count exactly.
_LONGEST = 2**53
_LARGEST_HEADER = 2**24


# ---- writing ----


def write(
    path: str | os.PathLike[str] | IO[bytes], o: DecodeOptions, header: dict[str, Any], arrays: dict[str, np.ndarray]
) -> None:
    """Write a state's header and arrays to a file object, or to the file at a path, which is written whole or not."""
    R = o.R and {name: getattr(o.R, name) for name in _ROTARY}
    if R and R["scaling"] is not None:
        R["scaling"] = dict(R["scaling"])
    header = header | {
        "version": VERSION,
        "options": {name: getattr(o, name) for name in _OPTIONS},
        "R": R,
        "slopes": o.bias and o.bias._values.tolist(),
    }
    arrays = {"header": np.array(json.dumps(header))} | arrays
    with contextlib.nullcontext(path) if hasattr(path, "write") else _replacing(path) as file:
        with zipfile.ZipFile(file, "w") as archive:
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                    np.lib.format.write_array(entry, np.asarray(array, order="C"), allow_pickle=False)


@contextlib.contextmanager
def _replacing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A new file that replaces the one at `path`, and takes its permissions, once it is complete and on the disk."""
    # Where `path` is a symbolic link, the file that it points to is replaced, and the link stays.
    target = os.path.realpath(path)
    try:
        mode = os.stat(target).st_mode
    except FileNotFoundError:
        mode = None
    if mode is not None and not stat.S_ISREG(mode):
        # A device or a pipe can't be replaced by a file.
        with open(target, "wb") as file:
            yield file
        return
    folder, name = os.path.split(target)
    beside = os.path.join(folder, f".{name[:100]}.{secrets.token_hex(8)}")
    try:
        with open(beside, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if mode is not None:
            os.chmod(beside, stat.S_IMODE(mode))
        os.replace(beside, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(beside)
        raise


# ---- reading ----


@contextlib.contextmanager
def reading(path: str | os.PathLike[str] | IO[bytes]) -> Iterator[SavedState]:
    """The state in a file, for a with statement.

    Errors in this function and in the body of the statement become a ValueError that names the file. MemoryError and
    errors of the operating system are raised as they are.
    """
    with contextlib.ExitStack() as stack:
        if hasattr(path, "read"):
            file, name = path, repr(path)
        else:
            file, name = stack.enter_context(open(path, "rb")), repr(os.fspath(path))
        try:
            with zipfile.ZipFile(file) as archive:
                yield SavedState(archive)
        except MemoryError:
            raise
        except Exception as error:
            # A file that gives a negative offset to seek to causes EINVAL, so this error says that the file is broken.
            # Other errors of the operating system do not.
            if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
                raise
            reason = f"{type(error).__name__}: {error}"
            if isinstance(error, (ValueError, zipfile.BadZipFile)):
                reason = str(error)
            raise ValueError(f"path: got {name}, wants a file that DecodeState.save wrote; {reason}") from error


class SavedState:
    """An npz file that `write` may have written. Its header is checked at once, its arrays when they are asked for.

    Attributes
    ----------
    header : dict
        The checked header. Entries that the file's version of the format lacks are filled in.
    names : set of str
        The names of the arrays in the file.
    """

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive
        entries = archive.namelist()
        if len(set(entries)) < len(entries):
            raise ValueError("an array is there twice")
        self.names = {entry.removesuffix(".npy") for entry in entries} - {"header"}
        self.header = self._header()

    def _header(self) -> dict[str, Any]:
        """The checked header, with the entries filled in that the file's version of the format lacks."""
        entry, size, shape, dtype, _ = self._array_header("header")
        with entry:
            if shape != () or dtype.kind != "U" or size > _LARGEST_HEADER:
                raise ValueError(f"header: got an array of shape {shape} and dtype {dtype}, wants one text")
            header = json.loads(str(np.frombuffer(_rest(entry, size), dtype)[0]))
        version = header.get("version") if isinstance(header, dict) else None
        if type(version) is not int or version not in _LATER:
            raise ValueError(f"header: got format version {version!r}, wants {VERSION} or an earlier one")
        wants = _HEADER - _LATER[version] | ({"length"} if version < 4 else set())
        if set(header) != wants:
            raise ValueError(f"header: got {sorted(header)}, wants {sorted(wants)}")
        if version < 4:
            header["lengths"] = header.pop("length")
            if isinstance(header["options"], dict):
                header["options"].setdefault("near", None)
        _check_header(header)
        header.setdefault("slopes", None)
        header.setdefault("asked", 0.0)
        if version < 3:
            header["folded"] = max(0, header["lengths"] - (header["options"]["window"] or 0))
        if version < 4:
            header["exact"] = header["options"]["on_break"] == "exact" and "state" not in self.names
        return header

    def of_streams(self, name: str, streams: int) -> np.ndarray:
        """The numbers of an entry of the header for each stream; in earlier versions all have the same."""
        value = self.header[name]
        if isinstance(value, list) and len(value) != streams:
            raise ValueError(f"{name}: got {len(value)} entries, wants {streams}, one for each stream")
        return np.broadcast_to(np.asarray(value), (streams,))

    def options(self) -> dict[str, Any]:
        """The arguments of `DecodeState` that the saved state was made with."""
        options, R, slopes = self.header["options"], self.header["R"], self.header["slopes"]
        d, d_v = options["d"], options["d_v"]
        # A state of degree 1, the smallest, has d + 1 features. Nothing of that width is allocated before this check.
        if not fits(16.0 * (d + 1) * (d_v + 1)):
            raise MemoryError(f"path: the file is of a state with d = {d} and d_v = {d_v}, too large for this machine")
        bias = None if slopes is None else RelativeBias.alibi(np.array(slopes, np.float64))
        return options | {"R": R and Rotary(d, **R), "bias": bias, "dtype": self.header["dtype"]}

    def check_arrays(self, wants: Mapping[str, Any]) -> None:
        """Raise ValueError unless the file holds exactly the arrays that are named in `wants`."""
        if self.names != set(wants):
            raise ValueError(f"arrays: got {sorted(self.names)}, wants {sorted(wants)}")

    def arrays(self, wants: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> dict[str, np.ndarray]:
        """All arrays by name, of these shapes and dtypes: all of them are checked before the first is read."""
        self.check_arrays(wants)
        for name, (shape, dtype) in wants.items():
            self._check_array(name, shape, dtype)
        return {name: self._read(name) for name in wants}

    def _check_array(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
        """Raise ValueError unless the array has this shape and dtype and as many bytes as they need."""
        entry, size, got_shape, got_dtype, _ = self._array_header(name)
        entry.close()
        if got_shape != shape or got_dtype.newbyteorder("=") != dtype:
            raise ValueError(f"{name}: got shape {got_shape} and dtype {got_dtype}, wants {shape} and {dtype}")
        if size != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name}: got {size} bytes for shape {shape} and dtype {dtype}")

    def _read(self, name: str) -> np.ndarray:
        """The array, in native byte order and C order. A ValueError is raised where it has NaN or Inf."""
        entry, size, shape, dtype, fortran = self._array_header(name)
        with entry:
            content = _rest(entry, size)
        array = np.frombuffer(content, dtype)
        array = array.reshape(shape[::-1]).T if fortran else array.reshape(shape)
        array = np.array(array, dtype.newbyteorder("="), order="C", copy=None)
        if not np.isfinite(array).all():
            raise ValueError(f"{name}: got NaN or Inf, wants finite numbers only")
        return array

    def _array_header(self, name: str) -> tuple[IO[bytes], int, tuple[int, ...], np.dtype, bool]:
        """(entry, bytes, shape, dtype, Fortran order): the array's entry in the archive, and what its npy header says.

        The entry stands behind that header, where the array's data begin. `bytes` is how many bytes it still has.
        """
        try:
            info = self._archive.getinfo(f"{name}.npy")
        except KeyError:
            raise ValueError(f"{name}: got no such array") from None
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise ValueError(f"{name}: got an array that is compressed or encrypted")
        entry = self._archive.open(info)
        version = np.lib.format.read_magic(entry)
        if version not in ((1, 0), (2, 0), (3, 0)):
            raise ValueError(f"{name}: got npy version {version}")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(entry)
        if dtype.hasobject:
            raise ValueError(f"{name}: got dtype {dtype}")
        return entry, info.file_size - entry.tell(), shape, dtype, fortran


def _rest(entry: IO[bytes], size: int) -> bytearray:
    """The `size` bytes that are left of an entry. It is read to its end, where zipfile verifies the checksum."""
    content = bytearray(size)
    view, done = memoryview(content), 0
    while done < size and (count := entry.readinto(view[done : done + 2**20])):
        done += count
    if done < size or entry.read(1):
        raise ValueError(f"got {done:,} bytes of an array of {size:,}")
    return content


def _check_header(header: dict[str, Any]) -> None:
    """Raise ValueError unless the header's entries have the right types and are in range.

    The arguments of `DecodeState` among the entries are checked later, when a state is made with them.
    """
    options, R, slopes, lead = header["options"], header["R"], header.get("slopes"), header["lead"]
    if not isinstance(options, dict) or set(options) != set(_OPTIONS):
        raise ValueError(f"options: got {options!r:.200}, wants {sorted(_OPTIONS)}")
    if not (R is None or (isinstance(R, dict) and set(R) == set(_ROTARY))):
        raise ValueError(f"R: got {R!r:.200}, wants {sorted(_ROTARY)} or null")
    flat = slopes if isinstance(slopes, list) else [] if slopes is None else [slopes]
    if not all(type(slope) in (int, float) for slope in flat):
        raise ValueError(f"slopes: got {slopes!r:.200}, wants numbers or null")
    for name in ("d", "d_v"):
        _check_count(f"options: {name}", options[name], 1, 2**62)
    _check_count("degree", header["degree"], 1, 40)
    for name in ("lengths", "folded", "largest", "asked", "exact"):
        value = header.get(name, 0)
        if isinstance(value, list) != (header["version"] >= 4 and lead is not None):
            raise ValueError(f"{name}: got {value!r:.200}, wants one for each stream")
        for each in value if isinstance(value, list) else [value]:
            if name in ("lengths", "folded"):
                _check_count(name, each, 0, _LONGEST)
            elif name == "exact":
                if type(each) is not bool and name in header:
                    raise ValueError(f"exact: got {each!r:.200}, wants true or false")
            elif type(each) not in (int, float) or not 0 <= each < math.inf:
                raise ValueError(f"{name}: got {each!r:.200}, wants a number of at least 0")
    if lead is None:
        if header["lengths"]:
            raise ValueError(f"lead: got null beside {header['lengths']} tokens")
        return
    if not isinstance(lead, list) or len(lead) > 32:
        raise ValueError(f"lead: got {lead!r:.200}, wants up to 32 leading axes or null")
    for size in lead:
        _check_count("lead", size, 1, 2**62)
    if header["dtype"] is None:
        raise ValueError("dtype: got null, wants that of the tokens")
    if header["lengths"] == 0 and header["version"] == 3:
        raise ValueError("length: got 0 beside leading axes")
    if len(flat) > 1 and lead and len(flat) % lead[-1]:
        raise ValueError(f"slopes: got {len(flat)}, wants a multiple of the {lead[-1]} heads")
    near = options["near"]
    if isinstance(near, list) and len(near) == 2 and isinstance(near[1], list) and lead and len(near[1]) % lead[-1]:
        raise ValueError(f"near: got {len(near[1])} scales, wants a multiple of the {lead[-1]} heads")


def _check_count(name: str, value: Any, least: int, most: int) -> None:
    """Raise ValueError unless the value is an integer from least to most."""
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name}: got {value!r:.200}, wants an integer from {least} to {most}")
