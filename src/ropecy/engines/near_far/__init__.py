"""An exact near field and decayed states for what lies beyond: biases and scales that factor far out.

Made of `exact` and `polynomial`.
"""
