import numpy as np
import torch

from fluxflow_train.callbacks.samples import picture


def test_grid_has_input_reconstruction_and_amplified_difference() -> None:
    image = torch.full((2, 3, 4, 4), 100, dtype=torch.uint8)
    reconstruction = torch.full((2, 3, 4, 4), 110, dtype=torch.uint8)
    pixels = np.asarray(picture(image, reconstruction, margin=1, scale=1))
    assert pixels.shape == (3 * 5, 2 * 5, 3)
    assert [int(pixels[row * 5, 0, 0]) for row in range(3)] == [100, 110, 40]
    assert int(pixels[4, 4, 0]) == 128
