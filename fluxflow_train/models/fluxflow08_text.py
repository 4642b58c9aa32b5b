"""The text encoder of FluxFlow 0.8, number for number, for exchanging checkpoints with the `fluxflow` package.

Legend: B batch, S text tokens, W backbone width, E condition width.
Source: MODEL.md part B. The published mean runs over the padding too, so that a caption's vector depends on the length
it is padded to, which is therefore part of the backbone here; one vector per caption is all that is left to cache.
"""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fluxflow_train.errors import UserError
from fluxflow_train.models.bezier import BezierActivation
from fluxflow_train.models.text import Backbone, TextFeatures
from fluxflow_train.models.text_backbones import Checkpoint

HIDDEN = 512
TEXT_WEIGHTS = "text_encoder.safetensors"
TEXT_PREFIX = "text_encoder."
LANGUAGE_MODEL = "language_model."
DISTILBERT_BASE: dict[str, Any] = {
    "vocab_size": 30522,
    "max_position_embeddings": 512,
    "n_layers": 6,
    "n_heads": 12,
    "dim": 768,
    "hidden_dim": 3072,
    "activation": "gelu",
    "pad_token_id": 0,
}


class PaddedMean(Backbone):
    """The mean of `inner`'s hidden states over `num_tokens` positions, padding included, as the only token."""

    def __init__(self, inner: Backbone, num_tokens: int) -> None:
        if not 2 <= num_tokens <= inner.max_tokens:
            raise ValueError(f"num_tokens: got {num_tokens}, expected 2 to {inner.max_tokens}")
        super().__init__(inner.width, num_tokens)
        self.inner = inner

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.inner.fingerprint} mean of {self.max_tokens}".encode()).hexdigest()

    def token_ids(self, caption: str) -> list[int]:
        ids = self.inner.token_ids(caption)
        return ids if len(ids) <= self.max_tokens else [*ids[: self.max_tokens - 1], ids[-1]]

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids int64 (B, S), mask (B, S) to the mean (B, 1, W)."""
        missing = self.max_tokens - ids.shape[1]
        return self.inner(F.pad(ids, (0, missing)), F.pad(mask, (0, missing))).mean(1, keepdim=True)

    def encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Means (B, 1, W) and mask (B, 1), all True; each caption runs alone, so as not to depend on its company."""
        means = [self(*self.tokenize([caption])).float() for caption in captions]
        hidden = torch.cat(means) if means else torch.zeros(0, 1, self.width, device=self.anchor.device)
        return hidden, torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)


class FluxFlow08Text(nn.Module):
    """Mean of the hidden states -> twice [Linear -> LayerNorm -> Bezier]: one pooled vector, also as the only token.

    The null condition is the encoding of "". The methods are those of our own `TextEncoder`.
    """

    def __init__(self, backbone: Backbone, width: int, num_tokens: int) -> None:
        """`width` E of the condition; `num_tokens` that captions are padded to, 512 in the published pipeline."""
        super().__init__()
        self.backbone = PaddedMean(backbone, num_tokens)
        self.width = width
        self.projection = nn.Sequential(
            nn.Linear(backbone.width, 5 * HIDDEN),
            nn.LayerNorm(5 * HIDDEN),
            BezierActivation("sigmoid", "none", "planar", dim=-1),
            nn.Linear(HIDDEN, 5 * width),
            nn.LayerNorm(5 * width),
            BezierActivation("sigmoid", "none", "planar", dim=-1),
        )
        self.frozen_null: Tensor | None = None  # what a frozen backbone makes of "", once it was asked

    def forward(self, hidden: Tensor, mask: Tensor) -> TextFeatures:
        """hidden (B, 1, W) and mask as of `backbone`: the mask has done its work there."""
        return one_token(self.projection(hidden.mean(1)))

    def null(self, batch_size: int, num_tokens: int) -> TextFeatures:
        """The condition of "": one valid token, padded to `num_tokens`."""
        pooled = self.projection(self.null_hidden()[:, 0])
        tokens, mask, pooled = one_token(pooled.expand(batch_size, -1))
        missing = num_tokens - 1
        return TextFeatures(F.pad(tokens, (0, 0, 0, missing)), F.pad(mask, (0, missing)), pooled)

    def null_hidden(self) -> Tensor:
        """The backbone's (1, 1, W) for ""; asked once where it is frozen."""
        if not self.backbone.frozen:
            return self.backbone.encode([""])[0]
        if self.frozen_null is None:
            # The first to ask may be a validation: what inference mode makes can't be trained on later.
            with torch.inference_mode(False), torch.no_grad():
                self.frozen_null = self.backbone.encode([""])[0]
        return self.frozen_null.to(self.backbone.anchor.device)

    def drop(self, features: TextFeatures, dropped: Tensor) -> TextFeatures:
        """`features` with tokens, mask and pooled vector of the null condition together where `dropped` (B,)."""
        null = self.null(*features.mask.shape)
        return TextFeatures(
            torch.where(dropped[:, None, None], null.tokens, features.tokens),
            torch.where(dropped[:, None], null.mask, features.mask),
            torch.where(dropped[:, None], null.pooled, features.pooled),
        )

    def encode(self, captions: list[str]) -> TextFeatures:
        """Features of captions as typed; each runs through the projection alone (see `Backbone.encode`)."""
        hidden, _ = self.backbone.encode(captions)
        return one_token(torch.cat([self.projection(row) for row in hidden]))

    def check_fingerprint(self, expected: str) -> None:
        """Raises UserError unless the backbone is the one whose fingerprint was saved with the model."""
        if self.backbone.fingerprint != expected:
            raise UserError(
                f"the text backbone is not the one that this model was trained with (fingerprint"
                f" {self.backbone.fingerprint[:12]}, expected {expected[:12]}): install the same weights and tokenizer"
            )


def one_token(pooled: Tensor) -> TextFeatures:
    """Features whose only token is the pooled vector (B, E) itself."""
    return TextFeatures(pooled[:, None], torch.ones(len(pooled), 1, dtype=torch.bool, device=pooled.device), pooled)


def published_distilbert(folder: str) -> Checkpoint:
    """The DistilBERT that is part of a published text encoder; its tokenizer must have been put into the folder.

    Raises:
        UserError: a file is missing.
    """
    return Checkpoint(Path(folder), dict(DISTILBERT_BASE), language_model, TEXT_WEIGHTS)


def language_model(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the backbone by DistilBertModel's names."""
    names = {name: name.removeprefix(TEXT_PREFIX) for name in tensors}
    return {
        short.removeprefix(LANGUAGE_MODEL): tensors[name]
        for name, short in names.items()
        if short.startswith(LANGUAGE_MODEL)
    }
