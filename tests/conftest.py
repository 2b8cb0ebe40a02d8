"""What must hold before anything is imported."""

import os

import torch

# Triton reads this while it is imported, which Lightning does: without a GPU its kernels are interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
