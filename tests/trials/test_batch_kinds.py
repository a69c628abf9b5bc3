"""Batches of every kind, in everything that a trial does with them: right, or refused by name."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from tests.support.batches import KINDS, PLAIN, Encoding, Kind, Pair, Split, Triple, by_attribute, by_key, loader
from tests.support.noisy import assert_same_bits
from tests.support.problems import F64, Values, generator
from tests.support.systems import saved_and_loaded
from tests.support.working import SETTINGS as WORKING
from tune_implicit import BilevelProblem, ImplicitSettings, State, check
from tune_implicit.errors import InvalidTypeError, InvalidValueError
from tune_implicit.hypergradients.batches import Batch
from tune_implicit.hypergradients.rng import seed_everything
from tune_implicit.trials.evaluation import evaluate, measure
from tune_implicit.trials.trainer import BilevelTrainer

D = 4
SETTINGS = ImplicitSettings(
    solver="cg", k=4, ll_steps=3, warmup_ll_steps=2, ll_learning_rate=0.05, ul_learning_rate=0.1
)
NOISE = replace(SETTINGS, stop="noise", rtol=1e-12)
SEVERAL = replace(SETTINGS, ll_steps="auto", min_ll_steps=2, max_ll_steps=5, ul_batches=2, accumulate=2)

each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def split_of(kind: Kind, seed: int, *sizes: int) -> Any:
    random, batches = generator(seed), []
    for size in sizes:
        x = torch.randn(size, D, generator=random, dtype=F64)
        batches.append(kind.make(x, x[:, :2].sum(1, keepdim=True) + torch.randn(size, 1, generator=random, dtype=F64)))
    return batches if kind.listed else Split(batches)


def problem_of(read: Callable[[State], tuple[Tensor, Tensor]], **parts: Any) -> BilevelProblem:
    def ul_objective(state: State) -> Tensor:
        x, y = read(state)
        return mse_loss(state.ll_model(x), y)

    def ll_objective(state: State) -> Tensor:
        return ul_objective(state) + (state.ul_model.log_l2.exp() * state.ll_model[0].weight.square()).sum()

    def error(state: State) -> Tensor:
        x, y = read(state)
        return (state.ll_model(x) - y).abs().mean()

    seed_everything(0)
    models = {
        "ul_model": Values(log_l2=torch.full((D,), -1.0, dtype=F64)),
        "ll_model": nn.Sequential(nn.Linear(D, 3), nn.Dropout(0.2), nn.Tanh(), nn.Linear(3, 1)).to(F64),
    }
    return BilevelProblem(
        ul_objective=ul_objective, ll_objective=ll_objective, metrics={"error": error}, **models | parts
    )


def problem(kind: Kind) -> BilevelProblem:
    return problem_of(
        kind.read,
        train_data=split_of(kind, 0, 6, 6, 6, 6),
        validate_data=split_of(kind, 1, 7, 7),  # whose halves differ
        select_data=split_of(kind, 2, 5, 3, 1),  # which a mean over batches weighs
    )


def trainer(kind: Kind, settings: ImplicitSettings = SETTINGS) -> BilevelTrainer:
    return BilevelTrainer(problem(kind), settings)


def assert_same(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def weights(one: BilevelTrainer) -> list[dict[str, Tensor]]:
    return [copy.deepcopy(model.state_dict()) for model in (one.problem.ul_model, one.problem.ll_model)]


def plain(kind: Kind) -> Kind:
    """Pairs, in a split that is read as that kind's is."""
    return replace(PLAIN, listed=kind.listed)


# ---- the table


@each_kind
def test_ll_steps(kind: Kind) -> None:
    def trained(one: Kind) -> tuple[float, Any]:
        ll = trainer(one)
        return ll.train_ll(5), weights(ll)

    assert_same(trained(kind), trained(plain(kind)))
    assert not torch.equal(trained(PLAIN)[1][1]["0.weight"], weights(trainer(PLAIN))[1]["0.weight"])


def steps_of(kind: Kind, settings: ImplicitSettings, steps: int = 3) -> tuple[list[Any], Any]:
    """The solution, the gradients and the noise of each ul step's hypergradient, and the weights after them."""
    one, seen = trainer(kind, settings), []
    for _ in range(steps):
        result = one.step().hypergradient
        assert not result.status.failed
        assert result.norm > 0
        seen.append((result.v, result.gradients, result.noise_norm))
    return seen, weights(one)


