"""What a slot, a head of a batch element, gets does not depend on which slots are beside it."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inside import chosen_for, outputs

import ropecy
from ropecy.certify.statistics import Statistics
from ropecy.engines.exact.engine import Exact
from ropecy.engines.fft import shared
from ropecy.problem.mask import Mask
from ropecy.problem.problem import Problem

N, D = 400, 6
# The size of scores, of values, how unlike the lengths of queries are, and how far from 0 values lie.
SLOT = st.tuples(
    st.sampled_from([0.02, 0.3, 0.5, 0.72, 0.74, 1.0, 1.1, 2.0, 4.0, 60.0]),
    st.sampled_from([1e-3, 1.0, 1e4]),
    st.sampled_from([0.0, 0.5, 1.5]),
    st.sampled_from([0.0, 30.0]),
)
METHODS = st.sampled_from(["auto", "polynomial"])


def _slot(seed, bound, size, ragged, offset, n=N, d=D, dtype=np.float32):
    rng = np.random.default_rng(seed)
    q, k = (X / np.linalg.norm(X, axis=-1, keepdims=True) for X in rng.standard_normal((2, n, d)))
    q *= bound * np.exp(-ragged * rng.random((n, 1)))
    return tuple(X.astype(dtype) for X in (q, k, size * (rng.uniform(-1, 1, (n, 3)) + offset)))


def _results(slots, grad, **options):
    """What the first slot gets beside the others: its results, its part of the certificate, and its plan."""
    Q, K, V = (np.stack(X) for X in zip(*slots, strict=True))
    if not grad:
        O, c, lse = ropecy.attention(Q, K, V, scale=1.0, **options, return_lse=True, return_certificate=True)
        found, certificates = [O, lse], [c]
    else:
        O, vjp = ropecy.attention_vjp(Q, K, V, scale=1.0, **options)
        # Powers of two bring dO of all slots to one size.
        g = vjp(np.sign(V))
        found, certificates = [O, g.dQ, g.dK, g.dV], [vjp.certificate, g.certificate]
    for certificate in certificates:
        rows = certificate.rows_truncation
        found.append(np.full(found[0].shape[:-1], certificate.truncation) if rows is None else rows)
    part = next((own for names, own in certificates[0].parts if (0,) in names), certificates[0])
    return [X[0] for X in found], (part.engine, part.rule, part.degree)


@settings(max_examples=25)
@given(
    first=SLOT,
    others=st.lists(SLOT, min_size=3, max_size=3),
    causal=st.booleans(),
    grad=st.booleans(),
    method=METHODS,
    eps=st.sampled_from([1e-3, 2e-2]),
    seed=st.integers(0, 99),
)
def test_bits_and_certificates_are_a_slots_own(first, others, causal, grad, method, eps, seed):
    if method == "polynomial":
        first, *others = ((min(own[0], 4.0), *own[1:]) for own in (first, *others))
    slot, how = _slot(seed, *first), {"causal": causal, "method": method, "eps": eps, "seed": 1}
    if method == "polynomial":
        how["eps"] = 2e-2
    alike = _results([slot] * 4, grad, **how)
    beside = _results([slot, *(_slot(seed + 1 + at, *own) for at, own in enumerate(others))], grad, **how)
    assert beside[1] == alike[1]
    for X, Y in zip(beside[0], alike[0], strict=True):
        np.testing.assert_array_equal(X, Y)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("method", ["auto", "polynomial"])
def test_a_slot_whose_rows_fail_takes_the_fallback_alone(method, causal):
    slots = [_slot(seed, 1.0, 1.0, 0.0, 0.0, n=900, d=16, dtype=np.float64) for seed in range(3)]
    q, k, v = (np.stack(X) for X in zip(*slots, strict=True))
    problem = Problem(q=q[:, None], k=k, v=v, mask=Mask(900, 900, hi=0 if causal else None))
    planned = chosen_for(problem, eps=1e-3, method="polynomial", grad=True).executable
    assert planned.certificate.rule == "moments"
    if method == "auto":
        planned = replace(planned, fallback=Exact(problem, Statistics(problem), True))
    failing = replace(planned, n_exact_rows=np.array([900, -1, 900]))
    do = np.cos(v)[:, None]
    by = [planned.forward(problem, True), planned.fallback.forward(problem, True), failing.forward(problem, True)]
    fine, other, found = ((own.o, own.lse, *outputs(own.backward(problem, do))) for own in by)
    for X, Y, Z in zip(fine, other, found, strict=True):
        np.testing.assert_array_equal(Z[[0, 2]], X[[0, 2]])
        np.testing.assert_array_equal(Z[1], Y[1])
    for certificate in (by[2].certificate, by[2].gradient_certificate):
        assert certificate.rule == "mixed"
        assert certificate.rows_truncation.shape == (3, 1, 900)
        assert certificate.rows_truncation.max() == certificate.truncation
    assert np.all(by[2].certificate.rows_truncation[1] == 0) == (method == "auto")


def test_a_sequence_rounds_by_its_own_values():
    """However large those of a sequence beside it are, all of which lie far from 0."""
    few, many = (_slot(seed, 0.5, 1.0, 0.0, 5.0, n=n) for seed, n in ((1, 40), (2, 3000)))
    how = {"scale": 1.0, "eps": 1e-2, "return_certificate": True}
    Q, K, V = (np.concatenate([X, size * Y]) for X, Y, size in zip(few, many, np.float32([1, 1, 1e12]), strict=True))
    (names, part), _ = ropecy.attention(Q, K, V, lengths=[40, 3000], **how)[1].parts
    assert names == ((0, 0),)
    assert part.rounding <= 1.01 * ropecy.attention(*few, **how)[1].rounding


def _rough(depth, heads, n):
    """A bias that does not factor, which spreads over so many nats; a table for each head."""
    t = np.arange(1 - n, n)
    return np.array([np.cos(t * t + head) * depth / 2 for head in range(heads)])


def _shifted(slot, offset):
    """The same scores but for a constant in each row, with keys far from 0."""
    q, k, v = slot
    return q, k + np.float32(offset), v


def _with_long_keys(slot, count, length):
    q, k, v = (X.copy() for X in slot)
    k[7 : 7 + count] *= length
    q[9 : 9 + count // 2] *= length
    return q, k, v


# For each way to compute a slot: the slot, wild ones in the place of one beside it, and the call.
WILD = {
    "transforms": (
        _slot(1, 0.8, 1.0, 0.3, 3.0),
        [_slot(2, 3.0, 1.0, 0.3, 0.0), _slot(3, 0.82, 1e4, 0.0, 30.0), _shifted(_slot(4, 0.8, 1.0, 0.3, 3.0), 300)],
        {"method": "fft", "eps": 1e-2, "window": (40, 60)},
    ),
    "outliers": (
        _with_long_keys(_slot(1, 0.3, 1.0, 0.0, 1.0), 4, 30),
        [
            _with_long_keys(_slot(2, 0.3, 1.0, 0.0, 0.0), 8, 20),
            _slot(3, 2.5, 1.0, 0.0, 0.0),
            _slot(4, 0.3, 1e4, 0.0, 30.0),
        ],
        {"method": "polynomial", "eps": 2e-2},
    ),
    "a near field": (
        _slot(1, 0.8, 1.0, 0.3, 3.0),
        [_slot(2, 3.0, 1.0, 0.3, 0.0), _slot(3, 0.8, 1.0, 0.0, 4e3), _shifted(_slot(4, 0.8, 1.0, 0.3, 3.0), 300)],
        {"method": "polynomial", "eps": 1e-2, "near": (16, 30.0), "causal": True},
    ),
    "decayed states": (
        _slot(1, 0.8, 1.0, 0.3, 3.0),
        [_slot(2, 3.0, 1.0, 0.3, 0.0), _slot(3, 0.8, 1.0, 0.0, 4e3), _shifted(_slot(4, 0.8, 1.0, 0.3, 3.0), 3000)],
        {"method": "polynomial", "eps": 1e-2, "bias": ropecy.RelativeBias.alibi(0.1), "causal": True},
    ),
}


def _part(certificate):
    """Whether the last slot is in the part of the first one, and the certificate of that part, without its rows."""
    names, own = next((part for part in certificate.parts if (0,) in part[0]), (((3,),), certificate))
    return (3,) in names, replace(own, rows_truncation=None, parts=(), n_exact_rows=0)


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("way", WILD)
def test_a_wild_slot_changes_nothing_beside_it(way, which):
    slot, wild, how = WILD[way]

    def found(fourth):
        slots = [slot, slot, slot, fourth]
        Q, K, V = (np.stack(X) for X in zip(*slots, strict=True))
        O, vjp = ropecy.attention_vjp(Q, K, V, scale=1.0, **how)
        g = vjp(np.sign(V))
        certificates = vjp.certificate, g.certificate
        own = O, g.dQ, g.dK, g.dV, *(certificate.rows_truncation for certificate in certificates)
        return [None if X is None else X[0] for X in own], [_part(certificate) for certificate in certificates]

    expected, certificates = found(slot)
    beside, again = found(wild[which])
    for (_, alike), (together, own) in zip(certificates, again, strict=True):
        # What a part is certified is the most that any of its slots needs.
        names = ("engine", "rule", "degree") if together else alike.__dataclass_fields__
        assert all(getattr(own, name) == getattr(alike, name) for name in names)
    assert certificates[0][1].engine == ("fft" if way == "transforms" else "polynomial")
    for X, Y in zip(beside, expected, strict=True):
        np.testing.assert_array_equal(X, Y)


@pytest.mark.parametrize("causal", [False, True])
def test_samples_are_a_slots_own(causal):
    # Evidence is taken where a proof would take a polynomial of many monomials.
    def own(seed, *like, offset=0):
        return _shifted(_slot(seed, *like, n=1500, d=16), offset)

    slot, how = own(1, 4.0, 1.0, 0.1, 0.0), {"certify": "sample", "method": "polynomial", "eps": 5e-2, "seed": 1}
    found, plan = _results([slot] * 4, False, causal=causal, **how)
    assert plan[1] == "sampled"
    for wild in (own(2, 3.6, 1.0, 0.5, 0.0), own(3, 4.0, 1e4, 0.0, 30.0), own(4, 4.0, 1.0, 0.0, 0.0, offset=300)):
        others, beside = _results([slot, slot, wild, wild], False, causal=causal, **how)
        assert beside[:2] == plan[:2]  # the degree is the largest of all
        for X, Y in zip(others, found, strict=True):
            np.testing.assert_array_equal(X, Y)


@pytest.mark.parametrize("masked", [False, True])
def test_the_levels_of_a_bias_are_its_own(masked):
    """However far those of other heads spread, and whichever keys these see."""
    slot = _slot(1, 0.5, 1.0, 0.0, 0.0)
    first = _rough(30.0, 1, N)[0]

    def found(other, bias, kept):
        Q, K, V = (np.stack(X) for X in zip(slot, other, strict=True))
        how = {"method": "fft", "eps": 1e-2, "scale": 1.0, "bias": ropecy.RelativeBias(np.array([first, bias]))}
        if masked:
            how["key_mask"] = np.array([np.arange(N) % 3 > 0, kept])
        O, vjp = ropecy.attention_vjp(Q, K, V, **how)
        g = vjp(np.sign(V))
        return [X[0] for X in (O, g.dQ, g.dK, g.dV, g.dbias)]

    t = np.arange(1 - N, N)
    for X, Y in zip(found(slot, first, np.arange(N) % 3 > 0), found(slot, 0.12 * t, np.arange(N) < 9), strict=True):
        np.testing.assert_array_equal(X, Y)


def test_an_exact_head_does_not_depend_on_the_bias_of_another():
    slot = _slot(1, 3.0, 1.0, 0.0, 0.0, dtype=np.float64)
    t = np.arange(1 - N, N)
    q, k, v = (np.stack([X, X]) for X in slot)

    def found(other):
        bias = ropecy.RelativeBias(np.array([np.cos(t), other]))
        O, vjp = ropecy.attention_vjp(q, k, v, scale=1.0, bias=bias, causal=True, method="exact")
        g = vjp(np.sign(v))
        return [X[0] for X in (O, g.dQ, g.dK, g.dV, g.dbias)]

    for X, Y in zip(found(np.cos(t)), found(0.3 * t), strict=True):
        np.testing.assert_array_equal(X, Y)


def test_an_exact_head_does_not_depend_on_the_values_of_another():
    q, k, v = (np.stack([X, X]) for X in _slot(1, 3.0, 1.0, 0.0, 0.0))
    alike, beside = (
        ropecy.attention(q, k, v * np.float32([1, size])[:, None, None], scale=1.0, method="exact")[0]
        for size in (1, 1e22)
    )
    np.testing.assert_array_equal(alike, beside)


def test_transforms_of_a_head_are_planned_by_the_shape_of_the_call(monkeypatch):
    """FFTW's plans, by which bits of transforms may differ, are not those of the heads that are computed together."""
    asked = []
    monkeypatch.setattr(shared, "plans", lambda *how, run=shared.plans: asked.append(how) or run(*how))
    slot, other = _slot(1, 0.8, 1.0, 0.3, 0.0), _slot(2, 0.01, 1.0, 0.0, 0.0)
    for slots in ([slot] * 4, [other, other, other, slot]):
        Q, K, V = (np.stack(X) for X in zip(*slots, strict=True))
        ropecy.attention(Q, K, V, scale=1.0, method="fft", eps=1e-2)
    assert len(asked) == 3 and asked[0] == asked[2]
