"""What plan() says: a row for each engine, and advice that does what it promises."""

import re

import cases
import numpy as np
import pytest

import ropecy
from ropecy.engines.exact.cost import exact_work
from ropecy.engines.outliers import engine as outliers
from ropecy.engines.polynomial.cost import LOOKING, polynomial_work
from ropecy.planning import planner
from ropecy.problem.mask import Mask
from ropecy.problem.problem import Outline, Sizes


def rows(rng, n, d, scale=1.0):
    Q, K = (scale * cases.unit_rows(x) for x in rng.standard_normal((2, n, d)))
    return Q.astype(np.float32), K.astype(np.float32), rng.uniform(-1, 1, (n, d)).astype(np.float32)


def by_name(alternatives):
    return {alternative.name: alternative for alternative in alternatives}


def test_table_of_a_problem_in_the_regime(rng):
    Q, K, V = rows(rng, 4000, 8)
    plan = ropecy.plan(Q, K, V, ropecy.Rotary(8), causal=True)
    lines = str(plan).splitlines()
    assert lines[0] == "forward: 1 x 4,000 queries, 1 x 4,000 keys, d = 8, d_v = 8, float32, eps = 0.001"
    assert re.match(r"scores    \|s\| <= 1 \(Cauchy-Schwarz\), .*; root mean square of a row 0\.35, at most", lines[1])
    assert lines[2].split() == ["engine", "degree", "features", "error", "seconds", "MiB", "pays", "from", "n"]
    names = by_name(plan.alternatives)
    assert list(names)[:2] == ["exact", "polynomial, worst case"] and "fft" in names
    marked = [line for line in lines if line.startswith("->")]
    assert len(marked) == 1 and marked[0].split()[1].rstrip(",") == plan.engine == "polynomial"
    worst = names["polynomial, worst case"]
    row = next(line for line in lines if "polynomial, worst case" in line)
    assert f"{worst.certificate.n_features:,}" in row and f"{worst.certificate.error:.1e}" in row
    assert f"{worst.seconds:.3g}" in row and f"{worst.pays_from:,}" in row
    assert f"result    {plan.certificate}" in lines and f"because   {plan.reason}" in lines
    assert repr(plan).startswith("Plan(polynomial, degree ") and "\n" not in repr(plan)


def test_every_row_is_what_that_engine_would_do(rng):
    Q, K, V = rows(rng, 1500, 16)
    options = {"R": ropecy.Rotary(16), "seed": 1}
    names = by_name(ropecy.plan(Q, K, V, **options).alternatives)
    for name, alternative in names.items():
        method = name.split(",")[0]
        forced = ropecy.plan(Q, K, V, **options, method=method)
        if name != "polynomial, worst case":
            assert alternative.certificate == forced.certificate
            assert alternative.seconds == pytest.approx(forced.seconds[method])
            assert alternative.bytes == forced.bytes[method]
    assert names["polynomial, moments"].certificate.degree < names["polynomial, worst case"].certificate.degree
    assert names["polynomial, moments"].pays_from < names["polynomial, worst case"].pays_from


@pytest.mark.parametrize("grad", [False, True])
def test_refusals_stand_in_the_row(grad, rng):
    Q, K, V = rows(rng, 300, 8, scale=6.0)
    plan = ropecy.plan(Q, K, V, grad=grad)
    assert plan.engine == "exact"
    refused = by_name(plan.alternatives)["polynomial, worst case"]
    assert refused.certificate is None and refused.pays_from is None and refused.seconds == np.inf
    assert refused.refusal.startswith("no degree certifies eps = 0.001")
    assert f"polynomial, worst case   no: {refused.refusal}" in str(plan)
    windowed = ropecy.plan(Q, K, V, window=50)
    assert "no: method='polynomial' does not do a window" in str(windowed)
    assert windowed.advice == ()


