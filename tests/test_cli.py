"""The command line: what it prints, and its exit codes."""

import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from click.testing import CliRunner, Result
from optuna.storages import RDBStorage

import tune_implicit
from tests.support import toy
from tune_implicit import LearningWarning, load_search, recommended_space
from tune_implicit.cli import _Told, main

ROOT = Path(tune_implicit.__file__).parent.parent

TASK = """
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from tests.support import toy
from tests.support.toy import problem, SPACE as space, SETTINGS as settings
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Work in an empty folder, and import what a task file imports as if for the first time."""
    monkeypatch.chdir(tmp_path)
    modules, path = dict(sys.modules), list(sys.path)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - set(modules):
        if name.startswith("task"):
            del sys.modules[name]


def task(more: str = "") -> str:
    Path("task.py").write_text(TASK + more)
    return "task.py"


def call(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit | None)
    assert "Traceback" not in result.output
    return result


def run(*arguments: str, more: str = "", code: int = 0) -> Result:
    return call("run", task(more), "--backend", "optuna", "--trials", "3", *arguments, code=code)


def start(*arguments: str) -> "subprocess.Popen[str]":
    """Start the command line in a process group of its own, as a terminal does."""
    command = [sys.executable, "-c", "from tune_implicit.cli import main; main()", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, env=environment, start_new_session=True, **pipes)


def test_a_run_shows_its_progress_and_a_line_of_summary() -> None:
    result = run()
    lines = result.stderr.splitlines()
    assert [line.split(" ")[0] for line in lines] == ["1/3", "2/3", "3/3"]
    assert "trials, best " in lines[0]
    assert "s left" in lines[0]
    (summary,) = result.stdout.splitlines()
    found = load_search("tune_implicit_results/task")
    assert summary.startswith("3 trials in ")
    assert f"best select_loss {found.best.value:.4g} in trial {found.best.number} (" in summary
    assert f"k={found.best.config['k']}" in summary
    assert "tune-implicit report tune_implicit_results/task" in summary


@pytest.mark.parametrize("trouble", toy.TROUBLED)
def test_a_run_whose_trials_do_not_learn_says_so_in_its_progress(trouble: str) -> None:
    more = f"settings = settings | toy.TROUBLED[{trouble!r}]; space = {{'tolerance': FloatDistribution(0, 1e-9)}}"
    with pytest.warns(LearningWarning) as warned:
        result = run(more=more, code=int(trouble == "failed"))
    assert f"{trouble}: 0, 1, 2" in str(warned[-1].message)
    for number, line in enumerate(result.stderr.splitlines()[:3], 1):
        assert line.startswith(f"{number}/3 trials, best ")
        assert f", {number} did not learn, " in line
        assert (", 100% of ul steps skipped, " in line) == (trouble == "skipped")


def test_a_warning_of_trials_that_do_not_learn_is_one_plain_line() -> None:
    before = warnings.formatwarning
    with _Told():
        assert warnings.formatwarning("Seen.", LearningWarning, "search.py", 7) == "Warning: Seen.\n"
        other = ("Seen.", UserWarning, "search.py", 7)
        assert warnings.formatwarning(*other) == before(*other)
    assert warnings.formatwarning is before


# What is picked at random need not learn.
@pytest.mark.filterwarnings("ignore:.* did not learn as .* should:tune_implicit.LearningWarning")
def test_a_task_without_a_space_is_searched_over_the_recommended_one() -> None:
    run("--output", "found", "--seed", "0", "--trials", "1", more="del space\nsettings = {'penalties': 4}")
    (trial,) = load_search("found").trials
    assert trial.state == "complete"
    assert set(trial.config) == {*recommended_space(), "penalties", "seed"}


def test_a_report_of_a_run() -> None:
    run("--output", "found")
    result = call("report", "found")
    assert result.stdout == "found/report.html\n"
    assert Path("found/report.html").exists()


def test_more_trials_on_resume() -> None:
    run("--output", "found")
    result = run("--output", "found", "--resume", "--trials", "4")
    assert result.stderr.startswith("4/4 trials")
    assert len(load_search("found").trials) == 4


def test_an_output_already_used_says_what_to_do() -> None:
    run("--output", "found")
    assert "--resume" in run("--output", "found", code=2).stderr


def test_the_same_seed_finds_the_same() -> None:
    for name in ("a", "b"):
        run("--output", name, "--seed", "5")
    assert [t.value for t in load_search("a").trials] == [t.value for t in load_search("b").trials]


def test_a_storage_of_ones_own() -> None:
    run("--output", "found", "--storage", "sqlite:///study.db")
    assert len(optuna.load_study(storage=RDBStorage("sqlite:///study.db"), study_name="found").trials) == 3


