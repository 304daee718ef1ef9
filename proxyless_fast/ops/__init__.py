"""Ops: a file per family with reference, wrapper, fake kernel and autograd. Nothing here knows of the search."""

from .statistics import gate_dot, gate_dot_reference, gram, gram_reference

__all__ = ["gate_dot", "gate_dot_reference", "gram", "gram_reference"]
