"""What became of every planned run, of every attempt that failed, and of the trials."""

from typing import Any

from fluxflow_train.ablation import tuning
from fluxflow_train.ablation.frozen import Frozen
from fluxflow_train.ablation.ledger import ENDS, Event
from fluxflow_train.ablation.plan import Run

Record = dict[str, Any]
KEPT = ("metric", "report_status", "learning_rate", "guidance", "seconds", "memory_mib", "images_seen")
KEPT += ("weights_sha256", "config_sha256", "host")


def trials_row(frozen: Frozen, curve: tuning.Curve) -> Record:
    assert frozen.plan.tuning is not None
    return {
        "arm": curve.arm,
        "size": curve.size,
        "key": frozen.plan.tuning.key,
        "points": [
            {**point.choice._asdict(), "mean": point.mean, "values": point.results, "runs": point.runs}
            for point in curve.points
        ],
        "chosen": None if curve.chosen is None else curve.chosen._asdict(),
        "edges": curve.edges,
    }


def run_row(frozen: Frozen, run: Run, events: list[Event], record: Record | None) -> Record:
    """What became of a planned run."""
    own = [event for event in events if event.run == run.name]
    failed = bool(own) and own[-1].event == "failed"
    network = frozen.networks[run.arm][run.size] if run.arm and run.size else frozen.vaes[run.vae or ""]
    return {
        "name": run.name,
        **run.place,
        "status": "finished" if record is not None else "failed" if failed else "pending",
        "attempts": sum(event.event == "begun" for event in own),
        "directory": f"runs/{run.name}",
        "parameters": network["parameters"],
        "command": "" if record is None else record["command"],
        **{key: None if record is None else record.get(key) for key in KEPT},
    }


def failures(events: list[Event]) -> list[Record]:
    """Every attempt that did not end with a result."""
    found = []
    for number, event in enumerate(events):
        if event.event in ENDS and event.event != "finished":
            again = any(later.run == event.run and later.event == "begun" for later in events[number:])
            row = {"run": event.run, "attempt": event.attempt, "event": event.event, "time": event.time}
            found.append(row | {"error": last_words(event.record["error"]), "retried": again})
    return found


def last_words(text: str) -> str:
    """The end of what a command wrote, on few lines."""
    return "\n".join(text.strip().splitlines()[-5:])
