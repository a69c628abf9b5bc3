"""The hypergradient: direct minus implicit term, with a certificate of how exact it is."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import grad

from tune_implicit.batches import tensors_of
from tune_implicit.errors import InvalidTypeError, InvalidValueError
from tune_implicit.problem import Objective, State, check_callable, check_models, named_trainable
from tune_implicit.products import SecondOrder, check_twice_differentiable, twice_differentiable_kernels
from tune_implicit.rng import preserved_rng
from tune_implicit.settings import make_solver
from tune_implicit.solvers import Solution, Solver, Status
from tune_implicit.solvers.base import check_number
from tune_implicit.vectors import flatten, norm_of

__all__ = ["Hypergradient", "Implicit", "scalar_loss"]


@dataclass(frozen=True)
class Hypergradient:
    """The total derivative of the ul loss in the ul values, with its certificate.

    Parameters
    ----------
    gradients : dict of str to Tensor
        By name of the ul model's parameter, in its shape and dtype. Empty where the status is a failure.
    status : Status
        How the solve of ``H v = dF/dw`` ended; ``NON_FINITE`` also where a loss or the gradient itself is not finite.
    residual_norm, relative_residual : float
        ``||dF/dw - H v||``, and the same over ``||dF/dw||``: 0 is exact, 1 no better than no implicit term.
    solver_steps, hvps : int
        Iterations of the solver, and the Hessian-vector products they took.
    stationarity : float
        ``||df/dw||`` on the batch; the hypergradient's formula assumes 0.
    norm : float
        Of the hypergradient over all ul values; NaN where the status is a failure.
    ul_loss, ll_loss : float
        ``F`` and ``f`` at the point.
    """

    gradients: dict[str, Tensor]
    status: Status
    residual_norm: float
    relative_residual: float
    solver_steps: int
    hvps: int
    stationarity: float
    norm: float
    ul_loss: float
    ll_loss: float


class Implicit:
    """Gradients of the ul model's parameters, by the implicit function theorem at a trained ll model.

    With ``H = d2f/dw2`` it solves ``H v = dF/dw`` and forms ``dF/dl - (d2f / dl dw) v``, both terms on the batches
    given. Each objective is evaluated once; the graph of ``df/dw`` is retained for the whole solve, so that all its
    products are with one matrix.

    Parameters
    ----------
    ul_objective : callable(State) -> Tensor
        ``F``, the scalar ul loss; the state holds the validation batch.
    ul_model : Module
        Its parameters with ``requires_grad`` are ``l``.
    ll_objective : callable(State) -> Tensor
        ``f``, the scalar ll loss, twice differentiable; the state holds the training batch.
    ll_model : Module
        Its parameters with ``requires_grad`` are ``w``. The others, at both levels, are constants.
    ll_learning_rate : float
        Step size of the Neumann series; it must be below ``2 / lambda_max(H)``. Other solvers do not use it.
    k : int
        Most iterations of the solver.
    tolerance : float, default 1e-10
        The solver stops once the residual's norm is below it.
    solver : {"neumann", "cg", "dense"} or Solver, default "neumann"
        A solver object brings its own step size, k and tolerances, and those given here are not used.
    rtol : float, default 0
        The solver stops once the residual's norm is below ``rtol * ||dF/dw||``.

    Raises
    ------
    InvalidTypeError
        If an argument is of the wrong kind.
    InvalidValueError
        If an argument is out of range, a model has nothing to train, or the models share parameters or lie on two
        devices.

    References
    ----------
    Lorraine, Vicol & Duvenaud, Optimizing Millions of Hyperparameters by Implicit Differentiation, AISTATS 2020,
    equation 4 and Algorithms 1 to 3. For CG: Rajeswaran et al., NeurIPS 2019.

    Examples
    --------
    >>> implicit = Implicit(ul_objective, ul_model, ll_objective, ll_model, ll_learning_rate=0.1, k=20)
    >>> result = implicit.compute_gradients(x_val, y_val, train_data=x, train_target=y)
    >>> if not result.status.failed:
    ...     ul_optimizer.step()
    """

    def __init__(
        self,
        ul_objective: Objective,
        ul_model: nn.Module,
        ll_objective: Objective,
        ll_model: nn.Module,
        ll_learning_rate: float,
        k: int,
        tolerance: float = 1e-10,
        *,
        solver: str | Solver = "neumann",
        rtol: float = 0.0,
    ) -> None:
        check_callable("ul_objective", ul_objective)
        check_callable("ll_objective", ll_objective)
        check_models(ul_model, ll_model)
        check_twice_differentiable("ll_model", ll_model)
        check_number("ll_learning_rate", ll_learning_rate)
        if not (ll_learning_rate > 0 and math.isfinite(ll_learning_rate)):
            raise InvalidValueError(f"`ll_learning_rate` must be positive and finite, got {ll_learning_rate}.")
        self.ul_objective = ul_objective
        self.ul_model = ul_model
        self.ll_objective = ll_objective
        self.ll_model = ll_model
        self.solver = make_solver(solver, ll_learning_rate, k, tolerance, rtol)

    def compute_gradients(
        self,
        validate_data: Any,
        validate_target: Any,
        auxiliary_model: nn.Module | None = None,
        train_data: Any = None,
        train_target: Any = None,
    ) -> Hypergradient:
        """Add the hypergradient to ``.grad`` of the ul model's parameters, and return it with its certificate.

        Calls accumulate, like ``backward()``; a solve that failed adds nothing. Everything else is left as it was:
        parameters, ``requires_grad``, training mode, buffers, the ll model's ``.grad``, and the global random state, so
        that the ll step after it draws the dropout mask that the Hessian saw.

        Parameters
        ----------
        validate_data, validate_target : any nesting of Tensor
            The batch of the ul objective, on the models' device.
        auxiliary_model : Module, optional
            The trained ll model, where it is another object than ``ll_model``.
        train_data, train_target : any nesting of Tensor
            The batch of the ll objective, and so of the Hessian.

        Returns
        -------
        Hypergradient

        Raises
        ------
        InvalidTypeError
            If an objective does not return a floating tensor.
        InvalidValueError
            If an objective returns more than a scalar or a loss that depends on no parameter, tensors lie on two
            devices, or a ul parameter is used by neither objective.
        """
        ll_model = self.ll_model
        if auxiliary_model is not None:
            check_models(self.ul_model, auxiliary_model)
            check_twice_differentiable("auxiliary_model", auxiliary_model)
            ll_model = auxiliary_model
        ul_params, ll_params = named_trainable(self.ul_model), list(named_trainable(ll_model).values())
        _check_devices(ll_params[0].device, validate=(validate_data, validate_target), train=(train_data, train_target))

        with _untouched(self.ul_model, ll_model), torch.enable_grad():
            ul_state = State(validate_data, validate_target, self.ul_model, ll_model)
            ul_loss = scalar_loss("ul_objective", self.ul_objective(ul_state))
            first = grad(ul_loss, [*ll_params, *ul_params.values()], allow_unused=True)
            b = flatten([torch.zeros_like(w) if g is None else g for g, w in zip(first, ll_params, strict=False)])
            direct = first[len(ll_params) :]
            del first  # `b` holds a copy

            ll_state = State(train_data, train_target, self.ul_model, ll_model)
            with twice_differentiable_kernels(ll_model):
                ll_loss = scalar_loss("ll_objective", self.ll_objective(ll_state))
            second = SecondOrder(ll_loss, ll_params)
            solution = self.solver.solve(second.hvp, b)
            mixed = second.mixed_vjp(solution.v, list(ul_params.values()))

        terms = dict(zip(ul_params, zip(direct, mixed, strict=True), strict=True))
        _check_used({name: ul_params[name] for name, (d, m) in terms.items() if d is None is m}, ul_loss, ll_loss)
        gradients = {name: _difference(d, m, ul_params[name]) for name, (d, m) in terms.items()}
        result = _certified(gradients, solution, second, b, ul_loss, ll_loss)
        for name, gradient in result.gradients.items():
            _accumulate(ul_params[name], gradient)
        return result


def scalar_loss(name: str, loss: object) -> Tensor:
    """Return ``loss`` as a scalar tensor that can be differentiated.

    Raises
    ------
    InvalidTypeError
        If it is not a real floating tensor.
    InvalidValueError
        If it has more than one entry, or depends on no parameter.
    """
    if not isinstance(loss, Tensor) or not loss.is_floating_point():
        got = loss.dtype if isinstance(loss, Tensor) else type(loss).__name__
        raise InvalidTypeError(f"`{name}` must return a real floating tensor, got {got}.")
    if loss.numel() != 1:
        raise InvalidValueError(
            f"`{name}` must return a scalar, got a tensor of shape {tuple(loss.shape)}. "
            "Reduce it with .mean() or .sum()."
        )
    if not loss.requires_grad:
        raise InvalidValueError(
            f"`{name}` returned a loss that depends on no parameter. Compute it from `state.ll_model` and "
            "`state.ul_model`, without .detach(), .item(), NumPy or torch.no_grad()."
        )
    return loss.reshape(())


def _certified(
    gradients: dict[str, Tensor], solution: Solution, second: SecondOrder, b: Tensor, ul_loss: Tensor, ll_loss: Tensor
) -> Hypergradient:
    """Return the hypergradient with its certificate; its numbers leave the device together."""
    norms = [norm_of([b]), second.stationarity, norm_of(list(gradients.values()))]
    losses = [loss.detach().to(norms[0]) for loss in (ul_loss, ll_loss)]
    b_norm, stationarity, norm, ul_value, ll_value = torch.stack([*norms, *losses]).tolist()
    status = solution.status
    if not (status.failed or all(map(math.isfinite, (stationarity, norm, ul_value, ll_value)))):
        status = Status.NON_FINITE
    return Hypergradient(
        gradients={} if status.failed else gradients,
        status=status,
        residual_norm=solution.residual_norm,
        relative_residual=solution.residual_norm / b_norm if b_norm else 0.0,
        solver_steps=solution.steps,
        hvps=second.hvps,
        stationarity=stationarity,
        norm=math.nan if status.failed else norm,
        ul_loss=ul_value,
        ll_loss=ll_value,
    )


def _difference(direct: Tensor | None, mixed: Tensor | None, param: Tensor) -> Tensor:
    """Return ``direct - mixed``, where ``None`` stands for zero."""
    if mixed is None:
        return torch.zeros_like(param) if direct is None else direct
    return -mixed if direct is None else direct - mixed


def _accumulate(param: Tensor, gradient: Tensor) -> None:
    """Add ``gradient`` to ``param.grad``, which never shares memory with it."""
    if param.grad is None:
        param.grad = torch.empty_like(param).copy_(gradient)
    else:
        param.grad += gradient


def _check_devices(device: torch.device, **batches: Any) -> None:
    for name, batch in batches.items():
        for tensor in tensors_of(batch):
            if tensor.device != device:
                raise InvalidValueError(
                    f"`{name}_data` and `{name}_target` must be on the models' device, {device}, got a tensor on "
                    f"{tensor.device}. Move the batch with .to({str(device)!r})."
                )


def _check_used(params: dict[str, Tensor], ul_loss: Tensor, ll_loss: Tensor) -> None:
    """Check that each of ``params``, whose derivative is structurally zero, at least enters one of the losses.

    Raises
    ------
    InvalidValueError
        If one does not: nothing would ever move it.
    """
    if not params:
        return
    reached = _leaves(ul_loss) | _leaves(ll_loss)
    unused = [name for name, param in params.items() if id(param) not in reached]
    if unused:
        raise InvalidValueError(
            f"Neither objective uses the ul model's {', '.join(map(repr, unused))}, so no hypergradient can move it. "
            "Use it in an objective, or freeze it with requires_grad=False. A learning rate belongs to the search."
        )


def _leaves(loss: Tensor) -> set[int]:
    """Return the ids of the leaf tensors from which ``loss`` was computed."""
    leaves, seen, nodes = set(), set(), [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            leaves.add(id(leaf))
        nodes.extend(next_node for next_node, _ in node.next_functions)
    return leaves


@contextmanager
def _untouched(*models: nn.Module) -> Iterator[None]:
    """Leave the models' modes and buffers and the global random state as they were, whatever objectives do."""
    modules = [module for model in models for module in model.modules()]
    modes = [module.training for module in modules]
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in modules
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        with preserved_rng():
            yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                setattr(module, name, buffer)
                buffer.copy_(value)
