"""Bits of results, and texts of certificates and plans, over a grid of calls: to see that a change inside changes none.

    python tests/golden.py make FILE             before the change
    python tests/golden.py compare FILE          after it; prints what differs, and exits with 1 where anything does
    mpiexec -n 3 python tests/golden.py make FILE --ranks     the same over three ranks

Bits are those of one machine and one instruction set (ROPECY_ISA chooses another), so the file is not kept.
"""

import argparse
import hashlib
import importlib
import itertools
import json
import re
import sys
import warnings

import numpy as np

import ropecy


def rows(rng, *shape, size=1.0):
    """Rows of root mean square `size`."""
    X = rng.standard_normal(shape)
    return size * X / np.sqrt((X * X).mean(axis=-1, keepdims=True))


def arrays(n, n_k, d, d_v, heads, key_heads, dtype, *, long=0, size=1.0):
    """Q, K, V and dO, with some keys and queries that are far longer than the others."""
    rng = np.random.default_rng(n * 7919 + d)
    lead, key_lead = ((), ()) if heads is None else ((heads,), (key_heads,))
    Q, K = rows(rng, *lead, n, d, size=size), rows(rng, *key_lead, n_k, d, size=size)
    if long:
        K[..., 5 : 5 + long, :] *= 30
        Q[..., 11 : 11 + long, :] *= 30
    V, dO = rng.standard_normal((*key_lead, n_k, d_v)), rng.standard_normal((*lead, n, d_v))
    return [X.astype(dtype) for X in (Q, K, V, dO)]


def small():
    """Name and arguments of calls of a few hundred tokens: every mask, bias and dtype by every method."""
    rng = np.random.default_rng(3)
    n, n_k, d = 150, 170, 4
    keep = rng.random(n_k) < 0.8
    table = np.linspace(-1, 1, 2 * 41 - 1)
    family = 0.3 * rng.standard_normal((n + n_k - 1, d, d)) / d
    masks = {
        "plain": {},
        "causal": {"causal": True, "q_offset": 20},
        "window": {"window": (30, 10)},
        "kept": {"causal": True, "key_mask": keep},
    }
    positions = {
        "": {},
        "rope": {"R": ropecy.Rotary(d)},
        "alibi": {"bias": ropecy.RelativeBias.alibi(np.array([0.01, 0.1, 0.2, 0.3]))},
        "table": {"bias": ropecy.RelativeBias(table)},
        "t5": {"bias": ropecy.RelativeBias.t5(np.linspace(-1, 1, 16), 16, 40, False)},
        "kerple": {"bias": ropecy.RelativeBias.kerple(1.0, 0.1, "log")},
        "near": {"near": (9, 3.0)},
        "family": {"R": ropecy.RelativeFamily(family, n_k=n_k)},
    }
    for (mask, how), (position, what), method in itertools.product(
        masks.items(), positions.items(), ("auto", "exact", "polynomial", "fft")
    ):
        for dtype in ("float32", "float64") if method in ("exact", "polynomial") else ("float32",):
            options = {**how, **what, "method": method}
            yield f"{mask} {position} {method} {dtype}", arrays(n, n_k, d, 3, 4, 2, dtype), options
    for dtype in ("float16", "float32"):
        W = np.eye(d, dtype=dtype) * 0.9
        yield f"projected {dtype}", arrays(n, n_k, d, 4, 2, 1, dtype), {"W": W, "W_Q": W, "W_K": W, "W_V": W}


def long():
    """Calls of thousands of tokens, in which a polynomial, moments, samples and outliers run."""
    R = ropecy.Rotary
    for causal, dtype in itertools.product((False, True), ("float32", "float64")):
        how = {"causal": causal}
        yield f"worst case {causal} {dtype}", arrays(5000, 5000, 8, 8, 2, 1, dtype), {**how, "R": R(8)}
        moments = {**how, "R": R(32), "eps": 1e-2, "method": "polynomial"}
        yield f"moments {causal} {dtype}", arrays(2500, 2500, 32, 4, None, None, dtype), moments
        yield f"outliers {causal} {dtype}", arrays(20000, 20000, 4, 4, None, None, dtype, long=4), how
        sample = {**how, "certify": "sample", "seed": 7}
        yield f"sample {causal} {dtype}", arrays(9000, 9000, 16, 4, None, None, dtype), sample
    yield "refused", arrays(3000, 3000, 8, 8, None, None, "float32", size=9.0), {"method": "polynomial"}
    alibi = {"causal": True, "bias": ropecy.RelativeBias.alibi(0.01)}
    yield "decayed", arrays(9000, 9000, 8, 8, 2, 1, "float32"), alibi
    yield "near", arrays(9000, 9000, 8, 8, 2, 1, "float32"), {"causal": True, "near": (64, 0.5)}
    rough = ropecy.RelativeBias(np.random.default_rng(5).standard_normal(2 * 3000 - 1))
    yield "rough", arrays(3000, 3000, 4, 4, None, None, "float32"), {"causal": True, "bias": rough, "method": "fft"}


