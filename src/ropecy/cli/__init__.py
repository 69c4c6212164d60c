"""What ``python -m ropecy`` does, a module for each command; `__main__` reads the command line and calls them.

Only the doors of the package import this room, for `ropecy.info` and the commands; it may import any other room.
"""
