import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from tests.support.noisy import LogL2, assert_same_bits, random_problem
from tests.support.problems import F64, Values, generator, quadratic, tiny_mlp
from tests.support.systems import saved_and_loaded
from tune_implicit.errors import CheckpointError, DivergedError, SolveError
from tune_implicit.hypergradients.rng import seed_everything
from tune_implicit.hypergradients.solvers.solution import Status
from tune_implicit.hypergradients.state import State
from tune_implicit.trials.checkpoint import FORMAT_VERSION
from tune_implicit.trials.problem import BilevelProblem
from tune_implicit.trials.record import COUNTERS, LEARNING
from tune_implicit.trials.settings import ImplicitSettings
from tune_implicit.trials.trainer import BilevelTrainer

SETTINGS = ImplicitSettings(ll_steps=3, k=3, warmup_ll_steps=2, ul_learning_rate=0.1)

# A constant rate, and the series with the ll model's own.
CONSTANT = replace(SETTINGS, adapt_ul_learning_rate=False, solver="neumann", step_size=None, on_failure="skip")

# All that a trial has to remember from one step to the next.
EVERYTHING = replace(SETTINGS, ll_steps="auto", min_ll_steps=2, max_ll_steps=9, ul_batches=2)


def make_trainer(settings: ImplicitSettings = EVERYTHING, **options: float) -> BilevelTrainer:
    seed_everything(0)
    return BilevelTrainer(random_problem(**options), settings)


STEPS, SAVED_AFTER = 7, (0, 2, 5)


def go_on(folder: Path) -> None:
    """What the other process runs: load, take the steps that are left, save."""
    torch.set_num_threads(1)
    for saved_after in SAVED_AFTER:
        trainer = make_trainer()
        torch.randn(17)  # its random state is elsewhere
        trainer.load_state_dict(torch.load(folder / f"from_{saved_after}.pt", weights_only=True))
        for _ in range(STEPS - saved_after):
            trainer.step()
        torch.save(trainer.state_dict(), folder / f"to_{saved_after}.pt")


def test_resume_in_a_new_process_ends_in_the_same_bits(tmp_path: Path) -> None:
    trainer = make_trainer()
    for step in range(STEPS):
        if step in SAVED_AFTER:
            torch.save(trainer.state_dict(), tmp_path / f"from_{step}.pt")
        trainer.step()
    code = f"from pathlib import Path; from {__name__} import go_on; go_on(Path({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
    for saved_after in SAVED_AFTER:
        assert_same_bits(torch.load(tmp_path / f"to_{saved_after}.pt", weights_only=True), trainer.state_dict())


def seen_in_a_step(trainer: BilevelTrainer) -> list[object]:
    step = trainer.step()
    of_trainer = [getattr(trainer, name) for name in (*COUNTERS, *LEARNING)]
    return [step.train_loss, step.hypergradient.v, step.hypergradient.norm, *of_trainer]


def test_resumed_trainer_sees_the_same_at_every_step() -> None:
    trainer = make_trainer()
    for _ in range(3):
        trainer.step()
    saved = saved_and_loaded(trainer.state_dict())
    expected = [seen_in_a_step(trainer) for _ in range(4)]
    end = saved_and_loaded(trainer.state_dict())
    resumed = make_trainer()
    resumed.step()
    resumed.load_state_dict(saved)
    assert_same_bits([seen_in_a_step(resumed) for _ in range(4)], expected)
    assert_same_bits(resumed.state_dict(), end)
    assert trainer.ul_rate != EVERYTHING.ul_learning_rate  # it has adapted
    assert trainer.ll_step > EVERYTHING.warmup_ll_steps + 7 * EVERYTHING.min_ll_steps  # and taken more ll steps


