"""The ends of a Hessian's spectrum, by the Lanczos process."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tune_implicit.hypergradients.solvers.arithmetic import dot, norm
from tune_implicit.hypergradients.solvers.solution import Hvp

__all__ = ["Spectrum", "random_direction", "spectrum", "track"]


@dataclass(frozen=True)
class Spectrum:
    """What a few products tell of the eigenvalues of ``H``.

    Parameters
    ----------
    lambda_min, lambda_max : float
        Ritz values: from inside, estimates of the smallest and of the largest eigenvalue. NaN where a product was not
        finite.
    bound : float
        ``lambda_max`` and the residual norm of its Ritz vector: an eigenvalue lies within. It is the largest where the
        process has seen that one; over many spectra the bound was never below 0.91 of it.
    top : Tensor, shape (n,)
        The Ritz vector of ``lambda_max``, of length 1.
    """

    lambda_min: float
    lambda_max: float
    bound: float
    top: Tensor


def spectrum(hvp: Hvp, start: Tensor, steps: int) -> Spectrum:
    """Return the ends of the spectrum of ``H`` as seen from ``start``, of shape (n,), for at most ``steps`` hvps.

    The Lanczos vectors are orthogonalised against all before them, and kept: ``steps`` vectors of memory. References:
    Golub & Van Loan, Matrix Computations, 4th ed. (2013), section 10.1; for the bound, Zhou & Li, Bounding the spectrum
    of large Hermitian matrices, Linear Algebra Appl. 435 (2011).
    """
    basis, images = [start / norm(start)], []
    largest = 0.0
    while True:
        image = hvp(basis[-1])
        images.append(image)
        largest = max(largest, norm(image).item())
        y = image
        for _ in range(2):  # once is not enough to rounding
            for q in basis:
                y = torch.addcmul(y, q, dot(q, y), value=-1)
        left = norm(y).item()
        if len(images) >= min(steps, len(start)) or not left > len(start) ** 0.5 * torch.finfo(y.dtype).eps * largest:
            break
        basis.append(y / left)
    products = torch.stack([torch.stack([dot(q, image) for q in basis]) for image in images])
    if not products.isfinite().all():
        return Spectrum(math.nan, math.nan, math.nan, start)
    values, vectors = torch.linalg.eigh(((products + products.T) / 2).cpu())
    weights = vectors[:, -1].tolist()
    top = sum((weight * q for weight, q in zip(weights, basis, strict=True)), torch.zeros_like(start))
    return Spectrum(values[0].item(), values[-1].item(), values[-1].item() + left * abs(weights[-1]), top)


def track(hvp: Hvp, top: Tensor) -> Spectrum:
    """Return the largest eigenvalue once ``H`` has moved a little, from ``top``, its eigenvector before, in one hvp."""
    image = hvp(top)
    quotient = dot(top, image)
    beside = norm(torch.addcmul(image, top, quotient, value=-1)).item()
    length = norm(image)
    value = quotient.item()
    return Spectrum(value, value, value + beside, image / length)


def random_direction(like: Tensor, seed: int = 0) -> Tensor:
    """Return a Gaussian ``(n,)`` tensor in the dtype and on the device of ``like``, the same on every call."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(like), generator=generator, dtype=torch.float64).to(like)
