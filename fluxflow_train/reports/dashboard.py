"""A study in W&B, made by code: a workspace to look around in, and a report that begins with the answer.

Both are built from the study's report without an account. Runs are found by what `ablation/wandb_names.py` calls them:
group (the study), job type (the phase), tags, and the labels in their config.
"""

import hashlib
from collections.abc import Sequence
from itertools import cycle
from typing import Any

from fluxflow_train.errors import UserError
from fluxflow_train.reports import dashboard_text as text

try:
    import wandb_workspaces.reports.v2.interface as wr
    import wandb_workspaces.workspaces as ws
    from wandb_workspaces.expr import And
except ImportError as error:
    raise UserError('the W&B dashboard needs wandb-workspaces: pip install "fluxflow-train[wandb]"') from error

PROJECT = "fluxflow"  # that of conf/logger/wandb.yaml
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito
AXES = {"images_seen": "images seen", "RelativeTime(Process)": "seconds"}
HEALTH = ("health/dead", "health/saturated", "health/outside", "health/grad_norm_spread", "health/variance_last")
TRAINING = ("train/loss", "train/grad_norm", "train/lr", "train/images_per_second")
FLOPS = "network_flops"
LABELS = {"arm": "arm", "size": "size", "vae_arm": "vae"}  # in a run's config, and in a cell of the report
MAX_RUNS = 100  # that a panel draws

# By kind of study: the protocol of the runs' own reports, and what is logged and reported under which name.
KINDS: dict[str, dict[str, Any]] = {
    "vae": {
        "protocol": "vae-reconstruction/v1",
        "parameters": "parameters",
        "quality": ("val/psnr", "val/ssim", "val/rate_nats"),
        "training": (*TRAINING, "train/psnr", "train/loss_kl", "train/rate_nats"),
        "final": ("psnr", "ssim", "rate_nats"),
    },
    "flow": {
        "protocol": "text-to-image/v1",
        "parameters": "parameters_flow",
        "quality": ("val/loss", "val/loss_t0", "val/loss_t1", "val/loss_t2", "val/loss_t3"),
        "training": TRAINING,
        "final": ("loss", "kid"),
    },
}


def workspace(study: dict[str, Any], entity: str = "", project: str = PROJECT) -> ws.Workspace:
    """The study's runs in groups by arm and size, an arm in one colour."""
    by = ["arm", "size", *(["vae_arm"] if study["vaes"] else [])]
    colours = arm_colours(study)
    paths: dict[object, object] = {arm: colour for arm, colour in colours.items()}
    paths |= {ws.GroupPath(*path): colours[path[0]] for path in groups(study, by)}
    summaries = [f"summary:{reported(study, name)}" for name in (*finals(study), kind(study)["parameters"])]
    words = [text.answer(study), text.ratios(study), text.targets(study)]
    sections = {
        "Answer": [wr.MarkdownPanel(markdown) for markdown in words],
        "Quality against size": scatters(study),
        **curves(study),
        "Pictures": [pictures(study)],
        "Runs": [wr.RunComparer(diff_only="split")],
    }
    view = ws.Workspace(
        entity=entity,
        project=project,
        name=f"Study {study['study']}",
        sections=[ws.Section(name=name, panels=panels, is_open=True) for name, panels in sections.items()],
        settings=ws.WorkspaceSettings(x_axis="images_seen", max_runs=MAX_RUNS),
        runset_settings=ws.RunsetSettings(
            filters=found_by(study),
            groupby=[ws.Config(key) for key in by],
            group_colors=paths,
            pinned_columns=["run:displayName", *summaries, "config:seed.value"],
        ),
    )
    view._internal_runset_id = stable_id(study, "runset")
    name_panels(study, "workspace", [panel for section in view.sections for panel in section.panels])
    return view


def report(study: dict[str, Any], entity: str = "", project: str = PROJECT) -> wr.Report:
    """The answer in words, the tables, then for each size the curves of its arms, and where all of it comes from."""
    grids = Grids(study, entity, project)
    blocks: list[Any] = [wr.MarkdownBlock(text.answer(study))]
    for title, told in {
        "Size ratio": text.ratios,
        "The project page's targets": text.targets,
        "Arms and sizes": text.cells,
        "Comparisons": text.comparisons,
    }.items():
        blocks += [wr.H1(title), wr.MarkdownBlock(told(study))]
    vae = ["vae_arm"] if study["vaes"] else []
    blocks += [wr.H1("Quality against size"), grids.grid(scatters(study), ["arm", "size", *vae])]
    seed = min((run["seed"] for run in study["runs"] if run["phase"] == "main"), default=0)
    for size in (entry["name"] for entry in study["sizes"]):
        blocks.append(wr.H1(f"Size {size}"))
        for title, panels in curves(study).items():
            blocks += [wr.H2(title), grids.grid(panels, ["arm", *vae], f"size:{size}")]
        one_each = grids.grid([pictures(study)], [], f"size:{size}", f"seed:{seed}")
        blocks += [wr.H2(f"The same inputs side by side, seed {seed}"), one_each]
    blocks += [wr.H1("Runs compared"), grids.grid([wr.RunComparer(diff_only="split")], [])]
    for title, told in {"Attempts that did not finish": text.failures, "Provenance": text.provenance}.items():
        blocks += [wr.H1(title), wr.MarkdownBlock(told(study))]
    return wr.Report(
        entity=entity,
        project=project,
        title=f"Study {study['study']}: {study['answer']['verdict']}"[:128],
        description=study["question"],
        blocks=blocks,
        width="fluid",
    )


