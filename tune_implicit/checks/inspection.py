"""A problem before its training: parameters, splits, losses, the ul values' paths, and derivatives."""

import re
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor
from torch.autograd import grad

from tune_implicit.checks.derivatives import directional_error, once_differentiable_modules
from tune_implicit.checks.findings import AGREES, CheckReport, StopCheckError
from tune_implicit.checks.fixed import FixedProblem
from tune_implicit.errors import InvalidTypeError, InvalidValueError, TuneImplicitError
from tune_implicit.hypergradients.solvers.spectrum import random_direction
from tune_implicit.hypergradients.state import Batch, tensors_of
from tune_implicit.hypergradients.vectors import flatten
from tune_implicit.trials.problem import NO_SELECT_DATA, BilevelProblem
from tune_implicit.trials.splits import batches_of, move

__all__ = ["Inspection"]

# What a search moves rather than a gradient.
_SEARCHED = re.compile(
    r"(^|[._])(log_?)?(lr|learning_?rate|step_?size|momentum|init\w*|beta\d?)($|[._])", re.IGNORECASE
)

# Of a split, to count its examples.
_MOST_BATCHES = 1000

# For differences of a loss, and of a gradient. A ReLU network's gradient jumps so often that the steps must be tiny.
_STEPS = (1e-4, 1e-5, 1e-6, 1e-7)
_STEPS_OF_GRADIENTS = (1e-4, 1e-6, 1e-8, 1e-9, 1e-10)


