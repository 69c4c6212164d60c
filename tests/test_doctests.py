"""Every example of a docstring, run in the installed package."""

import doctest
import importlib
import pkgutil

import pytest

import ropecy

MODULES = ["ropecy"] + [module.name for module in pkgutil.walk_packages(ropecy.__path__, "ropecy.")]


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__main__")])
def test_examples(name):
    if name in ("ropecy.torch", "ropecy.transformers"):
        pytest.importorskip(name.removeprefix("ropecy."))
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    assert doctest.testmod(importlib.import_module(name), optionflags=flags).failed == 0
