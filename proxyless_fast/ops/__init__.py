"""Ops: a file per family with reference, wrapper, fake kernel and autograd. Nothing here knows of the search."""

from . import flops  # noqa: F401  (registers what the ops count)
from .depthwise import (
    bn_affine,
    depthwise_backward,
    depthwise_backward_input,
    depthwise_backward_reference,
    depthwise_backward_weight,
    depthwise_forward,
    depthwise_forward_reference,
    expand_depthwise_backward,
    expand_depthwise_backward_reference,
    expand_depthwise_forward,
    expand_depthwise_forward_reference,
)
from .mbconv import can_run_mbconv, mbconv_reference, probe, probe_reference
from .statistics import gate_dot, gate_dot_reference, gram, gram_reference

__all__ = [
    "bn_affine",
    "can_run_mbconv",
    "depthwise_backward",
    "depthwise_backward_input",
    "depthwise_backward_reference",
    "depthwise_backward_weight",
    "depthwise_forward",
    "depthwise_forward_reference",
    "expand_depthwise_backward",
    "expand_depthwise_backward_reference",
    "expand_depthwise_forward",
    "expand_depthwise_forward_reference",
    "gate_dot",
    "gate_dot_reference",
    "gram",
    "gram_reference",
    "mbconv_reference",
    "probe",
    "probe_reference",
]
