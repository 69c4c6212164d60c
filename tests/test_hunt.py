"""A hunt for violated certificates; ``ROPECY_HUNT=20000 pytest tests/test_hunt.py`` looks at so many problems each, at
a hundredth of it that are long, and at a thousandth of texts.
"""

import math
import os
import warnings
from itertools import pairwise

import hunted
import numpy as np
from conftest import relative_bias, relative_family, rotary
from hypothesis import example, given, settings
from hypothesis import strategies as st
from inside import measure, measure_values
from moment_cases import DATA, adversarial, by_moments, problem_of, row_errors, seen_by_rows, values_for
from oracle import Family
from promises import ROOM, assert_gradients, assert_packed_result, assert_result, assert_within

import ropecy

ASKED = int(os.environ.get("ROPECY_HUNT", 0))
hunting = settings(max_examples=ASKED or 150)
hunting_numbers = settings(max_examples=ASKED or 60)
hunting_long = settings(max_examples=math.ceil(ASKED / 100) or 2)
hunting_texts = settings(max_examples=math.ceil(ASKED / 1000) or 1)


def problem_drawn(rng, kind, values, size, causal, masked, dtype):
    H, G, d = rng.integers(1, 3), rng.integers(1, 3), rng.integers(1, 5)
    n, n_k = (int(rng.integers(190, 420)),) * 2 if causal else (int(rng.integers(1, 8)), int(rng.integers(1, 30)))
    q, k = adversarial(kind, rng, (H, G, n, n_k, d), size)
    v = values_for(values, rng, q, k, size)
    mask = rng.random((H, n_k)) < 0.7 if masked else None
    offset = int(rng.integers(-5, 5)) if causal else 0
    return problem_of(*(x.astype(dtype) for x in (q, k, v)), causal=causal, mask=mask, q_offset=offset)


DRAWN = {
    "kind": st.sampled_from(DATA),
    "seed": st.integers(0, 2**32),
    "causal": st.booleans(),
    "masked": st.booleans(),
    "size": st.sampled_from([0.1, 0.5, 1.0, 2.0, 3.5]),
    "values": st.sampled_from(["uniform", "signs of the error", "rare", "ramp", "one column small"]),
    "dtype": st.sampled_from([np.float32, np.float64]),
}


@hunting
@given(degree=st.sampled_from([2, 3, 4, 5, 6]), fourth=st.booleans(), **DRAWN)
def test_no_row_is_past_its_certificate(kind, seed, degree, fourth, causal, masked, size, values, dtype):
    rng = np.random.default_rng(seed)
    problem = problem_drawn(rng, kind, values, size, causal, masked, dtype)
    if problem.empty:
        return
    kappa = float(rng.choice([0.5, 4.0, 32.0])) if fourth and degree < 4 else 0.0
    found = by_moments(problem, degree, kappa)
    if found is None:
        return
    o, rows, *_ = found
    scores, spread = measure(problem), measure_values(problem)
    unit = float(np.finfo(dtype).eps) / 2
    rounding = unit * (12 + 4 * math.exp(2 * scores.bound) + 2 * spread.offset)
    errors, ranges, largest = row_errors(problem, o, by_column=True)
    rows = np.minimum(rows, 1e300)  # inf times no range
    allowed = rows[..., None] * (1 + 1e-6) * ranges + rounding * largest
    assert np.all(errors <= allowed)


@hunting
@given(eps=st.sampled_from([1e-1, 1e-2, 1e-3, 1e-5]), method=st.sampled_from(["auto", "polynomial"]), **DRAWN)
def test_no_result_is_past_what_is_certified(kind, seed, eps, method, causal, masked, size, values, dtype):
    problem = problem_drawn(np.random.default_rng(seed), kind, values, size, causal, masked, dtype)
    try:
        O, certificate = ropecy.attention(
            problem.q,
            problem.k[:, None],
            problem.v[:, None],
            scale=problem.scale,
            causal=causal,
            q_offset=problem.mask.offset,
            key_mask=None if problem.mask.kept is None else problem.mask.kept[:, None],
            eps=eps,
            method=method,
            seed=1,
            return_certificate=True,
        )
    except ropecy.BoundedEntryError:
        assert method == "polynomial"
        return
    if problem.empty:
        assert not O.any()
        return
    errors, ranges, largest = row_errors(problem, O, by_column=True)
    rows = certificate.rows_truncation[..., None] * ranges + certificate.rounding * largest
    assert np.all(errors <= rows)
    # Whole rows, by how far values are from the row: in the 2-norm, and in that of the sum.
    apart = np.abs(problem.v[:, None, None].astype(np.float64) - O[..., None, :])
    for p in (1, 2):
        radius = np.max(np.linalg.norm(apart, p, axis=-1), axis=-1, where=seen_by_rows(problem), initial=0)
        allowed = 2 * certificate.rows_truncation * radius * (1 + 1e-6)
        allowed += certificate.rounding * largest * problem.v.shape[2]
        assert np.all(np.linalg.norm(errors, p, axis=-1) <= allowed)


