"""How a training is spread over ranks, as a Trainer is told: strategy, devices, nodes and precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from lightning_optim.errors import OptionError, is_whole, nearest, shown
from lightning_optim.training.lightning_names import is_a

Kind = Literal["single", "ddp", "fsdp1", "fsdp2"]
# Words for strategies: Lightning's, and one for FSDP2, for which Lightning has none.
WORDS = ("auto", "single_device", "ddp", "fsdp", "fsdp_cpu_offload", "model_parallel")
OTHER_WORDS = {"single": "single_device", "fsdp1": "fsdp", "fsdp2": "model_parallel"}
TITLES: dict[Kind, str] = {"single": "one process", "ddp": "DDP", "fsdp1": "FSDP1", "fsdp2": "FSDP2"}
# Words for precision that a Trainer takes, as Lightning understands them, with the dtype of the parameters; None
# leaves it to the module.
PRECISION: dict[str, torch.dtype | None] = {
    **{"32-true": None, "16-mixed": None, "bf16-mixed": None},
    **{"64-true": torch.float64, "16-true": torch.float16, "bf16-true": torch.bfloat16},
}
ALIASES = {"64": "64-true", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed", "None": "32-true"}
SHARDINGS = ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD")


@dataclass(frozen=True)
class Spread:
    """How a training is spread over ranks.

    Attributes:
        kind: How parameters are placed.
        nodes: Number of nodes.
        devices: Ranks of a node.
        precision: The Trainer's word.
        strategy: Lightning's strategy; None where a word says it.
        mesh: For FSDP2, the sizes of data and tensor parallelism.
        offload: Whether FSDP1 keeps parameters, gradients and state in the memory of the CPU.
        cuda: Whether the training runs on GPUs.
    """

    kind: Kind
    nodes: int = 1
    devices: int = 1
    precision: str = "32-true"
    strategy: Any = None
    mesh: tuple[int, int] = (1, 1)
    offload: bool = False
    cuda: bool = False

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return self.nodes * self.devices

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype to which the Trainer converts the module; None if to none."""
        return PRECISION[self.precision]

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """The dtype in which a mixed precision computes; None where it is that of the parameters."""
        return {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}.get(self.precision)

    @property
    def title(self) -> str:
        """In words, such as `FSDP1 on 8 ranks, bf16-true`."""
        if self.kind == "single":
            where = ""
        else:
            where = f" on {self.ranks} rank{'s' * (self.ranks > 1)}"
            where += f" ({self.nodes} nodes)" if self.nodes > 1 else ""
        sharding = self.sharding
        more = f" ({sharding})" if sharding not in ("", "FULL_SHARD") else ""
        if self.kind == "fsdp2" and self.mesh[1] > 1:
            more = f" ({self.mesh[0]} data parallel x {self.mesh[1]} tensor parallel)"
        return f"{TITLES[self.kind]}{where}{more}, precision {self.precision}"

    @property
    def sharding(self) -> str:
        """The sharding strategy of FSDP1; empty for others."""
        if self.kind != "fsdp1":
            return ""
        return "FULL_SHARD" if self.strategy is None else str(self.strategy.sharding_strategy.name)


def read_spread(
    strategy: Any = "auto",
    devices: Any = 1,
    nodes: Any = 1,
    precision: Any = "32-true",
    accelerator: Any = "auto",
    sharding: str | None = None,
) -> Spread:
    """Read what a Trainer takes.

    Args:
        strategy: A word, or an object of Lightning: `DDPStrategy`, `FSDPStrategy` or `ModelParallelStrategy`. The word
            "model_parallel" is FSDP2 over all ranks.
        devices: Ranks of a node: a number, "auto", or a list of indices.
        nodes: Number of nodes.
        precision: The Trainer's word.
        accelerator: The Trainer's word.
        sharding: For the word "fsdp": how FSDP1 shards.

    Raises:
        OptionError: for a strategy that does not exist or is not counted, no devices, and an unknown precision.

    Example:
        >>> read_spread("fsdp", devices=8, nodes=2).title
        'FSDP1 on 16 ranks (2 nodes), precision 32-true'
    """
    cuda = str(accelerator) in ("gpu", "cuda") or (str(accelerator) == "auto" and torch.cuda.is_available())
    count, of_nodes = _devices(devices, cuda), _nodes(nodes)
    word = _precision(precision)
    strategy = _object(strategy, sharding, (of_nodes, count))
    common: dict[str, Any] = {"nodes": of_nodes, "devices": count, "precision": word, "cuda": cuda}
    if isinstance(strategy, str):
        several = count * of_nodes > 1
        if strategy == "auto":
            return Spread("ddp" if several else "single", **common)
        if strategy == "single_device":
            if several:
                raise OptionError(f"strategy 'single_device' has one device, and there are {count * of_nodes}.")
            return Spread("single", **common)
        if strategy == "model_parallel":
            return Spread("fsdp2", mesh=(count * of_nodes, 1), **common)
        return Spread("ddp", **common)
    if is_a(strategy, _lightning("FSDPStrategy")):
        if word == "64-true":
            raise OptionError("FSDPStrategy cannot train in precision '64-true'. Use '32-true', or another strategy.")
        offload = bool(getattr(strategy.cpu_offload, "offload_params", False))
        return Spread("fsdp1", strategy=strategy, offload=offload, **common)
    if is_a(strategy, _lightning("ModelParallelStrategy")):
        mesh = _mesh(strategy, count, of_nodes)
        return Spread("fsdp2", strategy=strategy, mesh=mesh, **common)
    if is_a(strategy, _lightning("DDPStrategy")):
        return Spread("ddp", strategy=strategy, **common)
    if is_a(strategy, _lightning("SingleDeviceStrategy")):
        return Spread("single", strategy=strategy, **common)
    raise OptionError(
        f"the memory under {type(strategy).__name__} is not counted. Strategies that are: {', '.join(WORDS)}, and "
        "objects of DDPStrategy, FSDPStrategy and ModelParallelStrategy."
    )


