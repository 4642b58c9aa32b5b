"""Where samples come from: a source writes its shards once and names them."""

from typing import Literal, Protocol

Split = Literal["train", "tune", "test"]
SPLITS: tuple[Split, ...] = ("train", "tune", "test")


class Source(Protocol):
    """Choices are made on `tune`, the final evaluation uses `test`; neither is ever trained on."""

    def prepare(self) -> None:
        """Write what is missing. Costs nothing when everything is there; safe in several processes at once."""
        ...

    def shards(self, split: Split) -> list[str]:
        """Paths of the tars of `split`, in the order that the index keeps."""
        ...
