"""The operations that networks are made of, under the official names, and `candidate`, which builds one by name."""

from .conv import ConvLayer, DepthConv, ReluConv
from .mbconv import MBConv
from .names import candidate
from .parts import activation
from .residual import ResidualBlock
from .simple import Identity, LinearLayer, Pool, Zero

__all__ = [
    "ConvLayer",
    "DepthConv",
    "Identity",
    "LinearLayer",
    "MBConv",
    "Pool",
    "ReluConv",
    "ResidualBlock",
    "Zero",
    "activation",
    "candidate",
]
