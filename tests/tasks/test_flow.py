"""What FlowTask trains on, sample by sample; what it leaves alone; and its validation loss."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from fluxflow_train import rng
from fluxflow_train.callbacks.ema import EMA, parameters
from fluxflow_train.composing import bind_vae
from fluxflow_train.errors import UserError
from fluxflow_train.tasks.flow import FlowTask

Build = Callable[..., tuple[FlowTask, Any]]


@pytest.fixture
def build(config: Callable[..., DictConfig], flow_options: tuple[str, ...], frozen_text: tuple[str, ...]) -> Build:
    """`build(*overrides)`: the task and its data module, prepared."""

    def make(*overrides: str, text: tuple[str, ...] = frozen_text) -> tuple[FlowTask, Any]:
        cfg = config("+experiment=flow_bezier", *flow_options, *text, *overrides)
        bind_vae(cfg)
        plain: Any = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
        torch.manual_seed(0)
        task = instantiate(plain.task)
        data = task.data_module(instantiate(plain.data.module))
        data.prepare_data()
        return task, data

    return make


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., L.Trainer]:
    def make(**options: Any) -> L.Trainer:
        arguments: dict[str, Any] = {
            "accelerator": "cpu",
            "default_root_dir": tmp_path,
            "max_epochs": 1,
            "limit_train_batches": 2,
            "limit_val_batches": 0,
            "num_sanity_val_steps": 0,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        return L.Trainer(**arguments | options)

    return make


def asked(*samples: tuple[int, int]) -> dict[str, Tensor]:
    """A batch of which only (epoch, index) of its samples matters."""
    epochs, indices = zip(*samples, strict=True)
    return {"epoch": torch.tensor(epochs), "index": torch.tensor(indices)}


def snapshot(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in module.state_dict().items()}


def randomise(task: FlowTask) -> None:
    """Layers that start at zero let nothing of the caption or the latent through."""
    torch.manual_seed(1)
    for p in task.flow.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.3)


# ---- what a sample is trained on ----


@pytest.mark.parametrize(("prob", "bound"), [(0.0, 0.0), (0.1, 0.02), (0.5, 0.033), (1.0, 0.0)])
def test_measured_dropout_is_the_configured_one(build: Build, prob: float, bound: float) -> None:
    """4,000 samples; the bound is 4.2 standard deviations of a binomial."""
    task, _ = build(f"task.cfg_dropout_prob={prob}", "task.sampler.guidance=1")
    dropped = task.dropped(asked(*((epoch, index) for epoch in range(4) for index in range(1000))))
    assert dropped.dtype == torch.bool
    assert abs(dropped.double().mean().item() - prob) <= bound
    if 0 < prob < 1:  # an epoch's choice is its own
        first, second = dropped[:1000], dropped[1000:2000]
        both = (first & second).double().mean().item()
        assert abs(both - prob**2) < 4.2 * (prob**2 * (1 - prob**2) / 1000) ** 0.5


def test_a_sample_is_the_same_in_any_company(build: Build) -> None:
    task, data = build("task.cfg_dropout_prob=0.5")
    loader = iter(data.train_dataloader())
    first, batch = next(loader), next(loader)
    expected, dropped = task.noised(batch), task.dropped(batch)
    task.noised(first)
    for i in (2, 0):
        alone = {name: value[i : i + 1] for name, value in batch.items()}
        for ours, theirs in zip(task.noised(alone), expected, strict=True):
            assert torch.equal(ours[0], theirs[i])
        assert task.dropped(alone)[0] == dropped[i]
    later = {**batch, "epoch": batch["epoch"] + 1}
    for ours, theirs in zip(task.noised(later), expected, strict=True):
        assert not any(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_streams_are_independent(build: Build) -> None:
    """Dropout, time, noise and the posterior's sample are drawn for purposes of their own."""
    task, _ = build()
    samples = asked(*((0, i) for i in range(500)))
    like = torch.zeros(500, 1, 1, 1)
    columns = [
        task.draws(samples, "cfg-dropout", 1)[:, 0],
        *task.draws(samples, "time", 2).T,
        task.normal(samples, "eps", like).flatten(),
        task.normal(samples, "posterior", like).flatten(),
    ]
    correlation = torch.corrcoef(torch.stack(columns)) - torch.eye(5)
    assert correlation.abs().max() < 4 / 500**0.5


