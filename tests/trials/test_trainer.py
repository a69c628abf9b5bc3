import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from tests.support.noisy import LogL2, assert_same_bits, random_problem
from tests.support.problems import generator, quadratic, tiny_mlp
from tune_implicit.errors import CheckpointError, DivergedError, SolveError
from tune_implicit.hypergradients.rng import seed_everything
from tune_implicit.hypergradients.solvers.solution import Status
from tune_implicit.trials.problem import BilevelProblem
from tune_implicit.trials.settings import ImplicitSettings
from tune_implicit.trials.trainer import BilevelTrainer

SETTINGS = ImplicitSettings(ll_steps=3, k=3, warmup_ll_steps=2, ul_learning_rate=0.1)


def make_trainer(settings: ImplicitSettings = SETTINGS, **options: float) -> BilevelTrainer:
    seed_everything(0)
    return BilevelTrainer(random_problem(**options), settings)


def go_on(source: str, target: str, steps: int) -> None:
    """What the other process runs: load, take some steps, save."""
    torch.set_num_threads(1)
    trainer = make_trainer()
    torch.randn(17)  # its random state is elsewhere
    trainer.load_state_dict(torch.load(source, weights_only=True))
    for _ in range(steps):
        trainer.step()
    torch.save(trainer.state_dict(), target)


