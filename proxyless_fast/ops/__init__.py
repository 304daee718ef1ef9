"""Ops: a file per family with reference, wrapper, fake kernel and autograd. Nothing here knows of the search."""

from .mbconv import can_run_mbconv, mbconv, mbconv_reference, probe, probe_reference
from .statistics import gate_dot, gate_dot_reference, gram, gram_reference

__all__ = [
    "can_run_mbconv",
    "gate_dot",
    "gate_dot_reference",
    "gram",
    "gram_reference",
    "mbconv",
    "mbconv_reference",
    "probe",
    "probe_reference",
]
