"""The conditioning adapter: small networks between SDXL's text encoders and its UNet."""

from __future__ import annotations

from collections.abc import Sequence

from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import Tensor, nn


class ConditioningAdapter(ModelMixin, ConfigMixin):
    """Small networks that bring the states of replaced text encoders to where SDXL's UNet knows them.

    Each text encoder's penultimate states, token by token, and the pooled vector have a residual of their own,
    LayerNorm → Linear → GELU → Linear. The last layer starts at zero, so a new adapter is exactly the identity.
    `training/align_adapter.py` trains one; in a pipeline it is the component `conditioning_adapter`.

    Args:
        state_dims: width of each text encoder's states, (768, 1280) in SDXL.
        pooled_dim: width of the pooled vector, 1280 in SDXL.
        hidden_dim: width of the hidden layers.

    Raises:
        ValueError: a width is no whole number of at least 1, or `state_dims` is empty.

    Examples:
        >>> import torch
        >>> adapter = ConditioningAdapter(state_dims=(8, 16), pooled_dim=16, hidden_dim=4)
        >>> states, pooled = adapter([torch.randn(2, 77, 8), torch.randn(2, 77, 16)], torch.randn(2, 16))
        >>> [part.shape for part in states], pooled.shape
        ([torch.Size([2, 77, 8]), torch.Size([2, 77, 16])], torch.Size([2, 16]))
    """

    @register_to_config  # type: ignore[untyped-decorator]  # Diffusers has no types for it
    def __init__(self, state_dims: Sequence[int] = (768, 1280), pooled_dim: int = 1280, hidden_dim: int = 512) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # Diffusers has no types for it
        widths = [*state_dims, pooled_dim, hidden_dim] if isinstance(state_dims, list | tuple) and state_dims else [0]
        if not all(isinstance(width, int) and not isinstance(width, bool) and width >= 1 for width in widths):
            raise ValueError(
                f"ConditioningAdapter got state_dims={state_dims!r}, pooled_dim={pooled_dim!r} and "
                f"hidden_dim={hidden_dim!r}; expected whole numbers of at least 1, and one or more state_dims."
            )
        self.states = nn.ModuleList(_residual(dim, hidden_dim) for dim in state_dims)
        self.pooled = _residual(pooled_dim, hidden_dim)

    def forward(
        self, states: Sequence[Tensor | None], pooled: Tensor | None, scale: float = 1.0
    ) -> tuple[list[Tensor | None], Tensor | None]:
        """Adapt the states and the pooled vector of the text encoders.

        Args:
            states: states of each text encoder, (batch, tokens, dim); None for an encoder to leave out.
            pooled: (batch, pooled dim); None to leave it out.
            scale: factor of the residuals, from 0 (no change) to 1.

        Returns:
            States and pooled vector of the same shapes, None where None was passed.

        Raises:
            ValueError: the number of states is not the number of text encoders, or a width differs.
        """
        parts, residuals = [*states, pooled], [*self.states, self.pooled]
        if len(parts) != len(self.widths) or any(
            part is not None and part.shape[-1] != dim for part, dim in zip(parts, self.widths, strict=True)
        ):
            found = ", ".join("–" if part is None else str(part.shape[-1]) for part in parts)
            raise self.mismatch(f"got {found}")
        adapted = [
            None if part is None else part + scale * residual(part.to(self.dtype)).to(part.dtype)
            for part, residual in zip(parts, residuals, strict=True)
        ]
        return adapted[:-1], adapted[-1]

    @property
    def widths(self) -> list[int]:
        """The width of each text encoder's states, and last the width of the pooled vector."""
        return [*self.config["state_dims"], self.config["pooled_dim"]]

    def mismatch(self, found: str) -> ValueError:
        """The error for widths other than the adapter's own."""
        return ValueError(
            "The conditioning adapter takes states and a pooled vector of widths "
            f"{', '.join(map(str, self.widths))}, but {found}: use it with the SDXL that it was trained on."
        )


def _residual(dim: int, hidden_dim: int) -> nn.Sequential:
    last = nn.Linear(hidden_dim, dim)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, hidden_dim), nn.GELU(), last)
