"""Damaged input of every kind: an error that names the shard, or every sample accounted for; nothing is ever run."""

import io
import os
import pickle
import resource
import struct
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fluxflow_train.data.check import check_shard
from fluxflow_train.data.datamodule import ImageData
from fluxflow_train.data.images import ImageLimits
from fluxflow_train.data.salvage import salvaged
from fluxflow_train.data.sources.shards import Shards
from fluxflow_train.data.table import build_table
from fluxflow_train.errors import UserError

COUNT = 6
Members = list[tuple[str, bytes]]


def picture(seed: int = 0, size: tuple[int, int] = (24, 16), format: str = "JPEG", **options: Any) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, **options)
    return buffer.getvalue()


def samples(count: int = COUNT, first: int = 0) -> Members:
    return [
        (f"{n:04d}.{extension}", data)
        for n in range(first, first + count)
        for extension, data in (("jpg", picture(n)), ("txt", f"caption {n}".encode()))
    ]


def tar_of(members: Members, format: int = tarfile.USTAR_FORMAT, end: bool = True) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        offset = tar.offset
    return buffer.getvalue() if end else buffer.getvalue()[:offset]


def special(kind: bytes, name: str = "0003.lnk", link: str = "/etc/passwd", **pax: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for member, data in samples(3):
            info = tarfile.TarInfo(member)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        info = tarfile.TarInfo(name)
        info.type, info.linkname, info.pax_headers = kind, link, pax
        tar.addfile(info)
    return buffer.getvalue()


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


def headers(data: bytes) -> list[int]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [member.offset for member in tar.getmembers()]


WHOLE = tar_of(samples())
AT = headers(WHOLE)
END = len(tar_of(samples(), end=False))
JPG, TXT = AT[4], AT[5]  # of the third sample
SIZED = tar_of(samples(3))


def with_size_field(field: bytes) -> bytes:
    """The third sample's image with another size in its header, the checksum made good."""
    data = bytearray(WHOLE)
    data[JPG + 124 : JPG + 136] = field
    data[JPG + 148 : JPG + 156] = b" " * 8
    data[JPG + 148 : JPG + 156] = b"%06o\0 " % sum(data[JPG : JPG + 512])
    return bytes(data)


def pax_header(size: int) -> bytes:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, size
    return info.tobuf(tarfile.GNU_FORMAT) + bytes(10_240)


CONTAINERS: dict[str, tuple[bytes, str]] = {
    "checksum flipped, first header": (flipped(WHOLE, AT[0] + 150), "not a tar"),
    "checksum flipped, middle header": (flipped(WHOLE, JPG + 150), f"offset {JPG}: damaged header"),
    "checksum flipped, last header": (flipped(WHOLE, AT[-1] + 150), f"offset {AT[-1]}: damaged header"),
    "name flipped": (flipped(WHOLE, JPG + 2), f"offset {JPG}: damaged header"),
    "cut inside a header": (WHOLE[: JPG + 100], f"offset {JPG}: "),
    "cut inside an image": (WHOLE[: JPG + 700], "cut short"),
    "cut between image and caption": (WHOLE[:TXT], f"offset {TXT}: the file is cut short"),
    "cut behind the last member": (WHOLE[:END], "its end mark is missing"),
    "two tars concatenated": (WHOLE + WHOLE, "two tars concatenated"),
    "text behind the end": (WHOLE + b"more", "more data behind the end mark"),
    "a hole of zeros": (WHOLE[:JPG] + bytes(1024) + WHOLE[JPG + 1024 :], "more data behind the end mark"),
    "members interleaved": (tar_of([*samples()[::2], *samples()[1::2]]), "comes again"),
    "a key repeated later": (tar_of([*samples(), *samples(1)]), "key 0000 comes again"),
    "a name twice": (tar_of([samples()[0], *samples()]), "is there twice"),
    "0 bytes": (b"", "is empty"),
    "a web page": (b"<!DOCTYPE html><html>sign in" + bytes(600), "is a web page"),
    "gzip": (b"\x1f\x8b" + WHOLE, "is gzip-compressed"),
    "random bytes": (np.random.default_rng(0).bytes(5000), "not a tar"),
    "an empty tar": (tar_of([]), "holds no samples"),
    "hidden files only": (tar_of([(".a.jpg", b"x"), ("d/._b.jpg", b"x")]), "holds no samples"),
    "a symbolic link": (special(tarfile.SYMTYPE), "is a link or special file"),
    "a hard link": (special(tarfile.LNKTYPE, link="0000.jpg"), "is a link or special file"),
    "a character device": (special(tarfile.CHRTYPE), "is a link or special file"),
    "a block device": (special(tarfile.BLKTYPE), "is a link or special file"),
    "a fifo": (special(tarfile.FIFOTYPE), "is a link or special file"),
    "a size beyond the file": (with_size_field(b"77777777777\0"), "cut short"),
    "a size that is no number": (with_size_field(b"zzzzzzzzzzz\0"), f"offset {JPG}: damaged header"),
    "a negative size": (with_size_field(b"\xff" * 12), f"offset {JPG}"),
    "a size of 2^87": (with_size_field(b"\x80" + b"\x7f" * 11), "cut short|damaged header"),
    "a pax size that lies": (special(tarfile.REGTYPE, "0003.jpg", size="99999999"), "cut short"),
    "3,000 long names in a row": (
        tar_of([("a" * 200 + ".jpg", b"")], tarfile.GNU_FORMAT)[:1024] * 3000 + tar_of(samples()),
        "not a tar",
    ),
    "a PAX header of 8 GB": (tar_of(samples(), end=False) + pax_header(8 << 30), "cut short or a header damaged"),
    "a long name cut": (tar_of([("a" * 200 + ".jpg", picture())], tarfile.GNU_FORMAT)[:700], "offset 0|not a tar"),
}


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, *extra: bytes) -> bytes:
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = png_chunk(b"IDAT", zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(extra) + body + png_chunk(b"IEND", b"")


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


BOMB = png_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(200 << 20), 9))
# image bytes -> the cause it is counted under; None where it is to be used
IMAGES: dict[str, tuple[bytes, str | None]] = {
    "JPEG cut": (picture(1)[:-60], "damaged image"),
    "PNG cut": (picture(1, format="PNG")[:-60], "damaged image"),
    "WEBP cut": (picture(1, format="WEBP")[:-60], "damaged image|not an image"),
    "JPEG header alone": (picture(1)[:4], "not an image"),
    "0 bytes": (b"", "empty image"),
    "text": (b"404 not found", "not an image"),
    "144 megapixels": (png(12_000, 12_000), "too many pixels"),
    "2^31 pixels wide": (png(2**31 - 1, 1), "too many pixels"),
    "a compressed text of 200 MB": (png(8, 8, BOMB), "not an image|damaged image"),
    "PNG pixels missing": (png(64, 64), "damaged image"),
    "BMP": (picture(1, format="BMP"), "not an image"),
    "GIF": (picture(1, format="GIF"), "not an image"),
    "TIFF": (picture(1, format="TIFF"), "not an image"),
    "EPS, which Pillow would hand to a program": (b"%!PS-Adobe-3.0 EPSF-3.0\n(x) run", "not an image"),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
    "CMYK": (saved(Image.new("CMYK", (8, 8)), "JPEG"), None),
    "16 bit": (saved(Image.fromarray(np.full((8, 8), 40_000, np.uint16)), "PNG"), None),
    "animated": (
        saved(Image.new("RGB", (8, 8)), "WEBP", save_all=True, append_images=[Image.new("RGB", (8, 8), "red")]),
        None,
    ),
    "1 x 1": (picture(1, (1, 1)), None),
    "1 x 15": (picture(1, (1, 15)), None),
    "1 x 30": (picture(1, (1, 30)), "too elongated"),
}
# member, bytes -> the caption that training sees, and what is noted
CAPTIONS: dict[str, tuple[str, bytes | None, str, str | None]] = {
    "missing": ("txt", None, "", "no caption"),
    "empty": ("txt", b"", "", "no caption"),
    "blanks": ("txt", b" \n\t ", "", "no caption"),
    "NUL": ("txt", b"a\0dog", "adog", None),
    "not UTF-8": ("txt", b"caf\xe9", "caf\ufffd", "caption bytes that are not UTF-8, replaced"),
    "byte order mark": ("txt", b"\xef\xbb\xbfa dog", "a dog", None),
    "100,000 characters": ("txt", b"word " * 20_000, "word " * 819 + "w", "captions over 4096 characters, cut"),
    "2 MB": ("txt", b"x" * (2 << 20), "", "caption files over 1 MiB, ignored"),
    "broken JSON": ("json", b'{"caption": "a', "", "broken JSON, taken as no caption"),
    "JSON 100,000 deep": ("json", b"[" * 100_000, "", "broken JSON, taken as no caption"),
    "JSON number of 5,000 digits": ("json", b'{"caption": ' + b"9" * 5000 + b"}", "", "broken JSON"),
    "JSON list": ("json", b'["a dog"]', "", "no caption"),
    "JSON number": ("json", b"3", "", "no caption"),
    "JSON null": ("json", b"null", "", "no caption"),
    "wrong types": ("json", b'{"captions": [3, null, {"a": 1}, "a dog"]}', "a dog", None),
    "lone surrogate": ("json", b'{"caption": "a \\ud83d dog"}', "a dog", None),
}


