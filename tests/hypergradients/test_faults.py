"""Awkward inputs, in one table: each is answered rightly or refused aloud, and none is silently wrong."""

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.distributions import Dirichlet, Gamma
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    ctc_loss,
    embedding_bag,
    hardsigmoid,
    multi_margin_loss,
    multilabel_margin_loss,
    pdist,
    scaled_dot_product_attention,
)
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

from tests.support.problems import F64, Values, generator, symmetric
from tune_implicit.hypergradients.certificate import Hypergradient
from tune_implicit.hypergradients.implicit import Implicit
from tune_implicit.hypergradients.products import SecondOrder
from tune_implicit.hypergradients.solvers.solution import Hvp, Solution, Status
from tune_implicit.hypergradients.state import Objective, State

CONVERGED, MAX_STEPS, STAGNATED, DIVERGED = Status.CONVERGED, Status.MAX_STEPS, Status.STAGNATED, Status.DIVERGED
NEGATIVE, NON_FINITE, UNVERIFIED = Status.NEGATIVE_CURVATURE, Status.NON_FINITE, Status.UNVERIFIED
ITERATIVE = ("neumann", "cg", "minres")
# As far as the dtype has digits: which of the two it is depends on rounding.
SOLVED = (CONVERGED, STAGNATED)


# ---- the rule


@dataclass(frozen=True)
class Reference:
    """A problem in dense float64: ``v`` solves ``(H + d I) v = b``, the hypergradient is ``direct - J' v``."""

    h: Tensor
    b: Tensor
    j: Tensor
    direct: Tensor

    @cached_property
    def norms(self) -> tuple[float, float]:
        return torch.linalg.matrix_norm(self.h, 2).item(), torch.linalg.matrix_norm(self.j, 2).item()

    def of(self, damping: float, unit: Tensor) -> "Reference":
        """The damped problem, with ``F`` divided by ``unit``."""
        h = self.h + damping * torch.eye(len(self.b), dtype=F64)
        return Reference(h, self.b / unit, self.j, self.direct / unit)

    def gradient(self, v: Tensor) -> Tensor:
        return self.direct - self.j.T @ v

    def residual_norm(self, v: Tensor) -> float:
        return (self.b - self.h @ v).norm().item()

    def solve(self) -> tuple[Tensor | None, float]:
        """The shortest solution, ``None`` where there is none; and the norm of the inverse where ``H`` has one."""
        values, basis = torch.linalg.eigh(self.h)
        kept = values.abs() > 1e-14 * values.abs().max()
        inverse = torch.where(kept, 1 / values, 0)
        v = basis @ (inverse * (basis.T @ self.b))
        solved = self.residual_norm(v) <= 1e-6 * self.b.norm()
        return (v if solved else None), inverse.abs().max().item()


def assert_not_silently_wrong(
    result: Hypergradient, reference: Reference, asked: float, eps: float, grads: Mapping[str, Tensor | None]
) -> None:
    """A failure that adds nothing, or right, or truncated with a residual that admits it.

    ``asked`` is the residual norm at which the solver was told to stop, ``eps`` the rounding of the coarsest dtype, and
    ``grads`` what the call added to ``.grad``.
    """
    if result.status.failed:
        assert result.gradients == {}
        assert math.isnan(result.norm)
        assert all(added is None for added in grads.values())
        return
    got = flat(gradient.to(F64) for gradient in result.gradients.values())
    torch.testing.assert_close(flat(grads[name].to(F64) for name in result.gradients), got, rtol=0, atol=0)
    assert got.isfinite().all()
    # In units in which no square leaves the range of float64.
    unit = flat([reference.b, reference.direct]).abs().max()
    unit = torch.where(unit > 0, unit, 1.0)
    reference = reference.of(result.damping, unit)
    reported, asked = (torch.tensor(value, dtype=F64) / unit for value in (result.residual_norm, asked))
    got, v = got / unit, result.v.to(F64) / unit
    h_norm, j_norm = reference.norms

    # It is the hypergradient of its `v`, which is as good as it says; NaN says that it is not known.
    true_residual, rounding = reference.residual_norm(v), 10 * eps * (h_norm * v.norm() + reference.b.norm())
    known = result.status is CONVERGED or not reported.isnan()
    assert not known or true_residual <= 1.001 * reported + rounding
    size = reference.direct.norm() + j_norm * v.norm()
    assert (got - reference.gradient(v)).norm() <= 10 * eps * size

    if result.status is CONVERGED:
        assert reported.isfinite()
        right, inverse_norm = reference.solve()
        if right is None:
            assert true_residual <= 2 * asked + rounding
            return
        size += j_norm * right.norm()
        allowed = min(max(10 * eps * h_norm * inverse_norm, 1e-9), 0.1) * size
        assert (got - reference.gradient(right)).norm() <= allowed + 2 * j_norm * inverse_norm * asked
    if result.status is STAGNATED and reference.solve()[0] is not None:
        assert true_residual <= 10 * rounding


# ---- what is put to it


@dataclass
class Scene:
    """A problem at one point, and the call."""

    ul_objective: Objective
    ul_model: nn.Module
    ll_objective: Objective
    ll_model: nn.Module
    validate_data: Any = None
    train_data: Any = None
    auxiliary_model: nn.Module | None = None
    # The step size of the Neumann series, in units of 1 / ||H||.
    step: float = 1.9
    # What `Implicit` is given besides.
    arguments: dict[str, Any] = field(default_factory=dict)
    # The rounding of the coarsest dtype in use, where the parameters do not tell.
    eps: float = 0.0
    around: Callable[[], AbstractContextManager] = nullcontext
    # What is done before, with the `Implicit` that is tested.
    before: Callable[[Implicit], object] | None = None
    # What the objective itself changes, and does not get back.
    edits: str = ""
    # Where automatic differentiation is the suspect.
    by_differences: bool = False

    def __post_init__(self) -> None:
        self.eps = max([self.eps, *(torch.finfo(p.dtype).eps for p in self.params() if p.is_floating_point())])

    @property
    def trained(self) -> nn.Module:
        return self.auxiliary_model or self.ll_model

    @cached_property
    def reference(self) -> Reference:
        with torch.random.fork_rng():
            return differences(self) if self.by_differences else dense(self)

    def params(self) -> list[nn.Parameter]:
        return [p for model in (self.ul_model, self.trained) for p in model.parameters()]

    def implicit(self, solver: str) -> Implicit:
        arguments = {"solver": solver, "k": 500} | self.arguments
        if "ll_learning_rate" not in arguments:
            h = self.reference.h
            largest = torch.linalg.matrix_norm(h, 2).item() if h.isfinite().all() else 1.0
            arguments["ll_learning_rate"] = self.step / largest if largest else 0.1
        return Implicit(self.ul_objective, self.ul_model, self.ll_objective, self.ll_model, **arguments)

    def compute(self, implicit: Implicit) -> Hypergradient:
        with self.around():
            return implicit.compute_gradients(
                self.validate_data, None, self.auxiliary_model, train_data=self.train_data
            )

    def state(self) -> dict[str, Any]:
        """What a call must leave as it is."""
        models = (self.ul_model, self.trained)
        return {
            "parameters": [p.detach().clone() for p in self.params()],
            "requires_grad": [p.requires_grad for p in self.params()],
            "ll grad": [p.grad for p in self.trained.parameters()],
            "modes": [module.training for model in models for module in model.modules()],
            "buffers": [buffer.clone() for model in models for buffer in model.buffers()],
            "random state": torch.get_rng_state(),
        }


