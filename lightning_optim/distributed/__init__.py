"""Which part of a tensor this process holds, what is summed over which ranks, and what DDP sends."""
