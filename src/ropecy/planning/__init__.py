"""The choice of an engine: engines are asked, the cheapest that certifies eps is taken, and a report says why.

It may import `engines` and what that may import. The package's public modules import it.
"""
