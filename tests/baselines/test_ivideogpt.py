"""iVideoGPT's tokenizer: against tensors of the released implementation, and against its rules written out."""

import ast
import copy
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

from vidtwin.baselines.ivideogpt import ContextAttention, IVideoGPT
from vidtwin.errors import UserError

CLIP_224 = (3, 16, 224, 224)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    actual, expected = actual.detach().double().flatten(), expected.double().flatten()
    return float((actual - expected).norm() / expected.norm())


def on_meta(**arguments) -> IVideoGPT:
    with torch.device("meta"):
        return IVideoGPT(**arguments)


SMALL = {
    "resolution": 16,
    "inner_resolution": None,
    "channels": [32, 32],
    "layers_per_block": 1,
    "latent_channels": 6,
    "code_size": 4,
    "codebook_size": 16,
    "dynamics_codebook_size": 12,
    "norm_groups": 8,
    "attention_resolution": 8,
}


def small(**arguments) -> IVideoGPT:
    """A model in double precision whose codes are spread, unlike those of a new codebook."""
    torch.manual_seed(0)
    model = IVideoGPT(**{**SMALL, **arguments}).double()
    for quantizer in (model.quantize, model.dynamics_quantize):
        torch.nn.init.normal_(quantizer.embedding.weight, std=0.3)
    for name, parameter in model.named_parameters():
        if "pos_emb" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def clip_of(frames: int, side: int = 16, batch: int = 2, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, frames, side, side, generator=generator, dtype=torch.float64) * 2 - 1


# Against the released implementation.


@pytest.fixture(scope="module")
def golden(shared):
    return load_file(shared / "golden" / "golden_ivideogpt.safetensors")


@pytest.fixture(scope="module")
def described(shared):
    return json.loads((shared / "golden" / "golden_ivideogpt.json").read_text())


@pytest.fixture(scope="module")
def folder(golden, described, tmp_path_factory):
    folder = tmp_path_factory.mktemp("official")
    state = {name.removeprefix("sd."): tensor for name, tensor in golden.items() if name.startswith("sd.")}
    save_file(state, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(described["config"]))
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return IVideoGPT.from_official(folder).double()


@pytest.fixture(scope="module")
def clip(golden):
    """(B, 3, T, H, W) in [-1, 1]; the golden input is (B, T, 3, H, W) in [0, 1]."""
    return (golden["input_u8"].float() / 255).double().transpose(1, 2) * 2 - 1


def folded(latent: torch.Tensor) -> torch.Tensor:
    """(B, C, T, h, w) → (B·T, C, h, w)."""
    return latent.transpose(1, 2).flatten(0, 1)


@pytest.fixture(scope="module")
def passed(model, clip):
    """Everything on the way from the clip to its reconstruction, by the golden file's names, with its graph."""
    seen = {}

    def keep(name, pick=lambda output: output):
        return lambda module, inputs, output: seen.update({name: pick(output)})

    hooks = [
        model.encoder.register_forward_hook(keep("enc_levels", lambda output: output[1])),
        model.decoder.register_forward_hook(keep("dec_levels", lambda output: output[1])),
        model.quant_conv.register_forward_hook(keep("h")),
        model.post_quant_conv.register_forward_hook(keep("dec_in")),
        model.cond_encoder.register_forward_hook(keep("cond_enc_out")),
        model.quant_linear.register_forward_hook(keep("d", lambda output: output.flatten(1, 2))),
        model.cond_decoder.conv_in.register_forward_pre_hook(
            lambda module, inputs: seen.update({"cond_dec_in": inputs[0]})
        ),
    ]
    encoding = model.encode(clip)
    decoded = model.decode(encoding.mode())
    for hook in hooks:
        hook.remove()
    seen["quant"] = folded(encoding["context"].value)
    seen["quant_d"] = folded(encoding["dynamics"].value).flatten(2).transpose(1, 2)
    unit = (decoded + 1) / 2
    seen["rec_ctx"], seen["rec_fut"] = folded(unit[:, :, :2]), folded(unit[:, :, 2:])
    return seen, encoding


