"""The attention matrix A as a linear operator, which NumPy and SciPy use by its products with A and A^T."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NoReturn, overload

import numpy as np
from numpy.typing import ArrayLike

from .approximation.minimax import relative_error_for
from .certificate import Certificate, Indices, nothing_to_do
from .engines.base import Context
from .machine.memory import require
from .options import MatrixOptions
from .planning.planner import choose_and_warn
from .problem import checks
from .problem.call import prepare_for, spread_columns
from .problem.normal_form import normal_form
from .problem.problem import Problem
from .relative import RelativeFamily
from .rotary import Rotary

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Operator(ABC):
    """A matrix M that is known by its products with M and M^T, and holds no array of its entries.

    It has the attributes and methods that SciPy's iterative solvers and ``scipy.sparse.linalg.aslinearoperator`` need.

    Attributes
    ----------
    shape : tuple of int
        (..., n, n_k); SciPy takes matrices without leading axes.
    dtype : numpy.dtype
        The dtype of the arrays that M is made from.
    """

    # With None, NumPy leaves X @ M and 2 * M to this class, instead of treating M as an array of one object.
    __array_ufunc__ = None

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    @abstractmethod
    def T(self) -> Operator:
        """M^T."""

    @abstractmethod
    def __matmul__(self, X: ArrayLike) -> np.ndarray:
        """M X for an X of M's dtype, of shape (..., n_k, m) or (n_k,)."""

    @abstractmethod
    def diagonal(self) -> np.ndarray:
        """The diagonal M_ii, an array (..., min(n, n_k))."""

    def __rmatmul__(self, X: ArrayLike) -> np.ndarray:
        """X M for an X of M's dtype, of shape (..., m, n) or (n,)."""
        X = checks.check_factor(X, self.dtype, self.shape[:-2], self.shape[-2], axis=-1)
        return self.T @ X if X.ndim == 1 else np.swapaxes(self.T @ np.swapaxes(X, -1, -2), -1, -2)

    def __mul__(self, factor: float) -> AffineMatrix:
        """The matrix times the number `factor`."""
        if np.ndim(factor):
            return NotImplemented
        return AffineMatrix(self, checks.check_number("factor", factor), 0.0)

    __rmul__ = __mul__

    def add_diagonal(self, shift: float) -> AffineMatrix:
        """M + shift I, for a square M.

        Raises
        ------
        ValueError
            M is not square.
        """
        return AffineMatrix(self, 1.0, checks.check_number("shift", shift))

    def dot(self, X: ArrayLike) -> np.ndarray:
        """M X, as ``M @ X``."""
        return self @ X

    def matvec(self, x: ArrayLike) -> np.ndarray:
        """M x for a vector x (n_k,) or a column (n_k, 1).

        Solvers choose the dtype of their vectors: real numbers of any dtype are rounded to M's.
        """
        return self @ checks.check_real("x", x, self.dtype)

    def rmatvec(self, x: ArrayLike) -> np.ndarray:
        """M^T x, as `matvec`."""
        return self.T.matvec(x)

    def matmat(self, X: ArrayLike) -> np.ndarray:
        """M X for X (n_k, m), real numbers of any dtype, as `matvec`."""
        return self @ checks.check_real("X", X, self.dtype)

    def rmatmat(self, X: ArrayLike) -> np.ndarray:
        """M^T X, as `matmat`."""
        return self.T.matmat(X)

    def toarray(self) -> np.ndarray:
        """M as a dense array, for small n: the product with the identity.

        Raises
        ------
        MemoryError
            The array needs more than the machine has.
        """
        size, n_k = math.prod(self.shape), self.shape[-1]
        # The float64 product, its copy rounded to M's dtype, and the identity are in memory at the same time.
        require(size * (8.0 + self.dtype.itemsize) + 8.0 * n_k * n_k, f"an array of shape {self.shape}")
        return self @ np.eye(n_k, dtype=self.dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__} of shape {self.shape} holds no array: A @ X multiplies without one, and "
            "A.toarray() makes it"
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={self.shape}, dtype={self.dtype})"


