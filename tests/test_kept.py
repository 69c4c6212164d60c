"""Results that are kept from call to call: the latest, and no more entries than is said for all of them together."""

from itertools import count

import pytest

from ropecy.approximation.minimax import n_features
from ropecy.engines.fft import family, shared
from ropecy.engines.kept import kept_below
from ropecy.engines.polynomial import features


def diagonal(d):
    """The arguments of a family's `_pairs` for the support (0, 0), ..., (d - 1, d - 1)."""
    return tuple((a, a) for a in range(d)), tuple(range(d))


# A function whose results are kept; arguments that give large results; how many entries these have; most that is kept.
KEPT = {
    "pairs of monomials": (
        shared._pairs,
        [(30, 3), (14, 4), (28, 3), (10, 5), (16, 4)],
        lambda d, degree: n_features(d, degree) * (degree + 2),
        2**16,
    ),
    "pairs of a family": (
        family._pairs,
        [(*diagonal(d), degree, False) for d, degree in [(60, 3), (44, 3), (24, 4)]],
        lambda support, entries, degree, beside: n_features(len(support), degree),
        2**16,
    ),
    "layout of a state": (
        features._layout,
        [(d, degree, 8) for d, degree in [(24, 6), (150, 3), (160, 3), (140, 3)]],
        lambda d, degree, lanes: n_features(d, degree),
        2**20,
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_is_kept_is_bounded_in_all(name):
    function, calls, entries, most = KEPT[name]
    results = [function(*call) for call in calls]
    kept = 0
    for call, result in zip(reversed(calls), reversed(results), strict=True):
        if function(*call) is not result:
            break
        kept += entries(*call)
    assert 0 < kept <= most < sum(entries(*call) for call in calls)


def counted(size, **options):
    """A function whose result tells how many calls were made before; it is kept."""
    calls = count()
    return kept_below(size, **options)(lambda *arguments: (next(calls), arguments))


def test_the_latest_results_are_kept():
    f = counted(lambda size: size, most=100)
    assert f(40)[0] == f(40)[0] == 0
    assert f(60)[0] == 1
    assert f(40)[0] == 0  # both fit
    assert f(30)[0] == 2  # 60 has to go: it was asked for before 40
    assert f(40)[0] == 0 and f(60)[0] == 3


def test_what_is_too_large_is_not_kept_and_nothing_goes_for_it():
    f = counted(lambda size: size, most=100)
    assert f(10)[0] == 0
    assert f(101)[0] == 1 and f(101)[0] == 2
    assert f(10)[0] == 0


def test_small_results_are_few():
    f = counted(lambda which: 1)
    for which in range(17):
        f(which)
    assert f(16)[0] == 16 and f(0)[0] == 17
