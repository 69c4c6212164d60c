"""register(on_certificate=...): what is certified of each attention of a model."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from small_models import GROUPED, SIZES, make, padded, tokens  # noqa: E402

from ropecy.certificate import Certificate  # noqa: E402
from ropecy.transformers import register  # noqa: E402

CALLS = []


@pytest.fixture
def model():
    register("ropecy-told", eps=1e-2, on_certificate=lambda *call: CALLS.append(call))
    _, ours = make(transformers.LlamaForCausalLM, transformers.LlamaConfig(**SIZES, **GROUPED))
    CALLS.clear()
    return ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", [None, "left"])
def test_certificate_of_each_layer(model, side, dtype):
    model = model.to(dtype)
    mask = None if side is None else padded(side)
    before = model(tokens(3, 21), attention_mask=mask).logits
    assert CALLS == []
    model.set_attn_implementation("ropecy-told")
    logits = model(tokens(3, 21), attention_mask=mask).logits
    torch.testing.assert_close(logits, before, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.1)
    assert [module.layer_idx for module, _ in CALLS] == [0, 1]
    for module, certificate in CALLS:
        assert module is model.model.layers[module.layer_idx].self_attn
        assert isinstance(certificate, Certificate) and certificate.error <= 1e-2
        assert certificate.rows_truncation.shape == (3, 4, 21)


def test_one_for_each_packed_sequence(model):
    model.set_attn_implementation("ropecy-told")
    positions = torch.cat([torch.arange(8), torch.arange(13)])[None]
    model(tokens(1, 21), position_ids=positions, use_cache=False)
    assert [certificate.rows_truncation.shape[-1] for _, certificate in CALLS] == [8, 13] * 2


def test_generation_and_training(model):
    model.set_attn_implementation("ropecy-told")
    model.generate(tokens(1, 5), max_new_tokens=3, do_sample=False)
    assert len(CALLS) == 2 * 3 and {certificate.engine for _, certificate in CALLS} == {"exact"}
    CALLS.clear()
    model(tokens(2, 9)).logits.sum().backward()
    assert len(CALLS) == 2


def test_compiled(model):
    """Certificates are told as they are without torch.compile."""
    model.set_attn_implementation("ropecy-told")
    expected = model(tokens(1, 5), use_cache=False).logits
    torch.testing.assert_close(torch.compile(model, backend="eager")(tokens(1, 5), use_cache=False).logits, expected)
    assert len(CALLS) == 2 * 2


def test_what_cannot_be_called():
    with pytest.raises(TypeError, match="on_certificate: got 3, wants what is called"):
        register("ropecy-told", on_certificate=3)
