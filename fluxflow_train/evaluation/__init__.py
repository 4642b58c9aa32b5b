"""A finished run measured by a frozen protocol: features stored once, everything else computed from them."""
