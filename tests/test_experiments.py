"""Every experiment with every arm composes, is matched in size, and takes a step that moves what it should."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from fluxflow_train.cli import config_folder
from fluxflow_train.composing import match_widths
from fluxflow_train.errors import UserError
from fluxflow_train.models.activations import ARM_NAMES
from fluxflow_train.models.activations import arm as build_arm
from fluxflow_train.ranks import Ranks
from fluxflow_train.run import build_trainer

EXPERIMENTS = sorted(path.stem for path in (config_folder() / "experiment").glob("*.yaml"))
WITH_ARMS = ("vae_bezier", "vae_relu")
Config = Callable[..., DictConfig]


def build_task(config: DictConfig) -> Any:
    torch.manual_seed(0)
    return instantiate(OmegaConf.create(OmegaConf.to_container(config, resolve=True)).task)


def take_step(task: Any, config: DictConfig) -> None:
    """One training step by a real Trainer on the real data."""
    trainer = L.Trainer(
        accelerator="cpu",
        default_root_dir=Path(config.run).parent,
        max_epochs=1,
        limit_train_batches=1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task, datamodule=instantiate(config.data.module))


def num_parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def snapshot(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiment_composes_under_its_own_name(config: Config, experiment: str) -> None:
    assert config(f"+experiment={experiment}", small=False).name == experiment


@pytest.mark.parametrize("arm", ARM_NAMES)
@pytest.mark.parametrize("experiment", WITH_ARMS)
def test_experiment_and_arm_take_a_step(config: Config, experiment: str, arm: str) -> None:
    cfg = config(f"+experiment={experiment}", f"activation={arm}", "match=none")
    task = build_task(cfg)
    assert any(type(m) is type(build_arm(arm, 8)) for m in task.vae.encoder.modules())
    before = snapshot(task.vae)
    take_step(task, cfg)
    after = snapshot(task.vae)
    assert task.images_seen == 4
    unmoved = [name for name in before if torch.equal(before[name], after[name])]
    # The last layer of logvar starts at zero, so nothing behind it moves in the first step.
    unmoved = [name for name in unmoved if not name.startswith("encoder.logvar")]
    assert not [name for name in unmoved if "weight" in name or "points" in name]
    assert all(p.isfinite().all() for p in after.values())


@pytest.mark.parametrize("arm", [name for name in ARM_NAMES if name != "bezier"])
def test_arms_are_matched_at_the_default_scale(config: Config, arm: str) -> None:
    cfg = config("+experiment=vae_bezier", f"activation={arm}", small=False)
    assert match_widths(cfg) is not None
    vae = build_task(cfg).vae
    reference = build_task(config("+experiment=vae_bezier", small=False)).vae
    for ours, theirs in ((vae.encoder, reference.encoder), (vae.decoder, reference.decoder)):
        assert abs(num_parameters(ours) / num_parameters(theirs) - 1) < 0.01


@pytest.mark.parametrize("scale", ["small", "base"])
def test_relu_is_matched_at_the_other_scales(config: Config, scale: str) -> None:
    matched = match_widths(config("+experiment=vae_relu", f"scale={scale}", small=False))
    assert matched is not None
    assert abs(num_parameters(matched[1]) / num_parameters(matched[0]) - 1) < 0.01


def test_changing_one_component_leaves_the_other(config: Config) -> None:
    cfg = config("+experiment=vae_bezier", "activation.encoder=silu")
    assert (cfg.activation.encoder, cfg.activation.decoder) == ("silu", "bezier")


def test_published_sizes(config: Config) -> None:
    cfg = config("+experiment=vae_bezier", "scale=base", small=False)
    with torch.device("meta"):
        vae = instantiate(OmegaConf.create(OmegaConf.to_container(cfg, resolve=True)).model)
    millions = {name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in vae.named_children()}
    assert millions["encoder"] == pytest.approx(11.5, rel=0.05)
    assert millions["decoder"] == pytest.approx(94, rel=0.05)


def test_activation_is_placed_per_component(config: Config) -> None:
    cfg = config("+experiment=vae_bezier", "activation.encoder=silu", "activation.decoder=bezier", "match=none")
    task = build_task(cfg)
    kinds = {part: {type(m).__name__ for m in getattr(task.vae, part).modules()} for part in ("encoder", "decoder")}
    assert "BezierActivation" in kinds["decoder"]
    assert "BezierActivation" not in kinds["encoder"]


@pytest.mark.parametrize("heads", ["bezier", "plain"])
def test_heads_start_alike(config: Config, heads: str) -> None:
    task = build_task(config("+experiment=vae_bezier", f"heads={heads}"))
    x = torch.rand(2, 3, 32, 48) * 2 - 1
    out = task.vae(x, torch.zeros(2, *task.vae.latent_shape(32, 48)))
    assert out.x_hat.shape == x.shape
    assert torch.allclose(out.logvar, torch.full_like(out.logvar, -4), atol=1e-5)


def test_gan_updates_move_their_own_network_only(config: Config) -> None:
    cfg = config("+experiment=vae_bezier", "gan=patch", "task.adversary.disc_start=0", "task.adversary.gan_start=0")
    task = build_task(cfg)
    moved: list[tuple[bool, bool]] = []
    plain_step = task.step

    def step(*arguments: Any) -> torch.Tensor:
        before = snapshot(task.vae), snapshot(task.discriminator)
        norm = plain_step(*arguments)
        after = snapshot(task.vae), snapshot(task.discriminator)
        moved.append(tuple(any(not torch.equal(a[k], b[k]) for k in a) for a, b in zip(before, after, strict=True)))  # type: ignore[arg-type]
        return norm

    task.step = step
    take_step(task, cfg)
    assert moved == [(True, False), (False, True)]


def test_gan_pull_is_the_gradient_of_the_generator_loss(config: Config) -> None:
    """Against plain autograd through D: the term's gradient is weight * ratio * d loss_gan / d parameters."""
    from fluxflow_train import losses

    cfg = config("+experiment=vae_bezier", "gan=patch", "task.adversary.disc_start=0", "task.adversary.gan_start=0")
    task = build_task(cfg)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    part = {"image": images, "epoch": torch.zeros(2, dtype=torch.int64), "index": torch.arange(2)}
    passed = task.passed(part)
    whole = task.whole_batch([passed])
    parameters = list(task.vae.parameters())
    ours = torch.autograd.grad(whole.gan_weight * passed.pull, parameters, retain_graph=True, allow_unused=True)
    loss_gan = losses.hinge_generator_loss(task.discriminator(passed.out.x_hat))
    plain = torch.autograd.grad(loss_gan, parameters, retain_graph=True, allow_unused=True)
    rec, gan = losses.gradients_at(task.vae.last_layer, passed.rec, loss_gan)
    for a, b in zip(ours, plain, strict=True):
        if a is not None and b is not None:
            torch.testing.assert_close(a, 0.5 * rec.norm() / gan.norm() * b, rtol=1e-3, atol=1e-7)


