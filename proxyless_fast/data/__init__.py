"""Image data for a search: train, validation and test loaders whose order is a pure function of (seed, epoch)."""

from .fashion_mnist import DataNotFound, fashion_mnist_folder
from .images import UnreadableImage
from .splits import SPLIT, Splits, loaders

__all__ = ["SPLIT", "DataNotFound", "Splits", "UnreadableImage", "fashion_mnist_folder", "loaders"]
