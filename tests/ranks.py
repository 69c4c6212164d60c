"""What tests/test_mpi.py runs under mpiexec: each function below is a test that all ranks run together."""

import dataclasses
import math
import sys
import time

import cases
import inside
import numpy as np
from conftest import relative_bias, rotary
from mpi4py import MPI
from oracle import Rope

import ropecy
import ropecy.mpi
from ropecy.certify.sample import draw
from ropecy.distributed.mpi_communicator import MPICommunicator
from ropecy.planning import evaluation
from ropecy.problem import traffic

COMM = MPI.COMM_WORLD


def ours(case):
    """The case with the package's R and bias."""
    case = dict(case)
    if isinstance(case.get("R"), Rope):
        case["R"] = rotary(case["R"])
    if "bias" in case:
        case["bias"] = relative_bias(case["bias"])
    return case


def cuts(n, how):
    """Where pieces begin and end: of unequal lengths, or all on one rank."""
    size = COMM.size
    if how == "unequal":
        inner = [n * (r + 1) ** 2 // (size + 1) ** 2 for r in range(1, size)]
    elif how == "whole chunks":
        inner = [192 * r * (r + 1) // 2 for r in range(1, size)]
    elif how == "empty first":
        inner = [0] * (size - 1)
    else:
        inner = [n] * (size - 1)
    return [0, *inner, n]


def piece(case, how, same=True):
    """This rank's piece of a case; rows and keys cut at the same places, where their numbers are the same, or not."""
    q_cuts = cuts(case["Q"].shape[-2], how)
    k_cuts = cuts(case["K"].shape[-2], how if same else "unequal")
    mine = {"Q": slice(*q_cuts[COMM.rank :][:2]), "K": slice(*k_cuts[COMM.rank :][:2])}
    own = dict(case)
    for name, X in case.items():
        rows = mine["Q" if name in ("Q", "E", "q_positions") else "K"]
        if name in ("Q", "K", "V", "E"):
            own[name] = X[..., rows, :]
        elif name in ("key_mask", "q_positions", "k_positions"):
            own[name] = X[..., rows]
    return own, mine


def compare(case, how, same=True, **options):
    """O, lse and all gradients of the ranks against those of one process, to rounding; twice the same bits."""
    rng = np.random.default_rng(1)
    O, vjp = ropecy.attention_vjp(**case, **options)
    lse = ropecy.attention(**case, **options, return_lse=True)[1]
    dO = rng.standard_normal(O.shape).astype(O.dtype)
    expected = vars(vjp(dO))
    own, mine = piece(case, how, same)
    rows, keys = mine["Q"], mine["K"]
    got, certificate, got_lse = ropecy.mpi.attention(
        COMM, **own, **options, return_certificate=True, return_lse=True
    )
    assert certificate.engine == vjp.certificate.engine
    assert certificate.degree == vjp.certificate.degree
    unit = 1e-12 if O.dtype == np.float64 else 3e-6
    np.testing.assert_allclose(got, O[..., rows, :], rtol=0, atol=unit * max(1, np.abs(case["V"]).max()))
    np.testing.assert_allclose(got_lse, lse[..., rows], rtol=unit, atol=unit)
    again, vjp = ropecy.mpi.attention_vjp(COMM, **own, **options)
    np.testing.assert_allclose(again, O[..., rows, :], rtol=0, atol=unit * max(1, np.abs(case["V"]).max()))
    found = vars(vjp(dO[..., rows, :]))
    assert found.keys() == expected.keys()
    for name, X in found.items():
        if name == "certificate":
            continue
        want = expected[name]
        if name in ("dQ", "dK", "dV"):
            want = want[..., rows if name == "dQ" else keys, :]
        assert X.dtype == want.dtype, name
        tolerance = 10 * unit * (1 + np.abs(expected[name]).max(initial=0))
        # A slope's sums the gradients of scores times their distances.
        tolerance *= case["K"].shape[-2] if name == "dbias" else 1
        np.testing.assert_allclose(X, want, rtol=0, atol=tolerance, err_msg=name)
    same_bits = vars(vjp(dO[..., rows, :]))
    assert all(np.array_equal(X, same_bits[name]) for name, X in found.items() if name != "certificate")


def raises(kind, match, function, *args, **options):
    """Every rank raises, within seconds, what says this."""
    start = time.perf_counter()
    try:
        function(COMM, *args, **options)
    except kind as error:
        assert match in str(error), f"{error!r} does not say {match!r}"
    else:
        raise AssertionError(f"nothing raised, wants {kind.__name__} {match!r}")
    assert time.perf_counter() - start < 10
    COMM.Barrier()


def test_exact():
    for name in cases.SPECS:
        case = ours(cases.make(name, np.random.default_rng(7)))
        compare(case, "unequal", method="exact", threads=1)
        if name in ("causal_more_keys", "key_mask_causal", "near_causal", "everything"):
            compare(case, "empty last", method="exact", threads=1)
            compare(case, "empty first", same=False, method="exact", threads=1)


def test_polynomial():
    for name in cases.POLYNOMIAL:
        case = ours(cases.make(name, np.random.default_rng(7), unit=True))
        for how in ("unequal", "empty first", "empty last")[: 3 if "causal" in name else 1]:
            # Pairs inside a chunk of causal rows are exact, and pieces are chunked on their own: where these are not
            # whole chunks, ranks and one process agree to truncation, which is made as small as rounding here.
            if not case.get("causal"):
                compare(case, how, method="polynomial", degree=5, threads=1)
            elif case["Q"].shape[-1] <= 5:
                compare(case, how, method="polynomial", eps=1e-12, degree=14, threads=1)


def test_polynomial_with_rows_apart_from_their_keys():
    rng = np.random.default_rng(4)
    for n, n_k, q_offset in ((700, 700, 0), (300, 1000, 700), (300, 1000, 150), (900, 400, -100), (500, 300, 350)):
        Q, K = (cases.unit_rows(rng.standard_normal((4, m, 5))) for m in (n, n_k))
        V = rng.standard_normal((2, n_k, 3))
        case = {"Q": Q, "K": K[:2], "V": V, "R": ropecy.Rotary(5, rotary_dim=4), "causal": True, "q_offset": q_offset}
        case["key_mask"] = rng.random(n_k) < 0.8
        for how in ("unequal", "empty first", "empty last"):
            compare(case, how, same=False, method="polynomial", eps=1e-12)
    # Work that the polynomial engine wins is not given to the exact one for where its rows lie.
    Q, K, V = cases.unit_rows(rng.standard_normal((3, 2**15, 4)))
    own, mine = piece({"Q": Q, "K": K, "V": V, "causal": True}, "empty last", same=False)
    O, certificate = ropecy.mpi.attention(COMM, **own, return_certificate=True)
    assert certificate.engine == "polynomial"
    for i in range(mine["Q"].start + 999, mine["Q"].stop, 1000):
        a = np.exp(K[: i + 1] @ Q[i] / 4)
        exact = a @ V[: i + 1] / a.sum()
        assert np.abs(O[i - mine["Q"].start] - exact).max() <= certificate.error * np.ptp(V[: i + 1], axis=0).max()


def test_polynomial_over_many_chunks():
    rng = np.random.default_rng(3)
    for dtype in (np.float64, np.float32):
        Q, K = (cases.unit_rows(rng.standard_normal((2, 1501, 5)).astype(dtype)) for _ in "QK")
        V = rng.standard_normal((2, 1501, 3)).astype(dtype)
        for causal in (False, True):
            case = {"Q": Q, "K": K, "V": V, "R": ropecy.Rotary(5, rotary_dim=4), "causal": causal}
            compare(case, "whole chunks", method="polynomial", threads=2)


def relative_cases(rng):
    """Biases and near fields that the polynomial engine does, each with whether its fit is exact."""
    slopes = np.array([2.0**-8, 0.3])
    for n, n_k, q_offset in ((500, 500, 0), (300, 450, 150), (230, 300, -20), (40, 300, 280)):
        Q, K = (rng.uniform(-1, 1, (2, m, 4)) for m in (n, n_k))
        case = {"Q": Q, "K": K + 1.0, "V": rng.standard_normal((2, n_k, 3)), "q_offset": q_offset}
        case["key_mask"] = rng.random(n_k) < 0.7
        for causal in (False, True):
            for bias, near in (
                (ropecy.RelativeBias.alibi(0.05), None),
                (ropecy.RelativeBias.alibi(slopes), None),
                (ropecy.RelativeBias.t5(rng.standard_normal((2, 16)), num_buckets=16, max_distance=60), None),
                (ropecy.RelativeBias(rng.standard_normal(101)), (70, 3.0)),
                (None, (40, 3.0)),
            ):
                yield {**case, "bias": bias, "near": near, "causal": causal}


def test_decayed_states():
    rng = np.random.default_rng(11)
    for i, case in enumerate(relative_cases(rng)):
        how = ("unequal", "empty first", "empty last")[i % 3]
        compare(case, how, same=i % 2 == 0, method="polynomial", eps=1e-12, threads=1)
    # Grouped heads with slopes of their own, which end the sharing of keys.
    Q, V = rng.uniform(-1, 1, (4, 250, 4)), rng.standard_normal((2, 250, 3))
    bias = ropecy.RelativeBias.alibi(np.array([0.01, 0.3, 0.1, 1.0]))
    for near in (None, (30, 2.0), (30, [2.0, 0.5, -1.0, 3.0])):
        case = {"Q": Q, "K": Q[:2], "V": V, "bias": bias, "near": near, "R": ropecy.Rotary(4)}
        compare({**case, "causal": near is None}, "unequal", method="polynomial", eps=1e-12)
    # Grouped heads that share one bias.
    for bias in (ropecy.RelativeBias.alibi(0.01), ropecy.RelativeBias(rng.standard_normal(41))):
        for key_heads in (1, 2):
            case = {"Q": Q, "K": Q[:key_heads], "V": V[:key_heads], "bias": bias, "causal": key_heads == 1}
            compare(case, "unequal", method="polynomial", eps=1e-12)


def test_decayed_states_over_many_chunks():
    rng = np.random.default_rng(12)
    n = 192 * 10  # chunks of one process and of whole ones are the same, from both ends
    for dtype in (np.float64, np.float32):
        for bias in (
            ropecy.RelativeBias.kerple(1.0, 0.1),
            ropecy.RelativeBias.alibi(2.0**-8),
            ropecy.RelativeBias.alibi(40.0),
        ):
            for causal in (False, True):
                Q, K = rng.uniform(-1, 1, (2, 1, n, 3)).astype(dtype)
                V = rng.standard_normal((1, n, 2)).astype(dtype)
                case = {"Q": Q, "K": K, "V": V, "bias": bias, "causal": causal}
                compare(case, "whole chunks", method="polynomial", eps=1e-2, threads=2)


def test_keys_hidden_over_pieces():
    X = np.ones((100, 4))
    options = {"causal": True, "bias": ropecy.RelativeBias.alibi(1.0), "method": "polynomial"}
    start = 100 * COMM.rank + np.arange(100)
    a = ropecy.mpi.attention
    if COMM.size > 1:
        # From the middle of one piece to the middle of the next: 60 / slope tokens are the most.
        hidden = (start >= 50) & (start < 150)
        raises(NotImplementedError, "fades away", a, X, X, X, key_mask=~hidden, **options)
        plan = ropecy.mpi.plan(COMM, X, X, X, key_mask=~hidden, **{**options, "method": "auto"})
        assert plan.engine == "exact"
    O = a(COMM, X, X, X, key_mask=(start < 50) | (start >= 105), **options)
    np.testing.assert_allclose(O, 1.0, rtol=0, atol=1e-12)
    raises(NotImplementedError, "fades away", a, X, X, X, q_offset=70, key_mask=start > 3, **options)
    raises(NotImplementedError, "a sequence in pieces", a, X, X, X, method="fft")


def dense(case):
    """O, lse and the range of V that each row sees, without a bias."""
    Q, K, V = (case[name].astype(np.float64) for name in "QKV")
    n, n_k = Q.shape[-2], K.shape[-2]
    seen = np.broadcast_to(case.get("key_mask", np.ones(n_k, bool)), (n, n_k))
    if case.get("causal"):
        seen = seen & (np.arange(n_k) <= np.arange(n)[:, None] + case.get("q_offset", 0))
    with np.errstate(divide="ignore", invalid="ignore"):
        A = np.where(seen, np.exp(Q @ K.swapaxes(-1, -2) / Q.shape[-1]), 0)
        D = A.sum(axis=-1)
        O = np.where(D[..., None] > 0, A @ V / D[..., None], 0)
        shown = seen[..., None] & np.ones(V.shape[:-2] + (1, 1, 1), bool)
        spread = [np.where(shown, V[..., None, :, :], end * np.inf) for end in (-1, 1)]
        return O, np.log(D), spread[0].max(axis=-2) - spread[1].min(axis=-2)


def judged_case(rng, causal, dtype=np.float64):
    """Rows that moments certify at a small degree, and some that they do not."""
    n = 700
    Q, K = (cases.unit_rows(rng.standard_normal((2, n, 16))) for _ in "QK")
    Q[..., ::173, :] *= 1.5
    V = rng.uniform(-1, 1, (2, n, 3)) + np.arange(n)[:, None] / 300
    case = {"Q": Q.astype(dtype), "K": K.astype(dtype), "V": V.astype(dtype), "causal": causal}
    return {**case, "key_mask": rng.random(n) < 0.8, "q_offset": 0 if causal else 5}


def within_certificate(case, how, same, rule, **options):
    """What a certificate says of a rank's rows holds, and is the same on all ranks; twice the same bits."""
    own, mine = piece(case, how, same)
    O, certificate, lse = (
        X for X in ropecy.mpi.attention(COMM, **own, **options, return_certificate=True, return_lse=True)
    )
    assert certificate.rule == rule, certificate
    expected, expected_lse, spread = (X[..., mine["Q"]] if X.ndim == 2 else X[..., mine["Q"], :] for X in dense(case))
    rows = certificate.rows_truncation
    assert rows.shape == O.shape[:-1]
    # Rounding is in units of the range over all keys.
    rounding = certificate.rounding * np.ptp(case["V"], axis=-2).max()
    allowed = rows[..., None] * np.where(np.isfinite(spread), spread, 0) + rounding
    assert np.all(np.abs(O - expected) <= allowed + 1e-14)
    assert np.all(np.abs(O - expected)[rows == 0] <= 1e-12 if O.dtype == np.float64 else 1e-5)
    np.testing.assert_allclose(lse, expected_lse, rtol=0, atol=0.2)
    everyone = COMM.allgather((certificate, rows.max(initial=0), np.count_nonzero(rows == 0)))
    assert all(other == certificate for other, _, _ in everyone)
    if rule != "sampled":
        assert certificate.truncation == max(largest for _, largest, _ in everyone)
    again = ropecy.mpi.attention(COMM, **own, **options)
    assert np.array_equal(again, O)
    return certificate, sum(exact for _, _, exact in everyone)


def test_moments_over_pieces():
    rng = np.random.default_rng(13)
    for causal in (False, True):
        for how, same in (("unequal", True), ("empty first", False), ("empty last", False)):
            case = judged_case(rng, causal)
            certificate, exact = within_certificate(
                case, how, same, "moments", method="polynomial", eps=3e-3, degree=3
            )
            assert certificate.n_exact_rows > 0
            # Rows of which no key is beyond their own chunk are exact too.
            assert exact >= certificate.n_exact_rows if causal else exact == certificate.n_exact_rows
    case = judged_case(rng, True, np.float32)
    within_certificate(case, "unequal", True, "moments", method="polynomial", eps=3e-3)


def test_gradients_by_moments():
    rng = np.random.default_rng(16)
    n = 192 * 10
    for causal in (False, True):
        Q, K = (cases.unit_rows(rng.standard_normal((2, n, 8))) for _ in "QK")
        Q[..., ::233, :] *= 1.5
        V, dO = rng.uniform(-1, 1, (2, 2, n, 3))
        case = {"Q": Q, "K": K, "V": V, "causal": causal, "key_mask": rng.random(n) < 0.9}
        own, mine = piece(case, "whole chunks")
        options = {"method": "polynomial", "eps": 4e-3}
        # A communicator of one has the whole, with the same plan.
        O, alone = ropecy.mpi.attention_vjp(MPI.COMM_SELF, **case, **options)
        expected, exact = alone(dO), ropecy.attention_vjp(**case, method="exact")[1](dO)
        got, vjp = ropecy.mpi.attention_vjp(COMM, **own, **options)
        found = vjp(dO[:, mine["Q"]])
        assert vjp.certificate.rule == "moments" and vjp.certificate.n_exact_rows > 0, vjp.certificate
        for ours, theirs in ((vjp.certificate, alone.certificate), (found.certificate, expected.certificate)):
            np.testing.assert_allclose(ours.truncation, theirs.truncation, rtol=1e-9)
            assert dataclasses.replace(ours, truncation=0.0) == dataclasses.replace(theirs, truncation=0.0)
            np.testing.assert_allclose(ours.rows_truncation, theirs.rows_truncation[:, mine["Q"]], rtol=1e-9)
        np.testing.assert_allclose(got, O[:, mine["Q"]], rtol=0, atol=1e-12)
        for name, rows in (("dQ", "Q"), ("dK", "K"), ("dV", "K")):
            X, truth = getattr(found, name), getattr(exact, name)[:, mine[rows]]
            np.testing.assert_allclose(X, getattr(expected, name)[:, mine[rows]], rtol=0, atol=1e-11)
            assert np.linalg.norm(X - truth) <= 2e-2 * np.linalg.norm(truth), name


def test_moments_that_fail_leave_it_to_the_fallback():
    choose, options = evaluation.choose_and_warn, {"method": "polynomial", "eps": 3e-3}
    case = judged_case(np.random.default_rng(14), True)
    fallback = None

    def none_exact(context):
        choice = choose(context)
        executable = dataclasses.replace(choice.executable, n_exact_rows=0)
        if fallback == "exact":
            executable = dataclasses.replace(executable, fallback=choice.search.exact.executable)
        choice.candidate = dataclasses.replace(choice.candidate, executable=executable)
        return choice

    evaluation.choose_and_warn = none_exact
    try:
        for fallback in ("worst case", "exact"):
            for how, same in (("unequal", True), ("empty last", False)):
                within_certificate(case, how, same, fallback, **options)
        own, _ = piece(case, "unequal", same=False)
        fallback = None
        a = ropecy.mpi.attention
        raises(ropecy.BoundedEntryError, "of 1,400 rows, past the 0 planned", a, **own, **options, degree=3)
    finally:
        evaluation.choose_and_warn = choose


def test_samples_over_pieces():
    rng = np.random.default_rng(15)
    options = {"method": "polynomial", "certify": "sample", "eps": 1e-2, "seed": 5, "degree": 2}
    for causal in (False, True):
        case = judged_case(rng, causal)
        for how, same in (("unequal", True), ("empty first", False), ("empty last", False)):
            certificate, _ = within_certificate(case, how, same, "sampled", **options)
            assert (certificate.degree, certificate.n_sampled) == (2, 96)
    own, _ = piece(case, "unequal")
    raises(ropecy.BoundedEntryError, "sampled rows", ropecy.mpi.attention, **own, **{**options, "eps": 1e-5})
    # The rows drawn are those that one process would draw.
    risk = rng.permutation(1000).astype(float).reshape(2, 1, 500)
    for count in (1, 60, 499, 600):
        alone = draw(risk, count, [np.random.default_rng(slot) for slot in range(2)])
        first, last = cuts(500, "unequal")[COMM.rank :][:2]
        draws = [np.random.default_rng(slot) for slot in range(2)]
        own = draw(risk[..., first:last], count, draws, MPICommunicator(COMM))
        found = np.concatenate(COMM.allgather(own), axis=2)
        assert np.array_equal(found, alone)
        assert np.all(found.sum(axis=2) == min(count, 500))
        half = min(count, 500) // 2
        largest = np.argsort(-risk, axis=2)[..., : half if count < 500 else 500]
        assert np.take_along_axis(found, largest, 2).all()


def counted(function):
    """What MPICommunicator counts of the bytes that this rank sends in function(), and messages of the ring."""
    made, messages = [], []
    new, start = MPICommunicator.__init__, MPICommunicator._start

    def kept(self, comm):
        new(self, comm)
        made.append(self)

    def counting(self, arrays, *places):
        messages.extend(arrays)
        return start(self, arrays, *places)

    MPICommunicator.__init__, MPICommunicator._start = kept, counting
    try:
        function()
    finally:
        MPICommunicator.__init__, MPICommunicator._start = new, start
    return sum(ranks.sent for ranks in made), len(messages)


def unlike_heads(rng, n=1600):
    """Heads whose scores are small but for one, which a polynomial does not serve."""
    Q, K = (cases.unit_rows(rng.standard_normal((2, n, 4))) for _ in "QK")
    Q, K = (np.concatenate([X, cases.unit_rows(rng.standard_normal((2, n, 4)))]) for X in (Q, K))
    Q[1] *= 40.0
    return {"Q": Q, "K": K, "V": rng.uniform(-1, 1, (4, n, 3))}


def test_heads_have_plans_of_their_own():
    rng = np.random.default_rng(23)
    slopes = np.array([0.02, 0.03, 0.05, 0.04])
    dO = rng.standard_normal((4, 1600, 3))
    near = {"causal": True, "near": (20, [0.5, 2.0, 1.0, -1.0])}
    for options in ({"causal": True}, {}, {"causal": True, "bias": ropecy.RelativeBias.alibi(slopes)}, near):
        case = {**unlike_heads(rng), **options}
        exact, alone = ropecy.attention(**case, method="exact"), ropecy.attention_vjp(**case)[1]
        expected = ropecy.attention_vjp(**case, method="exact")[1](dO)
        assert alone.certificate.engine == "mixed"
        for how, same in (("unequal", True), ("empty first", False)):
            own, mine = piece(case, how, same)
            O, certificate = ropecy.mpi.attention(COMM, **own, return_certificate=True)
            assert certificate.engine == "mixed"
            assert [heads for heads, _ in certificate.parts] == [((0,), (2,), (3,)), ((1,),)]
            assert np.all(np.abs(O - exact[:, mine["Q"]]) <= 2 * certificate.error)
            np.testing.assert_allclose(O[1], exact[1][mine["Q"]], rtol=0, atol=1e-12)
            _, vjp = ropecy.mpi.attention_vjp(COMM, **own)
            g = vjp(dO[:, mine["Q"]])
            assert vjp.certificate.engine == "mixed"
            for name, rows in (("dQ", "Q"), ("dK", "K"), ("dV", "K")):
                found, truth = getattr(g, name), getattr(expected, name)[:, mine[rows]]
                assert np.linalg.norm(found - truth) <= 2e-2 * np.linalg.norm(truth) + 1e-12, name
            if "bias" in case:
                np.testing.assert_allclose(g.dbias, expected.dbias, rtol=2e-2)
            if "near" in case:
                np.testing.assert_allclose(g.dscale_near, expected.dscale_near, rtol=2e-2)
    case = {**unlike_heads(rng), "causal": True}
    for plan, _ in check_exchange(case, "unequal"):
        assert plan.engine == "mixed"


def test_gradients_of_queries_and_keys_of_unlike_sizes():
    rng = np.random.default_rng(3)
    Q, K, V, dO = rng.uniform(-1, 1, (4, 2, 90, 3))
    W_Q, by = rng.uniform(-1, 1, (3, 3)), np.array([1e25, 1e-5])[:, None, None]
    case = {"Q": Q * by, "K": K / by * 1e-12, "V": V, "W_Q": W_Q * 1e12}
    # Of the pieces, one has the queries that are the largest by far.
    case["Q"][:, 40:] *= 1e-3
    case, dO = {name: X.astype(np.float32) for name, X in case.items()}, dO.astype(np.float32)
    for method in ("exact", "polynomial"):
        alone = ropecy.attention_vjp(**case, method=method, eps=1e-2)[1](dO)
        for how in ("unequal", "empty first"):
            own, mine = piece(case, how)
            g = ropecy.mpi.attention_vjp(COMM, **own, method=method, eps=1e-2)[1](dO[:, mine["Q"]])
            for name in ("dQ", "dK", "dV", "dW_Q"):
                found, expected = getattr(g, name), getattr(alone, name)
                expected = expected if name == "dW_Q" else expected[:, mine["Q" if name == "dQ" else "K"]]
                size = np.abs(getattr(alone, name)).max(axis=(-2, -1), keepdims=True)
                assert np.all(np.abs(found - expected) <= 1e-4 * size), (name, method)


def check_exchange(case, how, same=True, grads=(False, True), **options):
    """The bytes that a plan says against those counted, forward and gradient; all ranks have the same plan."""
    own, _ = piece(case, how, same)
    network = ropecy.mpi.Network(1e-6, 1e9)

    def gradient():
        O, vjp = ropecy.mpi.attention_vjp(COMM, **own, **options)
        vjp(np.ones_like(O))

    calls = {
        False: lambda: ropecy.mpi.attention(COMM, **own, **options),
        True: gradient,
    }
    for grad in grads:
        plan = ropecy.plan(**own, **options, grad=grad, comm=COMM, network=network)
        sent, messages = counted(calls[grad])
        assert plan.exchange.own.sent == sent, (plan.exchange, sent)
        everyone = COMM.allgather(plan.exchange.own)
        assert sum(t.sent for t in everyone) == sum(t.received for t in everyone)
        worst = plan.exchange.worst
        for name in ("sent", "received", "messages"):
            assert getattr(worst, name) == max(getattr(t, name) for t in everyone)
        seconds = 1e-6 * worst.messages + 1e-9 * max(worst.sent, worst.received)
        np.testing.assert_allclose(plan.exchange.seconds, seconds)
        same_everywhere = (plan.engine, plan.certificate, plan.gradient_certificate, plan.seconds, plan.bytes, worst)
        assert all(other == same_everywhere for other in COMM.allgather(same_everywhere))
        assert f"{COMM.size} ranks; this one sends {sent:,} bytes" in str(plan)
        yield plan, messages


def test_plan_says_what_is_sent():
    rng = np.random.default_rng(9)
    for i, name in enumerate(cases.SPECS):
        case = ours(cases.make(name, np.random.default_rng(7)))
        how = ("unequal", "empty last")[i % 2]
        plans = list(check_exchange(case, how, same=how == "unequal", method="exact", threads=1))
        for grad, (plan, messages) in enumerate(plans):
            problem = inside.problem_for(**case)
            others = traffic.bounds(problem, COMM.size)
            shared = [case.get(X) for X in ("W", "W_Q", "W_K", "W_V", "bias", "near")]
            if grad:
                others += traffic.maxima(16 * problem.sizes.H, COMM.size) + traffic.maxima(8, COMM.size)
                for _ in range(sum(X is not None for X in shared)):
                    others += traffic.totals(1, COMM.size)
            assert plan.engine == "exact"
            assert plan.exchange.own.messages == others.messages + messages
    Q, K, V = cases.unit_rows(rng.standard_normal((3, 600, 5)))
    W = 0.5 * np.eye(5)
    for causal in (False, True):
        for how, same in (("unequal", True), ("empty last", False)):
            case = {"Q": Q, "K": K, "V": V[:, :3], "W": W, "causal": causal}
            for plan, _ in check_exchange(case, how, same, method="polynomial"):
                assert plan.engine == "polynomial"
    for i, case in list(enumerate(relative_cases(rng)))[::3]:
        for plan, _ in check_exchange(case, ("unequal", "empty last")[i % 2], i % 4 > 1, method="polynomial", eps=1e-2):
            assert plan.engine == "polynomial"
    for causal in (False, True):
        case = judged_case(rng, causal)
        case["Q"] = cases.unit_rows(case["Q"])
        for certify, rule in (("proof", "moments"), ("sample", "sampled")):
            for how, same in (("unequal", True), ("empty last", False)):
                options = {"method": "polynomial", "eps": 2.4e-3, "certify": certify, "seed": 1}
                options["degree"] = 2 if certify == "sample" else None
                for plan, _ in check_exchange(case, how, same, grads=(False,), **options):
                    assert plan.certificate.rule == rule
    # Nothing but the state, whatever n is: two exchanges of its parts, and what bounds take.
    sent = []
    for n in (1000, 4000):
        Q, K, V = cases.unit_rows(rng.standard_normal((3, n, 5)))
        own, _ = piece({"Q": Q, "K": K, "V": V, "causal": True}, "unequal")
        plan = ropecy.mpi.plan(COMM, **own, method="polynomial", degree=3, eps=1e-2)
        sent.append(plan.exchange.own.sent)
        state = math.comb(8, 3) * 6 * 8
        assert 2 * state * (COMM.size - 1) / COMM.size <= sent[-1] <= (2 * state + 1000) * (COMM.size - 1)
    assert sent[0] == sent[1]


def test_plan_without_values_and_of_nothing():
    X = np.ones((5, 4))
    plan = ropecy.mpi.plan(COMM, X, X, ropecy.Rotary(4), causal=True)
    sizes = f"forward: 1 x {5 * COMM.size} queries, 1 x {5 * COMM.size} keys, d = 4"
    assert str(plan).startswith(sizes)
    network = plan.exchange.network
    assert network == ropecy.mpi.plan(COMM, X, X).exchange.network, "measured twice"
    assert all(other == network for other in COMM.allgather(network))
    assert network.latency < 1 and network.bandwidth > 1e5
    plan = ropecy.mpi.plan(COMM, X[:0], X, X, grad=True, network=ropecy.mpi.Network(1.0, 1.0))
    assert plan.engine == "exact"
    assert plan.exchange.own.sent == 8 * (COMM.size > 1)


def test_loss():
    rng = np.random.default_rng(5)
    A = cases.unit_rows(rng.standard_normal((2, 90, 4)))
    case = {"Q": A, "K": A, "V": A, "E": rng.standard_normal((2, 90, 4)), "R": ropecy.Rotary(4), "W": 0.5 * np.eye(4)}
    for method in ("exact", "polynomial"):
        want = ropecy.loss_grad(**case, method=method, causal=True, eps=1e-12)
        own, mine = piece(case, "unequal")
        g = ropecy.mpi.loss_grad(COMM, **own, method=method, causal=True, eps=1e-12)
        np.testing.assert_allclose(g.loss, want.loss, rtol=1e-12)
        np.testing.assert_allclose(g.dW, want.dW, rtol=0, atol=1e-11)
        np.testing.assert_allclose(g.O, want.O[..., mine["Q"], :], rtol=0, atol=1e-12)
        np.testing.assert_allclose(g.dV, want.dV[..., mine["K"], :], rtol=0, atol=1e-11)
        bits = COMM.allgather(g.dW.tobytes())
        assert len(set(bits)) == 1


def test_large_scores_and_half_precision():
    rng = np.random.default_rng(6)
    Q, K, V = rng.standard_normal((3, 70, 4)) * 30
    compare({"Q": Q, "K": K, "V": V, "scale": 5.0, "causal": True}, "unequal", method="exact")
    Q, K, V = rng.standard_normal((3, 70, 4)).astype(np.float16)
    own, mine = piece({"Q": Q, "K": K, "V": V}, "unequal")
    O = ropecy.mpi.attention(COMM, **own, method="exact")
    assert O.dtype == np.float16
    np.testing.assert_allclose(O, ropecy.attention(Q, K, V)[mine["Q"]], rtol=0, atol=2e-3)


def test_positions_scale_with_the_longest():
    scaling = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 16}
    rng = np.random.default_rng(8)
    Q, K, V = rng.standard_normal((3, 60, 4))
    compare({"Q": Q, "K": K, "V": V, "R": ropecy.Rotary(4, scaling=scaling)}, "unequal", method="exact")


def packed_cases(rng):
    """Cases of packed sequences, some of them empty, and of some sequences rows or keys alone."""
    rows, keys = np.array([30, 0, 41, 5, 1, 64, 7, 12, 0]), np.array([30, 9, 41, 5, 1, 70, 7, 0, 0])
    n, n_k = rows.sum(), keys.sum()
    Q, K, V = (rng.standard_normal((h, m, 4)) / 2 for h, m in ((4, n), (2, n_k), (2, n_k)))
    plain = {"Q": Q, "K": K, "V": V, "lengths": (rows, keys), "scale": 0.5}
    scaling = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 16}
    for more in (
        {},
        {"causal": True, "R": ropecy.Rotary(4, scaling=scaling), "q_offset": keys - rows},
        {"window": (5, 2), "key_mask": rng.random(n_k) < 0.7},
        {"causal": True, "bias": ropecy.RelativeBias.alibi(np.array([0.1, 0.2, 0.3, 1.0])), "q_offset": 2},
        {
            "near": (4, [1.5, 0.5, -1.0, 2.0]),
            "causal": True,
            "W": rng.standard_normal((4, 4)) / 2,
            "W_V": rng.standard_normal((4, 3)),
        },
    ):
        yield {**plain, **more}


