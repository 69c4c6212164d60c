"""Progress of commands that take more than a moment, on one line of a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def show(text: str) -> None:
    """Write over the line; nothing where standard error goes to a file."""
    if sys.stderr.isatty():
        print(f"\r{text:<60}\r", end="", file=sys.stderr, flush=True)


def watched(items: Iterable[Item], what: str) -> Iterator[Item]:
    """The items one after the other, with how many of `what` are done."""
    count = 0
    show(f"{what}: begun")
    for item in items:
        yield item
        count += 1
        show(f"{what}: {count} done")
    show("")
