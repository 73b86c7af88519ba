"""Multi-head attention over one axis of a grid of tokens."""

from torch import Tensor, nn
from torch.nn import functional as F

from vidtwin.errors import UserError


class SelfAttention(nn.Module):
    """Multi-head self-attention with fused query, key and value projections.

    The leading axes are the batch, so a grid (B, T, S, C) attends over S as it is, and over T once transposed.

    Args:
        hidden_size: C, divisible by `num_heads`.
        num_heads: Number of heads.
        causal: Let each token attend only to itself and to earlier tokens.
        dropout: Dropout of the attention probabilities in training.
    """

    def __init__(self, hidden_size: int, num_heads: int, causal: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise UserError(
                f"Expected a hidden size divisible by the number of heads, got {hidden_size} and {num_heads}."
            )
        self.num_heads = num_heads
        self.causal = causal
        self.dropout = dropout
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over N: (..., N, C) → (..., N, C)."""
        # Chunks, not an axis of 3: its gradient would be stacked and copied once more.
        projected = self.qkv(x).flatten(0, -3).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in projected)
        dropout = self.dropout if self.training else 0.0
        x_heads = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=self.causal)
        return self.proj(x_heads.transpose(1, 2).reshape(x.shape))


class CrossAttention(nn.Module):
    """Multi-head attention of queries (N, Q, C) to a context (N, M, D), with fused keys and values.

    Args:
        hidden_size: C, divisible by `num_heads`.
        context_size: D.
        num_heads: Number of heads.
        dropout: Dropout of the attention probabilities in training.
    """

    def __init__(self, hidden_size: int, context_size: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise UserError(
                f"Expected a hidden size divisible by the number of heads, got {hidden_size} and {num_heads}."
            )
        self.num_heads = num_heads
        self.dropout = dropout
        self.q = nn.Linear(hidden_size, hidden_size)
        self.kv = nn.Linear(context_size, 2 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Attend to the context: (N, Q, C), (N, M, D) → (N, Q, C)."""
        q = self.q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in self.kv(context).chunk(2, -1))
        dropout = self.dropout if self.training else 0.0
        return self.proj(F.scaled_dot_product_attention(q, k, v, dropout_p=dropout).transpose(1, 2).flatten(-2))
