"""varlen_attn: sequences side by side and in pages, against dense attention and PyTorch's of each alone."""

import numpy as np
import oracle
import pytest

torch = pytest.importorskip("torch")

from torch.autograd import forward_ad  # noqa: E402
from torch.nn.attention.bias import causal_lower_right  # noqa: E402
from torch.nn.attention.varlen import AuxRequest  # noqa: E402
from torch_cases import SDPA, check_same  # noqa: E402

import ropecy  # noqa: E402
from ropecy.torch import packed, varlen_attn  # noqa: E402

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
LSE = AuxRequest(lse=True)
# Of queries and of keys: none of one, of both, a single one, more queries than keys, parts and blocks cut anywhere.
Q_LENGTHS, K_LENGTHS = [1, 3, 0, 8, 2, 1, 5, 1, 0], [700, 5, 9, 1300, 0, 1, 3, 64, 0]


def starts(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def draw(q_lengths, k_lengths, heads=4, key_heads=2, d=24, d_v=None, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    shapes = (sum(q_lengths), heads, d), (sum(k_lengths), key_heads, d), (sum(k_lengths), key_heads, d_v or d)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def attend(tensors, q_lengths, k_lengths, **options):
    most = max(q_lengths, default=0), max(k_lengths, default=0)
    return varlen_attn(*tensors, starts(q_lengths), starts(k_lengths), *most, enable_gqa=True, **options)


def paged(x, lengths, page, unused=float("nan")):
    """x in pages of that size, which lie in any order, and their table; `unused` wherever there is no key."""
    counts = [-(-n // page) for n in lengths]
    order = torch.randperm(sum(counts) + 3, generator=torch.Generator().manual_seed(1)).int()
    pool = torch.full((len(order), page, *x.shape[1:]), unused, dtype=x.dtype)
    table = torch.full((len(lengths), max([*counts, 1]) + 1), -7, dtype=torch.int32)
    at = 0
    for s, (n, count) in enumerate(zip(lengths, counts, strict=True)):
        table[s, :count] = order[at : at + count]
        rows = pool.new_full((count * page, *x.shape[1:]), unused)
        rows[:n] = x.split(lengths)[s]
        pool[table[s, :count].long()] = rows.unflatten(0, (count, page)) if count else pool[:0]
        at += count
    return pool, table


def attend_paged(tensors, q_lengths, k_lengths, page, **options):
    q, k, v = tensors
    (keys, table), (values, _) = paged(k, k_lengths, page), paged(v, k_lengths, page)
    most = max(q_lengths), max(k_lengths)
    return varlen_attn(
        q, keys, values, starts(q_lengths), None, *most, enable_gqa=True, seqused_k=torch.tensor(k_lengths),
        block_table=table, **options,
    )  # fmt: skip


def dense(tensors, q_lengths, k_lengths, window_size=(-1, -1), dtype=np.float64, **options):
    """O and lse of each sequence alone, by the oracle."""
    left, right = window_size
    O, lse = [], []
    parts = (x.double().split(n) for x, n in zip(tensors, (q_lengths, k_lengths, k_lengths), strict=True))
    for q, k, v in zip(*parts, strict=True):
        n, n_k = len(q), len(k)
        if n == 0:
            continue
        mask = {"window": (n + n_k if left < 0 else left, n + n_k if right < 0 else right), "q_offset": n_k - n}
        Q, K, V = (x.transpose(0, 1).numpy() for x in (q, k, v))
        if n_k == 0:
            O.append(np.zeros((n, Q.shape[0], V.shape[-1])))
            lse.append(np.full((Q.shape[0], n), -np.inf))
            continue
        found = oracle.attention(Q, K, V, scale=options.get("scale", q.shape[-1] ** -0.5), **mask, dtype=dtype)
        O.append(found.O.swapaxes(0, 1))
        lse.append(found.lse)
    return np.concatenate(O), np.concatenate(lse, axis=1)


def is_decoded(monkeypatch):
    """From here on, a sequence that is not decoded is a failure."""

    def refuse(*_, **__):
        raise AssertionError("a sequence was not decoded")

    monkeypatch.setattr(packed, "attention", refuse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window_size", [(-1, -1), (-1, 0), (4, 0), (70, 3), (-1, 2), (2, -1)], ids=str)
@pytest.mark.parametrize("heads, key_heads, d, d_v", [(4, 2, 24, 24), (8, 8, 64, 64), (6, 1, 3, 5), (32, 16, 16, 8)])
def test_each_sequence_is_attended_as_alone(heads, key_heads, d, d_v, window_size, dtype, monkeypatch):
    lengths = Q_LENGTHS, K_LENGTHS
    if heads // key_heads > 4:
        lengths = [min(n, 5) for n in Q_LENGTHS], K_LENGTHS
    tensors = draw(*lengths, heads, key_heads, d, d_v, dtype)
    is_decoded(monkeypatch)
    O, lse = attend(tensors, *lengths, window_size=window_size, return_aux=LSE)
    expected, expected_lse = dense(tensors, *lengths, window_size)
    assert O.dtype == dtype and O.shape == (sum(lengths[0]), heads, d_v) and O.is_contiguous()
    assert lse.dtype == torch.promote_types(dtype, torch.float32)
    unit = torch.finfo(dtype).eps
    np.testing.assert_allclose(O.double().numpy(), expected, rtol=unit, atol=1e-12 if unit < 1e-10 else 4e-6)
    np.testing.assert_allclose(lse.double().numpy(), expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("page", [1, 3, 16, 100, 2000])
@pytest.mark.parametrize("heads, key_heads, d", [(4, 2, 24), (8, 8, 64), (3, 1, 5), (12, 6, 16)])
def test_pages_change_no_bit(heads, key_heads, d, page, dtype, monkeypatch):
    q_lengths = [min(n, 5) for n in Q_LENGTHS]
    tensors = draw(q_lengths, K_LENGTHS, heads, key_heads, d, dtype=dtype)
    is_decoded(monkeypatch)
    for window_size in ((-1, 0), (50, 0)):
        options = {"window_size": window_size, "return_aux": LSE}
        O, lse = attend(tensors, q_lengths, K_LENGTHS, **options)
        in_pages, lse_in_pages = attend_paged(tensors, q_lengths, K_LENGTHS, page, **options)
        assert torch.equal(in_pages, O) and torch.equal(lse_in_pages, lse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads, key_heads", [(4, 2), (8, 8), (10, 5)])
def test_bits_of_a_sequence_depend_on_nothing_beside_it(heads, key_heads, dtype):
    q_lengths, k_lengths = [1, 4, 1, 2, 40, 300, 40], [9000, 700, 513, 5000, 77, 300, 77]
    tensors = draw(q_lengths, k_lengths, heads, key_heads, dtype=dtype)
    options = {"window_size": (-1, 0), "return_aux": LSE}
    O, lse = attend(tensors, q_lengths, k_lengths, threads=1, **options)
    for threads in (2, 3, 7):
        again, lse_again = attend(tensors, q_lengths, k_lengths, threads=threads, **options)
        assert torch.equal(again, O) and torch.equal(lse_again, lse)
    parts = zip(*(x.split(n) for x, n in zip(tensors, (q_lengths, k_lengths, k_lengths), strict=True)), strict=True)
    for alone, n, n_k, rows in zip(parts, q_lengths, k_lengths, O.split(q_lengths), strict=True):
        assert torch.equal(attend(alone, [n], [n_k], window_size=(-1, 0)), rows)


def test_a_sequence_is_decoded_as_scaled_dot_product_attention_decodes_it():
    tensors = draw([3, 1], [800, 31])
    O = attend(tensors, [3, 1], [800, 31], window_size=(-1, 0))
    n, n_k = [3, 1], [800, 31]
    parts = (x.split(lengths) for x, lengths in zip((*tensors, O), (n, n_k, n_k, n), strict=True))
    for q, k, v, rows in zip(*parts, strict=True):
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        alone = ropecy.torch.scaled_dot_product_attention(
            q, k, v, is_causal=True, q_offset=k.shape[-2] - q.shape[-2], enable_gqa=True
        )
        assert torch.equal(alone.transpose(0, 1), rows)


@pytest.mark.parametrize("odd", ["far values", "huge keys", "many queries"])
def test_what_one_sequence_needs_changes_no_bit_of_another(odd):
    q_lengths, k_lengths = [1, 60 if odd == "many queries" else 1, 2], [600, 700, 50]
    q, k, v = draw(q_lengths, k_lengths)
    alone = attend([q[:1], k[:600], v[:600]], [1], [600]), attend([q[-2:], k[-50:], v[-50:]], [2], [50])
    if odd == "far values":
        v[600:-50] += 4096
    elif odd == "huge keys":
        k[600:-50] *= 1e30
    O = attend((q, k, v), q_lengths, k_lengths, method="exact")
    assert torch.equal(O[:1], alone[0]) and torch.equal(O[-2:], alone[1])
    expected, _ = dense((q, k, v), q_lengths, k_lengths)
    np.testing.assert_allclose(O.numpy(), expected, rtol=1e-6, atol=1e-4)


def by_sdpa(q_lengths, k_lengths, causal):
    """A loop of PyTorch's attention over sequences."""

    def function(*tensors):
        rows = []
        parts = (x.split(n) for x, n in zip(tensors, (q_lengths, k_lengths, k_lengths), strict=True))
        for q, k, v in zip(*parts, strict=True):
            mask = causal_lower_right(len(q), len(k)) if causal else None
            q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
            rows.append(SDPA(q, k, v, mask, enable_gqa=True)[0].transpose(0, 1))
        return torch.cat(rows)

    return function


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rows", ["few", "many"])
def test_results_and_gradients_are_those_of_a_loop_of_sdpa(rows, causal):
    lengths = ([1, 3, 8, 1], [700, 9, 1300, 1]) if rows == "few" else ([100, 33, 1, 257], [100, 70, 40, 300])
    tensors = [x.requires_grad_() for x in draw(*lengths)]
    window = (-1, 0) if causal else (-1, -1)
    ours = lambda *tensors: attend(tensors, *lengths, window_size=window)  # noqa: E731
    check_same(ours, by_sdpa(*lengths, causal), tensors, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window_size", [(-1, -1), (-1, 0), (5, 0), (9, 4)])
def test_gradients_of_finite_differences(window_size):
    lengths = [2, 0, 5, 1, 3], [4, 3, 2, 0, 3]
    tensors = [x.requires_grad_() for x in draw(*lengths, d=4, dtype=torch.float64)]
    function = lambda *tensors: attend(tensors, *lengths, window_size=window_size, method="exact")  # noqa: E731
    assert torch.autograd.gradcheck(function, tensors)
    O, lse = attend(tensors, *lengths, return_aux=LSE)
    assert O.requires_grad and not lse.requires_grad


def test_a_rotary_rotates_by_positions_within_a_sequence():
    lengths = [1, 20, 3], [30, 20, 3]
    tensors, R = draw(*lengths, dtype=torch.float64), ropecy.Rotary(24)
    rows = []
    parts = (x.split(n) for x, n in zip(tensors, (lengths[0], lengths[1], lengths[1]), strict=True))
    for q, k, v in zip(*parts, strict=True):
        first = len(k) - len(q)
        q = torch.from_numpy(R.rotate(q.transpose(0, 1).numpy(), np.arange(first, len(k))))
        k = torch.from_numpy(R.rotate(k.transpose(0, 1).numpy()))
        rows.append(SDPA(q, k, v.transpose(0, 1), causal_lower_right(len(q[0]), len(k[0])), enable_gqa=True))
    expected = torch.cat([x.transpose(0, 1) for x in rows])
    for method in ("exact", "auto"):
        O = attend(tensors, *lengths, window_size=(-1, 0), rotary=R, method=method)
        torch.testing.assert_close(O, expected, atol=1e-3 if method == "auto" else 1e-12, rtol=0)


def test_keys_past_those_in_use_and_outside_of_windows_are_not_read(monkeypatch):
    room, used = [40, 700, 9], [30, 600, 0]
    q, k, v = draw([1, 2, 1], room)
    clean = [x.clone() for x in (k, v)]
    for x in (k, v):
        for s, (first, n) in enumerate(zip([0, 40, 740], room, strict=True)):
            x[first + used[s] : first + n] = torch.nan
        x[40 : 40 + 600 - 100] = torch.inf
    is_decoded(monkeypatch)
    options = {"seqused_k": torch.tensor(used), "window_size": (50, 0)}
    O = attend((q, k, v), [1, 2, 1], room, **options)
    assert torch.equal(O, attend((q, *clean), [1, 2, 1], room, **options)) and not O[3].any()


@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("many", [False, True])
def test_nan_in_what_is_read_is_refused(name, many):
    lengths = [1, 30 if many else 2], [600, 700]
    tensors = draw(*lengths)
    tensors[["query", "key", "value"].index(name)][-1, 1, 3] = torch.nan
    with pytest.raises(ValueError, match=rf"^{ {'query': 'Q', 'key': 'K', 'value': 'V'}[name]}: got NaN"):
        attend(tensors, *lengths)


@pytest.mark.parametrize("page", [None, 16])
def test_many_queries_beside_few_ones(page):
    lengths = [1, 200, 1, 17], [500, 300, 40, 17]
    tensors = draw(*lengths, dtype=torch.float64)
    options = {"window_size": (-1, 0), "method": "exact"}
    O = attend(tensors, *lengths, **options)
    if page is not None:
        assert torch.equal(attend_paged(tensors, *lengths, page, **options), O)
    np.testing.assert_allclose(O.numpy(), dense(tensors, *lengths, (-1, 0))[0], atol=1e-12)


@pytest.mark.parametrize("seed", range(30))
def test_random_problems(seed):
    """Of few and of many queries: against the oracle, in pages, and each sequence alone."""
    rng = np.random.default_rng(seed)
    key_heads, group = int(rng.choice([1, 2, 3, 8])), int(rng.choice([1, 2, 4, 8]))
    q_lengths = rng.choice([0, 1, 1, 2, 5, 8] if seed % 3 else [0, 1, 3, 9, 40, 130], rng.integers(1, 8)).tolist()
    k_lengths = [int(10 ** rng.uniform(0, 3.3)) - 1 for _ in q_lengths]
    d, d_v, dtype = int(rng.choice([1, 8, 20, 64])), int(rng.choice([1, 8, 20])), DTYPES[rng.integers(4)]
    tensors = draw(q_lengths, k_lengths, key_heads * group, key_heads, d, d_v, dtype)
    window_size = int(rng.choice([-1, 0, 3, 100])), int(rng.choice([-1, 0, 0, 5]))
    options = {"window_size": window_size, "method": "exact", "return_aux": LSE, "threads": int(rng.integers(1, 4))}
    O, lse = attend(tensors, q_lengths, k_lengths, **options)
    in_pages, lse_in_pages = attend_paged(tensors, q_lengths, k_lengths, int(rng.choice([1, 7, 16])), **options)
    assert torch.equal(in_pages, O) and torch.equal(lse_in_pages, lse)
    parts = (x.split(n) for x, n in zip((*tensors, O), (q_lengths, k_lengths, k_lengths, q_lengths), strict=True))
    for n, n_k, *alone, rows in zip(q_lengths, k_lengths, *parts, strict=True):
        assert torch.equal(attend(alone, [n], [n_k], **options)[0], rows)
    if sum(q_lengths):
        expected, unit = dense(tensors, q_lengths, k_lengths, window_size)[0], torch.finfo(dtype).eps
        atol = 1e-12 if dtype == torch.float64 else 5e-6
        np.testing.assert_allclose(O.double().numpy(), expected, rtol=unit, atol=atol)


def test_ten_thousand_sequences_of_ten_tokens():
    lengths = [1] * 10_000, [10] * 10_000
    q, k, v = draw(*lengths, heads=2, key_heads=1, d=16)
    O = attend((q, k, v), *lengths)
    S = torch.einsum("shd,std->sht", q.double(), k[:, 0].double().unflatten(0, (-1, 10))) / 4
    expected = torch.einsum("sht,std->shd", S.softmax(-1), v[:, 0].double().unflatten(0, (-1, 10)))
    torch.testing.assert_close(O.double(), expected, atol=2e-6, rtol=0)


def test_no_sequences_and_rows_past_the_last():
    q, k, v = draw([5], [7])
    O, lse = varlen_attn(q, k, v, torch.tensor([0]), torch.tensor([0]), 0, 0, enable_gqa=True, return_aux=LSE)
    assert not O.any() and torch.isneginf(lse).all()
    O = varlen_attn(q, k, v, torch.tensor([0, 2]), torch.tensor([0, 6]), 2, 6, enable_gqa=True)
    assert O[:2].all() and not O[2:].any()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend):
    lengths = [1, 3, 20], [70, 9, 30]
    tensors = [x.requires_grad_() for x in draw(*lengths)]
    function = lambda *tensors: attend(tensors, *lengths, window_size=(-1, 0))  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    check_same(compiled, function, tensors, atol=0, rtol=0)


def test_the_operator_keeps_pytorchs_rules():
    lengths = [1, 3, 20], [70, 9, 30]
    tensors = [x.requires_grad_() for x in draw(*lengths, d=8)]
    places = starts(lengths[0]), starts(lengths[1]), None, None, 20, 70
    inputs = (*tensors, *places, [-1, 0], None, 0.3, 1e-3, "exact", 1)
    torch.library.opcheck(torch.ops.ropecy.varlen_attention.default, inputs)


def test_derivatives_that_there_are_not():
    q, k, v = draw([2], [5])
    function = lambda q: attend((q, k, v), [2], [5])  # noqa: E731
    assert torch.func.grad(lambda q: function(q).sum())(q).shape == q.shape
    with pytest.raises(NotImplementedError, match="varlen_attn: got a derivative in forward mode"):
        torch.func.jvp(function, (q,), (q,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward mode"):
        function(forward_ad.make_dual(q, q))
    x = q.clone().requires_grad_()
    (g,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="first order only"):
        g.sum().backward()


def given(**changes):
    """Arguments of two sequences, changed."""
    q, k, v = draw([1, 2], [20, 30])
    names = {"query": q, "key": k, "value": v, "cu_seq_q": starts([1, 2]), "cu_seq_k": starts([20, 30])}
    return names | {"max_q": 2, "max_k": 30, "enable_gqa": True} | changes


POOL = torch.ones(4, 16, 2, 24)
PAGES = {"key": POOL, "value": POOL, "cu_seq_k": None, "seqused_k": torch.tensor([20, 30])}
TABLE = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"query": torch.ones(3, 24)}, ValueError, r"query: got shape \(3, 24\), wants \(tokens, heads, width\)"),
        ({"key": torch.ones(1, 50, 2, 24)}, ValueError, r"key: got shape .*, wants \(tokens, heads, width\)"),
        ({"key": torch.ones(50, 2, 23)}, ValueError, "key: got width 23, wants 24 as query has"),
        ({"value": torch.ones(49, 2, 24)}, ValueError, r"value: got shape \(49, 2, 24\), wants \(50, 2, _\)"),
        ({"key": torch.ones(50, 2, 24).half()}, TypeError, "key: got torch.float16, wants torch.float32 as query has"),
        ({"query": torch.ones(3, 4, 24).int()}, TypeError, "query: got torch.int32, wants float32"),
        ({"enable_gqa": False}, ValueError, "key: got 2 heads beside 4 of query, wants as many, or enable_gqa=True"),
        ({"query": torch.ones(3, 3, 24)}, ValueError, "key: got 2 heads, wants a divisor of the 3 heads of query"),
        ({"cu_seq_q": torch.ones(3)}, TypeError, "cu_seq_q: got torch.float32, wants int32 or int64"),
        ({"cu_seq_q": torch.tensor([1, 2, 3])}, ValueError, "cu_seq_q: got 1 at first, wants 0"),
        ({"cu_seq_q": torch.tensor([0, 2, 1])}, ValueError, "cu_seq_q: got 1 after 2, wants numbers that do not fall"),
        ({"cu_seq_q": torch.tensor([0, 2, 4])}, ValueError, "cu_seq_q: got 4 at last, wants 3 at most"),
        ({"cu_seq_q": torch.tensor([], dtype=torch.int32)}, ValueError, r"cu_seq_q: got shape \(0,\)"),
        ({"cu_seq_k": starts([50])}, ValueError, r"cu_seq_k: got shape \(2,\), wants \(3,\)"),
        ({"cu_seq_k": None}, ValueError, "cu_seq_k: got None, wants where the keys of each sequence begin"),
        ({"cu_seq_k": starts([20, 31])}, ValueError, "cu_seq_k: got 51 at last, wants 50 at most"),
        ({"max_q": 1}, ValueError, "max_q: got 1, wants 2 at least"),
        ({"max_k": 29}, ValueError, "max_k: got 29, wants 30 at least"),
        ({"seqused_k": torch.tensor([20, 31])}, ValueError, "seqused_k: got 31 for sequence 1, wants .* from 0 to 30"),
        ({"seqused_k": torch.tensor([-1, 3])}, ValueError, "seqused_k: got -1 for sequence 0"),
        ({"seqused_k": torch.tensor([3])}, ValueError, r"seqused_k: got shape \(1,\), wants \(2,\)"),
        ({"block_table": TABLE}, ValueError, r"key: got shape \(50, 2, 24\), wants \(pages, page, heads, width\)"),
        (PAGES | {"block_table": TABLE, "seqused_k": None}, ValueError, "seqused_k: got None beside block_table"),
        (PAGES | {"block_table": TABLE.long()}, TypeError, "block_table: got torch.int64, wants int32"),
        (PAGES | {"block_table": TABLE[:1]}, ValueError, r"block_table: got shape \(1, 2\), wants \(2, pages\)"),
        (PAGES | {"block_table": TABLE + 1}, ValueError, "block_table: got page 4 for sequence 1, wants .* 0 to 3"),
        (PAGES | {"block_table": TABLE - 1}, ValueError, "block_table: got page -1 for sequence 0"),
        (PAGES | {"block_table": TABLE[:, :1]}, ValueError, "seqused_k: got 20 for sequence 0, wants .* 0 to 16"),
        ({"window_size": (1,)}, ValueError, r"window_size: got \(1,\), wants a pair"),
        ({"window_size": (-2, 0)}, ValueError, r"window_size: got \(-2, 0\), wants numbers of keys, or -1"),
        ({"eps": 0.0}, ValueError, "eps: got 0.0"),
        ({"method": "flash"}, ValueError, "method: got str 'flash'"),
        ({"threads": 0}, ValueError, "threads: got 0"),
        ({"scale": float("nan")}, ValueError, "scale: got nan"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else None,
)
def test_what_is_refused(changes, error, message):
    with pytest.raises(error, match=f"^{message}"):
        varlen_attn(**given(**changes))


@pytest.mark.parametrize("changes", [{"seqused_k": torch.tensor([3, 4])}, PAGES | {"block_table": TABLE}])
def test_gradients_of_inference_are_refused(changes):
    arguments = given(**changes)
    arguments["query"].requires_grad_()
    with pytest.raises(RuntimeError, match=r"^seqused_k: .* it is inference-only"):
        varlen_attn(**arguments)
    with torch.no_grad():
        assert varlen_attn(**arguments).shape == arguments["query"].shape
