"""What transformers says in a mask, and what it leaves to the attention without one: done as eager does, or refused."""

import functools

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from small_models import GROUPED, SIZES, make, padded, tokens  # noqa: E402
from transformers import masking_utils as masks  # noqa: E402
from transformers.models.gemma3 import modeling_gemma3 as gemma3  # noqa: E402
from transformers.models.t5gemma2 import modeling_t5gemma2 as t5gemma2  # noqa: E402

from ropecy.transformers.described_mask import Band, DescribedMask  # noqa: E402
from ropecy.transformers.mask_functions import describe  # noqa: E402

ATTEND = transformers.AttentionInterface()["ropecy-exact"]
POSITIONS = torch.tensor([[*range(4), *range(5), *range(3)], [*range(2), *range(10)]])
PACKED = masks.find_packed_sequence_indices(POSITIONS)
FUNCTIONS = {
    "causal": masks.causal_mask_function,
    "two-sided": masks.bidirectional_mask_function,
    "window": masks.sliding_window_causal_mask_function(3),
    "two-sided window": masks.sliding_window_bidirectional_mask_function(3),
    "union of windows": masks.or_masks(
        masks.sliding_window_causal_mask_function(4), gemma3._bidirectional_window_overlay(4)
    ),
    "causal or always": masks.or_masks(masks.causal_mask_function, lambda *_: torch.tensor(True)),
    "lopsided window": masks.and_masks(
        masks.bidirectional_mask_function, t5gemma2.sliding_window_mask_function(5, is_causal=False)
    ),
    "chunks": masks.chunked_causal_mask_function(4, torch.tensor([0, 3])),
    "no blocks": masks.or_masks(masks.causal_mask_function, masks.blockwise_overlay(torch.full((2, 13), -1))),
    "packed": masks.and_masks(
        masks.remap_positions_for_packed_sequence(masks.sliding_window_causal_mask_function(3), POSITIONS),
        masks.packed_sequence_mask_function(PACKED),
    ),
    "packed, two-sided": masks.and_masks(
        masks.bidirectional_mask_function, masks.packed_sequence_mask_function(PACKED)
    ),
}
SIZE = {"whole": (12, 12, 0, 0), "after a cache": (4, 13, 9, 0), "one query": (1, 12, 9, 0), "keys cut": (3, 9, 10, 4)}
CASES = [(name, size) for name in FUNCTIONS for size in SIZE if size == "whole" or not name.startswith("packed")]
every_case = pytest.mark.parametrize("name, size", CASES)


def arguments(name, size, side=None):
    q_length, kv_length, q_offset, kv_offset = SIZE[size]
    keep = torch.ones(2, kv_offset + kv_length, dtype=torch.bool)
    if side is not None:
        keep[1, slice(None, 5) if side == "left" else slice(-5, None)] = False
    return {
        "batch_size": 2,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": FUNCTIONS[name],
        "attention_mask": None if side is None else keep,
    }


@every_case
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_description_is_the_mask_of_eager_attention(name, size, side):
    given = arguments(name, size, side)
    assert torch.equal(describe(**given).dense(), masks.eager_mask(**given))


@every_case
@pytest.mark.parametrize("side", [None, "right"])
def test_attention_of_a_description(name, size, side):
    """Against PyTorch's attention in float64 with the dense mask; rows that see no key are 0 in both."""
    given = arguments(name, size, side)
    q = torch.randn(2, 4, given["q_length"], 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, given["kv_length"], 8, dtype=torch.float64)
    seen = masks.sdpa_mask(**given, allow_is_causal_skip=False)
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True, scale=0.7)
    theirs = torch.where(seen.any(-1, keepdim=True), theirs, 0)
    ours, _ = ATTEND(torch.nn.Module(), q, k, v, describe(**given), scaling=0.7, is_causal=False, sliding_window=2)
    torch.testing.assert_close(ours.transpose(1, 2), theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    "part",
    [
        lambda x: x[:, :, :, :12],
        lambda x: x[1:],
        lambda x: x[:, :, 3:8],
        lambda x: x[:, :, 2:-2, :10],
        lambda x: x[..., :],
        lambda x: x.to(torch.float64),
        lambda x: x.contiguous().detach(),
    ],
)
def test_slices_and_copies_stay_descriptions(name, part):
    mask = describe(**arguments(name, "whole", "right"))
    assert isinstance(part(mask), DescribedMask)
    dense = part(mask.dense())
    assert torch.equal(part(mask).dense().clamp(-1), dense.clamp(-1))
    assert part(mask).dtype == dense.dtype


