"""`python -m ropecy plan | map | info`, and what a wrong command gets."""

import sys

import pytest

import ropecy
from ropecy.__main__ import main
from ropecy.cli import progress


def test_info(capsys):
    main(["info"])
    assert capsys.readouterr().out == f"{ropecy.info()}\n"


def test_plan(capsys):
    main(["plan", "--n", "5000", "--d", "4", "--causal", "--grad"])
    output = capsys.readouterr().out
    assert "forward and backward: 1 x 5,000 queries, 1 x 5,000 keys, d = 4, d_v = 4, float32, eps = 0.001" in output
    assert "-> polynomial" in output and "gradient " in output


def test_plan_of_unbounded_scores_is_exact(capsys):
    main(["plan", "--n", "300", "--heads", "3", "--d-v", "5", "--bound", "90", "--dtype", "float64"])
    output = capsys.readouterr().out
    assert "forward: 3 x 300 queries, 3 x 300 keys, d = 8, d_v = 5, float64" in output
    assert "-> exact" in output
    assert "|s| <= 90 " in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "demo | plan | map | bench | info"),
        (["nap"], "invalid choice: 'nap'"),
        (["plan", "--bound", "-1"], "--bound: wants a positive number, got '-1'"),
        (["plan", "--bound", "inf"], "--bound: wants a positive number, got 'inf'"),
        (["plan", "--heads", "0"], "--heads: wants an integer of at least 1, got '0'"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_progress_is_told_on_a_terminal_alone(capsys, monkeypatch):
    assert list(progress.watched("ab", "letters")) == ["a", "b"]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(progress.watched("ab", "letters")) == ["a", "b"]
    told = capsys.readouterr().err
    assert "letters: 1 done" in told and told.endswith(" \r")