@pytest.fixture
def load(tmp_path: Path) -> Callable[[bytes], ImageData]:
    def make(tar: bytes) -> ImageData:
        (tmp_path / "shard.tar").write_bytes(tar)
        path = str(tmp_path / "shard.tar")
        data = ImageData(Shards(path, path), 8, 1, 8, 0, max_bad_fraction=1.0, cache_dir=str(tmp_path / "cache"))
        data.prepare_data()
        return data

    return make


def everything_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.name.endswith(".index")}


@pytest.mark.parametrize("name", CONTAINERS)
def test_container(load, tmp_path, name):
    tar, text = CONTAINERS[name]
    with pytest.raises(UserError, match=rf"shard {tmp_path}/shard.tar.*({text})") as error:
        load(tar)
    assert "\n" not in str(error.value)
    assert everything_below(tmp_path) <= {"shard.tar", "cache"}


def test_a_pax_size_that_is_no_number(load):
    data = load(special(tarfile.REGTYPE, "0003.jpg", size="many"))
    assert data.selection("train").damaged == {"empty image": 1}
    assert data.num_samples("train") == 3


@pytest.mark.parametrize("path", ["none.tar", "folder.tar"])
def test_no_file(tmp_path, path):
    (tmp_path / "folder.tar").mkdir()
    with pytest.raises(UserError, match=f"{path} does not exist or is not a file"):
        build_table(str(tmp_path / path))