class AttentionMatrix(Operator):
    """A_ij = exp(scale Q_i W R_{j-i} K_j^T + b_{j-i}), implicit and not normalised: ``A @ X``, ``A.T @ X``, ``A.D``.

    Parameters
    ----------
    Q, K, R, **options
        As in `attention`, without V, `W_V` and the options that say what to return.

    Attributes
    ----------
    shape : tuple of int
        (..., n, n_k).
    dtype : numpy.dtype
        The dtype of Q.

    Notes
    -----
    Apart from rounding, entry (i, c) of ``A @ X`` has an error of at most ``e sum_j A_ij |X_jc|``, where
    e = 2 eps / (1 + eps^2). Scores are not shifted, so a sum past the largest number is inf. Each product costs as much
    as `attention` with the values X.

    ``scipy.sparse.linalg.cg(A, b)`` and ``aslinearoperator(A)`` work as they are, and ``2 * A`` and
    ``A.add_diagonal(0.1)``, which is A + 0.1 I, are linear operators too (`AffineMatrix`). ``np.asarray(A)`` raises
    TypeError: only ``A.toarray()`` makes an array of n x n_k numbers.

    Examples
    --------
    >>> Q, K = np.random.default_rng(0).uniform(-1, 1, (2, 50, 4))
    >>> A = AttentionMatrix(Q, K, causal=True)
    >>> bool(np.allclose(A.D, (A @ np.ones((50, 1)))[:, 0]))
    True
    """

    def __init__(
        self, Q: ArrayLike, K: ArrayLike, R: Rotary | RelativeFamily | None = None, **options: Unpack[MatrixOptions]
    ) -> None:
        if "W_V" in options:
            raise TypeError("AttentionMatrix() got an unexpected keyword argument 'W_V'")
        self._call = prepare_for("AttentionMatrix", Q, K, None, R, options)
        self._transposed = False
        self.dtype = self._call.dtype
        self.shape = self._call.lead + (self._call.shape[-2], self._call.problem.k.shape[1])

    @property
    def T(self) -> AttentionMatrix:
        """A^T, in which queries and keys have changed places."""
        other = object.__new__(AttentionMatrix)
        other._call, other._transposed, other.dtype = self._call, not self._transposed, self.dtype
        other.shape = self.shape[:-2] + (self.shape[-1], self.shape[-2])
        return other

    @property
    def D(self) -> np.ndarray:
        """The row sums, (..., n), in the dtype of Q."""
        return self @ np.ones(self.shape[-1], self.dtype)

    def __matmul__(self, X: ArrayLike) -> np.ndarray:
        """A X for X (..., n_k, m) or (n_k,), in the dtype of Q.

        Raises
        ------
        TypeError, ValueError, BoundedEntryError, NotImplementedError, MemoryError
            As `attention` does.
        """
        return self._multiply(X)[0]

    @overload
    def dot(self, X: ArrayLike, *, return_certificate: Literal[False] = False) -> np.ndarray: ...
    @overload
    def dot(self, X: ArrayLike, *, return_certificate: Literal[True]) -> tuple[np.ndarray, Certificate]: ...
    @overload
    def dot(
        self, X: ArrayLike, *, return_certificate: bool
    ) -> np.ndarray | tuple[np.ndarray, Certificate]: ...
    def dot(
        self, X: ArrayLike, *, return_certificate: bool = False
    ) -> np.ndarray | tuple[np.ndarray, Certificate]:
        """A X, as ``A @ X``, and, if asked for, its certificate.

        Parameters
        ----------
        X : (..., n_k, m) or (n_k,) array
            An array of the dtype of Q.
        return_certificate : bool
            Whether to return the certificate beside the product.

        Returns
        -------
        product : (..., n, m) or (..., n) array
        certificate : Certificate
            Only if `return_certificate`. Where no sum overflows, entry (i, c) of the product is within ``truncation
            sum_j A_ij |X_jc| + rounding (sum_j A_ij) max |X|`` of that of A X, the maximum being over all of X.

        Raises
        ------
        TypeError, ValueError, BoundedEntryError, NotImplementedError, MemoryError
            As `attention` does.
        """
        return_certificate = checks.check_flag("return_certificate", return_certificate)
        product, certificate = self._multiply(X)
        return (product, certificate) if return_certificate else product

    def diagonal(self) -> np.ndarray:
        """A_ii, (..., min(n, n_k)), in the dtype of Q: computed directly, hence exact but for rounding."""
        problem = self._call.problem
        H, G, mask = problem.sizes.H, problem.sizes.G, problem.mask
        count = min(self.shape[-2:])
        q, k = problem.q[:, :, :count], problem.k[:, :count]
        t, seen = mask.diagonal(count)
        diagonal = np.zeros((H, G, count))
        if count and seen.any():
            scale = problem.scale
            if problem.near is not None:
                near = np.asarray(problem.near.scale)[..., None]
                scale = np.where(np.abs(t) < problem.near.width, near, scale)
            if problem.family is not None:
                # Without packed sequences all entries of the diagonal have one offset.
                q = q @ problem.family.matrix(int(-t[0]), k.shape[-1])
            with np.errstate(over="ignore"):
                scores = np.einsum("hgid,hid->hgi", q, k, dtype=np.float64)
                scores *= scale
                if problem.bias is not None:
                    scores += problem.bias[..., np.clip(t - mask.least, 0, mask.most - mask.least)]
                np.exp(scores, out=diagonal)
            seen = seen if mask.kept is None else seen & mask.kept[:, None, :count]
            diagonal = np.where(seen, diagonal, 0)
        with np.errstate(over="ignore"):
            return diagonal.reshape(self.shape[:-2] + (count,)).astype(self.dtype)

    def _multiply(self, X: ArrayLike) -> tuple[np.ndarray, Certificate]:
        """A X in the dtype of Q, and its certificate."""
        X = checks.check_factor(X, self.dtype, self.shape[:-2], self.shape[-1])
        columns = X[:, None] if X.ndim == 1 else X
        shape = self.shape[:-1] + columns.shape[-1:]
        product, certificate = np.zeros(shape, self.dtype), nothing_to_do()
        if product.size:
            found, certificate = self._product(columns.astype(self._call.problem.q.dtype, copy=False))
            with np.errstate(over="ignore"):
                product[...] = found.reshape(shape)
        return (product[..., 0] if X.ndim == 1 else product), certificate

    def _product(self, X: np.ndarray) -> tuple[np.ndarray, Certificate]:
        """A X or A^T X in float64, slot by slot, as exp(lse) times the normalised result; and its certificate."""
        call = self._call
        if not self._transposed:
            # Columns that differ between the heads of a group end the sharing of keys.
            grouped = X.ndim < 3 or X.shape[-3] == 1
            problem = call.problem if grouped else call.problem.ungrouped()
            return self._evaluate(problem, spread_columns(X, call, call.key_heads if grouped else call.heads))
        problem = call.problem.transposed(spread_columns(X, call, call.heads))
        product, certificate = self._evaluate(problem, problem.v)
        product = product[:, 0, ::-1]
        mask, packed = call.problem.mask.kept, call.problem.mask.packed
        if certificate.packed:
            # The transposed problem has all sequences in reverse order.
            certificate = _of_reversed(certificate, packed.size)
        if mask is not None:
            product = np.where(np.repeat(mask, call.problem.q.shape[1], axis=0)[..., None], product, 0)
        return product, certificate

    def _evaluate(self, problem: Problem, v: np.ndarray) -> tuple[np.ndarray, Certificate]:
        problem = problem.with_values(v)
        if problem.empty:
            return np.zeros(problem.q.shape[:3] + v.shape[2:]), nothing_to_do()
        normal = normal_form(problem, False)
        request = replace(self._call.request, each_weight=True)
        executable = choose_and_warn(Context.of(normal.problem, request)).executable
        result = executable.forward(normal.problem, want_lse=True)
        o = normal.output(result.o, result.lse)
        with np.errstate(over="ignore", invalid="ignore"):
            # Where exp(lse) is inf, an entry 0 of o has the product 0, not NaN.
            product = np.where(o == 0, 0, np.exp(normal.log_sums(result.lse))[..., None] * o)
        # Each weight has a relative error of at most e. Rounding changes a normalised row by at most the fraction
        # `rounding` of range(X) <= 2 max |X|, and the sum of its weights by at most the same fraction: together 3.
        return product, _of_product(result.certificate, result.executable.certificate)


