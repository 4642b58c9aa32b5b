"""A VAE's pictures of a protocol's images, in fp32, by the posterior mean, on outputs rounded to 8 bits.

B images of a chunk, H W pixels, D latent channels, h w latent grid, F feature width.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fluxflow_train.evaluation import showing
from fluxflow_train.evaluation.filling import discard_damaged, fill
from fluxflow_train.evaluation.images import Images
from fluxflow_train.evaluation.place import Place
from fluxflow_train.evaluation.reference import Need
from fluxflow_train.evaluation.report import Measured, front, report_of
from fluxflow_train.evaluation.results import Findings, means, merged, paired_distances
from fluxflow_train.evaluation.samples import PICTURES, keep_pictures, picture_digests
from fluxflow_train.generation import pinned_precision
from fluxflow_train.losses import rate_nats
from fluxflow_train.metrics.extractor import Extractor, state_sha256
from fluxflow_train.metrics.reconstruction import psnr, psnr_nonwhite, ssim
from fluxflow_train.perceptual import LPIPS
from fluxflow_train.pixels import dequantize, quantize
from fluxflow_train.reports import build, figures
from fluxflow_train.reports.passes import is_constant, seconds

NAME = "reconstruction"


class Maker:
    """Makes the rows of a store from a VAE in evaluation mode; PNGs of the first 64 go to `pictures`."""

    def __init__(
        self,
        vae: nn.Module,
        images: Images,
        extractor: Extractor,
        lpips: LPIPS | None,
        device: torch.device,
        pictures: Path,
    ) -> None:
        self.vae: Any = vae
        self.images, self.extractor, self.lpips = images, extractor, lpips
        self.device, self.pictures = device, pictures

    def __call__(self, chunks: Sequence[range]) -> Iterator[dict[str, Tensor]]:
        for chunk, image in zip(chunks, self.images.batches(chunks), strict=True):
            yield self.rows(chunk, image.to(self.device))

    @torch.no_grad()
    def rows(self, chunk: range, image: Tensor) -> dict[str, Tensor]:
        """What is kept of uint8 `image` (B, 3, H, W)."""
        start = seconds(self.device)
        with pinned_precision(self.device):
            x = dequantize(image)
            output = self.vae(x, torch.zeros(len(x), *self.vae.latent_shape(*x.shape[-2:]), device=self.device))
            made = quantize(output.x_hat)
        elapsed = seconds(self.device) - start
        keep_pictures(self.pictures, chunk, made)
        rows = {
            "features": self.extractor(made),
            "psnr": psnr(image, made),
            "psnr_nonwhite": psnr_nonwhite(image, made),
            "ssim": ssim(image, made),
            "rate_nats": rate_nats(output.mu, output.logvar).double(),
            "nonfinite": ~output.x_hat.isfinite().flatten(1).all(1),
            "constant": is_constant(made) & ~is_constant(image),
            "sha256": picture_digests(made),
            "input_sha256": picture_digests(image),
            "seconds": torch.full((len(x),), elapsed / len(x), dtype=torch.float64),
        }
        if self.lpips is not None:
            pairs = zip(dequantize(made), x, strict=True)
            rows["lpips"] = torch.stack([self.lpips(a[None], b[None]) for a, b in pairs]).double()
        return {name: value.cpu() for name, value in rows.items()}


class Reconstructions:
    """An evaluation of a VAE: what it needs, its store, its report."""

    def __init__(self, vae: nn.Module, description: dict[str, Any], place: Place, run_dir: Path) -> None:
        self.vae, self.place, self.run_dir = vae.to(place.device).eval(), place, run_dir
        weights = place.options.lpips
        self.lpips = None if weights is None else LPIPS(weights).to(place.device).eval()
        self.latent_shape: tuple[int, int, int] = self.vae.latent_shape(  # type: ignore[operator]
            place.images.resolution, place.images.resolution
        )
        lpips = None if self.lpips is None else state_sha256(self.lpips.state_dict())
        self.key = place.key(description["sha256"], {"posterior": "mean", "lpips": lpips})

    def needs(self) -> list[Need]:
        """Real images whose features must be there first: those that go in."""
        return self.place.needs(self.place.count)

    def fill(self, folder: Path) -> None:
        place, store = self.place, self.place.store(folder, NAME, self.key)
        make = Maker(self.vae, place.images, place.extractor, self.lpips, place.device, folder / PICTURES / NAME)
        place.ranks.first(lambda: discard_damaged(store, place.count))
        fill(store, place.count, place.ranks, make, "reconstruct")

    def report(self, folder: Path, provenance: dict[str, Any]) -> dict[str, Any]:
        place = self.place
        real = place.real(place.count)
        rows, fingerprint = place.read(folder, NAME, self.key)
        found = paired_distances(place.extractor, real, rows["features"], place.options.seed)
        measured = [Measured(None, rows, fingerprint, merged([Findings(means(rows)), found]))]
        setting = place.setting(real.reference)
        shown = {
            **front(setting, measured),
            "curves": figures.training_curves(self.run_dir / "metrics.csv"),
            "bezier": showing.vae_curves(self.vae, place.images, place.device),
            "triples": showing.triples(place.images, folder / PICTURES / NAME, place.count),
            "amplify": figures.AMPLIFY,
            "captioned": [],
            "neighbours": [],
            "psnr_histogram": figures.histogram(rows["psnr"].tolist()),
        }
        model = build.describe(self.vae, self.latent_shape) | provenance.get("model", {})
        return report_of(setting, measured, model, provenance, shown)
