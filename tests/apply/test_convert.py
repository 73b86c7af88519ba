"""Released weights and checkpoints become folders that load."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from sweeping import Pool, checkpoint
from tiny import tiny_model

from vidtwin import VideoAutoencoder, VidTwin, weights
from vidtwin.baselines.ivideogpt import IVideoGPT
from vidtwin.cli import main
from vidtwin.storage import checkpoints


def convert(*argv):
    return main(["convert", *map(str, argv)])


def fails(capsys, *argv):
    capsys.readouterr()
    assert convert(*argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def test_a_released_vidtwin_becomes_a_folder_that_gives_its_numbers(shared, tmp_path, capsys):
    golden = load_file(shared / "golden" / "golden_a.safetensors")
    state = {k.removeprefix("state_dict."): v for k, v in golden.items() if k.startswith("state_dict.")}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "released.ckpt")
    assert convert(tmp_path / "released.ckpt", tmp_path / "out", "--num_heads", 4) == 0
    model = VidTwin.from_pretrained(tmp_path / "out")
    assert model.init_args["num_heads"] == 4
    assert model.training_record == {"released_weights": "released.ckpt"}
    printed = capsys.readouterr().out
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in printed
    assert weights.sha256(model.state_dict()) in printed
    shape = (3, model.num_frames, model.resolution, model.resolution)
    assert f"{model.compression_rate(shape):.4%}" in printed
    with torch.no_grad():
        structure = model.encode(golden["input"]).mode()["structure"].movedim(1, -1)
    torch.testing.assert_close(structure, golden["out.z_content"], rtol=1e-4, atol=1e-4)


def test_a_released_ivideogpt_is_taken_by_its_name(shared, tmp_path):
    golden = load_file(shared / "golden" / "golden_ivideogpt.safetensors")
    described = json.loads((shared / "golden" / "golden_ivideogpt.json").read_text())
    source = tmp_path / "tokenizer"
    source.mkdir()
    state = {k.removeprefix("sd."): v for k, v in golden.items() if k.startswith("sd.")}
    save_file(state, source / "diffusion_pytorch_model.safetensors")
    (source / "config.json").write_text(json.dumps(described["config"]))
    assert convert(source, tmp_path / "out", "--model", "ivideogpt") == 0
    model, released = IVideoGPT.from_pretrained(tmp_path / "out"), IVideoGPT.from_official(source)
    assert model.spec() == released.spec()
    assert weights.sha256(model.state_dict()) == weights.sha256(released.state_dict())


def trained(folder, **extra):
    """A run's folder with a checkpoint and, if `extra` is a config, config.yaml."""
    model = tiny_model()
    path = folder / "checkpoints" / "last.ckpt"
    checkpoint(path, model=model)
    held = torch.load(path)
    average = {name: value + 1 for name, value in model.state_dict().items() if value.is_floating_point()}
    held |= {"epoch": 2, "global_step": 40, "training": {"batches": 41, "skipped": 1, "rate_scale": 1.0, "seed": 3}}
    torch.save(held | {"ema": {"values": average}}, path)
    if extra:
        (folder / "config.yaml").write_text(yaml.safe_dump(extra))
    return path, model, average


CONFIG = {
    "model": {
        "autoencoder": {"class_path": "vidtwin.models.vidtwin.VidTwin"},
        "loss": {"class_path": "vidtwin.losses.autoencoder.AutoencoderLoss", "init_args": {"pixel": "l1"}},
    },
    "data": {"class_path": "ucf101", "init_args": {"root": "/home/someone/data/UCF-101", "fps": 8.0, "tags": ["a/b"]}},
    "trainer": {"max_steps": 40, "precision": "bf16-mixed", "default_root_dir": "/home/someone/runs"},
}


def test_a_converted_checkpoint_has_a_record_of_its_training_without_paths(tmp_path):
    path, model, _ = trained(tmp_path / "run", **CONFIG)
    assert convert(path, tmp_path / "out") == 0
    loaded = VideoAutoencoder.from_pretrained(tmp_path / "out")
    assert loaded.spec() == model.spec()
    assert weights.sha256(loaded.state_dict()) == weights.sha256(model.state_dict())
    assert loaded.training_record == {
        "checkpoint": "last.ckpt",
        "weights": "last",
        "epoch": 2,
        "global_step": 40,
        "batches": 41,
        "skipped": 1,
        "rate_scale": 1.0,
        "seed": 3,
        "loss": CONFIG["model"]["loss"],
        "data": {"class_path": "ucf101", "root": "UCF-101", "fps": 8.0, "tags": ["b"]},
        "trainer": {"max_steps": 40, "precision": "bf16-mixed"},
    }
    config = (tmp_path / "out" / "config.json").read_text()
    assert json.loads(config)["preprocessing"]["fps"] == 8.0
    assert "someone" not in config


