"""What the machine offers to this process: processors, and the limits of the container that it may run in.

Every room may import this one; it imports nothing of the package.
"""