def test_other_operations_have_the_entries():
    """A model with attention code of its own adds the mask to scores, or asks what it hides."""
    mask = describe(**arguments("window", "whole", "left"))
    dense = mask.dense()
    assert torch.equal(torch.ones(12) + mask, 1 + dense)
    assert torch.equal(mask[:, 0] < 0, dense[:, 0] < 0)
    assert torch.equal(torch.zeros(2, 3, 12, 12).masked_fill(mask != 0, 1.0), (dense != 0).float().expand(2, 3, 12, 12))
    assert "band=" not in repr(mask) and "DescribedMask(shape=(2, 1, 12, 12), Band(low=-2, high=0" in repr(mask)


@pytest.mark.parametrize(
    "function, name",
    [
        (lambda b, h, q, k: (k <= q) & ((q - k) % 2 == 0), "<lambda>"),
        (lambda b, h, q, k: k // 3 == q // 3, "<lambda>"),
        (lambda b, h, q, k: k < q, "<lambda>"),
        (lambda b, h, q, k: k <= torch.where(q == 6, q + 1, q), "<lambda>"),
        (masks.or_masks(masks.causal_mask_function, masks.blockwise_overlay(torch.zeros(1, 12))), "or_masks"),
        (masks.remap_positions_for_packed_sequence(masks.causal_mask_function, POSITIONS), "remap_positions"),
        (functools.partial(masks.causal_mask_function), "functools.partial"),
    ],
)
def test_what_is_no_band_is_refused(function, name):
    with pytest.raises(NotImplementedError, match=f"attention_mask: the model makes it by .*{name}.*, and ropecy"):
        describe(1, 12, 12, mask_function=function)


def test_packed_sequences_in_pieces_are_refused():
    pieces = masks.packed_sequence_mask_function(torch.tensor([[0, 0, 1, 0]]))
    with pytest.raises(NotImplementedError, match="packed sequences in pieces, wants each in one piece"):
        ATTEND(torch.nn.Module(), *torch.ones(3, 1, 2, 4, 8), describe(1, 4, 4, mask_function=pieces))


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("high", [0, 2, None])
@pytest.mark.parametrize("low", [-3, None])
@pytest.mark.parametrize("n", [3, 12])
@pytest.mark.parametrize("n_k, offset", [(12, 0), (15, 0), (15, 3)])
def test_packed_sequences_of_every_band(n, n_k, offset, low, high, hidden):
    """One call takes those whose last query is the token of the last key; the others are taken one by one."""
    sequence = torch.tensor([[0] * 5 + [1] * 2 + [2] * 8, [0] + [1] * 13 + [2]])[:, :n_k]
    offset = min(offset, n_k - n) if n == 12 else n_k - n
    kept = torch.rand(2, n_k, generator=torch.Generator().manual_seed(2)) < 0.8 if hidden else None
    mask = DescribedMask((2, 1, n, n_k), torch.bool, torch.device("cpu"), Band(low, high, offset), kept, sequence)
    torch.manual_seed(4)
    q, k, v = (torch.randn(2, heads, rows, 8) for heads, rows in ((4, n), (2, n_k), (2, n_k)))
    j, i = torch.arange(n_k), torch.arange(n)[:, None] + offset
    seen = (j - i >= (-99 if low is None else low)) & (j - i <= (99 if high is None else high))
    seen = seen & (sequence[:, None, :] == sequence[:, offset : offset + n, None])
    seen = (seen if kept is None else seen & kept[:, None, :])[:, None]
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True)
    expected = torch.where(seen.any(-1, keepdim=True), expected, 0).transpose(1, 2)
    torch.testing.assert_close(ATTEND(torch.nn.Module(), q, k, v, mask)[0], expected, rtol=0, atol=1e-5)


def test_packed_sequences_are_one_call(monkeypatch):
    monkeypatch.setattr("ropecy.transformers.attention._attend", None)
    x = torch.randn(3, 2, 2, 12, 8)
    mask = describe(2, 12, 12, mask_function=packed_causal(torch.tensor([[0] * 5 + [1] * 7, [0] * 12])))
    assert ATTEND(torch.nn.Module(), *x, mask)[0].shape == (2, 12, 2, 8)


def test_packed_sequences_of_a_band_without_its_diagonal_are_refused():
    sequence = torch.tensor([[0] * 5 + [1] * 7])
    mask = DescribedMask((1, 1, 12, 12), torch.bool, torch.device("cpu"), Band(None, -1, 0), None, sequence)
    with pytest.raises(ValueError, match="window: got -1"):
        ATTEND(torch.nn.Module(), *torch.randn(3, 1, 2, 12, 8), mask)