def test_averaged_weights_are_taken_by_option(tmp_path):
    path, _, average = trained(tmp_path / "run")
    assert convert(path, tmp_path / "out", "--use_ema") == 0
    loaded = checkpoints.load_autoencoder(tmp_path / "out")
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in average.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["training"]["weights"] == "average"


def test_a_config_is_read_with_its_bases(tmp_path):
    path, _, _ = trained(tmp_path / "run")
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(CONFIG))
    loss = {"init_args": {"pixel": "l2"}}
    (tmp_path / "own.yaml").write_text(f"base: base.yaml\n{yaml.safe_dump({'model': {'loss': loss}})}")
    assert convert(path, tmp_path / "out", "--config", tmp_path / "own.yaml") == 0
    record = VidTwin.from_pretrained(tmp_path / "out").training_record
    assert record["loss"] == CONFIG["model"]["loss"] | loss
    assert record["trainer"]["max_steps"] == CONFIG["trainer"]["max_steps"]


def test_a_config_of_another_model_is_refused_if_given_and_ignored_beside_the_checkpoint(tmp_path, capsys):
    other = {"model": {"autoencoder": {"class_path": "cmd"}}, "data": {"class_path": "folder"}}
    path, _, _ = trained(tmp_path / "run", **other)
    config = tmp_path / "run" / "config.yaml"
    assert "was trained by, got one of cmd" in fails(capsys, path, tmp_path / "out", "--config", config)
    assert not (tmp_path / "out").exists()
    assert convert(path, tmp_path / "out") == 0
    assert "data" not in VideoAutoencoder.from_pretrained(tmp_path / "out").training_record


def test_out_that_exists_is_replaced_by_option_alone_and_only_if_it_holds_weights(tmp_path, capsys):
    first = checkpoint(tmp_path / "a.ckpt", scale=0.25)
    second = checkpoint(tmp_path / "b.ckpt", scale=0.75)
    out = tmp_path / "out"
    assert convert(first, out) == 0
    (out / "mine.txt").write_text("kept")
    assert "give --overwrite" in fails(capsys, second, out)
    assert Pool.from_pretrained(out).scale.item() == 0.25
    assert convert(second, out, "--overwrite") == 0
    assert Pool.from_pretrained(out).scale.item() == 0.75
    assert (out / "mine.txt").read_text() == "kept"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.ckpt", "b.ckpt", "out"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("")
    line = fails(capsys, first, tmp_path / "other", "--overwrite")
    assert "a folder of weights, got" in line
    assert "letter.txt" in line
    assert "to be a folder, got the file" in fails(capsys, first, second, "--overwrite")


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "out").mkdir()
    assert convert(checkpoint(tmp_path / "a.ckpt"), tmp_path / "out") == 0
    assert Pool.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["{pool}"], "Expected `vidtwin convert IN OUT`, got 1 of the two"),
        ([], "Expected `vidtwin convert IN OUT`, got 0 of the two"),
        (["absent.ckpt", "{out}"], "got none at absent.ckpt"),
        (["{pool}", "{out}", "--num_heads", "2"], "Expected no --num_heads with"),
        (["{pool}", "{out}", "--model", "vidtwin"], "Expected no --model with"),
        (["{pool}", "{out}", "--use_ema"], "Expected a checkpoint with averaged weights"),
        (["{pool}", "{out}", "--model", "cmd"], "wfvae), got cmd: it has no released weights"),
        (["{pool}", "{out}", "--model", "vidtwni"], "did you mean 'vidtwin'?"),
        (["{tensors}", "{out}"], "without the tensor encoder.x_embedder.proj.weight"),
        (["{tensors}", "{out}", "--use_ema"], "Expected --use_ema with a checkpoint of `vidtwin fit` alone"),
        (["{folder}", "{out}"], "(a .ckpt or .safetensors file), got the folder"),
        (["{folder}", "{out}", "--model=ivideogpt"], "Expected a folder with config.json"),
        (["{saved}", "{out}"], "which save_pretrained has written"),
        (["{cut}", "{out}"], "damaged or cut off"),
        (["{pool}", "{out}", "--config", "absent.yaml"], "Expected a config at absent.yaml"),
    ],
)
def test_weights_that_cannot_be_converted_are_one_line_and_leave_nothing(argv, message, tmp_path, capsys):
    pool = checkpoint(tmp_path / "pool.ckpt")
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "pool.ckpt").read_bytes()[:300])
    torch.save({"a": torch.zeros(2)}, tmp_path / "tensors.pt")
    (tmp_path / "folder").mkdir()
    Pool().save_pretrained(tmp_path / "saved")
    names = {name: tmp_path / name for name in ("out", "folder", "saved")}
    names |= {"pool": pool, "tensors": tmp_path / "tensors.pt", "cut": tmp_path / "cut.ckpt"}
    assert message in fails(capsys, *(word.format(**names) for word in argv))
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*out*"))
