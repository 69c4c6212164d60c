"""`python -m ropecy map`: the regime by width and bound, and head by head of a file."""

import math
import re
import sys

import cases
import numpy as np
import pytest

import ropecy
from ropecy import regime
from ropecy.__main__ import main


@pytest.fixture
def narrow(monkeypatch):
    monkeypatch.setattr(regime, "WIDTHS", (4, 16))


@pytest.fixture
def file(rng, tmp_path):
    """Two batch elements of four query heads on two key heads; the first in the regime, the second far from it."""
    arrays = {"Q": cases.unit_rows(rng.standard_normal((2, 4, 700, 8)))}
    arrays["K"] = cases.unit_rows(rng.standard_normal((2, 2, 700, 8)))
    arrays["Q"][1] *= 60
    arrays = {name: X.astype(np.float32) for name, X in arrays.items()}

    def write(kind, **others):
        path = tmp_path / f"rows.{kind}"
        if kind == "npz":
            np.savez(path, **arrays | others)
        else:
            pytest.importorskip("safetensors.numpy").save_file({**arrays, **others}, path)
        return path

    return write


def by_cell(found):
    return {(d, B): (worst, moments) for d, B, worst, moments in found}


def test_cells_are_what_plan_says(narrow, rng):
    found = by_cell(regime.cells(1e-3))
    assert set(found) == {(d, B) for d in (4, 16) for B in regime.BOUNDS}
    for d in (4, 16):
        Q, K = (cases.unit_rows(x).astype(np.float32) for x in rng.standard_normal((2, 1000, d)))
        for B in (0.25, 1.0, 2.0):
            worst, moments = found[d, B]
            plan = ropecy.plan(Q, K, scale=0.999 * B / d, method="polynomial")
            plan = next(a for a in plan.alternatives if a.name == "polynomial, worst case")
            assert (worst.degree, worst.n_features) == (plan.certificate.degree, plan.certificate.n_features)
            assert moments is None or moments.degree < worst.degree
        assert found[d, 8.0] == (None, None)  # rounding
    assert found[16, 1.0][1].degree == 3
    least = [found[16, B][0].pays_from for B in regime.BOUNDS[:6]]
    assert least == sorted(least)


def test_auto_takes_the_polynomial_from_there_on(narrow, rng):
    d, B, worst, _ = next(cell for cell in regime.cells(1e-3, causal=True, grad=True) if cell[:2] == (4, 1.0))
    for factor, engine in ((0.7, "exact"), (1.1, "polynomial")):
        n = math.ceil(factor * worst.pays_from)
        Q, K, V = (cases.unit_rows(x).astype(np.float32) for x in rng.standard_normal((3, n, d)))
        assert ropecy.plan(Q, K, V, causal=True, grad=True, scale=0.999 * B / d).engine == engine


def test_gradients_have_moments_too(narrow):
    forward, backward = (by_cell(regime.cells(1e-3, grad=grad)) for grad in (False, True))
    assert [worst and worst.degree for worst, _ in forward.values()] == [w and w.degree for w, _ in backward.values()]
    worst, moments = backward[16, 1.0]
    assert moments.degree <= worst.degree and moments.pays_from < worst.pays_from
    Q, K, V = (cases.unit_rows(x).astype(np.float32) for x in np.random.default_rng(0).standard_normal((3, 800, 16)))
    alternatives = ropecy.plan(Q, K, V, scale=0.999 / 16, grad=True).alternatives
    assert next(a for a in alternatives if a.name == "polynomial, worst case").pays_from == worst.pays_from


