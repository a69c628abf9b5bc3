import copy
import dataclasses
import json
import math
import pickle
from types import SimpleNamespace

import numpy as np
import pytest

from tune_implicit.hypergradients.settings import SOLVERS, make_solver
from tune_implicit.hypergradients.solvers.conjugate_gradient import ConjugateGradient
from tune_implicit.hypergradients.solvers.dense import DenseSolve
from tune_implicit.hypergradients.solvers.fallback import Damped
from tune_implicit.hypergradients.solvers.minres import Minres
from tune_implicit.hypergradients.solvers.neumann import NeumannSeries
from tune_implicit.trials.config import TrackedConfig
from tune_implicit.trials.settings import ImplicitSettings

# ---- the settings


def test_from_config_takes_its_own_and_leaves_the_rest() -> None:
    settings = ImplicitSettings.from_config({"k": 3, "solver": "cg", "width": 64})
    assert settings == ImplicitSettings(k=3, solver="cg")


def test_numbers_of_search_engines_become_plain_ones() -> None:
    # Ray's quantised samplers return whole floats, NumPy's generators their own types.
    settings = ImplicitSettings(
        k=np.int64(3), ll_steps=5.0, seed=np.uint8(7), rtol=np.float32(0.5), tolerance=0, solver=np.str_("cg")
    )
    assert [settings.k, settings.ll_steps, settings.seed, settings.rtol, settings.tolerance] == [3, 5, 7, 0.5, 0.0]
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        assert type(value) is field.type or field.name == "step_size"
    assert type(ImplicitSettings(step_size=np.float32(0.5)).step_size) is float
    assert type(ImplicitSettings(verify=np.bool_(True)).verify) is bool


@pytest.mark.parametrize(
    ("name", "values", "rule"),
    [
        ("solver", ["CG", ""], "one of cg, minres, neumann, dense"),
        ("k", [-1], "0 or more"),
        ("tolerance", [-1e-9, math.nan], "0 or more"),
        ("rtol", [-1e-9, math.nan], "0 or more"),
        ("ll_learning_rate", [0.0, -1.0, math.inf, math.nan], "positive and finite"),
        ("ul_learning_rate", [-1.0, math.inf, math.nan], "0 or more and finite"),
        ("ll_steps", [-1], "0 or more"),
        ("ul_steps", [0, -1], "1 or more"),
        ("warmup_ll_steps", [-1], "0 or more"),
        ("ul_steps_per_report", [0], "1 or more"),
        ("on_failure", ["ignore"], "one of skip, raise, fallback, stop"),
        ("seed", [-1], "0 or more"),
    ],
)
def test_message_of_a_value_out_of_range(name: str, values: list, rule: str) -> None:
    for value in values:
        with pytest.raises(ValueError, match=f"^`{name}` must be {rule}, got {value!r}\\.$"):
            ImplicitSettings(**{name: value})


@pytest.mark.parametrize(
    ("name", "values", "rule"),
    [
        ("k", [1.5, "3", True, None, math.nan, math.inf, [3]], "an integer"),
        ("tolerance", ["1e-3", True, None], "a number"),
        ("solver", [None, 3, ConjugateGradient(1)], "a string"),
    ],
)
def test_message_of_a_wrong_type(name: str, values: list, rule: str) -> None:
    for value in values:
        with pytest.raises(TypeError, match=f"`{name}` must be {rule}, got "):
            ImplicitSettings(**{name: value})


def test_several_mistakes_are_told_in_one_error() -> None:
    with pytest.raises(ValueError, match=r"`k` must be .* -1\. `ul_steps` must be .* 0\. `on_failure` must be"):
        ImplicitSettings(k=-1, ul_steps=0, on_failure="hope")


# ---- solvers by name


def test_make_solver() -> None:
    stopping = (3, 1e-3, 1e-2)
    expected = [ConjugateGradient(*stopping), Minres(*stopping), NeumannSeries(0.5, *stopping), DenseSolve()]
    assert [make_solver(name, 0.5, *stopping) for name in SOLVERS] == expected
    assert make_solver(expected[0], 1.0, 1, 0.0, 0.0) is expected[0]


