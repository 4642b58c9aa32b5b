"""What a study's run is called in W&B, as overrides of `logger=wandb`; `reports/dashboard.py` finds the runs by it."""

from fluxflow_train.ablation.plan import Run
from fluxflow_train.cli import quoted


def wandb_overrides(study: str, group: str, run: Run, *, parameters: int | None, flops: float | None) -> list[str]:
    """Each one argument of the training command: the run's group, name, job type, tags, and labels for its config.

    Args:
        study, group: the plan's name, and that of this study of it.
        parameters, flops: of the network that the study sizes, flops for one image; None where they are not known.
    """
    place = {"study": study, "arm": run.arm, "size": run.size, "vae_arm": run.vae, "seed": run.seed}
    numbers = {"tuned": run.value, "network_parameters": parameters, "network_flops": flops}
    tags = [quoted(f"{key}:{value}") for key, value in place.items() if value is not None]
    known = {key: value for key, value in {**place, **numbers}.items() if value is not None}
    labels = [f"{key}:{quoted(value) if isinstance(value, str) else value}" for key, value in known.items()]
    return [
        f"logger.wandb.group={quoted(group)}",
        f"logger.wandb.name={quoted(run.name)}",
        f"logger.wandb.job_type={quoted(run.phase)}",
        f"logger.wandb.tags=[{','.join(tags)}]",
        f"++logger.wandb.labels={{{','.join(labels)}}}",  # ++ because the keys are new
    ]