@hunting_numbers
@given(
    eps=st.sampled_from([1e-1, 1e-2, 1e-3]),
    method=st.sampled_from(["auto", "polynomial"]),
    sizes=st.lists(st.sampled_from([0.05, 0.2, 0.5, 1.0, 2.0, 5.0, 20.0]), min_size=2, max_size=5),
    **{name: drawn for name, drawn in DRAWN.items() if name != "size"},
)
@example(
    eps=1e-3, method="auto", sizes=[0.05, 5.0], kind="all negative", seed=0, causal=False, masked=False,
    values="signs of the error", dtype=np.float64,
)  # fmt: skip
def test_no_head_is_past_the_certificate_of_its_part(kind, seed, eps, method, sizes, causal, masked, values, dtype):
    rng = np.random.default_rng(seed)
    H, G, d, n = len(sizes), int(rng.integers(1, 3)), int(rng.integers(1, 4)), int(rng.integers(200, 500))
    q, k = adversarial(kind, rng, (H, G, n, n, d), 1.0)
    q *= np.asarray(sizes)[:, None, None, None]
    v = values_for(values, rng, q, k, 1.0)
    mask = rng.random((H, n)) < 0.7 if masked else None
    problem = problem_of(*(x.astype(dtype) for x in (q, k, v)), causal=causal, mask=mask)
    how = {"scale": problem.scale, "causal": causal, "key_mask": None if mask is None else mask[:, None]}
    arrays = problem.q, problem.k[:, None], problem.v[:, None]
    try:
        O, certificate = ropecy.attention(*arrays, **how, eps=eps, method=method, seed=1, return_certificate=True)
    except ropecy.BoundedEntryError:
        assert method == "polynomial"
        return
    errors, ranges, largest = row_errors(problem, O, by_column=True)
    assert np.all(errors <= certificate.rows_truncation[..., None] * ranges + certificate.rounding * largest)
    named = [slot for slots, _ in certificate.parts for slot in slots]
    assert sorted(named) == ([(head, 0) for head in range(H)] if certificate.parts else [])
    for slots, part in certificate.parts:
        for head, _ in slots:
            assert certificate.rows_truncation[head].max(initial=0) <= part.truncation


# ---- numbers of every size, through every door ----


def translated(case):
    """The case with the package's R and bias in the place of the oracle's."""
    case = dict(case)
    if "R" in case:
        case["R"] = relative_family(case["R"]) if isinstance(case["R"], Family) else rotary(case["R"])
    if "bias" in case:
        case["bias"] = relative_bias(case["bias"])
    return case


def answered(call, case, drawn):
    """What the call gives, and whether it warns of accuracy; None where the method that was insisted on refuses. No
    other method may refuse, and nothing else may be warned of.
    """
    refusals = () if drawn["method"] in ("exact", "auto") else (ropecy.BoundedEntryError, NotImplementedError)
    how = {"method": drawn["method"], "eps": drawn["eps"], "seed": 1, "threads": 1}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = call(**translated(case), **how)
        except refusals:
            return None
    others = [one for one in caught if one.category is not ropecy.AccuracyWarning]
    assert not others, str(others[0].message)
    return *found, bool(caught)


def assert_warned_where_eps_is_not_certified(warned, certificate, drawn):
    # Where there are parts, each is judged by itself.
    each = [part for _, part in certificate.parts] or [certificate]
    past = any(part.error - part.storing > drawn["eps"] * (1 + 1e-12) for part in each)
    assert warned == (past and drawn["method"] == "auto"), f"warned: {warned}, eps {drawn['eps']}, {certificate}"


