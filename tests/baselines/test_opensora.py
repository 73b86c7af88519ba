"""Open-Sora 1.2: against tensors of the released temporal network, and against its pipeline written out."""

import pytest
import torch
from finite_differences import check_gradients
from golden import largest_error, noise, read_keys, watch, weights_of
from safetensors.torch import load_file, save_file

from vidtwin.baselines.opensora import OpenSora, to_released_name
from vidtwin.errors import UserError
from vidtwin.layers.conv3d import ResidualBlock

# Golden file: 16 channels times (1, 2, 2, 3), one block per stage. The image half has one halving.
SIZES = {"channels": [16, 32, 32, 48], "num_blocks": 1, "norm_groups": 8}
FRAMES = {"frame_channels": [8, 8], "frame_blocks": 1}
SMALL = {"channels": [4, 4, 4, 8], "num_blocks": 1, "norm_groups": 2, "frame_channels": [4, 4], "frame_blocks": 1}
SHIFT = torch.tensor([-0.10, 0.34, 0.27, 0.98], dtype=torch.float64).view(1, -1, 1, 1, 1)
SCALE = torch.tensor([3.85, 2.32, 2.33, 3.06], dtype=torch.float64).view(1, -1, 1, 1, 1)


def small(**arguments) -> OpenSora:
    torch.manual_seed(0)
    return OpenSora(**SMALL | arguments).double().eval()


def name_as_released(model: OpenSora) -> dict[str, torch.Tensor]:
    return {to_released_name(name): tensor.float() for name, tensor in model.state_dict().items()}


# Against the released implementation.


@pytest.fixture(scope="module")
def golden(shared):
    return load_file(shared / "golden" / "video_vaes" / "golden_opensora12.safetensors")


@pytest.fixture(scope="module")
def model(golden, tmp_path_factory):
    """The release with golden temporal weights and random ones of the image VAE, loaded from transformers' form."""
    folder = tmp_path_factory.mktemp("official")
    torch.manual_seed(0)
    state = name_as_released(OpenSora(**SIZES | FRAMES))
    temporal = {f"temporal_vae.{name}": tensor for name, tensor in weights_of(golden).items()}
    assert {name for name in state if name.startswith("temporal_vae.")} == set(temporal)
    save_file(state | temporal, folder / "model.safetensors", {"format": "pt"})
    model = OpenSora.from_official(folder, norm_groups=8)
    assert model.init_args == OpenSora(**SIZES | FRAMES).init_args
    return model.double()


def test_released_features_latents_and_reconstructions_agree(golden, model):
    temporal, errors = model.temporal_vae, {}
    names = [name.removeprefix("feat.") for name in golden if name.startswith("feat.")]
    # There the channels of the convolution move to time outside of the module.
    places = {name: f"{name}.conv" if name.startswith("decoder.conv_blocks") else name for name in names}
    with torch.no_grad():
        for prefix in ("", "T1.", "T4.", "T5.", "T17."):
            clip = golden[f"{prefix}input"].double()
            with watch(temporal, [] if prefix else places.values()) as seen:
                mean, logvar = temporal.encode(clip).chunk(2, dim=1)
                decoded = temporal.decode(mean)
            got = {"mean": mean, "logvar": logvar, "recon": decoded[:, :, -clip.shape[2] :]}
            errors |= {f"{prefix}{key}": largest_error(got[key], golden[f"{prefix}{key}"]) for key in got}
            errors |= {
                place: largest_error(seen[place], golden[f"feat.{name}"]) for name, place in places.items() if seen
            }
    assert len(errors) == 15 + len(names) == 29
    assert {key: error for key, error in errors.items() if not error <= 1e-6} == {}


def test_gradients_are_those_of_the_released_function(golden, model):
    """Along a direction of the temporal weights and the image latents, against the difference of two forward passes."""
    temporal, frames = model.temporal_vae, golden["T5.input"].double().requires_grad_()
    wanted = golden["T5.recon"].double()

    def loss():
        mean, logvar = temporal.encode(frames).chunk(2, dim=1)
        return (temporal.decode(mean)[:, :, -5:] - wanted.flip(2)).square().mean() + (mean * logvar).mean()

    check_gradients(loss, [frames, *temporal.parameters()])


def test_the_release_has_its_tensors_and_sizes(shared):
    with torch.device("meta"):
        model = OpenSora()
    folder = shared / "golden" / "video_vaes"
    wanted = {f"temporal_vae.{k}": shape for k, shape in read_keys(folder / "keys_opensora12_temporal.txt").items()}
    spatial = read_keys(folder / "keys_opensora12_spatial.txt")
    wanted |= {f"spatial_vae.module.{name}": shape for name, shape in spatial.items()}
    wanted |= {"shift": [1, 4, 1, 1, 1], "scale": [1, 4, 1, 1, 1]}
    assert {to_released_name(name): list(tensor.shape) for name, tensor in model.state_dict().items()} == wanted
    parts = (model, model.temporal_vae, model.spatial_vae, model.temporal_vae.encoder, model.temporal_vae.decoder)
    counts = [sum(p.numel() for p in part.parameters()) for part in parts]
    assert counts == [393_341_007, 309_687_144, 83_653_863, 144_421_128, 165_265_924]


