"""Makes the missing runs of a study, each by the ordinary training command in a process of its own.

Any number of workers, on any number of machines that share the folder, divide the runs by locks, which the system
frees when a process dies. A run that was stopped or killed goes on from its checkpoint.
"""

import os
import platform
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from fluxflow_train import preemption
from fluxflow_train.ablation.collecting import collect
from fluxflow_train.ablation.frozen import RUNS, Frozen
from fluxflow_train.ablation.ledger import FILE_NAME, Ledger
from fluxflow_train.ablation.plan import Run
from fluxflow_train.ablation.tuning import Choice, choose, chosen, key_of, outcomes
from fluxflow_train.data.lock import taken
from fluxflow_train.errors import EXIT_STOPPED, Stopped, UserError

POLL = 0.2  # seconds
WAIT = 5.0  # seconds between looks at what other workers do
TAIL = 4000  # characters of a failed command's words that are kept
SICK = 4  # different runs that fail on a machine one after another
LAUNCHER = (
    "SLURM_STEP",
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_NTASKS",
    "SLURM_NPROCS",
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
)
LOG = "study.log"  # in the run's directory: what its command said

Say = Callable[[str], None]


class Worker:
    """Makes one run after another until none is left that it could make.

    Args:
        extra: overrides of where and how, for every run, as trainer= or data.root=: no part of the plan.
        names: the overrides that a run has beside them, by run.
        threads: of each run; None leaves it to torch.
        gpu: the one that its runs see, as CUDA_VISIBLE_DEVICES names it; None: all that this process sees.
        attempts: how often a run may fail, over all workers and sessions.
    """

    def __init__(
        self,
        frozen: Frozen,
        folder: Path,
        extra: list[str],
        names: Callable[[Run], list[str]],
        threads: int | None,
        gpu: str | None,
        attempts: int,
        say: Say,
    ):
        self.frozen, self.folder, self.extra, self.names = frozen, folder, extra, names
        self.threads, self.gpu, self.attempts, self.say = threads, gpu, attempts, say
        self.ledger = Ledger(folder / FILE_NAME)
        self.failed_here: list[str] = []  # since the last success

    def work(self) -> None:
        """
        Raises:
            Stopped: a signal came; what was begun is saved.
            UserError: several runs failed here, one after another: this machine, rather than they, is not well.
        """
        idle = 0
        while True:
            preemption.check()
            finished, failures = self.ledger.finished(), self.ledger.failures()
            states = [(run, self.state(run, finished, failures)) for run in self.frozen.runs]
            if any(self.claim(run) for run, state in states if state == "ready"):
                idle = 0
                continue  # what it made may have made earlier runs ready
            blocked = any(state == "blocked" for _, state in states)
            if not blocked and not any(self.is_orphan(run) for run, state in states if state == "ready"):
                return  # what is ready, others make
            # Another worker between two runs holds none for a moment.
            idle = 0 if self.others_work(finished) else idle + 1
            if idle > 2:
                return
            for _ in range(int(WAIT / POLL)):
                preemption.check()
                time.sleep(POLL)

    def is_over(self) -> bool:
        """Whether no run is left that anybody could make."""
        finished, failures = self.ledger.finished(), self.ledger.failures()
        over = ("done", "exhausted", "hopeless")
        return all(self.state(run, finished, failures) in over for run in self.frozen.runs)

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
        if run.phase == "main" and self.frozen.plan.tuning is not None and self.choice(run) is None:
            return "hopeless"
        return "ready"

    def choice(self, run: Run) -> Choice | None:
        """What was tuned for a run that is compared, its trials over: chosen once, for all workers and seeds."""
        size = None if run.size is None else self.frozen.tuned_size(run.size)
        if run.phase != "main" or run.arm is None or size is None:
            return None
        key = key_of(run.arm, size)
        if (record := self.ledger.records("chosen", (key,)).get(key)) is not None:
            return Choice(record["value"], record["guidance"])
        trials = tuple(trial.name for trial in self.frozen.runs if (trial.phase, trial.arm) == ("tune", run.arm))
        plan, finished = self.frozen.plan, self.ledger.records("finished", trials)
        found = choose(plan, {name: outcomes(plan, record) for name, record in finished.items()}, {})
        choice = chosen(found, run.arm, size)
        if choice is None:
            return None
        try:
            self.ledger.add("chosen", key, None, {"arm": run.arm, "size": size, **choice._asdict()})
        except sqlite3.IntegrityError:  # another worker was first
            record = self.ledger.records("chosen", (key,))[key]
            return Choice(record["value"], record["guidance"])
        return choice

    def others_work(self, finished: set[str]) -> bool:
        """Whether another worker holds a run that is not done: something is worth waiting for."""
        for run in self.frozen.runs:
            if run.name not in finished and (path := self.lock(run)).exists():
                with path.open("a") as file:
                    if not taken(file):
                        return True
        return False

    def is_orphan(self, run: Run) -> bool:
        """Whether a run goes on although the worker that began it was killed: nobody else would write down its end."""
        path = self.lock(run)
        host, _, process = path.read_text().partition(" ") if path.exists() else ("", "", "")
        if host != platform.node():
            return False
        try:
            os.kill(int(process), 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        return False

    def lock(self, run: Run) -> Path:
        return self.folder / "locks" / f"{run.name.replace('/', '-')}.lock"

    def claim(self, run: Run) -> bool:
        """Make the run, unless another worker does.

        Raises:
            UserError: the folder's file system knows no locks.
        """
        path = self.lock(run)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            try:
                if not taken(file):
                    return False
            except OSError as error:
                raise UserError(
                    f"{path} can't be locked ({error.strerror}): give a dir=DIR whose disk knows flock"
                ) from error
            file.truncate(0)
            file.write(f"{platform.node()} {os.getpid()}")
            file.flush()
            # Another may have made it, or failed at it, in between.
            if self.state(run, self.ledger.finished(), self.ledger.failures()) == "ready":
                self.make(run, file.fileno())
        return True

    def make(self, run: Run, lock: int) -> None:
        last = self.ledger.last(run.name)
        if last is not None and last.event == "begun":  # its lock was free
            self.ledger.add("killed", run.name, last.attempt, {"error": "the worker was killed, or its machine went"})
        attempt = 1 if last is None else (last.attempt or 0) + 1
        choice = self.choice(run)
        about = {
            **run.place,
            "learning_rate": choice.value if choice is not None else run.value,
            "guidance": None if choice is None else choice.guidance,
            "directory": f"{RUNS}/{run.name}",
            "host": platform.node(),
        }
        overrides = [*self.frozen.overrides(run, choice, self.folder), *self.extra, *self.names(run)]
        self.ledger.add("begun", run.name, attempt, {**about, "overrides": overrides})
        started = time.monotonic()
        directory = self.folder / RUNS / run.name
        code, said = self.train(directory, overrides, lock)
        about["wall_seconds"] = round(time.monotonic() - started, 2)
        if code == 0:
            try:
                metric = None if run.phase == "vae" else self.frozen.plan.metric.name
                found = collect(directory, metric, self.frozen.budget_images(run))
                self.ledger.add("finished", run.name, attempt, about | found)
                self.failed_here.clear()
                measured = "finished" if metric is None else f"{metric} {found['metric']:.5g}"
                self.say(f"{run.name}: {measured} in {about['wall_seconds']:.0f} s")
                return
            except (ValueError, OSError) as error:  # no whole report, no metric, a number that is not finite
                said = f"{said}\n{error}"
        about |= {"code": code, "error": said[-TAIL:]}
        if code == EXIT_STOPPED or preemption.noted():
            self.ledger.add("stopped", run.name, attempt, about)
            raise Stopped(f"{run.name} was stopped, saved: the same command goes on from here")
        self.ledger.add("failed", run.name, attempt, about)
        if run.phase != "tune":  # a rate at which arm after arm diverges is a result
            self.failed_here.append(run.name)
        words = said.strip().splitlines()[-1] if said.strip() else "without a word, as where memory ran out"
        self.say(f"{run.name}: failed (exit code {code}): {words}")
        if len(set(self.failed_here)) >= SICK:
            raise UserError(
                f"{len(set(self.failed_here))} different runs failed here one after another, the last with {words!r}: "
                f"put {platform.node()} right, then give the same command again with attempts={self.attempts + 1}"
            )

    def train(self, directory: Path, overrides: list[str], lock: int) -> tuple[int, str]:
        """The command's exit code and what it wrote. It inherits the lock, so the claim lasts as long as it does."""
        directory.mkdir(parents=True, exist_ok=True)
        # A job step's ranks are the worker's, not the run's.
        environment = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHER)}
        if self.gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpu
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
            worker.say(str(error))

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
