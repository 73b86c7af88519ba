"""Cost of a training's step, counted without running it: FLOPs and memory from the shapes of its tensors.

    task ── copy on fake tensors ── forward, backward, optimizers' step ──> FLOPs per network, bytes at the peak

Fake tensors have shapes and types and no values, so that a step of any size is counted on any machine within seconds.
Autocast, accumulation, recomputation of activations and the GAN count as they run.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from vidtwin.benchmark.cost import seconds
from vidtwin.benchmark.memory import TensorMemory
from vidtwin.errors import UserError
from vidtwin.losses.frame_distance import FrameDistance
from vidtwin.training.checks import freeze
from vidtwin.training.task import AutoencoderTask

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class StepCost:
    """Cost of one step on one device.

    Attributes:
        parameters: Number of weights by network: "autoencoder", and "discriminator" if there is one.
        flops: Of forward and backward passes, by network: "autoencoder", "perceptual", "discriminator".
        weights_bytes: Weights of all networks, the running average and the batch of clips included.
        optimizer_bytes: State of the optimizers.
        gradients_bytes: Gradients of all weights that are trained.
        peak_bytes: All tensors at the peak of the step, the above included.
        sharded_bytes: What FSDP2 splits of weights, optimizer's state and gradients: that of the autoencoder.
    """

    parameters: dict[str, int]
    flops: dict[str, int]
    weights_bytes: int
    optimizer_bytes: int
    gradients_bytes: int
    peak_bytes: int
    sharded_bytes: tuple[int, int, int]

    @property
    def activations_bytes(self) -> int:
        """Bytes at the peak beside weights and optimizers' state: what is kept for the backward pass, and gradients."""
        return self.peak_bytes - self.weights_bytes - self.optimizer_bytes

    def split(self, devices: int) -> tuple[float, float, float]:
        """Return bytes of weights, of optimizers' state and of the rest on each of the devices that FSDP2 uses."""
        held = self.weights_bytes, self.optimizer_bytes, self.activations_bytes
        weights, state, rest = (
            whole - (1 - 1 / devices) * part for whole, part in zip(held, self.sharded_bytes, strict=True)
        )
        return weights, state, rest


def count_step(task: AutoencoderTask, clip_shape: Sequence[int], batch_size: int, bf16: bool = False) -> StepCost:
    """Count a step of a training, with the GAN if it has one.

    Args:
        task: The training; it is not changed.
        clip_shape: Shape (3, T, H, W) of a clip.
        batch_size: Clips in a step on one device.
        bf16: Whether products run in bfloat16, as in precision bf16-mixed.

    Raises:
        UserError: The model or the loss asks for a tensor's values.
    """
    step = max(task.loss.adversarial_start, 0) if task.loss.discriminator is not None else 0
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake = _make_fake(task, mode)
    with mode:
        players = [player.optimizer(player.parameters) for player in fake.players()]
        clip = torch.empty(batch_size, *clip_shape)
        held = [*fake.parameters(), *fake.buffers(), clip]
        if isinstance(fake.loss.perceptual, FrameDistance) and fake.loss.perceptual.network is not None:
            held += [*fake.loss.perceptual.network.parameters(), *fake.loss.perceptual.network.buffers()]
        trained = [p for p in fake.autoencoder.parameters() if p.requires_grad]
        average = [torch.empty_like(p) for p in trained] if task.ema.decay is not None else []
        autocast: AbstractContextManager[Any] = torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()
        try:
            with _Counter() as counter, TensorMemory(_CPU) as memory:
                memory.track([*held, *average])
                weights = memory.live
                for parameter in (p for p in fake.parameters() if p.requires_grad):
                    parameter.grad = torch.empty_like(parameter)
                gradients = sum(_nbytes(p.grad) for p in fake.parameters())
                _update(players)  # makes their state
                flops = {"autoencoder": 0}
                for part in clip.tensor_split(task.accumulation):
                    with autocast, counter.counting(flops, "autoencoder"):
                        reconstruction = fake(part)
                        terms = reconstruction.regularization.values()
                        total = reconstruction.clip.sum() + sum(term.sum() for term in terms)
                        total.backward()
                    if fake.loss.perceptual_weight > 0:
                        with autocast, counter.counting(flops, "perceptual"):
                            _count_perceptual(fake, part)
                del reconstruction, terms, total
                _update(players)
                memory.peak = memory.live
                with counter.counting(flops, "all"):
                    for part in clip.tensor_split(task.accumulation):
                        _run_backward(fake, part, step, autocast, len(part) / batch_size)
                _update(players)
        except (RuntimeError, NotImplementedError) as error:
            raise UserError(
                f"Expected a step of {type(task.autoencoder).__name__} without a question for a tensor's values, which "
                f"its cost is counted without, got: {' '.join(str(error).split())[:200]}"
            ) from error
    flops["discriminator"] = flops.pop("all") - sum(flops.values())
    if task.loss.discriminator is None:
        del flops["discriminator"]
    states = [sum(_nbytes(v) for entry in o.state.values() for v in entry.values() if _is_large(v)) for o in players]
    sharded = sum(map(_nbytes, [*fake.autoencoder.parameters(), *average])), states[0], sum(map(_nbytes, trained))
    parameters = {"autoencoder": sum(p.numel() for p in task.autoencoder.parameters())}
    if task.loss.discriminator is not None:
        parameters["discriminator"] = sum(p.numel() for p in task.loss.discriminator.parameters())
    return StepCost(parameters, flops, weights, sum(states), gradients, memory.peak, sharded)


