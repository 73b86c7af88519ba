"""Two diffusion processes behind one interface: the paper's, and rectified flow.

A state is all numbers of a clip's latents, normalized: (B, numbers). `network(x, times)` maps noisy states and times
from 0 to 1,000 to what `prediction` says.

| | noisy state | network predicts | steps of sampling |
|---|---|---|---|
| `DDPM` | √ᾱ_t x₀ + √(1 − ᾱ_t) ε, t of 1,000 | x₀ | DDIM |
| `RectifiedFlow` | (1 − σ) x₀ + σ ε | x₀, or the velocity ε − x₀ | Euler |

The schedulers are diffusers', imported when a process is made.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from vidtwin.errors import UserError

Network = Callable[[Tensor, Tensor], Tensor]

NUM_STEPS = 1000  # of the times that the network sees
_REFERENCE = 4096  # numbers of a state at which no shift is needed (RAE: Zheng et al. 2025)
_LEAST_SIGMA = 0.05  # by which an x-prediction's error is divided at least


class Process(ABC):
    """Base class of processes that add noise to latents and remove it.

    Attributes:
        init_args: Arguments, from which checkpoints rebuild the process.
    """

    init_args: dict[str, Any]

    @abstractmethod
    def draw_times(self, state: Tensor) -> Tensor:
        """Draw a time for each state (B, numbers) of a training batch: (B,), from 0 (no noise) to 1,000."""

    @abstractmethod
    def add_noise(self, state: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Return the states (B, numbers) at times (B,), with noise of the standard normal distribution."""

    @abstractmethod
    def loss(self, output: Tensor, state: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Compute the loss of each clip (B,) from the network's output (B, numbers)."""

    @abstractmethod
    def sample(self, network: Network, noise: Tensor, steps: int) -> Tensor:
        """Remove noise (B, numbers) in a number of steps → states."""

    def check_steps(self, steps: int) -> None:
        """Raise `UserError` for a number of steps in which the process can't sample."""
        if not 1 <= steps <= NUM_STEPS:
            raise UserError(f"Expected 1 to {NUM_STEPS:,} steps of sampling, got {steps}.")

    def spec(self) -> dict[str, Any]:
        """Return `class_path` and `init_args`."""
        return {"class_path": f"{type(self).__module__}.{type(self).__qualname__}", "init_args": self.init_args}


class DDPM(Process):
    """The paper's process (supplement D.3, E.1): 1,000 steps, the network predicts x₀, sampled by DDIM (η = 0).

    The loss is E.1's, as the mean squared error per number. The paper does not give the variances; β rises linearly, as
    in Ho et al. (2020). Sampling starts at the last of the 1,000 steps ("trailing").

    Args:
        beta_start: Variance of the first step.
        beta_end: Variance of the last step.
        beta_schedule: How they rise: "linear", "scaled_linear" or "squaredcos_cap_v2", as diffusers names them.
    """

    def __init__(
        self,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear",
    ) -> None:
        if not 0 < beta_start <= beta_end < 1:
            raise UserError(f"Expected 0 < model.process.beta_start <= beta_end < 1, got {beta_start} and {beta_end}.")
        self.init_args = {"beta_start": beta_start, "beta_end": beta_end, "beta_schedule": beta_schedule}
        self._scheduler = _import_diffusers().DDIMScheduler(
            num_train_timesteps=NUM_STEPS,
            prediction_type="sample",
            clip_sample=False,
            timestep_spacing="trailing",
            **self.init_args,
        )

    def draw_times(self, state: Tensor) -> Tensor:
        return torch.randint(NUM_STEPS, (len(state),), device=state.device)

    def add_noise(self, state: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        noisy: Tensor = self._scheduler.add_noise(state, noise, times)
        return noisy

    def loss(self, output: Tensor, state: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        return (output - state).square().mean(1)

    def check_steps(self, steps: int) -> None:
        super().check_steps(steps)
        if NUM_STEPS % steps:
            # In others diffusers goes to a step beside the next one, and does not end at the latents.
            raise UserError(
                f"Expected a number of DDIM steps that divides {NUM_STEPS:,}, such as 20, 25, 40, 50 or 100, got "
                f"{steps}."
            )

    def sample(self, network: Network, noise: Tensor, steps: int) -> Tensor:
        self.check_steps(steps)
        self._scheduler.set_timesteps(steps)
        state = noise
        for time in self._scheduler.timesteps.tolist():
            times = torch.full((len(state),), time, device=state.device)
            state = self._scheduler.step(network(state, times), time, state).prev_sample
        return state


class RectifiedFlow(Process):
    """Straight paths between latents and noise (Liu et al. 2022), as most models of 2025 and 2026 have them.

    σ of a training clip is logit-normal (Esser et al. 2024), then shifted to s·σ / (1 + (s − 1)·σ), and the steps of
    sampling are shifted alike. The loss is the mean squared error of the velocity; of an x-prediction it is that of
    (x_σ − x) / σ, with σ at least 0.05.

    Args:
        prediction: What the network predicts: "x", the latents, or "v", the velocity.
        shift: s; None is √(numbers / 4,096), and at least 1: the more numbers a clip's latents have, the more noise
            hides them.
    """

    def __init__(self, prediction: Literal["x", "v"] = "v", shift: float | None = None) -> None:
        if prediction not in ("x", "v"):
            raise UserError(f"Expected model.process.prediction to be x or v, got {prediction!r}.")
        if shift is not None and not 0 < shift < math.inf:
            raise UserError(f"Expected model.process.shift above 0, or null for that of the latents, got {shift}.")
        self.init_args = {"prediction": prediction, "shift": shift}
        self.prediction, self.shift = prediction, shift
        self._diffusers = _import_diffusers()

    def shift_of(self, numbers: int) -> float:
        """Return s of latents with so many numbers."""
        return max(1.0, math.sqrt(numbers / _REFERENCE)) if self.shift is None else self.shift

    def draw_times(self, state: Tensor) -> Tensor:
        sigma = torch.randn(len(state), device=state.device).sigmoid()
        shift = self.shift_of(state.shape[1])
        return NUM_STEPS * shift * sigma / (1 + (shift - 1) * sigma)

    def add_noise(self, state: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        sigma = times[:, None] / NUM_STEPS
        return (1 - sigma) * state + sigma * noise

    def loss(self, output: Tensor, state: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        if self.prediction == "v":
            return (output - (noise - state)).square().mean(1)
        sigma = (times / NUM_STEPS).clamp_min(_LEAST_SIGMA)
        return (output - state).square().mean(1) / sigma.square()

    def sample(self, network: Network, noise: Tensor, steps: int) -> Tensor:
        self.check_steps(steps)
        scheduler = self._diffusers.FlowMatchEulerDiscreteScheduler(NUM_STEPS, shift=self.shift_of(noise.shape[1]))
        scheduler.set_timesteps(sigmas=[1 - step / steps for step in range(steps)])
        state = noise
        for time in scheduler.timesteps:
            output = network(state, torch.full((len(state),), float(time), device=state.device))
            velocity = output if self.prediction == "v" else (state - output) / (time.to(state.device) / NUM_STEPS)
            state = scheduler.step(velocity, time, state).prev_sample
        return state


def _import_diffusers() -> Any:
    try:
        import diffusers
    except ModuleNotFoundError as error:
        raise UserError(
            "Expected the package diffusers, whose schedulers add and remove noise, got none; run pip install "
            "'vidtwin[diffusion]'."
        ) from error
    return diffusers