def bits(X):
    """A digest of an array's bits, or of a number's."""
    X = np.ascontiguousarray(X)
    return f"{X.dtype} {X.shape} {hashlib.sha256(X.tobytes()).hexdigest()[:16]}"


def outcome(function, of):
    """of(function()), or what was raised instead."""
    try:
        return of(function())
    except (ValueError, NotImplementedError, MemoryError) as error:
        return f"{type(error).__name__}: {error}"


def gradients(found):
    """Bits of O and of every gradient, and the texts of both certificates."""
    O, vjp, dO = found
    g = vjp(dO)
    named = {name: bits(getattr(g, name)) for name in dir(g) if name.startswith("d") and getattr(g, name) is not None}
    return {"O": bits(O), "certificate": str(vjp.certificate), **named, "gradient certificate": str(g.certificate)}


def one_process(name, given, how):
    """All that is said of one call."""
    (Q, K, V, dO), options = given, dict(how)
    R = options.pop("R", None)

    def forward():
        return ropecy.attention(Q, K, V, R, return_certificate=True, return_lse=True, **options)

    def backward():
        return *ropecy.attention_vjp(Q, K, V, R, **options), dO

    found = {
        "forward": outcome(forward, lambda x: {"O": bits(x[0]), "certificate": str(x[1]), "lse": bits(x[2])}),
        "backward": None if options.get("certify") == "sample" else outcome(backward, gradients),
    }
    for grad in (False, True):
        plan = outcome(lambda grad=grad: ropecy.plan(Q, K, V, R, grad=grad, **options), lambda p: p)
        found[f"plan {grad}"] = plan if isinstance(plan, str) else planned(plan)
    return found


def planned(plan):
    """What of a plan does not depend on how fast the machine is at the moment."""
    said = [(a.name, str(a.certificate), a.pays_from, a.refusal, a.bytes) for a in plan.alternatives]
    advised = [(a.name, str(a.certificate), a.pays_from) for a in plan.advice]
    # Some reasons end with predicted seconds, which go by the speed of the machine.
    reason = re.sub(r" in [0-9.e-]+ s$", "", plan.reason)
    return [plan.engine, reason, str(plan.certificate), str(plan.gradient_certificate), str(said), str(advised)]


def over_ranks(comm, name, given, how):
    """The same of a piece of the sequence, of unlike lengths; a key mask speaks of the piece."""
    (Q, K, V, dO), options = given, dict(how)
    R = options.pop("R", None)
    cuts = [0, Q.shape[-2] // 4, Q.shape[-2] // 2, Q.shape[-2]]
    key_cuts = [0, K.shape[-2] // 5, K.shape[-2] // 2, K.shape[-2]]
    mine, keys = slice(*cuts[comm.rank : comm.rank + 2]), slice(*key_cuts[comm.rank : comm.rank + 2])
    if "key_mask" in options:
        options["key_mask"] = options["key_mask"][keys]
    piece = [np.ascontiguousarray(X) for X in (Q[..., mine, :], K[..., keys, :], V[..., keys, :])]

    def backward():
        return *ropecy.mpi.attention_vjp(comm, *piece, R, **options), np.ascontiguousarray(dO[..., mine, :])

    def forward():
        return ropecy.mpi.attention(comm, *piece, R, return_certificate=True, **options)

    found = {"forward": outcome(forward, lambda x: {"O": bits(x[0]), "certificate": str(x[1])})}
    if options.get("certify") != "sample":
        found["backward"] = outcome(backward, gradients)
    plan = outcome(lambda: ropecy.mpi.plan(comm, *piece, R, **options, network=ropecy.mpi.Network(1e-6, 1e9)), str)
    found["plan"] = [line for line in plan.splitlines() if line.startswith(("exchange", "result", "because"))]
    return found


def main():
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("make", "compare"))
    parser.add_argument("file")
    parser.add_argument("--ranks", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.ranks:
        from mpi4py import MPI

        importlib.import_module("ropecy.mpi")
        comm = MPI.COMM_WORLD
        found = {name: over_ranks(comm, name, given, how) for name, given, how in itertools.chain(small(), long())}
        found = dict(enumerate(comm.gather(found) or ()))
        if comm.rank:
            return
    else:
        found = {name: one_process(name, given, how) for name, given, how in itertools.chain(small(), long())}
    found = json.loads(json.dumps(found))
    if options.what == "make":
        with open(options.file, "w") as file:
            json.dump(found, file, indent=1)
        return
    with open(options.file) as file:
        expected = json.load(file)
    differences = list(compare(expected, found, ""))
    print("\n".join(differences) or f"{len(found)} calls or ranks as before")
    sys.exit(bool(differences))


def compare(expected, found, where):
    """A line for each leaf that differs."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for name in expected | found:
            yield from compare(expected.get(name), found.get(name), f"{where} / {name}")
    elif expected != found:
        yield f"{where}\n   was {expected}\n   is  {found}"


if __name__ == "__main__":
    main()
