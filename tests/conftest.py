"""Fixtures that every test file may use, and the same examples on every run but for a hunt."""

import os

import numpy as np
import pytest
from hypothesis import settings
from oracle import Alibi, Buckets, Family, Kerple, Rope, Table

settings.register_profile("ropecy", deadline=None, derandomize="ROPECY_HUNT" not in os.environ)
settings.load_profile("ropecy")


@pytest.fixture
def rng():
    """Random numbers, the same on every run."""
    return np.random.default_rng(20241222)


@pytest.fixture(params=[1, 2, 3], ids="threads={}".format)
def threads(request):
    """One, two and three threads: three splits the work unevenly on most machines."""
    return request.param


def rotary(rope):
    """The package's Rotary that stands for the oracle's Rope."""
    import ropecy

    scaling = None
    if rope.attention_factor != 1.0:
        # Factors of one leave the frequencies as they are, so this is the attention factor alone.
        pairs = (rope.rotary_dim or rope.d) // 2
        ones = [1.0] * pairs
        scaling = {
            "rope_type": "longrope",
            "short_factor": ones,
            "long_factor": ones,
            "factor": 1.0,
            "original_max_position_embeddings": 64,
            "attention_factor": rope.attention_factor,
        }
    return ropecy.Rotary(
        rope.d, base=rope.base, pairing=rope.pairing, rotary_dim=rope.rotary_dim, scaling=scaling
    )


def relative_bias(bias):
    """The package's RelativeBias that stands for the oracle's."""
    from ropecy import RelativeBias

    if isinstance(bias, Table):
        return RelativeBias(bias.values)
    if isinstance(bias, Buckets):
        return RelativeBias.t5(bias.values, bias.values.shape[-1], bias.max_distance, bias.bidirectional)
    if isinstance(bias, Kerple):
        return RelativeBias.kerple(bias.r1, bias.r2, bias.variant)
    return RelativeBias.alibi(bias.slope)


def relative_family(family):
    """The package's RelativeFamily that stands for the oracle's Family."""
    import ropecy

    return ropecy.RelativeFamily(family.values, n_k=family.n_k, support=family.support)


@pytest.fixture
def ours():
    """A case's arguments with the oracle's R and bias replaced by the package's."""

    def translate(case, **more):
        case = {**case, **more}
        if isinstance(case.get("R"), Rope):
            case["R"] = rotary(case["R"])
        if isinstance(case.get("R"), Family):
            case["R"] = relative_family(case["R"])
        if isinstance(case.get("bias"), Table | Alibi | Buckets | Kerple):
            case["bias"] = relative_bias(case["bias"])
        return case

    return translate
