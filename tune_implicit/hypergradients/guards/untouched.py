"""What a call must leave as it was."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tune_implicit.errors import InvalidValueError
from tune_implicit.hypergradients.borrowed import set_backward_hooks, take_backward_hooks, version_of
from tune_implicit.hypergradients.rng import remembered_rng
from tune_implicit.hypergradients.vectors import norm_of

__all__ = ["Fingerprint", "preserved_buffers", "preserved_modes", "untouched"]


@contextmanager
def untouched(*models: nn.Module) -> Iterator[Callable[[], None]]:
    """Leave the models' modes, buffers, gradients and hooks, and the global random state, as they were.

    Hooks on parameters, which clip gradients in training, would be part of every derivative taken inside.

    Yields
    ------
    callable
        Puts modes, buffers, ``requires_grad`` and the random state back at once, for what comes next inside.
    """
    params = [param for model in models for param in model.parameters()]
    trained = [param.requires_grad for param in params]
    taken = [(param, param.grad, take_backward_hooks(param)) for param in params]
    for param in params:
        param.grad = None
    modules = [module for model in models for module in model.modules()]
    modes = [module.training for module in modules]
    put_back_buffers = _remembered_buffers(modules)
    put_back_rng = remembered_rng()

    def put_back() -> None:
        put_back_rng()
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
        for param, requires_grad in zip(params, trained, strict=True):
            param.requires_grad_(requires_grad)
        put_back_buffers()

    try:
        yield put_back
    finally:
        put_back()
        for param, gradient, hooks in taken:
            param.grad = gradient
            set_backward_hooks(param, hooks)


def _remembered_buffers(modules: Sequence[nn.Module]) -> Callable[[], None]:
    """Return a function that puts the modules' buffers back to what they are now."""
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in modules
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False)
    ]

    def put_back() -> None:
        for module, name, buffer, value in buffers:
            setattr(module, name, buffer)
            if _is_writable(buffer):
                # Through `data`, which is no edit: a graph may hold the buffer, and a parameter may share its memory.
                buffer.data.copy_(value)

    return put_back


def _is_writable(buffer: Tensor) -> bool:
    """Return whether a tensor can be written to as a whole; where it cannot, nobody has done so."""
    return not buffer.is_inference() and (buffer.layout is not torch.strided or 0 not in buffer.stride())


@contextmanager
def preserved_modes(*models: nn.Module) -> Iterator[None]:
    """Leave the training modes of the models' modules as they were."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def preserved_buffers(*models: nn.Module) -> Iterator[None]:
    """Leave the buffers of the models, such as the running statistics of BatchNorm, as they were."""
    put_back = _remembered_buffers([module for model in models for module in model.modules()])
    try:
        yield
    finally:
        put_back()


class Fingerprint:
    """What an edit of parameters changes: their versions, and their norm, as writing to ``.data`` leaves no version."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._params = params
        self._versions, self.norm = [version_of(param) for param in params], self._norm()

    def check(self) -> None:
        """Check that no objective has written into a parameter.

        Raises
        ------
        InvalidValueError
            If one has: the two losses, or a loss and its derivatives, then belong to two points.
        """
        same = self._norm() == self.norm or math.isnan(self.norm)
        if not same or self._versions != [version_of(param) for param in self._params]:
            raise InvalidValueError(
                "An objective changed a parameter in place, so that its derivatives belong to no one point. Project or "
                "clip parameters after the optimizer's step, and use Embedding without max_norm."
            )

    def _norm(self) -> float:
        return norm_of([param.detach() for param in self._params]).item()