@dataclass
class Inspection:
    """What can be seen without training.

    Parameters
    ----------
    problem : BilevelProblem
        A copy: its ul values that nothing uses are frozen.
    report : CheckReport
        Takes the findings.

    Attributes
    ----------
    fixed : FixedProblem
        The problem on its first batches.
    ul_loss, ll_loss : float
        On these.
    exact : FixedProblem, optional
        The same in float64, where both objectives run in it.
    """

    problem: BilevelProblem
    report: CheckReport
    fixed: FixedProblem = field(init=False)
    ul_loss: float = field(init=False)
    ll_loss: float = field(init=False)
    exact: FixedProblem | None = field(init=False, default=None)

    def run(self) -> None:
        """Look at everything, up to the first fault that nothing can follow."""
        self.parameters()
        self.splits()
        self.losses()
        self.ul_values()
        self.derivatives()

    def parameters(self) -> None:
        """Look for parameters that cannot be learned."""
        for level in ("ul_model", "ll_model"):
            for name, param in getattr(self.problem, level).named_parameters():
                if not param.is_floating_point():
                    self.report.fault(
                        "integer-parameter",
                        f"`{level}`'s parameter {name!r} is {param.dtype} and has no gradient. A discrete value "
                        "belongs to the search: read it from the config.",
                    )

    def splits(self) -> None:
        """Look at the first batches, and at how much data each split holds."""
        device = next(self.problem.ll_model.parameters()).device
        first: dict[str, Batch] = {}
        sizes: dict[str, int] = {}
        for name in ("train_data", "validate_data", "select_data"):
            data = getattr(self.problem, name)
            if data is None:
                self.report.warn("no-select-data", NO_SELECT_DATA)
                continue
            sizes[name] = 0
            try:
                for batch in islice(batches_of(name, data), _MOST_BATCHES):
                    first.setdefault(name, move(batch, device))
                    sizes[name] += next((len(tensor) for tensor in tensors_of(batch) if tensor.ndim), 1)
            except TuneImplicitError as error:
                self.report.stop("data", str(error))
        for one, other in (("train_data", "validate_data"), ("validate_data", "select_data")):
            if one in first and other in first and _same(first[one], first[other]):
                self.report.warn(
                    "same-data",
                    f"`{one}` and `{other}` begin with the same batch. Where the splits are the same, ul steps overfit "
                    "what they should hold out.",
                )
        if sizes["validate_data"] > sizes["train_data"] > 1:
            self.report.warn(
                "splits-swapped",
                f"`validate_data` holds {sizes['validate_data']} examples and `train_data` {sizes['train_data']}: are "
                "the two swapped?",
            )
        self.fixed = FixedProblem(self.problem, first["train_data"], first["validate_data"])

    def losses(self) -> None:
        """Evaluate both objectives; look for what is no scalar, not finite, detached, or edits its input."""
        losses = {}
        for level, batch in (("ul", self.fixed.validate), ("ll", self.fixed.train)):
            before = [tensor.detach().clone() for tensor in self._touchable(batch)]
            try:
                losses[level] = self.fixed.ul_loss() if level == "ul" else self.fixed.ll_loss()
                grad(losses[level], self.fixed.ll_params(), retain_graph=True, allow_unused=True)
            except InvalidTypeError as error:
                self.report.stop("not-a-loss", str(error))
            except InvalidValueError as error:
                self.report.stop("detached" if "depends on no parameter" in str(error) else "non-scalar", str(error))
            except RuntimeError as error:
                self._torch_error(f"{level}_objective", error)
            if any(not torch.equal(old, new) for old, new in zip(before, self._touchable(batch), strict=True)):
                self.report.stop(
                    "in-place",
                    f"`{level}_objective` changed a parameter or its batch in place: every call then sees another "
                    "problem. Work on a copy.",
                )
            if not losses[level].isfinite():
                self.report.stop("non-finite", f"`{level}_objective` returned {losses[level].item()} before any step.")
        self.ul_loss, self.ll_loss = losses["ul"].item(), losses["ll"].item()
        self.report.ok("losses", f"ul loss {self.ul_loss:.4g}, ll loss {self.ll_loss:.4g} before any step")

    def _touchable(self, batch: Batch) -> list[Tensor]:
        return [*self.problem.ul_model.parameters(), *self.problem.ll_model.parameters(), *tensors_of(batch)]

    def _torch_error(self, name: str, error: RuntimeError) -> None:
        text = str(error).splitlines()[0]
        if "inplace" in text or "in-place" in text:
            self.report.stop("in-place", f"`{name}` edits in place what its gradient needs: {text} Work on a copy.")
        if "derivative for" in text or "twice" in text or "not implemented" in text:
            bad = once_differentiable_modules(self.problem.ll_model, self.fixed.ll_loss)
            where = f", in module {', '.join(bad)}," if bad else ""
            self.report.stop("double-backward", f"`{name}`{where} cannot be differentiated twice: {text}")
        self.report.stop("torch-error", f"`{name}` raised {type(error).__name__}: {text}")

    def ul_values(self) -> None:
        """Look for a path from each ul value to each loss.

        Raises
        ------
        StopCheckError
            If no ul value has one.
        """
        ul_params, ll_params = self.fixed.ul_params(), self.fixed.ll_params()
        wanted = [*ll_params, *ul_params.values()]
        ul_loss, ll_loss = self.fixed.ul_loss(), self.fixed.ll_loss()
        by_ul = grad(ul_loss, wanted, allow_unused=True)
        by_ll = grad(ll_loss, wanted, allow_unused=True)
        n = len(ll_params)
        for name, used in (("ul_objective", by_ul), ("ll_objective", by_ll)):
            if all(gradient is None for gradient in used[:n]):
                self.report.stop(
                    "detached",
                    f"`{name}` does not depend on the ll model's parameters. Compute it from `state.ll_model`, without "
                    ".detach(), .item() or NumPy, and not from a model of your own outside the state.",
                )
        in_ul, in_ll = (
            {name for name, g in zip(ul_params, used[n:], strict=True) if g is not None} for used in (by_ul, by_ll)
        )
        for name in ul_params:
            if name in in_ul | in_ll:
                continue
            searched = _SEARCHED.search(name)
            self.report.fault(
                "learning-rate" if searched else "unused-ul-value",
                f"Neither objective uses the ul model's {name!r}: its hypergradient is structurally zero. "
                + (
                    "It belongs to the search: read it from the config."
                    if searched
                    else "Take it from `state.ul_model` and use it, or freeze it."
                ),
            )
            ul_params[name].requires_grad_(False)
        if not self.fixed.ul_params():
            raise StopCheckError
        if in_ul and not in_ll:
            self.report.fault(
                "objectives-swapped",
                f"`ul_objective` uses the ul values {_listed(in_ul)} and `ll_objective` none: training does not depend "
                "on them, so that there is no implicit term. Are the two objectives swapped?",
            )
        if in_ll:
            self.report.ok("ul-values", f"a path from {_listed(in_ll)} through the ll weights")

    def derivatives(self) -> None:
        """Compare first and second derivatives with differences, in float64, along random directions."""
        params = [*self.fixed.ll_params(), *self.fixed.ul_params().values()]
        for level, loss in (("ul", self.fixed.ul_loss()), ("ll", self.fixed.ll_loss())):
            gradients = grad(loss, params, materialize_grads=True, allow_unused=True)
            if not all(gradient.isfinite().all() for gradient in gradients):
                self.report.stop(
                    "non-finite",
                    f"The gradient of `{level}_objective` is not finite although its value is, as that of sqrt at 0. "
                    "Add a small constant inside the root, or clamp.",
                )
        try:
            second = self.fixed.second_order()
            direction = random_direction(flatten([param.detach() for param in self.fixed.ll_params()]))
            image = second.hvp(direction)
            mixed = second.mixed_vjp(direction, list(self.fixed.ul_params().values()))
        except RuntimeError as error:
            self._torch_error("ll_objective", error)
        if not all(t.isfinite().all() for t in (image, *mixed) if t is not None):
            self.report.stop(
                "non-finite", "The second derivatives of `ll_objective` are not finite although its gradient is."
            )
        if all(m is None or not m.any() for m in mixed) and not self.report.faults:
            self.report.fault(
                "no-implicit-term",
                "The gradient of `ll_objective` in the ll weights does not depend on any ul value: the hypergradient "
                "has no implicit term.",
            )
        exact = self.fixed.doubled()
        try:
            exact.ll_loss()
            exact.ul_loss()
        except (RuntimeError, InvalidTypeError) as error:
            self.report.warn(
                "not-in-float64",
                "An objective does not run in float64, so that nothing was compared with differences: "
                + str(error).splitlines()[0],
            )
            return
        if exact.ll_loss().item() != exact.ll_loss().item() or exact.ul_loss().item() != exact.ul_loss().item():
            self.report.warn(
                "not-repeatable",
                "An objective gives another loss at every call although all global generators are the same, as from a "
                "generator of its own, so that nothing was compared with differences.",
            )
            return
        self.exact = exact
        self._compare_first(exact)
        self._compare_second(exact)

    def _compare_first(self, exact: FixedProblem) -> None:
        for level, loss in (("ul", exact.ul_loss), ("ll", exact.ll_loss)):
            params = [*exact.ll_params(), *exact.ul_params().values()]
            gradient = flatten(grad(loss(), params, materialize_grads=True, allow_unused=True))
            self._compare(f"`{level}_objective`'s gradient", directional_error(params, gradient, loss, _STEPS))

    def _compare_second(self, exact: FixedProblem) -> None:
        params = exact.ll_params()
        weights = random_direction(flatten(params), seed=1)

        def along() -> Tensor:
            return flatten(grad(exact.ll_loss(), params, materialize_grads=True)) @ weights

        image = exact.second_order().hvp(weights)
        self._compare(
            "the second derivative of `ll_objective`", directional_error(params, image, along, _STEPS_OF_GRADIENTS)
        )

    def _compare(self, what: str, error: float) -> None:
        if error <= AGREES:
            self.report.ok("derivatives", f"{what} agrees with differences to {error:.0e}")
        else:
            self.report.fault(
                "derivative",
                f"Along a random direction {what} is off by {error:.0%} from differences of its values. A part is "
                "detached, or a function of your own or of a module has a wrong derivative.",
            )


def _listed(names: set[str]) -> str:
    return ", ".join(map(repr, sorted(names)))


def _same(one: Batch, other: Batch) -> bool:
    pairs = tensors_of(one), tensors_of(other)
    return len(pairs[0]) == len(pairs[1]) and all(
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(*pairs, strict=True)
    )
