"""The dashboard's specification, against the library's own models and against what runs really log."""

import copy
import importlib
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fluxflow_train.errors import UserError
from fluxflow_train.generation import Guidance, Settings
from fluxflow_train.records import CLOCK, read
from fluxflow_train.reports import flow_results
from fluxflow_train.reports.protocol import flow_protocol

pytest.importorskip("wandb_workspaces")

import wandb_workspaces.reports.v2.interface as wr
import wandb_workspaces.workspaces as ws
from wandb_workspaces.reports.v2 import internal as report_models
from wandb_workspaces.workspaces import internal as workspace_models

from fluxflow_train.ablation.plan import Run
from fluxflow_train.ablation.wandb_names import wandb_overrides
from fluxflow_train.reports import dashboard
from fluxflow_train.reports.dashboard import specification
from fluxflow_train.reports.wandb_log import numbers

ARMS, SIZES, SEEDS = ("relu", "bezier"), ("s", "m"), (3, 4)


def cell(arm: str, size: str, vae: str | None) -> dict[str, Any]:
    names = {"arm": arm, "size": size, "vae": vae}
    quality = {"n": 2, "mean": 21.3, "low": 21.0, "high": 21.6, "sd": 0.2, "runs": [f"main/{arm}-{size}-seed3"]}
    cost = {"parameters": 352100, "flops": 1.2e8, "activation_bytes": 1e7, "residual": None, "learning_rate": 0.002}
    return {**names, **quality, **cost, "seconds": 41.0, "images_per_second": 140.0, "memory_mib": None}


def a_study(vaes: list[str]) -> dict[str, Any]:
    """As ablation/analysis.py makes it, with hostile text and holes."""
    ends = {"low": -0.1, "high": 0.7}
    compared = {"arm": "bezier", "baseline": "relu", "vae": None, "n": 2, "difference": 0.4, **ends}
    ratio = {"arm": "bezier", "baseline": "relu", "vae": None, "n": 2, "ratio": 1.8, "low": 1.2, "high": None}
    fid = {"label": "FID", "unit": "", "published": ["<15", "<15"], "values": {"relu": None}, "note": "not measured"}
    names = vaes or [None]
    return {
        "schema": "study_report/v1",
        "study": "vae_size",
        "question": "Do Bezier activations give the same quality at fewer parameters?",
        "status": "partial",
        "counts": {"planned": 8, "finished": 7, "failed": 1, "pending": 0, "attempts": 9},
        "metric": {"name": "psnr", "label": "PSNR", "unit": "dB", "better": "higher", "split": "test"},
        "answer": {"verdict": "undecided", "headline": "Open.", "sentences": ["One.", "Two."], "rule": "R above 2"},
        "confidence": 0.95,
        "candidate": "bezier",
        "axis": {"label": "parameters", "unit": ""},
        "arms": [{"name": arm, "is_candidate": arm == "bezier"} for arm in ARMS],
        "sizes": [{"name": size, "cost": 1e5} for size in SIZES],
        "vaes": vaes,
        "cells": [cell(arm, size, vae) for arm in ARMS for size in SIZES for vae in names],
        "comparisons": [
            compared | {"size": size, "p_holm": 0.03, "margin": 0.3, "equivalent": equivalent, "detectable": None}
            for size, equivalent in (("s", False), (None, None))
        ],
        "ratios": [ratio | {"bounded": False, "note": "a | b"}],
        "targets": {"arms": list(ARMS), "hardware": "2 cores", "rows": [fid]},
        "failures": [
            {"run": "main/relu-m-seed4", "attempt": 1, "event": "failed", "time": "2026-11-28T01:02:03Z"}
            | {"error": "line | one\n<b>line two", "retried": True}
        ],
        "runs": [{"phase": "main", "seed": seed} for seed in SEEDS] + [{"phase": "tune", "seed": 0}],
        "provenance": {"plan_hash": "abc", "group": "vae_size-1", "git": {"commit": "0123", "dirty": False}},
        "warnings": ["one run is missing"],
    }


def nothing_yet() -> dict[str, Any]:
    """A study of which no run has finished."""
    lists: dict[str, Any] = {key: [] for key in ("cells", "comparisons", "ratios", "failures", "runs", "warnings")}
    return a_study([]) | lists | {"targets": None}


STUDIES = {"vae": a_study([]), "flow": a_study(["bezier", "relu"]), "nothing": nothing_yet()}


@pytest.fixture(params=STUDIES)
def study(request: pytest.FixtureRequest) -> dict[str, Any]:
    return copy.deepcopy(STUDIES[request.param])


