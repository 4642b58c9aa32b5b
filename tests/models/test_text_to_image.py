"""The three networks together: matching latents, a frozen VAE, and captions that are dropped."""

import pytest
import torch
from torch import Tensor, nn

from fluxflow_train.models.flow import PillarTransformer
from fluxflow_train.models.text import TextEncoder, TextFeatures
from fluxflow_train.models.text_scratch import ScratchBackbone
from fluxflow_train.models.text_to_image import TextToImage


class Latents(nn.Module):
    """As much of a VAE as the text-to-image model knows of."""

    def __init__(self, latent_channels: int) -> None:
        super().__init__()
        self.latent_channels = latent_channels
        self.layer = nn.Sequential(nn.Conv2d(3, latent_channels, 1), nn.Dropout(0.5))


class Recording(nn.Module):
    """A flow that keeps what it is asked."""

    latent_channels = 4

    def forward(self, z: Tensor, t: Tensor, text: TextFeatures) -> Tensor:
        self.text = text
        return z


def text_encoder() -> TextEncoder:
    torch.manual_seed(0)
    return TextEncoder(ScratchBackbone(16, 1, 2, 16, "bezier"), width=24, hidden=16, activation="bezier")


def test_flow_of_other_latents_is_refused() -> None:
    flow = PillarTransformer(5, 32, 1, 2, 24, "bezier", 8, "planar", "sequence", True)
    with pytest.raises(ValueError, match="the VAE has 4 latent channels, the flow 5"):
        TextToImage(Latents(4), text_encoder(), flow)


def test_vae_is_frozen_and_the_rest_is_not() -> None:
    model = TextToImage(Latents(4), text_encoder(), Recording())
    assert not any(p.requires_grad for p in model.vae.parameters())
    assert not any(module.training for module in model.vae.modules())
    assert all(p.requires_grad for p in model.text.parameters())


def test_dropped_samples_are_the_null_condition_and_the_others_their_caption() -> None:
    model = TextToImage(Latents(4), text_encoder(), Recording())
    hidden, mask = torch.randn(3, 5, 16), torch.arange(5) < torch.tensor([5, 2, 3])[:, None]
    model(torch.zeros(3, 4, 1, 1), torch.zeros(3), hidden, mask, torch.tensor([True, False, True]))
    seen: TextFeatures = model.flow.text  # type: ignore[assignment]
    null, own = model.text.null(3, 5), model.text(hidden, mask)
    for part, nothing, caption in zip(seen, null, own, strict=True):
        assert torch.equal(part[[0, 2]], nothing[[0, 2]])
        assert torch.equal(part[1], caption[1])
    assert seen.mask.sum(1).tolist() == [1, 2, 1]
