"""The command line: strings -> objects, and exit codes."""

import contextlib
import importlib.util
import pickle
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import click

from tune_implicit.checks.findings import CheckReport
from tune_implicit.errors import InvalidValueError, LearningWarning, NoCompletedTrialError, TuneImplicitError

if TYPE_CHECKING:
    from tune_implicit.searches.ledger import Progress

__all__ = ["main"]

# Exit codes: 0 done, 1 nothing to show for it, 2 used wrongly, 130 and 143 interrupted (128 + the signal).
NOTHING_COMPLETED = 1
USAGE = 2
INTERRUPTED = 130
TERMINATED = 143


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="tune_implicit")
def main() -> None:
    """Search settings with Ray Tune or Optuna, and learn ul values by hypergradients inside each trial."""


@main.command()
@click.argument("task", type=click.Path(path_type=Path))
@click.option("--backend", type=click.Choice(["ray", "optuna"]), default="ray", show_default=True)
@click.option("--trials", type=click.IntRange(min=1), default=50, show_default=True, help="Trials in all.")
@click.option("--time-budget", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS", help="Start none later.")
@click.option("--storage", metavar="URL", help="Database or journal of the study; by default a journal in the output.")
@click.option("--output", type=click.Path(path_type=Path), help="[default: tune_implicit_results/TASK]")
@click.option("--resume", is_flag=True, help="Go on with the search in the output, or join it as a worker.")
@click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Processes, with optuna.")
@click.option("--seed", type=click.IntRange(min=0), help="What every draw comes from, with a trial's number.")
@click.option("--on-error", type=click.Choice(["record", "raise"]), help="What an exception in a trial does.")
@click.option(
    "--trial-timeout", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS", help="End longer ones."
)
@click.option(
    "--ul-state", type=click.Path(path_type=Path), metavar="FILE", help="Start from a saved trial's ul values."
)
@click.option("--address", metavar="ADDRESS", help="Of a Ray cluster to join, such as auto.")
def run(
    task: Path,
    backend: str,
    trials: int,
    time_budget: float | None,
    storage: str | None,
    output: Path | None,
    resume: bool,
    workers: int,
    seed: int | None,
    on_error: str | None,
    trial_timeout: float | None,
    ul_state: Path | None,
    address: str | None,
) -> None:
    """Run the search that the file TASK defines.

    TASK is a Python file with `problem(config)` or `problem(config, data)`, and optionally `space`, `data()` and the
    dict `settings`. Without a `space` the search is over `recommended_space()`, but for what `settings` fixes.

    With --storage, --output and --resume it may be started several times, at once or later, on one machine or many:
    all of them are the workers of one search. With --backend optuna, --workers N starts N on this machine.
    """
    folder = output or Path("tune_implicit_results") / task.stem
    with _Told(), _others(workers, backend, folder):
        module = _load_task(task)
        if backend == "ray":
            from tune_implicit.searches.engines.ray_tune.cluster import ship_by_value

            ship_by_value(module)
        from tune_implicit.searches.search import search

        result = search(
            module.problem,
            module.space,
            data=module.data() if hasattr(module, "data") else None,
            settings=getattr(module, "settings", None),
            backend=backend,
            n_trials=trials,
            time_budget_s=time_budget,
            storage=storage,
            output=folder,
            resume=resume,
            seed=seed,
            on_error=on_error,
            trial_timeout_s=trial_timeout,
            initial_ul_state=None if ul_state is None else _read_ul_state(ul_state),
            address=address,
            on_progress=_show,
        )
        _show(None)
        best: Any = None
        try:
            best = result.best
        except NoCompletedTrialError as error:
            click.echo(str(error), err=True)
    if best is not None:
        config = " ".join(f"{key}={_short(value)}" for key, value in best.config.items())
        click.echo(
            f"{len(result.trials)} trials in {result.summary.seconds:.0f} s; best {result.summary.metric} "
            f"{_short(best.value)} in trial {best.number} ({config}); see `tune-implicit report {folder}`"
        )
    if result.interrupted:
        click.echo("Interrupted; what finished is kept. Go on with --resume.", err=True)
        sys.exit(INTERRUPTED)
    sys.exit(0 if best is not None else NOTHING_COMPLETED)


@main.command()
@click.argument("task", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Write the report as JSON.")
@click.option("--thorough", is_flag=True, help="Take as long as it takes, rather than half a minute.")
def check(task: Path, as_json: bool, thorough: bool) -> None:
    """Look for what is wrong with the problem that the file TASK defines, before a search.

    The config is the middle of `space`, and `settings`. The report ends with the settings to take. Exit code 1 tells of
    a fault, 0 of none.
    """
    with _Told():
        module = _load_task(task)
        from tune_implicit.checks.check import check as check_problem
        from tune_implicit.searches.space import check_space, middle_config
        from tune_implicit.trials.config import merged
        from tune_implicit.trials.trial import Trial

        check_space(module.space)
        config = merged(getattr(module, "settings", None), middle_config(module.space))
        data = module.data() if hasattr(module, "data") else None
        report = CheckReport()
        try:
            trial = Trial(module.problem, config, data)
            report = check_problem(trial.problem, trial.settings, thorough)
            trial.check_config()
        except TuneImplicitError as error:
            report.fault("problem", str(error))
        if as_json:
            click.echo(report.to_json())
        else:
            made_with = " ".join(f"{key}={_short(value)}" for key, value in config.items())
            click.echo(f"{report.summary}\nconfig: {made_with}\n{report.details}")
    sys.exit(0 if report.passed else NOTHING_COMPLETED)


@main.command()
@click.argument("directory", type=click.Path(path_type=Path))
def report(directory: Path) -> None:
    """Write report.html for the search in DIRECTORY, or for all searches in its subfolders."""
    with _Told():
        from tune_implicit.searches.report import write_report

        click.echo(str(write_report(directory)))


@contextlib.contextmanager
def _others(workers: int, backend: str, folder: Path) -> Iterator[None]:
    """Run this command in as many more processes as make ``workers``, until they end.

    Raises
    ------
    InvalidValueError
        If the engine has workers of its own.
    """
    if workers > 1 and backend == "ray":
        raise InvalidValueError("`--workers` is for `--backend optuna`: Ray Tune runs as many trials as fit by itself.")
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--workers=")]
    if "--workers" in arguments:
        at = arguments.index("--workers")
        del arguments[at : at + 2]
    command = [sys.executable, "-m", "tune_implicit.cli", *arguments, "--resume", "--output", str(folder)]
    others = []
    try:
        for _ in range(workers - 1):
            others.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        yield
    finally:
        ending = sys.exc_info()[0] is not None
        for other in others:
            if ending:
                other.terminate()
            if other.wait() not in (0, NOTHING_COMPLETED) and not ending:
                click.echo(f"Warning: one of the workers ended with exit code {other.returncode}.", err=True)


def _read_ul_state(file: Path) -> Any:
    """Return the ul values in a trial's checkpoint, or in a file of ``torch.save(ul_model.state_dict(), file)``.

    Raises
    ------
    InvalidValueError
        If the file is neither.
    """
    import torch

    from tune_implicit.errors import CheckpointError
    from tune_implicit.trials.checkpoint import read_checkpoint

    try:
        return read_checkpoint(file)["kept"]["ul_model"]
    except CheckpointError as error:
        try:
            values = torch.load(file, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError):
            values = None
        if isinstance(values, dict) and all(isinstance(value, torch.Tensor) for value in values.values()):
            return values
        raise InvalidValueError(f"`--ul-state` must be a trial's checkpoint or a saved state dict: {error}") from error


class _Told:
    """Tell the package's own errors and Ctrl-C in one line, and exit; what else is raised keeps its traceback.

    Of trials that did not learn it tells in a line each, without the line of code that noticed.
    """

    def __enter__(self) -> None:
        self._format = warnings.formatwarning
        warnings.formatwarning = self._plainly

    def _plainly(self, message: Any, category: type[Warning], *where: Any, **line: Any) -> str:
        if not issubclass(category, LearningWarning):
            return self._format(message, category, *where, **line)
        return ("\r\033[K" if sys.stderr.isatty() else "") + f"Warning: {message}\n"

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        warnings.formatwarning = self._format
        if isinstance(error, TuneImplicitError):
            click.echo(f"Error: {error}", err=True)
            sys.exit(USAGE)
        if isinstance(error, SystemExit) and error.code == TERMINATED:
            click.echo("Ended by SIGTERM; what finished is kept. Go on with --resume.", err=True)
        if isinstance(error, KeyboardInterrupt):
            click.echo("Interrupted.", err=True)
            sys.exit(INTERRUPTED)


def _load_task(path: Path) -> ModuleType:
    """Return the task file as a module, with its ``problem`` and ``space``, by default the recommended one.

    Raises
    ------
    InvalidValueError
        If there is no such file, or it defines no problem.
    """
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise InvalidValueError(f"`TASK` must be a Python file, got {str(path)!r}. It defines `problem`.")
    module = importlib.util.module_from_spec(spec)
    # Looked up by name while the file runs, e.g. by dataclasses.
    sys.modules[path.stem] = module
    sys.path.insert(0, str(path.parent.absolute()))
    spec.loader.exec_module(module)
    if not hasattr(module, "problem"):
        raise InvalidValueError(
            f"The task file {str(path)!r} must define `problem`: `problem(config)` returns a BilevelProblem."
        )
    if not hasattr(module, "space"):
        from tune_implicit.searches.space import recommended_space

        module.__dict__["space"] = recommended_space(getattr(module, "settings", None))
    return module


def _show(progress: "Progress | None") -> None:
    """Write the progress over itself on a terminal, where ``None`` takes it away; as a line of its own elsewhere."""
    terminal = sys.stderr.isatty()
    if progress is None:
        click.echo("\r\033[K" if terminal else "", err=True, nl=False)
        return
    best = "none yet" if progress.best is None else _short(progress.best)
    left = "" if progress.remaining_s is None else f", about {progress.remaining_s:.0f} s left"
    learning = "".join(
        f", {value:.0%} of ul steps {what}"
        for what, value in (("skipped", progress.skipped), ("by another solver", progress.fallback))
        if value > 0
    )
    learning += f", {progress.troubled} did not learn" if progress.troubled else ""
    text = f"{progress.finished}/{progress.n_trials} trials, best {best}{learning}, {progress.elapsed_s:.0f} s{left}"
    click.echo(("\r\033[K" if terminal else "") + text, err=True, nl=not terminal)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