@pytest.mark.parametrize("name", IMAGES)
def test_image(load, name):
    image, cause = IMAGES[name]
    data = load(tar_of([*samples(3), ("0003.jpg", image), ("0003.txt", b"odd")]))
    selection = data.selection("train")
    loader = data.eval_dataloader("train")
    keys = {key for batch in loader for key in batch["key"]}
    counted = sum((selection.damaged, selection.left_out, Counter(loader.damaged.values())), Counter())
    assert len(keys) + counted.total() == 4  # no silent loss
    if cause is None:
        assert not counted
        assert "0003" in keys
    else:
        ((found, count),) = counted.items()
        assert found in cause.split("|")
        assert count == 1


@pytest.mark.parametrize("name", CAPTIONS)
def test_caption(load, name):
    extension, text, expected, noted = CAPTIONS[name]
    data = load(tar_of([("0000.jpg", picture()), *([] if text is None else [(f"0000.{extension}", text)])]))
    (batch,) = data.eval_dataloader("train")
    assert batch["caption"] == [expected]
    if noted is not None:
        assert any(cause.startswith(noted) for cause in data.selection("train").noted)


def test_without_image(load):
    data = load(tar_of([*samples(3), ("0003.txt", b"alone")]))
    assert data.selection("train").damaged == {"no image": 1}


@pytest.mark.parametrize("key", ["img.v1.2", "IMG.JPG", "a b", "deep/er/key", "k\xe9y", "x" * 300])
def test_odd_keys_are_kept(load, key):
    members = [(f"{key}{n}.{e}", d) for n in range(2) for e, d in (("jpg", picture(n)), ("TXT", b"c"))]
    data = load(tar_of(members, tarfile.PAX_FORMAT))
    assert {k for b in data.eval_dataloader("train") for k in b["key"]} == {f"{key}0", f"{key}1"}


