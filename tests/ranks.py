"""What tests/test_mpi.py runs under mpiexec: each function below is a test that all ranks run together."""

import sys
import time

import cases
import numpy as np
from conftest import relative_bias, rotary
from mpi4py import MPI
from oracle import Rope

import ropecy
import ropecy.mpi

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
                compare(case, how, method="polynomial", threads=1)
            elif case["Q"].shape[-1] <= 5:
                compare(case, how, method="polynomial", eps=1e-12, threads=1)


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


def test_bad_input_raises_on_every_rank():
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
    if COMM.size > 1:
        mine = COMM.rank == last
        odd = np.ones((5, 3 if mine else 4))
        raises(ValueError, f"rank {last}: d: got 3, wants 4 as rank 0 has", a, odd, odd, X)
        other = X.astype(np.float32 if mine else np.float64)
        raises(ValueError, f"rank {last}: dtype: got float32", a, other, other, other)
        raises(ValueError, f"rank {last}: eps", a, X, X, X, eps=0.1 if mine else 0.2)
        raises(ValueError, f"rank {last}: causal", a, X, X, X, causal=mine)
        raises(ValueError, f"rank {last}: key_mask", a, X, X, X, key_mask=np.arange(5) < 3 if mine else None)
        raises(ValueError, f"rank {last}: W: got an array (4, 4)", a, X, X, X, W=np.eye(4) * (1 + mine))
        other = ropecy.mpi.attention_vjp if mine else a
        raises(ValueError, f"rank {last}: function", other, X, X, X)


if __name__ == "__main__":
    globals()[sys.argv[1]]()
    if COMM.rank == 0:
        print("passed")