def test_latent_is_drawn_from_the_posterior(build: Build) -> None:
    task, _ = build()
    many = {**asked(*((0, i) for i in range(2000))), "latent_mean": torch.full((2000, 1, 1, 2), 3.0)}
    many["latent_logvar"] = torch.full((2000, 1, 1, 2), 2 * torch.tensor(0.5).log().item())
    z, eps, t = task.noised(many)
    assert z.mean().item() == pytest.approx(3, abs=0.04)
    assert z.std().item() == pytest.approx(0.5, abs=0.03)
    assert eps.std().item() == pytest.approx(1, abs=0.06)
    assert t.min() >= 0
    assert t.max() <= 1


def test_live_and_cached_samples_have_the_same_loss(build: Build) -> None:
    """Latents are cached in fp16, hidden states too; nothing else differs."""
    cached, cache = build()
    live, images = build("task.latents=null")
    for task in (cached, live):
        randomise(task)
    batches = next(iter(cache.train_dataloader())), next(iter(images.train_dataloader()))
    assert "image" not in batches[0]
    assert "latent_mean" not in batches[1]
    dropped = torch.tensor([False, True, False, False])
    losses = [
        task.losses(batch, task.noised(batch), dropped) for task, batch in zip((cached, live), batches, strict=True)
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=3e-3, atol=0)
    other = {**batches[1], "caption": batches[1]["caption"][::-1]}
    changed = live.losses(other, live.noised(other), dropped)
    assert torch.equal(changed[1], losses[1][1])  # dropped: its caption says nothing
    assert not torch.isclose(changed[0], losses[1][0], rtol=1e-5)


# ---- a step ----


def test_a_step_moves_text_and_flow_and_nothing_else(build: Build, trainer: Callable[..., L.Trainer]) -> None:
    task, data = build("task.cfg_dropout_prob=1", "scale.log_every=1000000")
    vae, backbone = snapshot(task.model.vae), snapshot(task.text.backbone.network())  # type: ignore[operator]
    before = snapshot(task)
    trainer(limit_train_batches=4).fit(task, datamodule=data)
    assert task.images_seen == 16
    after = snapshot(task)
    assert not torch.equal(after["text.null_token"], before["text.null_token"])
    assert not torch.equal(after["flow.out.weight"], before["flow.out.weight"])
    for frozen, kept in ((task.model.vae, vae), (task.text.backbone.network(), backbone)):  # type: ignore[operator]
        assert all(torch.equal(t, kept[name]) for name, t in frozen.state_dict().items())
        assert not any(p.requires_grad or p.grad is not None for p in frozen.parameters())
    assert task.meters.read()["dropped"] == 1


def test_training_takes_the_loss_apart_from_no_sample(build: Build, trainer: Callable[..., L.Trainer]) -> None:
    """The logged loss of the first step is the objective's, computed again: a new network predicts zero."""
    task, data = build("scale.log_every=1000000")
    trainer(limit_train_batches=1).fit(task, datamodule=data)
    batch = next(iter(data.train_dataloader()))
    z, eps, _ = task.noised(batch)
    assert task.meters.read()["loss"] == pytest.approx((eps - z).square().mean().item(), rel=1e-5)


def test_nan_is_left_out(build: Build, trainer: Callable[..., L.Trainer]) -> None:
    task, data = build("task.max_bad_steps=1", "scale.log_every=4")
    before: list[dict[str, Tensor]] = []
    callback = L.pytorch.callbacks.LambdaCallback(on_train_batch_start=lambda *_: before.append(snapshot(task)))
    trainer(limit_train_batches=3, callbacks=[callback]).fit(task, Poisoned(data.train_dataloader(), at=1))
    assert task.guard.num_bad_steps == 1
    after = snapshot(task)
    moved = [
        any(not torch.equal(a[name], b[name]) for name in a) for a, b in zip(before, [*before[1:], after], strict=True)
    ]
    assert moved == [True, False, True]
    assert all(t.isfinite().all() for t in after.values())
    assert (Path(task.trainer.default_root_dir) / "bad_steps.txt").read_text().startswith("4\t")


