"""What a Certificate says of a result and of its gradients, entry by entry, held against the oracle.

Problems are compared in blocks of rows, so that of long ones a few rows will do. The truth of float64 problems is
computed in extended precision, so that the oracle's own rounding does not count.
"""

import math

import numpy as np
import oracle

# By how much a result may be past what is said of its rounding, which is a model of its size and not a proof.
ROOM = 1.02
# Stands for infinity where it may be multiplied by 0.
HUGE = 1e100


def finest(dtype):
    """The dtype in which the oracle computes the truth."""
    return np.longdouble if dtype == np.float64 else np.float64


def numbers(dtype):
    """The finfo of a dtype, also of bfloat16, which NumPy does not know."""
    if dtype.kind == "f":
        return np.finfo(dtype)
    import ml_dtypes

    return ml_dtypes.finfo(dtype)


def block_of(case, rows):
    """The case with these rows of Q alone: (start, stop)."""
    start, stop = rows
    return {**case, "Q": case["Q"][..., start:stop, :], "q_offset": case.get("q_offset", 0) + start}


def offsets(block, dense):
    """j - (i + q_offset), (n, n_k)."""
    n, n_k = dense.P.shape[-2:]
    return np.arange(n_k) - np.arange(n)[:, None] - block["q_offset"]


def kept(case, dense):
    """(..., n_k, 1): which keys of each slot key_mask keeps."""
    return np.broadcast_to(case.get("key_mask", True), dense.v.shape[:-1])[..., None]


def column_ranges(case, dense):
    """(..., d_v): the range of each column of each slot's values over kept keys."""
    keep = kept(case, dense)
    least = np.where(keep, dense.v, np.inf).min(axis=-2)
    return np.where(keep.any(axis=-2), np.where(keep, dense.v, -np.inf).max(axis=-2) - least, 0)


def assert_finite(name, found, reach):
    """Neither NaN nor Inf where the truth, and what may be off, are within the dtype's numbers; which entries are."""
    held = reach < 0.99 * float(numbers(found.dtype).max)
    assert np.isfinite(found[held].astype(np.float64)).all(), f"{name} is not finite where the truth is"
    return held


def assert_within(name, off, allowed, more):
    """`off` is nowhere past `allowed`."""
    with np.errstate(divide="ignore", invalid="ignore"):
        worst = np.max(np.where(off > allowed, off / allowed, 0), initial=0)
    assert not worst, f"{name} is off by {worst:.5g} times {more}"


def assert_result(case, O, certificate, blocks):
    """Each entry is off by at most truncation_row range + rounding max_c range."""
    for start, stop in blocks:
        block = block_of(case, (start, stop))
        dense = oracle.attention(**block, dtype=finest(case["Q"].dtype))
        found, expected = O[..., start:stop, :], dense.O
        assert_finite("O", found, np.abs(expected))
        largest = column_ranges(case, dense).max(initial=0)
        largest = largest or np.abs(np.where(kept(case, dense), dense.v, 0)).max(initial=0)
        largest += computed("V", case, dense).max(initial=0)
        allowed = ROOM * certificate.rounding * largest
        rows = certificate.rows_truncation[..., start:stop, None]
        if rows.any():
            allowed = allowed + (1 + 1e-6) * np.minimum(rows, HUGE) * dense.value_range
        off = np.abs(found.astype(expected.dtype) - expected)
        assert_within("O", off, allowed, f"what is certified: {certificate}")


def sequences(case, rows, keys):
    """The rows and keys of each of some packed sequences of these lengths, and its case by itself."""
    q, k = (np.concatenate([[0], np.cumsum(lengths)]) for lengths in (rows, keys))
    offsets = np.broadcast_to(case.get("q_offset", 0), len(rows))
    for j in range(len(rows)):
        own, at = slice(q[j], q[j + 1]), slice(k[j], k[j + 1])
        one = {**case, "Q": case["Q"][..., own, :], "K": case["K"][..., at, :], "V": case["V"][..., at, :]}
        if "key_mask" in case:
            one["key_mask"] = case["key_mask"][..., at]
        if "q_offset" in case:
            one["q_offset"] = int(offsets[j])
        yield own, at, one


