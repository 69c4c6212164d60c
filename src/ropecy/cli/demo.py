"""``python -m ropecy demo``: the loss of a text and its gradient are computed, checked, timed, and used for descent."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..attention import attention
from ..gradients import Gradients, LossGradients
from ..loss import loss, loss_grad
from ..plan import plan
from ..rotary import Rotary
from .info import info

TOKENS = 65536  # by default, unless the text is shorter
_SAMPLED, _BLOCK = 512, 32  # number of rows of O that are checked, in blocks of 32 neighbouring rows
_PREFIX = 8192  # gradients are checked on so many tokens at most
_PATIENCE = 1.0  # seconds: once a run of the exact engine takes longer, larger parts are not timed but extrapolated


# Indices of rows of O, their errors, and the error that is certified, both in units of range(V).
RowErrors = tuple[list[int], list[float], float]
# The number of tokens, seconds of the exact engine, seconds of the engine that method="auto" takes, and whether the
# exact engine's were measured (True) or extrapolated.
Timing = tuple[int, float, float, bool]


def read_text(file: Path | None, n: int | None) -> bytes:
    """n + 1 bytes of a file, or of the language reference that Python's help() shows; by default at most TOKENS + 1."""
    if file is None:
        from pydoc_data.topics import topics

        text, name = "\n".join(topics[name] for name in sorted(topics)).encode(), "the language reference"
    else:
        text, name = file.read_bytes(), str(file)
    if len(text) < 3:
        raise ValueError(f"--file wants at least 3 bytes, got {len(text)} in {name}")
    if n is None:
        n = min(TOKENS, len(text) - 1)
    if n >= len(text):
        raise ValueError(f"--n wants at most {len(text) - 1}, the length of {name} less one, got {n}")
    return text[: n + 1]


def normalised(X: np.ndarray) -> np.ndarray:
    """X with rows scaled to root mean square 1, so that at scale 1/d no score of two of them is larger than 1."""
    return X / np.sqrt(np.mean(X * X, axis=-1, keepdims=True))


def run(text: bytes, *, d: int, eps: float, steps: int, seed: int, plot: Path | None = None) -> None:
    """Print the plan, the loss and its gradient, their errors against exact attention, the times, and the descent.

    Parameters
    ----------
    text : bytes
        n + 1 tokens. Each of the first n is to predict the one after it.
    d : int
        Width of an embedding.
    eps, steps, seed
        As on the command line.
    plot : Path, optional
        Where to draw errors, times and losses.
    """
    rng = np.random.default_rng(seed)
    task = Task.of(text, d, eps, rng)
    weights = {name: _rotation(d, rng) for name in ("W_Q", "W_K", "W_V")}
    n = len(task.A)

    print(f"text      {n:,} bytes, embedded in {d} dimensions: {_excerpt(text)}")
    print("machine   {machine}, {cpus} CPUs, {instruction set}, {threads} threads, {fftw}\n".format(**info()))
    A = task.A
    planned = plan(A, A, A, task.R, causal=True, eps=eps, grad=True, **weights)
    print(planned, end="\n\n")

    start = time.perf_counter()
    g = task.gradient(weights)
    print(f"loss      {g.loss:,.2f} and its gradient in {time.perf_counter() - start:.2f} s\n")
    errors = _check_rows(task, weights, rng)
    _check_gradient(task, weights, g.certificate.engine)
    times = _time(task, weights, g.certificate.engine)
    losses = _descend(task, weights, steps)
    if plot is not None:
        _draw(plot, errors, times, losses)
        print(f"drawn to {plot}")
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")


@dataclass(frozen=True, slots=True)
class Task:
    """The loss of arXiv:2412.17316 with A_1 = A_2 = A_3 the embeddings of n tokens, and E those of the tokens after.

    Attributes
    ----------
    A : (n, d) array
        A_1, A_2 and A_3: row i is the embedding of token i.
    E : (n, d) array
        Row i is the embedding of token i + 1.
    R : Rotary
    eps : float
        The error that is certified.
    """

    A: np.ndarray
    E: np.ndarray
    R: Rotary
    eps: float

    @classmethod
    def of(cls, text: bytes, d: int, eps: float, rng: np.random.Generator) -> Task:
        """The task of n + 1 bytes, each byte embedded as a random row of root mean square 1."""
        embedding = normalised(rng.standard_normal((256, d))).astype(np.float32)
        X = embedding[np.frombuffer(text, np.uint8)]
        return cls(X[:-1], X[1:], Rotary(d), eps)

    def part(self, n: int, dtype: type = np.float32) -> Task:
        """The task of the first n tokens, with arrays of this dtype."""
        return Task(self.A[:n].astype(dtype, copy=False), self.E[:n].astype(dtype, copy=False), self.R, self.eps)

    def gradient(self, weights: dict[str, np.ndarray], method: str = "auto") -> LossGradients:
        """The loss and its gradients for these projections."""
        A = self.A
        return loss_grad(A, A, A, self.E, self.R, causal=True, eps=self.eps, method=method, **weights)