def test_a_time_budget_ends_a_search_in_order() -> None:
    run("--output", "found", "--trials", "100000", "--time-budget", "0.5")
    assert 0 < len(load_search("found").trials) < 100_000


def test_data_is_made_once_and_given_to_the_factory() -> None:
    more = """
def data():
    print("made")
    return {"offset": 1}

def problem(config, data):
    assert data == {"offset": 1}
    return toy.problem(config)
"""
    assert run(more=more).stdout.count("made") == 1


def test_a_define_by_run_space_and_a_sibling_module() -> None:
    Path("task_helper.py").write_text("def space(trial):\n    return {'k': trial.suggest_int('k', 1, 3)}\n")
    run(more="from task_helper import space")


def test_a_search_in_which_all_trials_failed_says_why() -> None:
    with pytest.warns(LearningWarning, match=r"\(failed"):
        result = run(more="space = toy.faulty('nan')", code=1)
    assert "None of 3 finished trials completed. Trial 0: The ll loss became nan" in result.stderr
    assert len(result.stderr.splitlines()) == 4


EMPTY = """
def problem(config):
    import dataclasses
    return dataclasses.replace(toy.problem(config), {}=[])
"""
VECTOR = """
def problem(config):
    import dataclasses
    return dataclasses.replace(toy.problem(config), {}=lambda state: state.ll_model(state.data))
"""


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("del problem", "must define `problem`"),
        ("del problem, space", "must define `problem`"),
        ("space = {}", "must name at least one setting"),
        ("space = 5", "`space` must be a dict of Optuna distributions"),
        ("space = {'k': 5}", "`space`['k'] must be an Optuna distribution, got 5"),
        ("space = {'k': IntDistribution(-1, -1)}", "`k` must be 0 or more, got -1"),
        ("settings = {'k': -1}; space = {'rtol': FloatDistribution(0, 1)}", "`k` must be 0 or more, got -1"),
        ("settings = {'solver': 'newton'}", "`solver` must be one of cg, minres, neumann, dense"),
        ("space = {'ul_stepz': IntDistribution(1, 2)}", "'ul_stepz' (did you mean 'ul_steps'?)"),
        ("settings = {'widht': 5}", "No one reads the config's 'widht'"),
        (VECTOR.format("ul_objective"), "`ul_objective`"),
        (VECTOR.format("ll_objective"), "`ll_objective`"),
        (EMPTY.format("train_data"), "`train_data` must hold at least one batch"),
        (EMPTY.format("select_data"), "`select_data` must hold at least one batch"),
        ("problem = lambda config: None", "must return a BilevelProblem, got NoneType"),
    ],
)
def test_a_wrong_task_is_told_in_one_line(more: str, message: str) -> None:
    result = run(more=more, code=2)
    assert result.stderr.startswith("Error: ")
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""
    # Once mended, the same command runs.
    run()


@pytest.mark.parametrize("storage", ["nowhere://s.db", "sqlite:////no/folder/s.db", "/no/folder/s.journal"])
def test_a_storage_that_cannot_be_opened_is_told(storage: str) -> None:
    result = run("--storage", storage, code=2)
    assert "cannot be opened" in result.stderr
    assert "Pass the path of a journal file, or a database URL" in result.stderr


@pytest.mark.parametrize("path", ["missing.py", "."])
def test_a_task_that_is_no_file_is_told(path: str) -> None:
    assert "`TASK` must be a Python file" in call("run", path, code=2).stderr


def test_a_task_that_is_no_python_is_told() -> None:
    Path("task.txt").write_text("problem")
    assert "`TASK` must be a Python file" in call("run", "task.txt", code=2).stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("--trials", "0"),
        ("--trials", "many"),
        ("--time-budget", "0"),
        ("--time-budget", "-1"),
        ("--backend", "dask"),
        ("--seed", "-1"),
        ("--speed", "9"),
    ],
)
def test_a_wrong_option_is_told(arguments: tuple[str, str]) -> None:
    assert arguments[0] in run(*arguments, code=2).stderr


def test_an_output_that_is_a_file_is_told() -> None:
    assert "must be a folder" in run("--output", task(), code=2).stderr


def test_a_report_of_nothing_is_told() -> None:
    assert "holds no search" in call("report", "missing", code=2).stderr


def test_a_bug_in_the_users_code_keeps_its_traceback() -> None:
    result = CliRunner().invoke(
        main, ["run", task("space = toy.faulty('mistake')"), "--backend", "optuna", "--trials", "1"]
    )
    assert result.exit_code == 1
    assert type(result.exception).__name__ == "MistakeError"


def test_help_and_version() -> None:
    assert "--time-budget SECONDS" in call("run", "-h").stdout
    assert "report" in call("--help").stdout


