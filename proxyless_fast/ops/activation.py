"""The activations that every op knows, by name."""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu6": F.relu6,
    "relu": F.relu,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "identity": lambda x: x,
}
