"""Searches that are killed at a set point, and started again.

    python -m tests.support.kills PLAN

Each start of a search is a child of this process, in which functions are wrapped such that one of them, at one ul step
of one trial, ends the child. All of them, and Ray's workers, note in a log what they did.
"""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.artifacts import FileSystemArtifactStore
from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, GrpcStorageProxy
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from sqlalchemy.orm import Session

from tests.support import toy
from tune_implicit import BilevelProblem, State, load_search, search
from tune_implicit.searches import leases
from tune_implicit.searches.engines.optuna_study.artifacts import ArtifactSaves
from tune_implicit.searches.leases import Leases
from tune_implicit.searches.queue import TrialQueue, has_ended
from tune_implicit.searches.sampling import seed_of
from tune_implicit.searches.study import open_storage
from tune_implicit.trials.saving import SaveClock
from tune_implicit.trials.trial import Trial

__all__ = [
    "DOUBLE",
    "IN_A_STEP",
    "POINTS",
    "SIGNALS",
    "Kill",
    "Plan",
    "Toll",
    "end_of",
    "has_no_place",
    "run_plan",
    "toll_of",
]

# What a search's processes find the plan under, and which start of the search it is.
PLAN, START = "TUNE_IMPLICIT_KILLS", "TUNE_IMPLICIT_KILLS_START"

# Of the trial that a kill is in: its second report, and the step of a report that is under way.
SECOND, BETWEEN = 4, 3

# Of the toy, but each trial draws by its own seed, which tells it from the others in the log.
SETTINGS = {name: value for name, value in toy.SETTINGS.items() if name != "seed"}

# A search that takes longer hangs.
MOST_S = 180


@dataclass(frozen=True)
class Kill:
    """Where a search ends: a point of :data:`POINTS`, in one of its trials."""

    point: str
    number: int


@dataclass(frozen=True)
class Plan:
    """A search, and how its starts end; the one after them is left alone.

    Parameters
    ----------
    output, engine, storage, n_trials, seed
        As :func:`tune_implicit.search` takes them; a storage ``grpc://host:port`` is Optuna's proxy there.
    kills : list of Kill
        One for each start but the last.
    prune_at : int, optional
        The ul step at whose report the pruner stops every trial.
    saves : bool
        Whether trials are saved at each report, or only at their end.
    settle_s : float
        Seconds from a claim on a killed one's trial to its taking over; a search without other workers needs none.
    """

    output: str
    kills: list[Kill] = field(default_factory=list)
    engine: str = "optuna"
    storage: str | None = None
    n_trials: int = 3
    seed: int = 7
    prune_at: int | None = None
    saves: bool = True
    settle_s: float = leases.SETTLE_S

    @property
    def statuses(self) -> list[int]:
        """With what its starts are to end, negative for a signal that no one has seen to."""
        by_request = {"SIGTERM in a step": 128 + signal.SIGTERM, "Ctrl-C in a step": 0}
        return [*(by_request.get(kill.point, -signal.SIGKILL) for kill in self.kills), 0]

    @property
    def folder(self) -> Path:
        return Path(self.output)

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    def opened(self) -> Any:
        """Return the storage as a search takes it."""
        if self.storage is not None and self.storage.startswith("grpc://"):
            host, port = self.storage.removeprefix("grpc://").split(":")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)
                return GrpcStorageProxy(host=host, port=int(port))
        return self.storage

    def study(self) -> optuna.Study | None:
        """Return the study of the search, if it has begun."""
        opened = self.opened()
        if opened is None and not (self.folder / "study.journal").exists():
            return None
        storage: BaseStorage = open_storage(opened or str(self.folder / "study.journal"))
        names = optuna.get_all_study_names(storage)
        return optuna.load_study(storage=storage, study_name=self.folder.name) if self.folder.name in names else None


# ---- in the processes of a search


