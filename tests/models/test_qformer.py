"""The Q-Former's dropout: on the queries, on each residual, and on the probabilities of each attention."""

import pytest
import torch
from torch import nn

from vidtwin.layers.attention import CrossAttention, SelfAttention
from vidtwin.models.qformer import QFormer, QFormerLayer


@pytest.fixture
def layer():
    torch.manual_seed(0)
    layer = QFormerLayer(8, 2, 16, 6, dropout=0.5)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer.train()


@pytest.fixture
def inputs():
    return torch.randn(2, 3, 8), torch.randn(2, 5, 6)


def test_attentions_and_mlp_are_dropped_as_residuals(layer, inputs):
    layer.dropout.p = 1.0
    layer.self_attention.dropout = layer.cross_attention.dropout = 0.0
    wanted = layer.mlp_norm(layer.cross_norm(layer.self_norm(inputs[0])))
    torch.testing.assert_close(layer(*inputs), wanted)


@pytest.mark.parametrize("dropped", ["self_attention", "cross_attention"])
def test_an_attentions_probabilities_are_dropped_in_training(layer, inputs, dropped):
    layer.dropout.p = 0.0
    (other,) = {"self_attention", "cross_attention"} - {dropped}
    getattr(layer, other).dropout = 0.0
    assert not torch.equal(layer(*inputs), layer(*inputs))
    layer.eval()
    assert torch.equal(layer(*inputs), layer(*inputs))


def test_the_given_dropout_reaches_every_layer():
    modules = list(QFormer(2, 8, 6, depth=2, num_heads=2, intermediate_size=16, dropout=0.3).modules())
    assert {module.p for module in modules if isinstance(module, nn.Dropout)} == {0.3}
    assert {module.dropout for module in modules if isinstance(module, SelfAttention | CrossAttention)} == {0.3}


def test_the_queries_are_dropped_in_training():
    former = QFormer(2, 8, 6, depth=1, num_heads=2, intermediate_size=16, dropout=0.0).train()
    former.dropout.p = 1.0
    context = torch.randn(3, 5, 6)
    without = former(context)
    former.queries.data.normal_()
    assert torch.equal(former(context), without)
    assert not torch.equal(former.eval()(context), without)
