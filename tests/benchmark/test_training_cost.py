"""Costs of a training's step that are counted on fake tensors, against steps that run."""

import math

import pytest
import torch
from tiny import Clips, tiny_task
from torch.optim import AdamW
from torch.utils.flop_counter import FlopCounterMode

from vidtwin.benchmark.cost import flops
from vidtwin.benchmark.memory import TensorMemory
from vidtwin.benchmark.training_cost import StepCost, count_step
from vidtwin.cli import main
from vidtwin.cli.plan import PlanningTrainer
from vidtwin.errors import UserError
from vidtwin.losses.autoencoder import AutoencoderLoss
from vidtwin.training.task import AutoencoderTask
from vidtwin.training.teacher import Teacher

SHAPE = (3, 4, 32, 32)


def run_step(task: AutoencoderTask, clip: torch.Tensor, players: list[torch.optim.Optimizer]) -> None:
    for _, terms in task.losses(clip, 0):
        terms["total"].backward()
    for player in players:
        player.step()
        player.zero_grad()


@pytest.fixture(scope="module")
def averaged():
    """Return the cost of a step with a discriminator and averaged weights."""
    return count_step(tiny_task(gan_start=0, ema_decay=0.9), SHAPE, 2)


@pytest.mark.parametrize("recompute", [False, "elementwise", True])
def test_counts_are_those_of_a_step_that_runs(recompute):
    task = tiny_task(
        gan_start=0, model={"activation_checkpointing": recompute}, optimizer=lambda p: AdamW(p, fused=True)
    )
    before = {name: value.clone() for name, value in task.state_dict().items()}
    cost = count_step(task, SHAPE, 2)
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())  # it counts a copy
    players = [task.optimizer(task.autoencoder.parameters()), AdamW(task.loss.discriminator.parameters())]
    clip = torch.rand(2, *SHAPE) * 2 - 1
    run_step(task, clip, players)  # makes the optimizers' state
    state = [value for player in players for entry in player.state.values() for value in entry.values()]
    with TensorMemory(torch.device("cpu")) as memory:
        memory.track([*task.parameters(), *task.buffers(), clip, state])
        for _, terms in task.losses(clip, 0):
            terms["total"].backward()
    assert cost.peak_bytes == pytest.approx(memory.peak, rel=0.05)
    both = sum(p.numel() for p in task.parameters())
    assert sum(cost.parameters.values()) == both
    assert cost.gradients_bytes == 4 * both
    assert cost.optimizer_bytes == 8 * both  # two moments in fp32


def test_flops_are_three_forward_passes_of_the_autoencoder_and_those_of_the_networks_of_the_loss():
    task = tiny_task(gan_start=0)
    cost = count_step(task, SHAPE, 2)
    forward = 2 * sum(flops(task.autoencoder, SHAPE).values())
    assert cost.flops["autoencoder"] == pytest.approx(3 * forward, rel=0.03)  # no gradient for the clip
    frames = torch.rand(2, *SHAPE)
    with FlopCounterMode(display=False) as counter:
        task.loss.discriminator(frames)
    # Forward and backward for the input in the generator's pass; both ways, twice, in its own.
    assert cost.flops["discriminator"] > 6 * counter.get_total_flops()
    assert "perceptual" not in cost.flops


def test_recomputing_all_but_products_saves_a_quarter_of_the_activations_and_runs_no_product_again():
    costs = {}
    for option in (False, "elementwise", True):
        task = tiny_task(model={"activation_checkpointing": option, "depth": 3, "hidden_size": 64})
        costs[option] = count_step(task, SHAPE, 16)
    assert costs["elementwise"].flops == costs[False].flops
    assert costs["elementwise"].activations_bytes < 0.75 * costs[False].activations_bytes
    assert costs[True].activations_bytes < 0.7 * costs["elementwise"].activations_bytes


def test_lpips_counts_without_its_weights_and_its_frames(monkeypatch):
    monkeypatch.setenv("VIDTWIN_OFFLINE", "1")

    def lpips(frames: int | None) -> int:
        loss = AutoencoderLoss(perceptual_backbone="missing.pth", perceptual_frames=frames)
        return count_step(AutoencoderTask(tiny_task().autoencoder, loss), SHAPE, 1).flops["perceptual"]

    # VGG-16 on 224 px: 15.35 G multiplications; twice forward, once backward; a frame of 32 px is a 49th.
    one = lpips(1)
    assert one == pytest.approx(3 * 2 * 15.35e9 / 49, rel=0.02)
    assert lpips(None) == 4 * one


