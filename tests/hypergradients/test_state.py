import pytest
import torch
from torch import Tensor, nn

from tests.support.problems import Values
from tune_implicit.errors import InvalidTypeError, InvalidValueError
from tune_implicit.hypergradients.state import State, check_models, named_trainable

UL, LL = Values(l=torch.ones(2)), Values(w=torch.ones(3))


def frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False)


# ---- what an objective is called with


def test_a_part_of_a_state_has_two_spellings() -> None:
    state = State("data", "target", UL, LL)
    for name in ("data", "target", "ul_model", "ll_model"):
        assert state[name] is getattr(state, name)


@pytest.mark.parametrize("name", ["model", "__class__", "__getitem__", 0])
def test_message_of_a_part_that_a_state_does_not_have(name: object) -> None:
    with pytest.raises(KeyError, match=f"{name!r}: a state holds batch, data, target, ul_model, ll_model"):
        State(None, None, UL, LL)[name]


def test_an_objective_cannot_change_its_state() -> None:
    with pytest.raises(AttributeError, match="A state cannot be changed, got 'data'"):
        State(None, None, UL, LL).data = 1


# ---- what the models must be


def test_trainable_parameters_by_name() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].bias.requires_grad_(False)
    model[1].weight = model[0].weight
    got = named_trainable(model)
    assert list(got) == ["0.weight", "1.bias"]
    assert got["0.weight"] is model[0].weight


@pytest.mark.parametrize(
    ("ul_model", "ll_model"),
    [
        (UL, LL),
        (Values(l=torch.ones(2), c=torch.ones(0)), LL),
        (Values(l=torch.ones(2).double()), LL),
        (UL, Values(w=torch.ones(3, dtype=torch.bfloat16))),
    ],
    ids=["plain", "with an empty parameter", "two dtypes", "bfloat16"],
)
def test_models_that_form_a_problem(ul_model: nn.Module, ll_model: nn.Module) -> None:
    check_models(ul_model, ll_model)


def test_a_frozen_parameter_may_be_shared_complex_and_elsewhere() -> None:
    shared = nn.Parameter(torch.ones(1, dtype=torch.complex64, device="meta"), requires_grad=False)
    models = Values(l=torch.ones(2)), Values(w=torch.ones(3))
    for model in models:
        model.register_parameter("shared", shared)
    check_models(*models)


@pytest.mark.parametrize("level", ["ul", "ll"])
@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        ([], InvalidTypeError, "must be a torch.nn.Module, got list"),
        (Values, InvalidTypeError, "must be a torch.nn.Module, got type"),
        (nn.Tanh(), InvalidValueError, "has no parameter to train. Register its values as nn.Parameter"),
        (frozen(Values(w=torch.ones(1))), InvalidValueError, "has no parameter to train.* requires_grad=True"),
        (Values(w=torch.ones(0, 3)), InvalidValueError, "has no parameter to train"),
        (
            Values(z=torch.ones(1, dtype=torch.complex64)),
            InvalidTypeError,
            "'s parameter 'z' must be real and floating, got torch.complex64",
        ),
    ],
)
def test_messages_of_one_model(level: str, model: object, error: type[Exception], message: str) -> None:
    models = {"ul": UL, "ll": LL} | {level: model}
    with pytest.raises(error, match=f"^`{level}_model` ?{message}"):
        check_models(models["ul"], models["ll"])


def test_message_of_models_that_share_a_parameter() -> None:
    shared = Values(w=torch.ones(1))
    with pytest.raises(InvalidValueError, match=r"share the parameter 'w' \(`ll_model`'s '0.w'\).* freeze it with"):
        check_models(shared, nn.Sequential(shared))


@pytest.mark.parametrize(("ul_device", "ll_device"), [("meta", "cpu"), ("cpu", "meta")])
def test_message_of_models_on_two_devices(ul_device: str, ll_device: str) -> None:
    def on(device: str) -> Tensor:
        return torch.ones(1, device=device)

    with pytest.raises(
        InvalidValueError,
        match=f"one device, got `ul_model`'s 'l' on {ul_device}, `ll_model`'s 'w' on {ll_device}. Move both models",
    ):
        check_models(Values(l=on(ul_device)), Values(w=on(ll_device)))


def test_message_of_one_model_on_two_devices() -> None:
    model = Values(w=torch.ones(1), far=torch.ones(1, device="meta"))
    with pytest.raises(InvalidValueError, match="`ll_model`'s 'far' on meta"):
        check_models(UL, model)
