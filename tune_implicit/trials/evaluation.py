"""Losses and metrics over a whole split, without leaving a trace in the trial."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from tune_implicit.errors import InvalidTypeError
from tune_implicit.hypergradients.guards.untouched import preserved_modes
from tune_implicit.hypergradients.rng import preserved_rng
from tune_implicit.hypergradients.state import Batch, State, tensors_of
from tune_implicit.trials.problem import BilevelProblem, Metric
from tune_implicit.trials.splits import batches_of, move

__all__ = ["evaluate"]


def evaluate(
    problem: BilevelProblem, name: str, data: Iterable[Batch], functions: Mapping[str, Metric]
) -> dict[str, float]:
    """Return each function's mean over ``data``, the models in evaluation mode and without gradients.

    Batches weigh as much as they have examples, so that the mean does not depend on how the split is cut. Training
    modes and the global random state are left as they were: how often a trial is evaluated does not change it.

    Parameters
    ----------
    problem : BilevelProblem
        Its models are what is evaluated.
    name : str
        What messages call the split.
    data : iterable of (data, target)
        The split.
    functions : mapping of str to callable(State) -> Tensor or float
        What to measure.

    Returns
    -------
    dict of str to float

    Raises
    ------
    InvalidTypeError
        If a function does not return a number.
    """
    device = next(problem.ll_model.parameters()).device
    totals, weight = dict.fromkeys(functions, 0.0), 0
    models = problem.ul_model, problem.ll_model
    with preserved_rng(), preserved_modes(*models), torch.no_grad():
        for model in models:
            model.eval()
        for batch in batches_of(name, data):
            batch_data, target = move(batch, device)
            state = State(batch_data, target, *models)
            size = _size(target) or _size(batch_data) or 1
            for key, function in functions.items():
                totals[key] += size * _number(key, function(state))
            weight += size
    return {key: total / weight for key, total in totals.items()}


def _size(nested: Any) -> int:
    """Return the length of the first tensor that has one, or 0."""
    return next((len(tensor) for tensor in tensors_of(nested) if tensor.ndim), 0)


def _number(name: str, value: Tensor | float) -> float:
    if isinstance(value, Tensor) and value.numel() != 1:
        raise InvalidTypeError(f"`{name}` must return a number, got a tensor of shape {tuple(value.shape)}.")
    try:
        return float(value)
    except TypeError:
        raise InvalidTypeError(f"`{name}` must return a number, got {type(value).__name__}.") from None
