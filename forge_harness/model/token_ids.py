"""What a language model takes: token ids, one sequence a row."""

from __future__ import annotations

from torch import Tensor


def check_tokens(tokens: Tensor) -> None:
    """Raises ValueError unless `tokens` are a matrix (B, T)."""
    if tokens.dim() != 2:
        raise ValueError(
            f"tokens have shape {tuple(tokens.shape)}; expected (B, T): a sequence alone is "
            "tokens[None]."
        )
