"""``ropecy demo | plan | map | bench | info``, and ``python -m ropecy`` likewise."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from .cli import bench, demo, files, regime_map
from .cli.info import info
from .cli.progress import watched
from .plan import plan
from .rotary import Rotary


def main(arguments: list[str] | None = None) -> None:
    """Run the command that `arguments` (by default sys.argv[1:]) names; a bad one exits with status 2 and a line."""
    parser = argparse.ArgumentParser(
        prog="ropecy",
        description="Softmax attention with rotary positions, certified, in almost linear time.",
    )
    commands = parser.add_subparsers(dest="command", metavar="demo | plan | map | bench | info", required=True)
    shared = argparse.ArgumentParser(add_help=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    shared.add_argument("--eps", type=_between_0_and_1, default=1e-3, help="the error to certify, in units of range(V)")
    shared.add_argument("--seed", type=_at_least(0), default=0, help="of the random numbers")

    for name, run, add, about in (
        ("demo", _demo, _demo_options, "the loss of a real text and its gradient, certified, and a few training steps"),
        ("plan", _plan, _plan_options, "which engine would run on random rows of a given size, its cost, its error"),
        ("map", _map, _map_options, "where a polynomial is certified and from which n it pays; or each head of a file"),
    ):
        command = commands.add_parser(
            name,
            help=about,
            description=about.capitalize() + ".",
            parents=[shared],
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        add(command)
        command.set_defaults(run=run, fail=command.error)
    about = "this machine's limits, and how near attention of a given size comes to them, beside PyTorch where it is"
    command = commands.add_parser(
        "bench",
        help=about,
        description=about[0].upper() + about[1:] + ".",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _bench_options(command)
    command.set_defaults(run=_bench, fail=command.error)
    about = "versions, FFTW, the instruction set in use, threads"
    commands.add_parser("info", help=about, description=about.capitalize() + ".").set_defaults(run=_info)

    options = parser.parse_args(arguments)
    options.run(options)


def _demo_options(command: argparse.ArgumentParser) -> None:
    _width(command)
    command.add_argument("--n", type=_at_least(2), help=f"number of tokens (default: {demo.TOKENS}, or what there is)")
    command.add_argument("--steps", type=_at_least(1), default=40, help="number of optimisation steps")
    command.add_argument("--file", type=Path, help="text to read (default: Python's language reference)")
    command.add_argument("--plot", type=Path, metavar="FILE.png", help="draw errors, times and losses")


def _demo(options: argparse.Namespace) -> None:
    try:
        if options.plot is not None:
            files.check_plot(options.plot)
        text = demo.read_text(options.file, options.n)
    except (ImportError, OSError, ValueError) as error:
        options.fail(str(error))
    demo.run(text, d=options.d, eps=options.eps, steps=options.steps, seed=options.seed, plot=options.plot)


def _plan_options(command: argparse.ArgumentParser) -> None:
    _width(command)
    command.add_argument("--n", type=_at_least(1), default=65536, help="number of queries and of keys")
    command.add_argument("--d-v", type=_at_least(1), help="width of the values (default: d)")
    command.add_argument("--heads", type=_at_least(1), default=1, help="number of heads")
    command.add_argument("--bound", type=_positive, default=1.0, help="B, which no score exceeds")
    command.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    _what_is_asked(command)


def _plan(options: argparse.Namespace) -> None:
    rng = np.random.default_rng(options.seed)

    def normal(width: int) -> np.ndarray:
        return rng.standard_normal((options.heads, options.n, width)).astype(options.dtype)

    d, grad = options.d, options.grad
    Q, K = demo.normalised(normal(d)), demo.normalised(normal(d))
    V = normal(options.d_v or d)
    # Rows of RMS 1 have scores within 1 at the default scale.
    print(plan(Q, K, V, Rotary(d), scale=options.bound / d, causal=options.causal, eps=options.eps, grad=grad))


def _map_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "file", type=Path, nargs="?", metavar="FILE", help="an .npz or .safetensors with Q and K, (..., n, d), rotated"
    )
    command.add_argument("--scale", type=_positive, help="of the scores of FILE (default: 1/d)")
    command.add_argument("--dtype", choices=("float32", "float64"), default="float32", help="without FILE")
    command.add_argument("--plot", type=Path, metavar="FILE.png", help="draw from which n a polynomial pays")
    _what_is_asked(command)


def _map(options: argparse.Namespace) -> None:
    how = {"causal": options.causal, "grad": options.grad}
    asked = [f"eps = {options.eps:g}", *(name for name, wanted in how.items() if wanted)]
    found, heads = [], []
    try:
        if options.plot is not None:
            files.check_plot(options.plot)
        if options.file is not None:
            rows = files.read_rows(options.file)
            heads = list(watched(regime_map.heads(rows, eps=options.eps, scale=options.scale, **how), "heads"))
    except (ImportError, MemoryError, OSError, TypeError, ValueError) as error:
        options.fail(str(error))
    if options.file is None or options.plot is not None:
        cells = regime_map.cells(options.eps, dtype=options.dtype, seed=options.seed, **how)
        found = list(watched(cells, "widths and bounds"))
    what = ", ".join([options.dtype if options.file is None else str(options.file), *asked])
    if options.file is None:
        regime_map.print_map(found, what)
    else:
        regime_map.print_heads(heads, what)
    if options.plot is not None:
        regime_map.draw(options.plot, found, heads, what)
        print(f"\ndrawn to {options.plot}")


def _bench_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--shape",
        type=_shape,
        default="1,8,8,2048,2048,64",
        metavar="b,h,hk,n,nk,d",
        help="batch, query heads, key heads, queries, keys, width of a head",
    )
    command.add_argument("--dtype", choices=bench.DTYPES, default="float32")
    command.add_argument("--causal", action="store_true", help="the last query sees all keys")
    command.add_argument("--threads", type=_at_least(1), help="(default: as ropecy info says)")
    command.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the table")


def _bench(options: argparse.Namespace) -> None:
    try:
        if options.plot is not None:
            files.check_plot(options.plot)
        bench.run(options.shape, options.dtype, options.causal, options.threads, options.plot)
    except (ImportError, OSError) as error:
        options.fail(str(error))


def _width(command: argparse.ArgumentParser) -> None:
    command.add_argument("--d", type=_even, default=8, help="width of a head, even")


def _what_is_asked(command: argparse.ArgumentParser) -> None:
    command.add_argument("--causal", action="store_true", help="row i sees the keys j <= i")
    command.add_argument("--grad", action="store_true", help="plan for the gradient too")


def _info(options: argparse.Namespace) -> None:
    print(info())


def _at_least(least: int) -> Callable[[str], int]:
    def check(text: str) -> int:
        number = _number(int, text)
        if number is None or number < least:
            raise argparse.ArgumentTypeError(f"wants an integer of at least {least}, got {text!r}")
        return number

    return check


def _shape(text: str) -> bench.Shape:
    numbers = [_number(int, part) for part in text.split(",")]
    if len(numbers) != 6 or any(number is None or number < 1 for number in numbers):
        raise argparse.ArgumentTypeError(f"wants six integers of at least 1, b,h,hk,n,nk,d, got {text!r}")
    shape = bench.Shape(*numbers)
    if shape.h % shape.hk:
        raise argparse.ArgumentTypeError(f"wants hk, the key heads, to divide h, the query heads, got {text!r}")
    return shape


def _even(text: str) -> int:
    number = _number(int, text)
    if number is None or number < 2 or number % 2:
        raise argparse.ArgumentTypeError(f"wants an even integer of at least 2, got {text!r}")
    return number


def _between_0_and_1(text: str) -> float:
    number = _number(float, text)
    if number is None or not 0 < number < 1:
        raise argparse.ArgumentTypeError(f"wants a number between 0 and 1, got {text!r}")
    return number


def _positive(text: str) -> float:
    number = _number(float, text)
    if number is None or not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"wants a positive number, got {text!r}")
    return number


def _number(kind: type, text: str) -> float | None:
    try:
        return kind(text)
    except ValueError:
        return None


if __name__ == "__main__":
    main()
