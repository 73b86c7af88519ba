"""CV-VAE: against tensors of the released implementation, and against the rules of its second release written out."""

import json

import pytest
import torch
import torch.nn.functional as F
from finite_differences import check_gradients
from golden import largest_error, noise, read_keys, watch, weights_of
from safetensors.torch import load_file, save_file

from vidtwin.baselines.cvvae import CVVAE, Level, Middle, Upsample, to_released_name, view_as_released
from vidtwin.errors import UserError

SMALL = {"channels": 4, "multipliers": [1, 1, 2, 2], "num_blocks": 1, "norm_groups": 2}
CONFIG = {"_class_name": "CVVAEModel", "ch": 32, "causal_decoder": False, "en_de_n_frames_a_time": 16}


def small(release: str = "sd2.1", **arguments) -> CVVAE:
    torch.manual_seed(0)
    return CVVAE(release, **SMALL | arguments).double().eval()


def name_as_released(model: CVVAE) -> dict[str, torch.Tensor]:
    release = model.init_args["release"]
    return {
        to_released_name(name, release): view_as_released(name, tensor, release).contiguous()
        for name, tensor in model.state_dict().items()
    }


# Against the released implementation.


@pytest.fixture(scope="module")
def golden(shared):
    return load_file(shared / "golden" / "video_vaes" / "golden_cvvae.safetensors")


@pytest.fixture(scope="module")
def folder(golden, tmp_path_factory):
    """A release in diffusers' form."""
    folder = tmp_path_factory.mktemp("official")
    save_file(weights_of(golden), folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return CVVAE.from_official(folder).double()


def run(model, clip):
    posterior = model._encode(clip.double())["latent"]
    decoded = model.decode({"latent": posterior.mean})
    return {"mean": posterior.mean, "logvar": posterior.logvar, "recon": decoded}


def test_released_features_latents_and_reconstructions_agree(golden, model):
    names, errors = [name.removeprefix("feat.") for name in golden if name.startswith("feat.")], {}
    with torch.no_grad():
        for prefix in ("", "T1.", "T5.", "T8.", "T17."):
            with watch(model, [] if prefix else names) as seen:
                got = run(model, golden[f"{prefix}input"])
            errors |= {f"{prefix}{key}": largest_error(got[key], golden[f"{prefix}{key}"]) for key in got}
            errors |= {name: largest_error(value, golden[f"feat.{name}"]) for name, value in seen.items()}
    assert len(errors) == 15 + len(names) == 25
    assert {key: error for key, error in errors.items() if not error <= 1e-6} == {}


def test_windows_are_those_of_the_released_config(golden, folder, tmp_path):
    (tmp_path / "weights.safetensors").symlink_to(folder / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"en_de_n_frames_a_time": 4}))
    with torch.no_grad():
        got = run(CVVAE.from_official(tmp_path / "weights.safetensors").double(), golden["input"])
    assert all(largest_error(got[key], golden[f"chunk4.{key}"]) < 1e-6 for key in got)
    assert largest_error(golden["chunk4.mean"], golden["mean"]) > 0.01


def test_gradients_are_those_of_the_released_function(golden, model):
    """Along a direction of all weights and the clip, against the difference of two forward passes."""
    clip, wanted = golden["T5.input"].double().requires_grad_(), golden["T5.recon"].double()

    def loss():
        posterior = model.encode(clip)["latent"]
        return (model.decode({"latent": posterior.mean}) - wanted.flip(2)).square().mean() + posterior.kl().mean()

    check_gradients(loss, [clip, *model.parameters()])


@pytest.mark.parametrize(
    ("release", "file", "counts"),
    [
        ("sd2.1", "keys_cvvae.txt", [182_446_475, 68_748_936, 113_697_539]),
        ("sd3", "keys_cvvae_sd3.txt", [181_892_515, 69_080_736, 112_811_779]),
    ],
)
def test_releases_have_their_tensors_and_sizes(shared, release, file, counts):
    with torch.device("meta"):
        model = CVVAE(release)
    wanted = read_keys(shared / "golden" / "video_vaes" / file)
    assert {name: list(tensor.shape) for name, tensor in name_as_released(model).items()} == wanted
    assert [sum(p.numel() for p in part.parameters()) for part in (model, model.encoder, model.decoder)] == counts


