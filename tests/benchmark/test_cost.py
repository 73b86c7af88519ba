"""FLOPs and memory against arithmetic by hand; content of a measurement, and what it leaves unchanged."""

import copy
import json
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from vidtwin.autoencoder import VideoAutoencoder
from vidtwin.benchmark import cost
from vidtwin.benchmark.cost import flops
from vidtwin.benchmark.memory import TensorMemory
from vidtwin.errors import UserError
from vidtwin.layers.attention import SelfAttention
from vidtwin.posteriors import Deterministic, Encoding


class Small(VideoAutoencoder):
    """Patches of 4 px, attention over all of them by our layer and by torch's, and back."""

    latent_names = ("tokens",)

    def __init__(self):
        super().__init__()
        self.down = nn.Conv3d(3, 8, (1, 4, 4), stride=(1, 4, 4))
        self.ours = SelfAttention(8, 2)
        self.torchs = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up = nn.ConvTranspose3d(8, 3, (1, 4, 4), stride=(1, 4, 4))

    def _encode(self, clip):
        tokens = self.ours(self.down(clip).flatten(2).mT)
        return Encoding(tokens=Deterministic(self.torchs(tokens, tokens, tokens, need_weights=False)[0]))

    def _decode(self, latents):
        return self.up(latents["tokens"].mT.unflatten(2, (2, 4, 4)))

    def _latent_shapes(self, clip_shape):
        return {"tokens": (clip_shape[1] * clip_shape[2] * clip_shape[3] // 16, 8)}

    @property
    def last_layer(self):
        return self.up.weight


def test_products_convolutions_and_both_kinds_of_attention_are_counted_and_the_model_stays_as_it_is():
    model = Small().train()
    tokens, patch = 2 * 4 * 4, 3 * 4 * 4
    patches = 2 * tokens * patch * 8
    projections = 2 * tokens * 8 * (3 * 8 + 8)
    scores_and_mixture = 2 * 2 * tokens * tokens * 8
    counts = flops(model, (3, 2, 16, 16))
    assert counts == {"encode": patches + 2 * (projections + scores_and_mixture), "decode": patches}
    assert model.training
    assert next(model.parameters()).device == torch.device("cpu")


class Flat(VideoAutoencoder):
    """96 numbers of a clip to 4 by one product, and back by another."""

    latent_names = ("numbers",)

    def __init__(self):
        super().__init__()
        self.down = nn.Linear(96, 4, bias=False)
        self.up = nn.Linear(4, 96, bias=False)
        self.rest = nn.Dropout().eval()

    def _encode(self, clip):
        return Encoding(numbers=Deterministic(self.down(clip.flatten(1))))

    def _decode(self, latents):
        return self.up(latents["numbers"]).unflatten(1, (3, 2, 4, 4))

    def _latent_shapes(self, clip_shape):
        return {"numbers": (4,)}

    @property
    def last_layer(self):
        return self.up.weight


FLAT = (3, 2, 4, 4)
WEIGHTS = 2 * 4 * 96 * 4  # bytes


def test_a_measurement_has_the_keys_of_results_json():
    found = cost.measure(Flat(), FLAT, "cpu", warmup=1, repeats=3, batch_size=2)
    keys = "flops encode decode batch_size warmup repeats memory_counter device"
    assert list(found) == keys.split()
    for part in ("encode", "decode"):
        assert list(found[part]) == ["clips_per_second", "peak_memory_bytes"]
        speed = found[part]["clips_per_second"]
        assert 0 < speed["min"] <= speed["median"] <= speed["max"]
    assert (found["batch_size"], found["warmup"], found["repeats"], found["memory_counter"]) == (2, 1, 3, "tensors")
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("batch", [1, 3])
def test_peak_memory_has_the_weights_what_goes_in_and_what_comes_out(batch):
    found = cost.measure(Flat(), FLAT, "cpu", batch_size=batch)
    assert found["encode"]["peak_memory_bytes"] == WEIGHTS + batch * (96 + 4) * 4
    assert found["decode"]["peak_memory_bytes"] == WEIGHTS + batch * (4 + 96) * 4
    assert found["flops"] == {"encode": 2 * 96 * 4, "decode": 2 * 96 * 4}  # of one clip


def test_measuring_leaves_weights_modes_and_random_numbers_as_they_were():
    model = Flat().train()
    model.rest.eval()
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    state = torch.get_rng_state()
    cost.measure(model, FLAT, "cpu")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_each_timed_pass_runs_once_in_evaluation_in_the_precision_and_without_the_counter_of_memory():
    seen = []

    class Watched(Flat):
        def _encode(self, clip):
            if not clip.is_meta:
                counting = any(isinstance(mode, TensorMemory) for mode in _get_current_dispatch_mode_stack())
                seen.append((self.training, torch.is_autocast_enabled("cpu"), counting))
            return super()._encode(clip)

    precision = partial(torch.autocast, "cpu", torch.bfloat16)
    found = cost.measure(Watched(), FLAT, "cpu", precision, warmup=1, repeats=2)
    assert seen == [(False, True, False)] * 4 + [(False, True, True)]  # one makes the latents for decoding
    assert found["flops"]["encode"] == 2 * 96 * 4


def test_a_model_of_half_precision_gets_clips_of_its_own():
    found = cost.measure(Flat().bfloat16(), FLAT, "cpu")
    assert found["encode"]["peak_memory_bytes"] == (WEIGHTS + (96 + 4) * 4) // 2


def test_a_model_that_takes_a_clip_in_windows_is_measured_on_all_of_them():
    class Windows:
        def __init__(self, model):
            self.model = model

        def encode(self, clip):
            return self.model.encode(torch.cat(clip.split(2, dim=2)))

        def decode(self, latents, num_frames):
            return torch.cat(self.model.decode(latents, 2).split(1), dim=2)[:, :, :num_frames]

    found = cost.measure(Flat(), (3, 4, 4, 4), "cpu", wrap=Windows)
    assert found["flops"] == {"encode": 2 * 2 * 96 * 4, "decode": 2 * 2 * 96 * 4}
    # Two clips of 96 numbers, and again as one.
    assert found["decode"]["peak_memory_bytes"] == WEIGHTS + 2 * (4 + 96 + 96) * 4


def test_no_weight_is_copied_for_the_count_of_flops():
    model = Flat()
    with TensorMemory(torch.device("cpu")) as memory:
        flops(model, FLAT)
    assert memory.peak == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"batch_size": 0}, "batch_size of at least 1, got 0"),
        ({"warmup": -1}, "warmup of at least 0, got -1"),
        ({"repeats": 0}, "repeats of at least 1, got 0"),
        ({"device": "meta"}, "a model on meta, got weights on cpu"),
        ({"clip_shape": (1, 2, 4, 4)}, "Expected a float clip of shape"),
    ],
)
def test_wrong_arguments_are_refused(arguments, words):
    with pytest.raises(UserError, match=words):
        cost.measure(Flat(), **({"clip_shape": FLAT, "device": "cpu"} | arguments))


