"""Progress of commands that take more than a moment, on one line of a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def show(text: str) -> None:
    """Show this text in place of the line that was shown before; do nothing where standard error is no terminal."""
    if sys.stderr.isatty():
        print(f"\r{text:<60}\r", end="", file=sys.stderr, flush=True)


def watched(items: Iterable[Item], what: str) -> Iterator[Item]:
    """Yield the items one after the other, and show how many of `what` are done."""
    count = 0
    show(f"{what}: begun")
    for item in items:
        yield item
        count += 1
        show(f"{what}: {count} done")
    show("")
