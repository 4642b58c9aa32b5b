"""Metrics behind one pinned protocol: quantised outputs, per-image values, float64 sums."""
