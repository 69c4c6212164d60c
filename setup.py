"""Find FFTW, build the extensions; everything else about the package is in pyproject.toml."""

import os
import platform
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext, customize_compiler, new_compiler
from setuptools.modified import newer_group

KERNELS = Path("src/ropecy/kernels")

# Each extension and the C kernel files that it links: c/<name>.c, compiled once per instruction set level; but for
# _parallel, whose one C file is no kernel.
EXTENSIONS = {
    "_parallel": [],
    "_memory": [],
    "_rotary": ["rotary"],
    "_rows": ["rows"],
    "_halves": ["halves"],
    "_exact": ["exact", "rows", "halves"],
    "_exact_gradient": [],
    "_few": ["few"],
    "_monomials": ["monomials"],
    "_decoding": ["decoding"],
    "_quartic": ["quartic"],
    "_circulant": [],
    "_toeplitz": ["toeplitz"],
    "_family_pairs": [],
    "_family": [],
    "_peak": ["peak"],
    "_fftw": [],
}

# No -march=native, since a wheel runs on other machines, and no -ffast-math, since it changes subnormals for
# the whole process: only the three promises below, none of which alters the value of a finite expression
# beyond the contraction of a*b + c.
KERNEL_FLAGS = ["-O3", "-std=gnu11", "-ffp-contract=fast", "-fno-trapping-math", "-fno-math-errno"]
KERNEL_FLAGS += ["-fvisibility=hidden", "-Wall"]
# On arm64 GCC schedules before it allocates registers, moves loads up, and spills accumulators; on x86 it doesn't.
KERNEL_FLAGS += ["-fno-schedule-insns"]
# For what Cython generates, and for c/parallel.c.
SHIM_FLAGS = ["-O3", "-std=gnu11", "-fvisibility=hidden", "-pthread"]

# The last word to compiler and linker: `.ci/sanitize` has one.
EXTRA_FLAGS = shlex.split(os.environ.get("ROPECY_EXTRA_FLAGS", ""))

LEVELS = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    LEVELS |= {"v3": ["-march=x86-64-v3"], "v4": ["-march=x86-64-v4"]}

FFTW_LIBRARIES = ("fftw3", "fftw3f")
FFTW_MISSING = (
    "FFTW 3 in double and single precision was not found ({reason}): install libfftw3-dev and pkg-config (apt), "
    "fftw-devel (dnf), fftw (brew, conda), or set ROPECY_FFTW_PREFIX to the directory of include/fftw3.h and lib/."
)


@dataclass
class FFTW:
    """Where FFTW is, and whether both of its libraries go into the extension itself."""

    include: list[str]
    libdirs: list[str]
    static: list[str] = field(default_factory=list)  # paths of the archives; empty for dynamic linking
    rpath: list[str] = field(default_factory=list)

    @property
    def hidden(self) -> list[str]:
        """The flags that link the archives and keep their names to the extension."""
        # macOS needs no hiding: its two-level namespace binds each name to the library that it was linked with.
        return [*self.static, *([] if sys.platform == "darwin" else ["-Wl,--exclude-libs,ALL"]), "-lm"]


def find_fftw() -> FFTW:
    """FFTW from ROPECY_FFTW_PREFIX, then from pkg-config; SystemExit with one line where there is none."""
    prefix = os.environ.get("ROPECY_FFTW_PREFIX")
    if prefix:
        include = [str(Path(prefix, "include"))]
        libdirs = [str(path) for name in ("lib", "lib64") if (path := Path(prefix, name)).is_dir()]
        if not Path(include[0], "fftw3.h").is_file():
            raise SystemExit(FFTW_MISSING.format(reason=f"ROPECY_FFTW_PREFIX={prefix} has no include/fftw3.h"))
        for name in FFTW_LIBRARIES:
            if not any(True for path in libdirs for _ in Path(path).glob(f"lib{name}.*")):
                raise SystemExit(FFTW_MISSING.format(reason=f"ROPECY_FFTW_PREFIX={prefix} has no lib{name}"))
        return FFTW(include, libdirs, find_static(libdirs), rpath=libdirs)

    def pkg_config(*arguments):
        tool = os.environ.get("PKG_CONFIG", "pkg-config")
        try:
            done = subprocess.run([tool, *arguments, *FFTW_LIBRARIES], capture_output=True, text=True)
        except OSError:
            raise SystemExit(FFTW_MISSING.format(reason=f"{tool} cannot be run")) from None
        if done.returncode:
            raise SystemExit(FFTW_MISSING.format(reason="pkg-config knows no fftw3 and fftw3f"))
        return shlex.split(done.stdout)

    libdirs = sorted(set(pkg_config("--variable=libdir")))
    return FFTW([flag[2:] for flag in pkg_config("--cflags-only-I")], libdirs, find_static(libdirs))


def find_static(libdirs: list[str]) -> list[str]:
    """The archives of both precisions if each exists, else nothing.

    Other libraries of a process may carry the same fftw_* names (MKL does, and PyTorch carries MKL); archives
    with hidden symbols keep ours apart.
    """
    found = [next((str(p) for d in libdirs if (p := Path(d, f"lib{n}.a")).is_file()), None) for n in FFTW_LIBRARIES]
    return [] if None in found else found


