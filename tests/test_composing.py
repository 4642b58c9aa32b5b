"""From overrides to a run that can begin: the VAE by name, widths matched to the Bezier arm, the parts of the flow."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from fluxflow_train.ablation.cost import parameters
from fluxflow_train.composing import bind_vae, match_widths, plain
from fluxflow_train.errors import UserError
from fluxflow_train.models.dit import DiT

Command = Callable[..., Any]
Compose = Callable[..., DictConfig]


@pytest.fixture
def compose(config: Compose, flow_options: tuple[str, ...], frozen_text: tuple[str, ...]) -> Compose:
    """`compose(*overrides)`: a small flow configuration, its VAE found."""

    def build(*overrides: str, experiment: str = "flow_bezier", text: tuple[str, ...] = frozen_text) -> DictConfig:
        cfg = config(f"+experiment={experiment}", *flow_options, *text, *overrides)
        bind_vae(cfg)
        return cfg

    return build


def description(run: Path) -> dict[str, Any]:
    return json.loads((run / "model.json").read_text())


def copied(run: Path, to: Path, **changes: Any) -> Path:
    """The exported model of `run` in another folder, its description changed."""
    to.mkdir(parents=True)
    shutil.copy(run / "model.safetensors", to)
    (to / "model.json").write_text(json.dumps(description(run) | changes))
    return to


# ---- the VAE ----


def test_vae_of_a_run(compose: Compose, vae_run: Path) -> None:
    cfg = compose()
    assert (cfg.vae, cfg.vae_sha256) == (str(vae_run), description(vae_run)["sha256"])
    assert OmegaConf.to_container(cfg.model.vae) == description(vae_run)["architecture"]
    assert cfg.model.flow.latent_channels == 8
    assert plain(cfg).task.model.flow.latent_channels == 8


def test_vae_by_its_exported_weights_and_by_a_relative_path(
    compose: Compose, vae_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert compose(f"vae={vae_run}/model.safetensors").vae == str(vae_run)
    monkeypatch.chdir(vae_run.parent)
    assert compose(f"vae={vae_run.name}").vae == str(vae_run)


def test_latest_vae_is_the_one_exported_last_and_no_flow(
    compose: Compose, vae_run: Path, flow_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no trained VAE under outputs/: train one first"):
        compose("vae=latest")
    runs = [("vae_bezier/b", vae_run, 2000), ("vae_bezier/c", vae_run, 1000), ("flow_bezier/a", flow_run, 3000)]
    for name, run, exported in runs:
        folder = copied(run, tmp_path / "outputs" / name)
        os.utime(folder / "model.json", (exported, exported))
    assert compose("vae=latest").vae == str(tmp_path / "outputs/vae_bezier/b")


@pytest.mark.parametrize("flow", ["pillar", "dit"])
def test_vae_of_other_latents_is_refused(compose: Compose, flow: str) -> None:
    assert compose(f"model/flow={flow}", "model.flow.latent_channels=8").model.flow.latent_channels == 8
    with pytest.raises(UserError, match=r"latent_channels=7, but the VAE in .* has 8 latent channels"):
        compose(f"model/flow={flow}", "model.flow.latent_channels=7")


def test_description_that_would_run_a_foreign_function_is_refused(
    compose: Compose, vae_run: Path, tmp_path: Path
) -> None:
    marker = tmp_path / "marker"
    foreign = {"_target_": "pathlib.Path.touch", "self": {"_target_": "pathlib.Path", "_args_": [str(marker)]}}
    folder = copied(vae_run, tmp_path / "foreign", architecture=foreign)
    with pytest.raises(UserError, match="no model of ours"):
        compose(f"vae={folder}")
    assert not marker.exists()


def test_what_is_no_trained_vae_gets_one_line(
    command: Command,
    flow_options: tuple[str, ...],
    frozen_text: tuple[str, ...],
    vae_run: Path,
    flow_run: Path,
    tmp_path: Path,
) -> None:
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    shutil.copy(vae_run / "config.yaml", unfinished)
    damaged = copied(vae_run, tmp_path / "damaged")
    (damaged / "model.json").write_text("{")
    other = copied(vae_run, tmp_path / "other")
    (other / "model.json").write_text("{}")
    answers = {
        "null": "say which with vae=DIR",
        f"{tmp_path}/nothing": "there is no folder",
        str(unfinished): f"resume it: python -m fluxflow_train run={unfinished}",
        str(flow_run): "is a run of flow training",
        f"{vae_run}/checkpoints/last.ckpt": "give the run directory",
        f"{vae_run}/config.yaml": "give the run directory",
        str(damaged): "damaged",
        str(other): "no model of ours",
    }
    for given, answer in answers.items():
        code, output = command(
            "fluxflow_train", "+experiment=flow_bezier", *flow_options, *frozen_text, f"vae={given}",
            f"run={tmp_path / 'run'}",
        )  # fmt: skip
        assert (code, len(output.splitlines())) == (1, 1), output
        assert output.startswith("error: ")
        assert answer in output
    assert not (tmp_path / "run").exists()


# ---- matching ----


@pytest.mark.parametrize("overrides", [("activation=relu",), ("model/flow=dit",), ("activation.flow=swiglu",)])
@pytest.mark.parametrize("scale", ["tiny", "small"])
def test_components_are_matched_within_one_percent(
    config: Compose, vae_run: Path, wide_backbone_folder: Path, overrides: tuple[str, ...], scale: str
) -> None:
    """At the scale's own widths; the matched network is what the configuration now builds."""
    text = ("model/text=distilbert", f"model.text.backbone.checkpoint.path={wide_backbone_folder}")
    options = ("+experiment=flow_bezier", f"scale={scale}", f"vae={vae_run}", *text)
    cfg = config(*options, *overrides, small=False)
    bind_vae(cfg)
    matched = match_widths(cfg)
    assert matched is not None
    bezier = config(*options, small=False)
    bind_vae(bezier)
    assert match_widths(bezier) is None
    with torch.device("meta"):
        ours, theirs = (parameters(instantiate(plain(c).model)) for c in (cfg, bezier))
    assert theirs == parameters(matched[0])
    assert ours == parameters(matched[1])
    assert ours["vae"] == theirs["vae"]
    for part in ("text", "flow"):
        assert abs(ours[part] / theirs[part] - 1) < 0.01
    assert plain(cfg).task.model.flow.mlp_width == cfg.model.flow.mlp_width != cfg.scale.flow.mlp_width


