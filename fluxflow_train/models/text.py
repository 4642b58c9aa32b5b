"""Captions to the condition of the flow: a backbone's hidden states, then a trainable projection.

Legend: B batch, S text tokens, W backbone width, H hidden width, E condition width. A mask is True at valid tokens.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from fluxflow_train.errors import UserError
from fluxflow_train.models.activations import arm
from fluxflow_train.models.bezier_curve import widen
from fluxflow_train.models.layers import unit_variance_

MAX_TOKENS = 512
TOKENS_AT_ONCE = 256  # in one forward of `Backbone.encode`: a single prompt fills them too, so not more


class TextFeatures(NamedTuple):
    """tokens (B, S, E), zero where not valid; mask (B, S) bool; pooled (B, E)."""

    tokens: Tensor
    mask: Tensor
    pooled: Tensor


class Backbone(nn.Module, ABC):
    """Captions to hidden states of `width` W, of at most `max_tokens` tokens."""

    anchor: Tensor

    def __init__(self, width: int, max_tokens: int) -> None:
        super().__init__()
        self.width = width
        self.max_tokens = max_tokens
        # Empty: says which device the module was moved to, also where it has no parameters of its own.
        self.register_buffer("anchor", torch.empty(0), persistent=False)

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """sha256 (hex) over all that the hidden states depend on and that a checkpoint does not hold.

        So the weights are in it where they are frozen, and are not where they are trained.
        """

    @property
    def frozen(self) -> bool:
        """Whether hidden states stay what they are, so that they may be cached."""
        return not any(p.requires_grad for p in self.parameters())

    @abstractmethod
    def token_ids(self, caption: str) -> list[int]:
        """2 to `max_tokens` ids with the marks of start and end; a longer caption is cut."""

    @abstractmethod
    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids int64 (B, S), mask (B, S) to hidden states (B, S, W); those where the mask is False mean nothing."""

    def tokenize(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """ids int64 (B, S), mask (B, S) on the backbone's device, padded to the longest of `captions`."""
        # A lone surrogate (a prompt that was typed in another encoding) has no UTF-8 form.
        rows = [self.token_ids(caption.encode("utf-8", "replace").decode()) for caption in captions]
        ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
        return ids.to(self.anchor.device), mask.to(self.anchor.device)

    def encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """hidden (B, S, W), zero where not valid, and mask (B, S): a caption's values don't depend on its company.

        A matrix product rounds differently at another shape. So captions run with others of their own length only, in
        batches whose shape is a function of that length, the last one filled up.
        """
        ids, mask = self.tokenize(captions)
        lengths = mask.sum(1).tolist()
        hidden = torch.zeros(*ids.shape, self.width, device=ids.device)
        for length in sorted(set(lengths)):
            rows = [row for row, other in enumerate(lengths) if other == length]
            size = max(1, TOKENS_AT_ONCE // length)
            for first in range(0, len(rows), size):
                chosen = rows[first : first + size]
                filled = ids[chosen + chosen[:1] * (size - len(chosen)), :length]
                hidden[chosen, :length] = self(filled, torch.ones_like(filled, dtype=torch.bool))[: len(chosen)].float()
        return hidden, mask


class TextEncoder(nn.Module):
    """Backbone -> LayerNorm -> Linear -> activation -> Linear per token; pooled = LayerNorm of their masked mean.

    Without a caption a learned token and a learned pooled vector stand in, together with a mask of one token.
    """

    def __init__(self, backbone: Backbone, width: int, hidden: int, activation: str) -> None:
        """`width` E of the condition, `hidden` H between the two linear layers."""
        super().__init__()
        function = arm(activation, hidden, dim=-1)
        self.backbone = backbone
        self.width = width
        self.projection = nn.Sequential(
            nn.LayerNorm(backbone.width),
            nn.Linear(backbone.width, hidden * function.expansion),  # type: ignore[operator]
            function,
            nn.Linear(hidden, width),
        )
        self.pooled_norm = nn.LayerNorm(width)
        self.null_token = nn.Parameter(torch.randn(width))
        self.null_pooled = nn.Parameter(torch.randn(width))
        unit_variance_(self.projection)

    def forward(self, hidden: Tensor, mask: Tensor) -> TextFeatures:
        """hidden (B, S, W), mask (B, S), as of `backbone` or of a cache."""
        valid = mask[..., None]
        tokens = self.projection(hidden).masked_fill(~valid, 0)
        return TextFeatures(tokens, mask, self.pooled_norm(widen(tokens).sum(1) / valid.sum(1)))

    def null(self, batch_size: int, num_tokens: int) -> TextFeatures:
        """The learned condition of no caption: one valid token, padded to `num_tokens`."""
        mask = torch.arange(num_tokens, device=self.null_token.device).expand(batch_size, -1) == 0
        pooled = self.null_pooled.expand(batch_size, -1).clone()  # no view: FSDP lets go of the parameter
        return TextFeatures(mask[..., None] * self.null_token, mask, pooled)

    def drop(self, features: TextFeatures, dropped: Tensor) -> TextFeatures:
        """`features` with tokens, mask and pooled vector of the null condition together where `dropped` (B,)."""
        null = self.null(*features.mask.shape)
        return TextFeatures(
            torch.where(dropped[:, None, None], null.tokens.to(features.tokens.dtype), features.tokens),
            torch.where(dropped[:, None], null.mask, features.mask),
            torch.where(dropped[:, None], null.pooled.to(features.pooled.dtype), features.pooled),
        )

    def encode(self, captions: list[str]) -> TextFeatures:
        """Features of captions as typed, padded to the longest: the route of prompts.

        Each runs through the projection alone, so that they don't depend on their company (see `Backbone.encode`).
        """
        hidden, mask = self.backbone.encode(captions)
        each = [self(hidden[i, None, :n], mask[i, None, :n]) for i, n in enumerate(mask.sum(1).tolist())]
        tokens = pad_sequence([features.tokens[0] for features in each], batch_first=True)
        return TextFeatures(tokens, mask, torch.cat([features.pooled for features in each]))

    def check_fingerprint(self, expected: str) -> None:
        """Raises UserError unless the backbone is the one whose fingerprint was saved with the model."""
        if self.backbone.fingerprint != expected:
            raise UserError(
                f"the text backbone is not the one that this model was trained with (fingerprint"
                f" {self.backbone.fingerprint[:12]}, expected {expected[:12]}): install the same weights and tokenizer"
            )
