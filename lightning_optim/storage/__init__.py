"""How a slot is kept: as a tensor, or coded in 8 bits."""

from lightning_optim.storage.coded import Coded, read, write
from lightning_optim.storage.policy import FORMATS, SMALLEST, can_be_coded, dtype, is_coded, make

__all__ = ["FORMATS", "SMALLEST", "Coded", "can_be_coded", "dtype", "is_coded", "make", "read", "write"]
