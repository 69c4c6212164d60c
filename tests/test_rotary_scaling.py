"""The scaling rules: each against the definition that transformers carries, and what depends on length."""

import math

import numpy as np
import pytest

from ropecy import Rotary

D = 32
LENGTHS = (None, 1, 100, 128, 129, 1000, 100_000)
RULES = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "yarn": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 128},
    "yarn by lengths": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 64},
    "yarn betas": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16.0, "beta_slow": 2.0,
                   "original_max_position_embeddings": 4096},
    "yarn mscale": {"rope_type": "yarn", "factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.2,
                    "original_max_position_embeddings": 4096},
    "yarn one mscale": {"rope_type": "yarn", "factor": 40.0, "mscale": 0.707, "original_max_position_embeddings": 4096},
    "yarn attention_factor": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.8,
                              "original_max_position_embeddings": 4096},
    "yarn not truncated": {"rope_type": "yarn", "factor": 4.0, "truncate": False,
                           "original_max_position_embeddings": 4096},
    "yarn one step": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
    "yarn shrinking": {"rope_type": "yarn", "factor": 0.5, "original_max_position_embeddings": 128},
    "longrope": {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 128,
                 "short_factor": np.linspace(1.0, 1.5, D // 2).tolist(),
                 "long_factor": np.linspace(1.0, 30.0, D // 2).tolist()},
    "longrope by lengths": {"rope_type": "longrope", "original_max_position_embeddings": 64,
                            "short_factor": [1.0] * (D // 2), "long_factor": [2.5] * (D // 2)},
    "longrope attention_factor": {"rope_type": "longrope", "attention_factor": 1.19,
                                  "original_max_position_embeddings": 128, "short_factor": [1.1] * (D // 2),
                                  "long_factor": [2.0] * (D // 2)},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192},
    "llama3 short": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 2.0,
                     "original_max_position_embeddings": 256},
    "proportional": {"rope_type": "proportional"},
    "proportional quarter": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "factor": 2.0},
    "proportional uneven": {"rope_type": "proportional", "partial_rotary_factor": 0.3},
}  # fmt: skip
MAX_POSITIONS = 128


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("base", [10000.0, 500000.0])
def test_against_transformers(name, base):
    pytest.importorskip("torch")
    functions = pytest.importorskip("transformers.modeling_rope_utils").ROPE_INIT_FUNCTIONS
    configuration = pytest.importorskip("transformers").LlamaConfig
    rule = RULES[name]
    config = configuration(
        hidden_size=4 * D, num_attention_heads=4, head_dim=D, max_position_embeddings=MAX_POSITIONS,
        rope_parameters={**rule, "rope_theta": base},
    )
    R = Rotary(D, base=base, scaling={**rule, "rope_theta": base, "max_position_embeddings": MAX_POSITIONS})
    for length in LENGTHS:
        expected, attention_factor = functions[rule["rope_type"]](config, seq_len=length)
        theta, factor = R._frequencies(length or 1)
        # transformers computes in float32.
        np.testing.assert_allclose(theta, expected.double().numpy(), rtol=3e-6, atol=0)
        assert factor == pytest.approx(attention_factor, rel=1e-12)


@pytest.mark.parametrize("rule", ["linear", "dynamic", "yarn", "llama3"])
def test_partial_rotary_against_transformers(rule):
    pytest.importorskip("torch")
    functions = pytest.importorskip("transformers.modeling_rope_utils").ROPE_INIT_FUNCTIONS
    configuration = pytest.importorskip("transformers").LlamaConfig
    parameters = {**RULES[rule], "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    config = configuration(
        hidden_size=4 * D, num_attention_heads=4, head_dim=D, max_position_embeddings=MAX_POSITIONS,
        rope_parameters=parameters,
    )
    expected, _ = functions[rule](config, seq_len=300)
    R = Rotary(D, rotary_dim=D // 2, scaling={**parameters, "max_position_embeddings": MAX_POSITIONS})
    np.testing.assert_allclose(R._frequencies(300)[0], expected.double().numpy(), rtol=3e-6, atol=0)


def test_rotation_against_transformers():
    """cos, sin and rotate_half as a Llama model does them, yarn's attention factor included."""
    torch = pytest.importorskip("torch")
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    configuration = pytest.importorskip("transformers").LlamaConfig
    rule = RULES["yarn"]
    config = configuration(
        hidden_size=4 * D, num_attention_heads=4, head_dim=D, max_position_embeddings=1024,
        rope_parameters={**rule, "rope_theta": 10000.0},
    )
    X = torch.randn((2, 4, 50, D), generator=torch.Generator().manual_seed(0))
    cos, sin = llama.LlamaRotaryEmbedding(config)(X, torch.arange(50)[None])
    expected, _ = llama.apply_rotary_pos_emb(X, X, cos, sin)
    np.testing.assert_allclose(Rotary(D, scaling=rule).rotate(X.numpy()), expected.numpy(), rtol=0, atol=3e-5)


def test_default_is_the_plain_rule():
    theta, factor = Rotary(D, scaling={"rope_type": "default"})._frequencies(1)
    np.testing.assert_array_equal(theta, Rotary(D)._frequencies(1)[0])
    np.testing.assert_allclose(theta, [10000.0 ** (-2 * b / D) for b in range(D // 2)], rtol=1e-15)
    assert factor == 1.0


def test_legacy_type_key():
    assert Rotary(8, scaling={"type": "linear", "factor": 2.0}) == Rotary(
        8, scaling={"rope_type": "linear", "factor": 2.0}
    )


def test_linear_divides_the_positions():
    X = np.random.default_rng(0).standard_normal((20, 8))
    scaled = Rotary(8, scaling={"rope_type": "linear", "factor": 4.0}).rotate(X, 4 * np.arange(20))
    np.testing.assert_allclose(scaled, Rotary(8).rotate(X), rtol=0, atol=1e-14)


def test_proportional_pairs_over_the_whole_width():
    R = Rotary(8, scaling={"rope_type": "proportional", "partial_rotary_factor": 0.5})
    np.testing.assert_allclose(R._frequencies(1)[0], [1.0, 10000.0 ** (-1 / 4), 0.0, 0.0], rtol=1e-15)
    Y = R.rotate(np.eye(8), 1)
    np.testing.assert_allclose([Y[0, 0], Y[0, 4]], [math.cos(1.0), math.sin(1.0)], rtol=1e-15)
    np.testing.assert_array_equal(Y[[2, 3, 6, 7]], np.eye(8)[[2, 3, 6, 7]])


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_length_is_the_largest_position_of_the_call(name):
    rule = {**RULES[name], "original_max_position_embeddings": 128}
    R = Rotary(D, scaling=rule)
    X = np.random.default_rng(0).standard_normal((200, D))
    np.testing.assert_array_equal(R.rotate(X), Rotary(D, scaling=rule, length=200).rotate(X))
    np.testing.assert_array_equal(R.rotate(X[:1], [199]), Rotary(D, scaling=rule, length=200).rotate(X[:1], [199]))
    assert not np.allclose(R.rotate(X)[5], R.rotate(X[:128])[5])
    np.testing.assert_array_equal(R[150], Rotary(D, scaling=rule, length=151)[150])
    np.testing.assert_array_equal(R[-150], R[150].T)
    long = Rotary(D, scaling=rule, length=300)
    np.testing.assert_array_equal(long.rotate(X)[:128], long.rotate(X[:128]))


def test_inverse_with_a_length_dependent_rule():
    R = Rotary(D, scaling=RULES["longrope"])
    X = np.random.default_rng(0).standard_normal((200, D))
    np.testing.assert_allclose(R.rotate(R.rotate(X), inverse=True), X, rtol=0, atol=1e-14)