def assert_same_steps(kind: Kind, settings: ImplicitSettings) -> None:
    (got, got_weights), (expected, expected_weights) = steps_of(kind, settings), steps_of(plain(kind), settings)
    for (v, gradients, noise), (plain_v, plain_gradients, plain_noise) in zip(got, expected, strict=True):
        assert_same(v, plain_v)
        assert_same(gradients, plain_gradients)
        assert noise == pytest.approx(plain_noise, rel=1e-12, nan_ok=True)
        assert (noise > 0) == (settings.stop == "noise")
    assert_same(got_weights, expected_weights)


@each_kind
@pytest.mark.parametrize("settings", [SETTINGS, SEVERAL], ids=["one batch", "several batches"])
def test_hypergradients(kind: Kind, settings: ImplicitSettings) -> None:
    assert_same_steps(kind, settings)


@each_kind
def test_evaluation(kind: Kind) -> None:
    one = problem(plain(kind))
    measured = measure(problem(kind))
    assert measured == pytest.approx(measure(one), rel=1e-12)
    whole = [tuple(torch.cat(parts) for parts in zip(*split_of(PLAIN, 2, 5, 3, 1), strict=True))]
    assert evaluate(one, "x", whole, dict(one.metrics))["error"] == pytest.approx(measured["error"], rel=1e-12)


@each_kind
def test_metrics_of_a_whole_split(kind: Kind) -> None:
    def metrics(states: Any) -> dict[str, float]:
        return {"sum": sum(kind.read(state)[1].sum().item() for state in states)}

    expected = sum(y.sum().item() for _, y in split_of(PLAIN, 2, 5, 3, 1))
    assert measure(replace(problem(kind), metrics=metrics))["sum"] == pytest.approx(expected, rel=1e-12)


@each_kind
def test_noise_of_halves(kind: Kind) -> None:
    if not kind.uncut:
        assert_same_steps(kind, NOISE)
        return
    with pytest.raises(InvalidValueError, match=f"2 or more examples, got a {kind.uncut}, which cannot be halved"):
        trainer(kind, NOISE).step()


@each_kind
def test_noise_of_several_batches(kind: Kind) -> None:
    """What cannot be halved has the noise of the spread between batches, as the message advises."""
    assert_same_steps(kind, replace(NOISE, ul_batches=2))


@each_kind
def test_resume(kind: Kind) -> None:
    whole = trainer(kind, SEVERAL)
    for step in range(4):
        if step == 2:
            saved = saved_and_loaded(whole.state_dict())
        whole.step()
    end = saved_and_loaded(whole.state_dict())
    resumed = trainer(kind, SEVERAL)
    resumed.load_state_dict(saved)
    for _ in range(2):
        resumed.step()
    assert_same_bits(resumed.state_dict(), end)
    assert_same(weights(resumed), steps_of(plain(kind), SEVERAL, 4)[1])


@each_kind
def test_an_ll_step_of_ones_own(kind: Kind) -> None:
    def trained(one: Kind) -> list[dict[str, Tensor]]:
        def ll_step(state: State, optimizer: torch.optim.Optimizer) -> Tensor:
            x, y = one.read(state)
            optimizer.zero_grad()
            loss = mse_loss(state.ll_model(x), y)
            loss.backward()
            optimizer.step()
            return loss

        trainer = BilevelTrainer(replace(problem(one), ll_step=ll_step), SETTINGS)
        trainer.train_ll(5)
        return weights(trainer)

    assert_same(trained(kind), trained(plain(kind)))


def test_batches_that_are_tensors_are_not_listed_bare() -> None:
    """A list of tensors may be one pair."""
    with pytest.raises(InvalidTypeError, match=r"got a list of 4 tensors\. .*pass \[\[x\] for x in"):
        problem(replace(KINDS["tensor"], listed=True))


# ---- moved to where the models are


class SeenError(Exception):
    """What an objective raises once it has seen where its batch is."""


def there(kind: Kind) -> BilevelProblem:
    """A problem whose models are on the meta device, where nothing can be computed, and whose batches are not."""

    def seen(state: State) -> Tensor:
        assert {tensor.device.type for tensor in kind.read(state)} == {"meta"}
        raise SeenError

    one = problem(kind)
    models = {name: getattr(one, name).to("meta") for name in ("ul_model", "ll_model")}
    return replace(one, ll_objective=seen, ul_objective=seen, **models)


@each_kind
@pytest.mark.parametrize("cell", ["ll step", "hypergradient", "evaluation"])
def test_batches_are_moved_to_the_models(kind: Kind, cell: str) -> None:
    one = there(kind)

    def run() -> None:
        if cell == "evaluation":
            measure(one)
            return
        trainer = BilevelTrainer(one, SETTINGS)
        if cell == "ll step":
            trainer.train_ll(1)
        else:  # nothing more can be done without values
            (level,) = trainer.levels
            one.ul_objective(level._state(level._next(level._validate)))

    if kind.unmoved:
        with pytest.raises(InvalidTypeError, match=kind.unmoved):
            run()
        return
    with pytest.raises(SeenError):
        run()
    for name in ("train_data", "validate_data", "select_data"):
        for batch in getattr(one, name):
            read = kind.read(State.of(batch, one.ul_model, one.ll_model))
            assert {tensor.device.type for tensor in read} == {"cpu"}


