"""A look at first and second derivatives: whether they are finite, and whether they agree with differences."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from tune_implicit.checks.findings import AGREES, CheckReport
from tune_implicit.checks.fixed import FixedProblem, raised_by
from tune_implicit.errors import DerivativeError, InvalidTypeError
from tune_implicit.hypergradients.solvers.spectrum import random_direction
from tune_implicit.hypergradients.vectors import flatten, unflatten

__all__ = ["exact_copy", "look_at_derivatives"]

# For differences of a loss, and of a gradient. A ReLU network's gradient jumps so often that the steps must be tiny.
_STEPS = (1e-5, 1e-4, 1e-6, 1e-7)
_STEPS_OF_GRADIENTS = (1e-6, 1e-8, 1e-4, 1e-9, 1e-10)

# An error that no other step needs to improve on.
_EXACT = 1e-5


def look_at_derivatives(fixed: FixedProblem, report: CheckReport) -> None:
    """Compare first and second derivatives with differences, in float64, along random directions."""
    params = [*fixed.ll_params(), *fixed.ul_params().values()]
    for level in ("ul", "ll"):
        if not fixed.gradient(level, params).isfinite().all():
            report.stop(
                "non-finite",
                f"The gradient of `{level}_objective` is not finite although its value is, as that of sqrt at 0. "
                "Add a small constant inside the root, or clamp.",
            )
    _second(fixed, report)
    exact = exact_copy(fixed, report)
    if exact is not None:
        _compare_with_differences(exact, report)


def _second(fixed: FixedProblem, report: CheckReport) -> None:
    """Look at one product with each of the second derivatives."""
    direction = random_direction(flatten([param.detach() for param in fixed.ll_params()]))
    try:
        with fixed.second_order() as second:
            image = second.hvp(direction)
            mixed = second.mixed_vjp(direction, list(fixed.ul_params().values()))
    except DerivativeError as error:
        report.stop("double-backward", str(error))
    if not all(t.isfinite().all() for t in (image, *mixed) if t is not None):
        report.stop("non-finite", "The second derivatives of `ll_objective` are not finite although its gradient is.")
    if all(m is None or not m.any() for m in mixed) and not report.faults:
        report.fault(
            "no-implicit-term",
            "The gradient of `ll_objective` in the ll weights does not depend on any ul value: the hypergradient has "
            "no implicit term.",
        )


def exact_copy(fixed: FixedProblem, report: CheckReport | None = None) -> FixedProblem | None:
    """Return the problem in float64, ``None`` where it does not run in that or not twice alike; ``report`` is told."""
    try:
        exact = fixed.doubled()
    except InvalidTypeError as error:
        if report is not None:
            report.warn("not-in-float64", f"Batches cannot be brought to float64, to compare with differences: {error}")
        return None
    for level in ("ll", "ul"):
        told = None
        try:
            once, again = exact.value(level), exact.value(level)
        except Exception as error:
            if not isinstance(error, RuntimeError | InvalidTypeError) and raised_by(error) is None:
                raise
            text = (str(error).splitlines() or [type(error).__name__])[0]
            told = "not-in-float64", f"`{level}_objective` does not run in float64", f": {text}"
        else:
            if once != again:
                told = (
                    "not-repeatable",
                    f"`{level}_objective` gives another loss at every call although all global generators are the "
                    "same, as from a generator of its own",
                    ".",
                )
        if told is not None:
            if report is not None:
                name, seen, end = told
                report.warn(name, f"{seen}, so that nothing was compared with differences{end}")
            return None
    return exact


def _compare_with_differences(exact: FixedProblem, report: CheckReport) -> None:
    ll_params = exact.ll_params()
    params = [*ll_params, *exact.ul_params().values()]
    for level in ("ul", "ll"):
        if exact.budget.spent:
            report.no_time(f"`{level}_objective`'s gradient beside differences")
            continue
        error = directional_error(params, exact.gradient(level, params), partial(exact.value, level), _STEPS)
        _tell(f"`{level}_objective`'s gradient", error, report)
    if exact.budget.spent:
        report.no_time("The second derivative of `ll_objective` beside differences")
        return
    weights = random_direction(flatten(ll_params), seed=1)

    def along() -> float:
        return (exact.gradient("ll", ll_params) @ weights).item()

    with exact.second_order() as second:
        image = second.hvp(weights)
    error = directional_error(ll_params, image, along, _STEPS_OF_GRADIENTS)
    _tell("the second derivative of `ll_objective`", error, report)


def _tell(what: str, error: float, report: CheckReport) -> None:
    if error <= AGREES:
        report.ok("derivatives", f"{what} agrees with differences to {error:.0e}")
    else:
        report.fault(
            "derivative",
            f"Along a random direction {what} is off by {error:.0%} from differences of its values. A part is "
            "detached, or a function of your own or of a module has a wrong derivative.",
        )


def directional_error(
    params: Sequence[nn.Parameter], gradient: Tensor, value: Callable[[], float], steps: Sequence[float]
) -> float:
    """Return how far ``gradient`` is from differences of ``value()`` along a random direction over ``params``.

    Parameters
    ----------
    params : sequence of Parameter
        Moved, and moved back.
    gradient : Tensor, shape (n,)
        The gradient of ``value()`` over all entries of ``params``.
    value : callable() -> float
        Computes the scalar in float64, the same at every call.
    steps : sequence of float
        The lengths of the differences. A kink within a step spoils one, rounding another.

    Returns
    -------
    float
        Relative to the derivative or the norm of ``gradient``, whichever is larger; the best over ``steps``.
    """
    direction = random_direction(gradient)
    pieces = unflatten(direction, params)
    expected = (gradient @ direction).item()
    scale = max(abs(expected), torch.linalg.vector_norm(gradient).item(), 1e-12)

    def shift(by: float) -> None:
        with torch.no_grad():
            for param, piece in zip(params, pieces, strict=True):
                param.add_(piece, alpha=by)

    best = math.inf
    for h in steps:
        shift(h)
        high = value()
        shift(-2 * h)
        low = value()
        shift(h)
        best = min(best, abs((high - low) / (2 * h) - expected) / scale)
        if best < _EXACT:
            break
    return best