class Process:
    """One process of a search: the child that was started, or a worker of Ray's."""

    def __init__(self, plan: Plan, start: int, driver: int) -> None:
        self.plan, self.start, self.driver = plan, start, driver
        self.kill = plan.kills[start] if start < len(plan.kills) else None
        self.trial: Trial | None = None  # the one that runs here
        self.evaluations = 0  # of its ll objective since its last ul step

    def note(self, event: str, **what: Any) -> None:
        """Write a line into the log, in one piece."""
        line = json.dumps({"start": self.start, "event": event, **what}) + "\n"
        descriptor = os.open(self.plan.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, line.encode())
        os.close(descriptor)

    def end(self, by: int = signal.SIGKILL) -> None:
        """Send the searching process a signal."""
        self.note("ended", by=int(by))
        os.kill(self.driver, by)
        if by == signal.SIGKILL or self.driver != os.getpid():
            time.sleep(2)  # a worker of Ray's goes with its driver

    def is_in(self, optuna_trial: optuna.Trial) -> bool:
        """Return whether it is to end in this trial."""
        return self.kill is not None and optuna_trial.number == self.kill.number

    def runs(self, *steps: int) -> bool:
        """Return whether the trial that it is to end in runs here, and has taken so many ul steps."""
        if self.kill is None or self.trial is None or self.trial.trainer.ul_step not in steps:
            return False
        return self.trial.settings.seed == seed_of(self.plan.seed, self.kill.number)

    def watch(self) -> None:
        """Note what trials do, and save them as often as they report, or never."""
        leases.SETTLE_S = self.plan.settle_s
        SaveClock.due = lambda clock: self.plan.saves  # type: ignore[method-assign]
        on(Trial, "advance", before=self._advances)
        on(ArtifactSaves, "_write_turn", after=self._saved)
        on(ArtifactSaves, "_upload", after=self._saved)
        if self.plan.engine == "ray":
            from ray.train._internal.storage import StorageContext

            # In the Trainable's `save`, which Ray has looked up before it can be wrapped here.
            on(StorageContext, "persist_current_checkpoint", after=self._saved)

    def _advances(self, trial: Trial) -> None:
        self.trial = trial
        self.note("advances", seed=trial.settings.seed, step=trial.trainer.ul_step)

    def _saved(self, *arguments: Any) -> None:
        if self.trial is not None:
            self.note("saved", seed=self.trial.settings.seed, step=self.trial.trainer.ul_step)

    def evaluates(self) -> None:
        """Take in an evaluation of the ll objective."""
        if self.runs(BETWEEN) and self.kill is not None and self.kill.point in IN_A_STEP:
            self.evaluations += 1
            if self.evaluations == 2:
                self.end(IN_A_STEP[self.kill.point])


