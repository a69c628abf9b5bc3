import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tests.support.noisy import Worlds, noisy_objective, raising_objective
from tests.support.problems import (
    F64,
    Case,
    Values,
    compute,
    generator,
    indefinite,
    logistic,
    quadratic,
    relative_error,
    retrained_differences,
    ridge,
    singular,
    tiny_mlp,
    train,
)
from tune_implicit.hypergradients.implicit import Implicit
from tune_implicit.hypergradients.settings import SOLVERS
from tune_implicit.hypergradients.solvers.solution import Hvp, Solution, Status
from tune_implicit.hypergradients.state import State

each_solver = pytest.mark.parametrize("solver", SOLVERS)


def ul_objective(s: State) -> Tensor:
    return (s.ll_model.w - 1).square().sum() / 2


def ll_objective(s: State) -> Tensor:
    return (s.ul_model.l.exp() * s.ll_model.w.square()).sum() / 2 - s.ll_model.w.sum()


def values(*entries: float) -> Tensor:
    return torch.tensor(entries, dtype=F64)


def implicit(**changes: object) -> Implicit:
    """Three scalar problems side by side: ``w = exp(-l)``, ``dF/dl = -w (w - 1)``."""
    arguments = {
        "ul_objective": ul_objective,
        "ul_model": Values(l=values(-1, 0, 2)),
        "ll_objective": ll_objective,
        "ll_model": Values(w=values(1, 0, -2).exp()),
        "ll_learning_rate": 0.1,
        "k": 20,
        "solver": "cg",
    }
    return Implicit(**(arguments | changes))


EXPECTED = -values(1, 0, -2).exp() * (values(1, 0, -2).exp() - 1)


# ---- against closed forms, dense solves and the retrained problem


@pytest.mark.parametrize("make", [ridge, logistic], ids=["ridge", "logistic"])
class TestAcceptance:
    def test_conjugate_gradient(self, make: Callable[..., Case]) -> None:
        case = make()
        result = case.compute("cg", k=200)
        assert result.status is Status.CONVERGED
        assert relative_error(result.gradients, case.expected) < 1e-9
        assert result.stationarity < 1e-12

    @pytest.mark.parametrize("k", [0, 5, 100])
    def test_neumann_is_the_series_written_out(self, make: Callable[..., Case], k: int) -> None:
        case = make()
        result = case.compute("neumann", k)
        assert (result.status, result.solver_steps) == (Status.MAX_STEPS, k)
        assert relative_error(result.gradients, case.series(k)) < 1e-12

    def test_float32(self, make: Callable[..., Case]) -> None:
        case = make(dtype=torch.float32)
        result = case.compute("cg", k=100)
        assert not result.status.failed
        assert next(iter(result.gradients.values())).dtype == torch.float32
        assert relative_error(result.gradients, case.expected) < 5e-6

    def test_a_truncated_solve_is_as_inexact_as_it_says(self, make: Callable[..., Case]) -> None:
        case = make()
        result = case.compute("cg", k=10)
        assert result.status is Status.MAX_STEPS
        assert 0 < result.relative_residual < 1
        assert relative_error(result.gradients, case.expected) > 1e-3


@each_solver
@pytest.mark.parametrize("make", [quadratic, singular, lambda: ridge(60, 20)], ids=["quadratic", "singular", "ridge"])
def test_every_solver_gets_the_answer(make: Callable[[], Case], solver: str) -> None:
    case = make()
    result = case.compute(solver, k=3000)
    assert result.status is Status.CONVERGED
    assert relative_error(result.gradients, case.expected) < 1e-9


def test_mlp_matches_differences_of_the_retrained_problem() -> None:
    problem = tiny_mlp()
    train(problem)
    differences = retrained_differences(problem)
    p = problem
    result = compute(Implicit(p.ul_objective, p.ul_model, p.ll_objective, p.ll_model, 0.1, k=100, solver="cg"), p)
    assert result.status is Status.CONVERGED
    assert relative_error(result.gradients, differences) < 1e-6


