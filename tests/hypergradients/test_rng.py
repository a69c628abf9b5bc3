import io
import random

import numpy as np
import pytest
import torch

from tune_implicit.hypergradients.rng import (
    get_rng_state,
    preserved_rng,
    same_rng_state,
    seed_everything,
    set_rng_state,
)


def draw() -> tuple[float, ...]:
    # Gaussians too: Python and NumPy keep the second of a pair for the next call.
    return (
        random.random(),
        random.gauss(0, 1),
        np.random.rand(),  # noqa: NPY002 - the global generators are the subject
        np.random.randn(),  # noqa: NPY002
        torch.rand(()).item(),
        torch.randn(()).item(),
    )


@pytest.mark.parametrize("seed", [0, 7, 2**32 + 7, 2**63])
def test_a_seed_decides_every_draw(seed: int) -> None:
    seed_everything(seed)
    first = draw()
    seed_everything(seed)
    assert draw() == first
    seed_everything(seed + 1)
    assert all(a != b for a, b in zip(draw(), first, strict=True))


def test_state_is_plain_data_and_restores_every_generator() -> None:
    draw()
    file = io.BytesIO()
    torch.save(get_rng_state(), file)
    expected = [draw() for _ in range(3)]
    file.seek(0)
    set_rng_state(torch.load(file, weights_only=True))
    assert [draw() for _ in range(3)] == expected


def test_a_taken_state_does_not_move() -> None:
    state = get_rng_state()
    first = draw()
    set_rng_state(state)
    draw()
    set_rng_state(state)
    assert draw() == first


def test_a_state_of_more_devices_than_there_are() -> None:
    set_rng_state(get_rng_state() | {"cuda": [torch.zeros(16, dtype=torch.uint8)] * torch.cuda.device_count()})
    if not torch.cuda.is_available():
        set_rng_state(get_rng_state() | {"cuda": [torch.zeros(16, dtype=torch.uint8)] * 8})


@pytest.mark.parametrize("fails", [False, True])
def test_preserved_rng(fails: bool) -> None:
    seed_everything(3)
    expected = draw()
    seed_everything(3)
    try:
        with preserved_rng():
            seed_everything(4)
            draw()
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert draw() == expected


def test_same_rng_state_is_one_from_which_nothing_was_drawn() -> None:
    for drawn in (random.random, np.random.rand, lambda: torch.randn(())):
        before = get_rng_state()
        assert same_rng_state(before, get_rng_state())
        drawn()
        assert not same_rng_state(before, get_rng_state())
    assert same_rng_state(None, None)
    assert not same_rng_state(None, before)