def test_released_features_vectors_and_reconstructions_agree(golden, passed, described):
    seen, _ = passed
    pairs = {name: (seen[name], golden[name]) for name in ("h", "quant", "dec_in", "cond_enc_out", "d", "quant_d")}
    pairs |= {name: (seen[name], golden[name]) for name in ("cond_dec_in", "rec_ctx", "rec_fut")}
    # The golden file counts conv_in as feature 0, has the first clip's two frames, and of the largest the first frame.
    pairs |= {f"encoder level {i}": (seen["enc_levels"][i][:2], golden[f"enc_feat.{i + 1}"]) for i in (1, 2)}
    pairs["encoder level 0"] = (seen["enc_levels"][0][:1], golden["enc_feat.1"])
    pairs["decoder middle"] = (seen["dec_levels"][0][:2], golden["dec_feat.1"])
    for kind, levels in (("enc_feat", seen["enc_levels"]), ("dec_feat", seen["dec_levels"])):
        for i, level in enumerate(levels, start=1):
            sums = torch.stack([level.detach().sum(), level.detach().square().sum()])
            wanted = described["sums"][f"{kind}.{i}"]
            pairs[f"sums of {kind}.{i}"] = (sums, torch.tensor([wanted["sum"], wanted["sumsq"]]))
    errors = {name: relative_error(*pair) for name, pair in pairs.items()}
    assert {name: error for name, error in errors.items() if not error <= 1e-6} == {}


def test_released_codes_are_exact_and_so_is_the_token_stream(golden, model, passed, clip):
    _, encoding = passed
    codes = {name: posterior.codes for name, posterior in encoding.items()}
    assert torch.equal(codes["context"].flatten(0, 1), golden["codes_ctx"].long())
    assert torch.equal(codes["dynamics"].flatten(0, 1).flatten(1), golden["codes_dyn"].long())
    tokens = model.tokens(codes)
    assert torch.equal(tokens, golden["tokens"].long())
    back = model.codes_from_tokens(tokens)
    assert all(torch.equal(back[name], codes[name]) for name in codes)
    single = copy.deepcopy(model).float().encode(clip.float())
    assert all(torch.equal(single[name].codes, codes[name]) for name in codes)


def test_codes_alone_decode_to_the_released_reconstruction(golden, model):
    codes = {"context": golden["codes_ctx"].view(2, 2, 16, 16), "dynamics": golden["codes_dyn"].view(2, 4, 4, 4)}
    with torch.no_grad():
        decoded = (model.decode(model.dequantize(codes)) + 1) / 2
    assert relative_error(folded(decoded[:, :, :2]), golden["rec_ctx"]) < 1e-6
    assert relative_error(folded(decoded[:, :, 2:]), golden["rec_fut"]) < 1e-6


def test_released_losses_and_all_gradients_agree(golden, described, model, passed, clip):
    seen, encoding = passed
    terms = {name: posterior.regularization() for name, posterior in encoding.items()}
    losses = {name: (term["commitment"] + term["codebook"]).item() for name, term in terms.items()}
    assert losses["context"] == pytest.approx(described["commit_loss"], rel=1e-6)
    assert losses["dynamics"] == pytest.approx(described["dyn_commit_loss"], rel=1e-6)
    total = encoding.regularization()
    assert sorted(total) == ["codebook", "commitment"]
    assert sum(total.values()).item() == pytest.approx(sum(losses.values()))

    unit = (clip + 1) / 2
    loss = (seen["rec_fut"] - folded(unit[:, :, 2:])).square().mean()
    loss = loss + (seen["rec_ctx"] - folded(unit[:, :, :2])).square().mean() + sum(total.values())
    assert loss.item() == pytest.approx(described["loss_for_grad"], rel=1e-6)
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = dict(zip(names, torch.autograd.grad(loss, parameters, retain_graph=True), strict=True))
    wanted = {name.removeprefix("grad."): tensor for name, tensor in golden.items() if name.startswith("grad.")}
    errors = {name: relative_error(found[name], gradient) for name, gradient in wanted.items()}
    assert len(errors) == 20
    assert {name: error for name, error in errors.items() if not error <= 1e-5} == {}
    norms = described["grad_norms"]
    assert set(norms) == set(found)
    off = {name: (float(found[name].norm()), norm) for name, norm in norms.items()}
    off = {name: pair for name, pair in off.items() if not math.isclose(*pair, rel_tol=1e-5, abs_tol=1e-9)}
    assert off == {}


