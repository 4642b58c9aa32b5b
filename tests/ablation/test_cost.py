import torch
from torch import Tensor, nn

from fluxflow_train.ablation.cost import Row, activation_bytes, flops, latency, parameters, render, residual_table


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.act = nn.ReLU()
        self.second = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.act(self.first(x)).mean(dim=(2, 3)))


def net(width: int) -> Net:
    with torch.device("meta"):
        return Net(width)


def inputs(network: nn.Module) -> tuple[Tensor, ...]:
    return (torch.zeros(1, 3, 4, 6),)


def test_parameters_by_component() -> None:
    assert parameters(net(7)) == {"first": 7 * 28, "act": 0, "second": 2 * 8, "total": 7 * 28 + 16}


def test_flops_by_hand() -> None:
    first, second = 2 * 24 * 27 * 7, 2 * 7 * 2
    assert flops(net(7), inputs) == {"first": first, "act": 0, "second": second, "total": first + second}


def test_activation_bytes_by_hand() -> None:
    # The image for the convolution's weight, the ReLU's output, the mean for the linear layer's weight.
    assert activation_bytes(net(7), inputs) == 4 * (3 * 24 + 7 * 24 + 7)


def test_latency_runs_networks_of_the_meta_device() -> None:
    network = net(7)
    assert 0 < latency(network, inputs, "cpu", repeats=3) < 10
    assert next(network.parameters()).is_meta


def test_residual_table_and_its_text() -> None:
    rows = residual_table(net(100), net(101), inputs, "cpu")
    assert [row.quantity for row in rows] == [
        "parameters, first",
        "parameters, second",
        "parameters, total",
        "FLOPs per image, first",
        "FLOPs per image, second",
        "FLOPs per image, total",
        "activation bytes per image",
        "seconds per image on cpu",
    ]
    assert rows[0] == Row("parameters, first", 2800, 2828)
    lines = render(rows).splitlines()
    assert len(lines) == 9
    assert lines[1].split() == ["parameters,", "first", "2,800", "2,828", "+1.00%"]