def measure_rate(device: torch.device, bf16: bool, side: int = 4096, repeats: int = 5) -> float:
    """Measure how many FLOPs a second a device reaches in products of square matrices: the median of `repeats`."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    times = seconds(lambda: left @ right, device, warmup=2, repeats=repeats)
    return 2 * side**3 / sorted(times)[len(times) // 2]


def _make_fake(task: AutoencoderTask, mode: FakeTensorMode) -> AutoencoderTask:
    """Copy a task with weights that have no values."""
    known: dict[int, Any] = {id(None): None, id(task._trainer): None}
    networks: list[nn.Module] = [task]
    distance: Any = task.loss.perceptual
    if isinstance(distance, FrameDistance) and task.loss.perceptual_weight > 0:
        networks.append(distance.network or distance.design().requires_grad_(False))
    with mode:
        for tensor in (tensor for network in networks for tensor in [*network.parameters(), *network.buffers()]):
            value = torch.empty(tensor.shape, dtype=tensor.dtype)
            known[id(tensor)] = nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
    if len(networks) > 1:
        known[id(distance)] = fake_distance = copy.copy(distance)
        fake_distance.network = copy.deepcopy(networks[1], known)
    fake: AutoencoderTask = copy.deepcopy(task, known)
    freeze(fake.autoencoder, fake.freeze_parts)  # as the training does in its setup
    return fake.train()


def _run_backward(
    task: AutoencoderTask, clip: Tensor, step: int, autocast: AbstractContextManager[Any], share: float
) -> None:
    passes = task.losses(clip, step, share)
    while True:
        with autocast:
            player = next(passes, None)
        if player is None:
            return
        player[1]["total"].backward()


def _update(players: list[torch.optim.Optimizer]) -> None:
    for player in players:
        player.step()
        player.zero_grad()


def _count_perceptual(task: AutoencoderTask, clip: Tensor) -> None:
    """Run the perceptual distance of a reconstruction and its gradient, as `AutoencoderLoss` does."""
    prediction, target = task.loss._random_frames(clip.clone().requires_grad_(), clip)
    task.loss.perceptual(prediction, target).sum().backward()


class _Counter(FlopCounterMode):
    """Count without attributing to modules: the hooks for that forbid `torch.autograd.grad` at a leaf."""

    def __init__(self) -> None:
        super().__init__(display=False)
        self.mod_tracker: Any = _NoModules()

    @contextmanager
    def counting(self, counts: dict[str, int], name: str) -> Iterator[None]:
        """Add what is counted within to `counts[name]`."""
        before = self.get_total_flops()
        yield
        counts[name] = counts.get(name, 0) + self.get_total_flops() - before


class _NoModules:
    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def _is_large(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


def _nbytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.untyped_storage().nbytes()
