"""Rerun a step that `StepGuard` has dumped, and report where its values stop being finite."""

import math
from collections.abc import Callable
from typing import Any

from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn

from vidtwin import weights
from vidtwin.errors import UserError
from vidtwin.training.base import Batch, TrainingTask
from vidtwin.training.finite import bad_gradients, bad_terms


def read(path: str) -> dict[str, Any]:
    """Read a dump; raise `UserError` for another file."""
    content = weights.read(path)
    if not isinstance(content, dict) or not {"reason", "batch", "state_dict", "precision", "config"} <= set(content):
        raise UserError(f"Expected the dump of a skipped step, got {path}; a run's folder `nonfinite` has them.")
    return content


def replay(task: TrainingTask, dump: dict[str, Any]) -> list[str]:
    """Rerun the step of a dump with the same batch, weights and random draws.

    Args:
        task: Built from the dump's config and prepared by `prepare_replay`, on the device to run on.
        dump: Content of a file of `StepGuard`.

    Returns:
        Lines of a report: clips, weights, the first module with a non-finite output, terms of the loss, gradients.
    """
    task.load_state_dict(dump["state_dict"])
    task.batches, task.seed = dump["training"]["batches"], dump["training"]["seed"]
    batch: Batch = move_data_to_device(dump["batch"], next(task.parameters()).device)
    lines = [f"skipped at step {dump['step']}: {dump['reason']}"]
    lines += _describe_clips(batch)
    bad = [name for name, p in task.named_parameters() if not p.isfinite().all()]
    sizes = {name: float(p.detach().abs().nan_to_num(math.inf, math.inf).max()) for name, p in task.named_parameters()}
    largest = max(sizes, key=lambda name: sizes[name])
    lines.append(f"weights: {_summarize(bad)}; the largest is {sizes[largest]:.3g} in {largest}")

    broken: list[str] = []
    hooks = [module.register_forward_hook(_make_hook(name, broken)) for name, module in task.named_modules() if name]
    task.train().zero_grad()
    task.seed_draws(dump["rank"])
    reason = None
    try:
        for index, (share, losses) in enumerate(task.part_losses(batch, dump["step"])):
            of = f" (part {index + 1})" if task.accumulation > 1 else ""
            for player, terms in losses:
                lines += [f"{player}/{name} = {float(value.detach()):.6g}{of}" for name, value in terms.items()]
                if not terms["total"].isfinite():
                    own, shared = bad_terms(terms)
                    reason = reason or own or shared
                (share * terms["total"]).backward()
    finally:
        for hook in hooks:
            hook.remove()
    lines.append(f"first module with a non-finite output: {broken[0] if broken else 'none'}")
    wrong = [name for name, p in task.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    lines.append(f"gradients: {_summarize(wrong)}")
    if reason or wrong:
        return [*lines, f"reproduced: {reason or bad_gradients(task)}"]
    return [
        *lines,
        "not reproduced: all values are finite; the device, precision or number of ranks may differ",
    ]


def _make_hook(name: str, broken: list[str]) -> Callable[[nn.Module, Any, Any], None]:
    def record(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.is_floating_point() and not output.isfinite().all():
            broken.append(name)  # inner modules end first, so the first one is the source

    return record


def _describe_clips(batch: Batch) -> list[str]:
    """Return a line per clip: the range of its pixels, or of each of its latents or codes."""
    kinds = {"": batch["clip"]} if "clip" in batch else {**batch.get("latents", {}), **batch.get("codes", {})}
    count = len(next(iter(kinds.values())))
    lines = []
    for index, name in zip(range(count), batch.get("name", range(count)), strict=True):
        ranges = [f"{kind} {_describe_range(values[index])}".strip() for kind, values in kinds.items()]
        lines.append(f"clip {name}: {'; '.join(ranges)}")
    return lines


def _describe_range(clip: Tensor) -> str:
    bad = int((~clip.isfinite()).sum())
    if bad:
        return f"{bad} of {clip.numel()} numbers are not finite"
    low, high = float(clip.min()), float(clip.max())
    return f"constant, {low:.3f}" if low == high else f"from {low:.3f} to {high:.3f}"


def _summarize(names: list[str]) -> str:
    return f"{len(names)} not finite, first {names[0]}" if names else "all finite"