def assert_packed_result(case, rows, keys, O, certificate):
    """As `assert_result`, each sequence by itself."""
    found, lost = [], [0.0]
    # The range is that of all keys, whichever rows see them.
    whole = oracle.attention(**{**case, "Q": case["Q"][..., :1, :]}, dtype=finest(case["Q"].dtype))
    largest = column_ranges(case, whole).max(initial=0)
    largest = largest or np.abs(np.where(kept(case, whole), whole.v, 0)).max(initial=0)
    for own, at, one in sequences(case, rows, keys):
        if own.start == own.stop or at.start == at.stop:
            assert not O[..., own, :].any()
            continue
        dense = oracle.attention(**one, dtype=finest(case["Q"].dtype))
        lost.append(computed("V", one, dense).max(initial=0))
        found.append((own, dense.O, dense.value_range))
    largest, of_rows = largest + max(lost), certificate.rows_truncation
    for own, expected, ranges in found:
        assert_finite("O", O[..., own, :], np.abs(expected))
        allowed = ROOM * certificate.rounding * largest
        if of_rows is not None:
            allowed = allowed + (1 + 1e-6) * np.minimum(of_rows[..., own, None], HUGE) * ranges
        off = np.abs(O[..., own, :].astype(expected.dtype) - expected)
        assert_within("O", off, allowed, f"what is certified: {certificate}")


def assert_gradients(case, dO, g, blocks):
    """Each gradient is within what `Certificate` says of it; dO is 0 in rows that are in no block."""
    exact, allowed = {}, {}
    for start, stop in blocks:
        block, do = block_of(case, (start, stop)), dO[..., start:stop, :].astype(finest(dO.dtype))
        dense = oracle.attention(**block, dtype=finest(dO.dtype))
        for into, found in ((exact, dense.backward(do)), (allowed, gradient_bounds(block, dense, do, g.certificate))):
            for name, X in found.items():
                if name == "dQ":
                    whole = into.setdefault(name, np.zeros(case["Q"].shape[:-1] + X.shape[-1:], X.dtype))
                    whole[..., start:stop, :] = X
                else:
                    into[name] = into.get(name, 0) + X
    for name, bound in allowed.items():
        found, expected = np.asarray(getattr(g, name)), exact[name]
        held, info = assert_finite(name, found, np.abs(expected) + bound), numbers(found.dtype)
        off = np.abs(np.where(held, found.astype(expected.dtype) - expected, 0))
        off = np.maximum(0, off - float(info.eps) * np.abs(expected) - 4 * float(info.smallest_subnormal))
        if name in ("dQ", "dK"):
            off = norm(off)[..., None]
        elif name.startswith("dW"):
            off = norm(off.ravel())
        assert_within(name, off, bound, f"what is said of it: {g.certificate}")