def losses_in_float64(scene: Scene) -> tuple[list[Tensor], list[Tensor], Callable[[], tuple[Tensor, Tensor]]]:
    """Copies of ``w`` and ``l``, and a function that returns ``F`` and ``f`` at them."""
    ul_model, ll_model = (deepcopy(getattr(m, "_orig_mod", m)).double() for m in (scene.ul_model, scene.trained))
    validate_data, train_data = (
        x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for x in (scene.validate_data, scene.train_data)
    )

    modules = [module for model in (ul_model, ll_model) for module in model.modules()]
    modes = [module.training for module in modules]
    buffers = [(m, name, b.clone()) for m in modules for name, b in m.named_buffers(recurse=False)]

    def loss_of(objective: Objective, data: Any) -> Tensor:
        # Each sees the modes, the buffers and the random state that the call found, whatever the other does to them.
        torch.manual_seed(0)
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
        for module, name, buffer in buffers:
            setattr(module, name, buffer.clone())
        return objective(State(data, None, ul_model, ll_model))

    def losses() -> tuple[Tensor, Tensor]:
        return loss_of(scene.ul_objective, validate_data), loss_of(scene.ll_objective, train_data)

    w, ul = ([p for p in model.parameters() if p.requires_grad] for model in (ll_model, ul_model))
    return w, ul, losses


def flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def dense(scene: Scene) -> Reference:
    w, ul, losses = losses_in_float64(scene)
    n, zeros = sum(p.numel() for p in w), {"allow_unused": True, "materialize_grads": True}
    ul_loss, ll_loss = losses()
    # What `f` does not use is a constant of the ll problem.
    used = flat(
        torch.full_like(p, g is not None)
        for p, g in zip(w, grad(ll_loss, w, retain_graph=True, allow_unused=True), strict=True)
    )
    first = flat(grad(ul_loss, [*w, *ul], **zeros))
    first[:n] *= used
    gradient = flat(grad(ll_loss, w, create_graph=True, **zeros))
    second = torch.zeros(n, len(first), dtype=F64)
    if gradient.requires_grad:
        second = torch.stack([flat(grad(entry, [*w, *ul], retain_graph=True, **zeros)) for entry in gradient])
    return Reference(second[:, :n], first[:n], second[:, n:], first[n:])


def differences(scene: Scene, step: float = 1e-4) -> Reference:
    """By central differences of the losses themselves."""
    w, ul, losses = losses_in_float64(scene)
    entries = [(p.data.view(-1), i) for p in (*w, *ul) for i in range(p.numel())]
    n, m = sum(p.numel() for p in w), len(entries)

    def at(*shifts: tuple[int, float]) -> Tensor:
        for index, shift in shifts:
            entries[index][0][entries[index][1]] += shift
        with torch.no_grad():
            got = torch.stack(losses())
        for index, shift in shifts:
            entries[index][0][entries[index][1]] -= shift
        return got

    def curvature(i: int, j: int) -> float:
        corners = [(a, b) for a in (1, -1) for b in (1, -1)]
        return sum(a * b * at((i, a * step), (j, b * step))[1].item() for a, b in corners) / (4 * step**2)

    first = torch.stack([(at((i, step)) - at((i, -step)))[0] / (2 * step) for i in range(m)])
    second = torch.tensor([[curvature(i, j) for j in range(m)] for i in range(n)], dtype=F64)
    return Reference(second[:, :n], first[:n], second[:, n:], first[n:])


def numbers(*entries: float) -> Tensor:
    return torch.tensor(entries, dtype=F64)


def system(h: Tensor | None = None, b: Tensor | None = None, scales=(1.0, 1.0), dtype=F64, **changes: Any) -> Scene:
    """``F = b'w + |l|^2 / 2`` and ``f = w'Hw / 2 - l'w``: the hypergradient is ``l + H^-1 b``."""
    h = symmetric(numbers(0.5, 1, 2, 4)) if h is None else h
    b = torch.linspace(1, 2, len(h), dtype=F64) if b is None else b
    values = torch.linspace(0.5, 1.5, len(h), dtype=F64)
    parts = {
        "ul_objective": lambda s: scales[0] * (s.data @ s.ll_model.w + s.ul_model.l.square().sum() / 2),
        "ul_model": Values(l=values.to(dtype)),
        "ll_objective": lambda s: (
            scales[1] * (s.ll_model.w @ (s.data @ s.ll_model.w) / 2 - (s.ul_model.l * s.ll_model.w).sum())
        ),
        "ll_model": Values(w=(1 / values).to(dtype)),
        "validate_data": b.to(dtype),
        "train_data": h.to(dtype),
    }
    return Scene(**(parts | changes))


def diagonal(*eigenvalues: float, b: tuple[float, ...] | None = None, **changes: Any) -> Scene:
    return system(numbers(*eigenvalues).diag(), None if b is None else numbers(*b), **changes)


def toy_ul(s: State) -> Tensor:
    return (s.ll_model.w - 1).square().sum() / 2


def toy_ll(s: State) -> Tensor:
    return (s.ul_model.l.exp() * s.ll_model.w.square()).sum() / 2 - s.ll_model.w.sum()


def toy(**changes: Any) -> Scene:
    """Scalar problems side by side, with curvature ``exp(l)``."""
    parts = {
        "ul_objective": toy_ul,
        "ul_model": Values(l=numbers(-1, 0, 2)),
        "ll_objective": toy_ll,
        "ll_model": Values(w=numbers(1, 0.5, -2)),
    }
    return Scene(**(parts | changes))


def refused(**changes: Any) -> Scene:
    """A toy whose dense reference cannot be had, and is not needed."""
    return toy(**({"arguments": {"ll_learning_rate": 0.1}} | changes))


def plus(objective: Objective, term: Objective) -> Objective:
    return lambda s: objective(s) + term(s)


def network(model: nn.Module, x: Tensor | None = None, **changes: Any) -> Scene:
    """A loss of the network's output, with an L2 term that makes it convex; ``l`` scales its linear part."""
    random = generator(1)
    for p in model.parameters():
        p.data.copy_(torch.randn(p.shape, generator=random, dtype=F64) / 2)
    x = torch.randn(6, 3, generator=random, dtype=F64) if x is None else x

    def ll_objective(s: State) -> Tensor:
        w = flat(p.to(F64) for p in s.ll_model.parameters())
        return s.ll_model(s.data).pow(3).mean() + 4 * w.square().sum() - s.ul_model.l[0].sin() * w.cos().sum()

    parts = {
        "ul_objective": lambda s: s.ll_model(s.data).sin().mean() + s.ul_model.l.square().sum(),
        "ul_model": Values(l=numbers(0.7)),
        "ll_objective": ll_objective,
        "ll_model": model,
        "validate_data": x.flip(0),
        "train_data": x,
    }
    return Scene(**(parts | changes))


# ---- what a user may do, and what published packages do


def frozen(model: nn.Module, *names: str) -> nn.Module:
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