# The release for Stable Diffusion 3, which has no golden tensors, written out with its own names.


class Written:
    """Its rules, frame by frame where they are of frames."""

    def __init__(self, weights, groups):
        self.weights, self.groups = weights, groups

    def conv(self, x, name, front, back, stride=(1, 1, 1)):
        first, last = [x[:, :, :1]] * front, [x[:, :, -1:]] * back
        x = torch.cat([*first, x, *last], dim=2)
        for axis in (3, 4):
            size = x.shape[axis]
            x = torch.cat([x.narrow(axis, 0, 1), x, x.narrow(axis, size - 1, 1)], dim=axis)
        return F.conv3d(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], stride)

    def per_frame(self, x, name, padding=0):
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return torch.stack([F.conv2d(frame, weight, bias, padding=padding) for frame in x.unbind(2)], dim=2)

    def norm(self, x, name):
        return F.group_norm(x, self.groups, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], 1e-6)

    def block(self, x, name, pad):
        y = self.conv(F.silu(self.norm(x, f"{name}.norm1")), f"{name}.conv1", *pad)
        y = self.per_frame(F.silu(self.norm(y, f"{name}.norm2")), f"{name}.conv2", 1)
        changes = f"{name}.conv_shortcut.weight" in self.weights
        return y + (self.per_frame(x, f"{name}.conv_shortcut") if changes else x)

    def middle(self, x, name, pad):
        x, frames = self.block(x, f"{name}.resnets.0", pad), []
        for frame in x.unbind(2):
            tokens = self.norm(frame, f"{name}.attentions.0.group_norm").flatten(2).transpose(1, 2)

            def linear(tokens, layer):
                layer = f"{name}.attentions.0.{layer}"
                return F.linear(tokens, self.weights[f"{layer}.weight"], self.weights[f"{layer}.bias"])

            q, k, v = (linear(tokens, layer) for layer in ("to_q", "to_k", "to_v"))
            shares = (q @ k.transpose(1, 2) / q.shape[2] ** 0.5).softmax(-1)
            frames.append(frame + linear(shares @ v, "to_out.0").transpose(1, 2).reshape(frame.shape))
        return self.block(torch.stack(frames, dim=2), f"{name}.resnets.1", pad)

    def encode(self, clip):
        first = (2, 0)
        x = self.conv(clip, "encoder.conv_in", *first)
        for level in range(4):
            x = self.block(x, f"encoder.down_blocks.{level}.resnets.0", first)
            if level < 3:
                name, stride = f"encoder.down_blocks.{level}.downsamplers.0.conv", (1 if level == 1 else 2, 2, 2)
                x = self.conv(x, name, *first, stride)
        x = self.norm(self.middle(x, "encoder.mid_block", first), "encoder.conv_norm_out")
        return self.conv(F.silu(x), "encoder.conv_out", *first)

    def decode(self, z):
        ends = (1, 1)
        x = self.middle(self.conv(z, "decoder.conv_in", *ends), "decoder.mid_block", ends)
        for level in range(4):
            for block in range(2):
                x = self.block(x, f"decoder.up_blocks.{level}.resnets.{block}", ends)
            if level < 3:
                x = x.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)
                x = self.conv(x, f"decoder.up_blocks.{level}.upsamplers.0.conv", *ends)
                if level != 1:
                    x = torch.stack(x.chunk(2, dim=1), dim=3).flatten(2, 3)[:, :, 1:]
        x = self.norm(x, "decoder.conv_norm_out")
        return self.conv(F.silu(x), "decoder.conv_out", *ends)