# ---- what is added to `.grad`


def test_gradients_accumulate_like_backward() -> None:
    one = implicit()
    result = one.compute_gradients(None, None)
    torch.testing.assert_close(result.gradients["l"], EXPECTED)
    torch.testing.assert_close(one.ul_model.l.grad, EXPECTED)
    result.gradients["l"].zero_()
    one.compute_gradients(None, None)
    torch.testing.assert_close(one.ul_model.l.grad, 2 * EXPECTED)


def test_a_batch_may_be_fed_in_pieces() -> None:
    case = ridge(60, 20)
    (x, y), (x_train, y_train) = case.problem.validate_data[0], case.problem.train_data[0]
    pieces, whole = case.implicit("dense"), case.compute("dense")
    case.problem.ul_model.log_l2.grad = None
    for index in (slice(0, 15), slice(15, 30)):
        pieces.compute_gradients(x[index], y[index], train_data=x_train, train_target=y_train)
    torch.testing.assert_close(case.problem.ul_model.log_l2.grad / 2, whole.gradients["log_l2"])


def test_a_failed_solve_adds_nothing_and_says_so() -> None:
    case = indefinite()
    for before in (None, torch.ones(3, dtype=F64)):
        case.problem.ul_model.ul.grad = before
        result = case.compute("cg")
        assert result.status is Status.NEGATIVE_CURVATURE
        assert result.gradients == {}
        assert math.isnan(result.norm)
        assert math.isfinite(result.ul_loss)
        assert case.problem.ul_model.ul.grad is before
    assert torch.equal(before, torch.ones(3, dtype=F64))


@pytest.mark.parametrize("where", ["ul", "ll"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, "gradient"])
def test_non_finite_numbers_are_no_answer(where: str, bad: float | str) -> None:
    good = {"ul": ul_objective, "ll": ll_objective}[where]

    def objective(s: State) -> Tensor:
        # The gradient of the square root is infinite at 0, and infinity times 0 is NaN.
        return good(s) + ((0 * s.ll_model.w).sqrt().sum() if bad == "gradient" else bad)

    one = implicit(**{f"{where}_objective": objective})
    result = one.compute_gradients(None, None)
    assert result.status is Status.NON_FINITE
    assert result.gradients == {}
    assert math.isnan(result.norm)
    assert one.ul_model.l.grad is None


def test_gradient_out_of_range_is_no_answer() -> None:
    # v = 1e30 / 1e-10 is no float32, although the solve itself, which is scaled, converges.
    one = implicit(
        ul_model=Values(l=torch.tensor([1e-10])),
        ll_model=Values(w=torch.tensor([1.0])),
        ul_objective=lambda s: 1e30 * s.ll_model.w.sum(),
        ll_objective=lambda s: (s.ul_model.l * s.ll_model.w.square()).sum() / 2,
    )
    assert one.compute_gradients(None, None).status is Status.NON_FINITE
    assert one.ul_model.l.grad is None


# ---- which parameters take part


def test_direct_term_only_and_implicit_term_only() -> None:
    ul_model = Values(l=values(-1, 0, 2), direct=values(3))
    one = implicit(ul_model=ul_model, ul_objective=lambda s: ul_objective(s) + s.ul_model.direct.square().sum())
    got = one.compute_gradients(None, None).gradients
    torch.testing.assert_close(got, {"l": EXPECTED, "direct": values(6)})


def test_parameter_in_both_terms() -> None:
    one = implicit(ul_objective=lambda s: ul_objective(s) + s.ul_model.l.square().sum())
    got = one.compute_gradients(None, None).gradients["l"]
    torch.testing.assert_close(got, EXPECTED + 2 * values(-1, 0, 2))


