"""Adaptive token refinement (ATRM): many tokens become few, each a weighted mean of all (FineLIP, section 3)."""

import torch
from torch import Tensor, nn


class TokenRefinement(nn.Module):
    """One aggregator of adaptive token refinement; FineLIP has one for images and one for texts.

    Tokens X, (N, C), become A · X, (K, C), with A = softmax over the N tokens of (s · W(X))ᵀ. W is LayerNorm(C) →
    Linear(C, ⌊0.2 · C⌋) → GELU → Linear(⌊0.2 · C⌋, K), and s a learned scale that starts at 1. Parameters have the
    published names: `weight.0.*` (LayerNorm), `weight.1.*`, `weight.3.*` (linear layers), `scale`.

    Source: FineLIP (arXiv 2504.01916), section 3.

    Args:
        dim: width C of a token, at least 5.
        num_tokens: number K of refined tokens.

    Raises:
        ValueError: `dim` or `num_tokens` is too small.

    Examples:
        >>> refine = TokenRefinement(dim=64, num_tokens=3)
        >>> refine(torch.randn(2, 16, 64)).shape
        torch.Size([2, 3, 64])
    """

    def __init__(self, dim: int, num_tokens: int) -> None:
        super().__init__()
        hidden = int(dim * 0.2)
        if hidden < 1 or num_tokens < 1:
            raise ValueError(
                f"TokenRefinement got dim={dim} and num_tokens={num_tokens}; expected a dim of at least 5 (the hidden "
                "width is a fifth of it) and at least one token."
            )
        self.weight = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, num_tokens))
        self.scale = nn.Parameter(torch.ones(1, 1, 1))

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Refines tokens.

        Args:
            tokens: (batch, tokens, dim), with at least one token.
            mask: (batch, tokens), True where a token counts, at least once in each row. None if all count.

        Returns:
            (batch, num_tokens, dim), in the dtype of `tokens`.

        Raises:
            ValueError: `mask` has another shape, or a row without any token.
        """
        logits = self.weight(tokens) * self.scale  # (batch, tokens, num_tokens)
        if mask is not None:
            if mask.shape != tokens.shape[:2]:
                raise ValueError(f"mask is {tuple(mask.shape)}; expected {tuple(tokens.shape[:2])}, as the tokens.")
            if not mask.any(dim=1).all():
                raise ValueError("mask has a row without any token; expected at least one in each.")
            logits = logits.masked_fill(~mask.bool()[..., None], float("-inf"))
        shares: Tensor = logits.softmax(dim=1).to(tokens.dtype)
        return shares.mT @ tokens