def gradient_bounds(block, dense, do, certificate):
    """What `Certificate` says of gradients, for a block of rows: of all but dQ, what these rows add to it.

    Norms of rows of dQ and dK, entries of dV and of dbias, Frobenius norms of projections' gradients.
    """
    e, r = certificate.error, min(ROOM * certificate.rounding, HUGE)
    arc, zeta = (math.atanh(e), 2 * e / (1 - e)) if e < 1 else (HUGE, HUGE)
    c = max(abs(dense.scale), np.abs(block["near"][1]).max() if block.get("near") else 0.0)
    omega = dense.ranges((do @ np.swapaxes(dense.v, -1, -2))[..., None])[..., 0]
    # Where columns are constant the oracle's own rounding is all there is.
    own = 64 * np.finfo(do.dtype).eps * np.abs(np.where(kept(block, dense), dense.v, 0)).max(axis=-2)
    own = own + (1 + r) * computed("V", block, dense).max(axis=-1, keepdims=True)
    w = (np.abs(do) * (r * column_ranges(block, dense) + own)[..., None, :]).sum(axis=-1)
    least = 1e-180 if block["Q"].dtype == np.float64 else 1e-24
    w = np.where(w > 0, np.maximum(w, least * w.max(initial=0)), 0)
    moved = np.swapaxes(zeta * dense.P * omega[..., None], -1, -2)
    values = zeta * np.swapaxes(dense.P, -1, -2) @ np.abs(do)
    if certificate.rule == "moments":
        # Of dK and dV moments say how far their sums over keys are off.
        moved = np.broadcast_to(zeta * omega[..., None, :], moved.shape)
        values = np.broadcast_to(zeta * np.abs(do).sum(axis=-2, keepdims=True), values.shape)
    t, q = offsets(block, dense), norm(dense.q)
    length, middle = (X[..., None] for X in key_lengths(block, dense))
    # What is said is said of queries, keys and values as they were computed: nearly all of a projection may cancel.
    off_q, off_k = (computed(name, block, dense) for name in "QK")
    lost_q = (omega + w) * off_k.max(axis=-1, keepdims=True)
    lost_k = np.swapaxes(dense.P * (omega * off_q)[..., None], -1, -2).sum(axis=-1)
    matrices = 1.0
    if isinstance(block.get("R"), oracle.Family):
        matrices = np.linalg.norm(block["R"].matrices(t, dense.q.shape[-1], np.float64), 2, axis=(-2, -1)).max()
    each_key = (w * (q + off_q)).sum(axis=-1)[..., None] + lost_k
    bounds = {
        "Q": c * matrices * (arc / 2 * omega * np.maximum(length, middle) + w * middle + lost_q)[..., None],
        "K": c * matrices * (moved @ q[..., None] + each_key[..., None]),
        "V": values + r * np.abs(do).sum(axis=-2, keepdims=True),
    }
    found = of_arguments(block, dense, bounds)
    if block.get("bias") is not None:
        each = np.swapaxes(moved, -1, -2) * dense.allowed + at_each_offset(w.sum(axis=-1), dense.allowed)
        found["dbias"] = np.abs(block["bias"].gradient(each, t))
    return found


def at_each_offset(total, allowed):
    """(..., n, n_k) whose sum over the pairs of each offset j - i is total (...,), where any pair is allowed."""
    n, n_k = allowed.shape[-2:]
    at = np.arange(n_k) - np.arange(n)[:, None] + n - 1
    count = oracle.sums_by_index(allowed * 1.0, at, n + n_k - 1)
    return total[..., None, None] * allowed / np.maximum(count, 1)[..., at]


def norm(X):
    """(...,): of each row of X (..., m), which neither overflows nor vanishes on the way."""
    size = np.abs(X).max(axis=-1, initial=0)
    return size * np.sqrt(((X / np.where(size > 0, size, 1)[..., None]) ** 2).sum(axis=-1))


def key_lengths(block, dense):
    """(...,): max_j ||K_j|| of each slot, and the same of K less its mean, but beside `near` and with a family."""
    keep = kept(block, dense)
    k, count = np.where(keep, dense.k, 0), np.maximum(keep.sum(axis=-2, keepdims=True), 1)
    length = norm(k).max(axis=-1)
    if block.get("near") or isinstance(block.get("R"), oracle.Family):
        return length, length
    return length, norm(np.where(keep, k - k.sum(axis=-2, keepdims=True) / count, 0)).max(axis=-1)


def computed(name, block, dense):
    """(..., rows): what rounding does at most to a row of Q, K or V when it is projected in float64."""
    size = norm(block[name].astype(dense.O.dtype))
    W = block.get(f"W_{name}")
    size = 2.0**-52 * size * (0 if W is None else np.linalg.norm(W.astype(np.float64)))
    return oracle._expand(size[..., None], dense.O.shape[:-2])[..., 0]


def of_arguments(block, dense, bounds):
    """From bounds of what meets in the scores and of values to those of arguments: through projections, and summed over
    the queries of a group.
    """
    found, lead = {}, dense.O.shape[:-2]
    for name in "QKV":
        bound, X, weight = bounds[name], block[name].astype(dense.O.dtype), f"W_{name}"
        if weight in block:
            rows = norm(bound)
            found[f"d{weight}"] = (oracle._expand(norm(X)[..., None], lead)[..., 0] * rows).sum()
            bound = rows[..., None] * np.linalg.norm(block[weight].astype(np.float64), 2)
        found[f"d{name}"] = oracle.collapse(bound, block[name].shape[:-1] + bound.shape[-1:], lead)
    return found
