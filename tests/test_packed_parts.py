"""What the certificates of packed sequences say of those that have plans of their own."""

import numpy as np
import oracle
import pytest

import ropecy

D = 4


def _case(rng, lengths, sharp=(), heads=2, dtype=np.float64):
    """Heads of sequences whose scores are within 0.5, but for those (head, sequence) that are `sharp`."""
    n, starts = sum(lengths), np.cumsum(lengths) - lengths
    Q, K = (X / np.linalg.norm(X, axis=-1, keepdims=True) for X in rng.standard_normal((2, heads, n, D)))
    Q = Q * 0.5
    for head, j in sharp:
        Q[head, starts[j] : starts[j] + lengths[j]] *= 400
    V = rng.uniform(-1, 1, (heads, n, D))
    return {"Q": Q.astype(dtype), "K": K.astype(dtype), "V": V.astype(dtype), "scale": 1.0}


def _slots(parts):
    return [slot for slots, _ in parts for slot in slots]


def _assert_within(O, case, lengths, certificate):
    """What each part promises holds in units of its own values."""
    starts = np.cumsum(lengths) - lengths
    for slots, part in certificate.parts:
        of_slots = [(head, slice(starts[j], starts[j] + lengths[j])) for head, j in slots]
        values = max(np.ptp(case["V"][slot].astype(float), axis=0).max() for slot in of_slots)
        for slot in of_slots:
            dense = oracle.attention(**{name: case[name][slot] for name in "QKV"}, scale=case["scale"])
            assert np.all(np.abs(O[slot] - dense.O) <= part.truncation * dense.value_range + part.rounding * values)


@pytest.mark.parametrize("dtype", [np.float64, np.float16])
def test_parts_are_the_heads_of_sequences_of_one_plan(dtype, rng):
    lengths = [1500, 20, 1600, 1500, 30]
    case = _case(rng, lengths, dtype=dtype)
    O, certificate = ropecy.attention(**case, lengths=lengths, return_certificate=True)
    assert certificate.packed
    (short, exact), (long, polynomial) = certificate.parts
    assert short == ((0, 1), (0, 4), (1, 1), (1, 4))
    assert long == ((0, 0), (0, 2), (0, 3), (1, 0), (1, 2), (1, 3))
    assert (exact.engine, polynomial.engine) == ("exact", "polynomial")
    assert certificate.truncation == polynomial.truncation > exact.truncation == 0
    assert (polynomial.storing > 0) == (dtype == np.float16)
    _assert_within(O, case, lengths, certificate)
    lines = str(certificate).splitlines()
    assert lines[1].startswith("  heads 0, 1 of sequences 1, 4: exact: error <= ")
    assert lines[2].startswith("  heads 0, 1 of sequences 0, 2, 3: polynomial, degree ")
    assert str(ropecy.plan(**case, lengths=lengths)).count(" of sequences ") == 2


def test_a_sharp_head_of_one_sequence_is_a_part_of_its_own(rng):
    lengths = [1500, 1500, 1700]
    case = _case(rng, lengths, sharp=[(1, 1)])
    O, vjp = ropecy.attention_vjp(**case, lengths=lengths)
    for certificate in (vjp.certificate, vjp(np.ones_like(O)).certificate):
        found = {part.engine: slots for slots, part in certificate.parts}
        assert found["exact"] == ((1, 1),)
        assert sorted(_slots(certificate.parts)) == [(h, j) for h in range(2) for j in range(3)]
    _assert_within(O, case, lengths, vjp.certificate)
    assert "  head 1 of sequence 1: exact" in str(vjp.certificate)
    assert "  5 heads of sequences 0, 1, 2: polynomial" in str(vjp.certificate)
    with pytest.raises(ropecy.BoundedEntryError, match=r"head 1 of sequence 1: scores are bounded by B = "):
        ropecy.attention(**case, lengths=lengths, method="polynomial")


def test_hundreds_of_shapes_are_told_in_a_few_lines(rng):
    lengths = [*range(1, 200), 2000, 2001]
    case = _case(rng, lengths, heads=1)
    _, certificate = ropecy.attention(**case, lengths=lengths, return_certificate=True)
    assert sorted(_slots(certificate.parts)) == [(0, j) for j in range(201)]
    lines = str(certificate).splitlines()
    assert len(lines) == 3
    assert lines[1].startswith("  199 sequences: exact")
    assert lines[2].startswith("  sequences 199, 200: polynomial")
    # All by one plan have no parts.
    _, certificate = ropecy.attention(
        **{name: case[name][:, :4] if name in "QKV" else case[name] for name in case}, lengths=[1, 3],
        return_certificate=True,
    )
    assert certificate.parts == ()
    assert not certificate.packed


def test_the_transposed_matrix_counts_sequences_from_the_same_end(rng):
    lengths = [1500, 20, 1600]
    case = _case(rng, lengths, heads=1)
    A = ropecy.AttentionMatrix(case["Q"], case["K"], scale=1.0, lengths=lengths)
    for M in (A, A.T):
        _, certificate = M.dot(case["V"], return_certificate=True)
        assert {part.engine: slots for slots, part in certificate.parts} == {
            "exact": ((0, 1),),
            "polynomial": ((0, 0), (0, 2)),
        }