@pytest.mark.parametrize("backend", ["optuna", "ray"])
def test_ctrl_c_keeps_what_finished_and_resume_completes_it(backend: str) -> None:
    search = ("run", task(), "--output", "found", "--trials")
    process = start(*search, "100000", "--backend", backend)
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("3/"):
            break
    os.killpg(process.pid, signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert all("/100000 trials" in line for line in lines), lines
    assert "Interrupted; what finished is kept. Go on with --resume." in error
    assert "Traceback" not in error
    assert "best select_loss" in out
    finished = load_search("found").trials
    assert 3 <= len(finished) < 100_000
    assert {trial.state for trial in finished} == {"complete"}
    # The two backends share the study, so that one may go on where the other ended.
    call(*search, str(len(finished) + 2), "--backend", "optuna", "--resume")
    resumed = load_search("found").trials
    assert all(trial in resumed for trial in finished)
    assert [trial.number for trial in resumed] == list(range(len(finished) + 2))


def test_a_mistake_on_ray_is_told_in_one_line() -> None:
    process = start("run", task("space = {'k': IntDistribution(-1, -1)}"), "--trials", "1")
    out, error = process.communicate(timeout=120)
    assert process.returncode == 2
    assert (out, error) == ("", "Error: `k` must be 0 or more, got -1.\n")


# ---- check


CHECKED = """
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from tests.support.working import working, {imported}

def problem(config):
    assert 1 <= config["k"] <= 64
    return working({changes})

space = {{"k": IntDistribution(1, 64, log=True), "solver": CategoricalDistribution(["cg", "neumann"]),
         "ll_learning_rate": FloatDistribution(1e-2, 1e-1, log=True)}}
settings = {{"ll_steps": 10, "ul_steps": 30}}
"""


def check_task(tmp_path: Path, *arguments: str, changes: str = "", imported: str = "LearningRate") -> Result:
    task = tmp_path / "checked.py"
    task.write_text(CHECKED.format(changes=changes, imported=imported))
    return CliRunner().invoke(main, ["check", str(task), *arguments])


def test_check_of_a_working_task(tmp_path: Path) -> None:
    got = check_task(tmp_path)
    assert got.exit_code == 0, got.output
    assert got.stdout.startswith("Ready to search.\nA trial with these settings takes about ")
    assert "\nconfig: ll_steps=10 ul_steps=30 k=8 solver=cg ll_learning_rate=0.03162\n" in got.stdout
    *_, verdict, recommended = got.stdout.splitlines()
    assert verdict == "passed"
    assert recommended.startswith('recommended settings: {"solver": "cg", ')
    assert got.stderr == ""


def test_check_of_a_task_without_a_space_takes_the_middle_of_the_recommended_one(tmp_path: Path) -> None:
    task = tmp_path / "checked.py"
    task.write_text("from tests.support.working import working\n\ndef problem(config):\n    return working()\n")
    got = CliRunner().invoke(main, ["check", str(task)])
    assert got.exit_code == 0, got.output
    middle = "ll_learning_rate=0.01 ul_learning_rate=0.01732 ul_steps=100 min_ll_steps=10 solver=minres k=5"
    assert f"config: {middle}" in got.stdout.splitlines()


def test_check_of_a_broken_task_as_json(tmp_path: Path) -> None:
    got = check_task(tmp_path, "--json", changes="ul_model=LearningRate()")
    assert got.exit_code == 1
    told = json.loads(got.stdout)
    assert [finding["name"] for finding in told["findings"] if finding["level"] == "fault"] == ["learning-rate"]


def test_a_thorough_check_has_no_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tune_implicit.checks.check._BUDGET_S", 0.0)
    assert "not looked at for lack of time" in check_task(tmp_path).stdout
    assert "not looked at for lack of time" not in check_task(tmp_path, "--thorough").stdout


def test_check_of_a_problem_that_cannot_be_made(tmp_path: Path) -> None:
    got = check_task(tmp_path, changes="train_data=[]")
    assert got.exit_code == 1
    assert "FAULT   problem             `train_data` must hold at least one batch" in got.stdout


def test_check_without_a_task() -> None:
    got = CliRunner().invoke(main, ["check", "no_such_file.py"])
    assert (got.exit_code, got.stderr.count("\n")) == (2, 1)


@pytest.mark.filterwarnings("ignore:.* did not learn as .* should:tune_implicit.LearningWarning")
def test_what_a_task_without_a_space_fixes_is_not_searched() -> None:
    fixed = "del space\nsettings = {'penalties': 4, 'solver': 'minres', 'll_learning_rate': 0.05, 'll_steps': 3}"
    run("--output", "found", "--trials", "1", more=fixed)
    (trial,) = load_search("found").trials
    assert (trial.config["solver"], trial.config["ll_learning_rate"]) == ("minres", 0.05)
    assert "min_ll_steps" not in trial.config
