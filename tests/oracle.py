"""Attention and its gradients as dense NumPy, written from the papers' formulas and sharing nothing with the package.

Every matrix is formed in full, every array is first repeated to the shape of the whole problem, and every gradient is
summed back to the shape of its argument at the end: slow and plain on purpose. ``dtype=numpy.float32`` gives the
straightforward float32 evaluation that the package's float32 error is compared with.
"""

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Rope:
    """R_m: rotation by m * theta_b in each pair of coordinates; `attention_factor` multiplies rotated coordinates."""

    d: int
    base: float = 10000.0
    pairing: str = "half"
    rotary_dim: int | None = None
    attention_factor: float = 1.0

    def _pairs(self):
        r = self.d if self.rotary_dim is None else self.rotary_dim
        b = np.arange(r // 2)
        theta = self.base ** (-2.0 * b / r)
        return (b, b + r // 2, theta) if self.pairing == "half" else (2 * b, 2 * b + 1, theta)

    def rotate(self, X, positions, transpose=False):
        """Rows R_{pos_i} x_i, or the rows R_{pos_i}^T x_i."""
        first, second, theta = self._pairs()
        angle = np.asarray(positions, dtype=np.float64)[..., None] * theta
        cos = (self.attention_factor * np.cos(angle)).astype(X.dtype)
        sin = (self.attention_factor * np.sin(angle)).astype(X.dtype)
        if transpose:
            sin = -sin
        Y = X.copy()
        Y[..., first] = X[..., first] * cos - X[..., second] * sin
        Y[..., second] = X[..., first] * sin + X[..., second] * cos
        return Y

    def matrix(self, m):
        """(d, d) R_m = rotate(I, 0)^T rotate(I, m), laid out so that q R_{j-i} k^T = <R_i q, R_j k>."""
        eye = np.eye(self.d)
        return self.rotate(eye, 0) @ self.rotate(eye, m).T


@dataclass(frozen=True)
class Family:
    """W_t in the place of R: values (M, d, d), or (M, |S|) with the pairs of `support`; W_0 is values[n_k - 1]."""

    values: np.ndarray
    n_k: int | None = None
    support: np.ndarray | None = None

    def _index(self, t):
        n_k = t.shape[1] if self.n_k is None else self.n_k
        return np.clip(-t + n_k - 1, 0, len(self.values) - 1)

    def matrices(self, t, d, dtype):
        """(n, n_k, d, d): W_{-t} for the offsets t = j - i."""
        W = self.values
        if self.support is not None:
            W = np.zeros((len(self.values), d, d))
            for column, (a, b) in enumerate(self.support):
                W[:, a, b] = self.values[:, column]
        return W[self._index(t)].astype(dtype)

    def gradient(self, dW, t):
        """That of values, from dW (n, n_k, d, d) for each pair of a query and a key."""
        index, found = self._index(t), np.zeros((len(self.values),) + dW.shape[2:])
        np.add.at(found, index.reshape(-1), dW.reshape((-1,) + dW.shape[2:]))
        return found if self.support is None else np.stack([found[:, a, b] for a, b in self.support], axis=-1)


@dataclass(frozen=True)
class Table:
    """A relative bias b_t, t from -(T-1) to T-1, clipped past its ends: (2T-1,) or (heads, 2T-1)."""

    values: np.ndarray

    def symbol(self, t):
        half = self.values.shape[-1] // 2
        return self.values[..., np.clip(t, -half, half) + half]

    def gradient(self, dS, t):
        half = self.values.shape[-1] // 2
        index = np.clip(t, -half, half) + half
        return _sum_to(sums_by_index(dS, index, 2 * half + 1), self.values.shape)


@dataclass(frozen=True)
class Alibi:
    """The relative bias -slope |t|; slope is a number or one number per head."""

    slope: np.ndarray

    def symbol(self, t):
        return -np.asarray(self.slope)[..., None, None] * np.abs(t)

    def gradient(self, dS, t):
        return _sum_to(-(dS * np.abs(t)).sum(axis=(-2, -1)), np.shape(self.slope))


@dataclass(frozen=True)
class Buckets:
    """T5's bias: (num_buckets,) or (heads, num_buckets) values; the bucket of an offset as the paper has it."""

    values: np.ndarray
    max_distance: int = 128
    bidirectional: bool = True

    def _bucket(self, t):
        buckets, start = self.values.shape[-1], 0
        if self.bidirectional:
            buckets //= 2
            start = buckets if t > 0 else 0
        m = abs(t) if self.bidirectional else max(0, -t)
        exact = buckets // 2
        if m < exact:
            return start + m
        # A distance on the edge of two buckets belongs to the farther one.
        share = math.log(m / exact) / math.log(self.max_distance / exact)
        return start + min(buckets - 1, exact + int(share * (buckets - exact) + 1e-9))

    def _index(self, t):
        found = {int(one): self._bucket(int(one)) for one in np.unique(t)}
        return np.vectorize(found.get, otypes=[int])(t)

    def symbol(self, t):
        return self.values[..., self._index(t)]

    def gradient(self, dS, t):
        index = self._index(t)
        return _sum_to(sums_by_index(dS, index, self.values.shape[-1]), self.values.shape)


@dataclass(frozen=True)
class Kerple:
    """KERPLE's bias: -r1 log(1 + r2 |t|), or -r1 |t|^r2; r1 and r2 are numbers or one number per head."""

    r1: np.ndarray
    r2: np.ndarray
    variant: str = "log"

    def symbol(self, t):
        r1, r2 = (np.asarray(r)[..., None, None] for r in (self.r1, self.r2))
        return -r1 * np.log(1 + r2 * np.abs(t)) if self.variant == "log" else -r1 * np.abs(t) ** r2

    def gradient(self, dS, t):
        r1, r2 = (np.asarray(r)[..., None, None] for r in (self.r1, self.r2))
        far = np.abs(t)
        if self.variant == "log":
            by = -np.log(1 + r2 * far), -r1 * far / (1 + r2 * far)
        else:
            by = -(far**r2), -r1 * far**r2 * np.log(np.maximum(far, 1))
        return np.stack([_sum_to((dS * each).sum(axis=(-2, -1)), np.shape(self.r1)) for each in by])


def sums_by_index(dS, index, count):
    """(..., count): the sum of dS (..., n, n_k) over the pairs that have each index."""
    order = np.argsort(index, axis=None)
    places = index.reshape(-1)[order]
    starts = np.flatnonzero(np.diff(places, prepend=-1))
    found = np.zeros((*dS.shape[:-2], count), dS.dtype)
    found[..., places[starts]] = np.add.reduceat(dS.reshape(*dS.shape[:-2], -1)[..., order], starts, axis=-1)
    return found


def _sum_to(X, shape):
    """The adjoint of broadcasting `shape` to `X.shape`."""
    X = X.sum(axis=tuple(range(X.ndim - len(shape))))
    return X.sum(axis=tuple(a for a, size in enumerate(shape) if size == 1 < X.shape[a]), keepdims=True)


def _heads(shape, lead):
    """How often each head of an array of this shape is repeated to fill the head axis of `lead`."""
    own = shape[-3] if len(shape) > 2 else 1
    return 1 if own in (0, 1) else lead[-1] // own


def _expand(X, lead):
    """(..., a, b) to (*lead, a, b): heads repeat in consecutive groups, other axes broadcast."""
    repeats = _heads(X.shape, lead)
    if repeats > 1:
        X = np.repeat(X, repeats, axis=-3)
    return np.broadcast_to(X, lead + X.shape[-2:])


def _first(v, key_mask):
    """(..., 1, d_v): the first row of v (..., n_k, d_v) that key_mask keeps, or any where it keeps none."""
    if key_mask is None or not v.shape[-2]:
        return v[..., :1, :].sum(axis=-2, keepdims=True)
    at = np.broadcast_to(key_mask, v.shape[:-1]).argmax(axis=-1)
    return np.take_along_axis(v, at[..., None, None], axis=-2)


def collapse(dX, shape, lead):
    """The adjoint of `_expand`."""
    repeats = _heads(shape, lead)
    if repeats > 1:
        grouped = dX.reshape(lead[:-1] + (lead[-1] // repeats, repeats) + dX.shape[-2:])
        dX = grouped.sum(axis=-3)
    return _sum_to(dX, shape)


def _lead(*shapes):
    """The leading axes of the whole problem: NumPy's broadcasting, but head counts may divide the largest."""
    leads = [shape[:-2] for shape in shapes if len(shape) > 2]
    if not leads:
        return ()
    heads = max((lead[-1] for lead in leads), default=1)
    return np.broadcast_shapes(*(lead[:-1] + (1 if 0 < lead[-1] < heads else lead[-1],) for lead in leads))


@dataclass
class Dense:
    """What `attention` formed: `A_ij = P_ij exp(lse_i)`, the rotated rows q, k, v, and the result O = P v."""

    O: np.ndarray
    lse: np.ndarray
    P: np.ndarray
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    allowed: np.ndarray
    scale: float
    backward: object

    @property
    def A(self):
        """The unnormalised matrix A."""
        return self.P * np.where(np.isfinite(self.lse), np.exp(self.lse), 0.0)[..., None]

    @property
    def value_range(self):
        """(..., n, d_v): max_j V_jc - min_j V_jc over the keys that row i sees, 0 where it sees none."""
        return self.ranges(np.broadcast_to(self.v[..., None, :, :], self.allowed.shape + self.v.shape[-1:]))

    def ranges(self, values):
        """max_j - min_j of values (..., n, n_k, m) over the keys that each row sees."""
        seen = self.allowed[..., None]
        largest = np.where(seen, values, -np.inf).max(axis=-2, initial=-np.inf)
        smallest = np.where(seen, values, np.inf).min(axis=-2, initial=np.inf)
        return np.where(seen.any(axis=-2), largest - smallest, 0.0)


def attention(
    Q,
    K,
    V,
    R=None,
    *,
    W=None,
    W_Q=None,
    W_K=None,
    W_V=None,
    scale=None,
    causal=False,
    window=None,
    near=None,
    bias=None,
    key_mask=None,
    q_positions=None,
    k_positions=None,
    q_offset=0,
    dtype=np.float64,
):
    """D^-1 A V with A_ij = exp(scale (Q_i W_Q) W R_{j-i} (K_j W_K)^T + b_{j-i}) where key j is allowed for row i."""
    given = {"Q": Q, "K": K, "V": V, "W": W, "W_Q": W_Q, "W_K": W_K, "W_V": W_V}
    given = {name: np.asarray(X).astype(dtype) for name, X in given.items() if X is not None}
    n, n_k = given["Q"].shape[-2], given["K"].shape[-2]
    lead = _lead(*(X.shape for X in given.values()))
    full = {name: _expand(X, lead) for name, X in given.items()}

    t = np.arange(n_k) - (np.arange(n)[:, None] + q_offset)
    allowed = np.ones(lead + (n, n_k), dtype=bool)
    if causal:
        allowed &= t <= 0
    if isinstance(window, tuple):
        allowed &= (-window[0] <= t) & (t <= window[1])
    elif window is not None:
        allowed &= (-window < t) & (t <= 0)
    if key_mask is not None:
        kept = np.broadcast_to(key_mask, lead + (n_k,))
        allowed &= kept[..., None, :]
        for name in "KV":
            full[name] = np.where(kept[..., None], full[name], 0)

    Q1 = full["Q"] @ full["W_Q"] if "W_Q" in full else full["Q"]
    K1 = full["K"] @ full["W_K"] if "W_K" in full else full["K"]
    v = full["V"] @ full["W_V"] if "W_V" in full else full["V"]
    Q2 = Q1 @ full["W"] if "W" in full else Q1
    q_positions = np.arange(n) + q_offset if q_positions is None else np.asarray(q_positions)
    k_positions = np.arange(n_k) if k_positions is None else np.asarray(k_positions)
    family, R = (R, None) if isinstance(R, Family) else (None, R)
    q = Q2 if R is None else R.rotate(Q2, q_positions)
    k = K1 if R is None else R.rotate(K1, k_positions)

    scale = 1.0 / K1.shape[-1] if scale is None else float(scale)
    factor = np.full((n, n_k), scale)
    if near is not None:
        each = np.asarray(near[1], np.float64)
        each = each.reshape(()) if each.size == 1 else each[:, None, None]
        factor = np.where(np.abs(t) < near[0], each, factor)
    factor = factor.astype(dtype)
    # What all keys have in common adds the same to all scores of a row: it is added to lse, and costs no digits of P.
    common_key = np.zeros_like(k[..., :1, :]) if near is not None or family is not None else _first(k, key_mask)
    apart_k = k - common_key
    if family is None:
        s = factor * (q @ np.swapaxes(apart_k, -1, -2))
    else:
        matrices = family.matrices(t, q.shape[-1], dtype)
        s = factor * np.einsum("...ia,ijab,...jb->...ij", q, matrices, k)
    top = 0
    if bias is not None:
        # A bias that all keys of a row have is none, whatever its size: what is added to scores is how far it is below.
        symbol = np.where(allowed, bias.symbol(t).astype(dtype), -np.inf)
        top = symbol.max(axis=-1, keepdims=True, initial=-np.inf)
        top = np.where(np.isfinite(top), top, 0)
        s = s + (symbol - top)
    s = np.where(allowed, s, -np.inf)
    shift = s.max(axis=-1, keepdims=True, initial=-np.inf)
    shift = np.where(np.isfinite(shift), shift, 0)
    weights = np.exp(s - shift)
    Z = weights.sum(axis=-1, keepdims=True)
    P = (weights / np.where(Z > 0, Z, 1)).astype(dtype)
    # What all keys have in common is taken from values and added to the result: it costs no digits.
    common = _first(v, key_mask)
    apart = v - common
    O = np.where(Z > 0, P @ apart + common, 0)
    with np.errstate(divide="ignore"):
        lse = (top + shift + np.log(Z) + dtype(scale) * (q @ np.swapaxes(common_key, -1, -2)))[..., 0]

    def backward(dO):
        """{"dQ": ..., ...}: the gradients of <dO, O>, each in the shape of its argument."""
        dO = np.asarray(dO).astype(dtype)
        dP = dO @ np.swapaxes(apart, -1, -2)
        dS = P * (dP - (P * dP).sum(axis=-1, keepdims=True))
        if family is None:
            dq = (dS * factor) @ apart_k
            dk = np.swapaxes(dS * factor, -1, -2) @ q
        else:
            dq = np.einsum("...ij,ijab,...jb->...ia", dS * factor, matrices, k)
            dk = np.einsum("...ij,ijab,...ia->...jb", dS * factor, matrices, q)
        dv = np.swapaxes(P, -1, -2) @ dO
        dQ = dq if R is None else R.rotate(dq, q_positions, transpose=True)
        dK = dk if R is None else R.rotate(dk, k_positions, transpose=True)
        grads = {}
        if "W" in full:
            grads["dW"] = np.swapaxes(Q1, -1, -2) @ dQ
            dQ = dQ @ np.swapaxes(full["W"], -1, -2)
        for name, X, dX in (("Q", full["Q"], dQ), ("K", full["K"], dK), ("V", full["V"], dv)):
            if "W_" + name in full:
                grads["dW_" + name] = np.swapaxes(X, -1, -2) @ dX
                dX = dX @ np.swapaxes(full["W_" + name], -1, -2)
            grads["d" + name] = dX
        grads = {name: collapse(dX, given[name[1:]].shape, lead) for name, dX in grads.items()}
        if bias is not None:
            grads["dbias"] = bias.gradient(dS, t)
        if family is not None:
            pairs = np.einsum("...ij,...ia,...jb->...ijab", dS * factor, q, k)
            grads["dR"] = family.gradient(_sum_to(pairs, pairs.shape[-4:]), t)
        return grads

    return Dense(O, lse, P, q, k, v, allowed, scale, backward)


def loss(Q, K, V, E, R=None, **options):
    """Half the sum of squares of D^-1 A V - E."""
    difference = attention(Q, K, V, R, **options).O - np.asarray(E, dtype=np.float64)
    return 0.5 * float((difference**2).sum())


def loss_gradients(Q, K, V, E, R=None, **options):
    """The gradients of `loss`, named as `Dense.backward` names them."""
    dense = attention(Q, K, V, R, **options)
    return dense.backward(dense.O - np.asarray(E, dtype=np.float64))
