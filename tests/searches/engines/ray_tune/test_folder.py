"""Where Ray Tune leaves a trial."""

import subprocess
import sys
from pathlib import Path

from tune_implicit.searches.engines.ray_tune.folder import saved

ROOM = saved.__module__


def test_a_trials_files_are_found_and_no_others(tmp_path: Path) -> None:
    # As Tune names them: the trainable, the trial's id, its number, what it varies and when it began.
    for name in ("_inner_2f1c_00001_1_k=3_2026-11-24_04-12-40", "_inner_2f1c_00002_2_k=3_2026-11-24_04-12-41"):
        for checkpoint in ("checkpoint_000000", "checkpoint_000001"):
            (tmp_path / "ray" / name / checkpoint).mkdir(parents=True)
            (tmp_path / "ray" / name / checkpoint / "trial.pt").touch()
    (tmp_path / "ray" / "_inner_2f1c_00001_1_k=3_2026-11-24_04-12-40" / "result.json").touch()
    files = saved(tmp_path, "2f1c_00001")
    assert [(file.parts[-3][:19], file.parts[-2], file.name) for file in files] == [
        ("_inner_2f1c_00001_1", "checkpoint_000000", "trial.pt"),
        ("_inner_2f1c_00001_1", "checkpoint_000001", "trial.pt"),
    ]


def test_ray_is_not_needed_to_find_them() -> None:
    code = f"import sys, {ROOM}; print('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
