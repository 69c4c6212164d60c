"""Files of a DecodeState taken apart and put together, and what earlier versions of the package would have written."""

import io
import json

import numpy as np


def content(state):
    file = io.BytesIO()
    state.save(file)
    return file.getvalue()


def parts(data):
    """Header and arrays of a file."""
    with np.load(io.BytesIO(data)) as file:
        arrays = dict(file)
    return json.loads(str(arrays.pop("header"))), arrays


def joined(header, arrays):
    file = io.BytesIO()
    np.savez(file, header=np.array(header if isinstance(header, str) else json.dumps(header)), **arrays)
    return file.getvalue()


def of_version_4(data):
    """The same state in a file of version 4, in which all heads have one near scale."""
    header, arrays = parts(data)
    return joined(header | {"version": 4}, arrays)


def of_version_3(data):
    """The same state in a file of version 3: one length for all streams, and an axis of all heads in each array."""
    header, arrays = parts(data)
    del header["options"]["near"]
    streams = len(header["lengths"])
    exact = header.pop("exact")
    header |= {"version": 3, "length": header.pop("lengths")[0], "folded": header["folded"][0]}
    header |= {"largest": max(header["largest"]), "asked": max(header["asked"])}
    for name, axis in (("ring_keys", 2), ("ring", 2), ("keys", 1), ("values", 1)):
        if name in arrays:
            X = arrays[name]
            X = np.moveaxis(X.reshape(*X.shape[:axis], streams, -1, *X.shape[axis + 1 :]), axis, 0)
            arrays[name] = X.reshape(X.shape[0] * X.shape[1], *X.shape[2:])
    if all(exact):
        header["folded"] = header["length"]
        arrays = {name: X for name, X in arrays.items() if name not in ("state", "low", "ring_keys", "ring")}
    return joined(header, arrays)