@pytest.mark.parametrize(
    ("frames", "chunk", "steps", "rate"),
    [
        (16, 17, 4, 0.5208),
        (17, 17, 5, 0.6127),
        (20, 17, 6, 0.6250),
        (34, 17, 10, 0.6127),
        (34, None, 9, 0.5515),
        (1, 17, 1, 2.0833),
    ],
)
def test_rates_are_those_of_the_tensors_and_clips_keep_their_length(frames, chunk, steps, rate):
    """Each chunk of 17 has three padded frames: a long video has 0.6127%, not the printed 0.5208%."""
    model, clip = small(chunk_frames=chunk, frame_channels=[4] * 4), noise(1, 3, frames, 16, 8)
    output = model(clip)
    latent = output.latents["latent"]
    assert latent.shape[1:] == (4, steps, 2, 1)
    assert output.clip.shape == clip.shape
    assert round(100 * latent.numel() / clip.numel(), 4) == rate
    assert round(100 * model.compression_rate((3, frames, 224, 224)), 4) == rate
    assert round(100 * model.compression_rate((3, 400_010, 224, 224)), 4) == (0.6127 if chunk else 0.5208)


# The pipeline, written out.


@pytest.mark.parametrize("frames", [17, 20, 34, 40])
def test_chunks_are_padded_each_in_front_by_zeros_and_latents_are_standardized(frames):
    model, clip = small(), noise(2, 3, frames, 4, 4)
    temporal, images, posterior = model.temporal_vae, model.spatial_vae, model.encode(clip)["latent"]
    per_frame = [images.quant_conv(images.encoder(clip[:, :, t])[0])[:, :4] * 0.18215 for t in range(frames)]
    means, logvars, decoded = [], [], []
    for start in range(0, frames, 17):
        chunk = torch.stack(per_frame[start : start + 17], dim=2)
        length = chunk.shape[2]
        black = torch.zeros_like(chunk[:, :, :1]).expand(-1, -1, (4 - length % 4) % 4, -1, -1)
        moments = temporal.quant_conv(temporal.encoder(torch.cat([black, chunk], dim=2)))
        means.append(moments[:, :4])
        logvars.append(moments[:, 4:])
        whole = temporal.decoder(temporal.post_quant_conv(moments[:, :4]))
        decoded += list((whole[:, :, whole.shape[2] - length :] / 0.18215).unbind(2))
    mean, logvar = torch.cat(means, dim=2), torch.cat(logvars, dim=2)
    assert mean.shape[2] == {17: 5, 20: 6, 34: 10, 40: 12}[frames]
    torch.testing.assert_close(posterior.mode(), (mean - SHIFT) / SCALE, rtol=1e-6, atol=1e-6)  # float32 constants
    torch.testing.assert_close(posterior.logvar, logvar - 2 * SCALE.log(), rtol=1e-6, atol=1e-6)
    # As the released loss has it: of z before it is standardized.
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum() / 2
    torch.testing.assert_close(posterior.regularization()["kl"], kl)
    pictures = torch.stack([images.decoder(images.post_quant_conv(frame))[0] for frame in decoded], dim=2)
    torch.testing.assert_close(model.decode({"latent": posterior.mode()}, frames), pictures, rtol=1e-5, atol=1e-6)


def test_a_length_that_the_latent_cannot_have_is_refused():
    model = small()
    latents = model.encode(noise(1, 3, 20, 4, 4)).mode()  # 5 steps, and one of 1 to 4 frames
    whole = model.decode(latents)
    assert whole.shape[2] == 21
    assert torch.equal(model.decode(latents, 21), whole)
    assert torch.equal(model.decode(latents, 18), torch.cat([whole[:, :, :17], whole[:, :, 20:]], dim=2))
    for wrong in (17, 22):
        with pytest.raises(UserError, match=rf"a clip of 6 steps, such as one of 21 frames, got num_frames={wrong}\."):
            model.decode(latents, wrong)


def test_the_image_latent_is_sampled_in_training_alone():
    """The released encoder samples it in evaluation too, so that a clip has no posterior of its own."""
    model, clip = small(), noise(1, 3, 4, 4, 4)
    with torch.random.fork_rng(), torch.no_grad():
        modes = [model.encode(clip).mode()["latent"] for _ in range(2)]
        model.train()
        torch.manual_seed(0)
        samples = [model.encode(clip).mode()["latent"] for _ in range(2)]
        torch.manual_seed(0)
        again = model.encode(clip).mode()["latent"]
    assert torch.equal(*modes)
    assert torch.equal(again, samples[0])
    assert not torch.equal(*samples)
    # Of a deviation of about 1, at random weights: the log-variance is around 0.
    assert 0.001 < float((samples[0] - modes[0]).abs().max()) < 10


def test_norms_see_the_whole_chunk_and_nothing_else():
    model, clip = small(), noise(1, 3, 20, 4, 4)
    latent = model.encode(clip).mode()["latent"]
    for frame, changed in ((16, range(5)), (18, range(5, 6))):
        other = clip.clone()
        other[:, :, frame] += 0.5
        differs = (model.encode(other).mode()["latent"] != latent).flatten(3).any(3).any(1)[0]
        assert differs.nonzero().flatten().tolist() == list(changed)


