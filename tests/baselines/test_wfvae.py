"""WF-VAE: against tensors of the released implementation, and against its rules written out."""

import copy
import json
import math

import pytest
import torch
from finite_differences import check_gradients
from safetensors.torch import load_file, save_file

from vidtwin.baselines.wfvae import WFVAE
from vidtwin.errors import UserError
from vidtwin.layers.wavelets import HaarTransform2d, HaarTransform3d, InverseHaarTransform2d, InverseHaarTransform3d

CONFIG = {"_class_name": "WFVAEModel", "t_interpolation": "trilinear", "scale": [0.18215], "shift": [0.0]}
SMALL = {"channels": 4, "encoder_flow_channels": 3, "decoder_flow_channels": 5, "num_blocks": 1}


def largest_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).abs().max() / expected.abs().max())


def small(**arguments) -> WFVAE:
    torch.manual_seed(0)
    return WFVAE(**SMALL | arguments).double().eval()


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


# Against the released implementation.


@pytest.fixture(scope="module")
def golden(shared):
    return load_file(shared / "golden" / "video_vaes" / "golden_wfvae.safetensors")


@pytest.fixture(scope="module")
def state(golden):
    return {name.removeprefix("sd."): tensor for name, tensor in golden.items() if name.startswith("sd.")}