def test_state_of_another_trial_keeps_own_settings() -> None:
    """The trap of population-based training: ``optimizer.load_state_dict`` brings back the donor's options."""
    donor = make_trainer(CONSTANT, weight_decay=0.3)
    donor.step()
    own = replace(CONSTANT, ll_learning_rate=0.002, ul_learning_rate=0.03, k=7, tolerance=1e-3)
    trainer = make_trainer(own, weight_decay=0.01)
    trainer.load_state_dict(donor.state_dict())
    (ll_group,), (ul_group,) = (one._scheduled.optimizer.param_groups for one in (trainer.levels[0], trainer))
    assert (ll_group["lr"], ll_group["weight_decay"], ul_group["lr"]) == (0.002, 0.01, 0.03)
    solver = trainer.levels[0]._implicit._inverse_hvp._settings.make_solver()
    assert (solver.k, solver.tolerance, solver.step_size) == (7, 1e-3, 0.002)
    # What it takes over: weights, counters, and the optimizer's memory of past gradients.
    assert_same_bits(trainer.problem.ll_model.state_dict(), donor.problem.ll_model.state_dict())
    assert trainer.ul_step == 1
    assert_same_bits(
        trainer.levels[0]._scheduled.optimizer.state_dict()["state"],
        donor.levels[0]._scheduled.optimizer.state_dict()["state"],
    )
    trainer.step()
    assert (ll_group["lr"], ul_group["lr"]) == (0.002, 0.03)


def test_rate_of_another_trial_is_a_factor_of_ones_own() -> None:
    problem = random_problem()
    problem.ul_model.log_l2.data.fill_(2.0)  # it starts elsewhere
    donor, own = make_trainer(), BilevelTrainer(problem, replace(EVERYTHING, ul_learning_rate=0.03))
    for _ in range(4):
        donor.step()
    factor = donor.ul_rate / 0.1
    assert factor != pytest.approx(1.0)
    own.load_state_dict(saved_and_loaded(donor.state_dict()))
    assert own.ul_rate == pytest.approx(0.03 * factor)
    assert own._scheduled.optimizer.param_groups[0]["lr"] == own.ul_rate
    assert own.ul_moved == pytest.approx(donor.ul_moved)
    own.step()
    assert own._scheduled.optimizer.param_groups[0]["lr"] == own.ul_rate


def test_constant_rate_is_not_changed_by_another_trials() -> None:
    donor = make_trainer()
    own = make_trainer(replace(EVERYTHING, ul_learning_rate=0.03, adapt_ul_learning_rate=False))
    for _ in range(4):
        donor.step()
    own.load_state_dict(donor.state_dict())
    own.step()
    assert own.ul_rate == own._scheduled.optimizer.param_groups[0]["lr"] == 0.03


def test_options_that_an_optimizer_changes_itself_survive_a_resume() -> None:
    trainer = make_trainer()
    trainer.levels[0]._scheduled.optimizer.param_groups[0]["lr"] = 0.5
    resumed = make_trainer()
    resumed.load_state_dict(trainer.state_dict())
    assert resumed.levels[0]._scheduled.optimizer.param_groups[0]["lr"] == 0.5


def test_trainer_finds_the_best_ul_values() -> None:
    """At the end the whole derivative of ``F(w*(l), l)`` vanishes, at the minimum that linear algebra gives."""
    case = quadratic()
    problem = replace(case.problem, ll_optimizer=torch.optim.SGD)
    trainer = BilevelTrainer(
        problem, ImplicitSettings(solver="cg", k=4, ll_steps=30, ll_learning_rate=0.3, ul_learning_rate=0.1)
    )
    norms = [trainer.step().hypergradient.norm for _ in range(80)]
    assert norms[-1] < 1e-4 * norms[0]


@pytest.mark.parametrize("policy", ["skip", "raise"])
def test_failed_solve(policy: str) -> None:
    # The step size is also that of the Neumann series, far above 2 / lambda_max = 0.5.
    settings = ImplicitSettings(ll_learning_rate=3.0, ll_steps=0, solver="neumann", step_size=None, on_failure=policy)
    trainer = BilevelTrainer(quadratic().problem, settings)
    before = trainer.problem.ul_model.ul.clone()
    if policy == "raise":
        with pytest.raises(SolveError, match=r"solve at ul step 1 ended as diverged after .* relative residual"):
            trainer.step()
    else:
        assert trainer.step().hypergradient.status is Status.DIVERGED
        assert (trainer.skipped_ul_steps, trainer.ul_step) == (1, 1)
        assert torch.equal(trainer.problem.ul_model.ul, before)


