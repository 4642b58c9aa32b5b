"""What a reconstruction has to beat: plain white, and PCA with as many numbers per image as the latent has.

N training images, P = C*H*W values per image, K components, B batch.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

PIECE = 4096


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


def fit_pca(images: Tensor, num_components: int) -> PCA:
    """The exact leading components of uint8 `images` (N, C, H, W); N - 1 where `num_components` asks for more.

    From the eigenvectors of the N x N Gram matrix, cheap while N is below P: N^2 P + N^3 operations.
    Source: Turk & Pentland 1991, "Eigenfaces for recognition", section 2.1.

    Raises:
        ValueError: fewer than two images.
    """
    n = images.shape[0]
    if n < 2:
        raise ValueError(f"PCA needs at least 2 images, got {n}")
    num_components = min(num_components, n - 1)
    mean = (images.flatten(1).sum(0, dtype=torch.int64).double() / n).float()
    gram = torch.zeros(n, n, dtype=torch.float64)
    for _, x in centred_pieces(images, mean):
        gram += x @ x.T
    u = torch.linalg.eigh(gram).eigenvectors[:, -num_components:].flip(1).float()
    axes = torch.empty(images[0].numel(), num_components)
    for columns, x in centred_pieces(images, mean):
        axes[columns] = x.T @ u
    # The Gram route loses orthogonality among the smallest components; the span is what matters.
    return PCA(mean, torch.linalg.qr(axes).Q)


def white_like(image: Tensor) -> Tensor:
    """The reconstruction that knows nothing but the usual background."""
    return torch.full_like(image, 255)
