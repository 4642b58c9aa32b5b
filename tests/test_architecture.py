"""The import rules, read from the source: data flows one way."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "fluxflow_train"
COMMANDS = {"__main__", "evaluate", "prepare", "cli", "run", "composing", "evaluating", "report", "comparing"}
COMMANDS |= {"study", "studying", "freezing"}
FORBIDDEN = {
    "models": {"lightning", "hydra", "omegaconf", "transformers", "fluxflow_train.tasks", "fluxflow_train.data"},
    "losses": {"lightning", "hydra", "omegaconf"},
    "objectives": {"lightning", "hydra", "omegaconf"},
    "solvers": {"lightning", "hydra", "omegaconf"},
    "sampling": {"lightning", "hydra", "omegaconf"},
    "generation": {"lightning", "hydra", "omegaconf", "fluxflow_train.tasks"},
    "data": {"fluxflow_train.tasks"},
    "metrics": {"fluxflow_train.tasks"},
    "callbacks": {"fluxflow_train.tasks"},
    "reports": {"fluxflow_train.tasks", "fluxflow_train.evaluation"},
    "evaluation": {"lightning", "omegaconf", "fluxflow_train.tasks"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def reaches(path: Path, module: str) -> bool:
    return any(name == module or name.startswith(f"{module}.") for name in imports(path))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_import_rules(path: Path) -> None:
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    forbidden = FORBIDDEN.get(part, set()) - ({"transformers"} if path.name.startswith("text_backbones") else set())
    if part != "solvers":  # one grid of times for all of diffusers' schedulers
        forbidden = forbidden | {"diffusers"}
    if part not in COMMANDS:
        forbidden = forbidden | {"hydra"}
    assert not [module for module in forbidden if reaches(path, module)]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_names_say_something(path: Path) -> None:
    assert path.stem not in {"utils", "common", "base", "helpers", "misc"}