def test_the_isolated_attention_block_agrees(golden, model):
    block = model.cond_encoder.cross_att_blocks[2]
    out = block(golden["xatt_enc2.q"].double(), golden["xatt_enc2.kv"].double()[0])
    assert relative_error(out, golden["xatt_enc2.out"]) < 1e-6


SIZES = {
    256: {"resolution": 256},
    64: {"resolution": 64, "inner_resolution": 64, "channels": [128, 256, 512], "attention_resolution": 16},
}


@pytest.mark.parametrize("size", SIZES)
def test_names_and_shapes_of_all_weights_are_those_of_the_released_models(shared, size):
    lines = (shared / "golden" / f"ivideogpt_keys_{size}.txt").read_text().splitlines()
    wanted = {name: ast.literal_eval(shape) for name, shape in (line.split("\t") for line in lines)}
    assert len(wanted) == {256: 624, 64: 420}[size]
    model = on_meta(**SIZES[size])
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == wanted
    assert list(model.buffers()) == []


# Sizes and rates.

COUNTS = {
    256: {
        "encoder": 58_693_568,
        "cond_encoder": 66_509_248,
        "cond_encoder.cross_att_blocks": 5_451_776,
        "cond_encoder.mid_block.attentions": 2_363_904,
        "decoder": 87_018_499,
        "cond_decoder": 97_062_403,
        "cond_decoder.cross_att_blocks": 7_680_000,
        "cond_decoder.mid_block.attentions": 2_363_904,
        "quant_conv": 4_160,
        "post_quant_conv": 4_160,
        "quant_linear": 65_600,
        "post_quant_linear": 66_560,
        "quantize": 524_288,
        "dynamics_quantize": 524_288,
        "": 310_472_774,
    },
    64: {
        "encoder": 21_566_912,
        "cond_encoder": 24_525_248,
        "cond_encoder.cross_att_blocks": 1_906_688,
        "cond_encoder.mid_block.attentions": 1_051_648,
        "decoder": 32_190_211,
        "cond_decoder": 34_687_747,
        "cond_decoder.cross_att_blocks": 1_445_888,
        "cond_decoder.mid_block.attentions": 1_051_648,
        "": 114_159_174,
    },
}


@pytest.mark.parametrize("size", SIZES)
def test_each_part_has_the_released_number_of_parameters(size):
    model = on_meta(**SIZES[size])
    counts = {name: sum(p.numel() for p in model.get_submodule(name).parameters()) for name in COUNTS[size]}
    assert counts == COUNTS[size]


@pytest.mark.parametrize(
    ("arguments", "rate", "codes"),
    [
        ({}, 23 / 1176, 736),
        ({"inner_resolution": None, "dynamics_patch_size": 2}, 11 / 384, 2 * 196 + 14 * 49),
        ({"inner_resolution": None, "dynamics_patch_size": 7}, 1 / 84, 2 * 196 + 14 * 4),
    ],
    ids=["256 px inside", "native, patches of 2", "native, patches of 7"],
)
def test_rates_and_bits_of_a_clip_of_224_pixels(arguments, rate, codes):
    model = on_meta(**arguments)
    assert model.compression_rate(CLIP_224) == pytest.approx(rate, rel=1e-12)
    assert model.bits_per_pixel(CLIP_224) == pytest.approx(13 * codes / (16 * 224 * 224), rel=1e-12)


def test_the_rate_against_the_resized_clip_is_that_of_the_paper():
    assert on_meta(resolution=256).compression_rate((3, 16, 256, 256)) == pytest.approx(23 / 1536, rel=1e-12)
    assert on_meta().bits_per_pixel(CLIP_224) == pytest.approx(0.011918, abs=5e-7)


@pytest.mark.parametrize("frames", [3, 5])
@pytest.mark.parametrize(
    "arguments",
    [{}, {"inner_resolution": 24, "dynamics_patch_size": 3, "attention_resolution": 12}, {"context_length": 1}],
)
def test_latents_of_any_longer_clip_have_the_claimed_shapes_and_give_the_clip_back(arguments, frames):
    model, clip = small(**arguments), clip_of(frames)
    with torch.no_grad():
        encoding = model.encode(clip)
        decoded = model.decode(encoding.mode())
    assert decoded.shape == clip.shape
    assert decoded.dtype == torch.float64
    shapes = {name: tuple(latent.shape[1:]) for name, latent in encoding.mode().items()}
    assert shapes == model.latent_shapes(clip.shape[1:])
    codes = {name: (tuple(posterior.codes.shape[1:]), posterior.codebook_size) for name, posterior in encoding.items()}
    assert codes == model.code_shapes(clip.shape[1:])


