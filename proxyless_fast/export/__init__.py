"""Formats other programs read: official configs and checkpoints, JSON, safetensors, ONNX, timm."""

from .architecture_json import architecture, from_architecture, load_architecture, save_architecture
from .described import describe, description
from .official_format import from_official, official
from .onnx_file import onnx
from .timm_model import timm
from .weights_file import load_weights, save_weights

__all__ = [
    "architecture",
    "describe",
    "description",
    "from_architecture",
    "from_official",
    "load_architecture",
    "load_weights",
    "official",
    "onnx",
    "save_architecture",
    "save_weights",
    "timm",
]