# After the second step the training pass is half read, after the fifth the validation pass has just ended.
@pytest.mark.parametrize("saved_after", [0, 2, 5])
def test_resume_in_a_new_process_ends_in_the_same_bits(saved_after: int, tmp_path: Path) -> None:
    trainer, steps = make_trainer(), 7
    source, target = tmp_path / "source.pt", tmp_path / "target.pt"
    for step in range(steps):
        if step == saved_after:
            torch.save(trainer.state_dict(), source)
        trainer.step()
    code = (
        f"from tests.trials.test_trainer import go_on; go_on({str(source)!r}, {str(target)!r}, {steps - saved_after})"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
    assert_same_bits(torch.load(target, weights_only=True), trainer.state_dict())


def test_state_of_another_trial_keeps_own_settings() -> None:
    """The trap of population-based training: ``optimizer.load_state_dict`` brings back the donor's options."""
    donor = make_trainer(weight_decay=0.3)
    donor.step()
    own = replace(SETTINGS, ll_learning_rate=0.002, ul_learning_rate=0.03, k=7, tolerance=1e-3)
    trainer = make_trainer(own, weight_decay=0.01)
    trainer.load_state_dict(donor.state_dict())
    (ll_group,), (ul_group,) = (optimizer.param_groups for optimizer in trainer._optimizers().values())
    assert (ll_group["lr"], ll_group["weight_decay"], ul_group["lr"]) == (0.002, 0.01, 0.03)
    solver = trainer._implicit._inverse_hvp._settings.make_solver()
    assert (solver.k, solver.tolerance, solver.step_size) == (7, 1e-3, 0.002)
    # What it takes over: weights, counters, and the optimizer's memory of past gradients.
    assert_same_bits(trainer.problem.ll_model.state_dict(), donor.problem.ll_model.state_dict())
    assert trainer.ul_step == 1
    assert_same_bits(trainer._ll_optimizer.state_dict()["state"], donor._ll_optimizer.state_dict()["state"])
    trainer.step()
    assert ll_group["lr"] == 0.002


def test_options_that_an_optimizer_changes_itself_survive_a_resume() -> None:
    trainer = make_trainer()
    trainer._ll_optimizer.param_groups[0]["lr"] = 0.5
    resumed = make_trainer()
    resumed.load_state_dict(trainer.state_dict())
    assert resumed._ll_optimizer.param_groups[0]["lr"] == 0.5


def test_trainer_finds_the_best_ul_values() -> None:
    """At the end the whole derivative of ``F(w*(l), l)`` vanishes, at the minimum that linear algebra gives."""
    case = quadratic()
    problem = replace(case.problem, ll_optimizer=torch.optim.SGD)
    trainer = BilevelTrainer(
        problem, ImplicitSettings(solver="cg", k=4, ll_steps=60, ll_learning_rate=0.3, ul_learning_rate=0.1)
    )
    norms = [trainer.step().hypergradient.norm for _ in range(200)]
    assert norms[-1] < 1e-4 * norms[0]


@pytest.mark.parametrize("policy", ["skip", "raise"])
def test_failed_solve(policy: str) -> None:
    # The step size is also that of the Neumann series, far above 2 / lambda_max = 0.5.
    settings = ImplicitSettings(ll_learning_rate=3.0, ll_steps=0, on_failure=policy)
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
    trainer = make_trainer()
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
    [({"format_version": 99}, "format version 2, got 99"), ([], "got list")],
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
    monkeypatch.setattr("tune_implicit.trials.trainer.move", lambda nested, device: seen.append(device) or nested)
    make_trainer().step()
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
    for _ in range(150):
        trainer.step()
    grid = [mse_loss(x_validate @ best_response(l2), y_validate).item() for l2 in torch.logspace(-3, 2, 400).tolist()]
    learned = mse_loss(x_validate @ best_response(ul.log_l2.exp().item()), y_validate).item()
    assert learned < 1.001 * min(grid)


# ---- what a solve leaves to the next

# Damped, so that no solve of the random problem fails.
REMEMBERING = {
    "neumann": replace(SETTINGS, damping=5.0),
    "auto": replace(SETTINGS, damping=5.0, solver="neumann", step_size="auto"),
    "preconditioned": replace(SETTINGS, damping=5.0, solver="cg", preconditioner_memory=8),
    "small memory": replace(SETTINGS, damping=5.0, solver="cg", preconditioner_memory=2),
    "cold": replace(SETTINGS, damping=5.0, solver="cg", warm_start=False),
    "minres": replace(SETTINGS, damping=5.0, solver="minres"),
    "noise": replace(SETTINGS, damping=5.0, solver="cg", stop="noise", verify=True),
}


def saved_and_loaded(trainer: BilevelTrainer) -> dict:
    file = io.BytesIO()
    torch.save(trainer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_warm_start_is_the_default() -> None:
    trainer = make_trainer(REMEMBERING["neumann"])
    assert trainer.state_dict()["implicit"]["v"] is None
    hypergradient = trainer.step().hypergradient
    assert torch.equal(trainer.state_dict()["implicit"]["v"], hypergradient.v)
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
    saved = saved_and_loaded(trainer)
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
        state = trainer.state_dict()["implicit"]
        assert {key: not (isinstance(state[key], Tensor) or state[key]) for key in empty} == empty


@pytest.mark.parametrize("donor", REMEMBERING.values(), ids=REMEMBERING)
@pytest.mark.parametrize("own", REMEMBERING.values(), ids=REMEMBERING)
def test_state_of_another_solver_loads(own: ImplicitSettings, donor: ImplicitSettings) -> None:
    source, trainer = make_trainer(donor), make_trainer(own)
    for _ in range(2):
        source.step()
    trainer.load_state_dict(saved_and_loaded(source))
    assert not trainer.step().hypergradient.status.failed
    pairs = trainer.state_dict()["implicit"]["preconditioner"]
    assert (pairs is not None) == (own.preconditioner_memory > 0)
    if pairs is not None:
        assert len(pairs["s"]) <= own.preconditioner_memory


# ---- failed solves


def failing_trainer(batches: str = "bad", steps: int = 0, **settings: object) -> BilevelTrainer:
    """Conjugate gradient on the training batches named, of which a bad one has a negative Hessian."""
    case = quadratic()
    h, c = case.problem.train_data[0]
    data = [(-h, c) if name == "bad" else (h, c) for name in batches.split()]
    settings = {"solver": "cg", "ll_steps": 0, "warm_start": False} | settings
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
    settings = ImplicitSettings(ll_learning_rate=3.0, ll_steps=0, on_failure="stop", failures_to_stop=1)
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
    resumed.load_state_dict(saved_and_loaded(trainer))
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
        ("good", {"solver": "neumann", "ll_learning_rate": 3.0}, Status.DIVERGED, "a step size must be below"),
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
