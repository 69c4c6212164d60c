"""The limits of containers: processors in the number of threads, memory in what can be had."""

import math

import pytest

import ropecy
from ropecy.machine import cgroup, memory


@pytest.fixture
def limits(monkeypatch, tmp_path):
    """A function that lays the files of control groups, by path, and the line of /proc/self/cgroup."""

    def lay(own, files):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text + "\n")
        (tmp_path / "own").write_text(own + "\n")
        monkeypatch.setattr(cgroup, "_ROOT", tmp_path)
        monkeypatch.setattr(cgroup, "_OWN", tmp_path / "own")
        cgroup.cpus.cache_clear()

    yield lay
    cgroup.cpus.cache_clear()


V1 = "12:cpu,cpuacct:/pod\n3:memory:/pod"


@pytest.mark.parametrize(
    "own, files, cpus",
    [
        ("0::/", {"cpu.max": "150000 100000"}, 1.5),
        ("0::/", {"cpu.max": "max 100000"}, math.inf),
        ("0::/", {}, math.inf),
        ("0::/a/b", {"cpu.max": "max 100000", "a/cpu.max": "50000 100000", "a/b/cpu.max": "200000 100000"}, 0.5),
        (V1, {"cpu/pod/cpu.cfs_quota_us": "300000", "cpu/pod/cpu.cfs_period_us": "100000"}, 3),
        (V1, {"cpu/pod/cpu.cfs_quota_us": "-1", "cpu/pod/cpu.cfs_period_us": "100000"}, math.inf),
        # Of a container that is shown its own group as the root.
        (V1, {"cpu/cpu.cfs_quota_us": "20000", "cpu/cpu.cfs_period_us": "10000"}, 2),
    ],
)
def test_quota_of_processors(limits, own, files, cpus):
    limits(own, files)
    assert cgroup.cpus() == cpus


def test_threads_stay_within_the_quota(limits, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    limits("0::/", {})
    free = ropecy.info()["threads"]
    limits("0::/", {"cpu.max": "50000 100000"})
    assert ropecy.info()["threads"] == 1
    limits("0::/", {"cpu.max": "110000 100000"})
    assert ropecy.info()["threads"] == min(2, free)


@pytest.mark.parametrize("value", ["²", "", "0", "-1", "x", "1.5"])
def test_what_is_no_number_of_threads_is_passed_over(value, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    expected = ropecy.info()["threads"]
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert ropecy.info()["threads"] == expected


@pytest.mark.parametrize(
    "own, files, left",
    [
        ("0::/", {"memory.max": "1000", "memory.current": "700", "memory.stat": "anon 600\ninactive_file 50"}, 350),
        ("0::/", {"memory.max": "max", "memory.current": "700"}, math.inf),
        ("0::/a", {"memory.max": "1000", "memory.current": "990", "a/memory.max": "max", "a/memory.current": "1"}, 10),
        (V1, {"memory/pod/memory.limit_in_bytes": "1000", "memory/pod/memory.usage_in_bytes": "400"}, 600),
    ],
)
def test_memory_of_a_container(limits, own, files, left):
    limits(own, files)
    assert cgroup.memory() == left
    assert memory.available_memory() == min(left, memory.available_memory())


def test_what_passes_the_memory_of_a_container_is_refused(limits, rng):
    Q, K, V = rng.uniform(-1, 1, (3, 3000, 40))
    limits("0::/", {"memory.max": str(2**26), "memory.current": "0"})
    with pytest.raises(MemoryError, match=r"0\.0625 GiB are available"):
        ropecy.attention(Q, K, V, method="polynomial", degree=5)
