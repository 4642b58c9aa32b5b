"""Where a result came from."""

import shutil
import subprocess
from pathlib import Path


def git_state() -> str:
    """Commit of the checkout that the package runs from, with "+changes" where it was edited; "" outside one."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists() or shutil.which("git") is None:
        return ""
    commit = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    changes = subprocess.run(["git", "-C", root, "status", "--short"], capture_output=True, text=True, check=False)
    return commit.stdout.strip() + ("+changes" if changes.stdout.strip() else "")
