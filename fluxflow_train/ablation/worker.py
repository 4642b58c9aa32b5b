"""Makes the missing runs of a study, each by the ordinary training command in a process of its own.

Any number of workers, on any number of machines that share the folder, divide the runs by locks, which the system
frees when a process dies. A run that was stopped or killed goes on from its checkpoint.
"""

import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fluxflow_train import preemption
from fluxflow_train.ablation.collecting import collect
from fluxflow_train.ablation.frozen import RUNS, Frozen
from fluxflow_train.ablation.ledger import FILE_NAME, Ledger
from fluxflow_train.ablation.plan import Run
from fluxflow_train.ablation.tuning import choose, chosen
from fluxflow_train.data.lock import taken
from fluxflow_train.errors import EXIT_STOPPED, Stopped, UserError

POLL = 0.2  # seconds
WAIT = 5.0  # seconds between looks at what other workers do
TAIL = 4000  # characters of a failed command's words that are kept
LOG = "study.log"  # in the run's directory: what its command said

Say = Callable[[str], None]


class Worker:
    """Makes one run after another until none is left that it could make.

    Args:
        extra: overrides of where and how, for every run, as trainer= or data.root=: no part of the plan.
        names: the overrides that a run has beside them, by run.
        threads: of each run; None leaves it to torch.
        attempts: how often a run may fail, over all workers and sessions.
    """

    def __init__(
        self,
        frozen: Frozen,
        folder: Path,
        extra: list[str],
        names: Callable[[Run], list[str]],
        threads: int | None,
        attempts: int,
        say: Say,
    ):
        self.frozen, self.folder, self.extra, self.names = frozen, folder, extra, names
        self.threads, self.attempts, self.say = threads, attempts, say
        self.ledger = Ledger(folder / FILE_NAME)
        self.trials = tuple(run.name for run in frozen.runs if run.phase == "tune")

    def work(self) -> None:
        """Raises Stopped where a signal came; what was begun is saved."""
        idle = 0
        while True:
            preemption.check()
            finished, failures = self.ledger.finished(), self.ledger.failures()
            states = [(run, self.state(run, finished, failures)) for run in self.frozen.runs]
            if any(self.claim(run) for run, state in states if state == "ready"):
                idle = 0
                continue  # what it made may have made earlier runs ready
            if not any(state in ("ready", "blocked") for _, state in states):
                return
            # Another worker between two runs holds none for a moment.
            idle = 0 if self.others_work(finished) else idle + 1
            if idle > 2:
                return
            for _ in range(int(WAIT / POLL)):
                preemption.check()
                time.sleep(POLL)

    def state(self, run: Run, finished: set[str], failures: dict[str, int]) -> str:
        """done, exhausted, ready, blocked (needs runs that may yet come) or hopeless (needs runs that failed)."""

        def exhausted(name: str) -> bool:
            return name not in finished and failures.get(name, 0) >= self.attempts

        if run.name in finished:
            return "done"
        if exhausted(run.name):
            return "exhausted"
        for name in run.needs:
            # A trial that fails is a result; a VAE that fails leaves nothing to train a flow on.
            if exhausted(name) and not name.startswith("tune/"):
                return "hopeless"
            if name not in finished and not exhausted(name):
                return "blocked"
        if run.phase == "main" and self.frozen.plan.tuning is not None and self.value(run) is None:
            return "hopeless"
        return "ready"

    def value(self, run: Run) -> float | None:
        """The tuned value of a run that is compared."""
        if run.phase != "main" or run.size is None or run.arm is None or not self.trials:
            return None
        results = {name: record["metric"] for name, record in self.ledger.records("finished", self.trials).items()}
        return chosen(choose(self.frozen.plan, results), run.arm, self.frozen.tuned_size(run.size))

    def others_work(self, finished: set[str]) -> bool:
        """Whether another worker holds a run that is not done: something is worth waiting for."""
        for run in self.frozen.runs:
            if run.name not in finished and (path := self.lock(run)).exists():
                with path.open("a") as file:
                    if not taken(file):
                        return True
        return False

    def lock(self, run: Run) -> Path:
        return self.folder / "locks" / f"{run.name.replace('/', '-')}.lock"

    def claim(self, run: Run) -> bool:
        """Make the run, unless another worker does."""
        path = self.lock(run)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            if not taken(file):
                return False
            if run.name in self.ledger.finished():  # another made it in between
                return True
            self.make(run, file.fileno())
        return True

    def make(self, run: Run, lock: int) -> None:
        last = self.ledger.last(run.name)
        if last is not None and last.event == "begun":  # its lock was free
            self.ledger.add("killed", run.name, last.attempt, {"error": "the process was killed, or its machine went"})
        attempt = 1 if last is None else (last.attempt or 0) + 1
        value = self.value(run)
        about = {
            "phase": run.phase,
            "arm": run.arm,
            "size": run.size,
            "seed": run.seed,
            "vae": run.vae,
            "value": run.value,
            "learning_rate": run.value if run.phase == "tune" else value,
            "directory": f"{RUNS}/{run.name}",
            "host": platform.node(),
        }
        overrides = [*self.frozen.overrides(run, value, self.folder), *self.extra, *self.names(run)]
        self.ledger.add("begun", run.name, attempt, {**about, "overrides": overrides})
        started = time.monotonic()
        code, said = self.train(self.folder / RUNS / run.name, overrides, lock)
        about["wall_seconds"] = round(time.monotonic() - started, 2)
        if code == 0:
            try:
                record = about | collect(self.folder / RUNS / run.name, self.frozen.plan.metric.name)
            except UserError as error:
                code, said = 1, str(error)
            else:
                self.ledger.add("finished", run.name, attempt, record)
                metric = self.frozen.plan.metric
                self.say(f"{run.name}: {metric.name} {record['metric']:.5g} in {about['wall_seconds']:.0f} s")
                return
        if code == EXIT_STOPPED or preemption.noted():
            self.ledger.add("stopped", run.name, attempt, {**about, "code": code, "error": said[-TAIL:]})
            raise Stopped(f"{run.name} was stopped, saved: the same command goes on from here")
        event = "killed" if code == -signal.SIGKILL else "failed"
        self.ledger.add(event, run.name, attempt, {**about, "code": code, "error": said[-TAIL:]})
        self.say(f"{run.name}: {event} (exit code {code}): {said.strip().splitlines()[-1] if said.strip() else ''}")

    def train(self, directory: Path, overrides: list[str], lock: int) -> tuple[int, str]:
        """The command's exit code and what it wrote. It inherits the lock, so the claim lasts as long as it does."""
        directory.mkdir(parents=True, exist_ok=True)
        environment = dict(os.environ)
        if self.threads is not None:
            environment["OMP_NUM_THREADS"] = str(self.threads)
        path = directory / LOG
        with path.open("w") as said:
            process = subprocess.Popen(
                [sys.executable, "-m", "fluxflow_train", *overrides],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=(lock,),
                start_new_session=True,  # Ctrl-C comes to us, and we tell it
            )
            told = False
            while process.poll() is None:
                if preemption.noted() and not told:
                    process.send_signal(signal.SIGTERM)
                    told = True
                time.sleep(POLL)
        return process.returncode, path.read_text(errors="replace")


def work_together(workers: list[Worker]) -> None:
    """All workers at once, each in a thread. Raises what the first of them raised, once all have ended."""
    errors: list[BaseException] = []

    def body(worker: Worker) -> None:
        try:
            worker.work()
        except BaseException as error:  # handed to the caller: a thread has none to raise it to
            errors.append(error)

    threads = [threading.Thread(target=body, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            thread.join(POLL)  # so that the main thread hears signals
    if errors:
        raise errors[0]


def progress(frozen: Frozen, ledger: Ledger, attempts: int) -> dict[str, int]:
    """How many runs have finished, failed for good, and are still to come."""
    finished, failures = ledger.finished(), ledger.failures()
    states: Counter[str] = Counter()
    for run in frozen.runs:
        failed = failures.get(run.name, 0) >= attempts
        states["finished" if run.name in finished else "failed" if failed else "pending"] += 1
    return {state: states[state] for state in ("finished", "failed", "pending")}


def results(ledger: Ledger) -> dict[str, dict[str, Any]]:
    """The record of every finished run, by name."""
    return {event.run: event.record for event in ledger.events() if event.event == "finished" and event.run}