class LastButOne:
    """CG that leaves its loop before it stores the iterate that has converged (hypertorch, BOAT)."""

    def solve(self, hvp: Hvp, b: Tensor, v0: Tensor | None = None) -> Solution:
        v, r, p = torch.zeros_like(b), b, b
        for step in range(50):
            hp = hvp(p)
            alpha = (r @ r) / (p @ hp)
            v_next, r_next = v + alpha * p, r - alpha * hp
            if r_next.norm() < 1e-10:
                return Solution(v, CONVERGED, step + 1, r_next.norm().item())
            v, p, r = v_next, r_next + (r_next @ r_next) / (r @ r) * p, r_next
        return Solution(v, MAX_STEPS, 50, r.norm().item())


@dataclass(frozen=True)
class StaleBeta:
    """CG that builds the new direction from the old residual (hypergrad, betty-ml 0.1.1)."""

    honest: bool = False

    def solve(self, hvp: Hvp, b: Tensor, v0: Tensor | None = None) -> Solution:
        v, r, p = torch.zeros_like(b), b, b
        for _ in range(5):
            hp = hvp(p)
            alpha = (r @ r) / (p @ hp)
            v, r_next = v + alpha * p, r - alpha * hp
            p, r = r + (r_next @ r_next) / (r @ r) * p, r_next
        return Solution(v, MAX_STEPS, 5, r.norm().item()) if self.honest else Solution(v, CONVERGED, 5, 0.0)


@dataclass(frozen=True)
class Answering:
    """A solver that is sure of one answer."""

    answer: float

    def solve(self, hvp: Hvp, b: Tensor, v0: Tensor | None = None) -> Solution:
        return Solution(torch.full_like(b, self.answer), CONVERGED, 1, 0.0)


def no_grad_loss(s: State) -> Tensor:
    with torch.no_grad():
        return toy_ll(s)


def raising(s: State) -> Tensor:
    s.ll_model.eval()
    torch.randn(3)
    raise ZeroDivisionError("in the user's own code")


def edit_before(s: State) -> Tensor:
    with torch.no_grad():
        s.ll_model.w.mul_(2)
    return toy_ll(s)


def edit_after(s: State) -> Tensor:
    loss = toy_ll(s)
    with torch.no_grad():
        s.ll_model.w.mul_(2)
    return loss


def edit_data_after(s: State) -> Tensor:
    loss = toy_ll(s)
    s.ll_model.w.data.mul_(2)
    return loss


def freezing(s: State) -> Tensor:
    s.ll_model.w.requires_grad_(False)
    return toy_ll(s)


def unfreezing(s: State) -> Tensor:
    for p in (*s.ul_model.parameters(), *s.ll_model.parameters()):
        p.requires_grad_(True)
    return toy_ll(s)


def mode_changing(s: State) -> Tensor:
    s.ll_model.eval()
    s.ul_model.eval()
    return toy_ll(s)


def backward_inside(s: State) -> Tensor:
    loss = toy_ll(s)
    loss.backward(retain_graph=True)
    return loss


def hooked() -> nn.Module:
    """A model whose gradients are clipped in training, as recipes have it."""
    model = Values(w=numbers(1, 0, -2).exp())  # where the training gradient is zero
    model.w.register_hook(lambda gradient: gradient.clamp(-0.5, 0.5))
    return model


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient


