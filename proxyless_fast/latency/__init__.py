"""Latency: tables by operation and shape, their measurement on this machine, and E[latency] of a supernet."""

from .expected import ExpectedLatency, expected_latency
from .profiler import measure, profile
from .table import Entry, LatencyTable, MissingKey

__all__ = ["Entry", "ExpectedLatency", "LatencyTable", "MissingKey", "expected_latency", "measure", "profile"]
