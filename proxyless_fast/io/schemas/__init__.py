"""What each kind of file may say: a field that no schema knows, or a value it cannot have, is refused by name."""

from .architecture import Architecture, Description
from .common import check
from .latency_table import LatencyTableFile
from .official_config import OfficialConfig
from .report import Report

__all__ = ["Architecture", "Description", "LatencyTableFile", "OfficialConfig", "Report", "check"]
