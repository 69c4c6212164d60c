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
from .arguments import LARGEST_VALUE, DecodeOptions
from .bounds import Values
from .sums import BLOCK, Sums

VERSION = 4
_OPTIONS = ("d", "d_v", "eps", "bound", "scale", "window", "near", "on_break")
_ROTARY = ("base", "pairing", "rotary_dim", "scaling", "length")
_HEADER = {"version", "options", "R", "slopes", "dtype", "lead", "length", "degree", "largest", "folded", "asked"}
# For each version of the format, the entries of the header that it lacks. Version 1 had no bias. Version 2 had no
# compensation, and added each token to the sums as soon as it left the window. Before version 4 no option was `near`.
_LATER = {1: {"slopes", "folded", "asked"}, 2: {"folded", "asked"}, 3: set(), 4: set()}
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
        wants = _HEADER - _LATER[version]
        if set(header) != wants:
            raise ValueError(f"header: got {sorted(header)}, wants {sorted(wants)}")
        if version < 4 and isinstance(header["options"], dict):
            header["options"].setdefault("near", None)
        _check_header(header)
        header.setdefault("slopes", None)
        header.setdefault("asked", 0.0)
        header.setdefault("folded", max(0, header["length"] - (header["options"]["window"] or 0)))
        return header

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

    def arrays(
        self, o: DecodeOptions, heads: int, states: int, exact: bool, remembered: np.dtype
    ) -> dict[str, np.ndarray]:
        """All arrays by name. Shapes and dtypes of all of them are checked before the first is read.

        Parameters
        ----------
        o : DecodeOptions
        heads, states : int
            H, the product of all leading axes, and the number of sums: H, or H times the number of query heads of a key
            head where their slopes differ.
        exact : bool
            Whether there are no sums, because a key was past the bound.
        remembered : dtype
            The dtype of the history.
        """
        header = self.header
        length, folded, old = header["length"], header["folded"], header["version"] < 3
        window, float64 = o.recent, np.dtype(np.float64)
        if not exact and not min(window, length) <= length - folded <= window + BLOCK:
            raise ValueError(f"folded: got {folded} of {length} tokens, wants all but {window} to {window + BLOCK}")
        features = math.comb(o.d + header["degree"], o.d)
        recent = window if old else length - folded
        wants: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
        if not exact:
            wants["state"] = (states, o.d_v + 1, features), float64
            wants["ring_keys"] = (heads, o.d, recent), float64
            wants["ring"] = (heads, o.d_v + old, recent), float64
            if old:
                wants["centre"] = (heads, o.d_v), float64
            else:
                wants["low"] = wants["state"]
        if not old:
            wants |= {name: ((heads, o.d_v), float64) for name in ("first", "least", "most")}
        if o.on_break == "exact":
            wants |= {name: ((heads, length, w), remembered) for name, w in (("keys", o.d), ("values", o.d_v))}
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
    for name in ("length", "folded"):
        _check_count(name, header.get(name, 0), 0, _LONGEST)
    _check_count("degree", header["degree"], 1, 40)
    for name in ("largest", "asked"):
        value = header.get(name, 0.0)
        if type(value) not in (int, float) or not 0 <= value < math.inf:
            raise ValueError(f"{name}: got {value!r:.200}, wants a number of at least 0")
    if lead is None:
        if header["length"]:
            raise ValueError(f"lead: got null beside {header['length']} tokens")
        return
    if not isinstance(lead, list) or len(lead) > 32:
        raise ValueError(f"lead: got {lead!r:.200}, wants up to 32 leading axes or null")
    for size in lead:
        _check_count("lead", size, 1, 2**62)
    if header["dtype"] is None:
        raise ValueError("dtype: got null, wants that of the tokens")
    if header["length"] == 0 and header["version"] >= 3:
        raise ValueError("length: got 0 beside leading axes")
    if len(flat) > 1 and lead and len(flat) % lead[-1]:
        raise ValueError(f"slopes: got {len(flat)}, wants a multiple of the {lead[-1]} heads")


def _check_count(name: str, value: Any, least: int, most: int) -> None:
    """Raise ValueError unless the value is an integer from least to most."""
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name}: got {value!r:.200}, wants an integer from {least} to {most}")


# ---- making a state of what was read ----


