"""Draws regime.png, promises.png and auto.png of the explanation pages, beside this file.

    python docs/figures/draw.py

It needs matplotlib and takes about a minute.
"""

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

import ropecy

HERE = Path(__file__).parent
BOUNDS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)


def normalised(rng, n, d, dtype="float32"):
    """Rows of root mean square 1, so that at scale B / d no score is past B."""
    X = rng.standard_normal((n, d))
    return (X / np.sqrt((X * X).mean(axis=-1, keepdims=True))).astype(dtype)


def worst_case(B, d, eps, dtype="float32"):
    """What `ropecy.plan` finds for the polynomial by the worst case: an Alternative, or None where none certifies."""
    rng = np.random.default_rng(0)
    Q, K = normalised(rng, 1024, d, dtype), normalised(rng, 1024, d, dtype)
    plan = ropecy.plan(Q, K, scale=B / d, eps=eps)
    return next((a for a in plan.alternatives if a.name == "polynomial, worst case" and a.certificate), None)


def regime():
    """From B and eps to a degree, from degree and width to features, from these to the n from which it pays."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for eps in (1e-1, 1e-2, 1e-3, 1e-6):
        found = [(B, worst_case(B, 4, eps, "float64")) for B in BOUNDS]
        degrees = {B: a.certificate.degree for B, a in found if a}
        axes[0].plot(list(degrees), list(degrees.values()), "o-", ms=4, label=f"eps = {eps:g}")
    axes[0].set_xscale("log")
    axes[0].set(xlabel="B, the bound of the scores", ylabel="degree g", title="bound and eps set the degree")
    degrees = range(1, 7)
    for d in (4, 8, 16, 32, 64):
        axes[1].semilogy(degrees, [math.comb(d + g, g) for g in degrees], "o-", ms=4, label=f"d = {d}")
    axes[1].set(xlabel="degree g", ylabel="features F", title="degree and width set the features", ylim=(1, 1e7))
    for d in (4, 8, 16, 32, 64):
        found = [(B, worst_case(B, d, 1e-3)) for B in BOUNDS]
        pays = {B: a.pays_from for B, a in found if a and a.pays_from}
        axes[2].loglog(list(pays), list(pays.values()), "o-", ms=4, label=f"d = {d}")
    axes[2].set(xlabel="B", ylabel="tokens", title="n from which it pays, eps = 1e-3", ylim=(50, 1e7))
    for axis in axes[[0, 2]]:
        axis.set_xticks(BOUNDS, [f"{B:g}" for B in BOUNDS])
        axis.set_xticks([], minor=True)
    for axis in axes:
        axis.legend(frameon=False, fontsize=8)
        axis.grid(alpha=0.3)
    figure.savefig(HERE / "regime.png", dpi=110)


def promises():
    """True errors of the rows of one result, and what three rules promise of them."""
    rng, n, d = np.random.default_rng(0), 4096, 32
    Q, K = normalised(rng, n, d), normalised(rng, n, d)
    V = rng.uniform(size=(n, d)).astype("float32")
    how = {"method": "polynomial", "degree": 2, "return_certificate": True}
    exact = ropecy.attention(*(X.astype("float64") for X in (Q, K, V)), method="exact")
    O, moments = ropecy.attention(Q, K, V, eps=5e-3, **how)
    _, worst = ropecy.attention(Q, K, V, eps=5e-2, **how)
    _, sampled = ropecy.attention(Q, K, V, eps=1e-3, certify="sample", seed=0, **how)
    errors = np.abs(O - exact).max(axis=1) / np.ptp(V, axis=0).max()
    order = np.argsort(moments.rows_truncation)
    figure, axis = plt.subplots(figsize=(7.5, 4), layout="constrained")
    axis.semilogy(errors[order], ".", ms=2, color="tab:gray", label="true error of a row")
    axis.semilogy(moments.rows_truncation[order], color="tab:blue", label=f"proved of that row ({moments.rule})")
    axis.axhline(worst.truncation, color="tab:red", label=f"proved of every row ({worst.rule})")
    axis.axhline(sampled.truncation, color="tab:green", ls="--", label="twice the worst of sampled rows (evidence)")
    axis.set(xlabel="rows, by what moments promise of them", ylabel="error in units of range(V)", ylim=(1e-6, 5e-2))
    axis.legend(frameon=False, fontsize=9, loc="lower right")
    figure.savefig(HERE / "promises.png", dpi=110)


def auto():
    """The planner's questions, one below the other, and where each answer leads."""
    questions = [
        ("Are there so few tokens that exact\nattention is cheaper than any degree?", "yes", "exact"),
        (
            "Does j - i enter other than by rotation,\n"
            "a mask, a near field, or a bias that\nfades or is constant far out?",
            "yes",
            "fft or exact,\nwhichever is cheaper",
        ),
        ("Does a degree certify eps\nfor scores within B?", "yes", "worst case"),
        ("Do moments of the scores certify\na smaller degree?", "yes", "moments"),
        ("Is B the fault of a few long rows?", "yes", "those exactly,\na polynomial for the rest"),
        ("Is the cheapest of these\ncheaper than exact attention?", "no", "exact"),
    ]
    figure, axis = plt.subplots(figsize=(8, 8), layout="constrained")
    axis.set(xlim=(0, 10), ylim=(-1.4, len(questions)))
    axis.axis("off")
    box = {"boxstyle": "round,pad=0.4", "fc": "white", "ec": "tab:blue"}
    end = {"boxstyle": "round,pad=0.4", "fc": "tab:blue", "ec": "tab:blue", "alpha": 0.15}
    arrow = {"arrowstyle": "->", "color": "0.4"}
    for i, (question, answer, result) in enumerate(questions):
        y = len(questions) - 1 - i + 0.5
        axis.text(3, y, question, ha="center", va="center", bbox=box, fontsize=10)
        axis.text(8.2, y, result, ha="center", va="center", bbox=end, fontsize=10)
        offered = result in ("worst case", "moments") or result.startswith("those")
        axis.annotate("", (6.7, y), (5.3, y), arrowprops=arrow)
        axis.text(6.0, y + 0.08, f"{answer}: {'an offer' if offered else 'runs'}", ha="center", fontsize=8, color="0.3")
        axis.annotate("", (3, y - 0.68), (3, y - 0.4), arrowprops=arrow)
    axis.text(3, -0.55, "the cheapest offer runs", ha="center", va="center", bbox=end, fontsize=10)
    figure.savefig(HERE / "auto.png", dpi=110)


if __name__ == "__main__":
    regime()
    promises()
    auto()