def packed_causal(sequence):
    return masks.and_masks(masks.causal_mask_function, masks.packed_sequence_mask_function(sequence))


def test_a_mask_of_other_sizes_is_refused():
    with pytest.raises(NotImplementedError, match="got one of 4 queries and 6 keys beside 4 queries and 4 keys"):
        ATTEND(torch.nn.Module(), *torch.ones(3, 1, 2, 4, 8), describe(1, 4, 6))


QWEN2_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "max_window_layers": 1}
QWEN2_MOE |= {"use_sliding_window": True, "sliding_window": 4, "shared_expert_intermediate_size": 16}
SEQ2SEQ = {"vocab_size": 61, "d_model": 32, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1}
for part in ("encoder", "decoder"):
    SEQ2SEQ |= {f"{part}_layers": 2, f"{part}_attention_heads": 4, f"{part}_ffn_dim": 40, f"{part}_layerdrop": 0.0}
MODELS = {
    "window that only the mask knows": ("Qwen2MoeForCausalLM", GROUPED | QWEN2_MOE),
    "no is_causal": ("SplinterModel", {}),
    "causality that only the mask knows": (
        "NllbMoeForConditionalGeneration",
        SEQ2SEQ | {"num_experts": 2, "router_dtype": "float32", "expert_capacity": 64},
    ),
    "attention code of its own": (
        "BigBirdPegasusForConditionalGeneration",
        SEQ2SEQ | {"attention_type": "original_full"},
    ),
    "float key mask": ("LayoutLMModel", {"max_2d_position_embeddings": 64}),
    "union of windows": (
        "Gemma3TextModel",
        GROUPED
        | {"head_dim": 8, "sliding_window": 5, "use_bidirectional_attention": True, "sliding_window_pattern": 2},
    ),
    "chunks": (
        "Llama4ForCausalLM",
        GROUPED
        | {
            "head_dim": 8,
            "attention_chunk_size": 6,
            "intermediate_size_mlp": 40,
            "num_local_experts": 2,
            "moe_layers": [],
        }
        | {"layer_types": ["chunked_attention", "full_attention"]},
    ),
}


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_models(name, side):
    model, sizes = MODELS[name]
    model = getattr(transformers, model)
    more = {} if "d_model" in sizes else SIZES
    config = model.config_class(**(more | sizes))
    eager, ours = make(model, config)
    keep = padded(side, 3) if side else torch.ones(3, 21, dtype=torch.long)
    inputs = {"input_ids": tokens(3, 21), "attention_mask": keep if side else None}
    if "d_model" in sizes:
        inputs["decoder_input_ids"] = tokens(3, 9)
        keep = torch.ones(3, 9)
    with torch.no_grad():
        a, b = (model(**inputs, use_cache=False)[0][keep.bool()] for model in (ours, eager))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * max(1, b.abs().max().item()))


@pytest.mark.parametrize("side", [None, "left"])
def test_generate_with_a_window_that_only_the_mask_knows(side):
    config = transformers.Qwen2MoeConfig(**SIZES, **GROUPED, **QWEN2_MOE)
    eager, ours = make(transformers.Qwen2MoeForCausalLM, config)
    inputs = {"input_ids": tokens(3, 21), "attention_mask": padded(side) if side else torch.ones(3, 21)}
    options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "output_scores": True}
    for cache in ("dynamic", "static"):
        a, b = (
            m.generate(**inputs, **options, return_dict_in_generate=True, cache_implementation=cache)
            for m in (ours, eager)
        )
        assert torch.equal(a.sequences, b.sequences)
        torch.testing.assert_close(torch.stack(a.scores), torch.stack(b.scores), rtol=0, atol=1e-5)


def test_biases_by_key_and_head_are_refused_by_name():
    config = transformers.DogeConfig(**SIZES, **GROUPED)
    _, ours = make(transformers.DogeForCausalLM, config)
    for keep in (None, padded("left")):
        with pytest.raises(NotImplementedError, match=r"attention_mask: got shape \(3, 4, 21, 21\), wants"):
            ours(tokens(3, 21), attention_mask=keep)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.float16])
