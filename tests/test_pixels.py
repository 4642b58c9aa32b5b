import pytest
import torch

from fluxflow_train.pixels import dequantize, quantize


@pytest.mark.parametrize(("unit", "expected"), [(1.01, 255), (-0.01, 0), (0.5, 128), (1.0, 255), (254.6 / 255, 255)])
def test_quantize_clamps_and_rounds(unit: float, expected: int) -> None:
    assert quantize(torch.tensor([2 * unit - 1])).item() == expected


def test_quantize_returns_every_byte_unchanged() -> None:
    image = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(quantize(dequantize(image)), image)


def test_quantize_computes_in_fp32_whatever_the_input() -> None:
    x = torch.linspace(-1, 1, 301).bfloat16()
    assert torch.equal(quantize(x), quantize(x.float()))
