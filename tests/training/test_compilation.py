"""Compiled networks take the steps of plain ones, whatever else a training uses."""

import json
import re
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from sharded_run import STEPS, Diary, Uneven, saved, task_of
from tiny import Clips, tiny_task, trainer

from vidtwin.errors import UserError
from vidtwin.storage import checkpoints
from vidtwin.training.compilation import Compilation
from vidtwin.training.task import AutoencoderTask


def fit(folder: Path, compilation: Compilation | None, steps: int, ckpt_path: Path | None = None) -> AutoencoderTask:
    task = tiny_task(
        gan_start=0,
        warmup_steps=1,
        model={"qformer_dropout": 0.0},
        ema_decay=0.9,
        gradient_clip_norm=0.1,
    )
    trainer(folder, steps, callbacks=[saved(folder, 1)], compilation=compilation).fit(
        task, Clips(), ckpt_path=ckpt_path
    )
    return task


def held(path: Path) -> dict[str, torch.Tensor]:
    checkpoint = checkpoints.read(path)
    return checkpoint["state_dict"] | {f"ema.{name}": value for name, value in checkpoint["ema"]["values"].items()}


def test_a_compiled_training_resumes_a_plain_one_and_takes_its_steps(tmp_path):
    fit(tmp_path / "plain", None, 2)
    torch._dynamo.utils.counters.clear()
    compiled = fit(
        tmp_path / "compiled", Compilation(backend="aot_eager"), 2, tmp_path / "plain" / "step-00000001.ckpt"
    )
    # Names of weights and their values, the average's too; not a graph break, and every unit was run by its graph.
    torch.testing.assert_close(held(tmp_path / "compiled" / "last.ckpt"), held(tmp_path / "plain" / "last.ckpt"))
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] >= 4
    assert not any("forward" in vars(unit) for unit in compiled.modules())  # commands after the training are plain


@pytest.mark.parametrize("parts", [[], ["decoder"], ["autoencoder", "discriminator"]])
def test_unknown_parts_are_refused_and_a_discriminator_whose_gradient_is_differentiated(parts, tmp_path):
    task = task_of()  # with R1
    with pytest.raises(UserError, match=rf"trainer\.compilation\.parts among autoencoder, got {re.escape(str(parts))}"):
        trainer(tmp_path, 2, compilation=Compilation(parts)).fit(task, Clips())


def test_an_unknown_backend_is_refused():
    with pytest.raises(UserError, match=r"trainer\.compilation\.backend among .*inductor.*, got 'inducto'"):
        Compilation(backend="inducto")


def test_a_part_that_is_named_twice_is_compiled_and_restored_once():
    unit = torch.nn.Linear(2, 2)
    compilation = Compilation(["part", "part"], backend="eager")
    compilation.compile({"part": [unit]})
    compilation.restore()
    assert "forward" not in vars(unit)


def train_on_ranks(folder: Path) -> None:
    """Train under DDP and under FSDP2, plain and compiled, and with weights gathered in bfloat16."""
    losses: dict[str, Any] = {}
    for name, strategy, backend, precision in (
        ("ddp", "ddp", None, "32-true"),
        ("ddp compiled", "ddp", "aot_eager", "32-true"),
        ("fsdp2", "fsdp2", None, "32-true"),
        ("fsdp2 compiled", "fsdp2", "aot_eager", "32-true"),
        ("bf16", "fsdp2", None, "bf16-mixed"),
        ("bf16 gathered", "fsdp2_bf16", None, "bf16-mixed"),
        ("bf16 gathered, compiled", "fsdp2_bf16", "aot_eager", "bf16-mixed"),
    ):
        compilation = Compilation(["autoencoder"], backend=backend) if backend else None
        task, diary, types = task_of(depth=2), Diary(), set()
        callbacks = [diary, saved(folder / name, 9), Types(types)]
        run = trainer(
            folder,
            STEPS,
            callbacks=callbacks,
            devices=2,
            strategy=strategy,
            precision=precision,
            compilation=compilation,
        )
        run.fit(task, Uneven(2))
        losses[name] = {"losses": diary.losses, "types": sorted(map(str, types))}
    (folder / f"rank{run.global_rank}.json").write_text(json.dumps(losses))


class Types(Callback):
    """Collect the types of a block's weights while it runs."""

    def __init__(self, types: set[torch.dtype]) -> None:
        self.types = types

    def on_train_start(self, trainer, task):
        block = task.autoencoder.encoder.transformer.blocks[0]
        block.mlp.register_forward_pre_hook(lambda mlp, _: self.types.add(mlp[0].weight.dtype))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    if not torch.distributed.is_gloo_available():
        pytest.skip("this torch comes without gloo")
    folder = tmp_path_factory.mktemp("ranks")
    forked.run_ranks(train_on_ranks, folder, stderr=folder / "stderr")
    return folder, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "other", "tolerance"),
    [
        ("ddp compiled", "ddp", 1e-4),
        ("fsdp2 compiled", "fsdp2", 1e-4),
        ("bf16 gathered, compiled", "bf16 gathered", 0.02),
    ],
)
def test_compiled_blocks_agree_under_ddp_and_fsdp2(ranks, name, other, tolerance):
    folder, outcomes = ranks
    for rank in outcomes:
        assert rank[name]["losses"] == pytest.approx(rank[other]["losses"], rel=tolerance)
    if tolerance < 1e-3:
        torch.testing.assert_close(
            held(folder / name / "last.ckpt"), held(folder / other / "last.ckpt"), rtol=1e-3, atol=2e-5
        )


@pytest.mark.slow
def test_weights_gathered_in_bfloat16_are_stored_in_float32(ranks):
    folder, outcomes = ranks
    for rank in outcomes:
        assert rank["bf16"]["types"] == ["torch.float32"]
        assert rank["bf16 gathered"]["types"] == ["torch.bfloat16"]
        assert rank["bf16 gathered"]["losses"] == pytest.approx(rank["bf16"]["losses"], rel=0.02)
    plain, gathered = (held(folder / name / "last.ckpt") for name in ("bf16", "bf16 gathered"))
    assert {value.dtype for value in gathered.values()} == {torch.float32}
    changed = [name for name in plain if not torch.equal(plain[name], gathered[name])]
    assert changed  # else the weights were not rounded
    torch.testing.assert_close(gathered, plain, rtol=0.05, atol=2e-3)


def test_weights_are_gathered_in_bfloat16_in_that_precision_alone(tmp_path):
    with pytest.raises(UserError, match=r"trainer\.precision bf16-mixed .* got 32-true; .*strategy fsdp2"):
        trainer(tmp_path, 2, strategy="fsdp2_bf16", devices=1).fit(task_of(), Clips())


@pytest.mark.slow
def test_inductors_kernels_take_the_steps_of_eager_ones(tmp_path):
    fit(tmp_path / "plain", None, 2)
    fit(tmp_path / "compiled", Compilation(), 2)
    torch.testing.assert_close(
        held(tmp_path / "compiled" / "last.ckpt"), held(tmp_path / "plain" / "last.ckpt"), rtol=1e-3, atol=2e-5
    )