@pytest.mark.parametrize("used_in", ["ul", "ll", "neither"])
def test_ll_parameter_that_an_objective_does_not_use(used_in: str) -> None:
    extra = {
        "ul_objective": lambda s: ul_objective(s) + (s.ll_model.extra.sum() if used_in == "ul" else 0),
        "ll_objective": lambda s: ll_objective(s) + (s.ll_model.extra.square().sum() if used_in == "ll" else 0),
    }
    one = implicit(ll_model=Values(w=values(1, 0, -2).exp(), extra=values(5, 6)), **extra)
    result = one.compute_gradients(None, None)
    # Where nothing in the ll problem holds it, it is a constant there.
    assert result.status is Status.CONVERGED
    torch.testing.assert_close(result.gradients["l"], EXPECTED)


def test_ul_parameter_added_to_the_ll_loss_only_has_a_zero_gradient() -> None:
    one = implicit(
        ul_model=Values(l=values(-1, 0, 2), offset=values(1, 2)),
        ll_objective=lambda s: ll_objective(s) + s.ul_model.offset.sum(),
    )
    got = one.compute_gradients(None, None).gradients
    torch.testing.assert_close(got, {"l": EXPECTED, "offset": values(0, 0)})


def test_frozen_parameters_are_constants_at_both_levels() -> None:
    ul_model = Values(l=values(-1, 0, 2), unused=values(1))
    ll_model = Values(w=values(1, 0, -2).exp(), scale=values(2))
    ul_model.unused.requires_grad_(False)
    ll_model.scale.requires_grad_(False)
    scaled = implicit(
        ul_model=ul_model, ll_model=ll_model, ll_objective=lambda s: ll_objective(s) * s.ll_model.scale[0]
    )
    result = scaled.compute_gradients(None, None)
    torch.testing.assert_close(result.gradients, {"l": EXPECTED})
    assert [param.grad is None for param in (ul_model.unused, ll_model.w, ll_model.scale)] == [True] * 3


def test_tied_weights_are_one_parameter() -> None:
    w, log_l2 = values(1, 0, -2).exp(), values(-1, 0, 2)
    ll_model, ul_model = nn.Module(), nn.Module()
    for model, value in ((ll_model, w), (ul_model, log_l2)):
        model.one, model.two = Values(x=value), Values(x=value)
        model.two.x = model.one.x
    one = implicit(
        ul_model=ul_model,
        ll_model=ll_model,
        ul_objective=lambda s: (s.ll_model.one.x - 1).square().sum() / 4 + (s.ll_model.two.x - 1).square().sum() / 4,
        ll_objective=lambda s: (
            ((s.ul_model.one.x / 2 + s.ul_model.two.x / 2).exp() * s.ll_model.one.x * s.ll_model.two.x).sum() / 2
            - s.ll_model.two.x.sum()
        ),
    )
    torch.testing.assert_close(one.compute_gradients(None, None).gradients, {"one.x": EXPECTED})
    torch.testing.assert_close(ul_model.two.x.grad, EXPECTED)


def test_mixed_dtypes() -> None:
    ll_model = Values(w=values(1, 0, -2).exp(), single=torch.tensor([2.0]))
    one = implicit(
        ll_model=ll_model,
        ul_objective=lambda s: ul_objective(s) + s.ll_model.single.sum(),
        ll_objective=lambda s: ll_objective(s) + (s.ll_model.single - s.ul_model.l.sum()).square().sum() / 2,
    )
    torch.testing.assert_close(one.compute_gradients(None, None).gradients["l"], EXPECTED + 1)


# ---- what the objectives see


def test_each_objective_is_evaluated_once_on_its_own_batch() -> None:
    seen = []

    def record(name: str, objective: Callable[[State], Tensor]) -> Callable[[State], Tensor]:
        def recorded(s: State) -> Tensor:
            seen.append((name, s["data"], s["target"], s["ul_model"], s["ll_model"]))
            return objective(s)

        return recorded

    one = implicit(ul_objective=record("ul", ul_objective), ll_objective=record("ll", ll_objective))
    one.compute_gradients("validate", 1, train_data="train", train_target=2)
    assert seen == [("ul", "validate", 1, one.ul_model, one.ll_model), ("ll", "train", 2, one.ul_model, one.ll_model)]


