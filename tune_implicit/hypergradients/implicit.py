"""The hypergradient: direct minus implicit term."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tune_implicit.errors import DetachedError
from tune_implicit.hypergradients.arguments import check_callable
from tune_implicit.hypergradients.batches import Batch
from tune_implicit.hypergradients.certificate import Hypergradient, certified
from tune_implicit.hypergradients.first_order import FirstDerivatives, coarsest
from tune_implicit.hypergradients.guards.losses import check_devices, check_used, scalar_loss, unused_among
from tune_implicit.hypergradients.guards.twice import (
    check_derivatives,
    check_twice_differentiable,
    named_derivatives,
    twice_differentiable_kernels,
)
from tune_implicit.hypergradients.guards.untouched import Fingerprint, untouched
from tune_implicit.hypergradients.inverse_hvp import InverseHvp
from tune_implicit.hypergradients.products import MeanSecondOrder, SecondDerivatives, SecondOrder
from tune_implicit.hypergradients.settings import SolverSettings
from tune_implicit.hypergradients.state import Objective, State, check_models, named_trainable

__all__ = ["Implicit"]

# A target that is not given, as ``None`` may be one.
_ABSENT: Any = object()


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
        Its parameters with ``requires_grad`` are ``w``. The others, at both levels, are constants. Of a compiled model
        the original is differentiated.
    ll_learning_rate : float
        Step size of the Neumann series; it must be below ``2 / lambda_max(H)``. Other solvers do not use it.
    k : int
        Most iterations of the solver.
    tolerance : float, default 1e-10
        The solver has converged once the residual's norm is below it.
    **settings
        The other fields of :class:`SolverSettings`, e.g. ``solver="cg"``.

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
        **settings: Any,
    ) -> None:
        check_callable("ul_objective", ul_objective)
        check_callable("ll_objective", ll_objective)
        check_models(ul_model, ll_model)
        check_twice_differentiable("ll_model", ll_model)
        self.ul_objective = ul_objective
        self.ul_model = ul_model
        self.ll_objective = ll_objective
        self.ll_model = ll_model
        self.settings = SolverSettings(ll_learning_rate=ll_learning_rate, k=k, tolerance=tolerance, **settings)
        self._checked: nn.Module | None = None  # the ll model with which both losses' derivatives were last looked at
        self._inverse_hvp = InverseHvp(self.settings)

    def compute_gradients(
        self,
        validate_data: Any,
        validate_target: Any = _ABSENT,
        auxiliary_model: nn.Module | None = None,
        train_data: Any = None,
        train_target: Any = _ABSENT,
    ) -> Hypergradient:
        """Add the hypergradient to ``.grad`` of the ul model's parameters, and return it with its certificate.

        Calls accumulate, like ``backward()``; a solve that failed adds nothing. Everything else is left as it was:
        parameters, ``requires_grad``, training mode, buffers, the ll model's ``.grad``, and the global random state, so
        that the ll step after it draws the dropout mask that the Hessian saw.

        Parameters
        ----------
        validate_data, validate_target : any nesting of Tensor
            The batch of the ul objective, on the models' device. Without a target, ``validate_data`` is the whole
            batch, of any kind, as the objective finds it in ``state.batch``.
        auxiliary_model : Module, optional
            The trained ll model, where it is another object than ``ll_model``.
        train_data, train_target : any nesting of Tensor
            The batch of the ll objective, and so of the Hessian; likewise.

        Returns
        -------
        Hypergradient

        Raises
        ------
        InvalidTypeError
            If an objective does not return a floating tensor.
        InvalidValueError
            If an objective returns more than a scalar, depends on no parameter, or uses what torch cannot differentiate
            as often as needed; if tensors lie on two devices, or a ul parameter is used by neither objective.
        """
        validate, train = _batch(validate_data, validate_target), _batch(train_data, train_target)
        return self.compute_mean_gradients([validate], [train], auxiliary_model)

    def compute_mean_gradients(
        self,
        validate: Sequence[Batch],
        train: Sequence[Batch],
        auxiliary_model: nn.Module | None = None,
        allow_unused: bool = False,
    ) -> Hypergradient:
        """Do as :meth:`compute_gradients`, for the means of both losses over several batches of one size.

        Parameters
        ----------
        validate, train : sequence of Batch
            The batches of the ul objective, and those of the ll objective and so of the Hessian and the mixed product.
            Objectives draw the same random numbers for each.
        auxiliary_model : Module, optional
            The trained ll model, where it is another object than ``ll_model``.
        allow_unused : bool, default False
            Whether there may be ul values that neither objective uses; they have no gradient then.

        Returns
        -------
        Hypergradient

        Raises
        ------
        InvalidTypeError, InvalidValueError
            As by :meth:`compute_gradients`.
        """
        ll_model = self.ll_model
        if auxiliary_model is not None:
            check_models(self.ul_model, auxiliary_model)
            check_twice_differentiable("auxiliary_model", auxiliary_model)
            ll_model = auxiliary_model
        ul_params, ll_params = named_trainable(self.ul_model), list(named_trainable(ll_model).values())
        check_devices(ll_params[0].device, validate=validate, train=train)

        with untouched(self.ul_model, ll_model) as put_back, torch.enable_grad():
            ul_loss_of, ll_loss_of = (
                partial(self._loss, objective, ll_model, put_back) for objective in ("ul_objective", "ll_objective")
            )
            ul_print, ll_print = Fingerprint(list(ul_params.values())), Fingerprint(ll_params)
            with named_derivatives("ul_objective", ll_model, partial(ul_loss_of, validate[0])):
                first = FirstDerivatives(ul_loss_of, validate, ll_params, list(ul_params.values()))
            noise = first.error() if self.settings.stop == "noise" else math.nan

            with (
                twice_differentiable_kernels(ll_model),
                named_derivatives("ll_objective", ll_model, partial(ll_loss_of, train[0])),
            ):
                second = self._second_derivatives([partial(ll_loss_of, batch) for batch in train], ll_params)
                ul_print.check()
                ll_print.check()
                if ll_model is not self._checked:
                    check_derivatives(first.losses[0], second.losses[0])
                    self._checked = ll_model
                b = _of_used(first.b, ll_params, second.unused)
                solution = self._inverse_hvp.solve(
                    second.hvp, b, noise if math.isfinite(noise) else 0.0, coarsest(ll_params)
                )
                mixed = second.mixed_vjp(solution.v, list(ul_params.values()))

        terms = dict(zip(ul_params, zip(first.direct, mixed, strict=True), strict=True))
        idle = {name: ul_params[name] for name, (d, m) in terms.items() if d is None is m}
        unused = unused_among(idle, [*first.losses, *second.losses])
        if not allow_unused:
            check_used(unused)
        gradients = {name: _difference(d, m, ul_params[name]) for name, (d, m) in terms.items() if name not in unused}
        direct = {name: d for name, (d, _) in terms.items() if d is not None}
        losses = first.losses, second.losses
        result = certified(
            gradients, direct, solution, self.settings.solver_name, second, b, ll_print.norm, noise, losses
        )
        for name, gradient in result.gradients.items():
            _accumulate(ul_params[name], gradient)
        return result

    def _second_derivatives(
        self, losses: list[Callable[[], Tensor]], ll_params: list[nn.Parameter]
    ) -> SecondDerivatives:
        if len(losses) == 1:
            return SecondOrder(losses[0](), ll_params)
        return MeanSecondOrder(losses, ll_params, self.settings.retain_graphs)

    def _loss(self, objective: str, ll_model: nn.Module, put_back: Callable[[], None], batch: Batch) -> Tensor:
        """Return a loss; what another objective has done to modes and random state is no part of it."""
        put_back()
        return scalar_loss(objective, getattr(self, objective)(State.of(batch, self.ul_model, ll_model)))

    def state_dict(self) -> dict[str, Any]:
        """Return what the next call would start from: tensors, or ``None``, that load with ``weights_only=True``."""
        return self._inverse_hvp.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``; what does not fit the ll model is not used."""
        self._inverse_hvp.load_state_dict(state, next(self.ll_model.parameters()).device)


def _batch(data: Any, target: Any) -> Batch:
    return data if target is _ABSENT and data is not None else (data, None if target is _ABSENT else target)


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


def _of_used(b: Tensor, ll_params: list[nn.Parameter], unused: list[int]) -> Tensor:
    """Return ``dF/dw`` with zero for those parameters that the ll problem leaves alone: they are constants of it.

    Raises
    ------
    DetachedError
        If it leaves all alone that the ul loss depends on, and all others.
    """
    if not unused:
        return b
    if len(unused) == len(ll_params) and b.any():
        raise DetachedError(
            "`ll_objective` does not depend on the ll model's parameters. Compute it from `state.ll_model`, without "
            ".detach(), .item() or NumPy, and not from a model outside the state."
        )
    pieces = b.split([param.numel() for param in ll_params])
    return torch.cat([torch.zeros_like(piece) if i in unused else piece for i, piece in enumerate(pieces)])
