"""What every solver of ``H v = b`` takes and returns.

A solver knows ``H`` only through ``hvp``, the function ``v -> H v``: no model and no autograd in this room. Vectors
are flat ``(n,)`` tensors of one floating dtype on one device; norms are Euclidean.
"""

import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor

from tune_implicit.errors import InvalidTypeError, InvalidValueError

__all__ = [
    "Hvp",
    "Solution",
    "Solver",
    "Status",
    "certain_norm",
    "check_number",
    "check_stopping",
    "dot",
    "read",
    "scale_of",
    "scaled",
    "steps_between_checks",
    "stopping_norm",
]

Hvp = Callable[[Tensor], Tensor]

# Within 2^-30 to 2^30 the squares of a residual that shrinks to rounding still have float32's full precision.
_ORDINARY = 30

# As many entries of two float32 vectors and of their product stay in the cache of one core.
_IN_CACHE = 2**15


class Status(Enum):
    """How a solve ended.

    ``CONVERGED`` and ``MAX_STEPS`` are answers, the second a truncated one whose residual says how good it is. The
    others are failures; ``v`` is then the best iterate before the failure, and no answer.
    """

    CONVERGED = "converged"
    MAX_STEPS = "max_steps"
    DIVERGED = "diverged"
    NEGATIVE_CURVATURE = "negative_curvature"
    NON_FINITE = "non_finite"

    @property
    def failed(self) -> bool:
        """Whether the solve gave no answer."""
        return self not in (Status.CONVERGED, Status.MAX_STEPS)


@dataclass(frozen=True)
class Solution:
    """The result of a solve.

    Parameters
    ----------
    v : Tensor, shape (n,)
        The (approximate) solution of ``H v = b``, in the dtype and on the device of ``b``.
    status : Status
        How the solve ended.
    steps : int
        Iterations taken.
    residual_norm : float
        ``||b - H v||`` of the ``v`` returned.
    """

    v: Tensor
    status: Status
    steps: int
    residual_norm: float


class Solver(Protocol):
    """Anything that solves ``H v = b`` given only products with ``H``."""

    def solve(self, hvp: Hvp, b: Tensor, v0: Tensor | None = None) -> Solution:
        """Return ``v`` of shape (n,) with its status; ``v0`` is a warm start."""
        ...


def check_number(name: str, value: object, kind: type = numbers.Real) -> None:
    """Check that ``value`` is a number of the abstract ``kind``, which NumPy's are as well.

    Raises
    ------
    InvalidTypeError
        If not.
    """
    if isinstance(value, bool) or not isinstance(value, kind):
        rule = "an integer" if kind is numbers.Integral else "a number"
        raise InvalidTypeError(f"`{name}` must be {rule}, got {value!r}.")


def check_stopping(k: int, tolerance: float, rtol: float) -> None:
    """Check the arguments that the iterative solvers share.

    Raises
    ------
    InvalidTypeError
        If ``k`` is not an integer, or a tolerance no number.
    InvalidValueError
        If ``k``, ``tolerance`` or ``rtol`` is negative, or one of the tolerances NaN.
    """
    check_number("k", k, numbers.Integral)
    if k < 0:
        raise InvalidValueError(f"`k` must not be negative, got {k}. It is the most iterations a solve may take.")
    for name, value in (("tolerance", tolerance), ("rtol", rtol)):
        check_number(name, value)
        if not value >= 0:
            raise InvalidValueError(f"`{name}` must not be negative or NaN, got {value}. Pass 0 to switch it off.")


def scale_of(b: Tensor) -> float:
    """Return the power of two by which a solver scales its system, so that squares neither overflow nor vanish.

    It is 1 where ``b`` is of ordinary size, else the power next below its largest magnitude, which scales without
    rounding; 0 where ``b = 0``, and infinite or NaN where ``b`` is not finite.
    """
    low, high = read(torch.aminmax(b))  # NaN where an entry is; the infinity norm takes 20 times as long
    largest = max(-low, high)
    if largest == 0 or not math.isfinite(largest):
        return largest
    exponent = math.frexp(largest)[1] - 1
    return 1.0 if abs(exponent) < _ORDINARY else math.ldexp(1.0, exponent)


def scaled(b: Tensor, scale: float) -> Tensor:
    """Return ``b / scale``, which is ``b`` itself where that changes nothing."""
    return b if scale == 1 else b / scale


def read(scalars: Sequence[Tensor]) -> list[float]:
    """Return the values of scalar tensors, waiting once where they are on an accelerator."""
    if scalars[0].device.type == "cpu":
        return [scalar.item() for scalar in scalars]
    values: list[float] = torch.stack([scalar.double() for scalar in scalars]).tolist()
    return values


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner product of two ``(n,)`` tensors as a float64 scalar tensor, accumulated in float64.

    In float32 a flat dot product loses three digits of a CG solve on a network of a million parameters.
    """
    if a.dtype == torch.float64:
        return torch.dot(a, b)
    if a.device.type != "cpu" or len(a) <= _IN_CACHE:
        return (a * b).sum(dtype=torch.float64)
    # Fresh memory for as many products takes longer than the sum of them.
    pieces = zip(a.split(_IN_CACHE), b.split(_IN_CACHE), strict=True)
    return torch.stack([(x * y).sum(dtype=torch.float64) for x, y in pieces]).sum()


def certain_norm(norm: float, v: Tensor, largest: float) -> float:
    """Return the residual norm that can be vouched for, given the ``norm`` of a residual carried from step to step.

    Such a residual goes on shrinking when the true one has long been held up by rounding, at about the unit roundoff
    times ``||H|| ||v||``; ``largest`` stands for ``||H||``.
    """
    return max(norm, torch.finfo(v.dtype).eps * largest * float(torch.linalg.vector_norm(v)))


def stopping_norm(tolerance: float, rtol: float, b_norm: float, dtype: torch.dtype) -> float:
    """Return the residual norm below which a solve has converged.

    It is ``tolerance`` or ``rtol * ||b||``, whichever is larger, but at least what ``dtype`` can resolve: further
    iterations only move rounding errors about and would break down on them.
    """
    return max(tolerance, rtol * b_norm, 1e-2 * torch.finfo(dtype).eps * b_norm)


def steps_between_checks(b: Tensor) -> int:
    """Return after how many steps a solver reads its norms on the host.

    On an accelerator each reading makes the device wait, which costs more than the few products past the end that
    later readings cost. What is returned does not depend on it: a solver goes back to the iterate that ended it.
    """
    return 1 if b.device.type == "cpu" else 4
