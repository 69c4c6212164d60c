"""RoPEAttention a token at a time: `extend` and `step` against the layer on whole sequences, and what they refuse."""

import copy
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import ropecy  # noqa: E402
from ropecy.torch import RoPEAttention  # noqa: E402

LAYERS = {
    "plain": {},
    "bounded": {"bound": 2.0, "near": None},
    "near": {"bound": 2.0, "near": 9},
    "near by head": {"bound": 0.5, "near": 9, "near_by_head": True, "num_kv_heads": 2},
    "grouped": {"bound": 2.0, "num_kv_heads": 2, "bias": True},
    "grouped, exact": {"num_kv_heads": 1, "bias": True},
    "half rotary": {"bound": 1.0, "rotary": ropecy.Rotary(8, rotary_dim=4)},
    "interleaved, exact": {"rotary": ropecy.Rotary(8, pairing="interleaved")},
    "by itself": {"bound": True},
}


def make(name, dtype=torch.float64, seed=3, eps=1e-4):
    torch.manual_seed(seed)
    layer = RoPEAttention(32, 4, **({"eps": eps} if LAYERS[name].get("bound") is not True else {}), **LAYERS[name])
    with torch.no_grad():
        if layer.log_scale_near is not None:
            layer.log_scale_near.copy_(torch.linspace(3, 1, len(layer.log_scale_near)))
    return layer.to(dtype).eval()


def certified(layer, x, state, key_mask=None):
    """What the output of steps may differ by from that of the whole, by the certificates of both."""
    y, certificate = layer(x, key_mask, return_certificate=True)
    _, _, v, _ = layer._heads(x)
    error = certificate.error + (state.certificate.error if state.certificate else 1e-12)
    spread = (v.amax(-2) - v.amin(-2)).amax()
    # Of each number that comes out of the projection.
    return error * spread * layer.o_proj.weight.abs().sum(dim=1).max() + 1e-12, y


