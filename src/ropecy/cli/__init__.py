"""What ``python -m ropecy`` does, a module for each command; `__main__` reads the command line and calls them.

Only public modules of the package import this folder, for `ropecy.info` and the commands; it may import any other one.
"""