def test_auxiliary_model_takes_the_place_of_the_ll_model() -> None:
    stale = Values(w=values(7, 7, 7))
    one = implicit(ll_model=stale)
    trained = Values(w=values(1, 0, -2).exp())
    torch.testing.assert_close(one.compute_gradients(None, None, trained).gradients["l"], EXPECTED)
    assert stale.w.grad is None
    assert trained.w.grad is None
    with pytest.raises(ValueError, match="share the parameter"):
        one.compute_gradients(None, None, one.ul_model)


def test_the_derivatives_of_each_model_are_looked_at() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, w: Tensor) -> Tensor:
            return w.clone()

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient.clone()

    def objective(state: State) -> Tensor:
        w = state.ll_model.w
        return ll_objective(state) + (Once.apply(w).square().sum() if hasattr(state.ll_model, "once") else 0)

    one, other = implicit(ll_objective=objective), Values(w=values(1, 0, -2))
    one.compute_gradients(None, None)
    other.once = True
    with pytest.raises(ValueError, match="uses Once, whose backward is marked once_differentiable"):
        one.compute_gradients(None, None, other)


@pytest.mark.parametrize("retain", [False, True])
@pytest.mark.parametrize("solver", SOLVERS)
def test_batches_are_averaged_at_both_levels(solver: str, retain: bool) -> None:
    case = logistic()
    (x, y), (x_validate, y_validate) = case.problem.train_data[0], case.problem.validate_data[0]

    def problem_of(**settings: Any) -> Implicit:
        return case.problem.implicit(ll_learning_rate=0.1, k=7, solver=solver, retain_graphs=retain, **settings)

    n = len(x) - len(x) % 3, len(x_validate) - len(x_validate) % 2
    whole = problem_of().compute_gradients(
        x_validate[: n[1]], y_validate[: n[1]], train_data=x[: n[0]], train_target=y[: n[0]]
    )
    batches = [
        list(zip(a[:m].chunk(parts), b[:m].chunk(parts), strict=True))
        for a, b, m, parts in ((x_validate, y_validate, n[1], 2), (x, y, n[0], 3))
    ]
    parts = problem_of().compute_mean_gradients(*batches)
    for name, gradient in parts.gradients.items():
        torch.testing.assert_close(gradient, whole.gradients[name], rtol=1e-8, atol=1e-12)
    assert parts.hvps == 3 * whole.hvps
    for number in ("ul_loss", "ll_loss", "stationarity", "b_norm"):
        assert getattr(parts, number) == pytest.approx(getattr(whole, number))


def test_each_batch_is_drawn_and_run_alike() -> None:
    """Modes, buffers and the random state are put back before each, in whichever order and how often they come."""
    seen = []

    def objective(state: State) -> Tensor:
        seen.append((torch.rand(()).item(), state.ll_model.training))
        state.ll_model.eval()
        return ll_objective(state) + 0 * state.ll_model.w.pow(3).sum()

    one = implicit(ll_objective=objective, ll_model=Values(w=values(1, 0, -2)), retain_graphs=False)
    one.compute_mean_gradients([(None, None)], [(None, None)] * 3)
    assert len(seen) > 6
    assert len(set(seen)) == 1


def test_data_may_be_nested() -> None:
    case = quadratic()
    p = case.problem
    one = Implicit(
        lambda s: p.ul_objective(State(s.data["x"][0], s.target, s.ul_model, s.ll_model)),
        p.ul_model,
        lambda s: p.ll_objective(State(s.data["x"][0], *s.target, s.ul_model, s.ll_model)),
        p.ll_model,
        0.1,
        10,
        solver="cg",
    )
    (x, y), (x_train, y_train) = p.validate_data[0], p.train_data[0]
    result = one.compute_gradients({"x": [x]}, y, train_data={"x": (x_train, None)}, train_target=[y_train])
    assert relative_error(result.gradients, case.expected) < 1e-12


@pytest.mark.parametrize("context", [nullcontext, torch.no_grad])
def test_gradients_may_be_switched_off_outside(context: Callable) -> None:
    with context():
        torch.testing.assert_close(implicit().compute_gradients(None, None).gradients["l"], EXPECTED)


