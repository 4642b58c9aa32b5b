"""What a reconstruction has to beat: plain white, and PCA with as many numbers per image as the latent has.

N training images, P = C*H*W values per image, K components, B batch.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fluxflow_train import rng

PIECE = 4096
OVERSAMPLING = 128
ITERATIONS = 4


class PCA(NamedTuple):
    """`mean` (P,), `axes` (P, K) orthonormal, float32, in grey levels (0 to 255)."""

    mean: Tensor
    axes: Tensor

    @property
    def num_components(self) -> int:
        return self.axes.shape[1]

    def reconstruct(self, image: Tensor) -> Tensor:
        """uint8 (B, C, H, W) to uint8: projected on the components, rounded as every other output is."""
        x = image.flatten(1).float() - self.mean
        y = self.mean + (x @ self.axes) @ self.axes.T
        return y.add(0.5).clamp(0, 255).byte().view_as(image)


def centred_pieces(images: Tensor, mean: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The centred float32 matrix (N, P), 4096 columns at a time: it is never whole in memory."""
    flat = images.flatten(1)
    for start in range(0, flat.shape[1], PIECE):
        columns = slice(start, start + PIECE)
        yield columns, flat[:, columns].float() - mean[columns]


def leading_eigenvectors(gram: Tensor, num: int) -> Tensor:
    """Those of a symmetric positive semi-definite (N, N) float32 matrix: (N, num), the largest first.

    Subspace iteration with 128 more vectors than asked for and a Rayleigh-Ritz step, from a fixed random start; seconds
    where a full eigendecomposition of a few thousand images takes minutes on a laptop.
    Source: Halko, Martinsson & Tropp 2011, "Finding structure with randomness", algorithm 4.4.
    """
    n = gram.shape[0]
    size = min(n, num + OVERSAMPLING)
    q = rng.normal(0, "pca-start", [(0,)], (n, size))[0]
    for _ in range(ITERATIONS):
        q = torch.linalg.qr(gram @ q).Q
    ritz = torch.linalg.eigh((q.T @ gram @ q).double()).eigenvectors
    return q @ ritz.flip(1)[:, :num].float()


def fit_pca(images: Tensor, num_components: int) -> PCA:
    """The leading components of uint8 `images` (N, C, H, W); N - 1 where `num_components` asks for more.

    From the eigenvectors of the N x N Gram matrix, the smaller of the two while N is below P.
    Source: Turk & Pentland 1991, "Eigenfaces for recognition", section 2.1.

    Raises:
        ValueError: fewer than two images.
    """
    n = images.shape[0]
    if n < 2:
        raise ValueError(f"PCA needs at least 2 images, got {n}")
    num_components = min(num_components, n - 1)
    mean = (images.flatten(1).sum(0, dtype=torch.int64).double() / n).float()
    gram = torch.zeros(n, n)
    for _, x in centred_pieces(images, mean):
        gram.addmm_(x, x.T)
    u = leading_eigenvectors(gram / gram.trace(), num_components)
    axes = torch.empty(images[0].numel(), num_components)
    for columns, x in centred_pieces(images, mean):
        axes[columns] = x.T @ u
    # The Gram route loses orthogonality among the smallest components; the span is what matters.
    return PCA(mean, torch.linalg.qr(axes).Q)


def white_like(image: Tensor) -> Tensor:
    """The reconstruction that knows nothing but the usual background."""
    return torch.full_like(image, 255)
