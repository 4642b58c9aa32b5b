"""Train and evaluate the FluxFlow Bezier-activation text-to-image family."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fluxflow_train.pipeline import Pipeline

__all__ = ["Pipeline"]


def __getattr__(name: str) -> Any:
    """`from fluxflow_train import Pipeline` imports torch only when it is asked for."""
    if name == "Pipeline":
        from fluxflow_train.pipeline import Pipeline

        return Pipeline
    raise AttributeError(f"module {__name__} has no attribute {name}")
