"""Both diffusion processes against their closed forms, and a denoiser that is known exactly."""

import math
import sys

import numpy as np
import pytest
import torch

from vidtwin.diffusion.process import DDPM, Process, RectifiedFlow
from vidtwin.errors import UserError

PROCESSES = {"ddpm": DDPM, "flow v": RectifiedFlow, "flow x": lambda: RectifiedFlow("x")}


def coefficients(process: Process, times: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of data and noise at times, from the formulas."""
    if isinstance(process, RectifiedFlow):
        return 1 - times / 1000, times / 1000
    kept = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))  # E.1: the product of all 1 - beta
    kept = torch.tensor(kept)[times.long()]
    return kept.sqrt().float(), (1 - kept).sqrt().float()


def output_of(process: Process, data: torch.Tensor, state: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """Return the prediction of a network that knows the data."""
    if isinstance(process, RectifiedFlow) and process.prediction == "v":
        return (state - data) / (times[:, None] / 1000)
    return data


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("steps", [1, 8, 50])
def test_with_a_perfect_denoiser_sampling_returns_the_data(name, steps):
    process = PROCESSES[name]()
    data, noise = torch.randn(3, 8), torch.randn(3, 8)
    found = process.sample(lambda state, times: output_of(process, data, state, times), noise, steps)
    torch.testing.assert_close(found, data, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", PROCESSES)
def test_with_the_best_denoiser_of_a_normal_distribution_its_samples_are_of_it(name):
    """E[x0 | x_t] of N(mean, std²) is linear in x_t: the steps must keep mean and spread."""
    process, mean, std = PROCESSES[name](), 2.0, 0.5

    def network(state: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        kept, added = (each[:, None] for each in coefficients(process, times))
        gain = kept * std**2 / (kept**2 * std**2 + added**2)
        return output_of(process, mean + gain * (state - kept * mean), state, times)

    torch.manual_seed(0)
    found = process.sample(network, torch.randn(4000, 2), 50)
    assert float(found.mean()) == pytest.approx(mean, abs=0.03)
    assert float(found.std()) == pytest.approx(std, rel=0.06)


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("time", [1, 300, 999])
def test_noisy_states_have_the_mean_and_the_variance_of_the_closed_form(name, time):
    process = PROCESSES[name]()
    torch.manual_seed(0)
    data = torch.tensor([[-1.0, 0.5, 3.0]]).expand(20_000, 3)
    times = torch.full((len(data),), time)
    noisy = process.add_noise(data, torch.randn_like(data), times)
    kept, added = coefficients(process, times[:1])
    torch.testing.assert_close(noisy.mean(0), kept * data[0], rtol=0, atol=0.03)
    torch.testing.assert_close(noisy.var(0), (added**2).expand(3), rtol=0.05, atol=1e-6)


@pytest.mark.parametrize("name", PROCESSES)
def test_the_loss_of_a_perfect_denoiser_is_0_and_grows_with_its_error(name):
    process = PROCESSES[name]()
    data, noise = torch.randn(4, 6), torch.randn(4, 6)
    times = torch.tensor([10, 300, 600, 990])
    output = output_of(process, data, process.add_noise(data, noise, times), times)
    torch.testing.assert_close(process.loss(output, data, noise, times), torch.zeros(4), rtol=0, atol=1e-6)
    assert (process.loss(output + 0.1, data, noise, times) >= 0.0099).all()


def test_the_loss_of_an_x_prediction_is_that_of_its_velocity():
    data, noise, output = torch.randn(3, 4, 6)
    times = torch.tensor([100.0, 400.0, 700.0, 1000.0])
    ours, theirs = RectifiedFlow("x"), RectifiedFlow("v")
    velocity = output_of(theirs, output, theirs.add_noise(data, noise, times), times)
    torch.testing.assert_close(ours.loss(output, data, noise, times), theirs.loss(velocity, data, noise, times))


def test_more_latents_have_more_noise():
    process = RectifiedFlow()
    assert [process.shift_of(numbers) for numbers in (100, 4096, 4 * 4096)] == [1.0, 1.0, 2.0]
    torch.manual_seed(0)
    few, many = (process.draw_times(torch.empty(4000, numbers)) for numbers in (64, 4 * 4096))
    assert float(few.median()) == pytest.approx(500, abs=20)
    assert float(many.median()) == pytest.approx(1000 * 2 / 3, abs=20)  # 2 · 0.5 / (1 + 0.5)
    assert float(many.max()) <= 1000
    seen: list[float] = []
    RectifiedFlow(shift=3.0).sample(lambda state, times: seen.append(float(times[0])) or state, torch.zeros(1, 2), 4)
    np.testing.assert_allclose(seen, [1000 * 3 * s / (1 + 2 * s) for s in (1, 0.75, 0.5, 0.25)], rtol=1e-5)


def test_times_of_ddpm_are_all_1000_steps():
    torch.manual_seed(0)
    times = DDPM().draw_times(torch.empty(20_000, 1))
    assert (int(times.min()), int(times.max()), times.dtype) == (0, 999, torch.int64)
    seen: list[float] = []
    DDPM().sample(lambda state, times: seen.append(float(times[0])) or state, torch.zeros(1, 2), 50)
    assert seen == [999 - 20 * step for step in range(50)]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: RectifiedFlow("eps"), "prediction to be x or v, got 'eps'"),
        (lambda: RectifiedFlow(shift=0.0), "shift above 0, or null"),
        (lambda: RectifiedFlow().check_steps(1001), "1 to 1,000 steps"),
        (lambda: DDPM(beta_end=math.nan), "0 < model.process.beta_start <= beta_end < 1, got 0.0001 and nan"),
        (lambda: DDPM().check_steps(7), "divides 1,000, such as 20, 25, 40, 50 or 100, got 7"),
    ],
)
def test_wrong_arguments_are_refused(make, words):
    with pytest.raises(UserError, match=words):
        make()


def test_without_diffusers_the_message_says_what_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match=r"pip install 'vidtwin\[diffusion\]'"):
        DDPM()
