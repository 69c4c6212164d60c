"""`python -m ropecy demo`: what a newcomer runs first."""

import re
import subprocess
import sys

import numpy as np
import pytest

import ropecy
from ropecy.__main__ import main
from ropecy.cli import demo


def run(*options):
    return subprocess.run([sys.executable, "-m", "ropecy", "demo", *options], capture_output=True, text=True)


def losses(output):
    return [float(x) for x in re.fullmatch(r"loss (\S+) -> (\S+)", output.strip().splitlines()[-1]).groups()]


def test_ends_with_a_lower_loss():
    done = run("--n", "512", "--steps", "2")
    assert done.returncode == 0, done.stderr
    before, after = losses(done.stdout)
    assert after < before
    for part in ("text ", "scores ", "certified", "dL/dW_Q", "dL/dW_K", "dL/dW_V", "step    2/2"):
        assert part in done.stdout


def table(output):
    """{"L": (exact, error, certified), "dL/dW_Q": ...} of the check of the gradient."""
    lines = re.findall(r"^ +(L|dL/dW_[QKV]) +(\S+) +(\S+) +(\S+)$", output, re.MULTILINE)
    return {name: [float(x) for x in numbers] for name, *numbers in lines}


def test_polynomial_engine_within_what_is_certified(capsys, tmp_path):
    plot = tmp_path / "drawn.png"
    pytest.importorskip("matplotlib")
    main(["demo", "--n", "6000", "--steps", "2", "--plot", str(plot)])
    output = capsys.readouterr().out
    assert "-> polynomial" in output
    off, certified = re.search(r"off by (\S+), certified (\S+)", output).groups()
    assert float(off) <= float(certified)
    checked = table(output)
    assert len(checked) == 4
    for exact, error, certified in checked.values():
        assert 0 < error <= certified < exact
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_what_is_certified_of_projections_holds_whatever_the_weights_do():
    # Every entry of A is off by a factor of 1 - e or 1 + e, as bad as a polynomial of relative error e could make it.
    rng = np.random.default_rng(0)
    for e in (1e-3, 0.1):
        task = demo.Task.of(b"certified", 4, 1e-3, rng).part(8, np.float64)
        weights = {name: demo._rotation(4, rng).astype(np.float64) for name in ("W_Q", "W_K", "W_V")}
        exact = task.gradient(weights, "exact")
        fast = perturbed(task, weights, rng.choice([1 - e, 1 + e], (8, 8)))
        fast.certificate = ropecy.Certificate("polynomial", 1, 1, 1.0, "worst case", e, 0.0)
        promised = demo._promised(task, weights, fast)
        assert abs(fast.loss - exact.loss) <= promised["L"]
        for name in weights:
            assert np.linalg.norm(getattr(fast, "d" + name) - getattr(exact, "d" + name)) <= promised["dL/d" + name]


def perturbed(task, weights, factors):
    """Loss and gradients where every entry of A is multiplied by its factor."""
    Q, K, V = (task.A @ weights[name] for name in ("W_Q", "W_K", "W_V"))
    n, d = Q.shape
    R = np.array([[task.R[j - i] for j in range(n)] for i in range(n)])
    A = np.tril(np.exp(np.einsum("ia,ijab,jb->ij", Q, R, K) / d)) * factors
    P = A / A.sum(axis=1, keepdims=True)
    O = P @ V
    U = O - task.E
    dS = P * (U @ V.T - (U * O).sum(axis=1, keepdims=True)) / d
    dQ = np.einsum("ij,ijab,jb->ia", dS, R, K)
    dK = np.einsum("ij,ijab,ia->jb", dS, R, Q)
    gradients = {"dW_Q": task.A.T @ dQ, "dW_K": task.A.T @ dK, "dW_V": task.A.T @ (P.T @ U)}
    return type(task.gradient(weights, "exact"))(loss=0.5 * (U * U).sum(), O=O, **gradients)


def test_reads_any_file(tmp_path, capsys):
    file = tmp_path / "bytes"
    file.write_bytes(bytes(range(256)) * 2)
    main(["demo", "--file", str(file), "--d", "4", "--steps", "3", "--seed", "1"])
    output = capsys.readouterr().out
    assert "511 bytes" in output
    before, after = losses(output)
    assert after < before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--n", "1"], "--n: wants an integer of at least 2, got '1'"),
        (["--n", "many"], "--n: wants an integer of at least 2, got 'many'"),
        (["--n", "100000000"], "--n wants at most"),
        (["--d", "7"], "--d: wants an even integer of at least 2, got '7'"),
        (["--eps", "1"], "--eps: wants a number between 0 and 1, got '1'"),
        (["--eps", "nan"], "--eps: wants a number between 0 and 1, got 'nan'"),
        (["--steps", "0"], "--steps: wants an integer of at least 1, got '0'"),
        (["--seed", "-1"], "--seed: wants an integer of at least 0, got '-1'"),
        (["--file", "no/such/file"], "no/such/file"),
        (["--plot", "loss.pdf"], "--plot wants a name that ends in .png, got 'loss.pdf'"),
        (["--plot", "no/such/loss.png"], "--plot wants a file in a directory that exists"),
    ],
)
def test_bad_options(options, message, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["demo", *options])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_short_file(tmp_path, capsys):
    file = tmp_path / "short"
    file.write_bytes(b"ab")
    with pytest.raises(SystemExit):
        main(["demo", "--file", str(file)])
    assert "--file wants at least 3 bytes, got 2" in capsys.readouterr().err


def test_plot_without_matplotlib(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit):
        main(["demo", "--plot", "loss.png"])
    assert "--plot needs matplotlib: pip install" in capsys.readouterr().err