def test_packed_sequences():
    rng = np.random.default_rng(31)
    for i, case in enumerate(packed_cases(rng)):
        how, same = (("unequal", False), ("unequal", True), ("empty first", False), ("empty last", True))[i % 4]
        compare(case, how, same=same, method="exact", threads=1 + i % 2)
    Q, K, V = rng.uniform(-1, 1, (3, 2, 500, 3))
    for lengths in ([200, 0, 300], [100] * 5):
        case = {"Q": Q, "K": K, "V": V, "lengths": lengths, "bias": ropecy.RelativeBias.alibi(0.02)}
        compare(case, "unequal", method="polynomial", eps=1e-12, threads=1)
    # Many short ones, of which each border cuts one.
    lengths = rng.integers(0, 9, 400)
    Q, K, V = rng.standard_normal((3, lengths.sum(), 4)).astype(np.float32)
    compare({"Q": Q, "K": K, "V": V, "lengths": lengths, "causal": True}, "unequal", method="exact")
    own, mine = piece({"Q": Q, "K": K, "V": V, "E": V}, "unequal")
    found = ropecy.mpi.loss_grad(COMM, **own, lengths=lengths)
    expected = ropecy.loss_grad(Q, K, V, V, lengths=lengths)
    np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-5)
    np.testing.assert_allclose(found.dQ, expected.dQ[mine["Q"]], atol=1e-5)
    half, mine = piece({name: X.astype(np.float16) for name, X in zip("QKV", (Q, K, V), strict=True)}, "unequal")
    O, certificate = ropecy.mpi.attention(COMM, **half, lengths=lengths, return_certificate=True)
    assert O.dtype == np.float16 and 0 < certificate.storing < certificate.rounding
    assert certificate.parts == ()
    np.testing.assert_allclose(O, ropecy.attention(Q, K, V, lengths=lengths)[mine["Q"]], rtol=0, atol=4e-3)


