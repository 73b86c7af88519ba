"""FSDP2 on two ranks takes the steps of one process, and leaves the files of one. Without a GPU: over gloo, on CPUs."""

import json
import math
from pathlib import Path

import forked
import pytest
import sharded_run
import torch
import yaml
from tiny import tiny_model
from torch import nn

from vidtwin.cli import main
from vidtwin.compilation import list_units
from vidtwin.storage import checkpoints
from vidtwin.storage.diffusion import load
from vidtwin.training.replay import read, replay

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch comes without gloo")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def one(folder):
    """Outcomes of one process with the clips of both ranks."""
    scenarios = ("whole", "parts", "one_unit", "baseline", "poisoned")
    return {name: getattr(sharded_run, name)(folder / "alone" / name) for name in scenarios}


@pytest.fixture(scope="module")
def ranks(folder, one):
    """Outcomes that each of two ranks wrote; a hang would be a failure after eight minutes."""
    forked.run_ranks(sharded_run.main, folder, stderr=folder / "stderr")
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def held(path: Path) -> dict[str, torch.Tensor]:
    """All that a checkpoint holds of a training, by name: plain tensors, which the safe reader lets pass."""
    checkpoint = checkpoints.read(path)
    states = [checkpoint["state_dict"], checkpoint["ema"]["values"]]
    states += [entry for state in checkpoint["optimizer_states"] for entry in state["state"].values()]
    found = {f"{index}.{name}": value for index, state in enumerate(states) for name, value in state.items()}
    tensors = {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}
    assert all(type(value) is torch.Tensor for value in tensors.values())
    return tensors


def assert_same_training(path: Path, other: Path) -> None:
    # Sums of the ranks' numbers round otherwise than those of one process.
    torch.testing.assert_close(held(path), held(other), rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("name", ["whole", "parts", "one_unit", "baseline"])
def test_two_ranks_take_the_steps_of_one_process(folder, one, ranks, name):
    for rank in ranks:
        for value in ("train/adaptive_weight", "train/gradient_norm", "val/psnr"):
            assert rank[name][value] == pytest.approx(one[name][value], rel=1e-4)
        assert rank[name]["step"] == sharded_run.STEPS
    assert_same_training(folder / name / "last.ckpt", folder / "alone" / name / "last.ckpt")


def test_each_rank_holds_half_of_the_weights_and_of_the_optimizer(one, ranks):
    assert (one["whole"]["sharded"], one["whole"]["units"]) == (0, [])  # as long as nobody asks for it
    for rank in ranks:
        assert rank["whole"]["sharded"] > 0.99  # of the optimizer's: all but the log-variance
        assert rank["whole"]["share"] == pytest.approx(0.5, abs=0.01)
        blocks = ["FSDPSpatialTemporalBlock"] * 2
        assert rank["whole"]["units"] == ["FSDPVidTwin", *blocks, "FSDPQFormerLayer", *blocks]


def test_the_levels_of_a_baseline_are_units(ranks):
    for rank in ranks:
        counts = {name: rank["baseline"]["units"].count(name) for name in ("FSDPIVideoGPT", "FSDPDownLevel")}
        assert counts == {"FSDPIVideoGPT": 1, "FSDPDownLevel": 2 * 2}  # of the two encoders


def test_steps_that_are_not_finite_on_one_rank_are_undone_on_both(folder, one, ranks):
    first, second = (rank["poisoned"]["rejected"] for rank in ranks)
    skipped = [reason is not None for reason in one["poisoned"]["rejected"]]
    assert [reason is not None for reason in first] == [reason is not None for reason in second] == skipped
    assert sum(skipped) == 3
    assert any("loss: pixel is nan" in (reason or "") for reason in first + second)
    assert any("gradient of autoencoder" in (reason or "") for reason in first + second)
    assert_same_training(folder / "poisoned" / "last.ckpt", folder / "alone" / "poisoned" / "last.ckpt")


def test_a_dump_of_a_sharded_model_is_replayed_by_one_process(folder, ranks):
    dumps = sorted((folder / "poisoned" / "nonfinite").glob("*.pt"))
    assert {path.stem[-1] for path in dumps} == {"0", "1"}
    content = read(str(dumps[0]))
    assert content["model_spec"]["class_path"] == "vidtwin.models.vidtwin.VidTwin"
    report = replay(sharded_run.task_of(), content)
    assert report[-1].startswith("reproduced: ")
    assert "clip clip3.avi: 12288 of 12288 numbers are not finite" in report


def test_a_resumed_sharded_training_equals_an_uninterrupted_one(folder, ranks):
    for rank in ranks:
        assert rank["again"]["losses"] == rank["adaptive"]["losses"][2:]
    whole, resumed = (held(folder / name / "last.ckpt") for name in ("adaptive", "again"))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_a_checkpoint_resumes_under_either_strategy(folder, one, ranks, tmp_path):
    assert_same_training(folder / "from_one" / "last.ckpt", folder / "alone" / "whole" / "last.ckpt")
    outcome = sharded_run.train(
        tmp_path, sharded_run.task_of(depth=2), ckpt_path=folder / "whole" / "step-00000001.ckpt"
    )
    assert outcome["step"] == sharded_run.STEPS
    assert_same_training(tmp_path / "last.ckpt", folder / "alone" / "whole" / "last.ckpt")


def test_one_device_uses_the_checkpoint_of_a_sharded_training(folder, ranks):
    model = checkpoints.load_autoencoder(folder / "whole" / "last.ckpt", ema=True)
    assert type(model) is type(tiny_model())
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 4, 32, 32)).clip.isfinite().all()