def test_a_user_may_bring_a_solver() -> None:
    class Diagonal:
        def solve(self, hvp: Hvp, b: Tensor, v0: Tensor | None = None) -> Solution:
            return Solution(b / hvp(torch.ones_like(b)), Status.CONVERGED, 1, 0.0)

    result = implicit(solver=Diagonal()).compute_gradients(None, None)
    torch.testing.assert_close(result.gradients["l"], EXPECTED)
    assert result.hvps == 1


def test_dropout_is_the_same_for_a_seed() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1)).to(F64)
    x = torch.randn(6, 3, generator=generator(), dtype=F64)

    def penalised(s: State) -> Tensor:
        w = torch.cat([param.reshape(-1) for param in s.ll_model.parameters()])
        return s.ll_model(s.data).square().mean() + (s.ul_model.l.exp().sum() * w.square()).sum()

    one = implicit(ll_model=model, ul_objective=lambda s: s.ll_model(s.data).sum(), ll_objective=penalised)
    got = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        got.append(one.compute_gradients(x, None, train_data=x).gradients["l"])
    assert torch.equal(got[0], got[2])
    assert not torch.equal(got[0], got[1])


# ---- promise 2: the user's objects come back as they were


@pytest.mark.parametrize(
    "item", ["parameters", "grad", "requires_grad", "mode", "buffers", "the objects", "python", "numpy", "cpu"]
)
@pytest.mark.parametrize("objective", [noisy_objective, raising_objective])
@pytest.mark.parametrize("level", ["ul_objective", "ll_objective"])
def test_user_objects_come_back_as_they_were(level: str, objective: Callable, item: str) -> None:
    worlds = Worlds()
    data = torch.randn(8, 3, dtype=F64)
    objectives = {"ul_objective": noisy_objective, "ll_objective": noisy_objective} | {level: objective}
    one = implicit(ul_model=worlds.ul_model, ll_model=worlds.ll_model, **objectives)
    before = worlds.items()[item]
    try:
        one.compute_gradients(data, None, train_data=data)
    except ZeroDivisionError:
        assert objective is raising_objective
    torch.testing.assert_close(worlds.items()[item], before, rtol=0, atol=0)


def test_no_graph_is_left_behind() -> None:
    one = implicit()
    result = one.compute_gradients(None, None)
    assert not result.gradients["l"].requires_grad
    assert not one.ul_model.l.grad.requires_grad


# ---- messages


@pytest.mark.parametrize("name", ["validate_data", "validate_target", "train_data", "train_target"])
def test_message_of_a_batch_on_another_device(name: str) -> None:
    batches = {"validate_data": None, "validate_target": None} | {name: {"x": [torch.ones(1, device="meta")]}}
    split = name.split("_")[0]
    with pytest.raises(ValueError, match=f"`{split}_data` .* models' device, cpu, got a tensor on meta. Move the"):
        implicit().compute_gradients(**batches)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ul_objective": 1}, TypeError, "`ul_objective` must be callable, got int"),
        ({"ll_objective": None}, TypeError, "`ll_objective` must be callable, got NoneType"),
        ({"ll_learning_rate": 0.0}, ValueError, "`ll_learning_rate` must be positive and finite, got 0.0"),
        ({"ll_learning_rate": math.nan}, ValueError, "`ll_learning_rate` must be positive and finite, got nan"),
        ({"k": -1}, ValueError, "`k` must be 0 or more, got -1"),
        ({"k": 2.5}, TypeError, "`k` must be an integer, got 2.5"),
        ({"tolerance": -1.0}, ValueError, "`tolerance` must be 0 or more"),
        ({"rtol": -1.0}, ValueError, "`rtol` must be 0 or more"),
        ({"solver": "newton"}, ValueError, "`solver` must be one of cg, minres, neumann, dense"),
        ({"solver": 3}, TypeError, "`solver` must be one of .* an object with `solve"),
    ],
)
def test_messages_of_the_constructor(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        implicit(**change)
