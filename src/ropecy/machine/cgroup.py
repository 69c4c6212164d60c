"""The limits that a Linux control group (cgroup) sets, as containers have them: a quota of processor time, and memory.

Both versions of cgroups are read. A group's parents limit it too, so the smallest limit from the process's own group up
to the root counts. Where a file is missing or says nothing, there is no limit.
"""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")


@lru_cache(maxsize=1)
def cpus() -> float:
    """How many processors' time the process may use, quota / period; inf without a quota. It is read only once."""
    least = math.inf
    for group in _groups("cpu"):
        quota = _words(group / "cpu.max") or _words(group / "cpu.cfs_quota_us") + _words(group / "cpu.cfs_period_us")
        if len(quota) == 2 and _number(quota[0]) > 0:  # -1 means no quota
            least = min(least, _number(quota[0]) / _number(quota[1]))
    return least


def memory() -> float:
    """Bytes that may still be allocated, limit - use; inf without a limit. Cached files that can be dropped don't count
    as used.
    """
    least = math.inf
    for group in _groups("memory"):
        for limit, usage in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            most, used = _words(group / limit), _words(group / usage)
            if most and used and math.isfinite(_number(most[0])):
                pairs = _words(group / "memory.stat")
                stat = dict(zip(pairs[::2], pairs[1::2], strict=False))
                files = stat.get("total_inactive_file", stat.get("inactive_file", "0"))
                least = min(least, max(0.0, _number(most[0]) - _number(used[0]) + _number(files)))
    return least


def _groups(controller: str) -> list[Path]:
    """The folders of the process's group and of all its parents, in version 2 and for this controller in version 1."""
    found = []
    try:
        lines = _OWN.read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "" or controller in controllers.split(","):
            root = _ROOT / controller if controllers else _ROOT
            own = root / path.lstrip("/")
            found += [own, *(above for above in own.parents if above.is_relative_to(root))]
    return found


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:
        return []


def _number(word: str) -> float:
    """A limit as a number; "max" means no limit and gives inf."""
    return math.inf if word == "max" else float(word)
