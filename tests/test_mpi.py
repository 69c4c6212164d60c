"""One sequence over MPI ranks: the tests of tests/ranks.py, run by mpiexec on one to four ranks within a time limit."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("ranks.py")
TESTS = re.findall(r"^def (test_\w+)", SCRIPT.read_text(), re.MULTILINE)

pytestmark = pytest.mark.skipif(importlib.util.find_spec("mpi4py") is None, reason="needs mpi4py: the extra [mpi]")


def mpiexec(ranks, *command, limit=120, **environment):
    """The output of a Python script on so many ranks; past the limit all are killed."""
    # The extra's MPI library brings its own mpiexec, beside the interpreter.
    launcher = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert launcher, "mpi4py is here and mpiexec is not"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parent), **environment}
    done = subprocess.run(
        [launcher, "-n", str(ranks), sys.executable, "-m", "mpi4py", *map(str, command)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=limit,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_ranks(ranks):
    # All in one start, which takes longer than most of them. One that fails comes after the last one that passed.
    assert mpiexec(ranks, SCRIPT, *TESTS, limit=600) == "".join(f"{name} passed\n" for name in TESTS)


def test_threads_of_which_one_alone_calls_mpi():
    asked = "import mpi4py; mpi4py.rc.thread_level = 'funneled'; from mpi4py import MPI; print(MPI.Query_thread());"
    run = "import ranks; ranks.test_polynomial_over_many_chunks()"
    found = mpiexec(2, "-c", f"{asked} {run}", OMP_NUM_THREADS="2")
    funneled = "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; print(MPI.THREAD_FUNNELED)"
    # Ranks may write on one line.
    assert "".join(found.split()) == 2 * subprocess.check_output([sys.executable, "-c", funneled], text=True).strip()