def test_two_ranks_measure_the_same_as_one_process(folder, ranks, tmp_path):
    ours = sharded_run.measured(tmp_path, folder / "alone" / "whole" / "last.ckpt")
    for rank in ranks:
        for name in ("val/psnr", "val/ssim"):
            assert rank["measured"][name] == pytest.approx(ours[name], rel=1e-4)


def test_training_validation_and_prediction_in_one_process_use_the_average_and_put_it_away(folder, ranks):
    for rank in ranks:
        assert (rank["averaged"]["validate"], rank["averaged"]["predict"]) == (True, True)
        assert rank["averaged"]["again"] == pytest.approx(rank["averaged"]["val/psnr"], abs=1e-4)
    assert len(list((folder / "averaged" / "predicted").glob("*.safetensors"))) == 3


def test_a_file_that_can_not_be_read_is_an_error_on_both_ranks(ranks):
    for rank in ranks:
        errors = rank["refused"]
        assert "damaged or cut off" in errors["cut"]
        assert "holds pickled objects, whose code is never run" in errors["code"]
        assert "of another model or size" in errors["other"]


def test_a_sharded_diffusion_model_takes_the_steps_of_ddp_and_resumes_bit_for_bit(folder, ranks):
    runs = folder / "diffusion"
    for rank in ranks:
        sharded, whole, resumed = (rank["diffusion"][name] for name in ("sharded", "whole", "resumed"))
        assert (sharded["sharded"], sharded["units"]) == (True, ["FSDPLatentDiffusion", "FSDPDiTBlock"])
        assert (whole["sharded"], whole["units"]) == (False, [])
        assert sharded["losses"] == pytest.approx(whole["losses"], rel=1e-4)
        assert sharded["val/loss"] == pytest.approx(whole["val/loss"], rel=1e-4)
        assert resumed["losses"] == sharded["losses"][1:]
    assert_same_training(runs / "sharded" / "last.ckpt", runs / "whole" / "last.ckpt")
    first, second = (held(runs / name / "last.ckpt") for name in ("sharded", "resumed"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    model, _ = load(runs / "sharded" / "last.ckpt")
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


def test_bf16_trains(ranks):
    assert all(math.isfinite(loss) for rank in ranks for loss in rank["low_precision"]["losses"])


def test_blocks_are_units_and_the_last_layer_stays_gathered():
    class Level(nn.Module):
        """A container, as in many convolutional models: it has no forward pass of its own."""

        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)), nn.ReLU()])

    class Model(sharded_run.Convolutions):
        def __init__(self) -> None:
            super().__init__()
            self.levels = nn.ModuleList([Level(), Level()])
            self.shared = nn.ModuleList([self.levels[1].blocks[0]])
            self.ends = nn.ModuleList([self.inner, self.outer])
            self.units = 4  # a width, as some name it

    model = Model()
    first, second = model.levels
    assert list_units(model) == [*first.blocks[:2], *second.blocks[:2], model.inner, model]


def test_large_composes_with_fsdp2(capsys):
    configs = Path(__file__).resolve().parents[2] / "configs"
    overlay = str(configs / "trainer" / "fsdp2.yaml")
    assert main(["fit", "--config", str(configs / "vidtwin_large.yaml"), "--config", overlay, "--print_config"]) == 0
    trainer = yaml.safe_load(capsys.readouterr().out)["trainer"]
    assert (trainer["strategy"], trainer["accelerator"], trainer["max_steps"]) == ("fsdp2", "gpu", 100_000)
