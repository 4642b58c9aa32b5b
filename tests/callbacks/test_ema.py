from pathlib import Path

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fluxflow_train.callbacks.ema import EMA
from fluxflow_train.errors import UserError

BATCH, BUDGET = 4, 64


class Task(L.LightningModule):
    """A net that is averaged, with a buffer, and one that is not."""

    def __init__(self, width: int = 3, fail_in_validation: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width), nn.Linear(width, 1))
        self.other = nn.Linear(2, 1)
        self.images_seen = 0
        self.fail_in_validation = fail_in_validation
        self.history: list[dict[str, Tensor]] = []
        self.validated: dict[str, Tensor] = {}

    def ema_modules(self) -> dict[str, nn.Module]:
        return {"net": self.net}

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.images_seen += len(batch[0])
        return (self.net(batch[0]) - self.other(batch[0])).square().mean()

    def on_train_batch_end(self, *_) -> None:
        self.history.append(weights(self.net))

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.validated = weights(self.net)
        if self.fail_in_validation:
            raise KeyboardInterrupt

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.1)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["images_seen"] = self.images_seen

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.images_seen = checkpoint["images_seen"]


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0)


def fit(task: Task, ema: EMA, root: Path, epochs: int, ckpt_path: Path | None = None) -> L.Trainer:
    x = torch.randn(16, 2, generator=torch.Generator().manual_seed(1))
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[ema],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=root,
    )
    loader = DataLoader(TensorDataset(x), BATCH)
    trainer.fit(task, loader, loader, ckpt_path=ckpt_path, weights_only=True)
    return trainer


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Task, EMA, L.Trainer]:
    task, ema = Task(), EMA(BUDGET)
    return task, ema, fit(task, ema, tmp_path, epochs=2)


def test_average_against_the_formula_in_float64(trained: tuple[Task, EMA, L.Trainer]) -> None:
    task, ema, _ = trained
    assert len(task.history) == 8
    expected = {name: p.double() for name, p in weights(Task().net).items()}
    for step, after in enumerate(task.history, start=1):
        keep = 0.5 ** (BATCH / min(0.05 * step * BATCH, 0.1 * BUDGET))
        expected = {name: keep * v + (1 - keep) * after[name].double() for name, v in expected.items()}
    assert ema.images_seen == 32
    assert set(ema.average) == {f"net.{name}" for name in expected}
    for name, value in expected.items():
        assert ema.average[f"net.{name}"].dtype == torch.float32
        torch.testing.assert_close(ema.average[f"net.{name}"].double(), value, rtol=1e-6, atol=1e-7)


def test_validation_sees_the_average_and_training_goes_on_from_the_live_weights(
    trained: tuple[Task, EMA, L.Trainer],
) -> None:
    task, ema, _ = trained
    assert_equal(task.validated, {name.removeprefix("net."): v for name, v in ema.average.items()})
    assert_equal(weights(task.net), task.history[-1])


def test_the_average_changes_nothing_in_training(trained: tuple[Task, EMA, L.Trainer], tmp_path: Path) -> None:
    plain = Task()
    x = torch.randn(16, 2, generator=torch.Generator().manual_seed(1))
    optimizer = plain.configure_optimizers()
    for _ in range(2):
        for batch in x.split(BATCH):
            optimizer.zero_grad()
            plain.training_step([batch], 0).backward()
            optimizer.step()
    assert_equal(weights(trained[0].net), weights(plain.net))


def test_averaged_swaps_and_restores_bit_for_bit_also_nested(trained: tuple[Task, EMA, L.Trainer]) -> None:
    task, ema, _ = trained
    live, buffers = weights(task), {name: b.clone() for name, b in task.net.named_buffers()}
    with pytest.raises(ZeroDivisionError), ema.averaged(task):
        with ema.averaged(task):
            pass
        for name, p in task.net.named_parameters():
            assert torch.equal(p, ema.average[f"net.{name}"])
            assert not torch.equal(p, live[f"net.{name}"])
        assert_equal(dict(task.net.named_buffers()), buffers)
        assert_equal(weights(task.other), {k.removeprefix("other."): v for k, v in live.items() if "other" in k})
        _ = 1 / 0
    assert_equal(weights(task), live)
    assert not ema.live


def test_no_checkpoint_of_swapped_weights(trained: tuple[Task, EMA, L.Trainer]) -> None:
    task, ema, _ = trained
    with ema.averaged(task), pytest.raises(RuntimeError, match="averaged weights are in the model"):
        ema.state_dict()


def test_interrupted_validation_puts_the_live_weights_back(tmp_path: Path) -> None:
    task, ema = Task(fail_in_validation=True), EMA(BUDGET)
    before = weights(task)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(task, ema, tmp_path, epochs=1)
    assert_equal(weights(task), before)
    assert not ema.live
    ema.state_dict()


def test_resume_is_exact(trained: tuple[Task, EMA, L.Trainer], tmp_path: Path) -> None:
    half, half_ema = Task(), EMA(BUDGET)
    fit(half, half_ema, tmp_path, epochs=1).save_checkpoint(tmp_path / "half.ckpt")
    resumed, resumed_ema = Task(), EMA(BUDGET)
    fit(resumed, resumed_ema, tmp_path, epochs=2, ckpt_path=tmp_path / "half.ckpt")
    task, ema, _ = trained
    assert_equal(weights(resumed.net), weights(task.net))
    assert_equal(resumed_ema.average, ema.average)
    assert resumed_ema.images_seen == ema.images_seen == 32


def test_average_of_another_architecture(trained: tuple[Task, EMA, L.Trainer], tmp_path: Path) -> None:
    ema = EMA(BUDGET)
    ema.load_state_dict(trained[1].state_dict())
    with pytest.raises(UserError, match="another architecture"):
        fit(Task(width=5), ema, tmp_path, epochs=1)


@pytest.mark.parametrize(("dtype", "shadow"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_shadow_is_at_least_fp32(dtype: torch.dtype, shadow: torch.dtype) -> None:
    task, ema = Task().to(dtype), EMA(BUDGET)
    trainer = L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", barebones=False)
    ema.on_fit_start(trainer, task)
    with torch.no_grad():
        task.get_parameter("net.0.weight").add_(1)
    task.images_seen = 16
    ema.on_train_batch_end(trainer, task)
    assert ema.average["net.0.weight"].dtype == shadow
    live = weights(task)
    with ema.averaged(task):
        torch.testing.assert_close(task.get_parameter("net.0.weight"), live["net.0.weight"], rtol=1e-2, atol=1e-2)
    assert_equal(weights(task), live)
