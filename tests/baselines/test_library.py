"""Adapters of diffusers and transformers: the interface's contract, official sizes, what all share, installation."""

import ast
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from library_models import CONFIGS, GROUP, OWN, ROOT, TINY, class_of, library_round_trip, noise, official, tiny
from safetensors.torch import load_file, save_file
from torch import nn

from vidtwin import VideoAutoencoder, plugins
from vidtwin.baselines.library.base import VERSIONS, LibraryAutoencoder, StandardizedGaussian
from vidtwin.cli import main
from vidtwin.errors import UserError
from vidtwin.testing import check_autoencoder
from vidtwin.training.checks import freeze

PREFIX = "vidtwin.baselines.library."


SLOW = {"kvae", "flux2", "stable_video_diffusion", "easyanimate", "vidtok", "wan/2.2", "mochi"}  # wide, or like another


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in TINY]
)
def test_every_adapter_keeps_the_contract(name):
    _, frames, side = TINY[name]
    check_autoencoder(tiny(name), frames, side)


def test_a_library_is_imported_on_the_cpu_whatever_device_its_first_model_is_on(tmp_path, monkeypatch):
    """As Cosmos' wavelets, tensors of a module would else be without values for all later models."""
    (tmp_path / "library_with_tensors.py").write_text("import torch\nWAVELETS = torch.ones(2)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with torch.device("meta"):
        found = LibraryAutoencoder._import_class("library_with_tensors.WAVELETS")
    assert found.tolist() == [1.0, 1.0]


def test_every_registered_adapter_has_tiny_arguments():
    registered = {name for name, entry in plugins.available(GROUP).items() if entry.value.startswith(PREFIX)}
    assert registered == {name.partition("/")[0] for name in TINY}, "after a change of pyproject.toml install again"


# Parameters and the latent of 16 frames of 224 px, of each config: specification table D, and padding to legal lengths.
OFFICIAL = {
    "cogvideox": (215_583_907, (16, 4, 28, 28)),
    "wan21": (126_892_531, (16, 5, 28, 28)),
    "wan22": (704_688_668, (48, 5, 14, 14)),
    "hunyuan_video": (246_478_803, (16, 5, 28, 28)),
    "hunyuan_video15": (1_260_634_115, (32, 5, 14, 14)),
    "ltx_video": (419_193_649, (128, 3, 7, 7)),
    "ltx2_video": (1_222_479_601, (128, 3, 7, 7)),
    "ltx2_video_diffusion": (1_111_232_497, (128, 3, 7, 7)),
    "minimax_h3": (2_603_868_984, (24, 7, 14, 14)),
    "flux2": (84_046_115, (128, 16, 14, 14)),
    "cosmos8": (105_653_696, (16, 3, 28, 28)),
    "cosmos4": (104_669_888, (16, 5, 28, 28)),
    "mochi": (459_748_611, (12, 4, 28, 28)),
    "allegro": (174_955_751, (4, 4, 28, 28)),
    "stable_diffusion": (83_653_863, (4, 16, 28, 28)),
    "stable_video_diffusion": (97_742_847, (4, 16, 28, 28)),
    "kvae": (617_982_115, (16, 5, 28, 28)),
    "easyanimate": (244_375_507, (16, 5, 28, 28)),
    "vidtok": (157_451_663, (4, 5, 28, 28)),
    "vidtok_noncausal": (157_451_663, (4, 4, 28, 28)),
    "vidtok_fsq": (157_451_661, (6, 5, 28, 28)),
    "emu3": (270_740_287, (4, 4, 28, 28)),
}


FULL = (3, 16, 224, 224)


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_arguments_have_the_official_size_and_latent(name):
    model = official(name)
    parameters, shape = OFFICIAL[name]
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.latent_shapes(FULL) == {"latent": shape}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(OFFICIAL) - {"vidtok_fsq"}))
def test_official_models_give_these_shapes(name):
    model, clip = official(name), torch.empty(1, *FULL, device="meta")
    with torch.no_grad():
        latents = model.encode(clip).mode()
        assert model.decode(latents, 16).shape == clip.shape
    assert tuple(latents["latent"].shape[1:]) == OFFICIAL[name][1]


