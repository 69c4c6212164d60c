"""The inside of `ropecy.DecodeState`: its checked arguments, sums of monomials, history, promises and files.

`ropecy.decode` is the door to this room, and the only module that imports it.
"""