RANGE_NEXT_TO_NOTHING = {
    "method": "exact", "dtype": "float64", "sizes": "few", "heads": "one", "scores": 0.5, "data": "gauss",
    "moved": "no", "values": "tiny", "seen": "causal", "bias": "none", "rotated": "no", "projected": "no",
    "upstream": "uniform", "eps": 0.001, "seed": 0,
}  # fmt: skip


ROUNDING_PAST_EPS = {
    "method": "auto", "dtype": "float32", "sizes": "few", "heads": "one", "scores": 0.5, "data": "gauss",
    "moved": "columns unlike", "values": "uniform", "seen": "all", "bias": "none", "rotated": "no", "projected": "no",
    "upstream": "uniform", "eps": 1e-12, "seed": 0,
}  # fmt: skip
ROUNDING_NEXT_TO_THE_LARGEST_NUMBER = {
    "method": "auto", "dtype": "float32", "sizes": "few", "heads": "key heads", "scores": 1000.0, "data": "gauss",
    "moved": "no", "values": "rare", "seen": "causal", "bias": "none", "rotated": "no", "projected": "no",
    "upstream": "uniform", "eps": 1e-09, "seed": 0,
}  # fmt: skip
NO_ROW_SEES_A_KEY = {
    "method": "exact", "dtype": "float32", "sizes": "few queries", "heads": "both", "scores": 0.5,
    "data": "one direction", "moved": "keys near each other", "values": "uniform", "seen": "causal, offset",
    "bias": "none", "rotated": "no", "projected": "no", "upstream": "uniform", "eps": 0.001, "seed": 1792099,
}  # fmt: skip


@hunting_numbers
@given(hunted.words(hunted.SHORT))
@example(RANGE_NEXT_TO_NOTHING)
@example(NO_ROW_SEES_A_KEY)
@example(ROUNDING_PAST_EPS)
@example(ROUNDING_NEXT_TO_THE_LARGEST_NUMBER)
def test_results_of_any_size(drawn):
    case, dO = hunted.short(drawn)
    found = answered(lambda **how: ropecy.attention(**how, return_certificate=True), case, drawn)
    if found is None:
        return
    O, certificate, warned = found
    assert_warned_where_eps_is_not_certified(warned, certificate, drawn)
    assert_result(case, O, certificate, [(0, O.shape[-2])])


ALL_ROWS_SET_ASIDE = {
    "method": "polynomial", "dtype": "bfloat16", "sizes": "few queries", "heads": "key heads", "scores": 0.5,
    "data": "gauss", "moved": "huge and tiny", "values": "constant", "seen": "causal", "bias": "none", "rotated": "no",
    "projected": "Q", "upstream": "uniform", "eps": 0.001, "seed": 38414,
}  # fmt: skip
DQ_PAST_FLOAT32 = {
    "method": "exact", "dtype": "float32", "sizes": "few", "heads": "one", "scores": 0.5, "data": "gauss",
    "moved": "no queries", "values": "uniform", "seen": "near, largest", "bias": "none", "rotated": "no",
    "projected": "Q", "upstream": "huge", "eps": 0.001, "seed": 0,
}  # fmt: skip

RANGES_NEXT_TO_NOTHING = {
    "method": "auto", "dtype": "float32", "sizes": "few", "heads": "one", "scores": 0.5, "data": "gauss",
    "moved": "columns unlike", "values": "uniform", "seen": "all", "bias": "none", "rotated": "no", "projected": "no",
    "upstream": "uniform", "eps": 1e-12, "seed": 0,
}  # fmt: skip


@hunting_numbers
@given(hunted.words(hunted.SHORT))
@example(ALL_ROWS_SET_ASIDE)
@example(DQ_PAST_FLOAT32)
@example(NO_ROW_SEES_A_KEY)
def test_gradients_of_any_size(drawn):
    case, dO = hunted.short(drawn)
    found = answered(ropecy.attention_vjp, case, drawn)
    if found is None:
        return
    O, vjp, warned = found
    assert_warned_where_eps_is_not_certified(warned, vjp.certificate, drawn)
    assert_result(case, O, vjp.certificate, [(0, O.shape[-2])])
    with np.errstate(all="raise", under="ignore"):
        g = vjp(dO)
    assert_gradients(case, dO, g, [(0, O.shape[-2])])


