"""What the machine offers to this process: processors, and the limits of the container that it may run in.

Every folder of the package may import this one, which imports nothing of the package.
"""