def restore(
    header: dict[str, Any], arrays: dict[str, np.ndarray], values: Values, sums: Sums | None, limit: float
) -> None:
    """Fill `values` and `sums` of a new state with the arrays of a file.

    The numbers are checked against each other, and against `limit`, the largest |scale| ||k||^2 of a key k in the sums.
    """
    length, folded = header["length"], header["folded"]
    if header["version"] < 3:
        arrays = _of_version_3(header, arrays, sums)
    values.first[...], values.least, values.most = arrays["first"], arrays["least"], arrays["most"]
    lowest, highest = values.least - 1e-9 * values.spread, values.most + 1e-9 * values.spread
    if (
        max(np.abs(values.least).max(), np.abs(values.most).max()) > LARGEST_VALUE
        or not ((values.least <= values.first) & (values.first <= values.most)).all()
    ):
        raise ValueError("least, most: got no range that the first values are in, or one that is too wide")
    if "keys" in arrays:
        if (_sizes(arrays["keys"]) > header["largest"] * (1 + 1e-5)).any():
            raise ValueError("keys: got a key that is longer than `largest` says")
        v = arrays["values"]
        if ((v < lowest[:, None]) | (v > highest[:, None])).any():
            raise ValueError("values: got a value that is not between `least` and `most`")
    if sums is None:
        return
    # Files of earlier versions don't say between which least and largest value the values were.
    spread = values.spread if header["version"] >= 3 else np.full_like(values.first, 2 * LARGEST_VALUE)
    _check_sums(arrays, values, spread, sums, folded, limit)
    sums.restore(arrays, length, folded)


def _sizes(keys: np.ndarray) -> np.ndarray:
    """The squared norms of keys (H, n, d)."""
    with np.errstate(over="ignore"):
        return np.einsum("hna,hna->hn", keys, keys, dtype=np.float64)


def _check_sums(
    arrays: dict[str, np.ndarray], values: Values, spread: np.ndarray, sums: Sums, folded: int, limit: float
) -> None:
    """Raise ValueError where no keys within `limit` and no values within range `spread` can have left these sums."""
    room = 1 + 1e-6
    if (_sizes(arrays["ring_keys"].swapaxes(1, 2)) > limit * room).any():
        raise ValueError("ring_keys: got a key that is past the bound")
    x, first = arrays["ring"], values.first[..., None]
    slack = 1e-9 * values.spread[..., None]
    if (x < values.least[..., None] - first - slack).any() or (x > values.most[..., None] - first + slack).any():
        raise ValueError("ring: got a value that is not between `least` and `most`")
    state = arrays["state"]
    # The first monomial is 1, so its sum is the sum of all weights. The sum of another monomial is at most as large as
    # the sum of all weights times a power of the size of keys.
    count = sums.weight(folded)
    if (np.abs(state[:, -1, 0] - count) > 1e-6 * count).any():
        raise ValueError(f"state: got sums of weights that are not those of {folded} tokens")
    most = room * np.repeat(spread, len(state) // len(spread), axis=0)[..., None]
    sizes = count[:, None, None] * max(1.0, limit) ** (sums.monomials.degree / 2)
    if (np.abs(state[:, :-1]) > most * sizes).any() or (np.abs(state[:, -1:]) > room * sizes).any():
        raise ValueError("state: got sums that are larger than those of such keys and values")
    if (np.abs(arrays["low"]) > 1e-9 * np.maximum(most.max(), 1.0) * sizes).any():
        raise ValueError("low: got more than rounding takes from sums")


def _of_version_3(header: dict[str, Any], arrays: dict[str, np.ndarray], sums: Sums | None) -> dict[str, np.ndarray]:
    """The arrays of a file of version 1 or 2, in the form that version 3 has.

    In the earlier versions the last token in the sums has weight 1, sums have no compensation, and the ring is as long
    as the window. The least and the largest value were not kept: they are taken from the values that are still known,
    which are the means in the sums, the ring and the history.
    """
    history = {name: arrays[name] for name in ("keys", "values") if name in arrays}
    if sums is None:
        v = history["values"].astype(np.float64)
        if v.shape[1] == 0:
            raise ValueError("length: got 0, wants the token that was past the bound")
        return history | {"first": v[:, 0], "least": v.min(axis=1), "most": v.max(axis=1)}
    length, window, first = header["length"], header["options"]["window"] or 0, arrays["centre"]
    slots = np.arange(length - min(window, length), length) % max(1, window)
    x = arrays["ring"][:, :-1, slots]
    state = arrays["state"]
    weights = state[:, -1, 0].reshape(len(first), -1)
    means = np.divide(
        state[:, :-1, 0].reshape(*weights.shape, -1),
        weights[..., None],
        out=np.zeros((*weights.shape, first.shape[1])),
        where=weights[..., None] > 0,
    )
    known = np.concatenate([np.zeros_like(first)[:, None], means, x.swapaxes(1, 2)], axis=1) + first[:, None]
    if "values" in history:
        known = np.concatenate([known, history["values"]], axis=1)
    _, phase = sums.frame(header["folded"])
    return history | {
        "first": first,
        "least": known.min(axis=1),
        "most": known.max(axis=1),
        "state": state * np.exp(phase).reshape(-1, 1, 1),
        "low": np.zeros_like(state),
        "ring_keys": arrays["ring_keys"][..., slots],
        "ring": x,
    }
