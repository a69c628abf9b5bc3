"""A look at training: whether it gets to a minimum, and to one at which the ll loss is smooth."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from tune_implicit.checks.findings import CheckReport
from tune_implicit.checks.fixed import FixedProblem
from tune_implicit.checks.rates import look_for_rate, told_rate, train
from tune_implicit.errors import DivergedError
from tune_implicit.hypergradients.batches import moved
from tune_implicit.hypergradients.rng import preserved_rng, seed_everything
from tune_implicit.hypergradients.solvers.minres import Minres
from tune_implicit.hypergradients.state import State, named_trainable
from tune_implicit.hypergradients.vectors import flatten, norm_of, unflatten
from tune_implicit.trials.evaluation import measure
from tune_implicit.trials.splits import batches_of
from tune_implicit.trials.trainer import BilevelTrainer

__all__ = ["look_at_training"]

_TRAINING_STEPS = 1000
_BATCHES = 10
_DRAWS = 4

# The part of the time that the training itself may take.
_TRAINING = 0.7

# Training has got to a minimum where it leaves less than this part of the gradient that it started from, or where a
# Newton step would take less than this part off the ll loss.
_TRAINED = 0.3
_LEFT = 0.05

# The loss of an ll step of the user's own is that of the objective up to this part of it.
_SAME_LOSS = 1e-3

# A ul loss that training raises by more than this part of itself was raised by more than noise.
_ROSE = 0.01

# Standard errors over batches, and the relative stationarity, above which a gradient is one.
_SURE = 3.0
_STATIONARY = 1e-3

# More training does not take a gradient away where it leaves more than this part of it. It follows the gradient where
# it lowers the loss by more than this part of what training has lowered it by before, and is too small to matter where
# its own curvature promises less than that part.
_TAKEN_AWAY = 0.7
_PROMISED = 1e-3
_FOLLOWED = 0.02

# A step along the gradient of a smooth loss takes off more than this part of what gradient and curvature promise.
_KEPT = 0.3


def look_at_training(fixed: FixedProblem, report: CheckReport) -> None:
    """Train the ll model as a trial would, the ul values fixed, and look at where it gets to; it stays there."""
    settings = fixed.settings
    wanted = min(_TRAINING_STEPS, settings.warmup_ll_steps + settings.least_ll_steps * settings.ul_steps)
    _own_step(fixed, report)
    _modes(fixed, report)
    before = _MeanGradient(fixed)
    ul_before, ll_before = fixed.value("ul"), fixed.value("ll")
    start = fixed.budget.clock()
    try:
        steps = train(fixed.within(_TRAINING), fixed.problem, settings, wanted)
    except DivergedError as error:
        look_for_rate(fixed, wanted, report)
        report.stop("training-diverges", str(error) + told_rate(fixed, report))
    report.figures["ll_step_s"] = (fixed.budget.clock() - start) / max(steps, 1)
    after = _MeanGradient(fixed)
    report.figures["stationarity"] = after.norm
    ul_after, ll_after = fixed.value("ul"), fixed.value("ll")
    for name, loss in (("ll_objective", ll_after), ("ul_objective", ul_after)):
        if not math.isfinite(loss):
            report.stop("non-finite", f"After {steps} ll steps `{name}` returns {loss}.")
    if wanted:
        _end_of(fixed, before, after, (steps, wanted), report)
    _signs((ul_before, ul_after), (ll_before, ll_after), report)
    report.ok(
        "training", f"{steps} ll steps: ll loss {ll_after:.4g}, ||df/dw|| from {before.norm:.2g} to {after.norm:.2g}"
    )
    _metrics(fixed, report)


def _end_of(
    fixed: FixedProblem, before: "_MeanGradient", after: "_MeanGradient", steps: tuple[int, int], report: CheckReport
) -> None:
    """Look at where training has got to in so many steps of so many, and for a learning rate that does better."""
    taken, wanted = steps
    if after.norm > _TRAINED * before.norm:
        look_for_rate(fixed, wanted, report)
    else:
        report.recommend(ll_learning_rate=fixed.settings.ll_learning_rate)
    if taken == wanted:
        _minimum(fixed, before, after, taken, report)
    else:
        report.no_time(f"Whether training gets to a minimum, after {taken} of {wanted} ll steps")


class _MeanGradient:
    """The ll loss and its gradient, means over the first batches of the training data."""

    def __init__(self, fixed: FixedProblem) -> None:
        params = fixed.ll_params()
        batches = list(islice(batches_of("train_data", fixed.problem.train_data), _BATCHES))
        # One batch has no spread, but what an objective draws has one, too.
        batches = batches if len(batches) > 1 else batches * _DRAWS
        self._each = [(replace(fixed, draw=i), moved(batch, params[0].device)) for i, batch in enumerate(batches)]
        losses, gradients = zip(*(drawn.gradients("ll", params, batch) for drawn, batch in self._each), strict=True)
        each = [
            flatten([torch.zeros_like(p) if g is None else g for g, p in zip(gradient, params, strict=True)])
            for gradient in gradients
        ]
        self.vector = torch.stack(each).mean(0)
        self.norm = norm_of([self.vector]).item()
        spread = math.fsum(norm_of([one - self.vector]).item() ** 2 for one in each)
        self.error = math.sqrt(spread / max(1, len(each) * (len(each) - 1)))  # the standard error of the mean
        self.loss = math.fsum(loss.item() for loss in losses) / len(losses)

    def loss_now(self) -> float:
        """Return the mean ll loss over the same batches at the weights as they are."""
        return math.fsum(drawn.value("ll", batch) for drawn, batch in self._each) / len(self._each)


def _minimum(fixed: FixedProblem, before: _MeanGradient, after: _MeanGradient, steps: int, report: CheckReport) -> None:
    """Look at whether training gets to a minimum, and to one at which the ll loss is smooth."""
    told = f"After {steps} ll steps ||df/dw|| is {after.norm:.2g}"
    if _is_stuck(fixed, before, after, steps, report):
        kept = _kept_promise(fixed, after)
        if kept < _KEPT:
            report.fault(
                "not-smooth",
                f"{told}, but a step along it takes {max(kept, 0):.0%} off the ll loss of what it does off a smooth "
                "one: the ll solution is at a kink, as that of an L1 penalty or a hinge, where the hypergradient's "
                "formula does not hold. Smooth it, e.g. by sqrt(w^2 + epsilon).",
            )
        else:
            report.warn(
                "not-smooth",
                f"{told} and stays so, where the hypergradient's formula takes 0. Is there a constraint on the "
                "weights, such as a projection after each step, or is `ll_learning_rate` too large for them to settle?",
            )
    elif after.norm > _TRAINED * before.norm and _still_to_gain(fixed) > _LEFT:
        report.fault(
            "not-at-minimum",
            f"{told}, {after.norm / before.norm:.0%} of what it was before them: the hypergradient assumes 0. Take "
            f"more `ll_steps` or `warmup_ll_steps`, or another `ll_learning_rate`.{told_rate(fixed, report)}",
        )


def _is_stuck(
    fixed: FixedProblem, before: _MeanGradient, after: _MeanGradient, steps: int, report: CheckReport
) -> bool:
    """Return whether there is a gradient that as many more ll steps neither take away nor follow."""
    curvature = abs(_curvature_along(fixed, after.vector))
    scale = curvature * norm_of([param.detach() for param in fixed.ll_params()]).item()
    if after.norm <= max(_SURE * after.error, _STATIONARY * scale):
        return False
    if after.norm**2 < 2 * curvature * _PROMISED * abs(before.loss - after.loss):
        return False
    model = fixed.problem.ll_model
    trained = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        taken = train(fixed, fixed.problem, fixed.settings, steps)
    except DivergedError as error:
        report.stop("training-diverges", str(error))
    later = _MeanGradient(fixed)
    model.load_state_dict(trained)
    if taken < steps:
        report.no_time("Whether more training takes the gradient away that is left")
        return False
    followed = after.loss - later.loss > _FOLLOWED * abs(before.loss - after.loss)
    return not followed and later.norm > max(_TAKEN_AWAY * after.norm, _SURE * later.error)


def _curvature_along(fixed: FixedProblem, direction: Tensor) -> float:
    """Return ``d'Hd / d'd`` on the first batch."""
    with fixed.second_order() as second:
        image = second.hvp(direction)
    return (direction @ image).item() / max((direction @ direction).item(), 1e-300)


def _still_to_gain(fixed: FixedProblem) -> float:
    """Return what a Newton step would take off the ll loss on the first batch, as a part of it."""
    gradient = fixed.gradient("ll", fixed.ll_params())
    with fixed.second_order() as second:
        solution = Minres(50, rtol=1e-3).solve(second.hvp, gradient)
    return abs((gradient @ solution.v).item()) / 2 / max(abs(fixed.value("ll")), 1e-12)


def _kept_promise(fixed: FixedProblem, gradient: _MeanGradient) -> float:
    """Return what the best step along the gradient takes off the loss, in units of what its derivatives promise."""
    params, curvature = fixed.ll_params(), _curvature_along(fixed, gradient.vector)
    if not curvature > 0:
        return 1.0
    best = -math.inf
    for part in (1.0, 0.1):
        length = part / curvature
        _shift(params, gradient.vector, -length)
        taken = gradient.loss - gradient.loss_now()
        _shift(params, gradient.vector, length)
        best = max(best, taken / (gradient.norm**2 * length * (1 - part / 2)))
    return best


def _shift(params: list[nn.Parameter], direction: Tensor, by: float) -> None:
    with torch.no_grad():
        for param, piece in zip(params, unflatten(direction, params), strict=True):
            param.add_(piece, alpha=by)


def _own_step(fixed: FixedProblem, report: CheckReport) -> None:
    """Compare the loss of a user's own ll step with that of ``ll_objective`` on the same batch and draws."""
    if fixed.problem.ll_step is None:
        return
    problem = replace(fixed.copied(), train_data=[fixed.train])
    before = [param.detach().clone() for param in named_trainable(problem.ll_model).values()]
    trainer = BilevelTrainer(problem, replace(fixed.settings, ul_learning_rate=0.0))
    with preserved_rng():
        seed_everything(fixed.draw)
        loss = trainer.train_ll(1)
    expected = fixed.value("ll")
    if all(torch.equal(old, new) for old, new in zip(before, named_trainable(problem.ll_model).values(), strict=True)):
        report.fault("ll-step-idle", "`ll_step` left all ll weights as they were. Call `optimizer.step()` in it.")
    if abs(loss - expected) > _SAME_LOSS * max(abs(loss), abs(expected)):
        report.warn(
            "ll-step-loss",
            f"`ll_step` returned a loss of {loss:.4g} where `ll_objective` is {expected:.4g} on the same batch: "
            "hypergradients are those of `ll_objective`. Where the step lowers another loss, make that the objective.",
        )


