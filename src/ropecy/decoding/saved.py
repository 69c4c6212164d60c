"""The streams of a `DecodeState` as files hold them, and streams made of what a file holds, which is not trusted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import bounds
from .arguments import LARGEST_VALUE, DecodeOptions
from .bounds import Values
from .file import SavedState
from .history import History
from .rows import Rows
from .streams import Streams
from .sums import BLOCK, Sums, of_key_heads

Arrays = dict[str, np.ndarray]


def contents(dtype: np.dtype | None, degree: int, streams: Streams | None) -> tuple[dict[str, Any], Arrays]:
    """The header and the arrays of a file, in the form that the newest version of the format has."""
    header: dict[str, Any] = {"dtype": dtype and dtype.name, "degree": degree}
    if streams is None:
        return header | {"lead": None, "lengths": 0, "folded": 0, "exact": False, "largest": 0.0, "asked": 0.0}, {}
    sums, values, histories = streams.sums, streams.values, streams.histories
    header |= {"lead": streams.lead, "lengths": sums.length.tolist(), "folded": sums.folded.tolist()}
    header |= {"exact": sums.exact.tolist(), "largest": streams.largest.tolist(), "asked": streams.asked.tolist()}
    some = (sums.length > 0)[:, None, None]
    arrays = {name: np.where(some, array, 0.0).reshape(-1, array.shape[2]) for name, array in values.arrays().items()}
    if histories:
        told = list(zip(histories, sums.length, strict=True))
        arrays["keys"] = np.concatenate([each.keys[:, :length] for each, length in told], axis=1)
        arrays["values"] = np.concatenate([each.values[:, :length] for each, length in told], axis=1)
    return header, arrays | sums.saved()


def streams(source: SavedState, o: DecodeOptions, rows: Rows) -> Streams | None:
    """The streams that a file holds; None if there have been no tokens. Every array and number in it is checked."""
    header = source.header
    if header["lead"] is None:
        source.check_arrays({})
        return None
    told = _told(source, o)
    arrays = source.arrays(_wants(header, o, told))
    made = Streams(o, rows, tuple(header["lead"]), o.dtype, header["degree"])
    made.sums.give_up(np.flatnonzero(told.exact))
    if header["version"] < 4:
        arrays = _by_stream(arrays if header["version"] == 3 else _of_version_3(header, arrays, made.sums), told)
    largest, asked = (source.of_streams(name, told.streams).astype(np.float64) for name in ("largest", "asked"))
    _restore_values(arrays, made.values, told)
    starts = np.cumsum(told.lengths) - told.lengths
    for i in range(len(made.histories)):
        own = slice(starts[i], starts[i] + told.lengths[i])
        k, v = (np.ascontiguousarray(arrays[name][:, own]) for name in ("keys", "values"))
        _check_history(k, v, made.values.of(i), float(largest[i]))
        made.histories[i] = History(k, v, o.stretched)
    # Files of earlier versions don't say between which least and largest value the values were.
    spread = made.values.spread if header["version"] >= 3 else np.full_like(made.values.first, 2 * LARGEST_VALUE)
    _check_sums(arrays, made, spread, told)
    made.sums.restore(arrays, told.lengths.astype(np.intp), told.folded.astype(np.intp))
    made.largest, made.asked = largest, asked
    return made


@dataclass(slots=True)
class _Told:
    """What a header says of the streams: their number, key heads, slopes of a head, tokens, and which are exact."""

    streams: int
    heads: int
    slopes: int
    lengths: np.ndarray
    folded: np.ndarray
    exact: np.ndarray


def _told(source: SavedState, o: DecodeOptions) -> _Told:
    """The numbers of a header, checked against each other, if so many streams fit into memory."""
    header, lead = source.header, source.header["lead"]
    streams, heads = math.prod(lead[:-1]), lead[-1] if lead else 1
    slopes = np.zeros(1) if o.bias is None else np.atleast_1d(o.bias._values)
    each = of_key_heads(slopes, heads).shape[1] if slopes.size > 1 else 1
    lengths = header["lengths"]
    mean = sum(lengths) / len(lengths) if isinstance(lengths, list) else lengths
    bounds.check_memory(o, header["degree"], streams * heads, each, mean)
    lengths, folded, exact = (source.of_streams(name, streams) for name in ("lengths", "folded", "exact"))
    least, recent = np.minimum(o.recent, lengths), lengths - folded
    if not (exact | ((least <= recent) & (recent <= o.recent + BLOCK) & (folded >= 0))).all():
        raise ValueError(f"folded: got {folded} of {lengths} tokens, wants all but {o.recent} to {o.recent + BLOCK}")
    if (exact & ((lengths == 0) | (o.on_break != "exact"))).any():
        raise ValueError("exact: got a stream that nothing made exact")
    return _Told(streams, heads, each, lengths, folded, exact)


def _wants(header: dict[str, Any], o: DecodeOptions, told: _Told) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """The arrays that a file with this header holds, with their shapes and dtypes."""
    version, window, float64 = header["version"], o.recent, np.dtype(np.float64)
    remembered, slots = bounds.computed(o.dtype), told.streams * told.heads
    summed = ~told.exact
    heads, recent, tokens = told.heads, int((told.lengths - told.folded)[summed].sum()), int(told.lengths.sum())
    if version < 4:
        # Heads of all streams have an axis, and all streams are as long.
        heads, tokens = slots, int(told.lengths[0])
        recent = window if version < 3 else tokens - int(told.folded[0])
    wants: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    if version >= 4 or summed.all():
        features = math.comb(o.d + header["degree"], o.d)
        wants["state"] = (int(summed.sum()) * told.heads * told.slopes, o.d_v + 1, features), float64
        wants["ring_keys"] = (heads, o.d, recent), float64
        wants["ring"] = (heads, o.d_v + (version < 3), recent), float64
        if version < 3:
            wants["centre"] = (slots, o.d_v), float64
        else:
            wants["low"] = wants["state"]
    if version >= 3:
        wants |= {name: ((slots, o.d_v), float64) for name in ("first", "least", "most")}
    if o.on_break == "exact":
        wants |= {name: ((heads, tokens, width), remembered) for name, width in (("keys", o.d), ("values", o.d_v))}
    return wants


def _restore_values(arrays: Arrays, values: Values, told: _Told) -> None:
    """Fill `values` with the arrays of a file."""
    some = (told.lengths > 0)[:, None, None]
    first, least, most = (arrays[name].reshape(values.first.shape) for name in ("first", "least", "most"))
    if max(np.abs(least).max(), np.abs(most).max()) > LARGEST_VALUE or not ((least <= first) & (first <= most)).all():
        raise ValueError("least, most: got no range that the first values are in, or one that is too wide")
    values.first[...] = first
    values.least, values.most = np.where(some, least, math.inf), np.where(some, most, -math.inf)


def _check_history(k: np.ndarray, v: np.ndarray, seen: Values, largest: float) -> None:
    """Raise ValueError where keys or values (H, n, width) of a stream are not among those that it has seen."""
    lowest, highest = seen.least - 1e-9 * seen.spread, seen.most + 1e-9 * seen.spread
    if (_sizes(k) > largest * (1 + 1e-5)).any():
        raise ValueError("keys: got a key that is longer than `largest` says")
    if ((v < lowest[:, None]) | (v > highest[:, None])).any():
        raise ValueError("values: got a value that is not between `least` and `most`")


def _sizes(keys: np.ndarray) -> np.ndarray:
    """The squared norms of keys (H, n, d)."""
    with np.errstate(over="ignore"):
        return np.einsum("hna,hna->hn", keys, keys, dtype=np.float64)


def _check_sums(arrays: Arrays, made: Streams, spread: np.ndarray, told: _Told) -> None:
    """Raise ValueError where no keys within the bound and no values of this spread can have left these sums."""
    summed, room, values, sums = np.flatnonzero(~told.exact), 1 + 1e-6, made.values, made.sums
    if not summed.size:
        return
    if (_sizes(arrays["ring_keys"].swapaxes(1, 2)) > made.limit * room).any():
        raise ValueError("ring_keys: got a key that is past the bound")
    owner = np.repeat(summed, (told.lengths - told.folded)[summed])
    slack = 1e-9 * values.spread
    least, most = values.least - values.first - slack, values.most - values.first + slack
    x = arrays["ring"].transpose(2, 0, 1)
    if (x < least[owner]).any() or (x > most[owner]).any():
        raise ValueError("ring: got a value that is not between `least` and `most`")
    # The first monomial is 1, so its sum is the sum of all weights. The sum of another monomial is at most as large as
    # the sum of all weights times a power of the size of keys.
    state, low = (arrays[name].reshape(len(summed), -1, *arrays[name].shape[1:]) for name in ("state", "low"))
    weights = {count: sums.weight(count) for count in set(told.folded[summed].tolist())}
    count = np.stack([weights[folded] for folded in told.folded[summed].tolist()])
    if (np.abs(state[:, :, -1, 0] - count) > 1e-6 * count).any():
        raise ValueError("state: got sums of weights that are not those of so many tokens")
    widest = room * np.repeat(spread[summed], told.slopes, axis=1)[..., None]
    sizes = count[..., None, None] * max(1.0, made.limit) ** (sums.monomials.degree / 2)
    if (np.abs(state[:, :, :-1]) > widest * sizes).any() or (np.abs(state[:, :, -1:]) > room * sizes).any():
        raise ValueError("state: got sums that are larger than those of such keys and values")
    if (np.abs(low) > 1e-9 * np.maximum(widest.max(), 1.0) * sizes).any():
        raise ValueError("low: got more than rounding takes from sums")


# ---- earlier versions ----


def _by_stream(arrays: Arrays, told: _Told) -> Arrays:
    """The arrays of version 3, in which each stream has heads of its own, in the form that version 4 has."""
    found = dict(arrays)
    for name, axis in (("ring_keys", 2), ("ring", 2), ("keys", 1), ("values", 1)):
        if name in arrays:
            X = np.moveaxis(arrays[name].reshape(told.streams, told.heads, *arrays[name].shape[1:]), 0, axis)
            found[name] = X.reshape(*X.shape[:axis], -1, *X.shape[axis + 2 :])
    return found


def _of_version_3(header: dict[str, Any], arrays: Arrays, sums: Sums) -> Arrays:
    """The arrays of a file of version 1 or 2, in the form that version 3 has.

    In the earlier versions the last token in the sums has weight 1, sums have no compensation, and the ring is as long
    as the window. The least and the largest value were not kept: they are taken from the values that are still known,
    which are the means in the sums, the ring and the history.
    """
    history = {name: arrays[name] for name in ("keys", "values") if name in arrays}
    if "state" not in arrays:
        v = history["values"].astype(np.float64)
        return history | {"first": v[:, 0], "least": v.min(axis=1), "most": v.max(axis=1)}
    length, window, first = header["lengths"], header["options"]["window"] or 0, arrays["centre"]
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
    phase = sums.frame(header["folded"])[1].reshape(-1)
    phase = np.tile(phase, len(state) // len(phase))
    return history | {
        "first": first,
        "least": known.min(axis=1),
        "most": known.max(axis=1),
        "state": state * np.exp(phase).reshape(-1, 1, 1),
        "low": np.zeros_like(state),
        "ring_keys": arrays["ring_keys"][..., slots],
        "ring": x,
    }
