"""A plan as it was frozen before its first run: its networks are solved, so every run is one exact command."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluxflow_train.ablation.ledger import Ledger
from fluxflow_train.ablation.plan import Plan, Run, expand
from fluxflow_train.ablation.plan_file import parse
from fluxflow_train.ablation.tuning import Choice
from fluxflow_train.cli import quoted
from fluxflow_train.errors import UserError

RUNS = "runs"  # the folder of the runs' directories


@dataclass(frozen=True)
class Frozen:
    """
    Args:
        networks: by arm and size, and by VAE: `overrides` (its widths), `cost` (on the axis that arms are matched by),
            `reference_cost` (of the Bezier arm), `residual`, `parameters`, `flops`, `activation_bytes`.
        origin: an id; when, by which code and on which machine it was frozen; the axis of sizes, the runs' precision.
    """

    plan: Plan
    networks: dict[str, dict[str, dict[str, Any]]]
    vaes: dict[str, dict[str, Any]]
    origin: dict[str, Any]

    @property
    def runs(self) -> list[Run]:
        return expand(self.plan)

    @property
    def group(self) -> str:
        """What the study's runs have in common in W&B, and no other study of the same plan has."""
        return f"{self.plan.name}-{self.origin['id']}"

    def cost(self, size: str) -> float:
        """Of the Bezier arm at that size, which all arms are held to."""
        return float(self.networks[self.plan.candidate][size]["reference_cost"])

    def tuned_size(self, size: str) -> str | None:
        """The tuned size nearest to `size`, by the logarithm of the cost; None where nothing is tuned."""
        if self.plan.tuning is None:
            return None
        return min(self.plan.tuning.sizes, key=lambda tuned: abs(math.log(self.cost(tuned) / self.cost(size))))

    def budget_images(self, run: Run) -> int:
        if run.phase == "vae" and self.plan.vaes is not None:
            return self.plan.vaes.budget_images
        if run.phase == "tune" and self.plan.tuning is not None:
            return self.plan.tuning.budget_images
        return self.plan.budget_images

    def overrides(self, run: Run, chosen: Choice | None, folder: Path) -> list[str]:
        """What stands behind `python -m fluxflow_train` for that run; `chosen`: by tuning, None where nothing is."""
        plan, tuning = self.plan, self.plan.tuning
        directory = folder / RUNS / run.name
        if run.phase == "vae":
            assert plan.vaes is not None and run.vae is not None
            own = [f"+experiment={plan.vaes.experiment}", *plan.vaes.overrides, *plan.vaes.arms[run.vae]]
            own += self.vaes[run.vae]["overrides"]
            split = plan.metric.split
        else:
            assert run.arm is not None and run.size is not None
            own = [f"+experiment={plan.experiment}", *plan.overrides, *plan.sizes[run.size], *plan.arms[run.arm]]
            own += self.networks[run.arm][run.size]["overrides"]
            split = "tune" if run.phase == "tune" else plan.metric.split
            if run.phase == "tune" and run.value is not None and tuning is not None:
                own.append(f"{tuning.key}={as_text(run.value)}")
                if tuning.guidance is not None:
                    own.append(f"evaluate.report.guidance_scales=[{','.join(map(as_text, tuning.guidance))}]")
            elif chosen is not None and tuning is not None:
                own.append(f"{tuning.key}={as_text(chosen.value)}")
                if chosen.guidance is not None:
                    own.append(f"task.sampler.guidance={as_text(chosen.guidance)}")
            if run.vae is not None:
                own.append(f"vae={quoted(str(folder / RUNS / 'vae' / f'{run.vae}-seed{run.seed}'))}")
        own.append(f"trainer.precision={self.origin['precision']}")  # on machines of any kind
        own.append(f"run_id={self.group}-{run.name.replace('/', '-')}")  # W&B's too
        own += ["match=none", f"seed={run.seed}", f"budget.images={self.budget_images(run)}", f"evaluate.split={split}"]
        return [*own, f"run={quoted(str(directory))}"]

    def record(self) -> dict[str, Any]:
        """What the ledger keeps of it."""
        return {"plan": self.plan.content, "networks": self.networks, "vaes": self.vaes, "origin": self.origin}


def as_text(value: float) -> str:
    return str(int(value)) if value.is_integer() else repr(value)


def read(ledger: Ledger) -> Frozen | None:
    """What the ledger's study was frozen as; None before that."""
    for event in ledger.events():
        if event.event == "frozen":
            record = event.record
            plan = parse(record["plan"], str(ledger.path))
            return Frozen(plan, record["networks"], record["vaes"], {**record["origin"], "time": event.time})
    return None


def refuse_another(frozen: Frozen, plan: Plan, folder: Path) -> None:
    """Raises UserError, naming the keys, where the folder holds another plan than the one that was asked for."""
    if frozen.plan.hash == plan.hash:
        return
    ours, theirs = plan.content, frozen.plan.content
    keys = [key for key in ours if ours[key] != theirs.get(key)]
    raise UserError(
        f"{folder} holds a study that was frozen with other {', '.join(keys)}: a plan can't change once it has begun; "
        "give the new one another name, or another dir=DIR"
    )
