"""python -m ropecy.torch_demo: its models are what they are called, and the command runs."""

import copy

import pytest

torch = pytest.importorskip("torch")

from ropecy import demo_model, far_demo, serve_demo, torch_demo  # noqa: E402


def twins(kind, other):
    """Two layers of the same weights, that of `other` with its own forward."""
    torch.manual_seed(3)
    one = demo_model.kinds(4.0)[kind](32, 4, head_dim=8, rotary=demo_model.ROTARY).double()
    two = copy.deepcopy(one)
    two.__class__ = other
    return one, two


def test_ordinary_attention_is_ropecys_exact_layer():
    one, two = twins("ordinary RoPE, exact", demo_model.ByTorch)
    x = torch.randn(2, 90, 32, dtype=torch.float64)
    torch.testing.assert_close(two(x), one(x), rtol=0, atol=1e-6)  # angles are rounded to float32


def test_window_alone_is_the_near_field():
    one, two = twins("near and far, exact", demo_model.WindowAlone)
    x = torch.randn(2, 90, 32, dtype=torch.float64)
    torch.testing.assert_close(two(x)[:, :64], one(x)[:, :64], rtol=0, atol=1e-12)
    assert (two(x) - one(x))[:, 64:].abs().max() > 1e-4
    x[:, 0] = 7.0
    moved = two(x)
    x[:, 0] = -3.0
    assert torch.equal(two(x)[:, 64:], moved[:, 64:])


def test_a_model_predicts_from_what_was_before():
    torch.manual_seed(3)
    text = torch.randint(256, (1, 200))
    other = text.clone()
    other[0, 150:] = 65
    for kind in demo_model.kinds(4.0).values():
        sizes = {"width": 16, "heads": 2, "blocks": 1, "eps": 0.1}
        model = demo_model.Model(kind, demo_model.Bytes(16, hashed=64), 256, **sizes)
        with torch.no_grad():
            torch.testing.assert_close(model(text)[0, :150], model(other)[0, :150], rtol=0, atol=1e-4)


def test_command(tmp_path, capsys):
    sizes = {"context": 300, "steps": 3, "recall-steps": 2, "seeds": 2, "width": 16, "heads": 2, "blocks": 1}
    drawn = tmp_path / "training.png"
    torch_demo.main([*(f"--{name}={size}" for name, size in sizes.items()), f"--plot={drawn}"])
    out = capsys.readouterr().out
    rows = {line[:21].strip(): line[21:].split() for line in out.splitlines()}
    for kind in torch_demo.KINDS:
        one, two, *bits = (float(x) for x in rows[kind][:5])
        assert (one + two) / 2 == pytest.approx((64 * bits[0] + 192 * bits[1] + 44 * bits[2]) / 300, abs=2e-3)
    # Trained by the same windows from the same start.
    assert rows["near and far, ropecy"][:2] == rows["near and far, exact"][:2]
    assert "layer 0   " in out and "error <= " in out
    assert drawn.stat().st_size > 10_000


def test_what_plans_of_heads_save_is_said():
    q, k, v = torch.randn(3, 1, 3, 1500, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64).numpy()
    q, k = (x / (x**2).sum(-1, keepdims=True) ** 0.5 for x in (q, k))
    options = {"scale": 1.0, "eps": 0.1}
    assert torch_demo.saved((q, k, v), options) == "  one plan for all heads"
    q[:, 1] *= 40
    said = torch_demo.saved((q, k, v), options, rounds=1)
    assert "(heads (0, 0), (0, 2) degree " in said and "; head (0, 1) exact), and " in said


def test_serving_is_the_model_and_the_command_runs(tmp_path, capsys):
    """Steps on states give the logits of the whole text; the command trains, saves, loads and prints each way."""
    model, text = torch_demo.to_serve(1, tmp_path / "weights")
    states = serve_demo.States(model, text[:200], 3)
    with torch.no_grad():
        for i in range(200, 210):
            logits = states.step(text[i - 2 : i + 1].expand(3, 3))
        whole = model(text[None, :210])[:, -1:]
    torch.testing.assert_close(logits, whole.expand(3, 1, 256), rtol=0, atol=0.02)
    sizes = {"train-steps": 1, "weights": tmp_path / "weights", "streams": 2, "steps": 3, "plot": tmp_path / "plot.png"}
    pytest.importorskip("matplotlib")
    torch_demo.main(["serve", *(f"--{name}={size}" for name, size in sizes.items()), "--contexts", "70", "200"])
    printed = capsys.readouterr().out
    for way in ("states", "caches"):
        assert printed.count(f"\n{way}") == 2
    assert (tmp_path / "plot.png").stat().st_size > 1000
    own = {line.split()[5] for line in printed.splitlines() if line.startswith("states")}
    assert len(own) == 1  # bytes a stream


def test_the_answer_of_a_series_lies_far_back():
    """What is told is what was first read times the sign of the event, which lies before all that is judged."""
    work = far_demo.Series(2000)
    read, wanted = work.draw(torch.Generator().manual_seed(4))
    first, event = read.unbind(-1)
    assert not event[:, 400:].any()
    assert torch.equal(event.abs().sum(1), torch.tensor([64.0, 64.0]))
    noise = wanted - event.sum(1, keepdim=True).sign() * first
    assert abs(noise.std() - 0.3) < 0.02
    generator, judged = torch.Generator().manual_seed(4), wanted[:, 400 + 128 :]
    assert work.loss(lambda read: torch.zeros(2, 2000, 1), generator) == judged.square().mean()


def test_training_ends_when_its_seconds_are_spent(monkeypatch):
    clock = iter([10.0, 10.0, 11.0, 13.5, 14.0, 99.0])
    monkeypatch.setattr(demo_model.time, "process_time", lambda: next(clock))
    assert list(demo_model.of_seconds(4.0)) == [0.0, 0.25, 0.875]
    assert list(demo_model.of_steps(4)) == [0.0, 0.25, 0.5, 0.75]


def test_kinds_are_trained_for_the_same_seconds_and_the_command_runs(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    torch_demo.main(["far", "--steps=400", "--seconds=0.1", f"--plot={tmp_path / 'far.png'}"])
    printed = capsys.readouterr().out
    for kind in far_demo.RATES:
        rate, steps, loss = printed.partition(f"\n{kind}")[2].split()[:3]
        assert float(rate) == far_demo.RATES[kind] and int(steps) >= 1 and 0.09 < float(loss) < 20
    assert (tmp_path / "far.png").stat().st_size > 1000


@pytest.mark.parametrize("argument, said", [("--steps=399", "got 399, wants at least 400"), ("--seconds=0", "got 0, ")])
def test_sizes_of_the_command_are_checked(argument, said, capsys):
    with pytest.raises(SystemExit):
        torch_demo.main(["far", argument])
    assert f"{argument.partition('=')[0]}: {said}" in capsys.readouterr().err


def test_the_best_rate_is_that_of_the_lowest_median():
    losses = {0.1: (0.2, 0.9, 0.8), 0.01: (0.3, 0.4, 1.0), 0.001: (0.5, 0.5, 0.5)}
    runs = [far_demo.Run("one", rate, seed, loss=loss) for rate, own in losses.items() for seed, loss in enumerate(own)]
    other = far_demo.Run("other", 0.1, 0, loss=0.1)
    assert far_demo.best([*runs, other], "one") == runs[3:6]
    assert far_demo.table([*runs, other]).splitlines()[2].split() == ["one", "0.01", "0", "0.300", "0.400", "1.000"]