def specification(study: dict[str, Any]) -> dict[str, Any]:
    """Both as the JSON that W&B stores; the same study gives the same."""
    models = {"workspace": workspace(study)._to_model(), "report": report(study)._to_model()}
    return {
        name: model.model_dump(mode="json", by_alias=True, exclude_none=True)  # as the library sends it
        for name, model in models.items()
    }


def publish(study: dict[str, Any], entity: str, project: str = PROJECT) -> dict[str, str]:
    """Save both, as new ones, to an account that `wandb login` knows; their addresses."""
    saved = {"workspace": workspace(study, entity, project).save(), "report": report(study, entity, project).save()}
    return {name: one.url for name, one in saved.items()}


# ---- names ----


def kind(study: dict[str, Any]) -> dict[str, Any]:
    return KINDS["flow" if study["vaes"] else "vae"]


def reported(study: dict[str, Any], name: str) -> str:
    """A result of the runs' own reports, or their "pictures", as W&B has it."""
    return f"{kind(study)['protocol']}/{name}"


def finals(study: dict[str, Any]) -> list[str]:
    """The results that are shown, the plan's metric first."""
    return list(dict.fromkeys([study["metric"]["name"], *kind(study)["final"]]))


def arm_colours(study: dict[str, Any]) -> dict[str, str]:
    """The candidate has the first."""
    arms = sorted(study["arms"], key=lambda arm: not arm["is_candidate"])
    return dict(zip((arm["name"] for arm in arms), cycle(COLOURS), strict=False))


def groups(study: dict[str, Any], by: Sequence[str]) -> list[tuple[str, ...]]:
    """The values of the labels `by` that occur together."""
    return list(dict.fromkeys(tuple(cell[LABELS[key]] for key in by) for cell in study["cells"]))


def found_by(study: dict[str, Any], *tags: str) -> And:
    """The runs that the study compares; of these, those with all `tags`."""
    group, phase = ws.Metric("Group") == study["provenance"]["group"], ws.Metric("JobType") == "main"
    return And(group, phase, *(ws.Tags().isin([tag]) for tag in tags))


def stable_id(study: dict[str, Any], *parts: Any) -> str:
    return hashlib.sha256("\n".join([study["provenance"]["group"], *map(str, parts)]).encode()).hexdigest()[:12]


def name_panels(study: dict[str, Any], where: str, panels: Sequence[Any]) -> None:
    """Give panels names of their own in place of the library's random ones."""
    for number, panel in enumerate(panels):
        panel._id = stable_id(study, where, number)


# ---- panels ----


def curves(study: dict[str, Any]) -> dict[str, list[Any]]:
    """By title: what is logged during training; quality begins with the plan's metric, where it is logged."""
    quality = sorted(kind(study)["quality"], key=lambda name: name != f"val/{study['metric']['name']}")
    return {
        "Quality against images seen": [line(name, "images_seen") for name in quality],
        "Quality against time": [line(name, "RelativeTime(Process)") for name in quality],
        "Training": [line(name, "images_seen") for name in kind(study)["training"]],
        "Health": [line(name, "images_seen") for name in HEALTH],
    }


def line(name: str, x: str) -> Any:
    """The mean of a group's runs, in the range of its seeds."""
    return wr.LinePlot(
        title=name,
        x=x,
        y=[name],
        title_x=AXES[x],
        groupby_aggfunc="mean",
        groupby_rangefunc="minmax",
        max_runs_to_show=MAX_RUNS,
    )


def scatters(study: dict[str, Any]) -> list[Any]:
    """Each result against parameters and FLOPs, on a logarithmic axis as the size ratio is read from."""
    sizes = {
        "parameters": wr.SummaryMetric(reported(study, kind(study)["parameters"])),
        "FLOPs per image": wr.Config(FLOPS),
    }
    return [
        wr.ScatterPlot(title=f"{name} against {label}", x=size, y=wr.SummaryMetric(reported(study, name)), log_x=True)
        for name in finals(study)
        for label, size in sizes.items()
    ]


def pictures(study: dict[str, Any]) -> Any:
    """A column for each run, a row for each input."""
    key = reported(study, "pictures")
    return wr.MediaBrowser(title="Pictures", media_keys=[key], mode="grid", grid_x_axis="run", grid_y_axis="index")


class Grids:
    """Makes the panel grids of a report, three panels in a row."""

    def __init__(self, study: dict[str, Any], entity: str, project: str):
        self.study, self.entity, self.project = study, entity, project
        self.count = 0

    def grid(self, panels: list[Any], by: Sequence[str], *tags: str) -> wr.PanelGrid:
        """Panels over the runs with `tags`, in groups by the labels `by`, each in its arm's colour."""
        self.count += 1
        for number, panel in enumerate(panels):
            wide = isinstance(panel, wr.MediaBrowser | wr.RunComparer)
            place = (0, 0, 24, 12) if wide else (number % 3 * 8, number // 3 * 6, 8, 6)
            panel.layout = wr.Layout(**dict(zip("xywh", place, strict=True)))
        name_panels(self.study, f"grid {self.count}", panels)
        runs = wr.Runset(
            entity=self.entity,
            project=self.project if self.entity else "",
            name="Runs",
            filters=found_by(self.study, *tags),
            groupby=[f"config.{key}" for key in by],
        )
        runs._id = stable_id(self.study, f"runs {self.count}")
        colours = arm_colours(self.study)
        labels = [wr.Config(key) for key in by]
        painted: dict[Any, Any] = {
            wr.RunsetGroup("Runs", tuple(map(wr.RunsetGroupKey, labels, values))): colours[values[0]]
            for values in (groups(self.study, by) if by else [])
        }
        return wr.PanelGrid(runsets=[runs], panels=panels, custom_run_colors=painted)