def test_advice_for_scores_past_the_regime(rng):
    Q, K, V = rows(rng, 2000, 16, scale=4.0)
    plan = ropecy.plan(Q, K, V, ropecy.Rotary(16), scale=16**-0.5)
    advice = by_name(plan.advice)
    assert "instead   " in str(plan) and str(plan).count("pays from n = ") == len(advice)
    assert 'certify="sample"' not in advice  # B = 64 is past what any polynomial is fitted for
    normalised = advice["q and k normalised to a root mean square of 1, scale=1/d"]
    unit_Q, unit_K = (cases.unit_rows(X) for X in (Q, K))
    made = ropecy.plan(unit_Q, unit_K, V, ropecy.Rotary(16), method="polynomial")
    assert normalised.certificate.degree == made.certificate.degree
    assert normalised.certificate.error == pytest.approx(made.certificate.error, rel=0.01)
    assert normalised.certificate.bound == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize(
    ("change", "scale", "options", "changed"),
    [
        ("scale=1/d", 1.0, {"scale": 16**-0.5}, {"scale": 1 / 16}),
        ("eps=0.01", 1.0, {"scale": 4 / 16}, {"scale": 4 / 16, "eps": 1e-2}),
        ('certify="sample"', 1.0, {"scale": 4 / 16}, {"scale": 4 / 16, "certify": "sample"}),
    ],
)
def test_advice_is_what_the_changed_call_gets(change, scale, options, changed, rng):
    Q, K, V = rows(rng, 3000, 16, scale)
    R = ropecy.Rotary(16)
    advice = by_name(ropecy.plan(Q, K, V, R, seed=3, **options).advice)[change]
    made = ropecy.plan(Q, K, V, R, seed=3, method="polynomial", **changed)
    assert advice.certificate == made.certificate
    assert advice.seconds == pytest.approx(made.seconds["polynomial"])
    assert f"{change}: degree {made.certificate.degree}, " in str(ropecy.plan(Q, K, V, R, seed=3, **options))


def test_advice_of_float64(rng):
    Q, K, V = rows(rng, 2000, 4)
    with pytest.warns(ropecy.AccuracyWarning, match="eps = 1e-08: rounding in float32 alone may be .* float64"):
        plan = ropecy.plan(Q, K, V, eps=1e-8, scale=4 / 4)
    assert plan.engine == "exact" and "rounding in float32 alone" in str(plan)
    advice = by_name(plan.advice)["float64"]
    made = ropecy.plan(*(X.astype(float) for X in (Q, K, V)), eps=1e-8, scale=4 / 4, method="polynomial")
    assert advice.certificate == made.certificate and made.certificate.error < 1e-8


def test_no_advice_where_nothing_is_to_be_gained(rng):
    Q, K, V = rows(rng, 3000, 4)
    plan = ropecy.plan(Q, K, V, scale=0.2 / 4)
    assert plan.engine == "polynomial"
    assert all(2 * alternative.seconds < plan.seconds["polynomial"] for alternative in plan.advice)
    assert ropecy.plan(Q, K, V, scale=0.2 / 4, method="exact").advice == ()


def test_plans_of_nothing_print_too():
    plan = ropecy.plan(np.zeros((0, 4)), np.zeros((5, 4)), np.zeros((5, 2)))
    assert plan.alternatives == plan.advice == ()
    assert "because   no query sees a key" in str(plan)


def test_pays_from_is_where_predictions_cross(rng):
    Q, K, V = rows(rng, 500, 8)
    for grad in (False, True):
        worst = by_name(ropecy.plan(Q, K, V, grad=grad).alternatives)["polynomial, worst case"]
        cheaper = []
        for n in (worst.pays_from, int(0.8 * worst.pays_from)):
            made = Outline(sizes=Sizes(1, 1, n, n, 8, 8), dtype=np.dtype(np.float32), mask=Mask(n, n))
            polynomial = polynomial_work(made, worst.certificate.degree, grad)  # worst case: one more in backward
            cheaper.append(polynomial.nominal + LOOKING < exact_work(made, grad).nominal)
        assert cheaper == [True, False]