def test_step_with_nan_is_left_out_and_too_many_stop_the_run(config: Config) -> None:
    cfg = config("+experiment=vae_bezier", "task.max_bad_steps=0", "scale.log_every=4")
    task = build_task(cfg)
    with torch.no_grad():
        next(task.vae.parameters()).fill_(float("nan"))
    before = snapshot(task.vae)
    with pytest.raises(ValueError, match=r"NaN or Inf .* lower task.optimizer.lr"):
        take_step(task, cfg)
    after = snapshot(task.vae)
    assert all(torch.equal(before[name], after[name]) or before[name].isnan().any() for name in before)


def test_optimizer_that_cannot_leave_a_step_out_is_refused(config: Config) -> None:
    task = build_task(config("+experiment=vae_bezier", "task.optimizer.fused=false"))
    with pytest.raises(ValueError, match="fused"):
        task.configure_optimizers()


@pytest.mark.parametrize("trainer", ["auto", "cpu", "ddp", "ddp_cpu2", "slurm", "fsdp"])
def test_trainer_composes(config: Config, trainer: str) -> None:
    cfg = config("+experiment=vae_bezier", f"trainer={trainer}", "trainer.accelerator=cpu", "trainer.precision=32-true")
    built = build_trainer(cfg, instantiate(cfg.data.module), [], [], Ranks(0, 1, 0))
    assert built.max_epochs == 1
    assert built.world_size == (2 if trainer == "ddp_cpu2" else 1)


def test_several_processes_for_a_trainer_of_one_are_refused(config: Config) -> None:
    cfg = config("+experiment=vae_bezier")
    with pytest.raises(UserError, match="2 processes were started, and this trainer uses one: add trainer=ddp"):
        build_trainer(cfg, instantiate(cfg.data.module), [], [], Ranks(0, 2, 0, 2))


def test_loss_that_is_not_finite_is_left_out_though_its_gradient_is(config: Config) -> None:
    """On several ranks the gradient is all that the others hear of."""
    task = build_task(config("+experiment=vae_bezier"))
    weight = next(task.vae.parameters())
    task.manual_backward = lambda loss: loss.backward()
    task.accumulate(weight.sum() + torch.tensor(float("inf")))
    assert weight.grad is not None and weight.grad.isnan().all()