def test_dense_key_masks(dtype):
    q, k, v = torch.randn(3, 2, 4, 9, 8)
    keep = torch.arange(9) < torch.tensor([[9], [5]])
    mask = keep if dtype == torch.bool else torch.where(keep, 0.0, torch.finfo(dtype).min).to(dtype)
    ours, _ = ATTEND(torch.nn.Module(), q, k, v, mask[:, None, None])
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, keep[:, None, None])
    torch.testing.assert_close(ours.transpose(1, 2), theirs, rtol=0, atol=1e-6)
    with pytest.raises(NotImplementedError, match="attention_mask: got a bias of keys, wants 0 for those"):
        ATTEND(torch.nn.Module(), q, k, v, torch.full((2, 1, 1, 9), -1.0))


class Attends(torch.nn.Module):
    """What transformers hands to an attention as the module it belongs to."""

    def __init__(self, **attributes):
        super().__init__()
        self.__dict__.update(attributes)


@pytest.mark.parametrize("n, n_k", [(9, 9), (5, 9), (1, 9), (9, 5)])
@pytest.mark.parametrize(
    "attributes, given",
    [
        ({"is_causal": True}, {}),
        ({"is_causal": False}, {}),
        ({}, {"is_causal": True}),
        ({"is_causal": True}, {"is_causal": False}),
    ],
)
def test_without_a_mask_as_sdpa(attributes, given, n, n_k):
    q, (k, v) = torch.randn(2, 4, n, 8), torch.randn(2, 2, 4, n_k, 8)
    sdpa = transformers.AttentionInterface()["sdpa"]
    ours, theirs = (f(Attends(**attributes), q, k, v, None, **given)[0] for f in (ATTEND, sdpa))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_what_is_open_without_a_mask_is_refused():
    x = torch.ones(3, 1, 2, 9, 8)
    with pytest.raises(NotImplementedError, match=r"is_causal: Attends gives .* neither a mask nor is_causal"):
        ATTEND(Attends(), *x, None)
    with pytest.raises(NotImplementedError, match="sliding_window: Attends wants one of 4 without a mask"):
        ATTEND(Attends(is_causal=True), *x, None, sliding_window=4)
    ATTEND(Attends(is_causal=True), *x, None, sliding_window=9)


def test_lengths_of_packed_sequences():
    """Beside an empty cache, transformers makes one causal mask of the row, and the lengths come by themselves."""
    config = transformers.LlamaConfig(**SIZES, **GROUPED)
    _, ours = make(transformers.LlamaForCausalLM, config)
    ids, positions = tokens(1, 21), torch.tensor([[*range(5), *range(13), *range(3)]])
    lengths = torch.tensor([0, 5, 18, 21])
    packed = {"position_ids": positions, "cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths}
    theirs = [ours(ids[:, a:b]).logits for a, b in ((0, 5), (5, 18), (18, 21))]
    for use_cache in (False, True):
        out = ours(ids, **packed, use_cache=use_cache)
        torch.testing.assert_close(out.logits, torch.cat(theirs, 1), rtol=0, atol=1e-5)
    with pytest.raises(NotImplementedError, match=r"cu_seq_lens_q: got packed sequences of 21 .*use_cache=False"):
        ours(ids, **packed, cache=out.cache)


def compiled(model):
    torch._dynamo.reset()
    return torch.compile(model, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize("side", [None, "left", "right"])
def test_compiled_into_one_graph(side):
    eager, ours = make(transformers.LlamaForCausalLM, transformers.LlamaConfig(**SIZES, **GROUPED))
    keep = padded(side, 2) if side else torch.ones(2, 21, dtype=torch.long)
    inputs = {"input_ids": tokens(2, 21), "attention_mask": keep if side else None}
    a, b = (model(**inputs).logits[keep.bool()] for model in (compiled(ours), eager))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_compiled_code_takes_a_description():
    mask = describe(**arguments("window", "whole", "right"))
    x = torch.randn(3, 2, 2, 12, 8)
    attend = compiled(lambda *given: ATTEND(torch.nn.Module(), *given)[0])
    for given in (mask, describe(2, 12, 12)):  # one with tensors within, and one without
        torch.testing.assert_close(attend(*x, given), ATTEND(torch.nn.Module(), *x, given)[0])


def test_cost_grows_with_the_tokens():
    """No n x n_k array at 100,000 tokens, which would be 10 GB; nor is a mask of a model's own measured by one."""
    n = 100_000
    for name in ("causal", "window", "union of windows", "lopsided window", "causal or always"):
        mask = describe(1, n, n, mask_function=FUNCTIONS[name], attention_mask=torch.ones(1, n, dtype=torch.bool))
        assert mask.shape == (1, 1, n, n) and mask.kept is None and mask.sequence is None
    assert mask.band == Band()