def as_it_links(fftw: FFTW) -> FFTW:
    """The same without archives if these can't be linked: what is linked, and with it the licence, is decided here."""
    # An archive that was not compiled as position-independent code doesn't link into an extension.
    source = "#include <fftw3.h>\nvoid *probe[] = {fftw_plan_many_dft_r2c, fftwf_plan_many_dft_r2c};"
    include = [f"-I{path}" for path in fftw.include]
    return fftw if fftw.static and links(source, fftw.hidden, include) else replace(fftw, static=[])


def links(source: str, link_flags: list[str], compile_flags: list[str]) -> bool:
    """Whether a shared object made of this source compiles and links."""
    compiler = new_compiler()
    customize_compiler(compiler)
    with tempfile.TemporaryDirectory() as folder:
        c, o, so = (str(Path(folder, f"probe.{end}")) for end in ("c", "o", "so"))
        Path(c).write_text(source + "\n")
        steps = (
            [*compiler.compiler_so, *compile_flags, "-c", c, "-o", o],
            [*compiler.linker_so, o, *link_flags, "-o", so],
        )
        return all(subprocess.run(step, capture_output=True).returncode == 0 for step in steps)


def holds_fftw(binary: Path) -> bool:
    """Whether archives of FFTW were linked into it: what these begin a file of wisdom with is there then."""
    return b" fftw_wisdom #" in binary.read_bytes()


class BuildExtensions(build_ext):
    """build_ext with kernels per instruction set level, and FFTW linked in hidden."""

    fftw: FFTW

    def finalize_options(self):
        super().finalize_options()
        self.parallel = self.parallel or os.cpu_count()

    def build_extensions(self):
        for ext in self.extensions:
            if ext.name.endswith("._fftw"):
                self.link_fftw(ext)
        super().build_extensions()

    def build_extension(self, ext):
        built = Path(self.get_ext_fullpath(ext.name))
        if ext.name.endswith("._fftw") and built.exists() and holds_fftw(built) != bool(self.fftw.static):
            built.unlink()  # It was linked otherwise.
        up_to_date = not newer_group([*ext.sources, *ext.depends], str(built), "newer")
        if up_to_date and not self.force:
            return
        for name in ext.kernels:
            for level, march in LEVELS.items():
                ext.extra_objects += self.compiler.compile(
                    [str(KERNELS / "c" / f"{name}.c")],
                    output_dir=os.path.join(self.build_temp, level),
                    macros=[("RC_LEVEL", level)],
                    extra_postargs=KERNEL_FLAGS + march + EXTRA_FLAGS,
                )
        super().build_extension(ext)

    def link_fftw(self, ext):
        ext.include_dirs += self.fftw.include
        if self.fftw.static:
            ext.extra_link_args += self.fftw.hidden
        else:
            ext.library_dirs += self.fftw.libdirs
            ext.runtime_library_dirs += self.fftw.rpath
            ext.libraries += FFTW_LIBRARIES


def extensions() -> list[Extension]:
    """The extensions as cythonized sources; kernels holds the names of the C files that go with each."""
    import numpy
    from Cython.Build import cythonize

    debug = os.environ.get("ROPECY_DEBUG_CYTHON") == "1"
    depends = ["setup.py", *sorted(str(path) for path in KERNELS.glob("*.pxd"))]
    depends += sorted(str(path) for path in (KERNELS / "c").glob("*.[ch]"))
    wanted = [
        Extension(
            f"ropecy.kernels.{name}",
            [str(KERNELS / f"{name}.pyx"), *([str(KERNELS / "c" / "parallel.c")] if name == "_parallel" else [])],
            include_dirs=[str(KERNELS), str(KERNELS / "c"), numpy.get_include()],
            define_macros=[("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION")],
            extra_compile_args=SHIM_FLAGS + EXTRA_FLAGS,
            extra_link_args=["-pthread", *EXTRA_FLAGS],
            depends=depends,
        )
        for name in EXTENSIONS
    ]
    built = cythonize(
        wanted,
        build_dir="build/cython-debug" if debug else "build/cython",
        compiler_directives={
            "language_level": 3,
            "boundscheck": debug,
            "wraparound": False,
            "cdivision": True,
            "freethreading_compatible": True,
        },
    )
    for ext in built:
        ext.kernels = EXTENSIONS[ext.name.rpartition(".")[2]]
    return built


if __name__ == "__main__":
    # The source is BSD-3-Clause; a wheel that holds FFTW's archives holds GPL code as well, says so, and has the GPL's
    # text. This is why pyproject.toml leaves the licence and its files to this file.
    licence, texts, modules = "BSD-3-Clause", ["LICENSE", "NOTICE"], []
    # An sdist, and the questions that pip asks before it builds, need neither FFTW nor a compiler.
    if {"egg_info", "sdist"}.isdisjoint(sys.argv):
        BuildExtensions.fftw = as_it_links(find_fftw())
        if BuildExtensions.fftw.static:
            licence += " AND GPL-2.0-or-later"
            texts.append("LICENSES/GPL-2.0-or-later.txt")
        modules = extensions()
    setup(license_expression=licence, license_files=texts, ext_modules=modules, cmdclass={"build_ext": BuildExtensions})
