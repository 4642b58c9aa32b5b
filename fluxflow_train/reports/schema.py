"""Reports checked against their schema when they are written and when they are read again."""

import json
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

from fluxflow_train.errors import UserError

FILES = {"fid_report/v1": "schema.json", "study_report/v1": "study_schema.json"}
SCHEMAS = {name: json.loads((Path(__file__).parent / file).read_text()) for name, file in FILES.items()}


def check(report: Any, name: str = "fid_report/v1") -> None:
    """Raises ValueError naming the first field that is not as the schema says."""
    errors = sorted(
        Draft202012Validator(SCHEMAS[name]).iter_errors(report), key=lambda error: list(map(str, error.path))
    )
    if errors:
        where = "/".join(map(str, errors[0].absolute_path)) or "its top"
        raise ValueError(f"no {name}: at {where}, {errors[0].message[:200]}")


def read(path: Path) -> dict[str, Any]:
    """A report from its file, or from its folder. Raises UserError where there is none, or it is damaged."""
    path = path / "report.json" if path.is_dir() else path
    try:
        report = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"there is no {path}: evaluate first, python -m fluxflow_train.evaluate run=DIR") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}): evaluate again") from error
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}): give a run's folder or its report.json") from error
    try:
        check(report)
    except ValueError as error:
        raise UserError(f"{path} is {error}: evaluate again") from error
    return report
