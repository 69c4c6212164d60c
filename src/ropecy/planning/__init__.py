"""Which engine runs: asks engines, takes the cheapest that certifies eps, and says what it has found.

May import `engines` and the rooms below it. Doors import it.
"""
