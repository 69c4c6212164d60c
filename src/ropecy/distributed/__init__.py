"""What processes that hold pieces of a sequence use MPI for: a communicator with sums in a fixed order, and a network.

It imports mpi4py where that is needed, and `problem`. Only the public module `ropecy.mpi` imports it.
"""
