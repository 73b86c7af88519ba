"""The Q-Former: learned queries attend to a sequence (BLIP-2; in the paper's section 3.2, the T frames of a position).

    queries (Q, C) ─ norm ─ depth × [self-attention ─ (every `cross_every`-th layer) cross-attention ─ MLP] ─> (N, Q, C)

A post-norm BERT: each step is x = norm(x + dropout(step(x))).
"""

import torch
from torch import Tensor, nn

from vidtwin.layers.attention import CrossAttention, SelfAttention


class QFormerLayer(nn.Module):
    """One post-norm layer; with cross-attention if `context_size` is given."""

    def __init__(
        self, hidden_size: int, num_heads: int, intermediate_size: int, context_size: int | None, dropout: float
    ) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.self_attention = SelfAttention(hidden_size, num_heads, dropout=dropout)
        self.self_norm = nn.LayerNorm(hidden_size, eps=1e-12)
        self.cross_attention: CrossAttention | None = None
        if context_size is not None:
            self.cross_attention = CrossAttention(hidden_size, context_size, num_heads, dropout)
            self.cross_norm = nn.LayerNorm(hidden_size, eps=1e-12)
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, intermediate_size), nn.GELU(), nn.Linear(intermediate_size, hidden_size)
        )
        self.mlp_norm = nn.LayerNorm(hidden_size, eps=1e-12)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = self.self_norm(x + self.dropout(self.self_attention(x)))
        if self.cross_attention is not None:
            x = x.expand(context.shape[0], -1, -1)
            x = self.cross_norm(x + self.dropout(self.cross_attention(x, context)))
        return self.mlp_norm(x + self.dropout(self.mlp(x)))


class QFormer(nn.Module):
    """Summary of sequences of any length by a fixed number of queries.

    Args:
        num_queries: Q (paper: n_q).
        hidden_size: C, width of the queries.
        context_size: D, width of the sequence.
        depth: Number of layers.
        num_heads: Heads of both attentions.
        intermediate_size: Width of the MLP.
        cross_every: Layers 0, cross_every, 2·cross_every, ... attend to the sequence; the others only mix the queries.
        dropout: Dropout of hidden values and attention probabilities in training.
    """

    def __init__(
        self,
        num_queries: int,
        hidden_size: int,
        context_size: int,
        depth: int = 6,
        num_heads: int = 8,
        intermediate_size: int = 768,
        cross_every: int = 2,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(num_queries, hidden_size))
        self.norm = nn.LayerNorm(hidden_size, eps=1e-12)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            QFormerLayer(
                hidden_size, num_heads, intermediate_size, None if index % cross_every else context_size, dropout
            )
            for index in range(depth)
        )

    @torch.no_grad()
    def initialize(self) -> None:
        """Scale the cross-attentions for training from scratch, so that their output is as large as the queries.

        BERT's N(0, 0.02) suits large pretrained models. Here the attended values would be a few per cent of the
        queries, and the norm after the residual would shrink them further.
        """
        for layer in self.layers:
            if isinstance(layer, QFormerLayer) and layer.cross_attention is not None:
                for linear in (layer.cross_attention.q, layer.cross_attention.kv, layer.cross_attention.proj):
                    nn.init.normal_(linear.weight, std=linear.in_features**-0.5)

    def forward(self, context: Tensor) -> Tensor:
        """Summarize (N, M, D) as (N, Q, C)."""
        x = self.norm(self.queries)[None]
        # Until the first cross-attention all N rows are the same, so without dropout they are computed once.
        if self.training and self.dropout.p > 0:
            x = self.dropout(x.expand(context.shape[0], -1, -1))
        for layer in self.layers:
            x = layer(x, context)
        return x
