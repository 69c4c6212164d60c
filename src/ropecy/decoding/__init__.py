"""What `ropecy.DecodeState` is made of: checked arguments, sums of monomials, a history, error bounds and files.

The public module `ropecy.decode` is the only one that imports this folder.
"""
