"""Heads with plans of their own: slots whose scores differ in size are planned, and computed, in groups."""