@pytest.mark.parametrize("name", SOLVERS)
def test_fallback_goes_from_the_solver_to_the_identity(name: str) -> None:
    chain = make_solver(name, 0.5, 3, 1e-3, 1e-2, fallback=True).solvers
    assert list(chain) == [name, *(other for other in ("minres", "damped", "identity") if other != name)]
    assert chain["damped"] == Damped(ConjugateGradient(3, 1e-3, 1e-2))
    assert chain["identity"] == NeumannSeries(0.5, 0)


def test_messages_of_make_solver() -> None:
    with pytest.raises(ValueError, match="must be one of cg, minres, neumann, dense, or an object, got 'gmres'"):
        make_solver("gmres", 1.0, 1, 0.0, 0.0)
    with pytest.raises(TypeError, match=r"an object with `solve\(hvp, b, v0=None\)`, got 3"):
        make_solver(3, 1.0, 1, 0.0, 0.0)


# ---- which keys were read


def read_by_get(config):
    assert config.get("width") == 64
    assert config.get("height") is None
    assert config.get("depth", 7) == 2


READS_OF_EVERYTHING = {
    "index": lambda config: (config["width"], config["depth"]),
    "get": read_by_get,
    "pop": lambda config: (config.pop("width"), config.pop("depth"), config.pop("height", None)),
    "iteration": list,
    "keys": lambda config: config.keys(),
    "values": lambda config: config.values(),
    "items": lambda config: config.items(),
    "dict": dict,
    "** to a call": lambda config: SimpleNamespace(**config),
    "** to a dict": lambda config: {**config},
    "| on the left": lambda config: config | {},
    "| on the right": lambda config: {} | config,
    "update": lambda config: {}.update(config),
    "copy": lambda config: config.copy(),
    "copy.copy": copy.copy,
    "json": json.dumps,
    "pickle": pickle.dumps,
    "setdefault": lambda config: (config.setdefault("width", 1), config.setdefault("depth", 1)),
    "format_map": "{width} {depth}".format_map,
}


@pytest.mark.parametrize("read", READS_OF_EVERYTHING.values(), ids=READS_OF_EVERYTHING)
def test_every_way_to_read_counts(read) -> None:
    config = TrackedConfig({"width": 64, "depth": 2, "k": 3})
    read(config)
    config.check_all_read()


def test_pattern_matching_reads() -> None:
    config = TrackedConfig({"width": 64})
    match config:
        case {"width": width}:
            assert width == 64
    config.check_all_read()


@pytest.mark.parametrize("look", [len, bool, lambda config: "width" in config], ids=["len", "bool", "in"])
def test_looking_is_not_reading(look) -> None:
    config = TrackedConfig({"width": 64})
    look(config)
    with pytest.raises(ValueError, match=r"No one reads the config's 'width'\. Read it in your problem's factory"):
        config.check_all_read()


def test_settings_need_no_reader() -> None:
    TrackedConfig({field.name: None for field in dataclasses.fields(ImplicitSettings)}).check_all_read()


def test_message_of_unread_keys_suggests_a_setting() -> None:
    config = TrackedConfig({"ll_learning_rates": 0.1, "colour": "red", "width": 64, "k": 3})
    assert config["width"] == 64
    with pytest.raises(
        ValueError, match=r"'colour', 'll_learning_rates' \(did you mean 'll_learning_rate'\?\)\. .*seed\.$"
    ):
        config.check_all_read()


def test_a_missing_key_is_a_key_error() -> None:
    with pytest.raises(KeyError, match="height"):
        TrackedConfig({"width": 64})["height"]


def test_a_tracked_config_is_a_dict() -> None:
    config = TrackedConfig({"width": 64})
    assert isinstance(config, dict)
    assert config == {"width": 64}
    assert type(config.copy()) is dict
