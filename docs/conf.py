"""Sphinx: `python -m sphinx -W docs docs/_build` builds these pages."""

from ropecy import __version__

project = "ropecy"
author = "the ropecy developers"
copyright = f"2026, {author}"
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "numpydoc",
]
myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
templates_path = ["_templates"]

# Pages of the reference are written from docstrings; members are listed on the page of their class.
autosummary_generate = True
autodoc_typehints = "none"  # numpydoc's Parameters say more than annotations do
numpydoc_show_class_members = False
numpydoc_xref_param_type = False
default_role = "autolink"  # `name` in a docstring links to that name where there is one
# Docstrings of the optional layers are read without those libraries.
autodoc_mock_imports = ["mpi4py"]

html_theme = "furo"
html_title = f"ropecy {release}"
html_static_path = []