def _rotation(d: int, rng: np.random.Generator) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((d, d)))[0].astype(np.float32)


def _excerpt(text: bytes) -> str:
    return ascii(text[:48].decode("latin-1")) + "..." * (len(text) > 48)


def _double(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: W.astype(np.float64) for name, W in weights.items()}


def _check_rows(task: Task, weights: dict[str, np.ndarray], rng: np.random.Generator) -> RowErrors:
    """Compare rows of O with exact ones in float64: the indices of the rows, their errors, and the certified error."""
    n, A = len(task.A), task.A
    O, certificate = attention(A, A, A, task.R, causal=True, eps=task.eps, return_certificate=True, **weights)
    exact_A, exact_weights = A.astype(np.float64), _double(weights)
    V = exact_A @ exact_weights["W_V"]
    unit = np.ptp(V, axis=0).max()
    blocks = -(-n // _BLOCK)
    starts = _BLOCK * np.sort(rng.choice(blocks, min(blocks, _SAMPLED // _BLOCK), replace=False))
    rows: list[int] = []
    errors: list[float] = []
    for i in starts.tolist():
        stop = min(i + _BLOCK, n)
        # Row i sees the keys j <= i only, so keys past the last row of this block aren't needed.
        keys = exact_A[:stop]
        exact = attention(exact_A[i:stop], keys, keys, task.R, causal=True, q_offset=i, method="exact", **exact_weights)
        rows.extend(range(i, stop))
        errors.extend(np.abs(O[i:stop] - exact).max(axis=1) / unit)
    print(
        f"check     {len(rows)} rows of O, against exact attention in float64, in units of range(V): "
        f"off by {max(errors):.1e}, certified {certificate.error:.1e}"
    )
    return rows, errors, certificate.error


def _check_gradient(task: Task, weights: dict[str, np.ndarray], engine: str) -> None:
    """Print the errors of loss and gradients on the first tokens, compared with exact float64, and their bounds."""
    n = min(len(task.A), _PREFIX)
    fast = task.part(n).gradient(weights, engine)
    part = task.part(n, np.float64)
    exact = part.gradient(_double(weights), "exact")
    promised = _promised(part, _double(weights), fast)
    where = "all" if n == len(task.A) else "the first"
    print(f"          loss and gradient on {where} {n:,} tokens (norms of Frobenius):")
    print(f"          {'':8}{'exact':>12}{'error':>12}{'certified':>12}")
    values = {"L": (exact.loss, fast.loss)}
    values |= {f"dL/d{name}": (getattr(exact, "d" + name), getattr(fast, "d" + name)) for name in weights}
    for name, (truth, found) in values.items():
        error = np.linalg.norm(np.subtract(found, truth))
        print(f"          {name:8}{np.linalg.norm(truth):12.4g}{error:12.1e}{promised[name]:12.1e}")
    print()


def _promised(task: Task, weights: dict[str, np.ndarray], fast: Gradients) -> dict[str, float]:
    """Bounds of the errors of L, dL/dW_Q, dL/dW_K and dL/dW_V that follow from the certificate of dQ, dK and dV.

    Notes
    -----
    dL/dW_Q = A^T dQ has an error of at most max_i ||A_i|| sum_i ||ddQ_i||, where ddQ_i is the error of row i of dQ. The
    same holds for W_K with dK and for W_V with dV. ddQ_i has two parts: rows of U = O - E have errors of at most
    tau diam(V), and the weights that they are multiplied by are wrong by a factor of at most 1 + e.
    """
    e = fast.certificate.error
    tau, zeta = e / (1 + np.sqrt(1 - e * e)), 2 * e / (1 - e)
    Q, K, V = (task.A @ weights[name] for name in ("W_Q", "W_K", "W_V"))
    n, d = Q.shape
    U = np.linalg.norm(fast.O - task.E, axis=1)
    diam_K, diam_V = (2 * np.linalg.norm(X - X.mean(axis=0), axis=1).max() for X in (K, V))
    longest = np.linalg.norm(task.A, axis=1).max()
    moved = tau * diam_V
    return {
        "L": float(np.sum(U * moved + moved**2 / 2)),
        "dL/dW_Q": longest / d * diam_K / 4 * diam_V * float(np.sum(np.arctanh(e) * U + moved)),
        "dL/dW_K": longest / d * diam_V * float(np.linalg.norm(Q, axis=1) @ (zeta * U + moved / 2)),
        "dL/dW_V": longest * float(np.sum(zeta * U + moved)),
    }


def _time(task: Task, weights: dict[str, np.ndarray], engine: str) -> list[Timing]:
    """Time loss and gradients, by the exact engine and by that of method="auto", on growing parts of the text."""
    n = len(task.A)
    if engine == "exact":
        print("time      the exact engine is the faster one here: there is nothing to compare\n")
        return []
    sizes = [n]
    while sizes[0] > 4096:
        sizes.insert(0, sizes[0] // 2)
    times: list[Timing] = []
    measured, exact = 0, 0.0
    print(f"time      loss and gradient, float32\n          {'tokens':>8}{'exact':>12}{engine:>14}{'ratio':>10}")
    for size in sizes:
        part = task.part(size)
        fast = _seconds(part, weights, engine)
        if exact < _PATIENCE:
            measured, exact = size, _seconds(part, weights, "exact")
        scaled = exact * (size / measured) ** 2
        times.append((size, scaled, fast, size == measured))
        mark = "" if size == measured else "~"
        scaled, ratio = f"{mark}{scaled:.3g} s", f"{mark}{scaled / fast:.3g}"
        print(f"          {size:8,}{scaled:>12}{f'{fast:.3g} s':>14}{ratio:>10}", flush=True)
    if sizes[-1] > measured:
        print(f"          ~ extrapolated from {measured:,} tokens by the square of their number")
    print()
    return times


def _seconds(task: Task, weights: dict[str, np.ndarray], method: str) -> float:
    """The seconds of the fastest of three runs, or of fewer where they take long."""
    runs: list[float] = []
    while len(runs) < 3 and sum(runs) < _PATIENCE / 2:
        start = time.perf_counter()
        task.gradient(weights, method)
        runs.append(time.perf_counter() - start)
    return min(runs)


def _descend(task: Task, weights: dict[str, np.ndarray], steps: int) -> list[float]:
    """Take steps of Adam on W_Q, W_K and W_V; returns the loss before each step and after the last.

    W_Q and W_K are held to spectral norm 1, and with that every score to [-1, 1].
    """
    n, d = task.A.shape
    # A step of Adam changes each entry of a matrix by about the rate, and so its product with a row of d entries of
    # size 1 by about d times the rate.
    rate, decay, decay_square = 0.8 / d, 0.9, 0.99
    mean = dict.fromkeys(weights, 0.0)
    square = dict.fromkeys(weights, 0.0)
    losses = []
    print(f"descent   the best constant answer has a loss of {0.5 * float(task.E.var(axis=0).sum()):.4f} a token")
    start = time.perf_counter()
    for step in range(1, steps + 1):
        g = task.gradient(weights)
        losses.append(g.loss)
        if step == 1 or step % max(1, steps // 10) == 0:
            print(
                f"step {step:>4}/{steps}   loss {g.loss:14,.2f}   {g.loss / n:.4f} a token   "
                f"error <= {g.certificate.error:.1e}   {time.perf_counter() - start:6.2f} s",
                flush=True,
            )
        for name in weights:
            dW = getattr(g, "d" + name) / n
            mean[name] = decay * mean[name] + (1 - decay) * dW
            square[name] = decay_square * square[name] + (1 - decay_square) * dW * dW
            # Both averages start at 0 and are too small at first; the divisors correct that.
            first, second = mean[name] / (1 - decay**step), square[name] / (1 - decay_square**step)
            W = weights[name] - rate * first / (np.sqrt(second) + 1e-12)
            weights[name] = (W if name == "W_V" else _bounded(W)).astype(np.float32)
    A = task.A
    losses.append(loss(A, A, A, task.E, task.R, causal=True, eps=task.eps, **weights))
    return losses


def _bounded(W: np.ndarray) -> np.ndarray:
    """The nearest matrix of spectral norm at most 1."""
    left, values, right = np.linalg.svd(W)
    return left * np.minimum(values, 1) @ right


def _draw(path: Path, errors: RowErrors, times: list[Timing], losses: list[float]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    error, clock, descent = figure.subplots(1, 3)

    rows, off, certified = errors
    # A logarithmic axis can't show an error of 0.
    error.semilogy(rows, np.maximum(off, 1e-16), ".", markersize=3, label="of a row of O")
    error.axhline(certified, color="tab:red", label="certified")
    error.set(title="Error, in units of range(V)", xlabel="row")
    error.locator_params(axis="x", nbins=4)
    error.legend()

    if times:
        sizes, exact, fast, measured = map(np.array, zip(*times, strict=True))
        last = np.flatnonzero(measured)[-1]
        if not measured.all():
            clock.loglog(sizes[last:], exact[last:], "--", color="tab:red", label="exact, extrapolated")
        clock.loglog(sizes[measured], exact[measured], "o-", color="tab:red", label="exact")
        clock.loglog(sizes, fast, "o-", color="tab:blue", label="polynomial")
        clock.set_xscale("log", base=2)
        clock.legend()
    clock.set(title="Seconds of loss and gradient", xlabel="tokens")

    descent.plot(losses)
    descent.set(title="Loss", xlabel="step")
    figure.savefig(path, dpi=110)
