"""README.md and the pages of docs/: examples run, and what the README is held to."""

import doctest
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
# A block that begins ```python runs here. One that begins ```py is only shown: it needs MPI, or a pretrained model.
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)

pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="needs the source tree")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples(page, tmp_path, monkeypatch, capsys):
    """All blocks of a page one after the other, with the same names."""
    text = page.read_text("utf-8")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": page.stem}
    for block in BLOCK.finditer(text):
        needed = re.findall(r"^(?:>>> )?(?:import|from) (torch|ropecy\.torch|jax|scipy)", block[1], re.MULTILINE)
        if not all(find_spec(name.rpartition(".")[2]) for name in needed):
            continue
        line = text.count("\n", 0, block.start()) + 1
        if ">>>" not in block[1]:
            exec(compile("\n" * line + block[1], str(page), "exec"), names)
            continue
        flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
        test = doctest.DocTestParser().get_doctest(block[1], names, page.name, str(page), line)
        runner = doctest.DocTestRunner(optionflags=flags)
        failures = []
        runner.run(test, out=failures.append, clear_globs=False)
        assert not failures, "".join(failures)
        names = test.globs


def test_the_readme_is_read_in_one_sitting():
    text = README.read_text("utf-8")
    assert len(text.splitlines()) <= 160
    assert len(text.split()) <= 1500


def test_the_first_two_shell_blocks_install_and_test():
    first, second = re.findall(r"^```sh\n(.*?)^```", README.read_text("utf-8"), re.MULTILINE | re.DOTALL)[:2]
    assert "pip install ." in first and "ropecy demo" in first
    assert "pytest" in second


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_to_files_lead_somewhere(page):
    prose = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", prose):
        assert (page.parent / target).exists(), target
