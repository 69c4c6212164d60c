"""What processes that hold pieces of a sequence need of MPI: a communicator, with sums in a fixed order, and a network.

Imports mpi4py where it is needed, and `problem`. Only the door `ropecy.mpi` imports it.
"""