def test_project_constrains_the_ul_values() -> None:
    def project(ul_model: nn.Module) -> None:
        ul_model.log_l2.clamp_(max=-4.0)

    problem = tiny_mlp()
    assert (problem.ul_model.log_l2 > -4).any()
    trainer = BilevelTrainer(replace(problem, project=project), ImplicitSettings(k=2))
    trainer.step()
    assert (problem.ul_model.log_l2 <= -4).all()


def test_without_ul_learning_rate_only_the_ll_model_trains() -> None:
    trainer = make_trainer(replace(SETTINGS, ul_learning_rate=0.0))
    before = trainer.problem.ul_model.log_l2.item()
    assert trainer.step().hypergradient is None
    assert (trainer.problem.ul_model.log_l2.item(), trainer.ll_step, trainer.hvps) == (before, 5, 0)


def test_costs_are_counted() -> None:
    trainer = make_trainer(SETTINGS)
    hypergradient = trainer.step().hypergradient
    assert trainer.ll_step == 5  # 2 of warm-up
    assert trainer.hvps == hypergradient.hvps == 3
    assert trainer.gradient_evaluations == 5 + 2 + 2 * 3 + 2
    assert trainer.step().hypergradient.hvps == 4  # the warm start


def test_ll_steps_leave_the_ul_gradient_alone() -> None:
    trainer = make_trainer()
    trainer.train_ll(2)
    assert trainer.problem.ul_model.log_l2.grad is None


def test_optimizer_that_evaluates_the_loss_several_times() -> None:
    problem = replace(tiny_mlp(), ll_optimizer=lambda params, lr: torch.optim.LBFGS(params, lr=lr, max_iter=4))
    trainer = BilevelTrainer(problem, ImplicitSettings(ll_learning_rate=0.5, ll_steps=2, k=2))
    losses = [trainer.step().train_loss for _ in range(3)]
    assert losses[-1] < losses[0]
    assert trainer.gradient_evaluations > trainer.ll_step + 3 * (2 + 2 * 3 + 2)


def test_divergence_names_the_steps_and_the_learning_rate() -> None:
    settings = ImplicitSettings(ll_learning_rate=1e8, ll_steps=40)
    problem = replace(quadratic().problem, ll_optimizer=torch.optim.SGD)
    with pytest.raises(DivergedError, match=r"within ll steps 1 to 40, with ll_learning_rate=1e\+08"):
        BilevelTrainer(problem, settings).step()