@pytest.mark.filterwarnings("error::RuntimeWarning", "ignore::ropecy.AccuracyWarning")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("options", [{}, {"grad": True}, {"causal": True}, {"certify": "sample"}, {"scale": 1e30}])
def test_scores_of_any_size_have_a_plan(options, dtype, rng):
    for size in [10.0**k for k in (8, 10, 18, 19, 30)] + [1e100, 1e160, 1e300] * (dtype == np.float64):
        Q, K, V = (size * rng.standard_normal((3, 50, 4))).astype(dtype)
        plan = ropecy.plan(Q, K, V, **options)
        assert plan.engine == "exact" and "-> exact" in str(plan)
        for method in ("polynomial", "fft"):
            with pytest.raises(ropecy.BoundedEntryError, match=r"scores are bounded by B"):
                ropecy.plan(Q, K, V, method=method, **options)


def test_exact_work_is_not_said_to_be_all_there_is_beside_what_certifies(rng, monkeypatch):
    """Auto takes exact work though a polynomial beside a few long rows would do, which it did not look for."""
    monkeypatch.setattr(outliers, "_LOOK", 0.0)
    Q, K = rng.standard_normal((2, 5000, 3))
    plan = ropecy.plan(Q, K, scale=1.0, eps=1e-6)
    other = by_name(plan.alternatives)["polynomial, worst case"]
    assert plan.engine == "exact" and other.certificate is not None and other.seconds < plan.seconds["exact"]
    assert "no degree" not in plan.reason
    assert re.search(r"a longer one, which method='polynomial' takes, finds polynomial, worst case in ", plan.reason)


def test_exact_work_past_eps_is_not_said_to_certify_it(rng, monkeypatch):
    """What certifies eps would take too long."""
    monkeypatch.setattr(planner, "_SECOND", 0.0)
    Q, K = rng.uniform(-1, 1, (2, 5000, 3)).astype(np.float32)
    with pytest.warns(UserWarning):
        plan = ropecy.plan(Q, K, scale=1.0, eps=1e-6)
    assert plan.engine == "exact" and plan.certificate.error > 1e-6
    assert by_name(plan.alternatives)["fft"].certificate.error <= 1e-6
    assert plan.reason == "cheaper than fft, which certifies eps = 1e-06; rounding of exact work in float32 passes it"


def test_work_of_days_is_a_refusal(rng):
    """Its row has no seconds, and the method that was insisted on is refused before it begins."""
    Q, K, V = rows(rng, 2000, 128)
    plan = ropecy.plan(Q, K, V, scale=4 / 128)
    fft = by_name(plan.alternatives)["fft"]
    assert fft.certificate is None and fft.seconds == np.inf
    said = r"degree 9 certifies eps = 0\.001, and transforms of its 35,823,246,375,345 features take .* s$"
    assert re.search(rf"fft  +no: {said}", str(plan), re.MULTILINE)
    for call in (ropecy.plan, ropecy.attention, ropecy.attention_vjp):
        with pytest.raises(ropecy.BoundedEntryError, match=r"transforms of its .* features take .* s; .*'exact'"):
            call(Q, K, V, method="fft", degree=15, eps=0.5)


def test_what_is_normalised_is_not_to_be_normalised(rng):
    Q, K, V = rows(rng, 2000, 16)
    for scale in (8.0, 8 / 16):
        plan = ropecy.plan(Q, K, V, scale=scale)
        assert "scale=1/d" in str(plan) and "normalised" not in str(plan)
    with pytest.raises(ropecy.BoundedEntryError, match=r"; scale=1/d, would make B smaller; method='exact'"):
        ropecy.plan(Q, K, V, scale=100.0, method="polynomial")
    with pytest.raises(ropecy.BoundedEntryError, match=r"; q and k normalised, would make B smaller; "):
        ropecy.plan(20 * Q, K, V, method="polynomial")
    with pytest.raises(ropecy.BoundedEntryError, match=r"does not certify eps = 1e-05; .* features, would do; method="):
        ropecy.plan(Q.astype(float), K.astype(float), V.astype(float), method="polynomial", eps=1e-5, degree=1)
