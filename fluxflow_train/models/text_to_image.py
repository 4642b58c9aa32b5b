"""Text in, picture out: a VAE, a text encoder and a flow, together.

Legend: B batch, D latent channels, h w latent grid, S text tokens, W backbone width.
"""

from torch import Tensor, nn

from fluxflow_train.models.text import TextEncoder


class TextToImage(nn.Module):
    """What a run of flow training exports. The VAE is frozen; `forward` is what is trained on its latents."""

    def __init__(self, vae: nn.Module, text: nn.Module, flow: nn.Module):
        """Raises ValueError where the flow is not made for the VAE's latents."""
        super().__init__()
        if flow.latent_channels != vae.latent_channels:
            raise ValueError(f"the VAE has {vae.latent_channels} latent channels, the flow {flow.latent_channels}")
        self.vae: nn.Module = vae.requires_grad_(False).eval()
        self.text: TextEncoder = text  # type: ignore[assignment]
        self.flow: nn.Module = flow

    def forward(self, z: Tensor, t: Tensor, hidden: Tensor, mask: Tensor, dropped: Tensor) -> Tensor:
        """The prediction (B, D, h, w) for z (B, D, h, w) at t (B,).

        hidden (B, S, W) and mask (B, S) are of the text backbone; where `dropped` (B,) bool the null condition stands
        in for the caption.
        """
        return self.flow(z, t, self.text.drop(self.text(hidden, mask), dropped))
