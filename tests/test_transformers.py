"""ropecy.transformers: small random models of six families against transformers' own eager attention."""

import copy

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from small_models import GROUPED, SIZES, make, padded, tokens  # noqa: E402

from ropecy.transformers import register  # noqa: E402

FAMILIES = {
    "llama": ("Llama", GROUPED),
    "mistral": ("Mistral", GROUPED | {"sliding_window": 7}),
    "gpt_neox": ("GPTNeoX", {}),
    "phi": ("Phi", {"num_key_value_heads": 4}),  # rotates half of each head
    "qwen3": ("Qwen3", GROUPED | {"head_dim": 8}),  # normalises queries and keys
    "cohere": ("Cohere", GROUPED),  # interleaved pairs
}


def family(name):
    name, more = FAMILIES[name]
    config = getattr(transformers, name + "Config")(**SIZES, **more)
    return make(getattr(transformers, name + "ForCausalLM"), config)


@pytest.fixture(params=FAMILIES)
def models(request):
    return family(request.param)


def run(model, mask=None, **inputs):
    """Logits of kept tokens, and all gradients of their mean square."""
    model.zero_grad()
    logits = model(**inputs, attention_mask=mask, use_cache=False).logits
    if mask is not None:
        logits = logits[mask.bool()]
    logits.square().mean().backward()
    return [logits.detach()] + [p.grad for p in model.parameters() if p.grad is not None]


