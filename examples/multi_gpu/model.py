"""A module that no process ever holds as a whole: built without memory, sharded, and then given its first weights."""

from __future__ import annotations

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from examples.language_model.language_model import LanguageModel
from lightning_optim import OptimizerSpec
from lightning_optim.errors import OptionError


class LargeLanguageModel(LanguageModel):
    """The language model for sizes that fit no single device; for FSDP2 only.

    Args:
        depth: Number of blocks.
        width: Size of a token's vector.
        heads: Number of attention heads.
        optimizer: A word, or a mapping with `name` and options.
        half: Whether blocks compute in bfloat16. Weights, gradients that are summed, and optimizer state do not.
    """

    def __init__(
        self,
        depth: int = 6,
        width: int = 64,
        heads: int = 4,
        optimizer: OptimizerSpec = "adamw",
        half: bool = False,
    ) -> None:
        with torch.device("meta"):  # shapes alone
            super().__init__("pre", depth, width, heads, optimizer=optimizer)

    def configure_model(self) -> None:
        """Shard each block by itself, and then the rest: embeddings, last norm and head.

        Lightning calls it before fit and before each validate, test and predict; the second time all is done already.
        After it Lightning gives memory to the shards, and first weights by `reset_parameters` of each layer.
        """
        if self.device_mesh is None:
            self.to_empty(device="cpu")  # for Lightning moves the module when a run ends
            raise OptionError("LargeLanguageModel is for FSDP2: add --config examples/multi_gpu/fsdp2.yaml.")
        if getattr(self, "sharded", False):
            return
        mesh = self.device_mesh["data_parallel"]
        dtype = torch.bfloat16 if self.hparams["half"] else None
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        for block in self.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(self, mesh=mesh)
        self.sharded = True