def test_table(narrow, capsys):
    main(["map", "--eps", "1e-2", "--causal"])
    output = capsys.readouterr().out
    assert output.startswith("float32, eps = 0.01, causal; n as predicted")
    assert len(re.findall(r"^ +(4|16) +[\d.]+ ", output, re.MULTILINE)) == 2 * len(regime.BOUNDS)
    assert re.search(r"^ +4 +0\.5 +2 +15 +[\d,]+ \| +- +- +-$", output, re.MULTILINE)
    assert "unless SETH fails" in output and "arXiv:2505.11892" in output


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_heads_of_a_file(kind, file, capsys):
    main(["map", str(file(kind)), "--eps", "1e-2"])
    output = capsys.readouterr().out
    rows = re.findall(r"^ +(\d),(\d) +(\S+) +(\S+) +(\S+) .* \| (exact|polynomial, \d) ", output, re.MULTILINE)
    assert [row[:2] for row in rows] == [(str(b), str(h)) for b in range(2) for h in range(4)]
    for batch, _, bound, spread, degree, engine in rows:
        assert float(bound) == pytest.approx(1.0 if batch == "0" else 60.0, rel=0.01)
        assert 0.3 < float(spread) / float(bound) < 0.45  # 1 / sqrt(d)
        assert (degree == "-") == (batch == "1")
        assert engine == "exact" or batch == "0"
    assert re.search(r"^\d of 8 heads are computed exactly$", output, re.MULTILINE)


def test_heads_are_what_plan_says_of_each(file):
    arrays = regime.read_rows(file("npz"))
    arrays["Q"] *= np.float32([0.2, 0.5, 0.7, 1.0])[:, None, None]
    found = list(regime.heads(arrays, eps=1e-3, scale=0.2, causal=True, grad=False))
    for head in found:
        b, h = head.index
        q, k = arrays["Q"][b, h], arrays["K"][b, h // 2]
        plan = ropecy.plan(q, k, k, scale=0.2, causal=True)
        longest = 0.2 * np.linalg.norm(q, axis=-1).max() * np.linalg.norm(k, axis=-1).max()
        assert head.n == 700 and 0.9 * longest < head.bound < 1.001 * longest
        assert head.seconds == plan.seconds[plan.engine]
        assert head.exact == plan.seconds["exact"]


def test_values_of_a_file_count(file, rng):
    V = rng.standard_normal((2, 2, 700, 24)).astype(np.float32)
    for kind in ("npz", "safetensors"):
        wide, narrow = (
            next(regime.heads(regime.read_rows(file(kind, **more)), eps=1e-2, scale=None, causal=False, grad=False))
            for more in ({"V": V}, {"unread": V})
        )
        assert wide.exact > narrow.exact


def test_picture(narrow, file, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for arguments in ([], [str(file("npz"))]):
        path = tmp_path / f"drawn{len(arguments)}.png"
        main(["map", *arguments, "--plot", str(path)])
        assert path.read_bytes().startswith(b"\x89PNG")
        assert capsys.readouterr().out.endswith(f"drawn to {path}\n")


def refused(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["map", *map(str, arguments)])
    assert exit.value.code == 2
    return capsys.readouterr().err


def test_bad_files(file, tmp_path, capsys, rng):
    path = tmp_path / "rows.npz"
    np.savez(path, Q=rng.standard_normal((5, 4)), other=np.ones(3))
    assert "wants arrays Q and K, (..., n, d), got ['Q', 'other']: no K" in refused([path], capsys)
    np.savez(path, Q=rng.standard_normal((5, 4)), K=rng.standard_normal((5, 3)))
    assert "K" in refused([path], capsys)
    assert "wants a file that ends in .npz or .safetensors, got 'rows.txt'" in refused(["rows.txt"], capsys)
    assert "missing.npz" in refused([tmp_path / "missing.npz"], capsys)
    assert "--scale: wants a positive number" in refused([path, "--scale", "0"], capsys)
    assert "wants a name that ends in .png" in refused(["--plot", tmp_path / "map.jpg"], capsys)


def test_what_is_not_installed_is_named(file, tmp_path, capsys, monkeypatch):
    path = tmp_path / "rows.safetensors"
    path.write_bytes(b"")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert "pip install safetensors, or ropecy with its extra [safetensors]" in refused([path], capsys)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "ropecy with its extra [plot]" in refused(["--plot", tmp_path / "map.png"], capsys)
