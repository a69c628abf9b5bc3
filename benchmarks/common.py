"""What the benchmarks share: a penalised problem, Fashion-MNIST, and the page on which results are written."""

import gzip
import platform
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor, nn

from tune_implicit.hypergradients.state import State

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


class LogL2(nn.Module):
    """The penalty ``sum exp(l) w^2``, with an ``l`` per entry of the ll model, per tensor of it, or a single one."""

    def __init__(self, ll_model: nn.Module, log_l2: float, per: str = "entry") -> None:
        super().__init__()
        shapes = [w.shape if per == "entry" else () for w in ll_model.parameters()]
        self.log_l2 = nn.ParameterList(torch.full(shape, log_l2) for shape in shapes[: 1 if per == "model" else None])

    def forward(self, ll_model: nn.Module) -> Tensor:
        """Return the penalty of ``ll_model``."""
        pairs = zip(cycle(self.log_l2), ll_model.parameters(), strict=False)
        return sum((log_l2.exp() * w**2).sum() for log_l2, w in pairs)


@dataclass
class Problem:
    """A loss to validate by; to train by, the same loss and the penalty."""

    name: str
    ll_model: nn.Module
    ul_model: LogL2
    loss: Callable[[Tensor, Tensor], Tensor]

    def ul_objective(self, state: State) -> Tensor:
        """Return the loss on the validation batch."""
        return self.loss(state.ll_model(state.data), state.target)

    def ll_objective(self, state: State) -> Tensor:
        """Return the penalised loss on the training batch."""
        return self.loss(state.ll_model(state.data), state.target) + state.ul_model(state.ll_model)


def fashion_mnist() -> tuple[Tensor, Tensor]:
    """Return the training images, as rows of 784 numbers from 0 to 1, and their labels."""
    arrays = []
    for name, header in (("train-images-idx3-ubyte.gz", 16), ("train-labels-idx1-ubyte.gz", 8)):
        path = FASHION_MNIST / name
        if not path.exists():
            raise SystemExit(f"{path} is missing. Install it with: apt-get install dataset-fashion-mnist")
        content = bytearray(gzip.decompress(path.read_bytes()))
        arrays.append(torch.frombuffer(content, dtype=torch.uint8, offset=header))
    return arrays[0].view(-1, 784) / 255, arrays[1].long()


class Page:
    """Markdown that is printed line by line as it comes, and written to a file at the end."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def tell(self, *lines: str) -> None:
        """Add ``lines``."""
        print("\n".join(lines), flush=True)
        self._lines.extend(lines)

    def head(self, *names: object) -> None:
        """Begin a table of these columns."""
        self.row(*names)
        self.row(*("---" for _ in names))

    def row(self, *cells: object) -> None:
        """Add a row to the table."""
        self.tell(f"| {' | '.join(map(str, cells))} |")

    def write(self, path: Path) -> None:
        """Write the page to ``path``."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(self._lines).rstrip() + "\n")


def machine(device: str = "cpu") -> str:
    """Return what a result was measured with."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
        models = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
        name = next(models, platform.processor())
    return f"torch {torch.__version__}, Python {platform.python_version()}, one thread, {name}"
