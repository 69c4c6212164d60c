"""Compiled kernels: C that is serial and pure, under Cython that owns threads, memory and errors.

Nothing here knows what attention means; the engines do. Each C kernel file is compiled once per instruction set
level, and the level is chosen at import by what the CPU has (``ROPECY_ISA`` asks for a lower one).
"""
