"""Problems in parts with plans of their own: heads whose scores differ in size, and sequences packed side by side.

Asks the planner for each part.
"""