# Loading.


def test_the_class_of_the_repository_with_its_own_default_is_another_model(tmp_path):
    """Its default halves time after the first two stages; the release after the last two."""
    state = name_as_released(small())
    for part in ("encoder", "decoder"):
        for name in [name for name in state if name.startswith(f"temporal_vae.{part}.conv_blocks.2.")]:
            state[name.replace("conv_blocks.2", "conv_blocks.0")] = state.pop(name)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"of another model or size: missing .*conv_blocks\.2\.conv.*unexpected"):
        OpenSora.from_official(tmp_path, norm_groups=2)


def test_older_names_of_attention_and_a_single_shift_load(tmp_path):
    model = small(shift=[0.5], scale=[2.0])
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = name_as_released(model)
    for new, old in names.items():
        for name in [name for name in state if f".{new}." in name]:
            state[name.replace(f".{new}.", f".{old}.")] = state.pop(name)
    state |= {"shift": torch.tensor(0.5), "scale": torch.tensor(2.0)}
    torch.save({"state_dict": state}, tmp_path / "weights.pt")
    loaded = OpenSora.from_official(tmp_path / "weights.pt", chunk_frames=None, norm_groups=2)
    assert loaded.init_args == small(shift=[0.5], scale=[2.0], chunk_frames=None).init_args
    assert all(torch.equal(tensor, model.state_dict()[name].float()) for name, tensor in loaded.state_dict().items())


def test_what_does_not_fit_is_named(tmp_path):
    state = name_as_released(small())

    def refusal(change):
        changed = dict(state)
        change(changed)
        torch.save(changed, tmp_path / "weights.pt")
        with pytest.raises(UserError) as caught:
            OpenSora.from_official(tmp_path / "weights.pt", norm_groups=2)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    name = "temporal_vae.encoder.conv_in.conv.weight"
    assert f"missing {name}" in refusal(lambda s: s.pop(name))
    assert "unexpected temporal_vae.encoder.conv_in.conv.bias" in refusal(
        lambda s: s.update({name.replace("weight", "bias"): torch.zeros(4)})
    )
    assert f"{name} is (4, 3, 3, 3, 3), expected (4, 4, 3, 3, 3)" in refusal(
        lambda s: s.update({name: torch.zeros(4, 3, 3, 3, 3)})
    )
    missing = "temporal_vae.post_quant_conv.conv.weight"
    assert f"Expected weights of Open-Sora 1.2, got none named {missing}" in refusal(lambda s: s.pop(missing))
    with pytest.raises(UserError, match=r"got none at .*diffusion_pytorch_model\.safetensors"):
        OpenSora.from_official(tmp_path)


# Options.


def test_activation_checkpointing_recomputes_each_block_by_option_alone(monkeypatch):
    recomputed = []

    def checkpoint(layer, *inputs, use_reentrant):
        recomputed.append(layer)
        return layer(*inputs)

    monkeypatch.setattr("vidtwin.layers.recompute.checkpoint", checkpoint)
    clip, model = noise(1, 3, 5, 4, 4), small()
    decoded = model(clip).clip
    assert recomputed == []
    again = small(activation_checkpointing=True)
    assert torch.equal(again(clip).clip, decoded)
    blocks = {name for name, module in again.temporal_vae.named_modules() if isinstance(module, ResidualBlock)}
    levels = {"encoder.down_blocks.0", "encoder.down_blocks.1", "decoder.up_blocks.0", "decoder.up_blocks.1"}
    named = {module: name for half in (again.temporal_vae, again.spatial_vae) for name, module in half.named_modules()}
    assert blocks | levels | {"encoder.mid_block", "decoder.mid_block"} <= {named[layer] for layer in recomputed}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_blocks": 0}, "Expected num_blocks of at least 1, got 0"),
        ({"chunk_frames": 0}, "Expected chunk_frames of at least 1, got 0"),
        ({"channels": [4, 4]}, r"Expected at least 3 channels of at least 1, got \[4, 4\]"),
        ({"frame_channels": []}, r"Expected at least 1 frame_channels of at least 1, got \[\]"),
        ({"shift": [0.0, 1.0]}, r"Expected shift of 1 or 4 numbers, got \[0\.0, 1\.0\]"),
        ({"scale": [0.0]}, r"Expected scale of positive numbers, got \[0\.0\]"),
        ({"norm_groups": 8}, "Expected widths that are multiples of norm_groups, got 4 and 8"),
    ],
)
def test_invalid_arguments_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        OpenSora(**SMALL | arguments)


def test_invalid_clips_and_latents_are_refused():
    model = small(frame_channels=[4] * 4)
    with pytest.raises(UserError, match="multiples of 8"):
        model.encode(noise(1, 3, 5, 16, 20))
    with pytest.raises(UserError, match=r"Expected a latent of shape \(B, 4, T', h, w\), got \(1, 5, 1, 2, 2\)"):
        model.decode({"latent": noise(1, 5, 1, 2, 2)})