@pytest.mark.parametrize(
    ("state", "message"),
    [({"format_version": 99}, f"format version {FORMAT_VERSION}, got 99"), ([], "got list")],
)
def test_state_of_another_format(state: object, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        make_trainer().load_state_dict(state)


def test_state_of_other_shapes() -> None:
    other = BilevelTrainer(tiny_mlp(), SETTINGS)
    with pytest.raises(CheckpointError, match=r"(?s)does not fit this problem.*such as its width"):
        make_trainer().load_state_dict(other.state_dict())


def test_batches_are_moved_to_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a second device at hand: every batch passes through the one function that moves it."""
    seen = []
    monkeypatch.setattr("tune_implicit.trials.lower_level.moved", lambda nested, device: seen.append(device) or nested)
    make_trainer(SETTINGS).step()
    assert seen == [torch.device("cpu")] * 7


def test_scalar_ul_value_reaches_the_best_on_a_regression() -> None:
    """One L2 value, learned from 0: its validation loss ends no higher than at any value of a fine grid."""
    x, x_validate = (torch.randn(30, 20, generator=generator(seed), dtype=torch.float64) for seed in (0, 1))
    truth = torch.randn(20, 1, generator=generator(2), dtype=torch.float64)
    y, y_validate = x @ truth + 3 * torch.randn(30, 1, generator=generator(3), dtype=torch.float64), x_validate @ truth

    def best_response(l2: float) -> Tensor:
        return torch.linalg.solve(x.T @ x / 30 + l2 * torch.eye(20, dtype=torch.float64), x.T @ y / 30)

    model, ul = nn.Linear(20, 1, bias=False).double(), LogL2().double()
    problem = BilevelProblem(
        ul_model=ul,
        ll_model=model,
        ul_objective=lambda s: mse_loss(s.ll_model(s.data), s.target),
        ll_objective=lambda s: (
            mse_loss(s.ll_model(s.data), s.target) + s.ul_model.log_l2.exp() * s.ll_model.weight.square().sum()
        ),
        train_data=[(x, y)],
        validate_data=[(x_validate, y_validate)],
    )
    trainer = BilevelTrainer(
        problem, ImplicitSettings(solver="cg", k=20, ll_steps=30, ll_learning_rate=0.05, ul_learning_rate=0.05)
    )
    for _ in range(80):
        trainer.step()
    grid = [mse_loss(x_validate @ best_response(l2), y_validate).item() for l2 in torch.logspace(-3, 2, 400).tolist()]
    learned = mse_loss(x_validate @ best_response(ul.log_l2.exp().item()), y_validate).item()
    assert learned < 1.001 * min(grid)


# ---- what a solve leaves to the next

# No solve of the random problem fails.
DAMPED = replace(SETTINGS, damping=5.0, on_failure="skip")
REMEMBERING = {
    "neumann": replace(DAMPED, solver="neumann", step_size=None),
    "auto": replace(DAMPED, solver="neumann", step_size="auto"),
    "preconditioned": replace(DAMPED, solver="cg", preconditioner_memory=8),
    "small memory": replace(DAMPED, solver="cg", preconditioner_memory=2),
    "cold": replace(DAMPED, solver="cg", warm_start=False),
    "minres": replace(DAMPED, solver="minres"),
    "noise": replace(DAMPED, solver="cg", stop="noise", verify=True),
}


def test_warm_start_is_the_default() -> None:
    trainer = make_trainer(REMEMBERING["neumann"])
    assert trainer.state_dict()["levels"][0]["implicit"]["v"] is None
    hypergradient = trainer.step().hypergradient
    assert torch.equal(trainer.state_dict()["levels"][0]["implicit"]["v"], hypergradient.v)
    assert hypergradient.hvps == 3
    assert trainer.step().hypergradient.hvps == 3 + 1


def test_without_a_warm_start_each_solve_costs_the_same() -> None:
    trainer = make_trainer(REMEMBERING["cold"])
    assert [trainer.step().hypergradient.hvps for _ in range(3)] == [3, 3, 3]


@pytest.mark.parametrize("settings", REMEMBERING.values(), ids=REMEMBERING)
def test_what_a_solve_remembers_is_part_of_the_state(settings: ImplicitSettings) -> None:
    trainer = make_trainer(settings)
    for _ in range(3):
        assert not trainer.step().hypergradient.status.failed
    saved = saved_and_loaded(trainer.state_dict())
    expected = [trainer.step().hypergradient for _ in range(3)]
    resumed = make_trainer(settings)
    resumed.load_state_dict(saved)
    for one in expected:
        got = resumed.step().hypergradient
        assert torch.equal(got.v, one.v)
        assert (got.status, got.hvps, got.residual_norm) == (one.status, one.hvps, one.residual_norm)
    assert_same_bits(resumed.state_dict(), trainer.state_dict())


def test_state_holds_what_its_solver_learns() -> None:
    for name, empty in {
        "neumann": {"top": True, "preconditioner": True},
        "auto": {"top": False, "preconditioner": True},
        "preconditioned": {"top": True, "preconditioner": False},
    }.items():
        trainer = make_trainer(REMEMBERING[name])
        trainer.step()
        state = trainer.state_dict()["levels"][0]["implicit"]
        assert {key: not (isinstance(state[key], Tensor) or state[key]) for key in empty} == empty


@pytest.mark.parametrize("donor", REMEMBERING.values(), ids=REMEMBERING)
@pytest.mark.parametrize("own", REMEMBERING.values(), ids=REMEMBERING)
def test_state_of_another_solver_loads(own: ImplicitSettings, donor: ImplicitSettings) -> None:
    source, trainer = make_trainer(donor), make_trainer(own)
    for _ in range(2):
        source.step()
    trainer.load_state_dict(saved_and_loaded(source.state_dict()))
    assert not trainer.step().hypergradient.status.failed
    pairs = trainer.state_dict()["levels"][0]["implicit"]["preconditioner"]
    assert (pairs is not None) == (own.preconditioner_memory > 0)
    if pairs is not None:
        assert len(pairs["s"]) <= own.preconditioner_memory


# ---- failed solves


def failing_trainer(batches: str = "bad", steps: int = 0, **settings: object) -> BilevelTrainer:
    """Conjugate gradient on the training batches named, of which a bad one has a negative Hessian."""
    case = quadratic()
    h, c = case.problem.train_data[0]
    data = [(-h, c) if name == "bad" else (h, c) for name in batches.split()]
    settings = {"solver": "cg", "ll_steps": 0, "warm_start": False, "on_failure": "skip"} | settings
    trainer = BilevelTrainer(replace(case.problem, train_data=data), ImplicitSettings(**settings))
    for _ in range(steps):
        trainer.step()
    return trainer


def test_fallback_answers_and_is_counted() -> None:
    trainer = failing_trainer("bad good", on_failure="fallback")
    before = trainer.problem.ul_model.ul.clone()
    hypergradient = trainer.step().hypergradient
    assert [(attempt.solver, attempt.status) for attempt in hypergradient.attempts] == [
        ("cg", Status.NEGATIVE_CURVATURE),
        ("minres", Status.CONVERGED),
    ]
    assert not torch.equal(trainer.problem.ul_model.ul, before)
    assert len(trainer.step().hypergradient.attempts) == 1
    assert (trainer.fallback_ul_steps, trainer.skipped_ul_steps, trainer.ul_step) == (1, 0, 2)


def test_without_fallback_no_other_solver_is_tried() -> None:
    trainer = failing_trainer()
    assert trainer.step().hypergradient.attempts == ()
    assert (trainer.fallback_ul_steps, trainer.skipped_ul_steps) == (0, 1)


def test_where_all_solvers_fail_the_step_is_skipped_and_told(caplog: pytest.LogCaptureFixture) -> None:
    problem = quadratic().problem
    problem = replace(problem, train_data=[(torch.nan * h, c) for h, c in problem.train_data])
    trainer = BilevelTrainer(problem, ImplicitSettings(solver="cg", ll_steps=0, on_failure="fallback"))
    with caplog.at_level("DEBUG", "tune_implicit.trials.trainer"):
        trainer.step()
    assert (trainer.fallback_ul_steps, trainer.skipped_ul_steps) == (0, 1)
    assert "Tried: cg non_finite." in caplog.text


def test_stop_ends_the_trial_after_so_many_in_a_row() -> None:
    trainer = failing_trainer(on_failure="stop", failures_to_stop=3, steps=2)
    assert trainer.skipped_ul_steps == 2
    with pytest.raises(SolveError, match=r"ul step 3 ended as negative_curv.* add `damping`.*failed solve 3 in a row"):
        trainer.step()
    assert trainer.skipped_ul_steps == 3


def test_stop_says_which_step_size_would_do() -> None:
    series = {"solver": "neumann", "step_size": None, "ll_learning_rate": 3.0}
    settings = ImplicitSettings(**series, ll_steps=0, on_failure="stop", failures_to_stop=1)
    trainer = BilevelTrainer(quadratic().problem, settings)
    with pytest.raises(SolveError, match=r"largest eigenvalue .* at least .* must be below .* failed solve 1 in a row"):
        trainer.step()


def test_a_good_solve_starts_the_count_anew() -> None:
    trainer = failing_trainer("bad bad good", on_failure="stop", failures_to_stop=3, steps=9)
    assert trainer.skipped_ul_steps == 6


def test_the_count_survives_a_resume() -> None:
    settings = {"on_failure": "stop", "failures_to_stop": 3}
    trainer = failing_trainer(**settings, steps=2)
    resumed = failing_trainer(**settings)
    resumed.load_state_dict(saved_and_loaded(trainer.state_dict()))
    with pytest.raises(SolveError, match="failed solve 3 in a row"):
        resumed.step()


def test_a_state_after_too_many_failures_stops_a_stricter_trainer() -> None:
    resumed = failing_trainer(on_failure="stop", failures_to_stop=2)
    resumed.load_state_dict(failing_trainer(steps=4).state_dict())
    with pytest.raises(SolveError, match="failed solve 5 in a row"):
        resumed.step()


@pytest.mark.parametrize(
    ("batches", "settings", "status", "reason"),
    [
        ("bad", {}, Status.NEGATIVE_CURVATURE, "direction of negative curvature"),
        ("bad", {"solver": "neumann"}, Status.NEGATIVE_CURVATURE, "direction of negative curvature"),
        ("good", {"solver": "neumann", "step_size": 3.0}, Status.DIVERGED, "a step size must be below"),
    ],
)
def test_a_skipped_step_is_logged_with_its_reason(
    batches: str, settings: dict, status: Status, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("DEBUG", "tune_implicit.trials.trainer"):
        failing_trainer(batches, **settings, steps=1)
    assert f"ul step 1 ended as {status.value} after" in caplog.text
    assert reason in caplog.text
    assert "The ul step is skipped." in caplog.text


def test_the_reason_leads_to_a_solve_that_works() -> None:
    bad = failing_trainer(steps=1)
    assert bad.skipped_ul_steps == 1
    for change in ({"damping": 5.0}, {"solver": "minres"}, {"on_failure": "fallback"}):
        assert failing_trainer(**change, steps=1).skipped_ul_steps == 0


@pytest.mark.parametrize(
    "change", [{}, {"stop": "noise"}, {"verify": True}, {"step_size": "auto", "solver": "neumann"}], ids=str
)
def test_costs_of_the_options_are_counted(change: dict) -> None:
    trainer = make_trainer(replace(REMEMBERING["cold"], ll_steps=0, warmup_ll_steps=0, **change))
    hypergradient = trainer.step().hypergradient
    assert trainer.hvps == hypergradient.hvps
    assert trainer.gradient_evaluations == 2 + 2 * hypergradient.hvps + 2 + (change == {"stop": "noise"})
    extra = {"verify": 1, "step_size": 10}.get(next(iter(change), ""), 0)
    assert hypergradient.hvps == hypergradient.solver_steps + extra


# ---- how many ll steps


def followed(steps: int, ll_learning_rate: float = 0.3, **settings: object) -> tuple[BilevelTrainer, list[int]]:
    """Plain gradient descent at both levels of the quadratic, and the ll steps before each of its ul steps."""
    problem = replace(quadratic().problem, ll_optimizer=torch.optim.SGD, ul_optimizer=torch.optim.SGD)
    of_a_trial = {"min_ll_steps": 3, "max_ll_steps": 40, "solver": "dense", "adapt_ul_learning_rate": False}
    settings = of_a_trial | {"ul_learning_rate": 0.01, "ll_learning_rate": ll_learning_rate} | settings
    trainer = BilevelTrainer(problem, ImplicitSettings(**settings))
    taken = []
    for _ in range(steps):
        before = trainer.ll_step
        trainer.step()
        taken.append(trainer.ll_step - before)
    return trainer, taken


def test_ll_steps_are_the_least_where_nothing_was_disturbed() -> None:
    assert followed(4, ul_learning_rate=0.0)[1] == [3] * 4
    trainer, taken = followed(4, solver="cg", damping=0.0, on_failure="skip", ll_steps="auto", k=0)
    assert (trainer.skipped_ul_steps, taken) == (4, [3] * 4)


def test_ul_step_that_is_skipped_disturbs_nothing() -> None:
    problem = replace(quadratic().problem, ll_optimizer=torch.optim.SGD)

    def ul_objective(state: State) -> Tensor:
        return problem.ul_objective(state) * (math.nan if trainer.ul_step == 1 else 1.0)

    settings = ImplicitSettings(ll_learning_rate=1e-9, min_ll_steps=3, max_ll_steps=11)
    trainer = BilevelTrainer(replace(problem, ul_objective=ul_objective), settings)
    ll_steps = [trainer.step() and trainer.ll_step for _ in range(4)]
    assert trainer.skipped_ul_steps == 1
    assert ll_steps == [3, 3 + 11, 3 + 11 + 3, 3 + 11 + 3 + 11]


def test_ll_step_that_evaluates_several_times_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it moves, that is: at the weights that the ul step has left."""
    seen = []
    monkeypatch.setattr("tune_implicit.trials.settling.Settling.see", lambda settling: seen.append(settling))
    problem = replace(tiny_mlp(), ll_optimizer=lambda params, lr: torch.optim.LBFGS(params, lr=lr, max_iter=4))
    trainer = BilevelTrainer(problem, ImplicitSettings(ll_learning_rate=0.5, ll_steps=3))
    trainer.step()
    assert len(seen) == trainer.ll_step == 3


def test_ll_steps_go_on_until_the_ll_model_has_followed() -> None:
    trainer, taken = followed(12)
    assert taken[0] == 3
    assert all(3 <= count < 40 for count in taken)
    assert max(taken) > 3
    assert trainer.ll_lag < 0.5
    assert trainer.lagging_ul_steps == 0
    # A slower ll model needs more of them.
    assert sum(followed(12, ll_learning_rate=0.1)[1]) > sum(taken)


def test_ll_steps_end_at_the_most() -> None:
    trainer, taken = followed(6, ll_learning_rate=1e-5, max_ll_steps=11)
    assert taken == [3] + [11] * 5
    assert trainer.ll_lag > 1


def test_warmup_ll_steps_come_on_top() -> None:
    assert followed(3, warmup_ll_steps=5, ul_learning_rate=0.0)[1] == [8, 3, 3]


def test_min_and_max_may_be_one() -> None:
    assert followed(4, min_ll_steps=7, max_ll_steps=7)[1] == [7] * 4


def test_train_loss_is_the_mean_over_all_ll_steps() -> None:
    problem = quadratic().problem
    losses = []

    def ll_objective(state: State) -> Tensor:
        loss = problem.ll_objective(state)
        losses.append(loss.item())
        return loss

    settings = ImplicitSettings(ll_learning_rate=1e-3, min_ll_steps=2, max_ll_steps=20, warmup_ll_steps=3)
    trainer = BilevelTrainer(replace(problem, ll_objective=ll_objective), settings)
    for _ in range(3):
        losses.clear()
        before = trainer.ll_step
        train_loss = trainer.step().train_loss
        assert train_loss == pytest.approx(sum(losses[: trainer.ll_step - before]) / (trainer.ll_step - before))


@pytest.mark.parametrize("ll_steps", ["auto", 11])
def test_lagging_ul_steps_are_counted(ll_steps: object) -> None:
    trainer, _ = followed(0, ll_learning_rate=1e-5, max_ll_steps=11, ll_steps=ll_steps)
    lags = []
    for _ in range(6):
        trainer.step()
        lags.append(trainer.ll_lag)
    assert math.isnan(lags[0])  # there was no ul step before the first
    assert trainer.lagging_ul_steps == sum(lag > 1 for lag in lags) >= 3


# ---- several batches a hypergradient


def split_problem(split: bool) -> BilevelProblem:
    """Ridge regression on two batches of one size each way, or on both as one."""
    x, x_validate = (torch.randn(12, 3, generator=generator(seed), dtype=F64) for seed in (0, 1))
    y, y_validate = (torch.randn(12, 1, generator=generator(seed), dtype=F64) for seed in (2, 3))

    def batches(*pair: Tensor) -> list[tuple[Tensor, ...]]:
        return list(zip(*(tensor.chunk(2) for tensor in pair), strict=True)) if split else [pair]

    seed_everything(0)
    return BilevelProblem(
        ul_model=Values(log_l2=torch.zeros(3, dtype=F64)),
        ll_model=nn.Linear(3, 1, dtype=F64),
        ul_objective=lambda s: mse_loss(s.ll_model(s.data), s.target),
        ll_objective=lambda s: (
            mse_loss(s.ll_model(s.data), s.target) + (s.ul_model.log_l2.exp() * s.ll_model.weight.square()).sum()
        ),
        train_data=batches(x, y),
        validate_data=batches(x_validate, y_validate),
    )


OF_BATCHES = ImplicitSettings(ll_steps=0, k=4, ul_learning_rate=0.1)


@pytest.mark.parametrize("retain_graphs", [True, False])
@pytest.mark.parametrize("solver", ["minres", "cg", "neumann", "dense"])
def test_hypergradient_of_several_batches_is_that_of_the_mean_objectives(solver: str, retain_graphs: bool) -> None:
    settings = replace(OF_BATCHES, solver=solver)
    one = BilevelTrainer(split_problem(False), settings)
    two = BilevelTrainer(split_problem(True), replace(settings, ul_batches=2, retain_graphs=retain_graphs))
    for _ in range(3):
        expected, got = one.step().hypergradient, two.step().hypergradient
        torch.testing.assert_close(got.gradients, expected.gradients)
        torch.testing.assert_close(got.v, expected.v)
        assert (got.ul_loss, got.ll_loss) == pytest.approx((expected.ul_loss, expected.ll_loss))
        assert got.hvps == 2 * expected.hvps
        torch.testing.assert_close(two.problem.ul_model.log_l2, one.problem.ul_model.log_l2)


@pytest.mark.parametrize("retain_graphs", [True, False])
def test_costs_of_several_batches_are_counted(retain_graphs: bool) -> None:
    calls = 0
    problem = split_problem(True)

    def ll_objective(state: State) -> Tensor:
        nonlocal calls
        calls += 1
        return problem.ll_objective(state)

    settings = replace(OF_BATCHES, ul_batches=2, retain_graphs=retain_graphs)
    trainer = BilevelTrainer(replace(problem, ll_objective=ll_objective), settings)
    hypergradient = trainer.step().hypergradient
    assert trainer.hvps == hypergradient.hvps
    # One for each gradient, of which those of the ll loss are counted by its calls; two for each product.
    assert trainer.gradient_evaluations == 2 + calls + 2 * hypergradient.hvps + 2 * 2
    assert (calls == 2) == retain_graphs


def test_each_hypergradient_takes_the_batches_next_in_line() -> None:
    seen = []
    problem = split_problem(True)

    def ul_objective(state: State) -> Tensor:
        seen.append(state.data[0, 0].item())
        return problem.ul_objective(state)

    batches = [(x + shift, y) for shift in (0, 100, 200) for x, y in problem.validate_data[:1]]
    trainer = BilevelTrainer(
        replace(problem, ul_objective=ul_objective, validate_data=batches), replace(OF_BATCHES, ul_batches=2)
    )
    first = batches[0][0][0, 0].item()
    for _ in range(3):
        trainer.step()
    assert [round(value - first) for value in seen] == [0, 100, 200, 0, 100, 200]


def test_trainer_without_ul_steps_looks_for_nothing_that_a_donor_has_disturbed() -> None:
    donor = BilevelTrainer(quadratic().problem, ImplicitSettings(ll_learning_rate=0.1, solver="dense"))
    donor.step()
    own = BilevelTrainer(quadratic().problem, ImplicitSettings(ll_learning_rate=0.1, ul_learning_rate=0.0))
    own.load_state_dict(donor.state_dict())
    taken = own.ll_step
    own.step()
    assert own.ll_step == taken + own.settings.min_ll_steps
    assert math.isnan(own.ll_lag) or own.ll_lag == donor.ll_lag


def test_direct_part_of_a_hypergradient_is_no_part_of_what_the_ll_model_has_to_follow() -> None:
    """A term of the ul objective that takes off most of the hypergradient takes nothing off the disturbance."""
    lags = []
    for part in (0.0, 0.9, 0.99):
        case = quadratic()
        expected, start = case.expected["ul"], case.problem.ul_model.ul.detach().clone()

        def ul_objective(s, plain=case.problem.ul_objective, slope=part * expected):
            return plain(s) - slope @ s.ul_model.ul

        settings = ImplicitSettings(ll_learning_rate=0.1, solver="dense", ul_learning_rate=1e-3, ll_steps=10)
        sgd = {"ul_optimizer": torch.optim.SGD, "ll_optimizer": torch.optim.SGD}
        trainer = BilevelTrainer(replace(case.problem, ul_objective=ul_objective, **sgd), settings)
        for _ in range(2):
            trainer.step()
        assert not torch.equal(trainer.problem.ul_model.ul, start)
        lags.append(trainer.ll_lag)
    assert lags == pytest.approx([lags[0]] * 3, rel=0.3)
