"""Checkpoints are whole or not there, run no code, and say how they differ."""

import errno
import os
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from vidtwin import checkpoints, weights
from vidtwin.autoencoder import VideoAutoencoder
from vidtwin.errors import UserError
from vidtwin.posteriors import Deterministic, Encoding


class Toy(VideoAutoencoder):
    latent_names = ("clip",)

    def __init__(self, width=3, name="toy"):
        super().__init__()
        self.layer = nn.Conv3d(3, width, 1)
        self.back = nn.Conv3d(width, 3, 1)

    def _encode(self, clip):
        return Encoding(clip=Deterministic(self.layer(clip)))

    def _decode(self, latents):
        return self.back(latents["clip"])

    def _latent_shapes(self, clip_shape):
        return {"clip": (self.layer.out_channels, *clip_shape[1:])}

    @property
    def last_layer(self):
        return self.back.weight


class Bomb:
    """Unpickled as usual, it makes a folder."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def checkpoint_of(model):
    state = {checkpoints.PREFIX + name: value for name, value in model.state_dict().items()}
    return {
        "state_dict": {**state, "loss.logvar": torch.zeros(())},
        "model_spec": {"class_path": f"{__name__}.Toy", "init_args": model.init_args},
        "global_step": 12,
    }


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    model = Toy(width=4)
    path = tmp_path / "last.ckpt"
    checkpoints.AtomicCheckpointIO().save_checkpoint(checkpoint_of(model), path)
    return model, path


@pytest.fixture
def importable(monkeypatch):
    """`Toy` by its class path, wherever pytest imported this file from."""
    monkeypatch.setitem(sys.modules, __name__, SimpleNamespace(Toy=Toy))


# Reading.


def test_what_was_saved_is_read_back(saved):
    model, path = saved
    read = checkpoints.AtomicCheckpointIO().load_checkpoint(path)
    assert read["global_step"] == 12
    torch.testing.assert_close(checkpoints.autoencoder_weights(read["state_dict"]), dict(model.state_dict()))


def test_an_absent_file_is_named_with_its_neighbours(saved):
    path = saved[1]
    (path.parent / "best.ckpt").touch()
    (path.parent / "notes.txt").touch()
    with pytest.raises(UserError) as error:
        checkpoints.read(path.parent / "lst.ckpt")
    assert str(error.value) == (
        f"Expected a file of weights, got none at {path.parent / 'lst.ckpt'}; in its folder are best.ckpt, last.ckpt."
    )
    with pytest.raises(UserError, match=r"got none at \S+/absent/last\.ckpt\.$"):
        checkpoints.read(path.parent / "absent" / "last.ckpt")


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.9, -1])
def test_a_truncated_file_is_one_line_at_any_length(saved, kept):
    path = saved[1]
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept) if isinstance(kept, float) else kept])
    with pytest.raises(UserError) as error:
        checkpoints.read(path)
    assert f"got {path}: it is damaged or cut off" in str(error.value)
    assert "\n" not in str(error.value)


def test_text_under_a_checkpoints_name_is_one_line(tmp_path):
    (tmp_path / "a.ckpt").write_text("<html>404 Not Found</html>\n")
    with pytest.raises(UserError) as error:
        checkpoints.read(tmp_path / "a.ckpt")
    assert "it is damaged or cut off" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, 2))])
def test_code_in_a_checkpoint_is_not_run(saved, tmp_path, write):
    marker = tmp_path / "executed"
    pickle.loads(pickle.dumps(Bomb(marker)))
    assert marker.is_dir()  # it is live
    marker.rmdir()
    path = tmp_path / "harmful.ckpt"
    write({**checkpoint_of(saved[0]), "callbacks": Bomb(marker)}, path)
    with pytest.raises(UserError) as error:
        checkpoints.read(path)
    assert str(error.value) == (
        f"Expected a file of tensors and plain values, got {path}: it holds pickled objects, whose code is never run."
    )
    assert not marker.exists()


def test_a_file_without_state_dict_is_refused(tmp_path):
    torch.save({"weights": torch.zeros(1)}, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=r"written by `vidtwin fit`, got .*a\.ckpt without a state_dict"):
        checkpoints.read(tmp_path / "a.ckpt")


# Writing.


def fail_as_a_full_disk(monkeypatch):
    def save(checkpoint, path):
        Path(path).write_bytes(b"PK half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", save)


@pytest.mark.parametrize("existed", [True, False])
@pytest.mark.parametrize("failure", ["full disk", "interrupted in the middle of pickling"])
def test_a_failed_write_leaves_the_previous_checkpoint_and_nothing_else(tmp_path, monkeypatch, existed, failure):
    class Interrupting:
        def __reduce__(self):
            raise KeyboardInterrupt

    path, writer = tmp_path / "last.ckpt", checkpoints.AtomicCheckpointIO()
    if existed:
        writer.save_checkpoint(checkpoint_of(Toy()), path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    following = checkpoint_of(Toy())
    if failure == "full disk":
        fail_as_a_full_disk(monkeypatch)
    else:
        following["callbacks"] = Interrupting()
    with pytest.raises((OSError, KeyboardInterrupt)):
        writer.save_checkpoint(following, path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    if existed:
        monkeypatch.undo()
        assert checkpoints.read(path)["global_step"] == 12


def test_a_removed_checkpoint_is_gone_and_an_absent_one_is_no_error(saved):
    writer = checkpoints.AtomicCheckpointIO()
    writer.remove_checkpoint(saved[1])
    writer.remove_checkpoint(saved[1])
    assert not saved[1].exists()


# Rebuilding the model.


def test_a_model_is_rebuilt_from_its_checkpoint_alone(saved, importable):
    model, path = saved
    rebuilt = checkpoints.load_autoencoder(path)
    assert not rebuilt.training
    assert rebuilt.init_args == {"width": 4, "name": "toy"}
    clip = torch.rand(1, 3, 2, 4, 4)
    assert torch.equal(rebuilt(clip).clip, model.eval()(clip).clip)


@pytest.mark.parametrize("spec", [None, "vidtwin.models.vidtwin.VidTwin", {"init_args": {}}])
def test_a_checkpoint_without_spec_asks_for_the_config(spec):
    with pytest.raises(UserError, match=r"^Expected model_spec in last\.ckpt, .* give its --config too\.$"):
        checkpoints.model_spec({"state_dict": {}, "model_spec": spec}, "last.ckpt")


@pytest.mark.parametrize(
    "class_path", ["os.system", "builtins.exec", "torch.nn.Linear", "collections.OrderedDict", "vidtwin.errors"]
)
def test_only_an_autoencoder_is_built(class_path, tmp_path):
    marker = tmp_path / "executed"
    spec = {"class_path": class_path, "init_args": {"command": f"mkdir {marker}"}}
    with pytest.raises(UserError, match=f"^Expected a VideoAutoencoder, got {class_path}"):
        checkpoints.build(spec)
    assert not marker.exists()


@pytest.mark.parametrize("class_path", ["absent_package_x.Model", "vidtwin.models.vidtwin.Absent", "Model"])
def test_a_class_that_is_not_installed_is_named(class_path):
    with pytest.raises(UserError, match=f"^Expected the class {class_path} to be installed: "):
        checkpoints.build({"class_path": class_path})


def test_arguments_that_the_class_does_not_take_are_named():
    spec = {"class_path": "vidtwin.models.vidtwin.VidTwin", "init_args": {"num_heds": 4}}
    with pytest.raises(UserError, match=r"Expected arguments of vidtwin\.models\.vidtwin\.VidTwin.*'num_heds'"):
        checkpoints.build(spec)
    with pytest.raises(UserError, match="VideoAutoencoder"):
        checkpoints.build({"class_path": "vidtwin.autoencoder.VideoAutoencoder"})


def test_weights_of_another_size_are_one_line_and_change_nothing(saved):
    path, other = saved[1], Toy(width=5)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(UserError) as error:
        checkpoints.load_weights(other, path)
    assert str(error.value) == (
        f"{path} is of another model or size: layer.weight is (4, 3, 1, 1, 1), expected (5, 3, 1, 1, 1); "
        "layer.bias is (4,), expected (5,); back.weight is (3, 4, 1, 1, 1), expected (3, 5, 1, 1, 1)."
    )
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_missing_and_unexpected_tensors_are_named_and_a_long_list_is_cut():
    state = {f"{letter}.weight": torch.zeros(1) for letter in "abc"}
    with pytest.raises(
        UserError, match=r"^x\.pth is of another model or size: missing c\.weight; unexpected a\.weight"
    ):
        weights.check_fit(
            {k: state[k] for k in ("a.weight", "b.weight")}, {k: state[k] for k in ("b.weight", "c.weight")}, "x.pth"
        )
    many = {f"layer{index}": torch.zeros(1) for index in range(9)}
    with pytest.raises(UserError, match=r"missing layer5; and 3 more\.$"):
        weights.check_fit({}, many, "x.pth")
    weights.check_fit(many, dict(many), "x.pth")


def test_differences_of_two_specs_are_a_line_each():
    def spec(name="models.A", **arguments):
        return {"class_path": name, "init_args": arguments}

    assert checkpoints.differences(spec(depth=16, width=[1, 2]), spec(depth=16, width=[1, 2])) == []
    assert checkpoints.differences(spec(depth=16, width=8), spec(depth=2, width=8, heads=4)) == [
        "depth: 16 in the config, 2 in the checkpoint",
        "heads: None in the config, 4 in the checkpoint",
    ]
    assert checkpoints.differences(spec(depth=16), spec("models.B", depth=2)) == [
        "class_path: models.A in the config, models.B in the checkpoint"
    ]
