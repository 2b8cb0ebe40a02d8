"""What must hold before anything is imported."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tensors are small here: a second thread only waits

import torch

# Triton reads this while it is imported, which Lightning does: without a GPU its kernels are interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