# The arithmetic, written out.


@pytest.mark.parametrize("context_length", [1, 3])
def test_attention_to_the_context_is_softmax_over_all_its_frames_with_joint_statistics(context_length):
    torch.manual_seed(0)
    batch, future, width, side, heads = 2, 3, 64, 4, 4
    block = ContextAttention(width, side, context_length, 0.1).double().eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(batch * future, width, side, side, dtype=torch.float64)
    context = 2 + torch.randn(batch * context_length, width, side, side, dtype=torch.float64)
    context = context * torch.arange(1, len(context) + 1)[:, None, None, None]  # frames of unlike size

    def normalized(maps, norm):  # a list of maps (C, h, w) whose statistics are joint
        groups = torch.stack(maps).view(len(maps), 32, -1)  # t, group, numbers
        mean, variance = groups.mean((0, 2)), groups.var((0, 2), unbiased=False)
        maps = [((g - mean[:, None]) / (variance[:, None] + 1e-5).sqrt()).view(width, side, side) for g in groups]
        return [m * norm.weight[:, None, None] + norm.bias[:, None, None] for m in maps]

    w_q, w_k, w_v = block.att.in_proj_weight.split(width)
    b_q, b_k, b_v = block.att.in_proj_bias.split(width)
    for m in range(len(x)):
        frames = list(context[m // future * context_length :][:context_length])
        kv = [pixel for frame in normalized(frames, block.kv_norm) for pixel in frame.flatten(1).T]
        kv = torch.stack(kv) + block.kv_pos_emb
        q = normalized([x[m]], block.q_norm)[0].flatten(1).T + block.q_pos_emb
        query, key, value = q @ w_q.T + b_q, kv @ w_k.T + b_k, kv @ w_v.T + b_v
        parts = []
        for head in range(heads):
            part = slice(head * width // heads, (head + 1) * width // heads)
            weight = (query[:, part] @ key[:, part].T / math.sqrt(width / heads)).softmax(1)
            parts.append(weight @ value[:, part])
        y = torch.cat(parts, 1) @ block.att.out_proj.weight.T + block.att.out_proj.bias
        wanted = F.silu(x[m] + y.T.view(width, side, side))
        torch.testing.assert_close(block(x, context)[m], wanted)


def test_patches_run_row_by_row_and_inside_by_row_column_and_channel():
    model = small()
    seen = {}
    model.cond_encoder.register_forward_hook(lambda module, inputs, output: seen.update(map=output))
    model.quant_linear.register_forward_pre_hook(lambda module, inputs: seen.update(patches=inputs[0]))
    model.post_quant_linear.register_forward_hook(lambda module, inputs, output: seen.update(back=output))
    model.cond_decoder.register_forward_pre_hook(lambda module, inputs: seen.update(unfolded=inputs[0]))
    with torch.no_grad():
        model(clip_of(4))
    p, side, channels = 4, 2, 6
    for maps, patches in ((seen["map"], seen["patches"]), (seen["unfolded"], seen["back"])):
        assert patches.shape == (4, side, side, p * p * channels)
        for y in range(side):
            for x in range(side):
                vector = [maps[:, c, y * p + i, x * p + j] for i in range(p) for j in range(p) for c in range(channels)]
                assert torch.equal(patches[:, y, x], torch.stack(vector, 1))


def test_future_frames_do_not_see_each_other_and_the_context_sees_none():
    model, clip = small(), clip_of(6)
    changed = clip.clone()
    changed[:, :, 4] = clip_of(1, seed=2)[:, :, 0]
    with torch.no_grad():
        before, after = model.encode(clip), model.encode(changed)
        decoded, redecoded = model(clip).clip, model(changed).clip
    assert torch.equal(before["context"].codes, after["context"].codes)
    same = (before["dynamics"].codes == after["dynamics"].codes).flatten(2).all(2)
    assert same.tolist() == [[True, True, False, True]] * 2
    same = torch.isclose(decoded, redecoded).transpose(1, 2).flatten(2).all(2)
    assert same.tolist() == [[True, True, True, True, False, True]] * 2


def test_the_context_changes_codes_and_pixels_of_the_future():
    model, clip = small(), clip_of(6)
    changed = clip.clone()
    changed[:, :, 0] = clip_of(1, seed=2)[:, :, 0]
    with torch.no_grad():
        before, after = model.encode(clip), model.encode(changed)
        assert not torch.equal(before["dynamics"].codes, after["dynamics"].codes)
        mixed = model.decode({**before.mode(), "context": after.mode()["context"]})
        assert not torch.allclose(mixed[:, :, 2:], model.decode(before.mode())[:, :, 2:])


def test_the_position_table_holds_the_order_of_context_frames():
    model, clip = small(), clip_of(3)
    flipped = torch.cat([clip[:, :, :2].flip(2), clip[:, :, 2:]], 2)
    with torch.no_grad():
        there, back = (
            model.cond_encoder(folded(c)[2::3], model.encoder(folded(c[:, :, :2]))[1]) for c in (clip, flipped)
        )
        assert not torch.allclose(there, back)
        for block in model.cond_encoder.cross_att_blocks:
            block.kv_pos_emb.zero_()
        there, back = (
            model.cond_encoder(folded(c)[2::3], model.encoder(folded(c[:, :, :2]))[1]) for c in (clip, flipped)
        )
        torch.testing.assert_close(there, back)


def test_the_loss_of_future_frames_trains_all_four_networks():
    model, clip = small().train(), clip_of(4)
    result = model(clip)
    (result.clip[:, :, 2:] - clip[:, :, 2:]).square().mean().backward()
    reached = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert {"encoder", "cond_encoder", "decoder", "cond_decoder", "quant_conv", "quant_linear"} <= reached


@pytest.mark.parametrize("context_mid_attention", [False, True])
def test_every_parameter_gets_a_gradient_and_the_terms_reach_both_codebooks(context_mid_attention):
    model, clip = small(context_mid_attention=context_mid_attention).train(), clip_of(4)
    result = model(clip)
    assert sorted(result.regularization) == ["codebook", "commitment"]
    (result.clip.square().mean() + sum(result.regularization.values())).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert model.quantize.embedding.weight.grad.any()
    assert model.dynamics_quantize.embedding.weight.grad.any()


def test_dropout_acts_in_training_only_and_on_future_frames_only():
    model, clip = small(attention_dropout=0.5), clip_of(4)
    with torch.no_grad():
        assert torch.equal(model(clip).clip, model(clip).clip)
        model.train()
        first, second = model(clip).clip, model(clip).clip
    assert torch.equal(first[:, :, :2], second[:, :, :2])
    assert not torch.allclose(first[:, :, 2:], second[:, :, 2:])


@pytest.mark.parametrize("kept", ["att", "dropout"])
def test_attention_weights_and_their_result_are_dropped(kept):
    torch.manual_seed(0)
    block = ContextAttention(32, 2, 1, 0.5).train()
    if kept == "att":
        block.dropout.p = 0.0
    else:
        block.att.dropout = 0.0
    x, context = torch.randn(2, 1, 32, 2, 2)
    assert not torch.equal(block(x, context), block(x, context))
    block.eval()
    assert torch.equal(block(x, context), block(x, context))


def test_attention_to_the_context_is_dropped_by_a_tenth_unless_stated():
    blocks = [module for module in on_meta().modules() if isinstance(module, ContextAttention)]
    assert {(block.att.dropout, block.dropout.p) for block in blocks} == {(0.1, 0.1)}


@pytest.mark.parametrize(("side", "inner"), [(24, 16), (16, 24)])
def test_clips_are_resized_as_pillow_does_by_bicubic_interpolation(side, inner):
    clip = clip_of(2, side=side).float()
    resized = IVideoGPT._resize(clip, inner)
    for frame, wanted in zip(resized.movedim(2, 1).flatten(0, 2), clip.movedim(2, 1).flatten(0, 2), strict=True):
        picture = Image.fromarray(wanted.numpy()).resize((inner, inner), Image.Resampling.BICUBIC)
        torch.testing.assert_close(frame, torch.tensor(np.asarray(picture)), rtol=1e-4, atol=1e-5)
    assert IVideoGPT._resize(clip.bfloat16(), inner).dtype == torch.float32


def test_recomputing_levels_gives_the_same_gradients():
    clip, gradients = clip_of(4), []
    for recompute in (False, True):
        model = small(activation_checkpointing=recompute, attention_dropout=0.2).train()
        torch.manual_seed(3)
        model(clip).clip.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_values_are_not_clamped():
    model = small()
    with torch.no_grad():
        model.cond_decoder.conv_out.bias.fill_(3.0)
        assert model(clip_of(4)).clip[:, :, 2:].max() > 2


def test_a_clip_in_bf16_autocast_is_encoded_and_decoded():
    torch.manual_seed(0)
    model = IVideoGPT(**{**SMALL, "inner_resolution": 24, "attention_resolution": 12}).train()
    with torch.autocast("cpu", torch.bfloat16):
        result = model(clip_of(4).float())
        loss = result.clip.square().mean() + sum(result.regularization.values())
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# Latents left out, codes, tokens.


def test_a_latent_left_out_is_zeros_in_the_place_of_its_code_vectors():
    model, clip = small(), clip_of(5)
    with torch.no_grad():
        latents = model.encode(clip).mode()
        for name, other in (("context", "dynamics"), ("dynamics", "context")):
            zeros = {name: latents[name], other: torch.zeros_like(latents[other])}
            torch.testing.assert_close(model.decode({name: latents[name]}, 5), model.decode(zeros))
        assert model.decode({"context": latents["context"]}).shape[2] == 2


def test_tokens_are_laid_out_as_in_the_paper_and_go_back():
    model = small()
    codes = {"context": torch.arange(128).view(1, 2, 8, 8) % 16, "dynamics": torch.arange(12).view(1, 3, 2, 2)}
    tokens = model.tokens(codes)
    context, dynamics = codes["context"].flatten(2)[0].tolist(), codes["dynamics"].flatten(2)[0].tolist()
    wanted = [*context[0], 28, *context[1]]
    for frame in dynamics:
        wanted += [29, *(code + 16 for code in frame)]
    assert tokens.tolist() == [wanted]
    back = model.codes_from_tokens(tokens)
    assert all(torch.equal(back[name], codes[name]) for name in codes)
    for broken in (tokens[:, :-1], tokens[:, :20], tokens.flip(1), tokens.where(tokens != 28, 29), tokens[0]):
        with pytest.raises(UserError, match="Expected"):
            model.codes_from_tokens(broken)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ({}, "by the names"),
        ({"latent": torch.zeros(1, 2, 8, 8, dtype=torch.long)}, "by the names"),
        ({"context": torch.zeros(1, 2, 8, 8)}, "integers in 0..15"),
        ({"dynamics": torch.full((1, 2, 2, 2), 12)}, "integers in 0..11"),
        ({"dynamics": torch.full((1, 2, 2, 2), -1)}, "integers in 0..11"),
        ({"context": torch.zeros(2, 8, 8, dtype=torch.long)}, r"context of shape \(B, 2, 8, 8\), got \(2, 8, 8\)"),
        ({"dynamics": torch.zeros(1, 2, 8, 8, dtype=torch.long)}, r"dynamics of shape \(B, N, 2, 2\)"),
    ],
)
def test_wrong_codes_are_refused(codes, message):
    with pytest.raises(UserError, match=message):
        small().dequantize(codes)


def test_a_stream_of_tokens_needs_the_codes_of_both_latents_of_one_batch():
    model = small()
    codes = {name: torch.zeros(2, 2, side, side, dtype=torch.long) for name, side in (("context", 8), ("dynamics", 2))}
    assert model.tokens(codes).shape == (2, 129 + 2 * 5)
    for broken in (
        {"context": codes["context"]},
        {**codes, "dynamics": codes["dynamics"][:1]},
        {name: given[0] for name, given in codes.items()},
        {**codes, "context": codes["context"] + 16},
    ):
        with pytest.raises(UserError, match="Expected"):
            model.tokens(broken)


@pytest.mark.parametrize(
    "latents",
    [
        {"context": torch.zeros(1, 4, 3, 8, 8)},
        {"context": torch.zeros(1, 4, 2, 8, 8)[0]},
        {"dynamics": torch.zeros(1, 4, 2, 8, 8)},
        {"context": torch.zeros(1, 4, 2, 8, 8), "dynamics": torch.zeros(2, 4, 2, 2, 2)},
    ],
)
def test_misshapen_latents_are_refused(latents):
    with pytest.raises(UserError, match="Expected latent"):
        small().decode(latents)


def test_a_clip_without_future_frames_is_refused():
    with pytest.raises(UserError, match="at least 3"):
        small().encode(clip_of(2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inner_resolution": None}, "divides the grid of 14x14, got 4; these do: 1, 2, 7, 14"),
        ({"inner_resolution": 250}, "a multiple of 16, got 250; set inner_resolution=256"),
        ({"channels": []}, "at least one level"),
        ({"channels": [128, 0]}, "channels of at least 1, got 0"),
        ({"context_length": 0}, "context_length of at least 1, got 0"),
        ({"code_size": 0}, "code_size of at least 1, got 0"),
        ({"channels": [128, 144], "norm_groups": 16, "attention_resolution": 128}, "multiples of 32 where"),
        ({"channels": [100, 128]}, "multiples of norm_groups, got 100 and 32"),
        ({"attention_resolution": 15}, "attention_resolution of at least 16, the side of the smallest level, got 15"),
        ({"attention_dropout": 1.0}, r"attention_dropout in \[0, 1\)"),
    ],
)
def test_arguments_that_fit_no_model_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        on_meta(**arguments)


# Files of the released form.

CONFIG = {
    "_class_name": "VQModel",
    "block_out_channels": [32, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "latent_channels": 6,
    "norm_num_groups": 8,
    "num_vq_embeddings": 16,
    "num_dyn_embeddings": 12,
    "context_length": 2,
    "resolution": 16,
    "max_att_resolution": 8,
    "vq_embed_dim": 4,
    "scaling_factor": 0.18215,
}


def written(folder, model, config, rename=lambda name: name):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    state = {rename(name): tensor.float() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "diffusion_pytorch_model.safetensors")
    return folder


def old_names(name):
    for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        name = name.replace(f"attentions.0.{new}", f"attentions.0.{old}")
    return name


@pytest.mark.parametrize("rename", [str, old_names])
def test_a_released_folder_gives_the_same_model_with_the_released_defaults_for_absent_keys(tmp_path, rename):
    wanted = small(context_mid_attention=True).float().eval()  # the released class's default, as is one layer a block
    written(tmp_path / "tokenizer", wanted, CONFIG, rename)
    clip = clip_of(4).float()
    for path in (tmp_path, str(tmp_path / "tokenizer")):
        model = IVideoGPT.from_official(path)
        assert not model.training
        with torch.no_grad():
            assert torch.equal(model(clip).clip, wanted(clip).clip)
    outside = IVideoGPT.from_official(tmp_path, resolution=20, activation_checkpointing=True)
    assert (outside.resolution, outside.inner_resolution) == (20, 16)
    assert outside.init_args["activation_checkpointing"] is True


def test_a_file_of_another_size_or_kind_is_refused_by_name(tmp_path):
    model = small(context_mid_attention=True)
    folder = written(tmp_path / "more", model, {**CONFIG, "num_vq_embeddings": 17})
    with pytest.raises(UserError, match=r"quantize\.embedding\.weight is \(16, 4\), expected \(17, 4\)"):
        IVideoGPT.from_official(folder)
    folder = written(tmp_path / "without", small(), CONFIG)
    with pytest.raises(UserError, match=r"missing encoder\.mid_block\.attentions\.0"):
        IVideoGPT.from_official(folder)
    for key, value in {
        "norm_type": "spatial",
        "act_fn": "gelu",
        "in_channels": 4,
        "down_block_types": ["Down"],
    }.items():
        with pytest.raises(UserError, match=f"Expected {key}"):
            IVideoGPT.from_official(written(tmp_path / key, model, {**CONFIG, key: value}))
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="Expected a config of a released tokenizer"):
        IVideoGPT.from_official(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"Expected a folder with config\.json"):
        IVideoGPT.from_official(folder)
    (written(tmp_path / "empty", model, CONFIG) / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="Expected a file of weights"):
        IVideoGPT.from_official(tmp_path / "empty")
