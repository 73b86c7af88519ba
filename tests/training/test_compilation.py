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
from sweeping import Entry, NumberedData, sweep
from sweeping import checkpoint as save
from tiny import Clips, tiny_model, tiny_task, trainer

from vidtwin.cli import main
from vidtwin.compilation import list_units
from vidtwin.errors import UserError
from vidtwin.storage import checkpoints
from vidtwin.storage.latent_files import Manifest, Shard, shard_path
from vidtwin.tables import read_table
from vidtwin.training.compilation import Compilation
from vidtwin.training.task import AutoencoderTask
from vidtwin.video import write_video


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


@pytest.fixture
def runs() -> list[int]:
    """Grow by one with each run of a graph by the backend "counting", which computes as without a compiler."""
    found: list[int] = []

    def counting(graph, inputs):
        def run(*arguments):
            found.append(1)
            return graph(*arguments)

        return run

    torch._dynamo.reset()
    torch._dynamo.register_backend(counting, "counting")
    yield found
    torch._dynamo.reset()
    torch._dynamo.backends.registry._COMPILER_FNS.pop("counting")


class InValidation(Callback):
    """Count the runs of graphs within each validation."""

    def __init__(self, runs: list[int]) -> None:
        self.runs, self.found, self._before = runs, [], 0

    def on_validation_batch_start(self, *_: Any) -> None:
        self._before = len(self.runs)

    def on_validation_batch_end(self, *_: Any) -> None:
        self.found.append(len(self.runs) - self._before)


def test_validation_runs_the_compiled_blocks_in_a_training_and_alone(tmp_path, runs):
    counted, metrics = InValidation(runs), []
    for compilation in (None, Compilation(["autoencoder"], backend="counting")):
        task = tiny_task(warmup_steps=1, model={"qformer_dropout": 0.0})
        run = trainer(
            tmp_path, 3, callbacks=[counted], compilation=compilation, limit_val_batches=1, num_sanity_val_steps=1
        )
        run.fit(task, Clips())
        metrics.append(dict(run.callback_metrics))
        (alone,) = run.validate(task, Clips())
        metrics.append(alone)
    units = len(task.compilable()["autoencoder"])
    assert counted.found[:3] == [0, 0, 0]  # before the training, after it, and alone
    assert counted.found[3:] == [units] * 3
    torch.testing.assert_close(metrics[2:], metrics[:2])


@pytest.mark.parametrize("command", ["encode", "test"])
def test_commands_run_the_compiled_blocks_with_the_numbers_of_plain_ones(
    tmp_path, runs, command, without_pictures, capsys
):
    torch.manual_seed(0)
    model = tiny_model().eval()
    units = len(list_units(model)) - 1
    save(tmp_path / "tiny.ckpt", model=model)
    numbers = []
    for name, words in (("plain", []), ("compiled", ["--compile", "reduce-overhead", "--compile_backend", "counting"])):
        out = tmp_path / name
        if command == "encode":
            frames = (torch.rand(3 * 4, 32, 32, 3, generator=torch.Generator().manual_seed(1)) * 255).byte().numpy()
            write_video(tmp_path / "a.mp4", frames, 8)
            words = ["encode", str(tmp_path / "a.mp4"), "--out", str(out), "--batch_size", "2", *words]
            words += ["--ckpt_path", str(tmp_path / "tiny.ckpt"), "--accelerator", "cpu", "--progress", "false"]
            assert main(words) == 0
            shard = Shard(shard_path(out, 0), Manifest.read(out).digest)
            numbers.append({latent: shard.rows(0, latent, 0, 3) for latent in ("structure", "dynamics")})
        else:
            options = {"compile": "reduce-overhead", "compile_backend": "counting"} if words else {}
            data = NumberedData(count=4, num_frames=4)
            entry = Entry("tiny", checkpoint=str(tmp_path / "tiny.ckpt"))
            assert sweep(out, [entry], data, references=[], **options).run() == 0
            clips = read_table(out / "rows" / "tiny" / "clips.csv")
            numbers.append({clip["name"] + clip["start_frame"]: torch.tensor(float(clip["psnr"])) for clip in clips})
            identities = [json.loads(path.read_text())["identity"] for path in tmp_path.glob("*/rows/*/results.json")]
            assert len(set(identities)) == len(identities)
    torch.testing.assert_close(numbers[1], numbers[0])
    if command == "encode":  # a black clip, then two batches, of which the short one is filled up
        assert len(runs) == 3 * encoder_units(model)
        words[words.index("--out") + 1] = str(tmp_path / "plain")
        assert main(words) == 2
        assert "got compile=None, not compile=reduce-overhead" in capsys.readouterr().err
    else:
        assert len(runs) == 2 * units


def encoder_units(model: torch.nn.Module) -> int:
    """Count the units that run in `encode`."""
    ran: list[torch.nn.Module] = []
    handles = [unit.register_forward_hook(lambda unit, *_: ran.append(unit)) for unit in list_units(model)[:-1]]
    with torch.no_grad():
        model.encode(torch.zeros(1, 3, 4, 32, 32))
    for handle in handles:
        handle.remove()
    return len(ran)


def test_whether_weights_encode_alike_is_asked_of_plain_blocks(tmp_path, runs, capsys):
    """Compiled ones would round otherwise, and the latents be refused."""
    torch.manual_seed(0)
    model = tiny_model().eval()
    save(tmp_path / "a.ckpt", model=model)
    with torch.no_grad():
        model.last_layer.mul_(0.5)
    save(tmp_path / "b.ckpt", model=model)
    write_video(tmp_path / "a.mp4", torch.zeros(4, 32, 32, 3, dtype=torch.uint8).numpy(), 8)
    latents, quiet = str(tmp_path / "latents"), ["--accelerator", "cpu", "--progress", "false"]
    words = ["encode", str(tmp_path / "a.mp4"), "--out", latents, "--ckpt_path", str(tmp_path / "a.ckpt")]
    assert main([*words, *quiet]) == 0
    words = ["decode", latents, "--out", str(tmp_path / "out"), "--ckpt_path", str(tmp_path / "b.ckpt")]
    assert main([*words, *quiet, "--compile", "default", "--compile_backend", "counting"]) == 0
    assert "a.ckpt, which encodes alike" in capsys.readouterr().out
    assert len(runs) == len(list_units(model)) - 1 - encoder_units(model)  # of the one window that is decoded


def test_a_model_without_blocks_is_not_compiled_by_commands(tmp_path, capsys):
    save(tmp_path / "pool.ckpt", frames=4)
    write_video(tmp_path / "a.mp4", torch.zeros(4, 32, 32, 3, dtype=torch.uint8).numpy(), 8)
    words = ["reconstruct", str(tmp_path / "a.mp4"), "--ckpt_path", str(tmp_path / "pool.ckpt"), "--out"]
    assert main([*words, str(tmp_path / "out"), "--accelerator", "cpu", "--compile", "default"]) == 2
    assert "Expected a model with repeated blocks for --compile, got Pool; leave it out." in capsys.readouterr().err


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
