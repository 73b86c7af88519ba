"""FLOPs against arithmetic by hand."""

import torch
from torch import nn

from vidtwin.autoencoder import VideoAutoencoder
from vidtwin.benchmark.cost import flops
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
