"""`python -m ropecy map`: the regime by width and bound, and head by head of a file."""

import io
import json
import math
import re
import sys

import cases
import numpy as np
import pytest

import ropecy
from ropecy.__main__ import main
from ropecy.cli import files, regime_map


@pytest.fixture
def narrow(monkeypatch):
    monkeypatch.setattr(regime_map, "WIDTHS", (4, 16))


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
    found = by_cell(regime_map.cells(1e-3))
    assert set(found) == {(d, B) for d in (4, 16) for B in regime_map.BOUNDS}
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
    least = [found[16, B][0].pays_from for B in regime_map.BOUNDS[:6]]
    assert least == sorted(least)


def test_auto_takes_the_polynomial_from_there_on(narrow, rng):
    d, B, worst, _ = next(cell for cell in regime_map.cells(1e-3, causal=True, grad=True) if cell[:2] == (4, 1.0))
    for factor, engine in ((0.7, "exact"), (1.1, "polynomial")):
        n = math.ceil(factor * worst.pays_from)
        Q, K, V = (cases.unit_rows(x).astype(np.float32) for x in rng.standard_normal((3, n, d)))
        assert ropecy.plan(Q, K, V, causal=True, grad=True, scale=0.999 * B / d).engine == engine


def test_gradients_have_moments_too(narrow):
    forward, backward = (by_cell(regime_map.cells(1e-3, grad=grad)) for grad in (False, True))
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
    assert len(re.findall(r"^ +(4|16) +[\d.]+ ", output, re.MULTILINE)) == 2 * len(regime_map.BOUNDS)
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
    arrays = files.read_rows(file("npz"))
    arrays["Q"] *= np.float32([0.2, 0.5, 0.7, 1.0])[:, None, None]
    found = list(regime_map.heads(arrays, eps=1e-3, scale=0.2, causal=True, grad=False))
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
            next(regime_map.heads(files.read_rows(file(kind, **more)), eps=1e-2, scale=None, causal=False, grad=False))
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


def test_what_is_not_installed_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "ropecy with its extra [plot]" in refused(["--plot", tmp_path / "map.png"], capsys)


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_bfloat16_is_read(kind, tmp_path, rng):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    arrays = {name: rng.standard_normal((2, 30, 4)).astype(ml_dtypes.bfloat16) for name in ("Q", "K", "V")}
    path = tmp_path / f"rows.{kind}"
    if kind == "npz":
        np.savez(path, **arrays)
    else:
        pytest.importorskip("safetensors.numpy").save_file(arrays, path)
    for name, X in files.read_rows(path).items():
        assert X.dtype == np.float32
        np.testing.assert_array_equal(X, arrays[name].astype(np.float32))
    main(["map", str(path)])


def small_file(kind, rng):
    """The bytes of a file of one head, written here as the formats say."""
    arrays = {name: rng.standard_normal((20, 4)).astype(np.float32) for name in ("Q", "K")}
    if kind == "npz":
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        return buffer.getvalue()
    size = arrays["Q"].nbytes
    header = {
        name: {"dtype": "F32", "shape": [20, 4], "data_offsets": [place * size, (place + 1) * size]}
        for place, name in enumerate(arrays)
    }
    header = json.dumps(header | {"__metadata__": {"format": "np"}}).encode()
    return len(header).to_bytes(8, "little") + header + b"".join(X.tobytes() for X in arrays.values())


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_broken_files_are_refused_without_a_traceback(kind, rng, tmp_path, capsys):
    """Cut anywhere, or with bytes of the header changed: an answer, or status 2 and a line that names the file."""
    whole, path = small_file(kind, rng), tmp_path / f"rows.{kind}"
    path.write_bytes(whole)
    main(["map", str(path)])
    assert "of 1 heads are computed exactly" in capsys.readouterr().out
    broken = [whole[:size] for size in (0, 1, 7, 8, 9, 60, len(whole) // 2, len(whole) - 1)]
    for _ in range(150):
        changed = bytearray(whole)
        for place in rng.integers(0, 250, 2):
            changed[place] = rng.integers(256)
        broken.append(bytes(changed))
    n_refused = 0
    for data in broken:
        path.write_bytes(data)
        try:
            main(["map", str(path)])
        except SystemExit as exit:
            assert exit.code == 2
            n_refused += 1
            assert len(capsys.readouterr().err.splitlines()[-1]) > 40
    assert n_refused > 50


def test_files_of_another_kind(tmp_path, capsys, rng):
    path = tmp_path / "rows.npz"
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    assert "rows.npz can't be read as .npz: it holds one array without a name" in refused([path], capsys)
    header = json.dumps({"Q": {"dtype": "F8_E4M3", "shape": [1, 1], "data_offsets": [0, 1]}}).encode()
    path = tmp_path / "rows.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"0")
    assert "it holds F8_E4M3, and F64, F32, F16, BF16 are read" in refused([path], capsys)
    path.write_bytes((2**62).to_bytes(8, "little"))
    assert f"its header has {2**62} bytes of 0 that there are" in refused([path], capsys)


@pytest.mark.parametrize("shape", [(0, 4), (0, 5, 4)])
def test_no_tokens_and_no_heads(shape, tmp_path, capsys):
    path = tmp_path / "rows.npz"
    np.savez(path, Q=np.zeros(shape), K=np.zeros(shape))
    assert f"Q: got shape {shape}, wants at least one head of at least one token" in refused([path], capsys)


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("causal", [[], ["--causal"]])
def test_scores_past_all_numbers(causal, tmp_path, capsys, rng):
    path = tmp_path / "rows.npz"
    Q, K = 1e30 * rng.standard_normal((2, 40, 4)).astype(np.float32)
    np.savez(path, Q=Q, K=K)
    main(["map", str(path), *causal])
    assert re.search(r" inf +inf .* \| exact ", capsys.readouterr().out)