def test_every_config_of_the_folder_is_an_official_model():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {*OFFICIAL, "finetune", "wan21_decoder", "wan_tiny"}


def test_rates_are_measured_with_padding():
    rates = {name: official(name).compression_rate(FULL) for name in ("cogvideox", "wan21", "ltx2_video", "emu3")}
    assert rates == {"cogvideox": 1 / 48, "wan21": 5 / 192, "ltx2_video": 1 / 128, "emu3": 1 / 192}
    assert official("emu3").bits_per_pixel(FULL) == 15 / 256


@pytest.mark.parametrize(("name", "kept"), [("hunyuan_video", 5), ("wan", 5)])
def test_frames_that_the_library_drops_are_padded_and_come_back(name, kept):
    model, clip = tiny(name), noise(1, 3, 8, 8, 8)
    assert library_round_trip(model, clip).shape[2] == kept
    with torch.no_grad():
        assert model(clip).clip.shape == clip.shape
        padded = torch.cat([clip, clip[:, :, -1:]], dim=2)
        assert torch.equal(model.encode(clip).mode()["latent"], model.encode(padded).mode()["latent"])


@pytest.mark.parametrize(("name", "frames"), [("stable_video_diffusion", 2), ("allegro", 8)])
def test_two_frames_in_bfloat16_on_a_cpu_give_the_gradient_of_float32(name, frames):
    """There oneDNN leaves the weight gradient of a convolution unwritten that pads two frames and spans three."""
    model, clip = tiny(name), noise(1, 3, frames, 8, 8)
    gradients = []
    try:
        for enabled in (False, True):
            model.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss = model(clip).clip.float().square().mean()
            loss.backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    finally:
        model.zero_grad(set_to_none=True)
    assert (gradients[1] - gradients[0]).norm() < 0.05 * gradients[0].norm()


def test_a_constant_picture_is_refused():
    model = tiny("stable_diffusion")
    layer = model.model.decoder.conv_out
    before = [parameter.detach().clone() for parameter in layer.parameters()]
    try:
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)
        with pytest.raises(UserError, match="AutoencoderKL to decode a picture, got 0 in every pixel"):
            model(noise(1, 3, 2, 4, 4))
    finally:
        for parameter, value in zip(layer.parameters(), before, strict=True):
            parameter.data.copy_(value)


def test_another_length_than_the_promised_is_refused(monkeypatch):
    model = tiny("hunyuan_video")
    monkeypatch.setattr(model, "_run_decoder", lambda latent: torch.zeros(1, 3, 4, 8, 8))
    with pytest.raises(UserError, match=r"to give \(1, 3, 5, 8, 8\), got \(1, 3, 4, 8, 8\)"):
        model.decode({"latent": noise(1, 2, 2, 2, 2)})


@pytest.mark.parametrize("name", ["easyanimate", "vidtok", "wan"])
def test_an_exception_spoils_no_later_clip(name):
    model, clip = tiny(name), noise(1, 3, 5, 8, 8)
    with torch.no_grad():
        expected = model(clip).clip

    def fail(*_: Any) -> None:
        raise RuntimeError("stop")

    for half in (model.model.encoder, model.model.decoder):
        layers = [module for module in half.modules() if isinstance(module, nn.Conv3d)]
        hook = layers[len(layers) // 2].register_forward_hook(fail)
        with torch.no_grad():
            with pytest.raises(RuntimeError, match="stop"):
                model(clip)
            hook.remove()
            assert torch.equal(model(clip).clip, expected)
    assert kept_frames(model) == []


KEEPING = ("easyanimate", "kvae", "vidtok")  # frames, from one call of a layer to the next


SUPPORTING = [name for name in TINY if name not in ("wan", "wan/2.2", "emu3")]


@pytest.mark.parametrize(
    "name", [name if name in KEEPING else pytest.param(name, marks=pytest.mark.slow) for name in SUPPORTING]
)
def test_recomputation_changes_no_gradient_and_keeps_no_frames(name):
    """Layers that keep frames find those of the first run in the second."""
    arguments, frames, side = TINY[name]
    plain = tiny(name)
    model = class_of(name)(arguments, activation_checkpointing=True, **OWN.get(name, {}))
    model.load_state_dict(plain.state_dict())
    clip = noise(1, 3, plain.temporal.legal_length(frames + 1), side, side)
    gradients = []
    try:
        for each in (plain.train(), model.train()):
            torch.manual_seed(0)  # Allegro has dropout
            each.decode(each.encode(clip).sample()).square().mean().backward()
            gradients.append([p.grad for p in each.parameters()])
    finally:
        plain.zero_grad(set_to_none=True)
        plain.eval()
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-7)
    assert kept_frames(model) == []


