"""The recipe for JAX of docs/train.md, run as it is written."""

import re
from pathlib import Path

import numpy as np
import pytest

import ropecy

jax = pytest.importorskip("jax")
PAGE = Path(__file__).parent.parent / "docs" / "train.md"


@pytest.fixture(scope="module")
def recipe():
    (source,) = re.findall(r"^```python\n(# JAX\n.*?)^```", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    names = {}
    exec(compile(source, str(PAGE), "exec"), names)
    return names["attention"]


@pytest.mark.parametrize("wrap", ["plain", "jit"])
@pytest.mark.parametrize("n", [50, 5000])
def test_value_and_gradient(n, wrap, recipe, rng):
    Q, K, V, dO = rng.standard_normal((4, 2, n, 8)).astype(np.float32)

    def loss(*QKV):
        O = recipe(*QKV)
        return (O * dO).sum(), O

    run = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    (_, O), found = (jax.jit(run) if wrap == "jit" else run)(Q, K, V)
    expected, vjp = ropecy.attention_vjp(Q, K, V, ropecy.Rotary(8), causal=True)
    g = vjp(dO)
    np.testing.assert_array_equal(O, expected)
    for ours, wanted in zip(found, (g.dQ, g.dK, g.dV), strict=True):
        np.testing.assert_array_equal(ours, wanted)


def test_vmap(recipe, rng):
    Q, K, V = rng.standard_normal((3, 4, 30, 8)).astype(np.float32)

    def gradients(*QKV):
        return jax.grad(lambda *X: (recipe(*X) ** 2).sum(), argnums=(0, 1, 2))(*QKV)

    together = jax.vmap(gradients, in_axes=(0, None, 0))(Q, K[0], V)
    for i in range(4):
        for all_of_them, one in zip(together, gradients(Q[i], K[0], V[i]), strict=True):
            np.testing.assert_allclose(all_of_them[i], one, rtol=0, atol=1e-5)
