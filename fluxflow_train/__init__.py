"""Train and evaluate the FluxFlow Bezier-activation text-to-image family."""
