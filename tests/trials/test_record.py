import math
from dataclasses import replace

import pytest
import torch

from tests.support import toy
from tests.support.problems import F64, quadratic, ridge
from tests.support.working import finish
from tune_implicit.hypergradients.solvers.solution import Status
from tune_implicit.trials.record import (
    CERTIFICATE,
    COUNTERS,
    LEARNING,
    LL_RATE,
    LOSSES,
    RESERVED,
    STATE,
    certificate,
    check_metric,
    finite,
)
from tune_implicit.trials.settings import ImplicitSettings
from tune_implicit.trials.trainer import BilevelTrainer
from tune_implicit.trials.trial import Trial

CONFIG = {"ul_steps": 5, "ul_steps_per_report": 2, "solver": "cg", "k": 20}


def test_design_names_of_the_metrics_are_reserved() -> None:
    design = "select_loss validate_loss train_loss hypergradient_norm residual_norm relative_residual solver_steps"
    design += " solver_status skipped_ul_steps hvps gradient_evaluations ul_step ll_step completed"
    assert set(design.split()) <= RESERVED


def test_every_name_of_a_record_is_reserved_and_stands_once() -> None:
    names = [*LOSSES, *CERTIFICATE, *COUNTERS, *LEARNING, *STATE, LL_RATE]
    assert len(set(names)) == len(names)
    assert set(names) == RESERVED


def test_what_a_trainer_counts_is_an_attribute_of_it() -> None:
    trainer = BilevelTrainer(quadratic().problem, ImplicitSettings())
    assert [getattr(trainer, name) for name in COUNTERS] == [0] * len(COUNTERS)


def test_a_certificate_is_what_the_hypergradient_says_of_itself() -> None:
    hypergradient = ridge(n=40, d=5).compute("minres", k=3, stop="noise", damping=0.5)
    record = certificate(hypergradient)
    assert set(record) == set(CERTIFICATE)
    for name, value in record.items():
        said = getattr(hypergradient, CERTIFICATE[name])
        assert value == (said.value if name == "solver_status" else said)


def test_of_no_hypergradient_there_is_no_certificate() -> None:
    assert certificate(None) == {}


def test_what_has_no_finite_value_is_left_out_of_a_certificate() -> None:
    hypergradient = quadratic().compute("cg", k=3)
    assert "noise_norm" not in certificate(hypergradient)
    failed = replace(
        hypergradient,
        solution=replace(hypergradient.solution, status=Status.NON_FINITE, residual_norm=math.inf),
        norm=math.nan,
    )
    lost = certificate(hypergradient).keys() - certificate(failed).keys()
    assert lost == {"hypergradient_norm", "residual_norm", "relative_residual"}
    assert certificate(failed)["solver_status"] == "non_finite"


# ---- what the record of a trial says of its solves


def test_record_tells_how_the_solve_went() -> None:
    record = finish(Trial(toy.problem, {**CONFIG, "damping": 0.1, "stop": "noise", "ll_steps": 50}))
    assert record["damping"] == 0.1
    assert record["noise_norm"] > 0
    assert (record["solver_used"], record["solver_status"]) == ("cg", "converged")
    assert (record["fallback_ul_steps"], record["skipped_ul_steps"]) == (0, 0)
    assert record["residual_norm"] < record["noise_norm"]
    assert not any(isinstance(value, float) and math.isnan(value) for value in record.values())


def test_record_tells_the_curvatures_that_the_solve_met() -> None:
    trial = Trial(toy.problem, CONFIG)
    record = finish(trial)
    ((x, _),) = trial.problem.train_data
    ones = torch.cat([x, torch.ones(8, 1, dtype=F64)], 1)
    # The ul value has moved since the solve, by less than a learning rate.
    l2 = trial.problem.ul_model.log_l2.exp().item() * torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0], dtype=F64)
    values = torch.linalg.eigvalsh(2 * ones.T @ ones / 8 + 2 * l2.diag())
    assert 0.9 * values[0] < record["lambda_min"] < record["lambda_max"] < 1.1 * values[-1]


@pytest.mark.parametrize("on_failure", ["skip", "fallback"])
@pytest.mark.parametrize("solver", ["cg", "minres", "neumann", "dense"])
def test_record_of_a_saddle_has_no_nan(solver: str, on_failure: str) -> None:
    config = {**CONFIG, "solver": solver, "on_failure": on_failure, "fault": "indefinite", "ll_steps": 0}
    record = finish(Trial(toy.problem, config))
    assert not any(isinstance(value, float) and not math.isfinite(value) for value in record.values())
    failing = solver in ("cg", "neumann")
    assert record["solver_used"] == ("minres" if failing and on_failure == "fallback" else solver)
    assert record["fallback_ul_steps"] == (5 if failing and on_failure == "fallback" else 0)
    assert record["skipped_ul_steps"] == (5 if failing and on_failure == "skip" else 0)


# ---- what trials are compared by


def test_numbers_that_are_not_finite_are_left_out() -> None:
    record = {"a": 1.0, "b": math.nan, "c": -math.inf, "d": "text", "e": 3, "f": True}
    assert finite(record) == {"a": 1.0, "d": "text", "e": 3, "f": True}


def test_metric_may_be_the_largest_or_the_least_one() -> None:
    check_metric("accuracy", "max")
    check_metric("accuracy", "min")
    check_metric("select_loss", "min")


@pytest.mark.parametrize("mode", ["maximize", "", None])
def test_message_of_a_mode_that_is_none(mode: object) -> None:
    with pytest.raises(ValueError, match=rf'^`mode` must be "min" or "max", got {mode!r}\.$'):
        check_metric("accuracy", mode)


@pytest.mark.parametrize("metric", LOSSES)
def test_message_of_the_largest_loss(metric: str) -> None:
    with pytest.raises(ValueError, match=rf"^`metric` '{metric}' is a loss, .*largest: take mode=.min. .*`metrics`"):
        check_metric(metric, "max")
