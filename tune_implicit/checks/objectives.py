"""A look at the parameters and the two objectives: losses, and the paths from the ul values to them."""

import math
import re
import traceback
from pathlib import Path

import torch

from tune_implicit.checks.findings import CheckReport, StopCheckError
from tune_implicit.checks.fixed import FixedProblem, raised_by
from tune_implicit.errors import DerivativeError, DetachedError, InvalidTypeError, InvalidValueError
from tune_implicit.hypergradients.batches import tensors_of

__all__ = ["look_at_objectives", "raised"]

# What a search moves rather than a gradient.
_SEARCHED = re.compile(
    r"(^|[._])(log_?)?(lr|learning_?rate|step_?size|momentum|init\w*|beta\d?)($|[._])", re.IGNORECASE
)

# Where a line is that is not the user's: this package, and torch.
_NOT_THEIRS = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent))


def look_at_objectives(fixed: FixedProblem, report: CheckReport) -> None:
    """Look at what both objectives return, and at what they depend on; ul values that nothing uses are then frozen."""
    _parameters(fixed, report)
    _losses(fixed, report)
    _paths(fixed, report)


def _parameters(fixed: FixedProblem, report: CheckReport) -> None:
    """Look for parameters that cannot be learned."""
    for level in ("ul_model", "ll_model"):
        for name, param in getattr(fixed.problem, level).named_parameters():
            if not param.is_floating_point():
                report.fault(
                    "integer-parameter",
                    f"`{level}`'s parameter {name!r} is {param.dtype} and has no gradient. A discrete value "
                    "belongs to the search: read it from the config.",
                )


def _losses(fixed: FixedProblem, report: CheckReport) -> None:
    """Evaluate both objectives; look for what is no scalar, not finite, detached, or edits its input."""
    losses = []
    for level, batch in (("ul", fixed.validate), ("ll", fixed.train)):
        name = f"{level}_objective"
        touchable = [*fixed.problem.ul_model.parameters(), *fixed.problem.ll_model.parameters(), *tensors_of(batch)]
        before = [tensor.detach().clone() for tensor in touchable]
        try:
            loss = fixed.gradients(level, fixed.ll_params())[0].item()
        except InvalidTypeError as error:
            report.stop("not-a-loss", str(error))
        except DetachedError as error:
            report.stop("detached", str(error))
        except DerivativeError as error:
            report.stop("double-backward", str(error))
        except InvalidValueError as error:
            report.stop("non-scalar", str(error))
        except RuntimeError as error:
            _stop_at_torch_error(report, name, error)
        except Exception as error:
            if raised_by(error) is None:
                raise
            report.stop("objective-raised", f"`{name}` {raised(error)}")
        if any(not torch.equal(old, new) for old, new in zip(before, touchable, strict=True)):
            report.stop(
                "in-place",
                f"`{name}` changed a parameter or its batch in place: every call then sees another problem. Work on a "
                "copy.",
            )
        if not math.isfinite(loss):
            report.stop("non-finite", f"`{name}` returned {loss} before any step.")
        losses.append(loss)
    report.ok("losses", "ul loss {:.4g}, ll loss {:.4g} before any step".format(*losses))


def _stop_at_torch_error(report: CheckReport, name: str, error: RuntimeError) -> None:
    text = str(error).splitlines()[0]
    if "inplace" in text or "in-place" in text:
        report.stop("in-place", f"`{name}` edits in place what its gradient needs: {text} Work on a copy.")
    report.stop("torch-error", f"`{name}` {raised(error)}")


def raised(error: Exception) -> str:
    """Return what an objective raised, and in which line of the user's own."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not any(part in frame.filename for part in _NOT_THEIRS)]
    where = f" (in line {own[-1].lineno} of {Path(own[-1].filename).name})" if own else ""
    text = (str(error).splitlines() or [""])[0]
    return f"raised {type(error).__name__}{where}: {text}"


def _paths(fixed: FixedProblem, report: CheckReport) -> None:
    """Look for a path from each ul value to each loss.

    Raises
    ------
    StopCheckError
        If no ul value has one.
    """
    ul_params = fixed.ul_params()
    in_ul, in_ll = (_used(level, fixed, report) for level in ("ul", "ll"))
    for name in ul_params:
        if name in in_ul | in_ll:
            continue
        searched = _SEARCHED.search(name)
        report.fault(
            "learning-rate" if searched else "unused-ul-value",
            f"Neither objective uses the ul model's {name!r}: its hypergradient is structurally zero. "
            + (
                "It belongs to the search: read it from the config."
                if searched
                else "Take it from `state.ul_model` and use it, or freeze it."
            ),
        )
        ul_params[name].requires_grad_(False)
    if not fixed.ul_params():
        raise StopCheckError
    if in_ul and not in_ll:
        report.fault(
            "objectives-swapped",
            f"`ul_objective` uses the ul values {_listed(in_ul)} and `ll_objective` none: training does not depend "
            "on them, so that there is no implicit term. Are the two objectives swapped?",
        )
    if in_ll:
        report.ok("ul-values", f"a path from {_listed(in_ll)} through the ll weights")


def _used(level: str, fixed: FixedProblem, report: CheckReport) -> set[str]:
    """Return the names of the ul values that a loss depends on; stop where it depends on no ll parameter."""
    ul_params, ll_params = fixed.ul_params(), fixed.ll_params()
    _, gradients = fixed.gradients(level, [*ll_params, *ul_params.values()])
    if all(gradient is None for gradient in gradients[: len(ll_params)]):
        report.stop(
            "detached",
            f"`{level}_objective` does not depend on the ll model's parameters. Compute it from `state.ll_model`, "
            "without .detach(), .item() or NumPy, and not from a model of your own outside the state.",
        )
    of_ul = gradients[len(ll_params) :]
    return {name for name, gradient in zip(ul_params, of_ul, strict=True) if gradient is not None}


def _listed(names: set[str]) -> str:
    return ", ".join(map(repr, sorted(names)))
