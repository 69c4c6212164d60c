"""What keeps the sources readable: short files and functions, few parameters, rooms that say what they are for.

What is longer today is listed here by name. A list may only shrink: an entry that no longer applies fails as well.
"""

import ast
import re
from pathlib import Path

import pytest

import ropecy

ROOT = Path(ropecy.__file__).parent
SOURCES = sorted(path for kind in ("py", "pyx", "pxd", "c", "h") for path in ROOT.rglob(f"*.{kind}"))
MODULES = {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in SOURCES if path.suffix == ".py"}

MOST_LINES = 500  # of a file
MOST_FUNCTION_LINES = 60  # without the docstring
MOST_PARAMETERS = 7  # without self and cls, *args and **kwargs

LONG_FILES: set[str] = set()
LONG_FUNCTIONS: set[str] = set()

# Functions that users call, by keyword for the most part.
DOORS = {
    "attention.py: attention",
    "decode.py: DecodeState.__init__",
    "evidence.py: check",
    "torch/function.py: scaled_dot_product_attention",
    "torch/layer.py: RoPEAttention.__init__",
    "torch/varlen.py: varlen_attn",
}
# Functions whose parameters PyTorch or transformers prescribes.
PRESCRIBED = {
    "torch/operators.py: _",
    "transformers/attention.py: _attention",
    "transformers/mask_functions.py: describe",
}
MANY_PARAMETERS: set[str] = set()

# Which rooms each room may import. A room is a folder, or a file at the top of the package, which is a door.
FOUNDATION = {"machine", "kernels", "approximation"}
NOUNS = FOUNDATION | {"rotary", "relative", "certificate"}
INSIDE = NOUNS | {"problem", "certify", "engines", "planning"}
MAY_IMPORT = {
    "machine": set(),
    "kernels": set(),
    "approximation": set(),
    "certificate": set(),
    "rotary": FOUNDATION,
    "relative": FOUNDATION,
    "problem": NOUNS,
    "certify": NOUNS | {"problem"},
    "engines": NOUNS | {"problem", "certify"},
    "planning": NOUNS | {"problem", "certify", "engines"},
    "distributed": NOUNS | {"problem"},
    "decoding": NOUNS | {"problem", "certify", "engines"},
    # Doors, those that others are made of first.
    "gradients": {"certificate"},
    "options": {"relative"},
    "forms": {"approximation"},
    "attention": INSIDE | {"gradients", "options"},
    "loss": INSIDE | {"gradients", "options"},
    "matrix": INSIDE | {"options"},
    "evidence": INSIDE | {"options"},
    "decode": INSIDE | {"decoding"},
    "plan": INSIDE | {"options", "mpi"},
    "mpi": INSIDE | {"distributed", "attention", "loss", "gradients", "options"},
    "torch": INSIDE | {"attention", "decode", "plan"},
    "transformers": INSIDE | {"torch"},
    "serve_demo": {"machine"},
    "demo_model": INSIDE | {"torch"},
    "far_demo": {"demo_model"},
    "torch_demo": INSIDE | {"torch", "attention", "serve_demo", "far_demo", "demo_model"},
    "cli": INSIDE | {"attention", "loss", "gradients", "plan"},
    "__main__": {"cli", "plan", "rotary"},
    "__init__": {"cli", "attention", "loss", "gradients", "matrix", "evidence", "decode", "plan"} | NOUNS,
}

# Libraries that may be missing, and modules that take long to import and are seldom needed.
LATE = {
    "importlib.metadata",
    "matplotlib",
    "ml_dtypes",
    "mpi4py",
    "pydoc_data.topics",
    "scipy",
    "torch",
    "transformers",
}
LATE_IMPORTS = {"plan.py: plan"}


def functions(module):
    """(name, node) of all functions of a file; the name says the file and the classes and functions it is inside of."""

    def inside(node, names):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield f"{module}: {'.'.join([*names, child.name])}", child
                yield from inside(child, [*names, child.name])
            else:
                yield from inside(child, [*names, child.name] if isinstance(child, ast.ClassDef) else names)

    return inside(MODULES[module], [])


ALL_FUNCTIONS = [function for module in MODULES for function in functions(module)]


def lines(node):
    """The length of a function without its docstring."""
    first = node.body[0]
    documented = ast.get_docstring(node, clean=False) is not None
    return node.end_lineno - node.lineno + 1 - documented * (first.end_lineno - first.lineno + 1)


