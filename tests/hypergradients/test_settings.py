import dataclasses
import math

import pytest

from tune_implicit.hypergradients.settings import SOLVERS, SolverSettings, relevant
from tune_implicit.hypergradients.solvers.conjugate_gradient import ConjugateGradient
from tune_implicit.hypergradients.solvers.dense import DenseSolve
from tune_implicit.hypergradients.solvers.fallback import Damped
from tune_implicit.hypergradients.solvers.minres import Minres
from tune_implicit.hypergradients.solvers.neumann import NeumannSeries


def test_make_solver() -> None:
    stopping = (3, 1e-3, 1e-2)
    expected = [
        ConjugateGradient(*stopping),
        Minres(*stopping),
        NeumannSeries(0.5, *stopping),
        DenseSolve(5000, 1e-3, 1e-2),
    ]
    settings = SolverSettings(ll_learning_rate=0.5, k=3, tolerance=1e-3, rtol=1e-2)
    assert [dataclasses.replace(settings, solver=name).make_solver() for name in SOLVERS] == expected
    assert dataclasses.replace(settings, solver=expected[0]).make_solver() is expected[0]


@pytest.mark.parametrize("name", SOLVERS)
def test_fallback_goes_from_the_solver_to_the_identity(name: str) -> None:
    settings = SolverSettings(solver=name, ll_learning_rate=0.5, k=3, tolerance=1e-3, rtol=1e-2, fallback=True)
    chain = settings.make_solver().solvers
    assert list(chain) == [name, *(other for other in ("minres", "damped", "identity") if other != name)]
    assert chain["damped"] == Damped(ConjugateGradient(3, 1e-3, 1e-2))
    assert chain["identity"] == NeumannSeries(0.5, 0)


def test_noise_is_a_tolerance() -> None:
    assert SolverSettings(solver="cg").make_solver(noise=0.1).tolerance == 0.1
    assert SolverSettings(solver="cg", tolerance=0.5).make_solver(noise=0.1).tolerance == 0.5


# ---- messages


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ll_learning_rate": 0.0}, ValueError, "`ll_learning_rate` must be positive and finite, got 0.0"),
        ({"ll_learning_rate": math.inf}, ValueError, "`ll_learning_rate` must be positive and finite, got inf"),
        ({"ll_learning_rate": "1"}, TypeError, "`ll_learning_rate` must be a number, got '1'"),
        ({"step_size": "fast"}, ValueError, "`step_size` must be positive and finite, or \"auto\", got 'fast'"),
        ({"step_size": True}, TypeError, '`step_size` must be positive and finite, or "auto", got True'),
        ({"step_size": -1.0}, ValueError, '`step_size` must be positive and finite, or "auto", got -1.0'),
        ({"step_size": math.nan}, ValueError, '`step_size` must be positive and finite, or "auto", got nan'),
        ({"k": -1}, ValueError, "`k` must be 0 or more, got -1"),
        ({"k": 1.5}, TypeError, "`k` must be an integer, got 1.5"),
        ({"tolerance": math.nan}, ValueError, "`tolerance` must be 0 or more, got nan"),
        ({"rtol": -1.0}, ValueError, "`rtol` must be 0 or more, got -1.0"),
        ({"damping": -0.1}, ValueError, "`damping` must be 0 or more and finite, got -0.1"),
        ({"damping": math.inf}, ValueError, "`damping` must be 0 or more and finite, got inf"),
        ({"damping": math.nan}, ValueError, "`damping` must be 0 or more and finite, got nan"),
        ({"damping": None}, TypeError, "`damping` must be a number, got None"),
        ({"preconditioner_memory": 2.5}, TypeError, "`preconditioner_memory` must be an integer, got 2.5"),
        ({"preconditioner_memory": -1}, ValueError, "`preconditioner_memory` must .*, got -1"),
        (
            {"solver": "minres", "preconditioner_memory": 3},
            ValueError,
            "`preconditioner_memory` is for `solver=\"cg\"`, got 'minres'. Pass 0, or that solver",
        ),
        (
            {"solver": NeumannSeries(0.1, 5), "preconditioner_memory": 3},
            ValueError,
            '`preconditioner_memory` is for `solver="cg"`, got NeumannSeries',
        ),
        ({"stop": "early"}, ValueError, "`stop` must be one of tolerance, noise, got 'early'"),
        (
            {"solver": ConjugateGradient(5), "stop": "noise"},
            ValueError,
            '`stop="noise"` sets the tolerance of a solver given by its name, got Conj',
        ),
        ({"solver": "newton"}, ValueError, "`solver` must be one of cg, minres, neumann, dense, or an object"),
        ({"solver": ConjugateGradient}, TypeError, "`solver` must be one of .* an object with `solve"),
        ({"solver": 3}, TypeError, "`solver` must be one of .* an object with `solve"),
    ],
)
def test_messages(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SolverSettings(**change)


@pytest.mark.parametrize("name", ["warm_start", "fallback", "verify"])
def test_message_of_what_is_neither_true_nor_false(name: str) -> None:
    with pytest.raises(TypeError, match=f"`{name}` must be True or False, got 'no'"):
        SolverSettings(**{name: "no"})


def test_a_solve_stops_at_the_largest_of_its_tolerances() -> None:
    settings = SolverSettings(tolerance=1e-3, rtol=0.1)
    assert settings.stops_at(b_norm=1.0) == 0.1
    assert settings.stops_at(b_norm=1e-3) == 1e-3
    assert settings.stops_at(b_norm=1.0, noise=0.5) == 0.5


def test_a_solver_object_stops_at_a_tolerance_of_its_own() -> None:
    assert SolverSettings(solver=ConjugateGradient(5)).stops_at(b_norm=1.0) == math.inf


def test_what_is_for_another_solver_is_not_relevant() -> None:
    assert relevant({"solver": "minres", "preconditioner_memory": 4})["preconditioner_memory"] == 0
    assert relevant({"solver": "cg", "preconditioner_memory": 4})["preconditioner_memory"] == 4
