"""What a run found, for people to read."""

from .architecture import block_lines, describe_blocks
from .summary import print_report

__all__ = ["block_lines", "describe_blocks", "print_report"]
