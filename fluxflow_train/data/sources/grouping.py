"""Group emoji that are variants or near copies of one another, so that a split can keep them together.

N images, H W pixels.
"""

import hashlib

import numpy as np

from fluxflow_train.data.sources import Split

NEIGHBOUR_DB = 22.0

_TONES = {f"{code:04X}" for code in range(0x1F3FB, 0x1F3FF + 1)}
_HAIR = {f"{code:04X}" for code in range(0x1F9B0, 0x1F9B3 + 1)}
_DROPPED = _TONES | _HAIR | {"FE0F", "200D", "2640", "2642", "27A1"}
# person, man, woman, boy, girl, child, older person, old man, old woman
_PEOPLE = {"1F9D1", "1F468", "1F469", "1F466", "1F467", "1F9D2", "1F9D3", "1F474", "1F475"}


def group_key(stem: str) -> str:
    """The code points of `stem` (hex joined by `-`) without tone, hair, gender and direction, people merged."""
    kept = [code for code in stem.split("-") if code not in _DROPPED]
    merged = ["person" if code in _PEOPLE else code for code in kept]
    return "-".join(merged) or stem


def near_pairs(images: np.ndarray, psnr_db: float = NEIGHBOUR_DB) -> list[tuple[int, int]]:
    """All pairs i < j of uint8 `images` (N, H, W, 3) whose PSNR is at least `psnr_db`; H and W divisible by 4.

    The mean squared error of 4x4 block means never exceeds that of the pixels (Jensen), so the small images
    find every candidate in one matrix product and only those are compared in full.
    """
    count, height, width, channels = images.shape
    limit = 255.0**2 * 10 ** (-psnr_db / 10)
    blocks = images.reshape(count, height // 4, 4, width // 4, 4, channels).mean(axis=(2, 4), dtype=np.float32)
    small = blocks.reshape(count, -1)
    small -= small.mean(axis=0)
    norms = np.einsum("nd,nd->n", small, small)
    pairs = []
    for start in range(0, count, 256):
        rows = slice(start, start + 256)
        lower_bound = (norms[rows, None] + norms - 2 * (small[rows] @ small.T)) / small.shape[1]
        near = lower_bound <= limit * 1.001 + 0.01  # a margin for float32
        for i, candidates in enumerate(near, start):
            later = i + 1 + np.flatnonzero(candidates[i + 1 :])
            difference = images[later].astype(np.int32) - images[i].astype(np.int32)
            exact = np.square(difference).mean(axis=(1, 2, 3))
            pairs += [(i, int(j)) for j in later[exact <= limit]]
    return pairs


def united(keys: list[str], pairs: list[tuple[int, int]]) -> list[str]:
    """The group of each image: the smallest key among all that share its key or are linked to it by `pairs`."""
    parent = {key: key for key in keys}

    def root(key: str) -> str:
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    for i, j in pairs:
        first, second = sorted((root(keys[i]), root(keys[j])))
        parent[second] = first
    return [root(key) for key in keys]


def split_of(group: str) -> Split:
    """80 / 10 / 10 by the hash of the group's name: no draw, so a group keeps its split whatever else is added."""
    value = int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big") / 2**64
    return "train" if value < 0.8 else "tune" if value < 0.9 else "test"
