"""The name under which pickles of a `RelativeBias` that version 0.1.0 wrote look for the classes of its form."""

from .approximation.bias_forms import Buckets, Linear, Logarithmic, Power, Table

__all__ = ["Buckets", "Linear", "Logarithmic", "Power", "Table"]
