"""What a type checker sees of the package: the types of results, and misspelt names."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ropecy
from ropecy import options

PROGRAM = """\
import numpy as np
import ropecy

Q = np.zeros((5, 4))
flag = bool(Q.any())
reveal_type(ropecy.attention(Q, Q, Q, causal=True))  # ndarray
reveal_type(ropecy.attention(Q, Q, Q, return_certificate=True))  # tuple[ndarray, Certificate]
reveal_type(ropecy.attention(Q, Q, Q, None, return_lse=True))  # tuple[ndarray, ndarray]
reveal_type(ropecy.attention(Q, Q, Q, return_certificate=True, return_lse=True))  # tuple[ndarray, Certificate, ndarray]
reveal_type(ropecy.attention(Q, Q, Q, return_lse=flag))  # ndarray | tuple[Any, ...]
O, vjp = ropecy.attention_vjp(Q, Q, Q, near=(2, 1.0))
reveal_type(O)  # ndarray
reveal_type(vjp)  # VJP
g = vjp(O)
reveal_type(g)  # Gradients
reveal_type(g.dQ)  # ndarray
reveal_type(g.dW_K)  # ndarray
reveal_type(g.dbias)  # ndarray
reveal_type(g.dscale_near)  # float | Any
reveal_type(g.certificate.error)  # float
L = ropecy.loss_grad(Q, Q, Q, Q, W=np.eye(4))
reveal_type(L)  # LossGradients
reveal_type(L.loss)  # float
reveal_type(L.O)  # ndarray
reveal_type(L.dW)  # ndarray
A = ropecy.AttentionMatrix(Q, Q, causal=True)
reveal_type(A @ Q)  # ndarray
reveal_type(Q @ A.T)  # ndarray
reveal_type((2 * A).add_diagonal(0.5))  # AffineMatrix
reveal_type(A.dot(Q))  # ndarray
reveal_type(A.dot(Q, return_certificate=True))  # tuple[ndarray, Certificate]
reveal_type(ropecy.plan(Q, Q, grad=True).alternatives[0].seconds)  # float
reveal_type(ropecy.check(O, Q, Q, Q, seed=1).error)  # float
reveal_type(ropecy.DecodeState(4, 4).step(Q[0], Q[0], Q[0]))  # ndarray
ropecy.attention(Q, Q, Q, casual=True)  # error: call-overload
ropecy.attention_vjp(Q, Q, Q, casual=True)  # error: call-arg
ropecy.attention_vjp(Q, Q, Q, q_offset="end")  # error: arg-type
ropecy.loss(Q, Q, Q, Q, metod="exact")  # error: call-arg
ropecy.loss_grad(Q, Q, Q, Q, windw=3)  # error: call-arg
ropecy.plan(Q, Q, epss=1e-3)  # error: call-arg
ropecy.check(O, Q, Q, Q, sed=1)  # error: call-arg
ropecy.AttentionMatrix(Q, Q, W_V=Q)  # error: call-arg
g.dq  # error: attr-defined
g.loss  # error: attr-defined
"""


def test_a_strict_program(tmp_path):
    """Every line of the program is seen as its comment says, and nothing else is said of it."""
    pytest.importorskip("mypy")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    parent = Path(ropecy.__file__).parents[1]
    environment = {name: value for name, value in os.environ.items() if name not in ("MYPYPATH", "PYTHONPATH")}
    if parent.name != "site-packages":
        environment["MYPYPATH"] = str(parent)
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--python-version=3.10"]
    command += [f"--cache-dir={tmp_path}", "--hide-error-context", str(program)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    said = {}
    for line in done.stdout.splitlines():
        place, kind, message = line.partition(": ")[::2][0], *line.partition(": ")[2].partition(": ")[::2]
        if kind == "error":
            said.setdefault(int(place.rpartition(":")[2]), f"error: {message.rpartition('[')[2].rstrip(']')}")
        elif message.startswith("Revealed type is "):
            said[int(place.rpartition(":")[2])] = shortened(message.split('"')[1])
    expected = {
        number: line.partition("  # ")[2] for number, line in enumerate(PROGRAM.splitlines(), 1) if "  # " in line
    }
    assert said == expected, done.stdout + done.stderr


def shortened(revealed):
    """A type without modules, and arrays without what their shape and dtype are known to be."""
    # NumPy's older stubs say Any of a shape, and of an array's dtype where newer ones say dtype[Any].
    dtype = r"(?:Any|numpy\.dtype\[(?:[^\[\]]|\[[^\]]*\])*\])"
    revealed = re.sub(rf"numpy\.ndarray\[(?:Any|tuple\[(?:Any|int), \.\.\.\]), {dtype}\]", "ndarray", revealed)
    for module in ("attention", "certificate", "gradients", "matrix"):
        revealed = revealed.replace(f"ropecy.{module}.", "")
    return revealed


def test_options_are_those_of_attention():
    """Their names and types are written twice, for type checkers read no others."""
    parameters = inspect.signature(ropecy.attention).parameters.values()
    keywords = {p.name: p.annotation for p in parameters if p.kind is p.KEYWORD_ONLY}
    del keywords["return_certificate"], keywords["return_lse"]
    found = {name: kind.__forward_arg__ for name, kind in options.Options.__annotations__.items()}
    assert found == keywords
    assert set(options.MatrixOptions.__annotations__) == set(keywords) - {"W_V"}
    assert set(options.CheckOptions.__annotations__) == set(keywords) - {"seed"}


def test_gradients_show_what_they_hold(rng):
    Q = rng.standard_normal((5, 4))
    O, vjp = ropecy.attention_vjp(Q, Q, Q)
    g = vjp(O)
    assert isinstance(vjp, ropecy.VJP) and isinstance(g, ropecy.Gradients)
    assert repr(g) == "Gradients(dQ: float64 (5, 4), dK: float64 (5, 4), dV: float64 (5, 4), certificate)"
    with pytest.raises(AttributeError, match="dW"):
        _ = g.dW
    L = ropecy.loss_grad(Q, Q, Q, O)
    assert isinstance(L, ropecy.LossGradients) and repr(L).startswith("LossGradients(loss, O: float64 (5, 4), dQ: ")