@pytest.mark.parametrize(
    "overrides",
    [
        ("model.flow.depth=3",),
        ("model.flow.residual=false", "model.flow.text_tokens=pooled"),
        ("model/flow=dit", "model.flow.depth=3", "model.flow.width=64"),
    ],
)
def test_options_reach_the_bezier_arm_that_others_are_held_to(
    config: Compose, vae_run: Path, wide_backbone_folder: Path, overrides: tuple[str, ...]
) -> None:
    """Only the activation differs: the reference is what `+experiment=flow_bezier` with the same options builds."""
    text = ("model/text=distilbert", f"model.text.backbone.checkpoint.path={wide_backbone_folder}")
    options = ("scale=tiny", f"vae={vae_run}", *text)
    cfg = config("+experiment=flow_relu", *options, *overrides, small=False)
    bind_vae(cfg)
    matched = match_widths(cfg)
    own = [option for option in overrides if option != "model/flow=dit"]
    bezier = config("+experiment=flow_bezier", *options, *own, small=False)
    bind_vae(bezier)
    assert match_widths(bezier) is None
    with torch.device("meta"):
        expected = parameters(instantiate(plain(bezier).model))
    assert matched is not None and parameters(matched[0]) == expected
    assert abs(parameters(matched[1])["flow"] / expected["flow"] - 1) < 0.01


def test_a_text_encoder_of_the_arm_throughout_is_matched(config: Compose, vae_run: Path) -> None:
    options = (f"vae={vae_run}", "model/text=scratch")
    cfg = config("+experiment=flow_relu", *options, small=False)
    bind_vae(cfg)
    matched = match_widths(cfg)
    assert matched is not None
    reference, ours = (parameters(network) for network in matched[:2])
    assert abs(ours["text"] / reference["text"] - 1) < 0.01


def test_the_published_flow_has_nothing_to_match(config: Compose, vae_run: Path) -> None:
    cfg = config("+experiment=flow_bezier", f"vae={vae_run}", "model/flow=fluxflow080")
    bind_vae(cfg)
    assert match_widths(cfg) is None
    cfg = config("+experiment=flow_relu", f"vae={vae_run}", "model/flow=fluxflow080", small=False)
    bind_vae(cfg)
    matched = match_widths(cfg)
    assert matched is not None
    reference, ours = (parameters(network) for network in matched[:2])
    assert ours["flow"] == reference["flow"] and abs(ours["text"] / reference["text"] - 1) < 0.01


def test_flops_are_matched_too(config: Compose, vae_run: Path, frozen_text: tuple[str, ...]) -> None:
    from fluxflow_train.ablation.cost import flops

    cfg = config("+experiment=flow_relu", f"vae={vae_run}", *frozen_text, "match=flops", small=False)
    bind_vae(cfg)
    matched = match_widths(cfg)
    assert matched is not None
    reference, ours = (flops(network, instantiate(plain(cfg).matching.inputs)) for network in matched[:2])
    assert abs(ours["flow"] / reference["flow"] - 1) < 0.01


