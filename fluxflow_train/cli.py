"""Hydra's entry point, with answers on one line. Nothing here may import torch: `--help` must be quick."""

import difflib
import errno
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from fluxflow_train.errors import EXIT_STOPPED, Stopped, UserError

USERS = (HydraException, OmegaConfBaseException, ValueError, OSError)  # where the user may be the cause
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)


def config_folder() -> Path:
    """`conf/`: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).parent
    return next(folder for folder in (package / "conf", package.parent / "conf") if folder.is_dir())


def command(config_name: str) -> Callable[[Callable[[DictConfig], None]], Callable[[], None]]:
    """Make `body(cfg)` a command over `conf/<config_name>.yaml`.

    What the user can put right is answered by one line and exit code 1 (2 for the command line itself). Exit code 85
    says that the command was asked to end and the same one goes on, 130 that Ctrl-C ended it at once. Anything else is
    a defect and keeps its traceback. HYDRA_FULL_ERROR=1 shows every traceback.
    """

    def decorate(body: Callable[[DictConfig], None]) -> Callable[[], None]:
        def main() -> None:
            show_all = os.environ.get("HYDRA_FULL_ERROR") == "1"
            os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then hands its exceptions on instead of printing them
            failed: list[Exception] = []
            stopped: list[Stopped] = []

            def run(cfg: DictConfig) -> None:
                try:
                    body(cfg)
                except USERS as error:  # kept from Hydra, which would print lines of its own
                    if HydraConfig.get().mode == RunMode.MULTIRUN:  # a launcher must see that its job failed
                        raise
                    failed.append(error)
                except Stopped as error:
                    stopped.append(error)

            try:
                hydra.main(version_base="1.3", config_path=str(config_folder()), config_name=config_name)(run)()
            except KeyboardInterrupt:
                sys.exit(130)
            except USERS as error:
                if show_all:
                    raise
                print(f"error: {one_line(error)}{suggestion(error)}", file=sys.stderr)
                sys.exit(2)
            if stopped:
                if str(stopped[0]):
                    print(stopped[0], file=sys.stderr)
                sys.exit(EXIT_STOPPED)
            for error in failed:
                answer = explain(error)
                if show_all or answer is None:
                    raise error
                print(answer, file=sys.stderr)
            if failed:
                sys.exit(1)

        return main

    return decorate


def explain(error: BaseException) -> str | None:
    """The line for an error of the user's while a command runs; None where it is a defect."""
    instantiating = isinstance(error, HydraException)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return f"error: {cause}"
        if isinstance(cause, OSError) and cause.errno in UNWRITABLE:
            where = cause.filename or "the output folder"
            return f"error: cannot write {where}: {cause.strerror}; make room, or choose another place with run=DIR"
        if instantiating and cause.__cause__ is None and cause.__context__ is None:  # a constructor's own words
            return f"error: {one_line(cause)}"
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, OmegaConfBaseException):
        return f"error: {one_line(error)}"
    return None


def one_line(error: BaseException) -> str:
    """A paragraph of Hydra's as a sentence: without its advice on `+`, its lists and its line breaks."""
    cause: BaseException | None = error
    while cause is not None and not str(cause).strip():
        cause = cause.__cause__ or cause.__context__
    lines = [line.strip() for line in str(cause).strip().splitlines()]
    ended = [i for i, line in enumerate(lines) if not line or line.startswith(("full_key", "object_type", "Set the"))]
    kept = lines[: ended[0]] if ended and ended[0] else lines
    return " ".join(line for line in kept if not line.startswith(("To append", "See https://hydra.cc")))


def suggestion(error: BaseException) -> str:
    """The nearest valid name to the one that Hydra did not find."""
    text = str(error)
    if "LexerNoViableAlt" in f"{type(error).__name__} {text}":
        return """ Quote a value with spaces or letters beyond ASCII twice: "prompts=['red heart', '红心']\""""
    if "mismatched input" in text or "token recognition" in text:
        return """ Quote a value that has { } , = or spaces twice: "data.train='/data/train-{000..099}.tar'\""""
    option = re.search(r"Could not find '([^']+)'", text)
    if option and "Available options" in text:
        group, _, name = option[1].rpartition("/")
        names = re.findall(r"^\t(\S+)$", text, re.MULTILINE)
        near = difflib.get_close_matches(name, names, n=1) or [", ".join(names)]
        return f" Did you mean {group}={near[0]}?" if near[0] in names else f" There are: {near[0]}"
    key = re.search(r"Could not override '([^']+)'|Key '([^']+)' is not in struct", text)
    if key:
        wanted = (key[1] or key[2]).lstrip("+")
        if (config_folder() / wanted).is_dir():  # a group that no default names must be added
            return f" Did you mean +{wanted}=...?"
        near = difflib.get_close_matches(wanted, known_keys(), n=1, cutoff=0.5)
        return f" Did you mean {near[0]}?" if near else " --cfg job shows every key."
    return ""


def quoted(text: str) -> str:
    """A string of Hydra's grammar, whatever is in it; a number in quotes stays a text."""
    inner = re.sub(r"(\\*)'", r"\1\1\\'", text)  # a backslash counts only before a quote
    ending = len(inner) - len(inner.rstrip("\\"))
    return "'" + inner + "\\" * ending + "'"


def known_keys() -> list[str]:
    """Every dotted key and every group under `conf/`, read from the files without composing them."""
    from omegaconf import OmegaConf

    keys: set[str] = set()

    def walk(node: object, prefix: str) -> None:
        for name, value in node.items() if isinstance(node, dict) else ():
            if not str(name).startswith(("_", "/", "defaults", "override")):
                keys.add(f"{prefix}{name}")
                walk(value, f"{prefix}{name}.")

    root = config_folder()
    for path in root.rglob("*.yaml"):
        package = path.parent.relative_to(root).as_posix()
        walk(OmegaConf.to_container(OmegaConf.load(path)), "" if package in (".", "experiment") else f"{package}.")
        keys.add(package)
    return sorted(keys - {"."})
