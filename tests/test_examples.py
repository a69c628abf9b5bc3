import dataclasses
import difflib
import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from optuna.distributions import IntDistribution

from tune_implicit import BilevelProblem, ImplicitSettings, check
from tune_implicit.trials.checkpoint import read_checkpoint
from tune_implicit.trials.trial import Trial

EXAMPLES = Path(__file__).parents[1] / "examples"
README = EXAMPLES.parent / "README.md"


@pytest.fixture(autouse=True)
def _as_scripts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Run in an empty folder, with the example's own folder on the path, as for a script."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)


def test_ridge(capsys: pytest.CaptureFixture[str]):
    importlib.import_module("ridge").main()
    printed = capsys.readouterr().out
    assert "converged" in printed
    shared, learned = (float(line.rsplit(" ", 1)[1]) for line in printed.splitlines()[1:])
    assert learned < shared


# What a search picks at random need not learn, least of all in a few ul steps.
unlearned = pytest.mark.filterwarnings("ignore:.* did not learn as .* should:tune_implicit.LearningWarning")


@unlearned
def test_optuna_study():
    study = importlib.import_module("optuna_study").main(n_trials=3)
    assert study.best_trial.user_attrs["metrics"]["accuracy"] > 0.9


@unlearned
@pytest.mark.parametrize("trials", ["2"])
def test_hyper_cleaning(trials: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(
        sys, "argv", ["hyper_cleaning.py", "--backend", "optuna", "--trials", trials, "--output", "out"]
    )
    demo = importlib.import_module("hyper_cleaning")
    monkeypatch.setitem(demo.space, "ul_steps", IntDistribution(20, 40))
    demo.main()
    printed = capsys.readouterr().out
    assert "hybrid search: test accuracy" in printed
    assert "without ul steps: test accuracy" in printed
    assert Path("out/report.html").exists()
    assert Path("out/hyper_cleaning.png").exists()


def test_check_passes_on_the_problems_of_the_examples():
    digits = importlib.import_module("hyper_cleaning")
    settings = ImplicitSettings(ll_learning_rate=0.01, ul_steps=40)
    penalties = importlib.import_module("breast_cancer").problem({"log_l2": -5.0})
    weights = digits.problem({"width": 8, "logit": 0.0}, digits.data())
    for problem in (penalties, weights):
        report = check(problem, settings)
        assert report.passed, str(report)


@unlearned
def test_readme_problem():
    """The first Python block of the README runs as it stands."""
    code = README.read_text().split("```python\n")[1].split("```")[0]
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    assert len(list(Path("tune_implicit_results").iterdir())) == 1


def _trial_of_the_plain_script(changes: dict[str, Any]) -> Trial:
    """Return a trial of ``from_pytorch.problem`` that takes the plain script's ll steps, and no ul steps."""
    plain, hybrid = importlib.import_module("plain_pytorch"), importlib.import_module("from_pytorch")
    splits = plain.data()

    def problem(config: Mapping[str, Any], splits: dict[str, Any]) -> BilevelProblem:
        return dataclasses.replace(hybrid.problem(config, splits), select_data=[splits["validate"]])

    steps = plain.EPOCHS * plain.N_TRAIN // plain.BATCH_SIZE
    settings = {"ll_learning_rate": plain.LEARNING_RATE, "ul_learning_rate": 0.0, "ll_steps": 1, "ul_steps": steps}
    return Trial(problem, hybrid.settings | settings | changes, splits)


def _same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("adapts", [False, True])
@pytest.mark.parametrize("seed", [0, 7])
def test_without_ul_steps_a_trial_is_the_plain_script_bit_by_bit(
    seed: int, adapts: bool, monkeypatch: pytest.MonkeyPatch
):
    plain = importlib.import_module("plain_pytorch")
    monkeypatch.setattr(plain, "EPOCHS", 8)
    trained = plain.train(plain.data(), seed)
    trainer = _trial_of_the_plain_script({"seed": seed, "adapt_ul_learning_rate": adapts}).trainer
    log = [(trainer.step().train_loss, trainer.ll_rate) for _ in trained.log]
    assert log == trained.log
    assert len(log) == 8 * plain.N_TRAIN // plain.BATCH_SIZE
    assert _same(trainer.problem.ll_model.state_dict(), trained.model.state_dict())
    assert _same(trainer.ll_models[0].state_dict(), trained.average.module.state_dict())
    assert not _same(trained.model.state_dict(), trained.average.module.state_dict())


def test_without_ul_steps_a_trial_stops_early_where_the_plain_script_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    plain = importlib.import_module("plain_pytorch")
    monkeypatch.setattr(plain, "LEARNING_RATE", 3e-2)  # so that it overfits soon
    monkeypatch.setattr(plain, "EPOCHS", 60)
    monkeypatch.setattr(plain, "PATIENCE", 3)
    trained = plain.train(plain.data())
    epoch = plain.N_TRAIN // plain.BATCH_SIZE
    trial = _trial_of_the_plain_script({"patience": 3, "ul_steps_per_report": epoch})
    while not trial.completed:
        trial.advance()
    assert trial.ended_by == "patience"
    assert trial.trainer.ll_step == len(trained.log)
    trial.save(tmp_path / "trial.pt")
    assert _same(read_checkpoint(tmp_path / "trial.pt")["kept"]["ll_model"], trained.best)


def test_from_pytorch_keeps_the_lines_of_the_plain_script():
    plain, hybrid = ((EXAMPLES / f"{name}.py").read_text() for name in ("plain_pytorch", "from_pytorch"))
    _, _, plain = plain.split('"""', 2)  # without the docstring
    _, _, hybrid = hybrid.split('"""', 2)
    changed = [line for line in difflib.ndiff(plain.splitlines(), hybrid.splitlines()) if line.startswith("- ")]
    assert len(changed) <= 15, "\n".join(changed)


@unlearned
def test_from_pytorch(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    hybrid = importlib.import_module("from_pytorch")
    monkeypatch.setattr(hybrid, "EPOCHS", 60)
    monkeypatch.setitem(hybrid.settings, "ul_steps", 120)
    hybrid.main(n_trials=1)
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    (plain_loss, plain_accuracy), (loss, accuracy) = ((float(w[3].rstrip(",")), float(w[-1])) for w in printed)
    assert loss < plain_loss / 2
    assert accuracy > plain_accuracy


def test_plain_pytorch(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    plain = importlib.import_module("plain_pytorch")
    monkeypatch.setattr(plain, "EPOCHS", 30)
    plain.main()
    assert 0.8 < float(capsys.readouterr().out.rsplit(" ", 1)[1]) < 0.93


@unlearned
def test_transformers_labels(capsys: pytest.CaptureFixture[str]):
    accuracies = importlib.import_module("transformers_labels").main(ul_steps=6, n_trials=1)
    assert accuracies.keys() == {"plain", "hybrid"}
    assert "mean weight of right labels" in capsys.readouterr().out


@unlearned
def test_cross_validation(monkeypatch: pytest.MonkeyPatch):
    folds = importlib.import_module("cross_validation")
    monkeypatch.setitem(folds.settings, "ul_steps", 30)
    losses = folds.main(n_trials=1)
    assert losses["one per feature"] < losses["one penalty"]
