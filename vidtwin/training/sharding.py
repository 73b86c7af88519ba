"""Shard a network and its optimizer's state over all devices by FSDP2, for models too large for one of them.

    vidtwin fit --config configs/vidtwin_large.yaml --config configs/trainer/fsdp2.yaml

The units are the repeated blocks of the model (`list_units`). A block's weights are gathered for its forward and for
its backward pass and freed after each; the weights between the blocks, including the last layer, stay gathered from the
forward to the backward pass. The discriminator is small and stays whole on each rank, as in DDP.

Neither models nor files depend on sharding: a checkpoint is one file of whole tensors and resumes under any strategy.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch import Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.export import register_dataclass
from torch.nn import functional as F
from torch.optim import Optimizer

from vidtwin.autoencoder import Reconstruction
from vidtwin.compilation import list_units
from vidtwin.errors import UserError
from vidtwin.losses.adversarial import mean_over_ranks
from vidtwin.losses.autoencoder import AutoencoderLoss
from vidtwin.storage import checkpoints

# Before torch 2.15 FSDP finds the tensors of a model's output only in classes that pytree knows.
register_dataclass(Reconstruction)


class Placement:
    """Placement of a training's weights on its ranks: whole on each, unless a strategy overrides these methods.

    Callers use `placement_of(trainer)` and need not know whether weights are sharded.
    """

    def shard(self, network: nn.Module) -> None:
        """Split the weights of the task's network over the ranks, starting from those of the first rank."""

    def gather(self, model: nn.Module) -> None:
        """Hold all weights on each rank until `reshard`. All ranks must call it together.

        Needed in evaluation, since ranks run different numbers of clips.
        """

    def reshard(self, model: nn.Module) -> None:
        """Free the weights of other ranks; the parameters are those of the optimizers again."""

    def probing(self, model: nn.Module) -> AbstractContextManager[None]:
        """Return the context for `torch.autograd.grad` at the last layer, which precedes the backward pass."""
        return nullcontext()

    def average_gradients(self, loss: AutoencoderLoss) -> None:
        """Average those gradients of the loss's parameters over the ranks that no backward pass exchanges."""
        if loss.discriminator is not None:  # DDP has it left out (`AutoencoderTask.setup`)
            _average_gradients(loss.discriminator)

    def gradient_norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """Return the norm of all gradients together."""
        return nn.utils.get_total_norm(gradients)

    def clip_gradients(self, parameters: Sequence[nn.Parameter], limit: float, norm: Tensor) -> None:
        """Scale gradients with the norm `norm` down to `limit`."""
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)

    def whole(self, tree: Any, keep: bool = True) -> Any:
        """Return nested dicts and lists with whole tensors. All ranks must call it together.

        Args:
            tree: The same keys, in the same order, on all ranks.
            keep: Whether this rank needs the tensors; else sharded ones are returned empty, to save memory.
        """
        return tree