def check_same(models, **inputs):
    """Logits to 1e-5, gradients to 1e-5 of the largest."""
    (ours, *our_gradients), (theirs, *their_gradients) = run(models[1], **inputs), run(models[0], **inputs)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    largest = max(g.abs().max().item() for g in their_gradients)
    for a, b in zip(our_gradients, their_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize("side", [None, "left", "right"])
def test_logits_and_gradients(models, side):
    check_same(models, input_ids=tokens(3, 21), mask=None if side is None else padded(side))


def test_window_matters():
    """A mistral without its window has other logits, so the test above would see one that is lost."""
    config = transformers.MistralConfig(**SIZES, **GROUPED, sliding_window=7)
    model = transformers.MistralForCausalLM._from_config(config, attn_implementation="ropecy-exact").eval()
    windowed = model(tokens(1, 21)).logits
    model.config.sliding_window = None
    assert (model(tokens(1, 21)).logits - windowed).abs().max() > 1e-4


def test_packed_sequences(models):
    position_ids = torch.tensor([[*range(5), *range(13), *range(3)], [*range(20), 0]])
    check_same(models, input_ids=tokens(2, 21), position_ids=position_ids)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("side", [None, "left"])
def test_generate(models, side, cache):
    inputs = {"input_ids": tokens(3, 21), "attention_mask": torch.ones_like(padded("left"))}
    if side is not None:
        inputs["attention_mask"] = padded(side)
    options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "output_scores": True}
    options |= {"return_dict_in_generate": True, "cache_implementation": cache}
    theirs, ours = (model.generate(**inputs, **options) for model in models)
    assert torch.equal(ours.sequences, theirs.sequences)
    for a, b in zip(ours.scores, theirs.scores, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_prefill_in_two_parts(models):
    """Queries are at the end of the keys that a cache holds."""
    results = []
    for model in models:
        first = model(tokens(2, 21)[:, :12], use_cache=True)
        results.append(model(tokens(2, 21)[:, 12:], cache=first.cache).logits)
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("padding", [False, True])
def test_two_sided_windows(padding):
    torch.manual_seed(5)
    config = transformers.ModernBertConfig(
        **SIZES, local_attention=8, global_attn_every_n_layers=2, cls_token_id=1, sep_token_id=2
    )
    eager = transformers.ModernBertModel._from_config(config, attn_implementation="eager").eval()
    ours = copy.deepcopy(eager)
    ours.set_attn_implementation("ropecy-exact")
    mask = padded("right") if padding else torch.ones(3, 21, dtype=torch.long)
    a, b = (model(tokens(3, 21), attention_mask=mask).last_hidden_state[mask.bool()] for model in (ours, eager))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_compiled():
    eager, ours = family("mistral")
    keep = padded("right", 2).bool()
    inputs = {"input_ids": tokens(2, 21), "attention_mask": keep.long()}
    a, b = (model(**inputs).logits[keep] for model in (torch.compile(ours, backend="aot_eager"), eager))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_bounded_model_takes_the_polynomial_engine(monkeypatch):
    """Normalised queries and keys bound the scores, and at 8,192 tokens "auto" leaves exact attention behind."""
    from ropecy.engines.polynomial import features

    engines = []
    forward = features.forward
    monkeypatch.setattr(features, "forward", lambda *x, **how: engines.append("polynomial") or forward(*x, **how))
    register("ropecy-certified", eps=1e-3)
    torch.manual_seed(5)
    sizes = SIZES | {"max_position_embeddings": 8192, "num_hidden_layers": 1}
    config = transformers.Qwen3Config(**sizes, **GROUPED, head_dim=8)
    model = transformers.Qwen3Model._from_config(config, attn_implementation="ropecy-exact").eval()
    for norm in (model.layers[0].self_attn.q_norm, model.layers[0].self_attn.k_norm):
        norm.weight.data.fill_(0.5)  # |score| <= sqrt(8) / 4
    with torch.no_grad():
        exact = model(tokens(1, 8192)).last_hidden_state
        assert not engines
        model.set_attn_implementation("ropecy-certified")
        certified = model(tokens(1, 8192)).last_hidden_state
    assert engines
    assert 0 < (certified - exact).abs().max() < 1e-2


class Attends(torch.nn.Module):
    is_causal = True


@pytest.mark.parametrize(
    "more, message",
    [
        ({"softcap": 30.0}, "softcap: Attends wants it"),
        ({"s_aux": torch.zeros(2)}, "s_aux"),
        ({"position_bias": torch.zeros(1, 2, 5, 5)}, "position_bias"),
        ({"dropout": 0.1}, "dropout_p: got 0.1"),
        ({"output_attentions": True}, "output_attentions"),
        ({"attention_mask": torch.zeros(1, 1, 5, 5)}, r"attention_mask: got shape \(1, 1, 5, 5\)"),
        ({"cu_seq_lens_q": torch.tensor([0, 2, 4])}, "cu_seq_lens_q: got packed sequences of 4 tokens"),
    ],
)
def test_refusals(more, message):
    attend = transformers.AttentionInterface()["ropecy-exact"]
    with pytest.raises(NotImplementedError, match=message):
        attend(Attends(), *torch.ones(3, 1, 2, 5, 8), **({"attention_mask": None} | more))


def test_none_and_harmless_arguments_pass():
    attend = transformers.AttentionInterface()["ropecy-exact"]
    harmless = {"softcap": None, "position_ids": torch.arange(5)[None], "use_cache": True, "deterministic": False}
    out, weights = attend(Attends(), *torch.ones(3, 1, 2, 5, 8), None, **harmless)
    assert out.shape == (1, 5, 2, 8) and weights is None


def test_masks_that_are_not_known_are_refused():
    from transformers.masking_utils import create_causal_mask

    config = transformers.LlamaConfig(**SIZES, attn_implementation="ropecy-exact")
    inputs = {"config": config, "inputs_embeds": torch.ones(1, 9, 32), "attention_mask": None, "cache": None}
    with pytest.raises(NotImplementedError, match=r"attention_mask: .*or_masks"):
        create_causal_mask(**inputs, block_sequence_ids=torch.zeros(1, 9, dtype=torch.long))


def test_sinks_of_a_model_are_refused():
    config = transformers.GptOssConfig(
        **SIZES,
        **GROUPED,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=1,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    model = transformers.GptOssForCausalLM._from_config(config, attn_implementation="ropecy-exact")
    with pytest.raises(NotImplementedError, match="s_aux: GptOssAttention wants it"):
        model(tokens(1, 9))


def test_register_refuses_what_attention_refuses():
    with pytest.raises(ValueError, match="method: got str 'fastest'"):
        register("wrong", method="fastest")
    with pytest.raises(ValueError, match="eps: got 2"):
        register("wrong", eps=2.0)
    assert "wrong" not in transformers.AttentionInterface()
