"""Where a result came from: the code and the command."""

import shlex
import subprocess
import sys
from pathlib import Path


def git_state() -> str:
    """Commit of the checkout that the package runs from, with "+changes" where it was edited; "" outside one."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return ""
    commit = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    changes = subprocess.run(["git", "-C", root, "status", "--short"], capture_output=True, text=True, check=False)
    return commit.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def command_line() -> str:
    """The command that is running, as one would type it."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    module = spec.name.removesuffix(".__main__") if spec else Path(sys.argv[0]).name
    return shlex.join(["python", "-m", module, *sys.argv[1:]])
