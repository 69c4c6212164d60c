"""What MPI ranks are worth and what they send one another: measured, and by a model on more ranks than there are here.

    mpiexec -n 2 python asv_bench/ranks.py     ranks of one thread against one process of as many threads
    python asv_bench/ranks.py --model          10^8 tokens on up to 10^5 ranks, by latency and bandwidth

Causal attention of float32 rows with scores within 1, degree 3. ``OMP_WAIT_POLICY=passive OPENBLAS_NUM_THREADS=1``
keeps threads that wait from taking the cores of those that work; the machine should have nothing else to do.
"""

from __future__ import annotations

import argparse
import math
import pickle
import statistics
import time

import numpy as np
from benchmarks.inputs import arrays
from mpi4py import MPI

import ropecy.mpi
from ropecy.distributed.network import Network
from ropecy.engines.polynomial import features
from ropecy.problem import traffic
from ropecy.problem.mask import Mask
from ropecy.problem.pieces import Layout
from ropecy.problem.problem import Outline, Sizes

DEGREE, EPS = 3, 5e-3
# Times that every rank tells every rank something in a forward pass; what it tells is mostly that it has no error.
GATHERS = 12


def options(d: int, threads: int) -> dict:
    how = {"causal": True, "method": "polynomial", "degree": DEGREE, "eps": EPS}
    return {"R": ropecy.Rotary(d), "threads": threads, **how}


def seconds(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(comm: MPI.Intracomm, n: int, d: int, rounds: int) -> None:
    """In turns: all ranks with one thread each, and rank 0 alone with as many threads while the others sleep."""
    Q, K, V, _ = arrays(n, d)
    mine = slice(n * comm.rank // comm.size, n * (comm.rank + 1) // comm.size)
    own = [np.ascontiguousarray(X[mine]) for X in (Q, K, V)]
    by_ranks, by_threads = [], []
    for _ in range(rounds + 1):
        comm.Barrier()
        by_ranks.append(seconds(lambda: (ropecy.mpi.attention(comm, *own, **options(d, 1)), comm.Barrier())))
        if comm.rank == 0:
            by_threads.append(seconds(lambda: ropecy.attention(Q, K, V, **options(d, comm.size))))
        asleep(comm)
    if comm.rank == 0:
        pieces, whole = (statistics.median(found[1:]) for found in (by_ranks, by_threads))
        print(f"n = {n:,}, d = {d}, degree {DEGREE}, causal: medians of {rounds} rounds")
        print(f"  {comm.size} ranks of one thread    {pieces:.3f} s ({min(by_ranks):.3f} at best)")
        print(f"  one process, {comm.size} threads   {whole:.3f} s ({min(by_threads):.3f} at best)")
        print(f"  the ranks have {whole / pieces:.2f} of its speed")


def asleep(comm: MPI.Intracomm) -> None:
    """A barrier in which nobody takes a core while it waits."""
    request = comm.Ibarrier()
    while not request.Test():
        time.sleep(1e-3)


def count(comm: MPI.Intracomm, d: int) -> None:
    """Bytes of arrays that each rank sends, for some lengths."""
    for n in (2**17, 2**18, 2**19):
        Q, K, V, _ = arrays(n // comm.size, d)
        plan = ropecy.mpi.plan(comm, Q, K, V, **options(d, 1))
        sent = comm.gather(plan.exchange.own.sent)
        if comm.rank == 0:
            print(f"n = {n:>7,}: bytes sent by each rank {', '.join(f'{bytes:,}' for bytes in sent)}")
    if comm.rank == 0:
        print(plan)


def model(tokens: int, d: int, network: Network) -> None:
    """A table: what a forward pass takes on so many ranks of one thread, and where it breaks."""
    n = 2**17
    Q, K, V, _ = arrays(n, d)
    own = statistics.median(seconds(lambda: ropecy.attention(Q, K, V, **options(d, 1))) for _ in range(7)) / n
    told = statistics.median(seconds(lambda: pickle.loads(pickle.dumps(None))) for _ in range(1000))
    one = Outline(sizes=Sizes(1, 1, n, n, d, d), dtype=np.dtype(np.float32), mask=Mask(n, n, hi=0))
    state = features.state_size(one, DEGREE)
    print(f"{tokens:.0e} tokens, d = d_v = {d}, float32, degree {DEGREE}, causal, forward: by a model, from")
    print(f"  {1 / own:,.0f} tokens a second of one thread, measured here")
    print(f"  {network.latency * 1e6:.3g} us a message and {network.bandwidth / 1e9:.3g} GB/s a rank, given")
    print(f"  {told * 1e6:.2g} us to read what one rank tells another, measured here")
    print(f"  {8 * state:,} bytes a state, whatever the number of tokens")
    print("                          polynomial engine, seconds                        exact engine, its ring")
    print("  ranks      tokens each  compute    states     bounds     told       share of work        GB sent  seconds")
    broken = None
    for ranks in (1, 10, 100, 300, 1000, 3000, 10**4, 10**5):
        each = -(-tokens // ranks)
        parts = (
            own * each,
            network.seconds(traffic.sums(state, ranks)),
            network.seconds(traffic.bounds(one, ranks)),
            # What is known doubles with each round; then every rank reads what every other says.
            GATHERS * (network.latency * math.ceil(math.log2(ranks)) + told * ranks),
        )
        share = parts[0] / sum(parts)
        broken = broken or (ranks if share < 0.5 else None)
        starts = [each * r for r in range(ranks)]
        layout = Layout([each] * ranks, [each] * ranks, starts, starts, 0, None, 0)
        ring = traffic.ring(traffic.Sender(one, layout, ranks // 2, False, False), layout)
        columns = " ".join(f"{part:<10.2g}" for part in parts)
        last = f"{share:>8.1%} {ring.sent / 1e9:>21.2f} {network.seconds(ring):>8.2f}"
        print(f"  {ranks:<10,} {each:<12,} {columns} {last}")
    if broken:
        print(f"It breaks by {broken:,} ranks, {tokens // broken:,} tokens each: messages take longer than the work.")


def main() -> None:
    parser = argparse.ArgumentParser(description="What MPI ranks are worth: measured, or by a model.")
    parser.add_argument("--n", type=int, default=2**19, help="tokens")
    parser.add_argument("--d", type=int, default=16, help="width of a head")
    parser.add_argument("--rounds", type=int, default=7, help="of which the median is taken")
    parser.add_argument("--model", action="store_true", help="the table of a model, from one process")
    parser.add_argument("--tokens", type=float, default=1e8, help="of the model")
    parser.add_argument("--latency", type=float, default=3e-6, help="of the model, seconds a message")
    parser.add_argument("--bandwidth", type=float, default=1e10, help="of the model, bytes a second of a rank")
    how = parser.parse_args()
    comm = MPI.COMM_WORLD
    if how.model:
        if comm.rank == 0:
            model(int(how.tokens), how.d, Network(how.latency, how.bandwidth))
    else:
        count(comm, how.d)
        measure(comm, how.n, how.d, how.rounds)


if __name__ == "__main__":
    main()