def panels_of(part: Any) -> Iterator[dict[str, Any]]:
    """Every panel of a specification, wherever it stands."""
    if isinstance(part, dict):
        if "viewType" in part:
            yield part
        for value in part.values():
            yield from panels_of(value)
    elif isinstance(part, list):
        for value in part:
            yield from panels_of(value)


@pytest.fixture(autouse=True)
def without_account(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any call of the API is an error."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr("wandb.Api", refuse)
    monkeypatch.setattr("wandb_workspaces.reports.v2.interface.execute_graphql", refuse)


def test_the_specification_is_what_the_library_reads_and_writes(study: dict[str, Any]) -> None:
    told = specification(study)
    assert specification(copy.deepcopy(study)) == told  # nothing in it is random
    loaded = json.loads(json.dumps(told, allow_nan=False))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a block that its model refuses is only warned of
        view = workspace_models.View.model_validate(loaded["workspace"])
        page = report_models.ReportViewspec.model_validate(loaded["report"])
        again = ws.Workspace._from_model(view)
        report = wr.Report._from_model(page)
    report.width = "fluid"  # which the library forgets
    assert dumped(view) == dumped(again._to_model()) == loaded["workspace"]
    assert dumped(report._to_model()) == loaded["report"]
    assert without_comments(dumped(page)) == loaded["report"]


def dumped(model: Any) -> Any:
    return model.model_dump(mode="json", by_alias=True, exclude_none=True)


def without_comments(part: Any) -> Any:
    """Without the empty lists that the library makes of absent comments while it reads."""
    if isinstance(part, dict):
        return {key: without_comments(value) for key, value in part.items() if (key, value) != ("inlineComments", [])}
    return [without_comments(value) for value in part] if isinstance(part, list) else part


def test_no_panel_or_block_is_of_a_kind_that_the_library_does_not_know(study: dict[str, Any]) -> None:
    told = specification(study)
    kinds = {panel["viewType"] for panel in panels_of(told)}
    assert kinds <= set(report_models.panel_type_mapping)
    blocks = report_models.ReportViewspec.model_validate(told["report"]).spec.blocks
    assert not any(isinstance(block, report_models.UnknownBlock) for block in blocks)
    grids = [block for block in blocks if isinstance(block, report_models.PanelGrid)]
    identities = [panel["__id__"] for panel in panels_of(told)]
    assert grids and len(set(identities)) == len(identities)


def names_in(told: dict[str, Any]) -> tuple[set[str], set[str], set[str]]:
    """What the panels draw: scalars over time, values of the summary or the config, pictures."""
    logged: set[str] = set()
    final: set[str] = set()
    media: set[str] = set()
    for panel in panels_of(told):
        config = panel["config"]
        if panel["viewType"] == "Run History Line Plot":
            logged |= {config["xAxis"], *config["metrics"]}
        elif panel["viewType"] == "Scatter Plot":
            final |= {config["xAxis"], config["yAxis"]}
        elif panel["viewType"] == "Media Browser":
            media |= set(config["mediaKeys"])
    return logged, final, media


@pytest.mark.parametrize("vaes", [[], ["bezier"]], ids=["vae", "flow"])
def test_every_curve_is_logged_by_a_real_run(vaes: list[str], request: pytest.FixtureRequest) -> None:
    run: Path = request.getfixturevalue("flow_run" if vaes else "vae_run")
    columns = set(read(run / "metrics.csv")[0])
    logged, _, _ = names_in(specification(a_study(vaes)))
    assert CLOCK in logged
    assert logged - columns - {"_runtime"} <= set(dashboard.HEALTH)


def test_every_final_number_is_in_the_summary_or_the_config(report: dict[str, Any]) -> None:
    _, final, media = names_in(specification(a_study([])))
    run = Run("main/bezier-s-seed3", "main", "bezier", "s", None, 3, None, ())
    overrides = wandb_overrides("vae_size", "vae_size-1", run, parameters=1, flops=2.0)
    summary = {f"summary:{name}" for name in numbers(report)}
    assert final - summary == {f"config:{dashboard.FLOPS}.value"}
    assert f",{dashboard.FLOPS}:2.0}}" in overrides[-1]
    assert media == {f"{report['protocol']['id']}/pictures"}


def test_a_flow_report_has_the_final_numbers_too() -> None:
    settings = Settings("euler", 1, Guidance(1.0, (0.0, 1.0), 0.0), 32, 32, 0, 1)
    features = {name: torch.rand(8, 4) for name in ("real", "drawn", *flow_results.RIVALS)}
    results = [
        *flow_results.loss_results({}, 1, 1.0, None),
        *flow_results.kid_results(features, torch.rand(32, 4), 0)[0],
        *flow_results.cost_results(nn.ModuleDict({"flow": nn.Linear(2, 2)}), 1.0, 1, ""),
    ]
    name = flow_protocol("test", settings, 1)["id"]
    _, final, media = names_in(
        specification(a_study(["bezier"]) | {"metric": {"name": "kid", "label": "KID", "unit": ""}})
    )
    assert final - {f"summary:{name}/{entry['name']}" for entry in results} == {f"config:{dashboard.FLOPS}.value"}
    assert media == {f"{name}/pictures"}


def test_runs_are_those_of_the_study_and_an_arm_has_one_colour() -> None:
    told = specification(a_study([]))
    section = told["workspace"]["spec"]["section"]
    [runs] = section["runSets"]
    wanted = [(item["key"]["name"], item["value"]) for item in runs["filters"]["filters"]]
    assert wanted == [("group", "vae_size-1"), ("jobType", "main")]
    assert [key["name"] for key in runs["grouping"]] == ["arm.value", "size.value"]
    assert set(section["customRunColors"].values()) == set(dashboard.COLOURS[:2])
    assert len(section["customRunColors"]) == len(ARMS) * (1 + len(SIZES))
    grids = [block["metadata"] for block in told["report"]["spec"]["blocks"] if block["type"] == "panel-grid"]
    colours: dict[str, set[str]] = {arm: set() for arm in ARMS}
    for grid in grids:
        for key, colour in grid["customRunColors"].items():
            [arm] = [arm for arm in ARMS if f"arm.value:{arm}" in key]
            colours[arm].add(colour)
    assert colours == {"bezier": {dashboard.COLOURS[0]}, "relu": {dashboard.COLOURS[1]}}
    tags = [item["value"] for item in grids[-2]["runSets"][0]["filters"]["filters"][2:]]
    assert tags == [["size:m"], ["seed:3"]]


def test_the_report_begins_with_the_answer_and_hides_nothing() -> None:
    blocks = specification(a_study([]))["report"]["spec"]["blocks"]
    texts = [block["content"] for block in blocks if block["type"] == "markdown-block"]
    assert texts[0].startswith("**Open.**") and "R above 2" in texts[0] and "7 of 8 runs finished" in texts[0]
    whole = "\n".join(texts)
    assert "| bezier | relu | – | 1.8 | 1.2 to –, unbounded | 2 | a \\| b |" in whole
    assert "line \\| one &lt;b>line two" in whole
    assert "one run is missing" in whole
    for table in texts:
        rows = [line for line in table.splitlines() if line.startswith("|")]
        assert len({line.replace("\\|", "").count("|") for line in rows}) <= 1


def test_publishing_saves_both_under_the_entity(monkeypatch: pytest.MonkeyPatch, study: dict[str, Any]) -> None:
    saved: list[tuple[str, str]] = []

    def save(self: Any) -> Any:
        saved.append((self.entity, self.project))
        return self

    for kind in (ws.Workspace, wr.Report):
        monkeypatch.setattr(kind, "save", save)
        monkeypatch.setattr(kind, "url", "https://example.org")
    assert set(dashboard.publish(study, "team", "p")) == {"workspace", "report"}
    assert saved == [("team", "p")] * 2


def test_without_the_library_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2.interface", None)
    with pytest.raises(UserError, match=r"pip install \"fluxflow-train\[wandb\]\""):
        importlib.reload(dashboard)
    monkeypatch.undo()
    importlib.reload(dashboard)


def test_hydra_reads_the_names_of_runs(config: Callable[..., Any]) -> None:
    names = ("main/be-zier_1.5:x-s-seed0", "tune/123", "vae/bezier-seed0")
    for name in names:
        run = Run(name, "main", "bezier", "1e3", None, 0, 0.002, ())
        cfg = config(
            "+experiment=vae_bezier", "logger=wandb", *wandb_overrides("42", "42-7", run, parameters=7, flops=1.5e8)
        )
        wandb = cfg.logger.wandb
        assert (wandb.group, wandb.name, wandb.job_type) == ("42-7", name, "main")
        assert list(wandb.tags) == ["study:42", "arm:bezier", "size:1e3", "seed:0"]
        assert wandb.labels == {
            "study": "42", "arm": "bezier", "size": "1e3", "seed": 0, "tuned": 0.002,
            "network_parameters": 7, "network_flops": 1.5e8,
        }  # fmt: skip
