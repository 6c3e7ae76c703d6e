"""One tensor-parallel shard of a Llama on one device.

The kernels of an iteration, with random weights.

The work of one GPU of a TP group: all projections, attention with grouped queries over a KV cache,
MLP, norms, LM head. What a single GPU cannot have is missing: the all-reduces between GPUs, and the
engine's host work.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as functional

from biscale_env.config import Llm
from biscale_env.core.errors import BiscaleError

NORM_EPS = 1e-5  # Llama 3 config


@dataclass(frozen=True)
class ShardShape:
    """Shapes of one shard.

    Attributes:
        layers: transformer layers that are run.
        hidden: model width.
        heads: query heads of this shard.
        kv_heads: KV heads of this shard.
        head_dim: width of a head.
        intermediate: MLP width of this shard.
        vocabulary: LM head rows of this shard.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int

    @classmethod
    def of(cls, llm: Llm, tp: int, layers: int | None = None) -> "ShardShape":
        """Shard of a model at a tensor parallel degree.

        Raises:
            BiscaleError: the heads do not divide.
        """
        if llm.heads % tp or llm.kv_heads % tp or llm.intermediate % tp:
            raise BiscaleError(
                f"{llm.name} cannot be split over TP {tp}: "
                f"its {llm.kv_heads} KV heads do not divide"
            )
        return cls(
            layers=layers or llm.layers,
            hidden=llm.hidden,
            heads=llm.heads // tp,
            kv_heads=llm.kv_heads // tp,
            head_dim=llm.head_dim,
            intermediate=llm.intermediate // tp,
            vocabulary=llm.vocabulary // tp,
        )

    @property
    def weight_count(self) -> int:
        """Numbers in all weights."""
        qkv = self.hidden * (self.heads + 2 * self.kv_heads) * self.head_dim
        rest = self.heads * self.head_dim * self.hidden + 3 * self.hidden * self.intermediate
        return self.layers * (qkv + rest) + self.vocabulary * self.hidden


class Shard:
    """Weights and the two kinds of iteration."""

    def __init__(
        self, shape: ShardShape, device: str, dtype: torch.dtype = torch.bfloat16, seed: int = 0
    ) -> None:
        """Make random weights, small enough that activations stay finite."""
        self.shape, self.device, self.dtype = shape, device, dtype
        generator = torch.Generator(device=device).manual_seed(seed)

        def weight(rows: int, columns: int) -> torch.Tensor:
            return torch.empty(rows, columns, device=device, dtype=dtype).normal_(
                0.0, columns**-0.5, generator=generator
            )

        s = shape
        self.layers = [
            (
                weight((s.heads + 2 * s.kv_heads) * s.head_dim, s.hidden),
                weight(s.hidden, s.heads * s.head_dim),
                weight(2 * s.intermediate, s.hidden),
                weight(s.hidden, s.intermediate),
            )
            for _ in range(s.layers)
        ]
        self.head = weight(s.vocabulary, s.hidden)
        self.norm = torch.ones(s.hidden, device=device, dtype=dtype)

    def cache(
        self, batch: int, length: int, count: int | None = None
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """KV caches (batch, kv_heads, length, head_dim).

        One per layer, or ``count`` of them that the layers use in turn.
        """
        s = self.shape
        size = (batch, s.kv_heads, length, s.head_dim)
        return [
            (
                torch.randn(size, device=self.device).to(self.dtype),
                torch.randn(size, device=self.device).to(self.dtype),
            )
            for _ in range(count or s.layers)
        ]

    def iteration(
        self,
        x: torch.Tensor,
        batch: int,
        caches: list[tuple[torch.Tensor, torch.Tensor]],
        prefix: int,
    ) -> torch.Tensor:
        """Run all layers on sequences of equal length.

        Args:
            x: activations (batch * new tokens, hidden).
            batch: sequences.
            caches: KV caches that hold ``prefix`` tokens and have room for the new ones.
            prefix: tokens in the cache before this iteration.

        Returns:
            Logits of the last token of each sequence, (batch, vocabulary).
        """
        new = x.shape[0] // batch
        for k, (qkv, out, up, down) in enumerate(self.layers):
            keys, values = caches[k % len(caches)]
            normed = functional.rms_norm(x, (self.shape.hidden,), self.norm, NORM_EPS)
            x = x + self._attention(normed @ qkv.T, batch, new, keys, values, prefix) @ out.T
            gate, raised = (
                functional.rms_norm(x, (self.shape.hidden,), self.norm, NORM_EPS) @ up.T
            ).chunk(2, dim=-1)
            x = x + (functional.silu(gate) * raised) @ down.T
        last = x.view(batch, new, -1)[:, -1]
        return functional.rms_norm(last, (self.shape.hidden,), self.norm, NORM_EPS) @ self.head.T

    def _attention(
        self,
        qkv: torch.Tensor,
        batch: int,
        new: int,
        keys: torch.Tensor,
        values: torch.Tensor,
        prefix: int,
    ) -> torch.Tensor:
        s = self.shape
        q, k, v = (
            qkv.view(batch, new, s.heads + 2 * s.kv_heads, s.head_dim)
            .transpose(1, 2)
            .split([s.heads, s.kv_heads, s.kv_heads], dim=1)
        )
        keys[:, :, prefix : prefix + new] = k
        values[:, :, prefix : prefix + new] = v
        seen = slice(0, prefix + new)
        mask: Any = None
        if new > 1 and prefix:
            mask = torch.ones(new, prefix + new, device=q.device, dtype=torch.bool).tril(prefix)
        attended = functional.scaled_dot_product_attention(
            q,
            keys[:, :, seen],
            values[:, :, seen],
            attn_mask=mask,
            is_causal=new > 1 and not prefix,
            enable_gqa=s.heads != s.kv_heads,
        )
        return attended.transpose(1, 2).reshape(batch * new, s.heads * s.head_dim)