def on(owner: Any, name: str, before: Callable[..., object] | None = None, after: Any = None) -> None:
    """Let a function of ``owner`` call another before or after it, with its own arguments."""
    inner = getattr(owner, name)

    @functools.wraps(inner)
    def outer(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            before(*args, **kwargs)
        found = inner(*args, **kwargs)
        if after is not None:
            after(*args)
        return found

    setattr(owner, name, outer)


_process: Process | None = None


def problem(config: Mapping[str, Any], data: Any = None) -> BilevelProblem:
    """Return the toy's problem, whose ll objective tells where its trial is."""
    process, made = here(), toy.problem(config)

    def ll_objective(state: State) -> torch.Tensor:
        process.evaluates()
        return made.ll_objective(state)

    return replace(made, ll_objective=ll_objective)


def here() -> Process:
    """Return this process of a search, wrapped by its plan."""
    global _process
    if _process is None:
        plan, driver = json.loads(os.environ[PLAN]), json.loads(os.environ[START])
        kills = [Kill(**kill) for kill in plan.pop("kills")]
        _process = Process(Plan(kills=kills, **plan), *driver)
        _process.watch()
        if _process.kill is not None:
            POINTS[_process.kill.point](_process)
    return _process


# ---- the points


def _between_suggestions(process: Process) -> None:
    on(optuna.Trial, "suggest_int", after=lambda trial, *_: process.is_in(trial) and process.end())


def _just_begun(process: Process) -> None:
    on(optuna.Study, "add_trial", after=lambda study, trial: ends_last(study))

    def ends_last(study: optuna.Study) -> None:
        if process.kill is not None and len(study.get_trials(deepcopy=False)) == process.kill.number + 1:
            process.end()


def _before_the_first_report(process: Process) -> None:
    on(optuna.Trial, "report", before=lambda trial, value, step: process.is_in(trial) and process.end())


def _in_a_report(process: Process) -> None:
    on(optuna.Trial, "report", after=lambda trial, _, step: process.is_in(trial) and step == SECOND and process.end())


def _in_a_write(process: Process, *, half: bool = False) -> None:
    """Kill in the write of a report: holding the journal's lock, or before the database's commit."""
    writing = []

    def append(backend: JournalFileBackend, logs: list[Any]) -> None:
        if writing:
            backend._lock.acquire()
            if half:
                line = json.dumps(logs[0])
                with Path(backend._file_path).open("a") as file:
                    file.write(line[: len(line) // 2])
            process.end()

    def report(trial: optuna.Trial, value: float, step: int) -> None:
        if process.is_in(trial) and step == SECOND:
            writing.append(trial)

    on(optuna.Trial, "report", before=report)
    for backend in (JournalFileBackend, *JournalFileBackend.__subclasses__()):
        if "append_logs" in vars(backend):
            on(backend, "append_logs", before=append)
    on(Session, "commit", before=lambda session: writing and process.end())


def _before_the_save(process: Process) -> None:
    on(Trial, "save", before=lambda trial, path: process.runs(SECOND) and process.end())


def _half_a_save(process: Process) -> None:
    """Kill where the file of a save has its name, but only half of its content."""

    def write(store: FileSystemArtifactStore, artifact: str, content: Any) -> None:
        if process.runs(SECOND):
            whole = content.read()
            Path(store._base_path, artifact).write_bytes(whole[: len(whole) // 2])
            process.end()

    def persist(storage: Any, checkpoint: Any) -> None:
        if process.runs(SECOND):
            target = Path(storage.checkpoint_fs_path)
            shutil.copytree(checkpoint.path, target, dirs_exist_ok=True)
            for file in target.glob("*.pt"):
                os.truncate(file, file.stat().st_size // 2)
            process.end()

    on(FileSystemArtifactStore, "write", before=write)
    if process.plan.engine == "ray":
        from ray.train._internal.storage import StorageContext

        on(StorageContext, "persist_current_checkpoint", before=persist)


def _between_file_and_name(process: Process) -> None:
    """Kill where a save is written whole, under the name of a partial file."""
    on(Path, "replace", before=lambda path, to: path.suffix == ".partial" and process.runs(SECOND) and process.end())


def _after_the_save(process: Process) -> None:
    on(ArtifactSaves, "save", after=lambda *_: process.runs(SECOND) and process.end())
    if process.plan.engine == "ray":
        from ray.train._internal.storage import StorageContext

        on(StorageContext, "persist_current_checkpoint", after=lambda *_: process.runs(SECOND) and process.end())


def _ends(process: Process) -> bool:
    return process.trial is not None and process.trial.completed and process.runs(process.trial.trainer.ul_step)


def _between_link_and_file(process: Process) -> None:
    """Kill at a trial's end, where its study names an artifact that is not there yet."""
    on(FileSystemArtifactStore, "write", before=lambda *_: _ends(process) and process.end())


def _after_the_last_save(process: Process) -> None:
    on(ArtifactSaves, "_upload", after=lambda *_: _ends(process) and process.end())


def _before_tell(process: Process) -> None:
    on(TrialQueue, "tell", before=lambda queue, trial, *_: process.is_in(trial) and process.end())


def _after_tell(process: Process) -> None:
    on(TrialQueue, "tell", after=lambda queue, trial, *_: process.is_in(trial) and process.end())


def _claimed(process: Process) -> None:
    """Kill who is about to put the trial of a killed one back."""
    on(leases, "put_back", before=lambda study, trial: process.is_in(trial) and process.end())


def _put_back(process: Process) -> None:
    on(leases, "put_back", after=lambda study, trial: process.is_in(trial) and process.end())


def _taken_up(process: Process) -> None:
    """Kill who has just taken up the trial of a killed one, while that one's lease stands in it."""
    on(Leases, "take", before=lambda held, trial, lease: process.is_in(trial) and process.end())


def _nowhere(process: Process) -> None:
    """Leave it to :meth:`Process.evaluates`."""


IN_A_STEP = {"in a step": signal.SIGKILL, "SIGTERM in a step": signal.SIGTERM, "Ctrl-C in a step": signal.SIGINT}
SIGNALS = tuple(IN_A_STEP)[1:]
POINTS: dict[str, Callable[[Process], None]] = {
    "just begun": _just_begun,
    "between two suggestions": _between_suggestions,
    "before the first report": _before_the_first_report,
    "in a step": _nowhere,
    "in a report": _in_a_report,
    "in a write": _in_a_write,
    "half a line": functools.partial(_in_a_write, half=True),
    "before the save": _before_the_save,
    "between file and name": _between_file_and_name,
    "half a save": _half_a_save,
    "after the save": _after_the_save,
    "between link and file": _between_link_and_file,
    "after the last save": _after_the_last_save,
    "between last report and end": _before_tell,
    "after tell": _after_tell,
    "claimed by the next": _claimed,
    "put back by the next": _put_back,
    "taken up by the next": _taken_up,
    **dict.fromkeys(SIGNALS, _nowhere),
}
# Points in the start after a kill: it is killed as well.
DOUBLE = ("claimed by the next", "put back by the next", "taken up by the next")


def has_no_place(point: str, engine: str, kind: str) -> bool:
    """Return whether a point is none of an engine on a kind of storage."""
    # Of saves at a trial's end Ray's have no link; the proxy writes, not the search; only a journal has lines.
    return (
        (engine == "ray" and point in {"between link and file", "after the last save"})
        or (kind == "grpc" and point == "in a write")
        or (kind != "journal" and point == "half a line")
    )


# ---- the process that starts them


def main() -> None:
    plan = json.loads(sys.argv[1])
    os.environ[PLAN] = sys.argv[1]
    torch.set_num_threads(1)
    statuses = []
    for start in range(len(plan["kills"]) + 1):
        child = os.fork()
        if not child:
            _search(start)
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    sys.stdout.write(json.dumps(statuses) + "\n")


def _search(start: int) -> None:
    signal.alarm(MOST_S)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ[START] = json.dumps([start, os.getpid()])
    plan = here().plan
    study = plan.study()
    trials = [] if study is None else study.get_trials(deepcopy=False)
    here().note(
        "starts",
        finished={trial.number: trial.values for trial in trials if has_ended(trial)},
        running=sum(trial.state is TrialState.RUNNING for trial in trials),
    )
    search(
        problem,
        toy.SPACE,
        settings=SETTINGS,
        backend=plan.engine,
        n_trials=plan.n_trials,
        output=plan.output,
        storage=plan.opened(),
        resume=True,
        seed=plan.seed,
        max_concurrent_trials=1,
        pruner=None if plan.prune_at is None else toy.PruneAt(plan.prune_at),
    )
    os._exit(0)


# ---- outside


@dataclass(frozen=True)
class Toll:
    """What kills have cost a search.

    Parameters
    ----------
    statuses : list of int
        With what each start ended; see :attr:`Plan.statuses`.
    lost : int
        Trials that had finished, and have not any more, or otherwise.
    twice : int
        Trials that had finished and ran again, and trials too many.
    restarted : int
        Trials that a start began from 0, or from before their last save.
    running : int
        Trials left RUNNING, after the last start or after one that a signal asked to end.
    equal : bool
        Whether the search ended in the bits of one that was left alone.
    stderr : str
        Of all of them.
    """

    statuses: list[int]
    lost: int
    twice: int
    restarted: int
    running: int
    equal: bool
    stderr: str

    @property
    def nothing(self) -> bool:
        """Whether they have cost nothing."""
        return self.equal and not (self.lost or self.twice or self.restarted or self.running)


def run_plan(plan: Plan) -> tuple[list[int], str]:
    """Run all starts of a plan; return their statuses, and what they said."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RAY_AIR_NEW_OUTPUT": "0"}
    command = [sys.executable, "-m", "tests.support.kills", json.dumps(asdict(plan))]
    root = Path(__file__).parents[2]
    ran = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    if ran.returncode != 0:
        raise RuntimeError(f"The plan {plan} could not be run: {ran.stderr}")
    return json.loads(ran.stdout.splitlines()[-1]), ran.stderr


def end_of(plan: Plan) -> dict[int, Any]:
    """Return the end of each trial of a search, by number: in the study, and what was kept in the folder."""
    study = plan.study()
    assert study is not None, "it has run"
    kept = {trial.number: trial for trial in load_search(plan.folder).trials}
    return {
        trial.number: (
            trial.state.name,
            trial.params,
            trial.values,
            trial.intermediate_values,
            trial.user_attrs.get("metrics"),
            {name: value.tolist() for name, value in kept[trial.number].ul_state.items()},
            kept[trial.number].config,
        )
        for trial in study.trials
        if trial.number in kept
    }


def toll_of(plan: Plan, unharmed: Mapping[int, Any]) -> Toll:
    """Run a plan, and return what its kills have cost a search that ends as ``unharmed`` when left alone."""
    statuses, stderr = run_plan(plan)
    events = [json.loads(line) for line in plan.log.read_text().splitlines()]
    study = plan.study()
    trials = [] if study is None else study.trials
    numbers = {seed_of(plan.seed, number): number for number in range(len(trials))}
    values = {str(trial.number): trial.values for trial in trials if has_ended(trial)}
    lost, twice, saved = set(), set(), dict[int, int]()
    restarted = running = 0
    for start in range(len(statuses)):
        mine = [event for event in events if event["start"] == start]
        finished = next(event for event in mine if event["event"] == "starts")
        lost |= {number for number, value in finished["finished"].items() if values.get(number, ()) != value}
        advances = [event for event in mine if event["event"] == "advances"]
        twice |= {str(numbers[event["seed"]]) for event in advances} & set(finished["finished"])
        began = {event["seed"]: event["step"] for event in reversed(advances)}
        restarted += sum(step < saved.get(seed, 0) for seed, step in began.items())
        saved |= {event["seed"]: event["step"] for event in mine if event["event"] == "saved"}
        if start and statuses[start - 1] >= 0:
            running += finished["running"]
    running += sum(trial.state is TrialState.RUNNING for trial in trials)
    ended = end_of(plan) if statuses[-1] == 0 else {}
    too_many = max(0, len(trials) - plan.n_trials)
    return Toll(statuses, len(lost), len(twice) + too_many, restarted, running, ended == unharmed, stderr)


if __name__ == "__main__":
    # Ray's workers import it by its name, and so does its own child.
    from tests.support import kills

    kills.main()
