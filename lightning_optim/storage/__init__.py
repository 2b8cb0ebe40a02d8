"""How a slot is kept: as a tensor, or coded in 8 bits."""

from lightning_optim.storage.policy import FORMATS, SMALLEST, can_be_coded, dtype, is_coded, make
from lightning_optim.storage.quantized import Coded, read, write

__all__ = ["FORMATS", "SMALLEST", "Coded", "can_be_coded", "dtype", "is_coded", "make", "read", "write"]
