"""Search, train and evaluate."""

from .choose import choose_path, most_probable_path
from .config import SearchConfig
from .diagnose import NonFiniteLoss
from .loop import Search
from .objectives import objective
from .training import Accuracy, TrainConfig, evaluate, train

__all__ = [
    "Accuracy",
    "NonFiniteLoss",
    "Search",
    "SearchConfig",
    "TrainConfig",
    "choose_path",
    "evaluate",
    "most_probable_path",
    "objective",
    "train",
]
