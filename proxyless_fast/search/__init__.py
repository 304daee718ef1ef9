"""Search, train and evaluate."""

from .checkpoint import Checkpoints
from .choose import choose_path, most_probable_path
from .config import SearchConfig
from .diagnose import NonFiniteLoss
from .loop import Search
from .objectives import objective
from .training import Accuracy, TrainConfig, Training, evaluate, train

__all__ = [
    "Accuracy",
    "Checkpoints",
    "NonFiniteLoss",
    "Search",
    "SearchConfig",
    "TrainConfig",
    "Training",
    "choose_path",
    "evaluate",
    "most_probable_path",
    "objective",
    "train",
]