# ---- what loaders make


def examples(seed: int, n: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(*split_of(PLAIN, seed, n)[0], strict=True))


COLLATED = {
    "dict": (lambda x, y: {"x": x, "y": y, "name": "word", "number": 3}, by_key),
    "named pair": (Pair, lambda s: (s.data, s.target)),
    "named triple": (lambda x, y: Triple(x, y, 7), by_attribute),
    "list of three": (lambda x, y: [x, y, "word"], lambda s: (s.batch[0], s.batch[1])),
    "nested": (lambda x, y: ({"x": x}, {"y": y}), lambda s: (s.data["x"], s.target["y"])),
}


@pytest.mark.parametrize("settings", [NOISE, SEVERAL], ids=["noise", "several batches"])
@pytest.mark.parametrize("collated", COLLATED.values(), ids=COLLATED)
def test_shuffling_loaders(collated: tuple[Callable, Callable], settings: ImplicitSettings) -> None:
    def made(make: Callable, read: Callable) -> BilevelTrainer:
        loaders = {
            f"{name}_data": loader([make(*example) for example in examples(seed, 24)], shuffle=name != "select")
            for seed, name in enumerate(("train", "validate", "select"))
        }
        return BilevelTrainer(problem_of(read, **loaders), settings)

    ends = []
    for one in ((lambda x, y: (x, y), lambda s: (s.data, s.target)), collated):
        whole = made(*one)
        for step in range(4):
            if step == 2:
                saved = saved_and_loaded(whole.state_dict())
            whole.step()
        ends.append((weights(whole), measure(whole.problem)))
    assert_same(ends[1], ends[0])
    end = saved_and_loaded(whole.state_dict())
    resumed = made(*collated)
    resumed.load_state_dict(saved)
    for _ in range(2):
        resumed.step()
    assert_same_bits(resumed.state_dict(), end)


# ---- sequences of several lengths, in a recurrent model


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.last = nn.RNN(D, 3, batch_first=True), nn.Linear(3, 1)

    def forward(self, x: PackedSequence | Tensor) -> Tensor:
        return self.last(self.rnn(x)[1][0])


def recurrent(pack: bool, settings: ImplicitSettings = SETTINGS) -> BilevelTrainer:
    def objective(state: State) -> Tensor:
        x = state.data
        outputs = state.ll_model(x) if pack else torch.cat([state.ll_model(one[None]) for one in x])
        return mse_loss(outputs, state.target)

    def penalised(state: State) -> Tensor:
        return objective(state) + state.ul_model.log_l2.exp() * state.ll_model.last.weight.square().sum()

    def split(seed: int, *counts: int) -> list[Batch]:
        random = generator(seed)
        batches = []
        for count in counts:
            x = [torch.randn(length, D, generator=random, dtype=F64) for length in range(1, count + 1)]
            y = torch.stack([one.sum() for one in x])[:, None].tanh()
            batches.append((pack_sequence(x, enforce_sorted=False) if pack else x, y))
        return batches

    seed_everything(0)
    problem = BilevelProblem(
        ul_model=Values(log_l2=torch.tensor(-1.0, dtype=F64)),
        ll_model=Recurrent().to(F64),
        ul_objective=objective,
        ll_objective=penalised,
        train_data=split(0, 4, 4),
        validate_data=split(1, 5),
        select_data=split(2, 3, 1),
    )
    return BilevelTrainer(problem, settings)


def test_packed_sequences_are_as_one_after_another() -> None:
    got, expected = recurrent(pack=True), recurrent(pack=False)  # which draw nothing
    for _ in range(2):
        one, other = got.step().hypergradient, expected.step().hypergradient
        assert_same(one.gradients, other.gradients)
    assert other.norm > 0
    assert_same(weights(got), weights(expected))
    assert measure(got.problem) == pytest.approx(measure(expected.problem), rel=1e-12)


# ---- the tokenizer's own


def test_batches_of_a_tokenizer() -> None:
    transformers = pytest.importorskip("transformers")
    kind = Kind(lambda x, y: transformers.BatchEncoding({"x": x, "y": y}), lambda s: (s.batch.x, s.batch["y"]))
    assert_same_steps(kind, NOISE)
    assert measure(problem(kind)) == pytest.approx(measure(problem(PLAIN)), rel=1e-12)
    with pytest.raises(SeenError):
        measure(there(kind))