def _object(strategy: Any, sharding: str | None, shape: tuple[int, int]) -> Any:
    """A strategy as a word that is checked, or as an object."""
    if not isinstance(strategy, str):
        return strategy
    word = OTHER_WORDS.get(strategy, strategy)
    if word.startswith("ddp"):
        from lightning.pytorch.strategies import StrategyRegistry

        word = word if word in StrategyRegistry.available_strategies() else ""
    elif word not in WORDS:
        word = ""
    if not word:
        if strategy.startswith(("deepspeed", "xla", "single_xla", "single_tpu")):
            raise OptionError(f"the memory under strategy {strategy!r} is not counted. Counted are {', '.join(WORDS)}.")
        hint = nearest(strategy, WORDS)
        raise OptionError(f"there is no strategy {strategy!r}.{hint} Strategies are {', '.join(WORDS)}.")
    if sharding is not None and not word.startswith("fsdp"):
        raise OptionError(f"sharding={shown(sharding)} is an option of strategy 'fsdp', and this is {strategy!r}.")
    if not word.startswith("fsdp"):
        return word
    if sharding is not None and sharding.upper() not in SHARDINGS:
        raise OptionError(f"sharding={shown(sharding)} must be one of {', '.join(SHARDINGS)}.")
    from lightning.pytorch.strategies import FSDPStrategy

    full: Any = (sharding or "FULL_SHARD").upper()
    options: dict[str, Any] = {"device_mesh": shape} if full == "HYBRID_SHARD" else {}
    return FSDPStrategy(cpu_offload=word == "fsdp_cpu_offload", sharding_strategy=full, **options)


def _lightning(name: str) -> type:
    from lightning.pytorch import strategies

    found: type = getattr(strategies, name)
    return found


def _devices(devices: Any, cuda: bool) -> int:
    if isinstance(devices, str) and devices not in ("auto", "-1"):
        parts = [part for part in devices.split(",") if part.strip()]
        if not all(part.strip().isdigit() for part in parts) or not parts:
            raise OptionError(f"devices={shown(devices)} must be a number of devices, a list of them, or 'auto'.")
        devices = [int(part) for part in parts] if "," in devices else int(parts[0])
    if devices in ("auto", "-1", -1, None):
        return torch.cuda.device_count() if cuda and torch.cuda.is_available() else 1
    if isinstance(devices, Sequence) and not isinstance(devices, str):
        devices = len(devices)
    if not is_whole(devices):
        raise OptionError(f"devices={shown(devices)}: a training needs at least one device.")
    return int(devices)


def _nodes(nodes: Any) -> int:
    number = int(nodes) if isinstance(nodes, str) and nodes.strip().isdigit() else nodes
    if not is_whole(number):
        raise OptionError(f"nodes={shown(nodes)} must be an integer of at least 1.")
    return int(number)


def _precision(precision: Any) -> str:
    word = ALIASES.get(str(precision), str(precision))
    if word not in PRECISION:
        hint = nearest(word, PRECISION)
        raise OptionError(f"precision={shown(precision)} must be one of {', '.join(PRECISION)}.{hint}")
    return word


def _mesh(strategy: Any, devices: int, nodes: int) -> tuple[int, int]:
    """The sizes of data and tensor parallelism, with Lightning's defaults: nodes, and the devices of a node."""
    data, tensor = strategy._data_parallel_size, strategy._tensor_parallel_size
    data, tensor = nodes if data == "auto" else int(data), devices if tensor == "auto" else int(tensor)
    if data * tensor != devices * nodes:
        raise OptionError(
            f"ModelParallelStrategy: data_parallel_size={data} x tensor_parallel_size={tensor} must be the number of "
            f"ranks, which is {devices * nodes}."
        )
    return data, tensor