def kept_frames(model: LibraryAutoencoder) -> list[tuple[str, str]]:
    """List the tensors that layers hold beside their parameters and buffers."""
    return [
        (type(module).__name__, key)
        for module in model.model.modules()
        for key, value in vars(module).items()
        if isinstance(value, torch.Tensor) and key != "global_codebook_usage"
    ]


@pytest.mark.slow
def test_a_copy_of_a_recomputing_model_runs_its_own_blocks():
    name = "ltx2_video/diffusion"
    check_autoencoder(class_of(name)(TINY[name][0], activation_checkpointing=True, **OWN[name]), *TINY[name][1:])


def test_checkpointing_of_the_library_is_used_or_refused():
    model = class_of("ltx_video")(TINY["ltx_video"][0], activation_checkpointing=True)
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.model.modules())
    with pytest.raises(UserError, match="activation_checkpointing false for Emu3VQVAE"):
        class_of("emu3")(TINY["emu3"][0], activation_checkpointing=True)


# As docs/library.md names them: what encodes, beside the encoder itself.
QUANT_CONV = {"wan", "wan/2.2", "hunyuan_video", "cosmos", "allegro", "easyanimate", "stable_diffusion"}


QUANT_CONV |= {"stable_video_diffusion", "minimax_h3", "flux2"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in TINY]
)
def test_a_decoder_trains_over_a_frozen_encoder_without_a_graph_of_it(name):
    arguments, frames, side = TINY[name]
    model = class_of(name)(arguments, **OWN.get(name, {}))
    freeze(model, ["model.encoder", *(["model.quant_conv"] if name in QUANT_CONV else [])])
    model.train()
    latents = model.encode(noise(1, 3, frames, side, side)).sample()
    assert not latents["latent"].requires_grad
    model.decode(latents).square().mean().backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained


def test_latents_are_standardized_and_their_kl_is_the_librarys():
    model, clip = tiny("wan"), noise(2, 3, 5, 8, 8)
    with torch.no_grad():
        posterior, own = model.encode(clip)["latent"], model.model.encode(clip).latent_dist
        assert isinstance(posterior, StandardizedGaussian)
        mean, std = (torch.tensor(model.init_args["arguments"][f"latents_{key}"]) for key in ("mean", "std"))
        assert torch.allclose(posterior.mode(), (own.mean - mean.view(-1, 1, 1, 1)) / std.view(-1, 1, 1, 1), atol=1e-6)
        torch.manual_seed(3)
        sample = posterior.sample() * model.scale + model.shift
        torch.manual_seed(3)
        assert torch.allclose(sample, own.sample(), atol=1e-5)
        kl = 0.5 * (own.mean.square() + own.var - 1 - own.logvar).sum() / 2
        assert torch.allclose(posterior.regularization()["kl"], kl, rtol=1e-5)
        with pytest.raises(UserError, match="latents_mean of 3 numbers"):
            class_of("wan")(TINY["wan"][0] | {"z_dim": 3})


def test_the_libraries_are_imported_by_no_module_itself():
    for path in (ROOT / "baselines" / "library").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.startswith(("diffusers", "transformers")) for name in names), (path.name, names)


@pytest.mark.parametrize(("name", "package"), [("wan", "diffusers"), ("emu3", "transformers")])
def test_a_missing_library_is_the_line_that_installs_it(name, package, monkeypatch):
    def absent(_: str) -> str:
        raise metadata.PackageNotFoundError

    cls = class_of(name)
    monkeypatch.setitem(sys.modules, cls.library_class.rpartition(".")[0], None)
    monkeypatch.setattr(metadata, "version", absent)
    with pytest.raises(UserError) as error:
        cls()
    assert str(error.value) == (
        f"Expected the package {package}, got none installed; run pip install 'vidtwin[library]'."
    )