def _modes(fixed: FixedProblem, report: CheckReport) -> None:
    """Compare the modes in which modules are run in two ll steps with those of the Hessian's pass."""
    seen: list[dict[str, bool]] = []
    problem = replace(fixed.problem, ll_objective=_watched(fixed.problem.ll_objective, seen))
    trained = {name: value.clone() for name, value in problem.ll_model.state_dict().items()}
    modes = [(module, module.training) for model in (problem.ul_model, problem.ll_model) for module in model.modules()]
    BilevelTrainer(problem, replace(fixed.settings, warmup_ll_steps=0, ul_learning_rate=0.0)).train_ll(2)
    one = problem.implicit(
        **fixed.settings.of_a_solve | {"solver": "neumann", "k": 0, "stop": "tolerance", "preconditioner_memory": 0}
    )
    one.compute_mean_gradients([fixed.validate], [fixed.train])
    problem.ul_model.zero_grad()
    problem.ll_model.load_state_dict(trained)
    for module, mode in modes:
        module.training = mode
    first, *others = seen
    changed = sorted({name for other in others for name, mode in other.items() if first.get(name, mode) != mode})
    if changed:
        report.fault(
            "mode-leak",
            f"`ll_objective` runs {', '.join(map(repr, changed))} in training mode at one time and in evaluation mode "
            "at another: it leaves a mode changed, so that the Hessian is not that of the loss that is trained. Put "
            "modes back, or set them where each pass begins.",
        )