def test_packed_sequences_are_promised_what_each_is():
    rng = np.random.default_rng(32)
    lengths = [1500, 20, 1600, 1700, 10]
    Q, K = (cases.unit_rows(rng.standard_normal((2, sum(lengths), 4))) for _ in "QK")
    Q[1, 1520:3120] *= 60.0
    case = {"Q": Q, "K": K, "V": rng.uniform(-1, 1, (2, sum(lengths), 3))}
    own, mine = piece(case, "unequal")
    O, vjp = ropecy.mpi.attention_vjp(COMM, **own, lengths=lengths)
    exact, of_exact = ropecy.attention_vjp(**case, lengths=lengths, method="exact")
    certificate, dO = vjp.certificate, rng.standard_normal(exact.shape)
    assert certificate.engine == "mixed" and certificate.packed
    parts = {part.engine: slots for slots, part in certificate.parts}
    assert {(1, 2), (0, 1), (1, 4)} <= set(parts["exact"])
    assert (0, 0) in parts["polynomial"]
    every = sorted(slot for slots, _ in certificate.parts for slot in slots)
    assert every == [(head, j) for head in range(2) for j in range(5)]
    assert np.all(np.abs(O - exact[:, mine["Q"]]) <= 2 * certificate.rows_truncation[..., None] + 1e-9)
    found = vjp(dO[:, mine["Q"]])
    assert COMM.allgather(certificate) == [certificate] * COMM.size
    assert np.linalg.norm(found.dQ - of_exact(dO).dQ[:, mine["Q"]]) <= 0.05 * np.linalg.norm(of_exact(dO).dQ)
    made, (_, promised) = (
        door(COMM, **own, lengths=lengths, **more)
        for door, more in ((ropecy.mpi.plan, {}), (ropecy.mpi.attention, {"return_certificate": True}))
    )
    assert made.certificate.parts == promised.parts
    assert made.engine == "mixed" and made.seconds["mixed"] > 0
    ends = np.cumsum(lengths)
    cut = {j for at in cuts(sum(lengths), "unequal")[1:-1] for j in range(5) if ends[j] - lengths[j] < at < ends[j]}
    assert f"5 packed sequences, {len(cut)} of them cut between ranks" in str(made)
    for grad in (False, True):
        made = ropecy.mpi.plan(COMM, **own, lengths=lengths, method="exact", grad=grad)
        options = {"lengths": lengths, "method": "exact"}

        def call(grad=grad, options=options):
            O, vjp = ropecy.mpi.attention_vjp(COMM, **own, **options) if grad else (None, None)
            return vjp(O) if grad else ropecy.mpi.attention(COMM, **own, **options)

        assert made.exchange.own.sent == counted(call)[0]
        assert (made.gradient_certificate is None) == (not grad)