@pytest.mark.parametrize(("name", "package"), [("minimax_h3", "diffusers"), ("emu3", "transformers")])
def test_a_class_that_a_library_lacks_is_one_line_with_the_version_that_has_it(name, package, monkeypatch):
    cls = class_of(name)
    module, _, library = cls.library_class.rpartition(".")
    monkeypatch.delattr(f"{module}.{library}")
    installed = metadata.version(package)
    with pytest.raises(UserError) as error:
        cls()
    beginning = f"Expected {package} with {library}, as {VERSIONS[package]} has it, got {installed} ("
    assert str(error.value).startswith(beginning)
    assert str(error.value).endswith("; run pip install 'vidtwin[library]'.")
    assert "\n" not in str(error.value)
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["library"]
    assert any(line.startswith(f"{package}>={VERSIONS[package]},") for line in requirements)


def test_arguments_that_the_library_refuses_are_one_line():
    with pytest.raises(UserError, match=r"arguments of AutoencoderKLWan, got 'z_dmi'; did you mean 'z_dim'\?"):
        class_of("wan")({"z_dmi": 4})
    with pytest.raises(UserError, match="Expected arguments that AutoencoderKLMochi takes, got others: "):
        class_of("mochi")({"encoder_block_out_channels": [8, 8, 8, 8]})


def test_open_soras_image_half_is_the_librarys_own():
    """Written with layers of the project, it loads and computes what the library's class does."""
    library = class_of("stable_diffusion")._import_class()
    sizes: dict[str, Any] = {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
    sizes |= {"block_out_channels": [4, 8, 8], "layers_per_block": 1, "norm_num_groups": 2, "latent_channels": 3}
    theirs, frames = library(**sizes).double().eval(), noise(2, 3, 1, 8, 16)[:, :, 0].double()
    model = plugins.load("opensora", GROUP)(
        frame_channels=[4, 8, 8], frame_blocks=1, frame_latent_channels=3, channels=[4, 4, 4], norm_groups=2
    )
    ours = model.spatial_vae.double()
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        given, wanted = ours.encode(frames), theirs.encode(frames).latent_dist
        torch.testing.assert_close(given.mean, wanted.mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(given.logvar, wanted.logvar, rtol=1e-12, atol=1e-12)
        decoded = theirs.decode(wanted.mean).sample
        torch.testing.assert_close(ours.decode(wanted.mean), decoded, rtol=1e-12, atol=1e-12)


def test_official_weights_convert_and_others_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model, clip = tiny("wan"), noise(1, 3, 5, 8, 8)
    model.model.save_pretrained("repo/vae")
    assert main(["convert", "repo", "ours"]) == 2
    assert "got none; give --model wan --subfolder vae." in capsys.readouterr().err
    assert main(["convert", "repo", "ours", "--model", "wan"]) == 2
    assert "got none in repo; give --subfolder vae." in capsys.readouterr().err
    assert main(["convert", "repo", "ours", "--model", "wan", "--subfolder", "vae"]) == 0
    with torch.no_grad():
        assert torch.equal(VideoAutoencoder.from_pretrained("ours")(clip).clip, model(clip).clip)
    (file,) = Path("repo/vae").glob("*.safetensors")
    whole = load_file(file)
    save_file({name: value for name, value in whole.items() if name != "decoder.conv_out.bias"}, file)
    with pytest.raises(UserError, match=r"missing decoder\.conv_out\.bias"):
        class_of("wan").from_official("repo", "vae")
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(UserError, match=r"Expected \.safetensors files in repo/vae, got none"):
        class_of("wan").from_official("repo", "vae")
    with pytest.raises(UserError, match="weights of AutoencoderKLMochi in repo/vae, got those of AutoencoderKLWan"):
        class_of("mochi").from_official("repo", "vae")
    with pytest.raises(UserError, match=r"with config\.json, got none in repo; give --subfolder"):
        class_of("wan").from_official("repo")