def test_the_flops_of_a_model_that_asks_for_values_are_refused_with_the_reason():
    class Asking(Flat):
        def _encode(self, clip):
            return super()._encode(clip if clip.sum().item() else clip + 1)

    with pytest.raises(UserError, match="Expected Asking to run on the meta device"):
        cost.measure(Asking(), FLAT, "cpu")


def test_out_of_memory_is_reported_and_the_model_is_as_it_was():
    class Large(Flat):
        def _decode(self, latents):
            if latents["numbers"].is_meta:
                return super()._decode(latents)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")

    model = Large().train()
    with pytest.raises(UserError, match=r"for 2 clips of \(3, 2, 4, 4\) at a time through Large, .* 3.00 GiB more"):
        cost.measure(model, FLAT, "cpu", batch_size=2)
    assert model.training


def test_a_device_is_named_by_its_hardware():
    name = cost.device_name("cpu")
    assert name.startswith("cpu (")
    assert len(name) > len("cpu ()")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_cuda_memory_is_the_allocators_and_holds_the_weights():
    found = cost.measure(Flat().cuda(), FLAT, "cuda")
    assert found["memory_counter"] == "CUDA allocator"
    assert found["device"] == torch.cuda.get_device_name()
    for part in ("encode", "decode"):
        assert WEIGHTS + (96 + 4) * 4 <= found[part]["peak_memory_bytes"] < WEIGHTS + 2**20
