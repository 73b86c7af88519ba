"""VidTwin's sizes, latents, decoding from a file, official checkpoints and error lines."""

import json
import math
import os
import pickle
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from vidtwin import weights
from vidtwin.errors import UserError
from vidtwin.models import official, transformer
from vidtwin.models.branches import DynamicsBranch
from vidtwin.models.vidtwin import VidTwin
from vidtwin.testing import check_autoencoder

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NARROW = {"hidden_size": 48, "depth": 1, "num_heads": 4, "structure_width": 8, "qformer_depth": 1}
TINY = {
    "num_frames": 4,
    "resolution": 32,
    "patch_size": 8,
    "hidden_size": 24,
    "depth": 2,
    "num_heads": 2,
    "num_queries": 3,
    "structure_width": 4,
    "query_size": 16,
    "qformer_depth": 2,
    "qformer_heads": 2,
    "qformer_intermediate_size": 16,
}


def config(*names):
    """The autoencoder's arguments, each config over the one before."""
    arguments = {}
    for name in names:
        arguments |= yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["model"]["autoencoder"]["init_args"]
    return arguments


def tiny(**arguments):
    """With every weight away from its initial value, so that no part is switched off."""
    torch.manual_seed(0)
    model = VidTwin(**{**TINY, **arguments}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def clip_for(model, batch=1):
    generator = torch.Generator().manual_seed(1)
    size = (batch, 3, model.num_frames, model.resolution, model.resolution)
    return torch.rand(size, generator=generator) * 2 - 1


# Sizes.

# Numbers of structure and dynamics, h_S²·n_q·d_S and 2·h_D·T·d_D (paper, Table 5), and the rate in % at 16x224x224.
LATENTS = {
    "setting1": (7 * 7 * 16 * 4, 2 * 7 * 16 * 8, "0.2046"),
    "setting2": (7 * 7 * 16 * 4, 2 * 4 * 16 * 16, "0.2152"),
    "setting3": (7 * 7 * 12 * 4, 2 * 7 * 16 * 8, "0.1721"),
    "released": (7 * 7 * 16 * 8, 2 * 7 * 16 * 8, "0.3348"),
    "rate011": (7 * 7 * 16 * 2, 2 * 4 * 16 * 8, "0.1076"),
    "rate016": (7 * 7 * 16 * 4, 2 * 2 * 16 * 12, "0.1621"),
    "rate048": (7 * 7 * 16 * 12, 2 * 4 * 16 * 16, "0.4757"),
}


def test_every_latent_config_is_measured():
    assert sorted(LATENTS) == sorted(path.stem for path in (CONFIGS / "latents").glob("*.yaml"))


@pytest.mark.parametrize("name", LATENTS)
@torch.no_grad()
def test_latents_of_a_full_size_clip_have_the_papers_size_and_rate(name):
    structure, dynamics, percent = LATENTS[name]
    model = VidTwin(**{**config("vidtwin_base", f"latents/{name}"), **NARROW}).eval()
    clip = torch.rand(1, 3, 16, 224, 224) * 2 - 1
    latents = model.encode(clip).mode()
    assert {key: latent.numel() for key, latent in latents.items()} == {"structure": structure, "dynamics": dynamics}
    assert f"{100 * (structure + dynamics) / clip.numel():.4f}" == percent
    assert f"{100 * model.compression_rate(clip.shape[1:]):.4f}" == percent
    assert {key: tuple(latent.shape[1:]) for key, latent in latents.items()} == model.latent_shapes(clip.shape[1:])
    assert latents["structure"].shape[2] == config("vidtwin_base", f"latents/{name}")["num_queries"]


def test_base_config_has_the_first_settings_latents():
    assert config("vidtwin_base") == config("vidtwin_base", "latents/setting1")


@pytest.mark.parametrize(
    ("size", "official_parameters", "hidden_size"),
    [("small", 106_922_034, 512), ("base", 312_701_490, 768), ("large", 1_239_660_594, 1536)],
)
def test_parameters_are_the_released_ones_without_those_that_nothing_uses(size, official_parameters, hidden_size):
    with torch.device("meta"):
        model = VidTwin(**config(f"vidtwin_{size}", "latents/released"))
    pixels = 3 * 16 * 16
    encoder_final_layer = 2 * hidden_size + hidden_size * pixels + pixels
    decoder_patch_embedding = pixels * hidden_size + hidden_size
    expected = official_parameters - encoder_final_layer - decoder_patch_embedding
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    if size == "base":
        assert expected == 312_701_490 - 592_128 - 590_592 == 311_518_770


@pytest.mark.parametrize(
    "size",
    [
        {"num_frames": 32, "resolution": 128, "patch_size": 16, "dynamics_downsamples": 2},
        {"resolution": 40, "structure_downsamples": 2},
        {"resolution": 56, "structure_downsamples": 3, "dynamics_downsamples": 0},
        {"resolution": 24, "structure_downsamples": 0, "dynamics_downsamples": 2},
        {"num_frames": 1, "resolution": 8, "structure_downsamples": 1, "dynamics_downsamples": 1},
    ],
    ids=["32 frames of 128 px", "grid 5", "grid 7", "grid 3", "one frame of one patch"],
)
def test_any_length_and_any_grid_keep_the_contract(size):
    model = tiny(**size)
    check_autoencoder(model, num_frames=model.num_frames)


def test_a_resolution_that_the_patch_does_not_divide_is_refused():
    with pytest.raises(UserError, match=r"^Expected resolution divisible by patch_size, got 100 and 16\.$"):
        VidTwin(resolution=100)


# Encoding and decoding.


@pytest.mark.parametrize("frame", [1, 3])
@torch.no_grad()
def test_features_of_earlier_frames_do_not_depend_on_a_later_one(frame):
    model = tiny()
    clip = clip_for(model)
    changed = clip.clone()
    changed[:, :, frame] = -changed[:, :, frame]
    difference = (model.features(changed) - model.features(clip)).abs().amax((0, 1, 3, 4))
    assert (difference[:frame] < 1e-5).all()
    assert (difference[frame:] > 1e-2).all()


@torch.no_grad()
def test_a_latent_alone_gives_its_own_part_of_the_decoders_input():
    model, seen = tiny(), []
    model.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    latents = model.encode(clip_for(model)).mode()
    clips = [model.decode(part) for part in (latents, *({name: z} for name, z in latents.items()))]
    whole, structure, dynamics = seen
    torch.testing.assert_close(whole, structure + dynamics)
    for features in (structure, dynamics):
        assert features.abs().max() > 0.1
    assert len({clip.shape for clip in clips}) == 1
    swapped = model.decode({**latents, "dynamics": -latents["dynamics"]})
    assert not torch.allclose(swapped, clips[0], atol=1e-3)


@torch.no_grad()
def test_dynamics_are_the_profile_along_the_width_then_the_one_along_the_height():
    """Mirroring or turning the features' grid turns the profiles, which share one head."""
    model = tiny(dynamics_downsamples=0)
    features = model.features(clip_for(model))
    width, height = model.dynamics.encode(features)[0].chunk(2, dim=3)
    turned = model.dynamics.encode(features.transpose(3, 4))[0]
    torch.testing.assert_close(turned, torch.cat([height, width], dim=3))
    shuffled = features[:, :, :, torch.tensor([2, 0, 3, 1])]  # rows in another order leave the means over the height
    torch.testing.assert_close(model.dynamics.encode(shuffled)[0].chunk(2, dim=3)[0], width)
    assert not torch.allclose(width, height, atol=1e-2)


DECODE = """
import json, sys
from safetensors.torch import load_file, save_file
from vidtwin.models.vidtwin import VidTwin

folder, arguments = sys.argv[1], json.loads(sys.argv[2])
model = VidTwin(**arguments).eval()
model.load_state_dict(load_file(f"{folder}/weights.safetensors"))
clip = model.decode(load_file(f"{folder}/latents.safetensors"))
save_file({"clip": clip.detach().contiguous()}, f"{folder}/clip.safetensors")
heavy = {"lightning", "av", "lpips", "vidtwin.training.task", "vidtwin.losses", "vidtwin.video"}
print(sorted(heavy & set(sys.modules)))
"""


@torch.no_grad()
def test_saved_latents_decode_to_the_same_clip_in_another_process_without_lightning(tmp_path):
    model = tiny()
    clip = clip_for(model)
    latents = model.encode(clip).mode()
    save_file({name: latent.contiguous() for name, latent in latents.items()}, tmp_path / "latents.safetensors")
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    command = [sys.executable, "-c", DECODE, str(tmp_path), json.dumps(model.spec()["init_args"])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    decoded = load_file(tmp_path / "clip.safetensors")["clip"]
    torch.testing.assert_close(decoded, model(clip).clip, rtol=1e-5, atol=1e-6)


def test_activation_checkpointing_changes_no_gradient_and_keeps_less():
    kept, gradients = {}, {}
    for option in (False, "mlp", "elementwise", True):
        model = tiny(activation_checkpointing=option, qformer_dropout=0.0).train()
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        held = {}

        def keep(tensor, own=own, held=held):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                held[storage.data_ptr()] = tensor, storage.nbytes()  # the tensor, so that the address stays its own
            return tensor

        # Those of selective recomputation are kept beside the hooks (test_training_cost.py counts them).
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with nullcontext() if option == "elementwise" else hooks:
            decoded = model.decode(model.encode(clip_for(model)).mode())
        decoded.square().mean().backward()
        kept[option] = sum(size for _, size in held.values())
        gradients[option] = {name: parameter.grad for name, parameter in model.named_parameters()}
    torch.testing.assert_close(gradients["elementwise"], gradients[False], rtol=0, atol=0)
    torch.testing.assert_close(gradients["mlp"], gradients[False])
    torch.testing.assert_close(gradients[True], gradients[False])
    assert kept[True] < kept["mlp"] < 0.85 * kept[False]
    with pytest.raises(UserError, match=r'activation_checkpointing true, false, "mlp" or "elementwise", got .all.'):
        tiny(activation_checkpointing="all")


# Autocast would convert the weights for each part.
@pytest.mark.parametrize(("precise", "lengths"), [(True, [2, 2, 1]), (False, [1])])
def test_without_gradients_a_cpu_takes_the_mlp_a_few_frames_at_a_time(monkeypatch, precise, lengths):
    monkeypatch.setattr(transformer, "_CACHED", 2 * 9 * 64 * 4)  # two frames of 3 x 3 patches with 64 hidden values
    block, sizes = transformer.SpatialTemporalBlock(16, 2), []
    x = torch.randn(16, 1, 5, 9).movedim(0, -1)  # laid out as the decoder's features
    block.mlp.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    with torch.autocast("cpu", torch.bfloat16, enabled=not precise):
        whole = block(x)
        with torch.no_grad():
            parts = block(x)
    assert sizes == [1, *lengths]  # the whole batch, then those of its five frames
    assert parts.dtype == whole.dtype == torch.float32
    torch.testing.assert_close(parts, whole.detach(), rtol=1e-6, atol=1e-6)


# Error lines.


@pytest.mark.parametrize(
    "shape", [(2, 3, 8, 224, 224), (2, 3, 16, 128, 128), (2, 16, 3, 224, 224), (3, 16, 224, 224)], ids=str
)
def test_a_clip_of_another_shape_is_one_line_that_says_what_to_set(shape):
    with torch.device("meta"):
        model = VidTwin()
        clip = torch.zeros(shape)
    with pytest.raises(UserError) as error:
        model.encode(clip)
    assert str(error.value) == (
        f"Expected a float clip of shape (B, 3, 16, 224, 224) in [-1, 1], got {shape} of torch.float32; "
        "set data.num_frames=16 and data.resolution=224."
    )


def test_a_latent_of_another_size_is_named_with_both_shapes():
    model = tiny()
    latents = model.encode(clip_for(model)).mode()
    shape = tuple(latents["structure"].shape[1:])
    with pytest.raises(UserError) as error:
        model.decode({**latents, "structure": latents["structure"][..., :1]})
    message = str(error.value)
    assert message.startswith("Expected latent structure of shape (B, ")
    assert str(shape).strip("()") in message
    assert message.endswith(f"got {(1, *shape[:3], 1)}.")


# Official checkpoints.


@pytest.fixture(scope="module")
def released(shared):
    """The official state dict of a small model: width 96, depth 2, 4 heads, 16x64x64."""
    golden = load_file(shared / "golden" / "golden_a.safetensors")
    return {name.removeprefix("state_dict."): v for name, v in golden.items() if name.startswith("state_dict.")}


@pytest.fixture
def state(released):
    return dict(released)


def test_every_size_is_read_off_the_tensors(state, tmp_path):
    save_file(state, tmp_path / "vidtwin.safetensors")
    model = VidTwin.from_official(tmp_path / "vidtwin.safetensors", num_heads=4)
    assert not model.training
    assert (
        model.init_args
        == VidTwin(
            num_frames=16,
            resolution=64,
            patch_size=16,
            hidden_size=96,
            depth=2,
            num_heads=4,
            num_queries=16,
            structure_channels=8,
            structure_downsamples=1,
            dynamics_channels=8,
            dynamics_downsamples=1,
            structure_width=128,
            query_size=64,
            qformer_depth=6,
            qformer_heads=8,
            qformer_intermediate_size=768,
            qformer_cross_every=2,
        ).init_args
    )


def test_ckpt_and_safetensors_give_the_same_weights(state, tmp_path):
    save_file(state, tmp_path / "vidtwin.safetensors")
    torch.save({"state_dict": state, "global_step": 7}, tmp_path / "vidtwin.ckpt")
    first, second = (
        VidTwin.from_official(tmp_path / f"vidtwin.{end}", num_heads=4).state_dict() for end in ("safetensors", "ckpt")
    )
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    torch.testing.assert_close(first["decoder.linear.weight"], state["decoder.final_layer.linear.weight"])


def test_all_names_and_shapes_of_the_released_base_checkpoint_fit_our_base(shared, monkeypatch):
    """By the list of its 643 keys, on the meta device."""
    state = {}
    for line in (shared / "golden" / "official_state_dict_keys.txt").read_text().splitlines():
        match = re.fullmatch(r"(\S+)\s+[(\[]([\d, ]*)[)\]]\s+\S+", line.strip())
        if match:
            shape = [int(size) for size in match[2].replace(",", " ").split()]
            state[match[1]] = torch.empty(shape, device="meta")
    assert len(state) == 643
    with torch.device("meta"):
        model = VidTwin(**config("vidtwin_base", "latents/released"))
    positions = VidTwin(**{**NARROW, "hidden_size": 768, "num_heads": 12}).encoder.transformer
    for part in ("encoder", "decoder"):
        state[f"{part}.pos_embed"] = positions.position[None].double()
        state[f"{part}.pos_embed_temporal"] = positions.time[None, :, 0].double()
    monkeypatch.setattr(weights, "read", lambda path: {"state_dict": state})
    sizes, renamed = official.load(Path("vidtwin.ckpt"))
    assert sizes == {name: model.init_args[name] for name in sizes}
    wanted = model.state_dict()
    assert {name: value.shape for name, value in renamed.items()} == {k: v.shape for k, v in wanted.items()}


LAYER = "temporal_qformer.qformer.encoder.layer.0"


def write(state, tmp_path):
    path = tmp_path / "vidtwin.ckpt"
    torch.save({"state_dict": state}, path)
    return path


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda s: s.pop("decoder.blocks.1.mlp.fc1.bias"), "missing decoder.transformer.blocks.1.mlp.0.bias"),
        (lambda s: s.pop("conv_in.weight"), "without the tensor conv_in.weight"),
        (lambda s: s.update({"more.weight": torch.zeros(2)}), "unexpected more.weight"),
        (lambda s: s.update({"bottle_down.bias": torch.zeros(3)}), "structure.head.bias is (3,), expected (16,)"),
        (lambda s: s.update({"encoder.pos_embed": s["encoder.pos_embed"] * 2}), "others in encoder.pos_embed"),
        (lambda s: s.update({"decoder.pos_embed": torch.zeros(3)}), "others in decoder.pos_embed"),
        (lambda s: s.update({"encoder.x_embedder.proj.weight": torch.zeros(2, 3)}), "5 axes"),
        (lambda s: [s.pop(k) for k in list(s) if k.startswith("encoder.blocks.")], "encoder.blocks.0.attn.qkv.weight"),
        (lambda s: [s.pop(k) for k in list(s) if ".encoder.layer." in k], "layer.0.intermediate_query.dense.weight"),
        (
            lambda s: s.pop(f"{LAYER}.crossattention.attention.key.weight"),
            f"{LAYER}.crossattention.attention.key.weight",
        ),
        (lambda s: s.update({f"{LAYER}.crossattention.attention.key.weight": torch.zeros(2, 2)}), "of one shape"),
        (lambda s: s.update({"conv_in.weight": torch.zeros(())}), "conv_in.weight with 4 axes"),
        (lambda s: s.clear(), "without any tensor"),
    ],
    ids=[
        "missing",
        "missing size",
        "unexpected",
        "misshapen",
        "other positions",
        "misshapen positions",
        "misshapen size",
        "no blocks",
        "no Q-Former",
        "missing part",
        "misshapen part",
        "scalar",
        "empty",
    ],
)
def test_a_checkpoint_that_does_not_fit_is_one_line_that_names_the_tensor(state, tmp_path, change, expected):
    change(state)
    path = write(state, tmp_path)
    with pytest.raises(UserError) as error:
        VidTwin.from_official(path, num_heads=4)
    assert expected in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_numbers_of_heads_that_do_not_divide_the_width_are_refused(state, tmp_path):
    path = write(state, tmp_path)
    with pytest.raises(UserError, match="divisible by the number of heads, got 96 and 5"):
        VidTwin.from_official(path, num_heads=5)
    with pytest.raises(UserError, match="divisible by the number of heads, got 64 and 7"):
        VidTwin.from_official(path, num_heads=4, qformer_heads=7)


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_a_truncated_checkpoint_is_one_line(tmp_path, suffix):
    path = tmp_path / f"vidtwin.{suffix}"
    tensors = {"conv_in.weight": torch.zeros(64, 64)}
    save_file(tensors, path) if suffix == "safetensors" else torch.save(tensors, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=rf"got {re.escape(str(path))}: it is damaged or cut off"):
        VidTwin.from_official(path)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    marker = tmp_path / "executed"

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    pickle.loads(pickle.dumps(Bomb()))
    assert marker.is_dir()  # it is live
    marker.rmdir()
    path = tmp_path / "vidtwin.ckpt"
    torch.save({"state_dict": {"conv_in.weight": torch.zeros(2)}, "callback": Bomb()}, path)
    with pytest.raises(UserError, match="it holds pickled objects, whose code is never run"):
        VidTwin.from_official(path)
    assert not marker.exists()


def test_a_single_cell_is_halved_with_gradients_that_are_computed_not_found_in_memory():
    branch = DynamicsBranch(hidden_size=24, grid_size=1, channels=2, downsamples=1)
    features = torch.randn(2, 24, 1, 1, 1)
    for _ in range(20):
        # What the convolution's backward pass then finds in memory that is handed out again.
        junk = [torch.full((size,), math.nan, dtype=torch.bfloat16) for size in (5184, 10368, 4096)]
        del junk
        branch.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            mean, _ = branch.encode(features)
        mean.float().square().sum().backward()
        gradient = branch.downsample[0].weight.grad
        assert gradient.isfinite().all()
        unseen = torch.ones(3, 3, dtype=torch.bool)
        unseen[1, 1] = False
        assert (gradient[..., unseen] == 0).all()