# ---- hypergradients without a trial


@each_kind
def test_a_batch_is_all_that_compute_gradients_needs(kind: Kind) -> None:
    def computed(one: Kind) -> dict[str, Tensor]:
        one = problem(one)
        (validate, *_), (train, *_) = one.validate_data, one.train_data
        return (
            one.implicit(solver="cg", k=4, ll_learning_rate=0.1).compute_gradients(validate, train_data=train).gradients
        )

    assert_same(computed(kind), computed(plain(kind)))


def test_a_batch_beside_a_pair() -> None:
    one = problem_of(
        lambda s: by_key(s) if isinstance(s.batch, Encoding) else (s.data, s.target),
        train_data=split_of(PLAIN, 0, 6),
        validate_data=split_of(PLAIN, 1, 7),
    )
    ((x, y),), ((x_validate, y_validate),) = one.train_data, one.validate_data
    implicit = one.implicit(solver="cg", k=4, ll_learning_rate=0.1, warm_start=False)
    expected = implicit.compute_gradients(x_validate, y_validate, train_data=x, train_target=y)
    for arguments in (
        {"validate_data": Encoding(x=x_validate, y=y_validate), "train_data": x, "train_target": y},
        {"validate_data": x_validate, "validate_target": y_validate, "train_data": Encoding(x=x, y=y)},
        {"validate_data": (x_validate, y_validate), "train_data": [x, y]},
    ):
        assert_same(implicit.compute_gradients(**arguments).gradients, expected.gradients)


def test_a_target_of_none_is_one() -> None:
    seen: list[Batch] = []

    def objective(state: State) -> Tensor:
        seen.append(state.batch)
        return (state.ll_model.w * state.data).square().sum() + state.ul_model.l.square().sum()

    one = BilevelProblem(
        ul_model=Values(l=torch.ones(2)),
        ll_model=Values(w=torch.ones(2)),
        ul_objective=objective,
        ll_objective=objective,
        train_data=[(torch.ones(2), None)],
        validate_data=[(torch.ones(2), None)],
    ).implicit(k=1, ll_learning_rate=0.1)
    x = torch.ones(2)
    one.compute_gradients(x, None, train_data=x)
    (validate_x, validate_none), train = seen[0], seen[-1]
    assert validate_x is x
    assert validate_none is None
    assert train is x


# ---- a check


@pytest.mark.parametrize("name", ["dict", "encoding", "frozen dataclass", "triple with an index", "tensor", "packed"])
def test_a_check_of_a_problem_with_such_batches_passes(name: str) -> None:
    kind = KINDS[name]

    def made(one: Kind) -> BilevelProblem:
        splits = {name: split_of(one, seed, 60) for seed, name in enumerate(("train_data", "validate_data"))}
        parts = problem_of(one.read, **splits, select_data=split_of(one, 2, 60))
        torch.manual_seed(0)
        return replace(parts, ll_model=nn.Sequential(nn.Linear(D, 1)).to(F64))

    report, expected = check(made(kind), WORKING), check(made(PLAIN), WORKING)
    assert expected.passed
    assert report.passed, str(report)
    named = [[(finding.name, finding.level) for finding in one.findings] for one in (report, expected)]
    assert named[0] == named[1]


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("name", ["graphs", "namespace", "returns nothing", "proxy"])
def test_a_check_of_a_problem_whose_batches_it_cannot_double(name: str, dtype: torch.dtype) -> None:
    """What trains is no fault: where derivatives cannot be compared in float64, a warning may say so."""
    kind = replace(KINDS[name], make=lambda x, y: KINDS[name].make(x.to(dtype), y.to(dtype)))
    splits = {f"{which}_data": split_of(kind, seed, 60) for seed, which in enumerate(("train", "validate", "select"))}
    one = problem_of(kind.read, **splits)
    one = replace(one, ul_model=one.ul_model.to(dtype), ll_model=nn.Sequential(nn.Linear(D, 1)).to(dtype))
    report = check(one, WORKING)
    assert report.passed, str(report)


@pytest.mark.parametrize(
    ("name", "part"),
    [("dict", "'y'"), ("encoding", "'y'"), ("tuple", "target"), ("dataclass", "batch"), ("tensor", "batch")],
)
def test_a_check_tells_where_no_number_is(name: str, part: str) -> None:
    kind = KINDS[name]
    x, y = split_of(PLAIN, 0, 60)[0]
    y[5] = math.nan
    one = problem_of(kind.read, train_data=[kind.make(x, y)], validate_data=split_of(kind, 1, 60))
    report = check(one, WORKING)
    assert not report.passed
    assert f"The {part} of `train_data` holds 1 that is NaN, of" in str(report)
    assert "'x' of" not in str(report)
