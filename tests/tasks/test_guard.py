import pytest
import torch
from torch import nn

from fluxflow_train.errors import UserError
from fluxflow_train.tasks.guard import Guard


def step(guard: Guard, value: float, images_seen: int) -> nn.Linear:
    """A net after one guarded update whose gradient is `value` everywhere."""
    net = nn.Linear(2, 2)
    nn.init.ones_(net.weight)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, fused=True)
    loss = (net.weight * value).sum()
    loss.backward()
    _, flag = guard.step(net, optimizer, clip_norm=1.0)
    optimizer.step()
    guard.remember(flag, images_seen, [f"sample{images_seen}"])
    return net


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_update_with_nan_or_inf_is_left_out_and_named(value: float) -> None:
    guard = Guard(max_bad_steps=1)
    assert not torch.equal(step(guard, 1.0, 4).weight, torch.ones(2, 2))
    assert torch.equal(step(guard, value, 8).weight, torch.ones(2, 2))
    (bad,) = guard.read()
    assert (bad.images_seen, bad.keys) == (8, ["sample8"])
    assert guard.read() == []


def test_too_many_stop_the_run_with_the_samples_named() -> None:
    guard = Guard(max_bad_steps=1)
    step(guard, float("nan"), 4)
    step(guard, float("nan"), 8)
    with pytest.raises(UserError, match=r"2 updates had NaN or Inf .* sample8"):
        guard.check(guard.read())


def test_norm_is_that_before_clipping() -> None:
    net = nn.Linear(2, 2, bias=False)
    loss = (net.weight * 3).sum()
    loss.backward()
    norm, _ = Guard(0).step(net, torch.optim.AdamW(net.parameters(), fused=True), clip_norm=1.0)
    assert norm.item() == pytest.approx(6)
    assert net.weight.grad is not None
    assert net.weight.grad.norm().item() == pytest.approx(1, rel=1e-4)
