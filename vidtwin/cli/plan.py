"""`vidtwin plan`: say what a training costs before it runs. Imports torch and lightning."""

from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule

from vidtwin import console
from vidtwin.benchmark.cost import device_name
from vidtwin.benchmark.training_cost import StepCost, count_step, measure_rate
from vidtwin.data import ClipSource
from vidtwin.errors import UserError
from vidtwin.training.task import AutoencoderTask
from vidtwin.training.trainer import VideoTrainer

# By device and whether the precision is bfloat16; those of a CPU are measured (docs/performance.md).
_ASSUMED = {("cuda", False): 0.4, ("cuda", True): 0.4, ("cpu", False): 0.88, ("cpu", True): 0.6}
_PARTS = ("autoencoder", "perceptual", "discriminator")


class PlanningTrainer(VideoTrainer):
    """Count the training of a config on this machine, whatever devices the config asks for.

    Attributes:
        wanted: Arguments of the trainer as the config has them.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.wanted = dict(kwargs)
        kwargs |= {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "callbacks": None}
        super().__init__(*args, **kwargs)

    def plan(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        devices: int = 1,
        clips: int | None = None,
        tflops: float | None = None,
        utilization: float | None = None,
    ) -> list[str]:
        """Predict FLOPs, memory, speed and duration of a training, and print them.

        Args:
            model: The task.
            datamodule: The data, of which batch size and clips' sizes count; no video is read.
            devices: Number of devices, on all machines; speed is taken to grow with it.
            clips: Number of clips to train on; by default trainer.max_steps batches on each device.
            tflops: Rate of a device in large matrix products of the training's precision, in TFLOP/s; by default it is
                measured on this machine, which must have such a device.
            utilization: Share of that rate which the training reaches; by default 0.4 on a GPU, which is an assumption,
                and on a CPU 0.88, or 0.6 in bfloat16, which were measured on one.

        Returns:
            The lines of the report.
        """
        if not isinstance(model, AutoencoderTask):
            raise UserError(f"Expected the training of an autoencoder to plan, got {type(model).__name__}.")
        for name, value in {"devices": devices, "clips": clips, "tflops": tflops, "utilization": utilization}.items():
            if value is not None and not value > 0:
                raise UserError(f"Expected --{name} above 0, got {value}.")
        if model.teacher is not None:
            raise UserError("Expected a training without model.teacher, whose passes are not counted; leave it out.")
        if utilization is not None and utilization > 1:
            raise UserError(f"Expected --utilization of at most 1, got {utilization}; it is a share, 0.4 for 40%.")
        if not isinstance(datamodule, ClipSource):
            raise UserError(f"Expected data of clips to plan with, got {type(datamodule).__name__}.")
        frames, size, batch = datamodule.settings.num_frames, datamodule.settings.size, datamodule.batch_size
        if frames is None or size is None:
            raise UserError("Expected clips of one length and size, got any; set data.num_frames and data.resolution.")
        wanted = str(self.wanted.get("accelerator") or "auto")
        device = torch.device("cuda" if torch.cuda.is_available() and wanted != "cpu" else "cpu")
        kind = "cuda" if wanted in ("gpu", "cuda") else device.type
        if tflops is None and kind != device.type:
            raise UserError(
                "Expected --tflops of the GPU that the config asks for, got none, and this machine has no GPU."
            )
        precision = str(self.wanted.get("precision") or "32-true")
        cost = count_step(model, (3, frames, *size), batch, bf16=precision.startswith("bf16"))

        lines = [", ".join(f"{part} of {number:,} parameters" for part, number in cost.parameters.items())]
        lines.append(
            f"a step: {_count(batch, 'clip')} of {frames} frames of {size[1]}x{size[0]} on each of "
            f"{_count(devices, 'device')}, {precision}"
        )
        total, is_bfloat16 = sum(cost.flops.values()), precision.startswith("bf16")
        parts = ", ".join(f"{part} {cost.flops[part] / 1e12:.3g}" for part in _PARTS if part in cost.flops)
        lines.append(f"  TFLOPs    {total / 1e12:.3g}: {parts}")
        lines.append(f"  memory    {_describe_memory(cost, devices if self._shards else 1)} on each device")
        if tflops is None:
            tflops = measure_rate(device, is_bfloat16) / 1e12
            lines.append(f"  products  {tflops:.3g} TFLOP/s, measured on {device_name(device)}")
        else:
            lines.append(f"  products  {tflops:.3g} TFLOP/s, as given")
        share = utilization or _ASSUMED[kind, is_bfloat16]
        speed = batch * tflops * 1e12 * share / total
        assumed = "" if utilization else ", assumed"
        lines.append(
            f"  speed     {speed:.3g} clips/s a device at {share:.0%} of that{assumed}; {devices * speed:.3g} clips/s "
            "in all"
        )
        steps = self.max_steps if clips is None else -(-clips // (batch * devices))
        if steps > 0:
            number = clips or steps * batch * devices
            duration = _duration(number / (devices * speed))
            lines.append(f"  training  {_count(steps, 'step')}, {_count(number, 'clip')}: {duration}")
        for line in lines:
            console.write(line)
        return lines

    @property
    def _shards(self) -> bool:
        return str(self.wanted.get("strategy")).startswith("fsdp2")


def _describe_memory(cost: StepCost, devices: int) -> str:
    """Describe the peak on each of the devices that FSDP2 uses; 1 for any other training."""
    weights, state, rest = cost.split(devices)
    parts = f"weights {weights / 1e9:.2f}, optimizer {state / 1e9:.2f}, activations and gradients {rest / 1e9:.2f}"
    return f"{(weights + state + rest) / 1e9:.2f} GB: {parts}"


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}" + ("s" if number != 1 else "")


def _duration(seconds: float) -> str:
    if seconds >= 2 * 86400:
        return f"{seconds / 86400:.1f} days"
    return f"{seconds / 3600:.1f} hours" if seconds >= 2 * 3600 else f"{seconds / 60:.0f} minutes"