def test_the_second_release_is_its_rules(tmp_path):
    model, clip = small("sd3", latent_channels=3, num_blocks=1), noise(2, 3, 9, 16, 8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * noise(*parameter.shape)
        written = Written(name_as_released(model), 2)
        posterior = model.encode(clip)["latent"]
        mean, logvar = written.encode(clip).chunk(2, dim=1)
        assert largest_error(posterior.mean, mean) < 1e-12
        assert largest_error(posterior.logvar, logvar) < 1e-12
        assert largest_error(model.decode({"latent": mean}), written.decode(mean)) < 1e-12


# Rules of their own.


@pytest.mark.parametrize(
    ("release", "frames", "steps", "rate"),
    [("sd2.1", 16, 5, 0.6510), ("sd2.1", 17, 5, 0.6127), ("sd2.1", 8, 3, 0.7812), ("sd3", 16, 5, 2.6042)],
)
def test_rates_are_those_of_the_tensors_and_clips_keep_their_length(release, frames, steps, rate):
    """The released model makes 5 frames of 8 without an error. The printed 0.5208% is the limit of long clips."""
    model, clip = small(release), noise(1, 3, frames, 16, 8)
    output = model(clip)
    latent = output.latents["latent"]
    assert latent.shape[1:] == (16 if release == "sd3" else 4, steps, 2, 1)
    assert output.clip.shape == clip.shape
    assert round(100 * latent.numel() / clip.numel(), 4) == rate
    assert round(100 * model.compression_rate((3, frames, 224, 224)), 4) == rate
    limit = round(100 * model.compression_rate((3, 400_001, 224, 224)), 4)
    assert limit == (2.0833 if release == "sd3" else 0.5208)


def test_up_to_17_frames_are_one_window_and_later_ones_see_no_earlier_norms():
    model, whole = small(), small(chunk_frames=None)
    for frames, one in ((17, True), (21, False)):
        clip = noise(1, 3, frames, 8, 8)
        latents, others = (each.encode(clip).mode() for each in (model, whole))
        assert torch.equal(latents["latent"], others["latent"]) == one
        assert torch.equal(model.decode(others), whole.decode(others)) == one
    changed = clip.clone()
    changed[:, :, 20] += 0.5
    same = (model.encode(changed).mode()["latent"] == latents["latent"]).flatten(3).all(3).all(1)[0]
    assert same.tolist() == [True] * 5 + [False]


@pytest.mark.parametrize("release", ["sd2.1", "sd3"])
def test_convolutions_of_the_encoder_are_causal_and_those_of_the_decoder_are_not(release):
    """Norms and attention over time aside, which see all frames."""
    model = small(release)
    for module in model.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.forward = lambda x: x
        if isinstance(module, Middle):
            module.attn_1.forward = lambda x: x
    clip = noise(1, 3, 9, 8, 8)
    latent = model.encode(clip).mode()["latent"]
    clip[:, :, 5:] += 0.5
    other = model.encode(clip).mode()["latent"]
    assert torch.equal(other[:, :, :2], latent[:, :, :2])
    assert not torch.equal(other[:, :, 2], latent[:, :, 2])
    changed = latent.clone()
    changed[:, :, 1] += 0.5
    before, after = (model.decode({"latent": z})[:, :, 0] for z in (latent, changed))
    assert not torch.equal(before, after)


def test_the_first_half_of_channels_is_the_earlier_frame():
    """MAGVIT-v2 and Open-Sora have the frames of a channel side by side."""
    layer = Upsample("sd2.1", 2, time=True).double()
    torch.nn.init.zeros_(layer.conv.weight)
    layer.conv.bias.data = torch.arange(4.0).double()
    x = layer(noise(1, 2, 3, 2, 2))
    assert x.shape == (1, 2, 5, 4, 4)
    # Of frames (0, 1), (0, 1), (0, 1) of each channel the first is dropped.
    assert x[0, :, :, 0, 0].tolist() == [[2.0, 0.0, 2.0, 0.0, 2.0], [3.0, 1.0, 3.0, 1.0, 3.0]]


def test_steps_up_keep_bfloat16s_range():
    """The released layers convert bfloat16 to float16, whose largest number is 65,504."""
    layer = Upsample("sd3", 2, time=True).bfloat16()
    assert layer(torch.full((1, 2, 1, 2, 2), 1e6, dtype=torch.bfloat16)).isfinite().all()


def test_activation_checkpointing_recomputes_each_level_by_option_alone(monkeypatch):
    """The released model does so whenever it is in training mode."""
    recomputed = []

    def checkpoint(layer, *inputs, use_reentrant):
        recomputed.append(layer)
        return layer(*inputs)

    monkeypatch.setattr("vidtwin.layers.recompute.checkpoint", checkpoint)
    clip, decoded = noise(1, 3, 5, 8, 8), []
    for option in (False, True):
        assert recomputed == []
        model = small(activation_checkpointing=option)
        assert model.train()(clip).clip.requires_grad
        decoded.append(model.eval().decode({"latent": torch.ones(1, 4, 2, 1, 1).double()}))
    assert torch.equal(*decoded)
    assert set(recomputed) == {module for module in model.modules() if isinstance(module, Level | Middle)}


# Loading.


@pytest.mark.parametrize("release", ["sd2.1", "sd3"])
def test_the_weights_show_the_release_and_the_sizes(release, tmp_path):
    model = small(release, latent_channels=3, num_blocks=2)
    torch.save(name_as_released(model), tmp_path / "weights.pt")
    loaded = CVVAE.from_official(tmp_path / "weights.pt", norm_groups=2)
    assert loaded.init_args == model.init_args
    assert all(torch.equal(tensor, model.state_dict()[name].float()) for name, tensor in loaded.state_dict().items())


def test_what_does_not_fit_is_named(tmp_path):
    models = {release: small(release) for release in ("sd2.1", "sd3")}

    def refusal(change, release="sd2.1", config=CONFIG):
        state = name_as_released(models[release])
        change(state)
        torch.save(state, tmp_path / "weights.pt")
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError) as caught:
            CVVAE.from_official(tmp_path / "weights.pt", norm_groups=2)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def keep(state):
        pass

    name = "decoder.up_blocks.3.resnets.1.conv1.weight"
    assert f"missing {name}" in refusal(lambda s: s.pop(name), "sd3")
    assert "missing decoder.mid.attn_1.q_t.weight" in refusal(lambda s: s.pop("decoder.mid.attn_1.q_t.weight"))
    assert "unexpected quant_conv.weight" in refusal(lambda s: s.update({"quant_conv.weight": torch.zeros(1)}))
    attention = "encoder.mid.attn_1.q.weight"
    assert f"{attention} is (8, 8), expected (8, 8, 1, 1)" in refusal(
        lambda s: s.update({attention: s[attention][..., 0, 0].clone()})
    )
    assert "got none named encoder.conv_in.weight" in refusal(lambda s: s.pop("encoder.conv_in.weight"))
    assert "Expected causal_decoder False of CV-VAE" in refusal(keep, config=CONFIG | {"causal_decoder": True})
    assert "Expected half_3d True of CV-VAE" in refusal(keep, config=CONFIG | {"half_3d": False})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"release": "sd1"}, r"Expected release sd2\.1 or sd3, got 'sd1'"),
        ({"num_blocks": 0}, "Expected num_blocks of at least 1, got 0"),
        ({"multipliers": [1, 2]}, r"Expected four multipliers of at least 1, got \[1, 2\]"),
        ({"chunk_frames": 6}, "Expected chunk_frames that is a multiple of 4, got 6"),
        ({"norm_groups": 32}, "Expected widths that are multiples of norm_groups, got 4 and 32"),
    ],
)
def test_invalid_arguments_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        CVVAE(**SMALL | arguments)


def test_invalid_clips_and_latents_are_refused():
    model = small()
    with pytest.raises(UserError, match="multiples of 8"):
        model.encode(noise(1, 3, 5, 16, 20))
    with pytest.raises(UserError, match=r"Expected a latent of shape \(B, 4, T', h, w\), got \(1, 5, 1, 2, 2\)"):
        model.decode({"latent": noise(1, 5, 1, 2, 2)})