@pytest.mark.parametrize("name", LAYERS)
def test_steps_after_extend_are_the_layer(name):
    layer, x = make(name), torch.randn(3, 260, 32, dtype=torch.float64)
    state = layer.new_state(3)
    prompt = layer.extend(x[:, :200], state)
    torch.testing.assert_close(prompt, layer(x[:, :200]), rtol=0, atol=1e-12)
    y = torch.stack([layer.step(x[:, i], state) for i in range(200, 260)], dim=1)
    allowed, expected = certified(layer, x, state)
    assert not y.requires_grad and state.lengths.tolist() == [260] * 3
    assert (y - expected[:, 200:]).abs().max() <= allowed
    if layer.bound is None:
        torch.testing.assert_close(y, expected[:, 200:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["near", "plain"])
def test_2000_tokens(name):
    layer, x = make(name, torch.float32), torch.randn(1, 2000, 32)
    state = layer.new_state(1)
    layer.extend(x[:, :1900], state)
    y = torch.stack([layer.step(x[:, i], state) for i in range(1900, 2000)], dim=1)
    allowed, expected = certified(layer, x, state)
    assert (y - expected[:, 1900:]).abs().max() <= allowed + 1e-5


@pytest.mark.parametrize("name", ["plain", "near", "grouped"])
def test_padding_on_either_side(name):
    """Streams of other lengths; what is hidden holds NaN and joins no stream."""
    layer, x = make(name), torch.randn(4, 60, 32, dtype=torch.float64)
    mask = torch.zeros(4, 60, dtype=torch.bool)
    for i, (start, stop) in enumerate([(0, 60), (0, 31), (17, 60), (5, 5)]):
        mask[i, start:stop] = True
    later = torch.randn(4, 5, 32, dtype=torch.float64)
    state = layer.new_state(4)
    y = layer.extend(x.masked_fill(~mask[..., None], torch.nan), state, mask)
    torch.testing.assert_close(y[mask], layer(x, mask)[mask], rtol=0, atol=1e-12)
    assert state.lengths.tolist() == [60, 31, 43, 0] and not y[3].any()
    steps = torch.stack([layer.step(later[:, i], state) for i in range(5)], dim=1)
    for i in range(4):
        whole = torch.cat([x[i][mask[i]], later[i]])[None]
        allowed, expected = certified(layer, whole, state)
        assert (steps[i] - expected[0, -5:]).abs().max() <= allowed


@pytest.mark.parametrize("name", ["plain", "near"])
def test_a_second_extend_goes_on(name):
    layer, x = make(name), torch.randn(2, 90, 32, dtype=torch.float64)
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[1, :12] = False
    state = layer.new_state(2)
    layer.extend(x[:, :60], state)
    y = layer.extend(x[:, 60:], state, mask)
    assert state.lengths.tolist() == [90, 78]
    allowed, expected = certified(layer, x, state)
    assert (y[0] - expected[0, 60:]).abs().max() <= allowed
    other = torch.cat([x[1:, :60], x[1:, 72:]], dim=1)
    assert (y[1, 12:] - layer(other)[0, 60:]).abs().max() <= allowed and not y[1, :12].any()


@pytest.mark.parametrize("name", ["plain", "near"])
def test_streams_of_a_layer(name):
    """Inactive ones are not read and give 0; a reset one begins anew; chosen ones go on by themselves."""
    layer, x = make(name), torch.randn(3, 40, 32, dtype=torch.float64)
    state = layer.new_state(3)
    layer.extend(x[:, :30], state)
    row = x[:, 30].clone()
    row[1] = torch.nan
    y = layer.step(row, state, active=torch.tensor([True, False, True]))
    assert not y[1].any() and state.lengths.tolist() == [31, 30, 31]
    twin = state.select([1, 1])
    torch.testing.assert_close(
        layer.step(x[[1, 1], 30], twin), layer.step(x[:, 30], state, active=torch.arange(3) == 1)[[1, 1]]
    )
    assert (twin.batch, twin.lengths.tolist(), state.lengths.tolist()) == (2, [31, 31], [31, 31, 31])
    state.reset(2)
    mask = torch.zeros(3, 20, dtype=torch.bool)
    mask[2] = True
    y = layer.extend(x[:, :20], state, mask)  # the others have tokens, and are left as they are
    torch.testing.assert_close(y[2], layer(x[2:, :20])[0], rtol=0, atol=1e-12)
    assert state.lengths.tolist() == [31, 31, 20]
    allowed, expected = certified(layer, x[:, :32], state)
    y = layer.step(x[:, 31], state)
    assert (y[:2] - expected[:2, 31]).abs().max() <= allowed


@pytest.mark.parametrize("name", ["plain", "near", "grouped"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights(name, dtype):
    layer, x = make(name, dtype, eps=1e-3), torch.randn(2, 80, 32).to(dtype)
    state = layer.new_state(2)
    layer.extend(x[:, :60], state)
    y = torch.stack([layer.step(x[:, i], state) for i in range(60, 80)], dim=1)
    assert y.dtype == dtype
    allowed = 3e-2 if dtype == torch.bfloat16 else 4e-3
    torch.testing.assert_close(y.float(), layer(x)[:, 60:].float(), rtol=0, atol=allowed)


def test_bytes_of_a_state():
    sizes = []
    for name in ("near", "plain"):
        layer = make(name, torch.float32)
        state = layer.new_state(2)
        for n in (1000, 1000):
            with torch.no_grad():
                q, k, v, _ = layer._heads(torch.randn(2, n, 32))
            state.kept.extend(k.numpy(), v.numpy(), lengths=np.array([n, n]))
            sizes.append(state.nbytes)
    assert sizes[0] == sizes[1] and sizes[3] == 2 * sizes[2] == 2 * 2 * 4 * 1000 * 16 * 4


def test_states_do_not_fit_other_layers():
    layer = make("near")
    state, x = layer.new_state(2), torch.randn(2, 32, dtype=torch.float64)
    changes = {"eps": 0.1}, {"bound": 1.0}, {"near": 5}, {"num_kv_heads": 2}, {"rotary": ropecy.Rotary(8, base=9.0)}
    for change in changes:
        torch.manual_seed(3)
        other = RoPEAttention(32, 4, **({"eps": 1e-4, "bound": 2.0, "near": 9} | change)).double().eval()
        name = "heads" if "num_kv_heads" in change else next(iter(change))
        for call in (lambda layer: layer.step(x, state), lambda layer: layer.extend(x[:, None], state)):
            with pytest.raises(ValueError, match=f"state: got that of a layer with .*{name}=.*, wants"):
                call(other)
    with pytest.raises(ValueError, match=r"state: got that of a layer with .*dtype=torch.float64, wants torch.float32"):
        copy.deepcopy(layer).float().step(x, state)
    with pytest.raises(TypeError, match=r"state: got DecodeState, wants what layer.new_state"):
        layer.step(x, state.kept)
    with pytest.raises(ValueError, match=r"x: got shape \(3, 32\), wants \(2, 32\)"):
        layer.step(torch.zeros(3, 32), state)
    with pytest.raises(ValueError, match=r"x: got shape \(2, 32\), wants \(2, n, 32\)"):
        layer.extend(x, state)
    with pytest.raises(ValueError, match="x: got NaN or Inf in a token that is kept"):
        layer.step(x * torch.nan, state)
    with pytest.raises(ValueError, match=r"active: got torch.int64 of shape \(2,\), wants bool of shape \(2,\)"):
        layer.step(x, state, active=torch.ones(2, dtype=torch.long))
    mask = torch.tensor([[True, False, True], [True, True, True]])
    with pytest.raises(ValueError, match="key_mask: got hidden tokens between kept ones"):
        layer.extend(torch.zeros(2, 3, 32, dtype=torch.float64), state, mask)
    with pytest.raises(ValueError, match="batch: got 0, wants a number of streams"):
        layer.new_state(0)
    with pytest.raises(ValueError, match="causal: got a layer with causal=False"):
        RoPEAttention(32, 4, causal=False).eval().new_state(1)
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 8}
    for bound in (None, 1.0):
        with pytest.raises(ValueError, match="got rope_type 'dynamic', whose angles"):
            RoPEAttention(32, 4, bound=bound, rotary=ropecy.Rotary(8, scaling=dynamic)).eval().new_state(1)
    layer.train()
    for call in (lambda: layer.new_state(1), lambda: layer.step(x, state), lambda: layer.extend(x[:, None], state)):
        with pytest.raises(RuntimeError, match=r"layer: got one in training mode, wants layer.eval\(\)"):
            call()
    assert state.lengths.tolist() == [0, 0]


@pytest.mark.parametrize("name", LAYERS)
def test_reset_parameters_gives_a_fresh_layer(name):
    torch.manual_seed(5)
    fresh = RoPEAttention(32, 4, **LAYERS[name])
    with torch.device("meta"):
        empty = RoPEAttention(32, 4, **LAYERS[name])
    assert all(p.is_meta for p in empty.parameters())
    made = empty.to_empty(device="cpu")
    torch.manual_seed(5)
    made.reset_parameters()
    for (a, p), (b, q) in zip(fresh.named_parameters(), made.named_parameters(), strict=True):
        assert a == b and torch.equal(p, q)
    assert all(p.dim() for p in made.parameters())


def test_weights_from_before_the_near_scale_had_an_axis():
    layer = make("near", torch.float32)
    before = {name: x.reshape(()) if name == "log_scale_near" else x for name, x in layer.state_dict().items()}
    other = RoPEAttention(32, 4, eps=1e-4, **LAYERS["near"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.nn.Sequential(other).load_state_dict({f"0.{name}": x for name, x in before.items()})
    assert torch.equal(other.log_scale_near, torch.tensor([3.0]))
    assert before["log_scale_near"].shape == ()
    x = torch.randn(1, 20, 32)
    torch.testing.assert_close(other(x), layer(x))


def test_weights_of_one_near_scale_load_where_each_head_has_its_own():
    one = make("near")
    each = RoPEAttention(32, 4, eps=1e-4, near_by_head=True, **LAYERS["near"]).double().eval()
    each.load_state_dict(one.state_dict())
    assert torch.equal(each.log_scale_near, torch.full((4,), 3.0, dtype=torch.float64))
    x = torch.randn(1, 20, 32, dtype=torch.float64)
    assert torch.equal(each(x), one(x))
    with pytest.raises(RuntimeError, match="size mismatch for log_scale_near"):
        one.load_state_dict(each.state_dict())