@hunting_long
@given(hunted.words(hunted.LONG))
def test_long_problems(drawn):
    case, dO, blocks = hunted.long(drawn)
    found = answered(ropecy.attention_vjp, case, drawn)
    if found is None:
        return
    O, vjp, warned = found
    assert_warned_where_eps_is_not_certified(warned, vjp.certificate, drawn)
    assert np.isfinite(O.astype(np.float64)).all()
    assert_result(case, O, vjp.certificate, blocks)
    assert_gradients(case, dO, vjp(dO), blocks)


@hunting_numbers
@given(hunted.words(hunted.SHORT))
@example(RANGES_NEXT_TO_NOTHING)
def test_packed_sequences_of_any_size(drawn):
    if "family" in drawn["rotated"]:
        drawn = {**drawn, "rotated": "no"}
    case, _ = hunted.short(drawn)
    rng, count = np.random.default_rng(drawn["seed"] + 1), 1 + drawn["seed"] % 6
    cuts = (np.sort(rng.integers(0, case[name].shape[-2] + 1, count - 1)) for name in "QK")
    rows, keys = (np.diff([0, *at, case[name].shape[-2]]) for name, at in zip("QK", cuts, strict=True))

    def call(**how):
        return ropecy.attention(**how, lengths=(rows, keys), return_certificate=True)

    found = answered(call, case, drawn)
    if found is None:
        return
    O, certificate, warned = found
    # The largest truncation and the largest rounding may be those of two sequences, each of which is within eps.
    assert not warned or certificate.error - certificate.storing > drawn["eps"]
    assert_packed_result(case, rows, keys, O, certificate)


# ---- long texts ----


def assert_text(drawn, case, state, o, q):
    """The last result for queries q (..., heads, d), column by column, of the tokens so far; scale 1."""
    K, V = (X[..., : state.length, :].astype(np.longdouble) for X in (case.K, case.V))
    repeats = case.groups if case.lead else 1
    K, V = (np.repeat(X, repeats, axis=0) if repeats > 1 else X for X in (K, V))
    scores = (K @ q.astype(np.longdouble)[..., None])[..., 0]
    scores -= case.slopes[..., None] * np.arange(state.length - 1, -1, -1, dtype=np.longdouble)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    common = V[..., :1, :]
    expected = (weights[..., None, :] @ (V - common) + common)[..., 0, :]
    certificate, ranges = state.certificate, np.ptp(V, axis=-2)
    largest = ranges.max() or np.abs(V).max()
    allowed = certificate.truncation * ranges + ROOM * certificate.rounding * largest
    allowed += 64 * np.finfo(np.longdouble).eps * np.abs(V).max()
    assert np.isfinite(o).all()
    assert_within("o", np.abs(o - expected), allowed, f"what is certified: {certificate}, {state}")


@hunting_texts
@given(hunted.words(hunted.TEXTS))
def test_long_texts(drawn):
    case = hunted.text(drawn)
    try:
        state = ropecy.DecodeState(**case.options)
    except ropecy.BoundedEntryError:
        assert drawn["eps"] < 1e-6  # less than rounding of float32
        return
    rng, length = np.random.default_rng(drawn["seed"]), case.K.shape[-2]
    far = 10 ** rng.uniform(1, 6)
    # The last tokens one by one: of many such, sums of equal terms drift.
    last = length - (1000 if drawn["told"] == "in pieces" else 30_000)
    ends = np.unique([*rng.integers(0, last, 4), last])
    for start, stop in pairwise([0, *ends]):
        state.extend(case.K[..., start:stop, :], case.V[..., start:stop, :])
        o = state.attend(case.query(stop, 1))
        assert_text(drawn, case, state, o, case.query(stop, 1))
    for at in range(last, length):
        long = far if drawn["asks"] == "past the bound" and at % 2 and at > length - 1000 else 1.0
        o = state.step(q := case.query(at, long), case.K[..., at, :], case.V[..., at, :])
        if (at % 200 > 197 and at > length - 1000) or at == length - 1:
            assert_text(drawn, case, state, o, q)
