import importlib
import sys
from pathlib import Path

import pytest
import torch
from optuna.distributions import IntDistribution

from tune_implicit import ImplicitSettings, check

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
