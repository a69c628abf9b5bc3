import copy
import json
import pickle
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from tune_implicit.trials.config import TrackedConfig, merged
from tune_implicit.trials.settings import SETTINGS


def test_what_the_search_picked_overrides_the_settings() -> None:
    assert merged({"k": 1, "seed": 3}, {"k": 2, "width": 64}) == {"k": 2, "seed": 3, "width": 64}
    assert merged(None, {"k": 2}) == {"k": 2}


def read_by_get(config: TrackedConfig) -> None:
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
def test_every_way_to_read_counts(read: Callable[[TrackedConfig], object]) -> None:
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
def test_looking_is_not_reading(look: Callable[[TrackedConfig], object]) -> None:
    config = TrackedConfig({"width": 64})
    look(config)
    with pytest.raises(ValueError, match=r"No one reads the config's 'width'\. Read it in your problem's factory"):
        config.check_all_read()


def test_settings_need_no_reader() -> None:
    TrackedConfig(dict.fromkeys(SETTINGS)).check_all_read()


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
