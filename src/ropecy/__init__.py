"""ropecy: softmax attention with rotary positions and its gradient, certified, in almost linear time on CPUs.

What it computes is ``O = D^-1 A V`` with ``A_ij = exp(scale Q_i W R_{j-i} K_j^T + b_{j-i})`` and ``D = diag(A 1)``, and
the gradient of the loss ``L(W) = 1/2 || D^-1 A V - E ||_F^2``.

The map of the package:

==========================================  ================================================
`Rotary`                                    R_m and the scaling rules of published models
`RelativeBias`, `RelativeFamily`            what depends on j - i alone
`attention`, `attention_vjp`                O, and its gradient
`loss`, `loss_grad`                         L, and its gradient
`VJP`, `Gradients`, `LossGradients`         what these give: gradients by name
`AttentionMatrix`                           A itself, implicit: ``A @ X``, ``A.T @ X``, ``A.D``; SciPy takes it
`DecodeState`                               token by token, on a state of fixed size
`plan`, `Plan`, `Certificate`               which engine would run, why, and what error it promises
`check`, `Evidence`                         a finished result against rows computed exactly
`BoundedEntryError`, `AccuracyWarning`      what stands in the way of a certificate
`PerformanceWarning`                        what stands in the way of speed
`info`                                      versions and what the machine offers
`ropecy.mpi` (to be imported by name)       the same over the ranks of an MPI communicator
==========================================  ================================================

``ropecy.torch`` and ``ropecy.transformers`` are for those libraries, and imported by whoever wants them.
"""

from .attention import VJP, attention, attention_vjp
from .certificate import AccuracyWarning, BoundedEntryError, Certificate, PerformanceWarning
from .cli.info import info
from .decode import DecodeState
from .evidence import Evidence, check
from .gradients import Gradients, LossGradients
from .loss import loss, loss_grad
from .matrix import AttentionMatrix
from .plan import Plan, plan
from .relative import RelativeBias, RelativeFamily
from .rotary import Rotary

__all__ = [
    "VJP",
    "AccuracyWarning",
    "AttentionMatrix",
    "BoundedEntryError",
    "Certificate",
    "DecodeState",
    "Evidence",
    "Gradients",
    "LossGradients",
    "PerformanceWarning",
    "Plan",
    "RelativeBias",
    "RelativeFamily",
    "Rotary",
    "attention",
    "attention_vjp",
    "check",
    "info",
    "loss",
    "loss_grad",
    "plan",
]

__version__ = "0.2.0"