def _watched(objective: Callable[[State], Tensor], seen: list[dict[str, bool]]) -> Callable[[State], Tensor]:
    """Return ``objective``, which adds to ``seen`` at each call in which mode each module began to be run."""

    def watched(state: State) -> Tensor:
        modes: dict[str, bool] = {}

        def remember(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: Any) -> None:
                modes.setdefault(name, module.training)

            return hook

        hooks = [
            module.register_forward_pre_hook(remember(f"{level}.{name}".removesuffix(".")))
            for level in ("ul_model", "ll_model")
            for name, module in state[level].named_modules()
        ]
        try:
            return objective(state)
        finally:
            for hook in hooks:
                hook.remove()
            seen.append(modes)

    return watched


def _signs(ul_losses: tuple[float, float], ll_losses: tuple[float, float], report: CheckReport) -> None:
    """Look at whether training raises the ul loss."""
    (ul_before, ul_after), (ll_before, ll_after) = ul_losses, ll_losses
    if not (ll_after < ll_before and ul_after > ul_before + _ROSE * abs(ul_before)):
        return
    seen = (
        f"Training lowered the ll loss from {ll_before:.4g} to {ll_after:.4g} and raised the ul loss from "
        f"{ul_before:.4g} to {ul_after:.4g}."
    )
    if ul_before < 0:
        report.fault("wrong-sign", f"{seen} Has one of them the wrong sign? Both are minimised.")
    else:
        report.warn(
            "wrong-sign",
            f"{seen} Either the ll model overfits, which the ul values may mend, or one of them has the wrong sign: "
            "both are minimised.",
        )


def _metrics(fixed: FixedProblem, report: CheckReport) -> None:
    """Measure what trials are compared on, and the user's metrics."""
    name = fixed.problem.selected_on
    for metric, value in measure(fixed.problem).items():
        if not math.isfinite(value):
            what = f"`{metric}` (`ul_objective`)" if metric == "select_loss" else f"`{metric}`"
            report.fault("non-finite", f"{what} is {value} on `{name}`: every trial would fail.")
