"""What tests that look inside share: what is measured of a problem, and what the planner chooses for a call."""

import numpy as np

import ropecy
from ropecy.certify.statistics import Statistics
from ropecy.engines.base import Context
from ropecy.planning.planner import choose
from ropecy.problem.call import prepare_for
from ropecy.problem.normal_form import normal_form
from ropecy.problem.request import Request


def measure(problem):
    """Bounds of the scores, keys centred."""
    return Statistics(problem).scores


def measure_values(problem):
    """Where the values lie."""
    return Statistics(problem).values


def chosen_for(problem, **how):
    """What the planner chooses for a problem as it is."""
    return choose(Context.of(problem, Request(**how)))


def chosen(Q, K, V=None, R=None, *, grad=False, **options):
    """What the planner chooses for a call."""
    if isinstance(V, ropecy.Rotary | ropecy.RelativeFamily):
        V, R = None, V
    call = prepare_for("plan", Q, K, V, R, {"method": "auto", **options})
    request = {name: getattr(call.request, name) for name in ("eps", "certify", "method", "degree", "seed")}
    return chosen_for(normal_form(call.problem, grad).problem, grad=grad, **request)


def problem_for(Q, K, V, R=None, **options):
    """The problem of a call, before its normal form."""
    return prepare_for("attention", Q, K, V, R, options).problem


def outputs(found):
    """dq, dk and dv of `InputGradients`."""
    return tuple(np.asarray(X) for X in (found.dq, found.dk, found.dv))
