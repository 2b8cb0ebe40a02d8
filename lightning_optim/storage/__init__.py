"""How slots are stored: as tensors of some dtype, or quantized to 8 bits."""

from lightning_optim.storage.policy import FORMATS, SMALLEST, can_be_quantized, dtype, empty, is_quantized
from lightning_optim.storage.quantized import Quantized, read, read_shaped, write, write_shaped

__all__ = [
    "FORMATS",
    "SMALLEST",
    "Quantized",
    "can_be_quantized",
    "dtype",
    "empty",
    "is_quantized",
    "read",
    "read_shaped",
    "write",
    "write_shaped",
]