class Rows(nn.Module):
    """An embedding and a linear layer, on rows 0, 1 and 1."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.table = nn.Embedding(3, 2, dtype=F64, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.table(x).sum(1).sin()


INDEX = torch.tensor([[0], [1], [1]])


def validating(s: State) -> Tensor:
    """What people write to validate: evaluation mode, and never back."""
    s.ll_model.eval()
    s.ul_model.eval()
    return s.ll_model(s.data).sin().mean() + s.ul_model.l.square().sum()


def drawing(s: State) -> Tensor:
    return s.ll_model(s.data + torch.randn_like(s.data)).sin().mean() + s.ul_model.l.square().sum()


class CheckpointedAttention(nn.Module):
    """Attention that is computed once more in each backward pass, where the fused kernel would be picked."""

    def __init__(self) -> None:
        super().__init__()
        self.project = linear(3, 6)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).unsqueeze(1).chunk(3, dim=-1)
        return scaled_dot_product_attention(q, k, v).squeeze(1)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.attend, x.view(2, 3, 3), use_reentrant=False).flatten(0, 1)


def log_probabilities(w: Tensor) -> Tensor:
    return torch.outer(w, w).view(3, 1, 3).log_softmax(-1)


# Each without a derivative of the order that a hypergradient needs, by the name that torch has for it.
ONCE: dict[str, Objective] = {
    "hardsigmoid": lambda s: hardsigmoid(s.ll_model.w).square().sum(),
    "_ctc_loss": lambda s: ctc_loss(log_probabilities(s.ll_model.w), torch.tensor([[1]]), (3,), (1,)),
    "_cdist": lambda s: torch.cdist(s.ll_model.w[:, None], torch.ones(2, 1, dtype=F64)).sum(),
    "_pdist": lambda s: pdist(s.ll_model.w[:, None]).square().sum(),
    "multi_margin_loss": lambda s: multi_margin_loss(torch.outer(s.ll_model.w, s.ll_model.w), torch.arange(3)),
    "multilabel_margin_loss": lambda s: multilabel_margin_loss(
        torch.outer(s.ll_model.w, s.ll_model.w), torch.tensor([[0, -1, 1]] * 3)
    ),
    "_segment_reduce": lambda s: torch.segment_reduce(s.ll_model.w.exp(), "max", lengths=torch.tensor([2, 1])).sum(),
    "_sparse_softmax": lambda s: torch.sparse.softmax(s.ll_model.w[:, None].to_sparse(), 0).to_dense().square().sum(),
    "_standard_gamma": lambda s: Gamma(s.ll_model.w.exp(), 1.0).rsample().sum(),
    "_embedding_bag": lambda s: embedding_bag(torch.tensor([[0, 1]]), s.ll_model.w[:, None]).square().sum(),
    "special_zeta|zeta": lambda s: torch.special.zeta(s.ll_model.w.exp() + 1.1, 1.0).sum(),
    "nll_loss_forward in its 'weight'": lambda s: cross_entropy(
        torch.outer(s.ll_model.w, s.ll_model.w), torch.arange(3), weight=s.ul_model.l.exp()
    ),
    "binary_cross_entropy_with_logits in its 'pos_weight'": lambda s: binary_cross_entropy_with_logits(
        s.ll_model.w, torch.ones(3, dtype=F64), pos_weight=s.ul_model.l.exp()
    ),
}


def linear(rows: int = 3, columns: int = 2) -> nn.Linear:
    return nn.Linear(rows, columns, dtype=F64)


def mlp(*middle: nn.Module) -> nn.Module:
    return nn.Sequential(linear(3, 2), *(middle or (nn.Tanh(),)), linear(2, 2))


def relu_at_zero() -> Scene:
    scene = network(mlp(nn.ReLU()))
    scene.ll_model[0].bias.data.zero_()
    scene.validate_data[0] = scene.train_data[0] = 0.0
    return scene


def tied() -> nn.Module:
    model = nn.Sequential(linear(3, 3), nn.Tanh(), linear(3, 3))
    model[2].weight = model[0].weight
    return model


def single(model: nn.Module, **changes: Any) -> Scene:
    """A network in float32."""
    scene = network(model)
    model.float()
    batches = {name: getattr(scene, name).float() for name in ("validate_data", "train_data")}
    return replace(scene, **(batches | changes))


def compiled() -> Scene:
    model = mlp()
    scene = network(model)
    scene.ll_model = torch.compile(model, backend="aot_eager")
    return scene


def transposed() -> Scene:
    model = nn.Module()
    model.weight = nn.Parameter(torch.randn(3, 2, generator=generator(), dtype=F64).T)
    model.wide = nn.Parameter(torch.randn(3, 4, generator=generator(), dtype=F64)[:, ::2])
    ul_model = nn.Module()
    ul_model.l = nn.Parameter(torch.randn(3, 2, generator=generator(2), dtype=F64).T)
    return toy(
        ul_model=ul_model,
        ll_model=model,
        ul_objective=lambda s: (s.ll_model.weight.sin() * s.ll_model.wide.T).sum(),
        ll_objective=lambda s: (
            (s.ul_model.l.exp() * s.ll_model.weight.square()).sum()
            + (s.ll_model.wide.square() * s.ul_model.l.T.exp()).sum()
            + (s.ll_model.weight.sin() @ s.ll_model.wide.cos()).sum() / 10
        ),
    )


def other_model_before(implicit: Implicit) -> None:
    """A solve with as many ll parameters, another Hessian, and a solve with fewer."""
    for w in (numbers(3, 5, -9), numbers(2)):
        other = Implicit(
            implicit.ul_objective, implicit.ul_model, implicit.ll_objective, Values(w=w), 0.1, 1, solver="dense"
        )
        implicit.compute_gradients(None, None, other.ll_model)


def stale_v(implicit: Implicit) -> None:
    implicit.load_state_dict({"v": numbers(1e200, math.inf, 7), "top": None, "preconditioner": None})


def same(objective: Objective) -> dict[str, Objective]:
    return {"ul_objective": plus(toy_ul, objective), "ll_objective": plus(toy_ll, objective)}


# ---- the table


@dataclass(frozen=True)
class Raises:
    error: type[Exception] | tuple[type[Exception], ...]
    match: str


One = Status | tuple[Status, ...] | Raises | None
Outcome = One | Mapping[str, One]


@dataclass(frozen=True)
class Fault:
    """An awkward input and what comes of it, by solver where they differ; ``None`` is anything but a wrong answer."""

    name: str
    build: Callable[[], Scene]
    outcome: Outcome = CONVERGED
    solvers: tuple[str, ...] = ("neumann", "cg", "minres", "dense")

    def outcome_of(self, solver: str) -> One:
        return self.outcome.get(solver, CONVERGED) if isinstance(self.outcome, Mapping) else self.outcome


# All get to the part of `b` that has no solution, and their residual tells how much it is.
UNSOLVABLE = STAGNATED
AT_SADDLE = {"neumann": NEGATIVE, "cg": NEGATIVE}
SADDLE = numbers(0.5, 1, 2, -0.3)
IN_PLACE = Raises((RuntimeError, ValueError), "in.?place")
FAULTS = [
    # The step size of the series.
    Fault("step size 2.1 / L", lambda: system(step=2.1), {"neumann": DIVERGED}),
    Fault("step size 3 / L", lambda: system(step=3), {"neumann": DIVERGED}),
    Fault("step size 100 / L", lambda: system(step=100), {"neumann": DIVERGED}),
    Fault("step size 1e12", lambda: system(arguments={"ll_learning_rate": 1e12}), {"neumann": DIVERGED}),
    Fault("step size 1e300", lambda: system(arguments={"ll_learning_rate": 1e300}), {"neumann": NON_FINITE}),
    Fault("step size 1e-12", lambda: system(arguments={"ll_learning_rate": 1e-12}), {"neumann": MAX_STEPS}),
    Fault("step size 3 / L, k = 0", lambda: system(step=3, arguments={"k": 0}), MAX_STEPS, ("neumann",)),
    Fault("step size 3 / L, k = 1", lambda: system(step=3, arguments={"k": 1}), DIVERGED, ("neumann",)),
    # The one residual that a series cannot know without a product more: that of a step too large, seen by no term yet.
    Fault(
        "step size 3 / L unseen until the last term",
        lambda: diagonal(1, 4, b=(1, 0.1), step=4, arguments={"k": 1, "verify": True}),
        UNVERIFIED,
        ("neumann",),
    ),
    Fault(
        "step size auto, learning rate 1e12", lambda: system(arguments={"ll_learning_rate": 1e12, "step_size": "auto"})
    ),
    Fault("step size auto at a saddle", lambda: system(symmetric(SADDLE), arguments={"step_size": "auto"}), AT_SADDLE),
    Fault("step size auto, H = 0", lambda: diagonal(0, 0, arguments={"step_size": "auto"}), NEGATIVE),
    # The spectrum.
    Fault("saddle", lambda: system(symmetric(SADDLE)), AT_SADDLE),
    Fault("saddle, k too small to see it", lambda: diagonal(1, 2, 3, -1e-3, arguments={"k": 1}), MAX_STEPS, ITERATIVE),
    Fault("maximum", lambda: diagonal(-1, -2), AT_SADDLE),
    Fault("exact breakdown", lambda: diagonal(1, -1, b=(1, 1)), AT_SADDLE),
    Fault("H = I", lambda: diagonal(1, 1, 1)),
    Fault("H = I, step size 1", lambda: diagonal(1, 1, 1, step=1)),
    Fault("H = 2 I", lambda: diagonal(2, 2, 2)),
    Fault("H = -I", lambda: diagonal(-1, -1), AT_SADDLE),
    Fault("H = 0", lambda: diagonal(0, 0), NEGATIVE),
    Fault("H = 0, b = 0", lambda: diagonal(0, 0, b=(0, 0))),
    Fault(
        "H = 0, k = 0",
        lambda: diagonal(0, 0, arguments={"k": 0}),
        dict.fromkeys(ITERATIVE, MAX_STEPS) | {"dense": NEGATIVE},
    ),
    Fault("singular, consistent", lambda: diagonal(1, 2, 0, b=(1, 1, 0))),
    Fault(
        "singular, consistent, rotated",
        lambda: (lambda h: system(h, h @ torch.ones(4, dtype=F64)))(symmetric(numbers(1, 2, 4, 0))),
    ),
    Fault("singular, inconsistent", lambda: diagonal(1, 2, 0, b=(1, 1, 1)), UNSOLVABLE),
    Fault("singular to rounding", lambda: diagonal(1, 1e-17, b=(1, 1)), UNSOLVABLE),
    Fault(
        "condition 1e12",
        lambda: system(symmetric(torch.logspace(0, -12, 8, dtype=F64))),
        dict.fromkeys(("cg", "minres", "dense"), STAGNATED) | {"neumann": MAX_STEPS},
    ),
    Fault(
        "condition 1e12, diagonal",
        lambda: diagonal(1, 1e-12),
        dict.fromkeys(("cg", "minres", "dense"), STAGNATED) | {"neumann": MAX_STEPS},
    ),
    Fault("condition 1e12, damped", lambda: diagonal(1, 1e-12, arguments={"damping": 0.1, "ll_learning_rate": 1.5})),
    Fault(
        "damping makes a saddle definite",
        lambda: system(symmetric(SADDLE), arguments={"damping": 0.5, "ll_learning_rate": 0.5}),
    ),
    Fault(
        "damping makes H singular",
        lambda: diagonal(1, -0.5, b=(1, 1), arguments={"damping": 0.5, "ll_learning_rate": 0.5}),
        UNSOLVABLE,
    ),
    Fault("k = 5000 and no tolerance", lambda: system(arguments={"k": 5000, "tolerance": 0.0}), STAGNATED),
    Fault(
        "k = 5000 and no tolerance, float32",
        lambda: system(dtype=torch.float32, arguments={"k": 5000, "tolerance": 0.0}),
        STAGNATED,
    ),
    Fault("k = 0", lambda: system(arguments={"k": 0}), MAX_STEPS, ITERATIVE),
    Fault("k = 0, dense", lambda: system(arguments={"k": 0}), CONVERGED, ("dense",)),
    Fault("k = 1", lambda: system(arguments={"k": 1}), MAX_STEPS, ITERATIVE),
    Fault("one parameter", lambda: diagonal(3)),
    Fault("one parameter, maximum", lambda: diagonal(-3), AT_SADDLE),
    Fault(
        "more parameters than the dense solver takes",
        lambda: refused(ul_model=Values(l=numbers(1)), ll_model=Values(w=torch.ones(5001, dtype=F64))),
        Raises(ValueError, "5001 x 5001 matrix, more than `max_size`"),
        ("dense",),
    ),
    # The size of the numbers.
    *(
        Fault(
            f"F of {a:g}, f of {b:g}, {str(dtype)[6:]}",
            lambda a=a, b=b, dtype=dtype: system(
                scales=(a, b), dtype=dtype, arguments={"tolerance": 0.0, "rtol": 1e-5}
            ),
            {"minres": None} if b != 1 and dtype is torch.float32 else CONVERGED,
        )
        for dtype in (F64, torch.float32)
        for a, b in ((1e-30, 1), (1e30, 1), (1, 1e-30), (1, 1e30), (1e-30, 1e-30), (1e30, 1e30))
    ),
    Fault("F of 1e-30 and the default tolerance", lambda: system(scales=(1e-30, 1))),
    Fault(
        "subnormal dF/dw",
        lambda: system(
            1e-10 * symmetric(numbers(1, 2, 3, 4)),
            1e-310 * torch.ones(4, dtype=F64),
            arguments={"tolerance": 0.0, "rtol": 1e-9},
            ul_objective=lambda s: s.data @ s.ll_model.w,
        ),
    ),
    Fault(
        "subnormal dF/dw, float32",
        lambda: system(
            1e-10 * symmetric(numbers(1, 2, 3, 4)),
            1e-40 * torch.ones(4, dtype=F64),
            dtype=torch.float32,
            arguments={"tolerance": 0.0, "rtol": 1e-2},
            ul_objective=lambda s: s.data @ s.ll_model.w,
        ),
    ),
    Fault("dF/dw of 1e200", lambda: system(scales=(1e200, 1), arguments={"tolerance": 0.0, "rtol": 1e-9}), NON_FINITE),
    Fault(
        "answer out of range",
        lambda: toy(
            ul_model=Values(l=torch.tensor([1e-10])),
            ll_model=Values(w=torch.tensor([1.0])),
            ul_objective=lambda s: 1e30 * s.ll_model.w.sum(),
            ll_objective=lambda s: (s.ul_model.l * s.ll_model.w.square()).sum() / 2,
        ),
        NON_FINITE,
    ),
    # dF/dw.
    Fault("dF/dw = 0", lambda: system(b=torch.zeros(4, dtype=F64))),
    Fault("F of l only", lambda: toy(ul_objective=lambda s: s.ul_model.l.exp().sum())),
    Fault("F linear in w", lambda: toy(ul_objective=lambda s: s.ll_model.w.sum())),
    Fault("f linear in w", lambda: toy(ll_objective=lambda s: (s.ul_model.l * s.ll_model.w).sum()), NEGATIVE),
    Fault(
        "f of l only",
        lambda: refused(ll_objective=lambda s: s.ul_model.l.exp().sum()),
        Raises(ValueError, "`ll_objective` does not depend on the ll model's parameters"),
    ),
    Fault(
        "f linear in w, without l",
        lambda: toy(ul_objective=plus(toy_ul, lambda s: s.ul_model.l.sum()), ll_objective=lambda s: s.ll_model.w.sum()),
        NEGATIVE,
    ),
    Fault(
        "f of l only, F of l only",
        lambda: toy(ul_objective=lambda s: s.ul_model.l.exp().sum(), ll_objective=lambda s: s.ul_model.l.sum()),
    ),
    # Which parameters take part.
    *(
        Fault(
            f"ll parameter unused in {unused}",
            lambda unused=unused: toy(
                ll_model=Values(w=numbers(1, 0.5, -2), extra=numbers(5, 6)),
                ul_objective=plus(toy_ul, lambda s: 0 if unused != "f" else s.ll_model.extra.sum()),
                ll_objective=plus(toy_ll, lambda s: 0 if unused != "F" else s.ll_model.extra.square().sum()),
            ),
        )
        for unused in ("F", "f", "both")
    ),
    *(
        Fault(
            f"ul parameter in {used}",
            lambda used=used: toy(
                ul_model=Values(l=numbers(-1, 0, 2), extra=numbers(3, 4)),
                ul_objective=plus(toy_ul, lambda s: 0 if used != "F only" else s.ul_model.extra.square().sum()),
                ll_objective=plus(
                    toy_ll,
                    lambda s: (
                        0
                        if used == "F only"
                        else s.ul_model.extra.sum() * s.ll_model.w.sum()
                        if used == "f only"
                        else s.ul_model.extra.sum()
                    ),
                ),
            ),
        )
        for used in ("F only", "f only", "f alone, not with w")
    ),
    Fault(
        "ul parameter in neither",
        lambda: toy(ul_model=Values(l=numbers(-1, 0, 2), rate=numbers(1))),
        Raises(ValueError, "Neither objective uses the ul model's 'rate'"),
    ),
    Fault(
        "frozen ll tensor",
        lambda: toy(
            ll_model=frozen(Values(w=numbers(1, 0.5, -2), scale=numbers(2)), "scale"),
            ll_objective=lambda s: toy_ll(s) * s.ll_model.scale[0],
        ),
    ),
    Fault(
        "frozen ul tensor",
        lambda: toy(
            ul_model=frozen(Values(l=numbers(-1, 0, 2), scale=numbers(2)), "scale"),
            ll_objective=lambda s: toy_ll(s) * s.ul_model.scale[0],
        ),
    ),
    Fault(
        "all of the ll model frozen",
        lambda: refused(ll_model=frozen(Values(w=numbers(1, 0, 1)), "w")),
        Raises(ValueError, "`ll_model` has no parameter to train"),
    ),
    Fault(
        "all of the ul model frozen",
        lambda: refused(ul_model=frozen(Values(l=numbers(1, 0, 1)), "l")),
        Raises(ValueError, "`ul_model` has no parameter to train"),
    ),
    Fault("tied weights", lambda: network(tied())),
    Fault(
        "parameter expanded in F",
        lambda: toy(ul_objective=lambda s: (s.ll_model.w.expand(5, 3) * s.ul_model.l.expand(5, 3)).sin().sum()),
    ),
    Fault(
        "parameter broadcast in f",
        lambda: toy(ll_objective=plus(toy_ll, lambda s: (s.ll_model.w[:, None] * s.ul_model.l).square().sum())),
    ),
    Fault("transposed and strided parameters", transposed),
    Fault(
        "0-dim parameters",
        lambda: toy(ul_model=Values(l=torch.tensor(0.3, dtype=F64)), ll_model=Values(w=torch.tensor(2.0, dtype=F64))),
    ),
    Fault(
        "empty parameters beside others",
        lambda: toy(
            ul_model=Values(l=numbers(-1, 0, 2), none=numbers()),
            ll_model=Values(none=numbers(), w=numbers(1, 0.5, -2)),
            ul_objective=plus(toy_ul, lambda s: s.ll_model.none.sum() + s.ul_model.none.sum()),
            ll_objective=plus(toy_ll, lambda s: s.ll_model.none.square().sum()),
        ),
    ),
    Fault(
        "nothing but an empty ll parameter",
        lambda: refused(ll_model=Values(w=torch.zeros(0, 3, dtype=F64))),
        Raises(ValueError, "`ll_model` has no parameter to train"),
    ),
    # Dtypes.
    Fault("float64 ul, float32 ll", lambda: toy(ll_model=Values(w=torch.tensor([1, 0.5, -2]))), SOLVED),
    Fault("float32 ul, float64 ll", lambda: toy(ul_model=Values(l=torch.tensor([-1.0, 0, 2])))),
    Fault(
        "ll model of two dtypes",
        lambda: toy(
            ll_model=Values(w=numbers(1, 0.5, -2), single=torch.tensor([2.0, 3.1])),
            ul_objective=plus(toy_ul, lambda s: s.ll_model.single.sum()),
            ll_objective=plus(
                toy_ll, lambda s: (s.ll_model.single - s.ul_model.l.sum() * s.ll_model.w.mean()).square().sum() / 3
            ),
        ),
        SOLVED,
    ),
    Fault(
        "bfloat16 ll model", lambda: toy(ll_model=Values(w=torch.tensor([1, 0.5, -2], dtype=torch.bfloat16))), SOLVED
    ),
    Fault("bfloat16 products", lambda: system(dtype=torch.bfloat16), None),
    Fault("bfloat16 products, verified", lambda: system(dtype=torch.bfloat16, arguments={"verify": True}), None),
    Fault("float16 products", lambda: system(dtype=torch.float16), None),
    Fault(
        "complex ll parameter",
        lambda: refused(ll_model=Values(w=torch.ones(3, dtype=torch.complex128))),
        Raises(TypeError, "`ll_model`'s parameter 'w' must be real and floating"),
    ),
    Fault(
        "complex ul parameter",
        lambda: refused(ul_model=Values(l=torch.ones(3, dtype=torch.complex128))),
        Raises(TypeError, "`ul_model`'s parameter 'l' must be real and floating"),
    ),
    # Numbers that are none.
    *(
        Fault(
            f"{level} loss of {bad}",
            lambda level=level, bad=bad: toy(
                **{f"{level}_objective": plus({"ul": toy_ul, "ll": toy_ll}[level], lambda s: bad)}
            ),
            NON_FINITE,
        )
        for level in ("ul", "ll")
        for bad in (math.inf, -math.inf, math.nan)
    ),
    Fault(
        "NaN in dF/dw only",
        lambda: toy(ul_objective=plus(toy_ul, lambda s: (0 * s.ll_model.w).sqrt().sum())),
        NON_FINITE,
    ),
    Fault(
        "inf in dF/dw only", lambda: toy(ul_objective=plus(toy_ul, lambda s: (s.ll_model.w[0] - 1).sqrt())), NON_FINITE
    ),
    Fault(
        "NaN in dF/dl only",
        lambda: toy(ul_objective=plus(toy_ul, lambda s: (0 * s.ul_model.l).sqrt().sum())),
        NON_FINITE,
    ),
    Fault(
        "NaN in df/dw", lambda: toy(ll_objective=plus(toy_ll, lambda s: (0 * s.ll_model.w).sqrt().sum())), NON_FINITE
    ),
    Fault(
        "NaN in d2f/dw2 only",
        lambda: toy(
            ll_model=Values(w=numbers(1, 0, -2)), ll_objective=plus(toy_ll, lambda s: s.ll_model.w.abs().pow(1.5).sum())
        ),
        NON_FINITE,
    ),
    Fault(
        "NaN in d2f/dw2 only, b = 0 there",
        lambda: toy(
            ll_model=Values(w=numbers(1, 0, -2)),
            ul_objective=lambda s: s.ll_model.w[::2].sum(),
            ll_objective=plus(toy_ll, lambda s: s.ll_model.w.abs().pow(1.5).sum()),
        ),
        NON_FINITE,
    ),
    Fault(
        "inf in the mixed derivative only",
        lambda: toy(
            ul_model=Values(l=numbers(-1, 0, 2), zero=numbers(0)),
            ll_objective=plus(toy_ll, lambda s: s.ul_model.zero.sqrt() * s.ll_model.w.sum()),
        ),
        NON_FINITE,
    ),
    Fault(
        "NaN in the mixed derivative only",
        lambda: toy(
            ul_model=Values(l=numbers(-1, 0, 2), zero=numbers(0)),
            ll_objective=plus(toy_ll, lambda s: (0 * s.ul_model.zero).sqrt() * s.ll_model.w.sum()),
        ),
        NON_FINITE,
    ),
    Fault("inf in a ul value", lambda: toy(ul_model=Values(l=numbers(-1, 0, math.inf))), NON_FINITE),
    Fault("NaN in a ul value", lambda: toy(ul_model=Values(l=numbers(-1, 0, math.nan))), NON_FINITE),
    Fault(
        "inf in a ul value that saturates",
        lambda: toy(
            ll_objective=lambda s: ((1 + s.ul_model.l.sigmoid()) * s.ll_model.w.square()).sum(),
            ul_model=Values(l=numbers(-1, 0, math.inf)),
        ),
    ),
    Fault("inf in an ll value", lambda: toy(ll_model=Values(w=numbers(1, math.inf, 2))), NON_FINITE),
    Fault("NaN in an ll value", lambda: toy(ll_model=Values(w=numbers(1, math.nan, 2))), NON_FINITE),
    # Objectives that return no loss.
    *(
        Fault(
            f"{level} loss {name}",
            lambda level=level, returned=returned: refused(
                **{f"{level}_objective": lambda s: returned({"ul": toy_ul, "ll": toy_ll}[level](s))}
            ),
            Raises(error, f"`{level}_objective` .*{match}"),
        )
        for level in ("ul", "ll")
        for name, returned, error, match in (
            ("an integer", lambda loss: loss.long(), TypeError, "must return a real floating tensor, got torch.int64"),
            (
                "a vector",
                lambda loss: loss.expand(3),
                ValueError,
                r"must return a scalar, got a tensor of shape \(3,\)",
            ),
            (
                "empty",
                lambda loss: loss.expand(3)[:0],
                ValueError,
                r"must return a scalar, got a tensor of shape \(0,\)",
            ),
            ("detached", lambda loss: loss.detach(), ValueError, "depends on no parameter"),
            ("a number", lambda loss: loss.item(), TypeError, "must return a real floating tensor, got float"),
            ("none", lambda loss: None, TypeError, "must return a real floating tensor, got NoneType"),
            ("complex", lambda loss: loss * 1j, TypeError, "must return a real floating tensor, got torch.complex128"),
        )
    ),
    Fault(
        "loss under no_grad",
        lambda: refused(ll_objective=no_grad_loss),
        Raises(ValueError, "`ll_objective` .* depends on no parameter.* torch.no_grad"),
    ),
    Fault("call under no_grad", lambda: toy(around=torch.no_grad)),
    Fault(
        "call under inference_mode",
        lambda: refused(around=torch.inference_mode),
        Raises(ValueError, "depends on no parameter"),
    ),
    # Objectives that do more than to compute.
    Fault("parameter edited before its use", lambda: refused(ll_objective=edit_before, edits="parameters"), IN_PLACE),
    Fault("parameter edited after its use", lambda: refused(ll_objective=edit_after, edits="parameters"), IN_PLACE),
    Fault(
        "parameter's data edited after its use",
        lambda: refused(ll_objective=edit_data_after, edits="parameters"),
        IN_PLACE,
    ),
    Fault("objective raises", lambda: refused(ll_objective=raising), Raises(ZeroDivisionError, "the user's own code")),
    Fault(
        "objective freezes a parameter",
        lambda: refused(ll_objective=freezing),
        Raises(RuntimeError, "does not require grad"),
    ),
    Fault(
        "objective unfreezes a parameter",
        lambda: toy(ll_objective=unfreezing, ll_model=frozen(Values(w=numbers(1, 0.5, -2), extra=numbers(1)), "extra")),
    ),
    Fault("objective changes modes", lambda: toy(ll_objective=mode_changing)),
    Fault("objective calls backward", lambda: toy(ll_objective=backward_inside)),
    Fault("hook clips gradients", lambda: toy(ll_model=hooked()), None),
    # torch takes its second derivative for zero, whether the gradient that comes to it is constant or not.
    *(
        Fault(
            f"function that is differentiable once, {place}",
            lambda after=after: refused(ll_objective=plus(toy_ll, lambda s: after(Square.apply(s.ll_model.w)).sum())),
            Raises((RuntimeError, ValueError), "once_differentiable"),
        )
        for place, after in (("at the end", lambda x: x), ("in the middle", torch.sin))
    ),
    # Modules.
    Fault("ReLU at exactly 0", relu_at_zero),
    Fault("BatchNorm in training", lambda: network(mlp(nn.BatchNorm1d(2, dtype=F64)))),
    Fault("dropout", lambda: network(mlp(nn.Dropout(0.5)))),
    # What one objective does to the modes and to the random state is no part of the other.
    Fault(
        "BatchNorm, and a ul objective that calls eval",
        lambda: network(mlp(nn.BatchNorm1d(2, dtype=F64)), ul_objective=validating),
    ),
    Fault(
        "dropout, and a ul objective that calls eval", lambda: network(mlp(nn.Dropout(0.5)), ul_objective=validating)
    ),
    Fault("dropout, and a ul objective that draws", lambda: network(mlp(nn.Dropout(0.5)), ul_objective=drawing)),
    Fault(
        "dropout, a ul objective that calls eval, and noise",
        lambda: network(mlp(nn.Dropout(0.5)), ul_objective=validating, arguments={"stop": "noise"}),
    ),
    Fault(
        "attention that is computed again in backward passes",
        lambda: network(CheckpointedAttention(), by_differences=True, eps=1e-8),
        CONVERGED,
        ("minres", "dense"),
    ),
    *(
        Fault(
            f"{name} in f",
            lambda objective=objective: refused(ll_objective=plus(toy_ll, objective)),
            Raises(ValueError, f"torch cannot differentiate ({name}).*, which `ll_objective` needs.*: write .*freeze"),
            ("cg",),
        )
        for name, objective in ONCE.items()
    ),
    Fault(
        "a module without a second derivative",
        lambda: network(mlp(nn.Hardsigmoid()), arguments={"ll_learning_rate": 0.1}),
        Raises(ValueError, r"hardsigmoid\w* twice, .* needs \(in '1', Hardsigmoid\): write nn.ReLU6"),
    ),
    Fault(
        "a derivative that is missing in F",
        lambda: refused(ul_objective=ONCE["nll_loss_forward in its 'weight'"]),
        Raises(ValueError, "differentiate nll_loss_forward in its 'weight', which `ul_objective` needs"),
        ("cg",),
    ),
    Fault(
        "Dirichlet samples",
        lambda: refused(ll_objective=plus(toy_ll, lambda s: Dirichlet(s.ll_model.w.exp()).rsample().square().sum())),
        Raises((RuntimeError, ValueError), "once_differentiable"),
        ("cg",),
    ),
    Fault(
        "weight_norm as a function",
        lambda: refused(
            ll_objective=plus(
                toy_ll, lambda s: torch._weight_norm(s.ll_model.w[:, None], s.ul_model.l[:, None], 0).sin().sum()
            )
        ),
        Raises(ValueError, "uses weight_norm, whose second derivative torch gets wrong"),
        ("cg",),
    ),
    Fault(
        "objectives that draw at each call",
        lambda: toy(
            ul_objective=lambda s: toy_ul(s) * torch.rand(()), ll_objective=lambda s: toy_ll(s) * (1 + torch.rand(()))
        ),
    ),
    Fault(
        "EmbeddingBag",
        lambda: refused(ll_model=nn.EmbeddingBag(3, 2)),
        Raises(ValueError, "uses EmbeddingBag, which torch cannot differentiate twice"),
    ),
    Fault(
        "weight_norm",
        lambda: refused(ll_model=weight_norm(linear())),
        Raises(ValueError, "uses weight_norm, which torch cannot differentiate twice"),
    ),
    Fault("spectral_norm", lambda: refused(ll_model=spectral_norm(linear())), Raises(ValueError, "uses spectral_norm")),
    Fault(
        "Embedding",
        lambda: network(Rows(), INDEX, by_differences=True, eps=1e-8),
        CONVERGED,
        ("neumann", "dense"),
    ),
    Fault(
        "Embedding, scale_grad_by_freq",
        lambda: refused(ll_model=Rows(scale_grad_by_freq=True)),
        Raises(ValueError, "scale_grad_by_freq"),
    ),
    Fault(
        "Embedding, max_norm",
        lambda: network(Rows(max_norm=0.1), INDEX, arguments={"ll_learning_rate": 0.1}, edits="parameters"),
        IN_PLACE,
    ),
    Fault(
        "Embedding, sparse",
        lambda: network(Rows(sparse=True), INDEX, arguments={"ll_learning_rate": 0.1}),
        Raises((RuntimeError, ValueError), "sparse"),
    ),
    Fault("Embedding, padding_idx", lambda: network(Rows(padding_idx=0), INDEX)),
    Fault(
        "autocast around the call",
        lambda: single(mlp(), around=lambda: torch.autocast("cpu", torch.bfloat16), eps=2**-8),
        SOLVED,
    ),
    Fault("compiled ll model", compiled),
    # Solvers and their options.
    Fault(
        "CG that returns the last iterate but one",
        lambda: diagonal(1, 1, arguments={"solver": LastButOne(), "verify": True}),
        UNVERIFIED,
        ("object",),
    ),
    Fault(
        "CG that returns the last iterate but one, H != I",
        lambda: system(arguments={"solver": LastButOne(), "verify": True}),
        UNVERIFIED,
        ("object",),
    ),
    Fault(
        "CG with a stale direction",
        lambda: system(arguments={"solver": StaleBeta(), "verify": True}),
        UNVERIFIED,
        ("object",),
    ),
    Fault(
        "CG with a stale direction, honest",
        lambda: system(arguments={"solver": StaleBeta(honest=True)}),
        MAX_STEPS,
        ("object",),
    ),
    Fault(
        "solver that answers 0",
        lambda: system(arguments={"solver": Answering(0), "verify": True}),
        UNVERIFIED,
        ("object",),
    ),
    Fault(
        "solver that answers NaN", lambda: system(arguments={"solver": Answering(math.nan)}), NON_FINITE, ("object",)
    ),
    Fault(
        "solver that answers NaN, verified",
        lambda: system(arguments={"solver": Answering(math.nan), "verify": True}),
        NON_FINITE,
        ("object",),
    ),
    Fault("verify of honest solvers", lambda: system(arguments={"verify": True})),
    Fault("fallback at a saddle", lambda: system(symmetric(SADDLE), arguments={"fallback": True})),
    Fault("fallback, H = 0", lambda: diagonal(0, 0, arguments={"fallback": True}), MAX_STEPS),
    Fault(
        "fallback, singular and inconsistent",
        lambda: diagonal(1, 2, 0, b=(1, 1, 1), arguments={"fallback": True}),
        None,
    ),
    Fault(
        "fallback, NaN in H",
        lambda: toy(
            ll_model=Values(w=numbers(1, 0, -2)),
            ll_objective=plus(toy_ll, lambda s: s.ll_model.w.abs().pow(1.5).sum()),
            arguments={"fallback": True},
        ),
        NON_FINITE,
    ),
    Fault("fallback, step size 100 / L", lambda: system(step=100, arguments={"fallback": True})),
    Fault(
        "noise, batch of 1",
        lambda: refused(validate_data=numbers(1), arguments={"ll_learning_rate": 0.1, "stop": "noise"}),
        Raises(ValueError, "must hold 2 or more examples, got 1"),
    ),
    Fault(
        "noise, no batch",
        lambda: refused(arguments={"ll_learning_rate": 0.1, "stop": "noise"}),
        Raises(ValueError, "must hold 2 or more examples, got 0"),
    ),
    # The loss of the first example is infinite alone, and finite in the batch.
    Fault(
        "noise that is infinite",
        lambda: toy(
            validate_data=numbers(1, 2, 3),
            ul_objective=lambda s: s.ll_model.w.sum() / (s.data.mean() - 1),
            arguments={"stop": "noise"},
        ),
    ),
    Fault(
        "noise that is NaN",
        lambda: toy(
            validate_data=numbers(1, 2, 3),
            ul_objective=lambda s: toy_ul(s) * (s.data.mean() - 1).sqrt() / (s.data.mean() - 1),
            arguments={"stop": "noise"},
        ),
    ),
    Fault(
        "noise",
        lambda: toy(
            validate_data=numbers(1, 2, 3),
            ul_objective=lambda s: (s.ll_model.w * (100 + s.data.mean())).sum(),
            arguments={"stop": "noise"},
        ),
    ),
    Fault(
        "warm start after other ll shapes",
        lambda: toy(
            arguments={"warm_start": True, "k": 500},
            auxiliary_model=Values(w=numbers(1, 0.5, -2)),
            before=other_model_before,
        ),
    ),
    Fault("warm start that is not finite", lambda: toy(arguments={"warm_start": True}, before=stale_v)),
    Fault(
        "preconditioner of another Hessian",
        lambda: toy(
            arguments={"preconditioner_memory": 3},
            auxiliary_model=Values(w=numbers(1, 0.5, -2)),
            before=other_model_before,
        ),
        CONVERGED,
        ("cg",),
    ),
]

ROWS = [pytest.param(fault, solver, id=f"{fault.name}-{solver}") for fault in FAULTS for solver in fault.solvers]


@pytest.mark.parametrize(("fault", "solver"), ROWS)
def test_no_silent_wrong_answer(fault: Fault, solver: str) -> None:
    scene, outcome = fault.build(), fault.outcome_of(solver)
    torch.manual_seed(0)  # as the reference has it
    before = scene.state()
    if isinstance(outcome, Raises):
        with pytest.raises(outcome.error, match=outcome.match):
            scene.compute(scene.implicit(solver))
        assert all(p.grad is None for p in scene.params())
    else:
        implicit = scene.implicit(solver)
        if scene.before is not None:
            scene.before(implicit)
            scene.ul_model.zero_grad()
        result = scene.compute(implicit)
        grads = {name: p.grad for name, p in scene.ul_model.named_parameters() if p.requires_grad}
        assert_not_silently_wrong(result, scene.reference, asked_of(scene, result), scene.eps, grads)
        assert outcome is None or result.status in (outcome if isinstance(outcome, tuple) else (outcome,))
    after = scene.state()
    assert_close(
        {name: after[name] for name in after if name != scene.edits},
        {name: before[name] for name in before if name != scene.edits},
    )


def asked_of(scene: Scene, result: Hypergradient) -> float:
    b_norm = result.residual_norm / result.relative_residual if result.relative_residual else 0.0
    noise = result.noise_norm if math.isfinite(result.noise_norm) else 0.0
    return max(scene.arguments.get("tolerance", 1e-10), scene.arguments.get("rtol", 0.0) * b_norm, noise)


def assert_close(got: object, expected: object) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("solver", ITERATIVE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_residual_of_coarse_products_is_no_recursion(dtype: torch.dtype, solver: str) -> None:
    """``b`` is float32 then, but a product keeps two or three digits, and so does what is left of ``b``."""
    scene = system(dtype=dtype)
    result = scene.compute(scene.implicit(solver))
    loss = scene.ll_objective(State(scene.train_data, None, scene.ul_model, scene.ll_model))
    second = SecondOrder(loss, list(scene.ll_model.parameters()))
    measured = (scene.validate_data.float() - second.hvp(result.v)).norm().item()
    assert result.status.failed or measured <= 1.001 * result.residual_norm


def test_the_references_agree_with_the_closed_form() -> None:
    for make in (dense, differences):
        scene = system()
        reference = make(scene)
        torch.testing.assert_close(reference.h, scene.train_data, rtol=0, atol=1e-6)
        torch.testing.assert_close(reference.b, scene.validate_data, rtol=0, atol=1e-6)
        torch.testing.assert_close(reference.j, -torch.eye(4, dtype=F64), rtol=0, atol=1e-6)
        torch.testing.assert_close(reference.direct, scene.ul_model.l.detach(), rtol=0, atol=1e-6)
