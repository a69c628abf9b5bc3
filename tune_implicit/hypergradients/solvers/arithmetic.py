"""Scales, inner products, norms and readings: what the solvers' loops share."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tune_implicit.hypergradients.solvers.solution import Hvp, Solution, Status

__all__ = ["decided_by", "dot", "length", "norm", "read", "scaled", "start", "steps_between_readings"]

# Within 2^-30 to 2^30 the squares of a residual that shrinks to rounding still have float32's full precision.
_ORDINARY = 30

# As many entries of two float32 vectors and of their product stay in the cache of one core.
_IN_CACHE = 2**15


def decided_by(b: Tensor) -> tuple[float, Solution | None]:
    """Return the scale of ``b``; and the solution where ``b`` decides it: 0 where it is 0, a failure where not finite.

    The scale is the power of two by which a solver divides its system, so that squares neither overflow nor vanish. It
    is 1 where ``b`` is of ordinary size, else the power next below its largest magnitude: it scales without rounding.
    """
    low, high = read(torch.aminmax(b))  # NaN where an entry is; the infinity norm takes 20 times as long
    largest = max(-low, high)
    if largest == 0:
        return 1.0, Solution(torch.zeros_like(b), Status.CONVERGED, 0, 0.0)
    if not math.isfinite(largest):
        return 1.0, Solution(torch.zeros_like(b), Status.NON_FINITE, 0, largest)
    # Not below the smallest normal number, of which 1 / scale is still a number.
    exponent = max(math.frexp(largest)[1], math.frexp(torch.finfo(b.dtype).tiny)[1]) - 1
    return (1.0 if abs(exponent) < _ORDINARY else math.ldexp(1.0, exponent)), None


def start(hvp: Hvp, b: Tensor, v0: Tensor, definite: bool = False) -> tuple[Tensor, Tensor, float] | None:
    """Return the multiple ``c v0`` to start from, its residual, and ``||H v0|| / ||v0||``, for one hvp.

    The multiple that makes ``||b - c H v0||`` smallest is never worse than zero, even where ``v0`` solved another
    system. For a solver of ``definite`` systems it is shortened to the one of least energy where that is shorter, so as
    to be no worse in either. ``None`` where there is no such multiple: such a solver is to meet itself that
    ``v0' H v0`` is not positive.
    """
    size = torch.linalg.vector_norm(v0, math.inf)
    v0 = v0 / torch.where(size > 0, size, 1)
    hv = hvp(v0)
    squares, curvature = dot(hv, hv), dot(v0, hv)
    by_residual, by_energy, image, positive = read(
        [dot(hv, b) / squares, dot(v0, b) / curvature, (squares / dot(v0, v0)).sqrt(), curvature]
    )
    multiple = by_residual
    if definite:
        agree = positive > 0 and by_residual * by_energy > 0
        multiple = min(by_residual, by_energy, key=abs) if agree else 0.0
    if multiple == 0 or not (math.isfinite(multiple) and math.isfinite(image)):
        return None
    return multiple * v0, torch.add(b, hv, alpha=-multiple), image


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
    if a.device.type != "cpu":
        return (a * b).sum(dtype=torch.float64)
    if a.numel() <= _IN_CACHE:
        a64 = a.double()
        return torch.dot(a64, a64 if b is a else b.double())
    # Fresh memory for as many products takes longer than the sum of them.
    pieces = zip(a.split(_IN_CACHE), b.split(_IN_CACHE), strict=True)
    return torch.stack([(x * y).sum(dtype=torch.float64) for x, y in pieces]).sum()


def norm(v: Tensor) -> Tensor:
    """Return the Euclidean norm of what is of ordinary size, as a scalar tensor on the device of ``v``."""
    value: Tensor = torch.linalg.vector_norm(v)
    return value


def length(v: Tensor) -> float:
    """Return the Euclidean norm where entries may be of any size: the square of 1e30 is no float32."""
    return float(torch.linalg.vector_norm(v, dtype=torch.float64))


def steps_between_readings(b: Tensor) -> int:
    """Return after how many steps a solver reads its norms on the host.

    On an accelerator each reading makes the device wait, which costs more than the few products past the end that
    later readings cost. What is returned does not depend on it: a solver goes back to the iterate that ended it.
    """
    return 1 if b.device.type == "cpu" else 4