def test_nothing_is_matched_where_nobody_asks(compose: Compose) -> None:
    cfg = compose("match=none", experiment="flow_relu")
    assert match_widths(cfg) is None
    assert cfg.model.flow.mlp_width == cfg.scale.flow.mlp_width
    with pytest.raises(UserError, match="match is parameters, flops, latency or none, got size"):
        match_widths(compose("match=size"))


# ---- what composes ----


@pytest.mark.parametrize(
    ("overrides", "key", "value"),
    [
        (("model.flow.text_tokens=pooled",), "text_tokens", "pooled"),
        (("model.flow.pillar_layout=interleaved",), "pillar_layout", "interleaved"),
        (("model.flow.residual=false",), "residual", False),
        (("activation.flow=gelu",), "activation", "gelu"),
    ],
)
def test_options_reach_the_flow(compose: Compose, overrides: tuple[str, ...], key: str, value: Any) -> None:
    cfg = compose(*overrides, "match=none")
    assert plain(cfg).task.model.flow[key] == value
    with torch.device("meta"):
        network: Any = instantiate(plain(cfg).model)
    expected = {"text_tokens": network.flow.text_tokens, "residual": network.flow.blocks[0].residual}
    assert expected.get(key, value) == value


def test_the_outside_baseline_and_the_other_backbone_compose(compose: Compose) -> None:
    with torch.device("meta"):
        network: Any = instantiate(plain(compose("model/flow=dit")).model)
        assert isinstance(network.flow, DiT)
        network = instantiate(plain(compose(text=("model/text=scratch",))).model)
    assert not network.text.backbone.frozen
    assert plain(compose("objective=v_prediction")).task.objective.num_timesteps == 1000


# ---- other costs, other depths ----


def test_a_baseline_may_be_held_to_several_times_the_bezier_arm(config: Compose) -> None:
    cfg = config("+experiment=vae_relu", "match_ratio=2.5", small=False)
    matched = match_widths(cfg)
    assert matched is not None
    reference, ours = (parameters(network) for network in matched[:2])
    for part in ("encoder", "decoder", "total"):
        assert abs(ours[part] / reference[part] / 2.5 - 1) < 0.01
    bezier = config("+experiment=vae_bezier", "match_ratio=0.5", small=False)  # the arm itself, made smaller
    halved = match_widths(bezier)
    assert halved is not None
    assert abs(parameters(halved.network)["total"] / parameters(halved.reference)["total"] / 0.5 - 1) < 0.01


@pytest.mark.parametrize(("depth", "needs_width"), [(3, False), (6, False), (20, True)])
def test_a_baseline_of_another_depth(
    config: Compose, vae_run: Path, wide_backbone_folder: Path, depth: int, needs_width: bool
) -> None:
    """The MLPs' width makes up for the layers; where these alone are too large, the tokens' width gives way too."""
    text = ("model/text=distilbert", f"model.text.backbone.checkpoint.path={wide_backbone_folder}")
    options = (f"vae={vae_run}", *text, f"model.flow.depth={depth}", "matching.reference_options={flow:{depth:4}}")
    cfg = config("+experiment=flow_relu", *options, small=False)
    bind_vae(cfg)
    matched: Any = match_widths(cfg)
    reference, ours = (parameters(network) for network in matched[:2])
    assert abs(ours["flow"] / reference["flow"] - 1) < 0.01
    assert (len(matched.network.flow.blocks), len(matched.reference.flow.blocks)) == (depth, 4)
    assert (cfg.model.flow.width != cfg.scale.flow.width) == needs_width
    assert cfg.model.flow.width % (4 * cfg.model.flow.num_heads) == 0


def test_what_no_width_can_reach_is_refused(config: Compose) -> None:
    with pytest.raises(UserError, match=r"bring the parameters of decoder within 0\.10%") as error:
        match_widths(config("+experiment=vae_relu", "match_tolerance=0.001", "scale.vae.encoder_widths=[12,32,64]"))
    assert "\n" not in str(error.value)


def test_latency_is_measured_and_a_resumed_run_keeps_its_widths(config: Compose) -> None:
    """A wide tolerance: what is tested is that the search ends near it on any machine, however busy."""
    options = ("+experiment=vae_relu", "match=latency", "match_tolerance=0.8")
    cfg = config(*options, "scale.vae.encoder_widths=[16,32,64]", "scale.vae.decoder_widths=[64,32,16]")
    matched = match_widths(cfg)
    assert matched is not None and set(matched.residuals) == {"total"} and abs(matched.residuals["total"]) < 0.8
    assert all(width % cfg.scale.vae.norm_groups == 0 for width in cfg.model.encoder.widths)
    again = config(*options)
    assert match_widths(again, saved=cfg) is None
    assert again.model.encoder.widths == cfg.model.encoder.widths
    with pytest.raises(UserError, match=r"no widths bring the latency on cpu within 0\.00%"):
        match_widths(config("+experiment=vae_relu", "match=latency", "match_tolerance=0.0"))
