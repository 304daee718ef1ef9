"""Search spaces: functions that build supernets. A derived net is of the same class, without mixed ops."""

from .cell import CellNet, cell
from .chain import ChainNet, from_config
from .mobile import mobile
from .small import small

__all__ = ["CellNet", "ChainNet", "cell", "from_config", "mobile", "small"]
