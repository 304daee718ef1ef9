"""Search spaces: functions that build supernets. A derived net is of the same class, without mixed ops."""

from .cell_net import CellNet, cell
from .chain_net import ChainNet
from .mobile_space import mobile
from .rebuild import from_config
from .small_space import small

__all__ = ["CellNet", "ChainNet", "cell", "from_config", "mobile", "small"]
