"""What the build promises: FFTW hidden in the extensions, one line where it is missing, a wheel without sources."""

import os
import shutil
import subprocess
import sys
from importlib import metadata, util
from pathlib import Path

import pytest

import ropecy

ROOT = Path(__file__).parents[1]
INSTALLED = Path(ropecy.__file__).parent
EXTENSIONS = sorted((INSTALLED / "kernels").glob("*.so"))

in_checkout = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs the source tree")


@pytest.fixture
def setup_file(monkeypatch):
    """setup.py as a module, with none of the variables that steer it."""
    for name in ("ROPECY_FFTW_PREFIX", "PKG_CONFIG", "PKG_CONFIG_PATH"):
        monkeypatch.delenv(name, raising=False)
    spec = util.spec_from_file_location("ropecy_setup", ROOT / "setup.py")
    module = util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(not sys.platform.startswith("linux") or not shutil.which("nm"), reason="reads ELF symbols by nm")
def test_no_extension_exports_fftw():
    # Another library of the process may carry the same names: neither may stand in for the other.
    assert EXTENSIONS
    for path in EXTENSIONS:
        listed = subprocess.run(["nm", "-D", "--defined-only", path], capture_output=True, text=True, check=True)
        names = [line.split()[-1] for line in listed.stdout.splitlines()]
        assert [name for name in names if not name.startswith("PyInit_")] == [], path.name


def assert_names_every_package(message):
    assert "\n" not in message.strip()
    for word in ("libfftw3-dev", "pkg-config", "fftw-devel", "brew", "conda", "ROPECY_FFTW_PREFIX"):
        assert word in message


@in_checkout
def test_missing_pkg_config_is_one_clear_line(setup_file, monkeypatch):
    monkeypatch.setenv("PKG_CONFIG", "no-such-tool")
    with pytest.raises(SystemExit, match="no-such-tool cannot be run") as caught:
        setup_file.find_fftw()
    assert_names_every_package(str(caught.value))


@in_checkout
@pytest.mark.skipif(not shutil.which("pkg-config"), reason="needs pkg-config")
def test_missing_fftw_is_one_clear_line(setup_file, monkeypatch, tmp_path):
    monkeypatch.setenv("PKG_CONFIG_LIBDIR", str(tmp_path))
    with pytest.raises(SystemExit, match="pkg-config knows no fftw3 and fftw3f") as caught:
        setup_file.find_fftw()
    assert_names_every_package(str(caught.value))


@in_checkout
def test_build_stops_before_compiling_where_fftw_is_missing(tmp_path):
    pytest.importorskip("setuptools")
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-temp", tmp_path, "--build-lib", tmp_path],
        cwd=ROOT,
        env={**os.environ, "ROPECY_FFTW_PREFIX": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert_names_every_package(done.stderr.strip().splitlines()[-1])
    assert list(tmp_path.iterdir()) == []


@in_checkout
def test_prefix_needs_both_precisions_and_prefers_archives(setup_file, monkeypatch, tmp_path):
    monkeypatch.setenv("ROPECY_FFTW_PREFIX", str(tmp_path))
    (tmp_path / "include").mkdir()
    (tmp_path / "lib").mkdir()
    (tmp_path / "include" / "fftw3.h").touch()
    (tmp_path / "lib" / "libfftw3.so").touch()
    with pytest.raises(SystemExit, match="has no libfftw3f"):
        setup_file.find_fftw()
    (tmp_path / "lib" / "libfftw3f.so").touch()
    assert setup_file.find_fftw().static == []
    (tmp_path / "lib" / "libfftw3.a").touch()
    assert setup_file.find_fftw().static == []
    (tmp_path / "lib" / "libfftw3f.a").touch()
    assert [Path(path).name for path in setup_file.find_fftw().static] == ["libfftw3.a", "libfftw3f.a"]


def test_wheel_is_typed_and_carries_no_sources():
    if INSTALLED.is_relative_to(ROOT / "src"):
        pytest.skip("an editable install reads the source tree")
    assert (INSTALLED / "py.typed").is_file()
    assert [path.name for path in INSTALLED.rglob("*") if path.suffix in {".c", ".h", ".pyx", ".pxd"}] == []


def test_metadata_says_what_the_binary_is():
    """By what it holds: FFTW's archives, whose files of wisdom begin like this, or a name of its library."""
    if metadata.distribution("ropecy").read_text("WHEEL") is None:
        pytest.skip("the metadata of a source tree are those of the source")
    about = metadata.metadata("ropecy")
    licence, texts = "BSD-3-Clause", {"LICENSE", "NOTICE"}
    (binary,) = (path for path in EXTENSIONS if path.name.startswith("_fftw."))
    if b" fftw_wisdom #" in binary.read_bytes():
        licence += " AND GPL-2.0-or-later"
        texts.add("LICENSES/GPL-2.0-or-later.txt")
    assert about["License-Expression"] == licence
    assert set(about.get_all("License-File")) == texts
    if not INSTALLED.is_relative_to(ROOT / "src"):
        shipped = {str(path) for path in metadata.files("ropecy")}
        for text in texts:
            assert any(path.endswith(f".dist-info/licenses/{text}") for path in shipped)


@in_checkout
def test_archives_that_do_not_link_are_not_in_the_label(setup_file, tmp_path):
    """What is linked is decided once, for the extension and for the licence."""
    found = setup_file.find_fftw()
    for place, name in enumerate(setup_file.FFTW_LIBRARIES):
        (tmp_path / f"lib{name}.a").write_bytes(b"no archive" * place)
    broken = setup_file.replace(found, static=setup_file.find_static([str(tmp_path)]))
    assert len(broken.static) == 2
    assert setup_file.as_it_links(broken) == setup_file.replace(found, static=[])
    if found.static and any(b" fftw_wisdom #" in path.read_bytes() for path in EXTENSIONS):
        assert setup_file.as_it_links(found) == found
