"""What every engine has in common: an engine is one class, and nobody handles a feature that it has not heard of."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import oracle
import pytest

import ropecy
from ropecy.certificate import Certificate
from ropecy.engines.base import Candidate, Context, Engine, Executable, Refusal, Result, Search, gradient_of
from ropecy.engines.cost import Work
from ropecy.planning import planner
from ropecy.problem.input_gradients import InputGradients, SymbolGradient
from ropecy.problem.pieces import WHOLE
from ropecy.problem.problem import Problem
from ropecy.problem.request import METHODS, Request


@dataclass(slots=True)
class Dense(Executable):
    """Attention with n x n arrays, in float64."""

    certificate: Certificate
    gradient_certificate: Certificate | None
    values: object

    engine = "dense"

    @staticmethod
    def weights(problem):
        """P (H, G, n, n_k) and the log of the row sums."""
        mask, (n, n_k, d) = problem.mask, problem.sizes[2:5]
        t = np.arange(n_k) - np.arange(n)[:, None] - mask.offset
        scale = np.full(t.shape, problem.scale)
        if problem.near is not None:
            scale[abs(t) < problem.near[0]] = problem.near[1]
        q, k = problem.q.astype(float), problem.k.astype(float)[:, None]
        s = scale * (q @ k.swapaxes(-1, -2))
        if problem.family is not None:
            matrices = np.array([problem.family.matrix(-x, d) for x in range(mask.least, mask.most + 1)])
            s = scale * np.einsum("hgia,ijab,hjb->hgij", q, matrices[t - mask.least], k[:, 0])
        if problem.bias is not None:
            s = s + problem.bias[..., t - mask.least]
        seen = (t >= mask.seen[0]) & (t < mask.seen[1])
        if mask.kept is not None:
            seen = seen & mask.kept[:, None, None]
        s = np.where(seen, s, -np.inf)
        with np.errstate(divide="ignore", invalid="ignore"):
            top = np.maximum(s.max(axis=-1, keepdims=True), np.finfo(float).min)
            lse = top + np.log(np.exp(s - top).sum(axis=-1, keepdims=True))
            return np.where(np.isneginf(lse), 0, np.exp(s - lse)), lse[..., 0], scale

    def forward(self, problem, want_lse, pieces=WHOLE):
        P, lse, _ = self.weights(problem)
        return Result((P @ problem.v.astype(float)[:, None]).astype(problem.dtype), lse, self)

    def backward(self, problem, result, do, pieces=WHOLE):
        P, _, scale = self.weights(problem)
        do, o = do.astype(float), P @ problem.v.astype(float)[:, None]
        dS = P * (do @ problem.v.astype(float)[:, None].swapaxes(-1, -2) - (do * o).sum(axis=-1, keepdims=True))
        dq = (scale * dS) @ problem.k.astype(float)[:, None]
        dk = np.einsum("hgij,hgia->hja", scale * dS, problem.q.astype(float))
        dv = np.einsum("hgij,hgic->hjc", P, do)
        found = InputGradients(*(X.astype(problem.dtype) for X in (dq, dk, dv)))
        if problem.bias is not None:
            n, n_k = dS.shape[2:]
            sums = [np.trace(dS, offset, 2, 3) for offset in range(1 - n, n_k)]
            found.symbol = (SymbolGradient(np.stack(sums, axis=-1), problem.mask.least),)
        return found


class DenseEngine(Engine):
    """It takes every problem."""

    name: ClassVar[str] = "dense"
    SUPPORTS: ClassVar[frozenset[str]] = frozenset({"bias", "family", "near", "window", "causal", "key_mask"})
    needs_bound: ClassVar[bool] = False
    seconds = 1e-12

    def offer(self, context: Context, search: Search) -> Candidate | Refusal:
        if lacking := self.lacks(context.outline):
            return self.unable(lacking)
        certificate = Certificate("dense", None, None, np.inf, "exact", 0.0, 1e-6)
        gradient = gradient_of(certificate) if context.request.grad else None
        executable = Dense(certificate, gradient, context.statistics.values)
        return Candidate(executable, Work(self.seconds), 8.0 * np.prod(context.outline.sizes[:4]), "it is a test")


@pytest.fixture
def dense(monkeypatch):
    engine = DenseEngine()
    monkeypatch.setattr(planner, "ENGINES", [*planner.ENGINES])
    planner.register(engine)
    yield engine
    METHODS.remove("dense")


CASES = {
    "plain": {},
    "causal": {"causal": True, "q_offset": 4},
    "window": {"window": (7, 3)},
    "near": {"near": (5, 0.9)},
    "bias": {"bias": oracle.Table(np.linspace(-1, 1, 61))},
    "key_mask": {"key_mask": np.arange(40) % 3 > 0, "causal": True},
}


@pytest.mark.parametrize("name", CASES)
def test_an_engine_is_one_class(name, dense, rng, ours):
    Q, K, V, dO = (rng.standard_normal((2, n, d)) for n, d in ((31, 4), (40, 4), (40, 3), (31, 3)))
    case = {"Q": Q, "K": K, "V": V, **CASES[name]}
    O, certificate = ropecy.attention(**ours(case), method="dense", return_certificate=True)
    true = oracle.attention(**case)
    assert certificate.engine == "dense"
    np.testing.assert_allclose(O, true.O, rtol=0, atol=1e-12)
    O, vjp = ropecy.attention_vjp(**ours(case), method="dense")
    g = vjp(dO)
    for argument, expected in true.backward(dO).items():
        if argument in ("dQ", "dK", "dV", "dbias"):
            np.testing.assert_allclose(getattr(g, argument), expected, rtol=0, atol=1e-12, err_msg=argument)


def test_it_is_planned_and_explained(dense, rng):
    Q, K = rng.standard_normal((2, 50, 4))
    plan = ropecy.plan(Q, K)
    assert plan.engine == "dense" and "because   it is a test" in str(plan)
    assert [other.name for other in plan.alternatives][-1] == "dense" and "-> dense" in str(plan)
    assert plan.bytes["dense"] == 8 * 50 * 50
    dense.seconds = 1e6
    assert ropecy.plan(Q, K).engine == "exact"
    with pytest.warns(ropecy.PerformanceWarning, match="dense attention is predicted to take"):
        ropecy.attention(Q, K, K, method="dense")


@dataclass(slots=True, kw_only=True)
class Windy(Problem):
    """A problem with something that no engine has heard of."""

    wind: float | None = None


@pytest.mark.parametrize("engine", planner.ENGINES, ids=lambda engine: type(engine).__name__)
def test_nobody_handles_what_it_has_not_heard_of(engine, rng):
    q, k, v = rng.standard_normal((1, 1, 300, 4)), rng.standard_normal((1, 300, 4)), rng.standard_normal((1, 300, 2))
    calm = Windy(q=q, k=k, v=v, scale=0.25)
    windy = replace(calm, wind=1.0)
    assert "wind" not in calm.features and "wind" in windy.features
    request = Request(method=engine.name)
    search = Search(request, [planner.ENGINES[0].offer(Context.of(calm, request), Search(request))])
    answer = engine.offer(Context.of(windy, request), search)
    assert isinstance(answer, Refusal)


@pytest.mark.parametrize("method", ["auto", "exact", "polynomial", "fft"])
def test_nor_does_the_planner(method, rng):
    q, k, v = rng.standard_normal((1, 1, 300, 4)), rng.standard_normal((1, 300, 4)), rng.standard_normal((1, 300, 2))
    problem = Windy(q=q, k=k, v=v, scale=0.25, wind=1.0)
    with pytest.raises(NotImplementedError, match="wind"):
        planner.choose(Context.of(problem, Request(method=method)))
