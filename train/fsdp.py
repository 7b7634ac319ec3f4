"""FSDP2 for Lipschitz networks: rows of each parameter per device, checkpoints in one file."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch.optim import Optimizer


class RowSharding(ModelParallelStrategy):
    """``ModelParallelStrategy`` over data alone, with ordinary checkpoints.

    Lightning's own way of saving the optimizer steps it once with a zero learning rate and knows
    nothing of state that lives on one rank; here ``ShardedMuon`` brings its state together, and
    every rank reads the whole file. Resume is therefore as exact as under DDP.
    """

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """True: the optimizer loads its own state."""
        return True

    def setup_environment(self) -> None:
        """Shard over all ranks of all nodes."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the whole state, complete on rank 0."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        return optimizer.state_dict()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        """Return the content of the file."""
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Give every rank its rows of the weights."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        options = StateDictOptions(full_state_dict=True, strict=strict)
        assert self.model is not None
        set_model_state_dict(self.model, checkpoint["state_dict"], options=options)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Give every rank its share of the optimizer's state."""
        Strategy.load_optimizer_state_dict(self, checkpoint)
