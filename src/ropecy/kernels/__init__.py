"""Compiled kernels: C that is serial and pure, under Cython that owns threads, memory and errors.

Each C file is compiled once for each instruction set, and which one runs is chosen at import by what the CPU has;
``ROPECY_ISA`` asks for a lower one. Every room may import this one, which imports nothing of the package.
"""