def bad_lengths_raise():
    X, a, last = np.ones((5, 4)), ropecy.mpi.attention, COMM.size - 1
    n = 5 * COMM.size
    raises(ValueError, f"rank 0: lengths: got 2 that add up to {n + 1}", a, X, X, X, lengths=[n, 1])
    raises(ValueError, "rank 0: lengths: got -1", a, X, X, X, lengths=[n + 1, -1])
    raises(ValueError, "rank 0: q_offset: got 2 numbers", a, X, X, X, lengths=[n], q_offset=[1, 2])
    K = np.eye(5, 4)
    raises(ropecy.BoundedEntryError, "bounded by B = ", a, X, K, X, lengths=[n], scale=1e3, method="polynomial")
    if COMM.size > 1:
        # On one rank alone, where the sequence lies.
        sharp, each = K * (1e3 if COMM.rank == last else 1.0), [5] * COMM.size
        raises(ropecy.BoundedEntryError, f"rank {last}: scores", a, X, sharp, X, lengths=each, method="polynomial")
        other = [n] if COMM.rank == last else [n - 1, 1]
        raises(ValueError, f"rank {last}: lengths: got an array", a, X, X, X, lengths=other)
        none = None if COMM.rank == last else [n]
        raises(ValueError, f"rank {last}: lengths: got False, wants True", a, X, X, X, lengths=none)


