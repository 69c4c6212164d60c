"""Every example of a docstring, run in the installed package."""

import doctest
import importlib
import pkgutil

import pytest

import ropecy

# What needs MPI has no examples, and an import starts MPI.
WITHOUT = {"ropecy.mpi", "ropecy.distributed.mpi_communicator"}
MODULES = ["ropecy"] + [module.name for module in pkgutil.walk_packages(ropecy.__path__, "ropecy.")]


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__main__") and name not in WITHOUT])
def test_examples(name):
    if name.startswith(("ropecy.torch", "ropecy.serve_demo", "ropecy.demo_model", "ropecy.far_demo")):
        pytest.importorskip("torch")
    if name.startswith("ropecy.transformers"):
        pytest.importorskip("transformers")
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    assert doctest.testmod(importlib.import_module(name), optionflags=flags).failed == 0