def _average_gradients(module: nn.Module) -> None:
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    if gradients and dist.is_available() and dist.is_initialized():
        flat = mean_over_ranks(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def placement_of(trainer: Trainer | None) -> Placement:
    """Return the trainer's strategy if it places weights itself, else the plain `Placement`."""
    strategy = None if trainer is None else trainer.strategy
    return strategy if isinstance(strategy, Placement) else Placement()


class FSDP2Strategy(Placement, ModelParallelStrategy):
    """Lightning's strategy for `fully_shard`, over all devices of all machines: `--trainer.strategy fsdp2`.

    Lightning's class bypasses the checkpoint plugin. This one works as DDP does: weights are loaded before the
    optimizers are made, and checkpoints are single files that are read without running code.

    Args:
        gather_dtype: Type in which weights are gathered: "bfloat16" halves that exchange in `precision: bf16-mixed`,
            whose products are in bfloat16 anyway; gradients are reduced, and weights updated and stored, in float32.
            `--trainer.strategy fsdp2_bf16` is this one.
        process_group_backend: Backend of torch.distributed; None is nccl on GPUs and gloo on CPUs.
        timeout: Maximum time that a rank waits for the others.
    """

    def __init__(
        self,
        gather_dtype: Literal["float32", "bfloat16"] = "float32",
        process_group_backend: str | None = None,
        timeout: Any = default_pg_timeout,
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        if gather_dtype not in ("float32", "bfloat16"):
            raise UserError(f"Expected trainer.strategy.gather_dtype float32 or bfloat16, got {gather_dtype!r}.")
        self.gather_dtype = gather_dtype

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes  # Lightning's "auto" counts machines
        super().setup_environment()

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def shard(self, network: nn.Module) -> None:
        if isinstance(network, FSDPModule):
            self.reshard(network)  # sharded by an earlier run of this process
            return
        assert self.lightning_module is not None
        # As in DDP, since ranks may have drawn different initial values.
        for tensor in [*self.lightning_module.parameters(), *self.lightning_module.buffers()]:
            self._take_from_first_rank(tensor)
        if self.gather_dtype == "bfloat16" and self.precision_plugin.precision != "bf16-mixed":
            raise UserError(
                f"Expected trainer.precision bf16-mixed for weights gathered in bfloat16, got "
                f"{self.precision_plugin.precision}; set it, or --trainer.strategy fsdp2."
            )
        gathered = torch.bfloat16 if self.gather_dtype == "bfloat16" else None
        shard(network, self.device_mesh["data_parallel"], gathered)

    def gather(self, model: nn.Module) -> None:
        for unit in _iter_sharded(model):
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()

    def reshard(self, model: nn.Module) -> None:
        for unit in _iter_sharded(model):
            unit.set_reshard_after_forward(unit is not model, recurse=False)
            unit.reshard()

    @contextmanager
    def probing(self, model: nn.Module) -> Iterator[None]:
        # FSDP would take it for the backward pass, free the weights at its end, and gather them again.
        root = model if isinstance(model, FSDPModule) else None
        if root is not None:
            root.set_is_last_backward(False)
            root.set_reshard_after_backward(False)
        try:
            yield
        finally:
            if root is not None:
                root.set_is_last_backward(True)
                root.set_reshard_after_backward(True)

    def average_gradients(self, loss: AutoencoderLoss) -> None:
        _average_gradients(loss)

    def gradient_norm(self, gradients: Sequence[Tensor]) -> Tensor:
        if not any(isinstance(gradient, DTensor) for gradient in gradients):
            return super().gradient_norm(gradients)
        squares = [nn.utils.get_total_norm([local(t) for t in kind]).square() for kind in _by_kind(gradients)]
        dist.all_reduce(squares[0])  # the sharded ones come first
        return torch.stack(squares).sum().sqrt()

    def clip_gradients(self, parameters: Sequence[nn.Parameter], limit: float, norm: Tensor) -> None:
        for kind in _by_kind(parameters):
            nn.utils.clip_grads_with_norm_(kind, limit, norm)

    def whole(self, tree: Any, keep: bool = True) -> Any:
        if isinstance(tree, dict):
            return {key: self.whole(value, keep) for key, value in tree.items()}
        if type(tree) in (list, tuple):
            return type(tree)([self.whole(value, keep) for value in tree])
        if not isinstance(tree, DTensor):
            return tree
        full = tree.full_tensor()
        return full.cpu() if keep else torch.empty(0)

    @torch.no_grad()
    def _take_from_first_rank(self, tensor: Tensor) -> None:
        on_device = tensor.detach().to(self.root_device).contiguous()
        dist.broadcast(on_device, src=0)
        tensor.copy_(on_device)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()  # `save_checkpoint` gathers it

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        bare = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return bare.state_dict()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write one file of whole tensors, from the first rank. All ranks must call it together."""
        checkpoint = self.whole(checkpoint, keep=self.is_global_zero)
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options=storage_options)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        # Memory-mapped: the ranks of a machine share the pages, and each reads its parts.
        path = self.broadcast(checkpoint_path)
        checkpoint = checkpoints.read(path, lazily=True)
        checkpoints.check(path)
        return checkpoint

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        state = {name: like(value, own.get(name)) for name, value in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            # By position, as in optimizers: the n-th of the file belongs to the n-th parameter.
            saved = [index for group in state["param_groups"] for index in group["params"]]
            own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            place = dict(zip(saved, own, strict=False))
            values = {
                index: {key: like(value, place.get(index)) for key, value in entry.items()}
                for index, entry in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": values})


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="The trained network is sharded over all devices.")
StrategyRegistry.register(
    "fsdp2_bf16", FSDP2Strategy, description="The same, with weights gathered in bfloat16.", gather_dtype="bfloat16"
)


def shard(model: nn.Module, mesh: DeviceMesh, gathered: torch.dtype | None = None) -> None:
    """Split the weights of a model, if it has any, over the ranks of a mesh with one axis.

    Args:
        model: The model.
        mesh: The ranks.
        gathered: Type of the gathered weights; None is their own. Gradients are reduced in float32.
    """
    if not any(True for _ in model.parameters()):
        return
    # VidTwin's output is a view; torch warns that it must not be changed in place, which no loss does.
    warnings.filterwarnings("ignore", rf"FSDP2-wrapped module \(FSDP{type(model).__name__}\) returned a view")
    if gathered is not None:
        _keep_norms(model)
    policy = MixedPrecisionPolicy(gathered, reduce_dtype=torch.float32, cast_forward_inputs=False)
    options: dict[str, Any] = {"mesh": mesh} | ({"mp_policy": policy} if gathered else {})
    found = [fully_shard(unit, reshard_after_forward=unit is not model, **options) for unit in list_units(model)]
    # In the backward pass each unit prefetches the one before it. By default torch follows all forward passes since the
    # last backward pass, and ranks that evaluated different numbers of clips would wait for each other.
    for unit, before in zip(found, [found[0], *found[:-1]], strict=True):
        unit.set_modules_to_backward_prefetch([before])


def _keep_norms(model: nn.Module) -> None:
    """Let norms run in the type of their input, whatever that of their weights: a CPU's kernels take no other."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm | nn.GroupNorm):
            object.__setattr__(module, "forward", partial(_normalize, module))


def _normalize(norm: nn.LayerNorm | nn.GroupNorm, x: Tensor) -> Tensor:
    weight, bias = (None if p is None else p.to(x.dtype) for p in (norm.weight, norm.bias))
    if isinstance(norm, nn.LayerNorm):
        return F.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)
    return F.group_norm(x, norm.num_groups, weight, bias, norm.eps)


def _iter_sharded(model: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in model.modules() if isinstance(module, FSDPModule))


# Tensors.


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a sharded tensor, in the same memory, or the tensor itself if it is whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(value: Any, own: Any) -> Any:
    """Shard a whole tensor as `own` is; return `value` itself if `own` is whole or has another shape."""
    if not isinstance(own, DTensor) or not isinstance(value, Tensor) or value.shape != own.shape:
        return value
    value = value.to(own.device)  # each rank takes its part of its own copy: src_data_rank
    return distribute_tensor(value, own.device_mesh, own.placements, src_data_rank=None).clone()


def _by_kind(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Separate sharded tensors from others, since operations on lists of tensors need one kind."""
    sharded: list[Tensor] = [tensor for tensor in tensors if isinstance(tensor, DTensor)]
    others = [tensor for tensor in tensors if not isinstance(tensor, DTensor)]
    return [kind for kind in (sharded, others) if kind]