@pytest.fixture(scope="module")
def folder(state, tmp_path_factory):
    """A release in diffusers' form."""
    folder = tmp_path_factory.mktemp("official")
    save_file(state, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return WFVAE.from_official(folder).double()


def test_released_features_latents_coefficients_and_reconstructions_agree(golden, model):
    seen = {}
    names = [name.removeprefix("feat.") for name in golden if name.startswith("feat.")]
    hooks = []
    for name in names:
        module = model.get_submodule(name)
        module = module[-1] if isinstance(module, torch.nn.ModuleList) else module
        hooks.append(
            module.register_forward_hook(lambda _, __, output, name=name: seen.update({f"feat.{name}": output}))
        )
    with torch.no_grad():
        posterior = model.encode(golden["input"].double())["latent"]
        seen["recon"], decoded = model.decoder(posterior.mode())
    for hook in hooks:
        hook.remove()
    seen |= {"mean": posterior.mean, "logvar": posterior.logvar}
    for part, pair in (("enc", posterior.coefficients), ("dec", decoded)):
        seen |= {f"{part}_l1_coeffs": pair[0], f"{part}_l2_coeffs": pair[1]}
    errors = {name: largest_error(tensor, golden[name]) for name, tensor in seen.items()}
    assert len(errors) == 7 + len(names) == 21
    assert {name: error for name, error in errors.items() if not error <= 1e-6} == {}


@pytest.mark.parametrize(("frames", "steps", "decoded"), [(1, 1, 1), (5, 2, 5), (8, 2, 5)])
def test_released_lengths_agree_and_an_illegal_one_is_padded(golden, model, frames, steps, decoded):
    """The released model makes 5 frames of 8; here they are padded to 9."""
    clip = golden[f"T{frames}.input"].double()
    with torch.no_grad():
        posterior = model._encode(clip)["latent"]
        got = {"mean": posterior.mean, "logvar": posterior.logvar, "recon": model.decode({"latent": posterior.mean})}
        whole = model(clip)
    assert (posterior.mean.shape[2], got["recon"].shape[2]) == (steps, decoded)
    assert all(largest_error(tensor, golden[f"T{frames}.{name}"]) < 1e-6 for name, tensor in got.items())
    assert whole.clip.shape == clip.shape
    assert whole.latents["latent"].shape[2] == math.ceil((frames - 1) / 4) + 1
    if frames == 8:
        padded = torch.cat([clip, clip[:, :, -1:]], dim=2)
        assert torch.equal(model.decode(whole.latents)[:, :, :8], whole.clip)
        torch.testing.assert_close(model._encode(padded)["latent"].mean, whole.latents["latent"])


def test_interpolation_over_time_has_no_weights_and_is_asked_for(golden, state, model, folder, tmp_path):
    nearest = WFVAE.from_official(folder, time_interpolation="nearest").double()
    with torch.no_grad():
        decoded = nearest.decode({"latent": golden["mean"].double()})
    assert largest_error(decoded, golden["recon_t_nearest"]) < 1e-6
    assert largest_error(golden["recon_t_nearest"], golden["recon"]) > 0.01
    save_file(state, tmp_path / "alone.safetensors")
    with pytest.raises(UserError, match=r"config\.json beside .*alone.safetensors, got none; .*time_interpolation="):
        WFVAE.from_official(tmp_path / "alone.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({key: value for key, value in CONFIG.items() if "_i" not in key}))
    assert WFVAE.from_official(tmp_path / "alone.safetensors").init_args["time_interpolation"] == "nearest"


def test_gradients_are_those_of_the_released_function(golden, model):
    """Along a direction of all trained numbers and the clip, against the difference of two forward passes."""
    clip, wanted = golden["T5.input"].double().requires_grad_(), golden["T5.recon"].double()
    leaves = [clip, *(p for p in model.parameters() if p.requires_grad)]

    def loss():
        posterior = model.encode(clip)["latent"]
        return (model.decode({"latent": posterior.mean}) - wanted.flip(2)).square().mean() + posterior.kl().mean()

    check_gradients(loss, leaves)


@pytest.mark.parametrize(
    ("file", "arguments", "parameters", "encoder"),
    [
        ("S4", {}, 146_496_836, 38_157_704),
        ("L16", {"channels": 192, "latent_channels": 16}, 317_081_372, 84_587_040),
        (
            "M32_8x8x8",
            {"channels": 160, "latent_channels": 32, "temporal_stride": 8},
            227_035_816,
            60_326_464,
        ),
        (
            "default",
            {"latent_channels": 8, "encoder_flow_channels": 64, "norm": "group", "time_interpolation": "nearest"},
            145_576_780,
            37_182_352,
        ),
    ],
)
def test_releases_have_their_tensors_and_sizes(shared, file, arguments, parameters, encoder):
    with torch.device("meta"):
        model = WFVAE(**arguments)
    lines = (shared / "golden" / "video_vaes" / f"keys_wfvae_{file}.txt").read_text().splitlines()
    wanted = {name: json.loads(shape) for name, shape, _ in (line.split("\t") for line in lines if line[0] != "#")}
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == wanted
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(p.numel() for p in model.encoder.parameters()) == encoder
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {line.split("\t")[0] for line in lines if line.endswith("param(frozen)")}


@pytest.mark.parametrize(
    ("arguments", "frames", "steps", "rate"),
    [
        ({}, 16, 5, 0.6510),
        ({}, 17, 5, 0.6127),
        ({"latent_channels": 16}, 16, 5, 2.6042),
        ({"latent_channels": 32, "temporal_stride": 8}, 16, 3, 3.125),
    ],
)
def test_rates_are_those_of_the_tensors(arguments, frames, steps, rate):
    """They do not depend on height and width. The printed 0.5208% is the limit of long clips."""
    model, clip = small(**arguments), noise(1, 3, frames, 16, 8)
    latent = model.encode(clip).mode()["latent"]
    assert latent.shape[1:] == (arguments.get("latent_channels", 4), steps, 2, 1)
    assert round(100 * latent.numel() / clip.numel(), 4) == rate
    assert round(100 * model.compression_rate((3, frames, 224, 224)), 4) == rate
    assert round(100 * small().compression_rate((3, 400_001, 8, 8)), 4) == 0.5208


# Loading.


def test_a_trainings_file_gives_its_averaged_weights(tmp_path):
    """They lack the frozen filters and have DDP's prefix; those of the last step have all."""
    state = small().state_dict()
    trained = {name: tensor if "wavelet" in name else tensor + 1 for name, tensor in state.items()}
    averaged = {f"module.{name}": tensor for name, tensor in state.items() if "wavelet" not in name}
    content = {"epoch": 1, "state_dict": {"gen_model": trained, "dics_model": {"main.0.weight": torch.zeros(1)}}}
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    for averages in ({}, averaged):
        torch.save(content | {"ema_state_dict": averages}, tmp_path / "checkpoint.ckpt")
        loaded = WFVAE.from_official(tmp_path / "checkpoint.ckpt").state_dict()
        wanted = state if averages else trained
        assert all(torch.equal(tensor, wanted[name].float()) for name, tensor in loaded.items())


@pytest.mark.parametrize("arguments", [{"temporal_stride": 8}, {"norm": "group", "channels": 32} | dict.fromkeys(
    ("encoder_flow_channels", "decoder_flow_channels"), 32)])  # fmt: skip
def test_the_weights_show_the_sizes_the_norm_and_the_stride(arguments, tmp_path):
    """The released config spells some keys wrongly, and one release's contradicts its report."""
    with torch.device("meta"):
        given = WFVAE(**SMALL | arguments)
    weights = {name: torch.zeros(tensor.shape) for name, tensor in given.state_dict().items()}
    torch.save(weights, tmp_path / "weights.pt")
    assert WFVAE.from_official(tmp_path / "weights.pt", "linear").init_args == given.init_args


def test_what_does_not_fit_is_named(tmp_path):
    state = small().state_dict()

    def refusal(change, config=CONFIG, name="weights.pt"):
        changed = dict(state)
        change(changed)
        torch.save(changed, tmp_path / name)
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError) as caught:
            WFVAE.from_official(tmp_path / name)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def keep(changed):
        pass

    assert "missing encoder.wavelet_transform_in.h_conv.conv.weight" in refusal(
        lambda s: s.pop("encoder.wavelet_transform_in.h_conv.conv.weight")
    )
    assert "unexpected encoder.extra" in refusal(lambda s: s.update({"encoder.extra": torch.zeros(1)}))
    flow = refusal(lambda s: s.update({"encoder.connect_l1.weight": torch.zeros(6, 12, 3, 3)}))
    assert "encoder.connect_l2.weight is (3, 24, 3, 3), expected (6, 24, 3, 3)" in flow
    norms = refusal(lambda s: s.update({"encoder.mid.1.norm.weight": s.pop("encoder.mid.1.norm.norm.weight")}))
    assert "missing encoder.mid.1.norm.norm.weight" in norms
    assert "_class_name WFVAEModel of WF-VAE" in refusal(keep, CONFIG | {"_class_name": "WFVAE2Model"})
    assert "use_attention True of WF-VAE" in refusal(keep, CONFIG | {"use_attention": False})
    assert "got none named encoder.down1.0.weight" in refusal(lambda s: s.pop("encoder.down1.0.weight"))
    assert "Expected a JSON object in" in refusal(keep, 7)
    assert 'time_interpolation "linear" or "nearest", got \'cubic\'' in refusal(
        keep, CONFIG | {"t_interpolation": "cubic"}
    )
    with pytest.raises(UserError, match=r"got none at .*diffusion_pytorch_model"):
        WFVAE.from_official(tmp_path)
    (tmp_path / "torn.pt").write_bytes((tmp_path / "weights.pt").read_bytes()[:-9])
    with pytest.raises(UserError, match="damaged or cut off"):
        WFVAE.from_official(tmp_path / "torn.pt", "linear")


# Rules of their own.


def test_wavelets_are_orthogonal_up_to_their_printed_constants():
    clip = noise(2, 3, 5, 8, 4)
    for transform, inverse, gain in (
        (HaarTransform2d(), InverseHaarTransform2d(), 1),
        (HaarTransform3d(), InverseHaarTransform3d(), (0.3536 * math.sqrt(8)) ** 2),
    ):
        bands = transform.double()(clip)
        torch.testing.assert_close(inverse.double()(bands), gain * clip, rtol=1e-6, atol=1e-6)
        constant = transform(torch.ones_like(clip))
        assert (constant[:, :3] > 1).all()  # the low bands of the three colours
        assert not constant[:, 3:].any()
        assert largest_error(bands[:, 1:2], transform(clip[:, 1:2])[:, :1]) < 1e-15


def test_the_encoder_never_looks_ahead_and_the_decoder_one_step():
    clip = noise(1, 3, 9, 16, 16)
    model = small()
    latent = model.encode(clip).mode()["latent"]
    for frame in range(9):
        changed = clip.clone()
        changed[:, :, frame] += 0.5
        same = (model.encode(changed).mode()["latent"] == latent).flatten(3).all(3).all(1).flatten().tolist()
        assert same == [step < math.ceil(frame / 4) for step in range(3)] or same == [
            step < math.ceil(frame / 4) or step > math.ceil(frame / 4) for step in range(3)
        ]
    longer = noise(1, 4, 4, 2, 2)
    changed = longer.clone()
    changed[:, :, 3] += 0.5
    before, after = (model.decode({"latent": z}) for z in (longer, changed))
    first = int((before != after).flatten(3).any(3).any(1).flatten().nonzero()[0])
    assert 1 + 4 * 1 < first < 1 + 4 * 2  # frames of step 2 see step 3, those of step 1 do not


def test_the_wavelet_term_compares_both_levels_per_values_of_a_frame():
    model, clip = small().train(), noise(2, 3, 5, 16, 16)
    torch.manual_seed(0)
    output = model(clip)
    _, made = model.decoder(output.latents["latent"])
    given = output.encoding["latent"].coefficients
    wanted = sum((a - b).abs().sum() for a, b in zip(given, made, strict=True)) / 2 / (3 * 16 * 16)
    torch.testing.assert_close(output.regularization["wavelet"], wanted)
    assert set(output.regularization) == {"kl", "wavelet"}
    output.regularization["wavelet"].backward()
    assert model.decoder.connect_l2[1].weight.grad.abs().max() > 0
    assert model.encoder.conv_out.conv.weight.grad.abs().max() > 0
    assert model.decoder.conv_out.weight.grad is None  # the outermost bands are not compared


def test_activation_checkpointing_changes_no_gradient():
    clip, gradients = noise(1, 3, 5, 16, 16), []
    model = small()
    again = copy.deepcopy(model)
    again.encoder.activation_checkpointing = again.decoder.activation_checkpointing = True
    for each in (model, again):
        output = each(clip)
        (output.clip.square().mean() + sum(output.regularization.values())).backward()
        gradients.append({name: p.grad for name, p in each.named_parameters() if p.requires_grad})
    assert all(gradient is not None for gradient in gradients[0].values())
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"latent_channels": 0}, "Expected latent_channels of at least 1, got 0"),
        ({"norm": "batch"}, 'Expected norm "layer" or "group", got \'batch\''),
        ({"norm": "group"}, "Expected widths that are multiples of norm_groups, got 4 and 32"),
        ({"time_interpolation": "cubic"}, "Expected time_interpolation"),
        ({"temporal_stride": 2}, "Expected temporal_stride 4 or 8, got 2"),
    ],
)
def test_invalid_arguments_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        WFVAE(**SMALL | arguments)


def test_invalid_clips_and_latents_are_refused():
    model = small()
    with pytest.raises(UserError, match="multiples of 8"):
        model.encode(noise(1, 3, 5, 16, 20))
    with pytest.raises(UserError, match=r"Expected a latent of shape \(B, 4, T', h, w\), got \(1, 5, 1, 2, 2\)"):
        model.decode({"latent": noise(1, 5, 1, 2, 2)})