def test_bad_input_raises_on_every_rank():
    bad_lengths_raise()
    last = COMM.size - 1
    X = np.ones((5, 4))
    bad = X.copy()
    if COMM.rank == last:
        bad[3, 0] = np.nan
    a = ropecy.mpi.attention
    raises(ValueError, f"rank {last}: K: got NaN at index (3, 0)", a, X, bad, X)
    raises(ValueError, f"rank {last}: E: got NaN", ropecy.mpi.loss_grad, X, X, X, bad)
    raises(ValueError, f"rank {last}: dO: got NaN", lambda comm: ropecy.mpi.attention_vjp(comm, X, X, X)[1](bad))
    raises(TypeError, "rank 0: attention() got an unexpected keyword argument 'W_X'", a, X, X, X, W_X=1)
    raises(ropecy.BoundedEntryError, "bounded by B = ", a, X, np.eye(5, 4), X, scale=1000.0, method="polynomial")
    family = ropecy.RelativeFamily(np.zeros((9, 4, 4)))
    raises(NotImplementedError, "rank 0: R: got a RelativeFamily", a, X, X, X, family)
    plan = ropecy.mpi.plan
    raises(ValueError, f"rank {last}: K: got NaN at index (3, 0)", plan, X, bad, X)
    raises(TypeError, "rank 0: plan() got an unexpected keyword argument 'W_X'", plan, X, X, X, W_X=1)
    raises(TypeError, "rank 0: grad: got", plan, X, X, X, grad=1)
    raises(TypeError, "rank 0: network: got float, wants a ropecy.mpi.Network", plan, X, X, X, network=1e9)
    raises(ropecy.BoundedEntryError, "bounded by B = ", plan, X, np.eye(5, 4), X, scale=1000.0, method="polynomial")
    raises(ValueError, "latency: got -1, wants seconds", lambda comm: ropecy.mpi.Network(-1, 1))
    raises(ValueError, "bandwidth: got 0, wants bytes a second", lambda comm: ropecy.mpi.Network(1, 0))
    if COMM.size > 1:
        mine = COMM.rank == last
        odd = np.ones((5, 3 if mine else 4))
        raises(ValueError, f"rank {last}: d: got 3, wants 4 as rank 0 has", a, odd, odd, X)
        other = X.astype(np.float32 if mine else np.float64)
        raises(ValueError, f"rank {last}: dtype: got float32", a, other, other, other)
        raises(ValueError, f"rank {last}: eps", a, X, X, X, eps=0.1 if mine else 0.2)
        raises(ValueError, f"rank {last}: causal", a, X, X, X, causal=mine)
        heads, near = np.ones((2, 5, 4)), (2, [1.0, 2.0 + mine])
        raises(ValueError, f"rank {last}: near: got (2, (1.0, 3.0)), wants (2, (1.0, 2.0))", a, *[heads] * 3, near=near)
        raises(ValueError, f"rank {last}: key_mask", a, X, X, X, key_mask=np.arange(5) < 3 if mine else None)
        raises(ValueError, f"rank {last}: W: got an array (4, 4)", a, X, X, X, W=np.eye(4) * (1 + mine))
        other = ropecy.mpi.attention_vjp if mine else a
        raises(ValueError, f"rank {last}: function", other, X, X, X)
        raises(ValueError, f"rank {last}: return_lse: got True, wants False", a, X, X, X, return_lse=mine)
        raises(ValueError, f"rank {last}: grad: got True, wants False", plan, X, X, X, grad=mine)
        raises(ValueError, f"rank {last}: arrays: got Q, K, wants Q, K, V", plan, X, X, None if mine else X)
        network = ropecy.mpi.Network(1e-6, 1e9 + mine)
        raises(ValueError, f"rank {last}: network: got Network(", plan, X, X, X, network=network)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        globals()[name]()
        if COMM.rank == 0:
            print(name, "passed", flush=True)
