"""Losses and metrics over a whole split, without leaving a trace in the trial."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tune_implicit.errors import InvalidTypeError, InvalidValueError
from tune_implicit.hypergradients.batches import Batch, moved, size_of
from tune_implicit.hypergradients.guards.untouched import preserved_modes
from tune_implicit.hypergradients.rng import preserved_rng
from tune_implicit.hypergradients.state import State
from tune_implicit.trials.problem import BilevelProblem, Metric, SplitMetrics, check_metric_names
from tune_implicit.trials.splits import batches_of

__all__ = ["check_same_names", "evaluate", "evaluate_split", "mean_loss", "mean_over", "measure"]


def evaluate(
    problem: BilevelProblem,
    name: str,
    data: Iterable[Batch],
    functions: Mapping[str, Metric],
    ll_model: nn.Module | None = None,
) -> dict[str, float]:
    """Return each function's mean over ``data``, the models in evaluation mode and without gradients.

    Batches weigh as much as they have examples, so that the mean does not depend on how the split is cut. Training
    modes and the global random state are left as they were: how often a trial is evaluated does not change it.

    Parameters
    ----------
    problem : BilevelProblem
        With one ll model; its models are what is evaluated.
    name : str
        What messages call the split.
    data : iterable of Batch
        The split.
    functions : mapping of str to callable(State) -> Tensor or float
        What to measure.
    ll_model : Module, optional
        To be evaluated instead of the problem's, such as an average of it.

    Returns
    -------
    dict of str to float

    Raises
    ------
    InvalidTypeError
        If a function does not return a number.
    """
    totals, weight = dict.fromkeys(functions, 0.0), 0
    with _states(problem, name, data, ll_model) as states:
        for state in states:
            size = size_of(state.batch) or 1
            for key, function in functions.items():
                totals[key] += size * _number(key, function(state))
            weight += size
    return {key: total / weight for key, total in totals.items()}


def evaluate_split(
    problem: BilevelProblem,
    name: str,
    data: Iterable[Batch],
    function: SplitMetrics,
    ll_model: nn.Module | None = None,
) -> dict[str, float]:
    """Return what ``function`` makes of the states of all batches, in the conditions of :func:`evaluate`.

    Raises
    ------
    InvalidTypeError
        If it does not return a mapping of names to numbers.
    InvalidValueError
        If a name is one that a trial itself reports.
    """
    with _states(problem, name, data, ll_model) as states:
        found = function(states)
    if not isinstance(found, Mapping):
        raise InvalidTypeError(
            f"`metrics` must return a mapping of names to numbers, got {type(found).__name__}. "
            'Return e.g. {"f1": ...}.'
        )
    check_metric_names(found)
    return {key: _number(key, value) for key, value in found.items()}


def measure(problem: BilevelProblem, ll_model: nn.Module | None = None) -> dict[str, float]:
    """Return ``"select_loss"`` and the problem's metrics, on the split that trials are compared on."""
    name = problem.selected_on
    data, metrics = getattr(problem, name), problem.metrics
    if isinstance(metrics, Mapping):
        return evaluate(problem, name, data, {"select_loss": problem.ul_objective, **metrics}, ll_model)
    loss = evaluate(problem, name, data, {"select_loss": problem.ul_objective}, ll_model)
    return loss | evaluate_split(problem, name, data, metrics, ll_model)


def mean_loss(parts: Iterable[tuple[BilevelProblem, nn.Module]], split: str, objective: str) -> float:
    """Return the mean of an objective over a split, and over ll problems that come with the ll model to measure."""
    each = (
        evaluate(part, split, getattr(part, split), {objective: getattr(part, objective)}, model)
        for part, model in parts
    )
    return mean_over(each)[objective]


def mean_over(each: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return the means by name over several ll problems."""
    listed = list(each)
    for one in listed:
        check_same_names(one, listed[0])
    return {name: sum(one[name] for one in listed) / len(listed) for name in listed[0]}


def check_same_names(measured: Iterable[str], before: Iterable[str]) -> None:
    """Check that the same metrics have been measured as before.

    Raises
    ------
    InvalidValueError
        If not.
    """
    if set(measured) != set(before):
        raise InvalidValueError(
            f"`metrics` must return the same names each time, got {', '.join(sorted(measured))} after "
            f"{', '.join(sorted(before))}."
        )


@contextmanager
def _states(
    problem: BilevelProblem, name: str, data: Iterable[Batch], ll_model: nn.Module | None
) -> Iterator[Iterator[State]]:
    """Yield the states of all batches, with what is done to modes and random state undone afterwards."""
    models = problem.ul_model, problem.ll_model if ll_model is None else ll_model
    device = next(models[1].parameters()).device
    with preserved_rng(), preserved_modes(*models), torch.no_grad():
        for model in models:
            model.eval()
        yield (State.of(moved(batch, device), *models) for batch in batches_of(name, data))


def _number(name: str, value: Tensor | float) -> float:
    if isinstance(value, Tensor) and value.numel() != 1:
        raise InvalidTypeError(f"`{name}` must return a number, got a tensor of shape {tuple(value.shape)}.")
    try:
        return float(value)
    except TypeError:
        raise InvalidTypeError(f"`{name}` must return a number, got {type(value).__name__}.") from None
