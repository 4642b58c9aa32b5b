import numpy as np
import pytest
import torch
from torch import Tensor

from fluxflow_train.metrics.baselines import fit_pca, leading_eigenvectors, white_like


def images(num: int, rank: int, seed: int = 0) -> Tensor:
    """Smooth random images of about `rank` directions."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(rank, 3, 12, 8, generator=torch.Generator().manual_seed(99))
    weights = torch.randn(num, rank, generator=generator) * torch.linspace(1, 0.2, rank)
    return (128 + 12 * torch.einsum("nr,rchw->nchw", weights, basis)).round().clamp(0, 255).byte()


def numpy_reconstruction(train: Tensor, test: Tensor, num: int) -> np.ndarray:
    x = train.flatten(1).numpy().astype(np.float64)
    mean = x.mean(0)
    axes = np.linalg.svd(x - mean, full_matrices=False)[2][:num]
    y = mean + (test.flatten(1).numpy() - mean) @ axes.T @ axes
    return np.floor(np.clip(y + 0.5, 0, 255)).reshape(test.shape)


@pytest.mark.parametrize("num", [1, 7, 20])
def test_pca_equals_numpys_svd(num: int) -> None:
    train, test = images(60, 30), images(10, 30, seed=1)
    difference = fit_pca(train, num).reconstruct(test).numpy() - numpy_reconstruction(train, test, num)
    # float32 may tip a value at half a grey level over.
    assert np.abs(difference).max() <= 1 and (difference != 0).mean() < 1e-3


def test_subspace_iteration_captures_what_the_exact_axes_capture() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(600, 600, generator=generator, dtype=torch.float64)).Q
    spectrum = torch.arange(1, 601, dtype=torch.float64) ** -1.5
    gram = (q * spectrum @ q.T).float()
    u = leading_eigenvectors(gram, 100)
    captured = float((u.T @ gram @ u).trace())
    assert captured == pytest.approx(float(spectrum[:100].sum()), rel=1e-4)
    torch.testing.assert_close(u.T @ u, torch.eye(100), atol=1e-5, rtol=0)


def test_all_components_reproduce_the_training_images() -> None:
    train = images(12, 30)
    pca = fit_pca(train, 512)
    assert pca.num_components == 11
    assert torch.equal(pca.reconstruct(train), train)


def test_pca_needs_two_images() -> None:
    with pytest.raises(ValueError, match="got 1"):
        fit_pca(images(1, 3), 4)


def test_white_is_white() -> None:
    assert (white_like(images(2, 3)) == 255).all()