def test_the_plan_multiplies_what_a_step_in_parts_and_in_bfloat16_costs(capsys, monkeypatch):
    task = tiny_task(accumulation=2, ema_decay=0.9)
    plain, cost = count_step(task, SHAPE, 2), count_step(task, SHAPE, 2, bf16=True)
    assert cost.flops == plain.flops
    buffers = sum(buffer.nbytes for buffer in task.buffers())
    inputs = 4 * 2 * math.prod(SHAPE)
    both = 2 * 4 * plain.parameters["autoencoder"]  # weights and their average
    assert cost.weights_bytes == plain.weights_bytes == pytest.approx(both + buffers + inputs, rel=0.01)
    assert cost.activations_bytes < 0.9 * plain.activations_bytes

    def counted(*_, bf16: bool) -> StepCost:
        assert bf16
        return cost

    monkeypatch.setattr("vidtwin.cli.plan.count_step", counted)
    planner = PlanningTrainer(accelerator="gpu", devices=4, precision="bf16-mixed", strategy="fsdp2", max_steps=100)
    lines = planner.plan(task, Clips(), devices=2, tflops=1.0)
    speed = 2 * 0.4e12 / sum(cost.flops.values())
    assert f"{speed:.3g} clips/s a device at 40% of that, assumed; {2 * speed:.3g} clips/s in all" in lines[-2]
    assert lines[-1].startswith("  training  100 steps, 400 clips: ")
    assert cost.split(1) == (cost.weights_bytes, cost.optimizer_bytes, cost.activations_bytes)
    assert capsys.readouterr().out.splitlines() == lines
    with pytest.raises(UserError, match=r"--tflops above 0, got -1"):
        planner.plan(task, Clips(), tflops=-1)


def test_fsdp2_splits_the_autoencoder_alone(averaged, monkeypatch):
    cost = averaged
    own = 4 * cost.parameters["autoencoder"]
    weights, state, rest = cost.split(4)
    assert cost.weights_bytes - weights == pytest.approx(0.75 * 2 * own)  # and the average
    assert cost.optimizer_bytes - state == pytest.approx(0.75 * 2 * own)
    assert cost.activations_bytes - rest == pytest.approx(0.75 * own)  # gradients
    seen = []
    monkeypatch.setattr("vidtwin.cli.plan.count_step", lambda *_, **__: cost)
    monkeypatch.setattr(StepCost, "split", lambda cost, devices: seen.append(devices) or (0.0, 0.0, 0.0))
    for strategy in ("fsdp2", "fsdp2_bf16", "ddp", "auto"):
        planner = PlanningTrainer(accelerator="gpu", strategy=strategy, max_steps=100)
        planner.plan(tiny_task(), Clips(), devices=2, tflops=1.0)
    assert seen == [2, 2, 1, 1]


def test_frozen_parts_have_neither_gradients_nor_a_state():
    whole, half = (count_step(tiny_task(freeze=parts, ema_decay=0.9), SHAPE, 2) for parts in (None, ["encoder"]))
    frozen = 4 * sum(p.numel() for p in tiny_task().autoencoder.encoder.parameters())
    assert whole.gradients_bytes - half.gradients_bytes == frozen
    assert whole.optimizer_bytes - half.optimizer_bytes == 2 * frozen
    assert whole.weights_bytes - half.weights_bytes == frozen  # of the average
    assert half.flops["autoencoder"] < 0.9 * whole.flops["autoencoder"]


@pytest.mark.parametrize(("accelerator", "share"), [("gpu", "40%"), ("cuda", "40%"), ("cpu", "88%"), ("auto", "88%")])
def test_a_plan_for_gpus_is_not_measured_on_a_cpu(accelerator, share, averaged, monkeypatch):
    monkeypatch.setattr("vidtwin.cli.plan.count_step", lambda *_, **__: averaged)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("vidtwin.cli.plan.measure_rate", lambda *_: 1e12)
    planner = PlanningTrainer(accelerator=accelerator, max_steps=100)
    if share == "40%":
        with pytest.raises(UserError, match=r"Expected --tflops of the GPU that the config asks for, got none"):
            planner.plan(tiny_task(), Clips())
    lines = planner.plan(tiny_task(), Clips(), tflops=1.0 if share == "40%" else None)
    assert f"at {share} of that" in next(line for line in lines if "speed" in line)


def test_a_teachers_passes_are_not_passed_over():
    with pytest.raises(UserError, match=r"without model\.teacher, whose passes are not counted"):
        PlanningTrainer(max_steps=100).plan(tiny_task(teacher=Teacher("x.ckpt")), Clips(), tflops=1.0)


def test_the_command_reads_no_video_and_needs_no_gpu(capsys):
    config = ["--config", "configs/demo.yaml", "--config", "configs/trainer/gpu.yaml", "--data.root", "missing"]
    config += ["--model.autoencoder.depth=1", "--model.loss.perceptual_weight=0"]
    assert main(["plan", *config, "--devices", "3", "--clips", "13", "--tflops", "100"]) == 0
    out = capsys.readouterr().out
    assert "on each of 3 devices, bf16-mixed" in out
    assert "100 TFLOP/s, as given" in out
    assert "training  2 steps, 13 clips: " in out