def _of_product(of_row: Certificate, planned: Certificate) -> Certificate:
    """The certificate of a product, from that of its normalised rows and from the one that was planned."""
    # e is the relative error of a weight. Under a causal mask it may exceed what follows from the error of a row.
    e = relative_error_for(planned.truncation) if planned.truncation else 0.0
    pairs = zip(of_row.parts, planned.parts, strict=True)
    parts = tuple((heads, _of_product(part, of_plan)) for (heads, part), (_, of_plan) in pairs)
    return replace(of_row, truncation=e, rounding=3 * of_row.rounding, rows_truncation=None, parts=parts)


def _of_reversed(found: Certificate, sequences: int) -> Certificate:
    """The certificate with the packed sequences of its parts counted from the other end."""

    def turned(slots: Indices) -> Indices:
        return tuple(sorted((*slot[:-1], sequences - 1 - slot[-1]) for slot in slots))

    return replace(found, parts=tuple((turned(slots), part) for slots, part in found.parts))


class AffineMatrix(Operator):
    """factor M + shift I, of an `AttentionMatrix` or another such M: what ``2 * A`` and ``A.add_diagonal(0.1)`` are.

    Its products are computed from those of M, so an error of M X is multiplied by `factor`.

    Parameters
    ----------
    M : AttentionMatrix or AffineMatrix
    factor, shift : float

    Raises
    ------
    ValueError
        `shift` is not 0, and M is not square.
    """

    def __init__(self, M: Operator, factor: float, shift: float) -> None:
        if isinstance(M, AffineMatrix):
            M, factor, shift = M._M, factor * M._factor, factor * M._shift + shift
        if shift and M.shape[-2] != M.shape[-1]:
            raise ValueError(f"shift: got {shift}, wants a square matrix to add it to, and its shape is {M.shape}")
        self._M: Operator = M
        self._factor, self._shift = factor, shift
        self.shape, self.dtype = M.shape, M.dtype

    @property
    def T(self) -> AffineMatrix:
        """factor M^T + shift I."""
        return AffineMatrix(self._M.T, self._factor, self._shift)

    def __matmul__(self, X: ArrayLike) -> np.ndarray:
        """factor M X + shift X for X (..., n_k, m) or (n_k,), in the dtype of M.

        Raises
        ------
        TypeError, ValueError, BoundedEntryError, NotImplementedError, MemoryError
            As `attention` does.
        """
        X = checks.check_factor(X, self.dtype, self.shape[:-2], self.shape[-1])
        return self._combine(self._M @ X, X)

    def diagonal(self) -> np.ndarray:
        """factor M_ii + shift, (..., min(n, n_k))."""
        diagonal = self._M.diagonal()
        return self._combine(diagonal, np.ones_like(diagonal))

    def _combine(self, of_M: np.ndarray, of_I: np.ndarray) -> np.ndarray:
        """factor of_M + shift of_I."""
        with np.errstate(over="ignore", invalid="ignore"):
            combined = self._factor * of_M
            if self._shift:
                combined = combined + self._shift * of_I
        return combined.astype(self.dtype, copy=False)