class Touch:
    """Makes a file where it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def test_nothing_is_run_and_nothing_written_outside(load, tmp_path):
    trap = pickle.dumps(Touch(str(tmp_path / "trapped")))
    members = [
        ("../../outside.jpg", picture(1)),
        ("/tmp/absolute.jpg", picture(2)),
        ("0000.jpg", picture(3)),
        ("0000.pyd", trap),
        ("0000.pkl", trap),
        ("0000.pickle", trap),
        ("0000.txt", b"safe"),
        ("0001.jpg", trap),
        ("0001.json", trap),
    ]
    before = set(Path("/tmp").iterdir())
    data = load(tar_of(members))
    keys = {key for batch in data.eval_dataloader("train") for key in batch["key"]}
    assert keys == {"../../outside", "/tmp/absolute", "0000"}
    assert data.selection("train").damaged == {"not an image": 1}
    assert everything_below(tmp_path) <= {"shard.tar", "cache"}
    assert not {path.name for path in set(Path("/tmp").iterdir()) - before} & {"absolute.jpg", "outside.jpg"}


def test_bombs_take_little_memory(tmp_path):
    header = tmp_path / "header.tar"
    header.write_bytes(WHOLE[:END] + pax_header(128 << 20))
    os.truncate(header, END + (128 << 20) + 4096)  # a file with a hole: its header's bytes are there
    bombs = [image for image, cause in IMAGES.values() if cause]
    bombed = tmp_path / "bombed.tar"
    bombed.write_bytes(
        tar_of([(f"{n:04d}.{e}", d) for n, i in enumerate(bombs) for e, d in (("jpg", i), ("txt", b"long " * 20_000))])
    )
    with get_context("fork").Pool(1) as pool:
        assert pool.apply(_extra_memory, ([str(header), str(bombed)],)) < 64 << 20


def _extra_memory(paths: list[str]) -> int:
    """Most bytes that reading and repairing `paths` took beyond those of the start."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for path in paths:
        for read in (check_shard, lambda p, limits: list(salvaged(p, limits, Counter()))):
            with suppress(UserError):
                read(path, ImageLimits())
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


NAMES = st.text("ab./\u00e9", min_size=1, max_size=6).map(lambda name: name.strip("/") or "a")
PIECES = st.lists(st.tuples(NAMES, st.sampled_from(["jpg", "txt", "json", "cls", ""]), st.integers(0, 2)), max_size=8)


@settings(deadline=None, max_examples=150, derandomize=True)
@given(st.data())
def test_changed_tars_never_crash_the_indexer(tmp_path_factory, data):
    tar = bytearray(tar_of(samples(3), data.draw(st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]))))
    for _ in range(data.draw(st.integers(1, 4))):
        if len(tar) < 2600:
            break
        at = data.draw(st.integers(0, len(tar) - 1))
        kind = data.draw(st.sampled_from(["flip", "cut", "insert", "swap", "head"]))
        if kind == "flip":
            tar[at] = data.draw(st.integers(0, 255))
        elif kind == "head":
            tar[at % 5 * 512 + data.draw(st.integers(100, 350))] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del tar[max(at, 1) :]
        elif kind == "insert":
            tar[at:at] = data.draw(st.binary(max_size=600))
        else:
            block, other = at // 512 * 512, data.draw(st.integers(0, len(tar) // 512)) * 512
            tar[block : block + 512], tar[other : other + 512] = tar[other : other + 512], tar[block : block + 512]
    path = tmp_path_factory.mktemp("changed") / "a.tar"
    path.write_bytes(tar)
    for read in (lambda: build_table(str(path)), lambda: list(salvaged(str(path), ImageLimits(), Counter()))):
        try:
            read()
        except UserError as error:
            assert str(path) in str(error)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(PIECES)
def test_any_set_of_members_is_an_error_or_accounted_for(tmp_path_factory, pieces):
    members = [(f"{name}.{e}" if e else name, picture(n) if e == "jpg" else b"x") for name, e, n in pieces]
    path = tmp_path_factory.mktemp("members") / "a.tar"
    path.write_bytes(tar_of(members, tarfile.PAX_FORMAT))
    try:
        table = build_table(str(path))
    except UserError:
        return
    images = sum(name.lower().endswith(".jpg") for name, _ in members if not Path(name).name.startswith("."))
    several = table.header["counts"].get("several images in a sample, first format used", 0)
    assert (table.column("problem") == 0).sum() + several >= min(images, 1)
    assert (table.column("problem") == 0).sum() <= images


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.integers(0, END - 1), st.integers(1, 255))
def test_one_flipped_byte_costs_one_sample_at_most(tmp_path_factory, at, bits):
    path = tmp_path_factory.mktemp("flip") / "a.tar"
    path.write_bytes(WHOLE[:at] + bytes([WHOLE[at] ^ bits]) + WHOLE[at + 1 :])
    dropped: Counter[str] = Counter()
    found = {sample.key: sample.members for sample in salvaged(str(path), ImageLimits(), dropped)}
    whole = {f"{n:04d}": {"jpg": picture(n), "txt": f"caption {n}".encode()} for n in range(COUNT)}
    assert sum(found.get(key) == members for key, members in whole.items()) >= COUNT - 1