def parameters(node):
    """How many parameters a function has of its own."""
    given = node.args
    names = [each.arg for each in given.posonlyargs + given.args + given.kwonlyargs]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def late(node):
    """The modules, of this package or of others, that a function imports where no optional library asks for it."""
    for each in ast.walk(node):
        if isinstance(each, ast.Import):
            names = [alias.name for alias in each.names]
        elif isinstance(each, ast.ImportFrom):
            names = ["." if each.level else each.module]
        else:
            continue
        yield from (name for name in names if name not in LATE and name.partition(".")[0] not in LATE)


def assert_exceptions(found, listed):
    assert not found - listed, f"too long, or too many: {sorted(found - listed)}"
    assert not listed - found, f"no longer so, to be taken from the list: {sorted(listed - found)}"


def test_files_are_short():
    found = {str(path.relative_to(ROOT)) for path in SOURCES if len(path.read_text().splitlines()) > MOST_LINES}
    assert_exceptions(found, LONG_FILES)


def test_functions_are_short():
    assert_exceptions({name for name, node in ALL_FUNCTIONS if lines(node) > MOST_FUNCTION_LINES}, LONG_FUNCTIONS)


def test_functions_have_few_parameters():
    found = {name for name, node in ALL_FUNCTIONS if parameters(node) > MOST_PARAMETERS}
    assert_exceptions(found, DOORS | PRESCRIBED | MANY_PARAMETERS)


CYTHON = {path.name: path.read_text() for path in SOURCES if path.suffix == ".pyx"}


@pytest.mark.skipif(not CYTHON, reason="an installed package has no Cython sources")
def test_cython_functions_have_few_parameters():
    found = set()
    for name, source in CYTHON.items():
        for function, given in re.findall(r"^ *def (\w+)\(([^)]*)\)", source, flags=re.MULTILINE):
            own = [each for each in given.split(",") if each.strip() not in ("", "self")]
            found |= {f"{name}: {function}"} if len(own) > MOST_PARAMETERS else set()
    assert not found, f"too many: {sorted(found)}"


def test_imports_are_at_the_top():
    assert_exceptions({name for name, node in ALL_FUNCTIONS if any(late(node))}, LATE_IMPORTS)


def imported(module):
    """The files of the package, without endings, that a file imports, but for those that types alone ask for."""
    folder, skipped = Path(module).parent, set()
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            skipped.update(ast.walk(node))
        if not isinstance(node, ast.ImportFrom) or not node.level or node in skipped:
            continue
        base = [folder, *folder.parents][node.level - 1].joinpath(*(node.module or "").split("."))
        for alias in node.names:
            inner = base / alias.name
            there = (ROOT / inner).is_dir() or list((ROOT / base).glob(f"{alias.name}.*"))
            yield inner if there else base


def room(path):
    return path.parts[0].removesuffix(".py") if path.parts else "__init__"


@pytest.mark.parametrize("module", MODULES)
def test_no_arrow_between_rooms_points_upward(module):
    own = room(Path(module))
    rooms = {room(path) for path in imported(module)} - {own}
    assert rooms <= MAY_IMPORT[own], f"{module} may not import {sorted(rooms - MAY_IMPORT[own])}"


def test_no_files_import_each_other_in_circles():
    files = {module: {str(path) for path in imported(module)} for module in MODULES}
    names = {str(Path(module).with_suffix("")).removesuffix("/__init__"): module for module in MODULES}
    left = {module: {names[path] for path in paths if path in names} - {module} for module, paths in files.items()}
    # `plan(comm=...)` and `ropecy.mpi.plan` are one function, whose import waits for the call.
    left["plan.py"].discard("mpi.py")
    while left:
        free = {module for module, needs in left.items() if not needs & left.keys()}
        assert free, f"these files import each other: {sorted(left)}"
        left = {module: needs for module, needs in left.items() if module not in free}


@pytest.mark.parametrize("folder", sorted({Path(module).parent for module in MODULES}), ids=str)
def test_every_folder_says_what_it_is_for(folder):
    module = MODULES.get(str(folder / "__init__.py"))
    assert module is not None, "a folder without __init__.py is not in the wheel"
    assert ast.get_docstring(module)