def test_too_many_nan_stop_the_run(build: Build, trainer: Callable[..., L.Trainer]) -> None:
    task, data = build("task.max_bad_steps=0", "scale.log_every=4")
    with pytest.raises(UserError, match=r"NaN or Inf .* lower task.optimizer.lr"):
        trainer().fit(task, Poisoned(data.train_dataloader(), at=0))


class Poisoned:
    """The batches of `loader`, with NaN in the latents of batch `at`."""

    def __init__(self, loader: Any, at: int) -> None:
        self.loader, self.at = loader, at

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number, batch in enumerate(self.loader):
            if number == self.at:
                batch["latent_mean"][0, 0, 0, 0] = float("nan")
            yield batch


# ---- what is kept ----


def test_checkpoint_and_average_hold_what_is_trained_and_no_more(
    build: Build, trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    task, data = build()
    average = EMA(budget_images=32)
    run = trainer(callbacks=[average])
    run.fit(task, datamodule=data)
    run.save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    trained = {name for name, p in task.named_parameters() if p.requires_grad}
    assert {name.partition(".")[0] for name in trained} == {"text", "flow"}
    assert set(state["state_dict"]) == trained
    assert set(average.average) == set(parameters(task)) == trained
    assert not [name for name in trained if "backbone" in name]


def test_trained_backbone_is_kept_and_averaged(build: Build) -> None:
    task, _ = build(text=("model/text=scratch",))
    assert [name for name in parameters(task) if name.startswith("text.backbone.blocks")]


# ---- validation ----


def test_validation_loss_is_the_same_at_every_validation(build: Build, trainer: Callable[..., L.Trainer]) -> None:
    task, data = build()
    run = trainer(limit_val_batches=1.0)
    randomise(task)
    values = []
    for _ in range(2):
        run.validate(task, datamodule=data, verbose=False)
        values.append(dict(task.latest))
        next(iter(data.train_dataloader()))
    assert values[0] == values[1]
    assert {"val/loss", "val/loss_t0", "val/loss_t1", "val/loss_t2", "val/loss_t3"} == set(values[0])
    assert values[0]["val/loss"] == pytest.approx(sum(values[0][f"val/loss_t{i}"] for i in range(4)) / 4, rel=1e-6)


def test_validation_loss_of_a_new_network_by_hand(build: Build, trainer: Callable[..., L.Trainer]) -> None:
    """It predicts zero, so the loss is the mean square of eps - z over the tune split, the posterior's mean for z."""
    task, data = build()
    trainer(limit_val_batches=1.0).validate(task, datamodule=data, verbose=False)
    squares = []
    for batch in data.val_dataloader():
        for mean, epoch, index in zip(batch["latent_mean"], batch["epoch"], batch["index"], strict=True):
            eps = rng.normal(task.seed, "val-eps", [(int(epoch), int(index))], tuple(mean.shape))[0]
            squares.append((eps - mean).square().mean().item())
    assert len(squares) == 12
    assert task.latest["val/loss"] == pytest.approx(sum(squares) / 12, rel=1e-5)


def test_validation_times_take_each_stratum_once(build: Build, trainer: Callable[..., L.Trainer]) -> None:
    task, data = build()
    trainer(limit_val_batches=1.0).validate(task, datamodule=data, verbose=False)
    count = data.num_samples("tune")
    assert sorted((task.val_times * count).long().tolist()) == list(range(count))
    assert (task.val_times[1:] < task.val_times[:-1]).any()  # not in the order of the samples


# ---- refused ----


def test_impossible_probability(build: Build) -> None:
    with pytest.raises(Exception, match=r"cfg_dropout_prob must be in \[0, 1\], got 1.5"):
        build("task.cfg_dropout_prob=1.5")


def test_guidance_without_dropout_is_refused_before_training(build: Build) -> None:
    with pytest.raises(Exception, match=r"task.cfg_dropout_prob=0 .* task.sampler.guidance=1"):
        build("task.cfg_dropout_prob=0")
