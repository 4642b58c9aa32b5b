"""COCO to shards: the list follows from the annotations by a rule, every broken entry is counted under its cause."""

import hashlib
import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
import yaml
from PIL import Image, ImageOps

from fluxflow_train.data.check import check_shard
from fluxflow_train.data.images import ImageLimits
from fluxflow_train.evaluation.images import Images, TarFolder
from fluxflow_train.evaluation.protocol import load

SCRIPTS = Path(__file__).parents[2] / "scripts"
SIDE, NUM = 32, 24
ORIENTATION = 274


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`main("images=...", ...)` with shards of five images; images kept in this process's one worker."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import coco_to_shards  # type: ignore[import-not-found]

    monkeypatch.setattr(coco_to_shards, "SAMPLES_PER_SHARD", 5)
    return lambda *arguments: coco_to_shards.main(["--workers", "1", *map(str, arguments)])


class Coco:
    """A folder in COCO's shape: info, licenses, images, annotations with five captions each; all can be spoilt."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.images = folder, folder / "val2014"
        self.images.mkdir(parents=True)
        ids = [17 * n * n + 42 for n in range(NUM + 6)]
        self.content: dict[str, Any] = {
            "info": {
                "description": "COCO 2014 Dataset",
                "url": "http://cocodataset.org",
                "version": "1.0",
                "year": 2014,
            },
            "licenses": [
                {"url": "http://creativecommons.org/licenses/by/2.0/", "id": 4, "name": "Attribution License"}
            ],
            "images": [self.row(number) for number in ids],
            "annotations": [
                {"image_id": number, "id": 5 * place + part, "caption": f"Caption {part} of picture {number}.\n"}
                for place, number in enumerate(ids)
                for part in range(5)
            ],
        }
        for number in ids:
            self.put(number, picture(number))

    def row(self, number: int) -> dict[str, Any]:
        return {
            "license": 4,
            "file_name": f"COCO_val2014_{number:012d}.jpg",
            "coco_url": f"http://images.cocodataset.org/val2014/COCO_val2014_{number:012d}.jpg",
            "height": 45,
            "width": 60,
            "date_captured": "2013-11-14 11:18:45",
            "flickr_url": "http://farm9.staticflickr.com/1_z.jpg",
            "id": number,
        }

    def path(self, number: int) -> Path:
        return self.images / f"COCO_val2014_{number:012d}.jpg"

    def put(self, number: int, image: Image.Image, **how: Any) -> None:
        image.save(self.path(number), "JPEG", quality=90, **how)

    @property
    def order(self) -> list[int]:
        """Image ids by the published rule, all of them."""
        ids = {row["id"] for row in self.content["images"]}
        return sorted(ids, key=lambda number: hashlib.sha256(b"evaluation %012d" % number).hexdigest())

    def settings(self) -> list[str]:
        path = self.folder / "captions_val2014.json"
        path.write_text(json.dumps(self.content))
        protocol = {
            **yaml.safe_load((SCRIPTS.parent / "conf/protocols/coco2014-val-30k.yaml").read_text()),
            **{"id": "small", "resolution": SIDE, "num_images": NUM},
        }
        (self.folder / "small.yaml").write_text(yaml.safe_dump(protocol))
        return [f"images={self.images}", f"annotations={path}", f"protocol={self.folder / 'small.yaml'}"]


def picture(number: int, mode: str = "RGB") -> Image.Image:
    """45x60 pixels of broad coloured stripes and noise."""
    draws = np.random.default_rng(number)
    channels = len(Image.new(mode, (1, 1)).getbands())
    pixels = draws.integers(0, 256, (6, 8, channels)).repeat(8, 0).repeat(8, 1)[:45, :60].astype(np.uint8)
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels, mode)


@pytest.fixture
def coco(tmp_path: Path) -> Coco:
    return Coco(tmp_path / "coco")


def manifest(out: Path) -> dict[str, Any]:
    return json.loads((out / "manifest.json").read_text())


def samples(out: Path) -> dict[str, dict[str, Any]]:
    """By key, as webdataset's own reader gives them."""
    shards = sorted(str(path) for path in out.glob("*.tar"))
    return {sample["__key__"]: sample for sample in webdataset.WebDataset(shards, shardshuffle=False)}


def evaluated(out: Path, tmp_path: Path) -> Images:
    """What an evaluation sees: tars of `<dataset>-<split>` below a root."""
    root = out.parent
    return Images(TarFolder(root, out.name.partition("-")[0]), out.name.partition("-")[2], SIDE, tmp_path / "cache", 0)


# ---- the list ----


def test_the_list_and_captions_follow_the_rule(coco, main, tmp_path):
    out = tmp_path / "coco2014-val"
    assert main(*coco.settings(), f"out={out}") == 0
    chosen = coco.order[:NUM]
    found = samples(out)
    assert list(found) == [f"{number:012d}" for number in chosen]
    captions = []
    for number in chosen:
        rows = [row for row in coco.content["annotations"] if row["image_id"] == number]
        rows.sort(key=lambda row: hashlib.sha256(str(row["id"]).encode()).hexdigest())
        record = json.loads(found[f"{number:012d}"]["json"])
        assert record["captions"] == [row["caption"].strip() for row in rows]
        assert record["annotation_ids"] == [row["id"] for row in rows]
        assert (record["image_id"], record["license"]) == (number, 4)
        captions.append(record["captions"][0])
    told = manifest(out)
    assert told["list_sha256"] == told["list_sha256_by_rule"] == joined_digest(found)
    assert told["prompts_sha256"] == joined_digest(captions)
    assert told["licenses"] == coco.content["licenses"]
    assert len({row["name"] for row in told["shards"]}) == 5 and not list(tmp_path.glob(".*"))


def joined_digest(lines: Any) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@pytest.mark.parametrize("form", [[], ["--originals"]])
def test_an_evaluation_sees_this_list_and_these_pixels(coco, main, tmp_path, form):
    coco.put(coco.order[3], picture(3).rotate(90, expand=True), exif=turned())
    out = tmp_path / "coco2014-val"
    assert main(*coco.settings(), f"out={out}", *form) == 0
    images = evaluated(out, tmp_path)
    assert images.list_sha256 == manifest(out)["list_sha256"]
    assert joined_digest(images.captions(range(NUM))) == manifest(out)["prompts_sha256"]
    pixels = images.read(range(NUM)).permute(0, 2, 3, 1).numpy()
    expected = np.stack([central_square(coco.path(number)) for number in coco.order[:NUM]])
    assert np.array_equal(pixels, expected)
    assert all(check_shard(str(path), ImageLimits()).sound for path in out.glob("*.tar"))


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    return exif


def central_square(path: Path) -> np.ndarray:
    """(SIDE, SIDE, 3) by Pillow alone."""
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return np.asarray(image.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def test_the_order_of_the_file_and_the_workers_play_no_part(coco, main, tmp_path):
    assert main(*coco.settings(), f"out={tmp_path / 'a'}") == 0
    coco.content["annotations"].reverse()
    coco.content["images"].reverse()
    assert main(*coco.settings(), f"out={tmp_path / 'b'}", "--workers", "2") == 0
    tars = [sorted((tmp_path / name).glob("*.tar")) for name in "ab"]
    assert [path.read_bytes() for path in tars[0]] == [path.read_bytes() for path in tars[1]]


def test_frozen_protocols_are_understood(coco, main, capsys):
    settings = coco.settings()[:2]
    for name, count in (("coco2014-val-30k", "30,000"), ("coco2017-val-5k", "5,000")):
        assert load(name).num_images == int(count.replace(",", ""))
        assert main(*settings, f"protocol={name}") == 1
        assert f"protocol {name} is of {count} images, and the annotations have 30" in capsys.readouterr().err


# ---- what is broken ----


def test_broken_entries_are_counted_under_their_causes(coco, main, tmp_path, capsys):
    order = coco.order
    rows, images = coco.content["annotations"], coco.content["images"]
    spoilt = [row for row in rows if row["image_id"] == order[0]]
    spoilt[0]["caption"] = " \n"
    spoilt[1]["id"] = spoilt[2]["id"]
    rows += [{"image_id": 999_999, "id": 10_000, "caption": "Of nothing."}, {"image_id": order[1], "id": 10_001}, None]
    images += [dict(images[0]), {"id": 5}, {**coco.row(6), "file_name": "../6.jpg"}, coco.row(7)]
    coco.path(order[2]).unlink()
    coco.path(order[4]).write_bytes(b"")
    coco.path(order[5]).write_bytes(b"<html>")
    coco.path(order[6]).write_bytes(coco.path(order[6]).read_bytes()[:900])
    coco.put(order[7], picture(7, "L"))
    coco.put(order[8], picture(8, "CMYK"))
    coco.put(order[9], picture(9), exif=turned())
    out = tmp_path / "coco2014-val"
    assert main(*coco.settings(), f"out={out}", "--max-bad", "0.2") == 0
    told = manifest(out)
    assert told["left_out"] == {
        "empty caption": 1,
        "annotation id that came before": 1,
        "annotation of no image": 1,
        "annotation without ids or a caption": 2,
        "image id that came before": 1,
        "image without an id or a plain file name": 2,
        "image without a caption": 1,
        "missing file": 1,
        "empty image": 1,
        "not an image": 1,
        "damaged image": 1,
    }
    assert told["noted"] == {"grey": 1, "CMYK": 1, "turned upright (EXIF)": 1}
    keys = [f"{number:012d}" for number in order]
    assert list(samples(out)) == [key for key in keys if key not in {keys[i] for i in (2, 4, 5, 6)}][:NUM]
    assert len(json.loads(samples(out)[keys[0]]["json"])["captions"]) == 3
    assert told["replaced"] == 4 and told["list_sha256"] != told["list_sha256_by_rule"] == joined_digest(keys[:NUM])
    said = capsys.readouterr().out
    assert "4 images of the list can't be used and were replaced" in said
    assert all(cause in said for cause in (*told["left_out"], *told["noted"]))


def test_too_many_broken_images_end_the_run_and_the_next_goes_on(coco, main, tmp_path, capsys):
    whole = tmp_path / "whole"
    assert main(*coco.settings(), f"out={whole}") == 0
    lost = coco.path(coco.order[7])
    data = lost.read_bytes()
    lost.unlink()
    out = tmp_path / "coco2014-val"
    assert main(*coco.settings(), f"out={out}") == 1
    said = capsys.readouterr()
    assert "missing file" in said.out and lost.name in said.out
    assert "1 of 24 images can't be used, more than --max-bad=0.001 allows" in said.err
    assert said.err.count("\n") == 1 and not out.exists()
    partial = tmp_path / ".coco2014-val.partial"
    before = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.tar")}
    lost.write_bytes(data)
    assert main(*coco.settings(), f"out={out}") == 0
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert [name for name in before if before[name] != after[name]] == ["00001.tar"]
    assert manifest(out) == manifest(whole) and not partial.exists()
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in whole.iterdir())
    for path in whole.glob("*.tar"):
        assert path.read_bytes() == (out / path.name).read_bytes()


def test_replaced_images_come_back_when_they_are_there_again(coco, main, tmp_path):
    """Neither the shard that lacked one nor the shard of the replacement is left."""
    lost = coco.path(coco.order[7])
    data = lost.read_bytes()
    lost.unlink()
    assert main(*coco.settings(), f"out={tmp_path / 'a'}", "--max-bad", "0.1") == 0
    assert len(list((tmp_path / "a").glob("*.tar"))) == 6
    (tmp_path / "a").rename(tmp_path / ".b.partial")
    (tmp_path / ".b.partial/manifest.json").unlink()
    lost.write_bytes(data)
    assert main(*coco.settings(), f"out={tmp_path / 'b'}") == 0
    assert len(list((tmp_path / "b").glob("*.tar"))) == 5
    assert manifest(tmp_path / "b")["replaced"] == 0


def test_disk_full(coco, main, tmp_path, capsys):
    arguments = [*coco.settings(), f"out={tmp_path / 'coco2014-val'}"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        assert main(*arguments) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    assert "File too large" in error and "the same command goes on from here" in error and error.count("\n") == 1
    assert not (tmp_path / "coco2014-val").exists() and not list(tmp_path.rglob("*.tar"))
    assert main(*arguments) == 0
    assert len(samples(tmp_path / "coco2014-val")) == NUM


def test_too_few_images_are_no_protocol(coco, main, tmp_path, capsys):
    for number in coco.order[NUM - 2 :]:
        coco.path(number).unlink()
    assert main(*coco.settings(), f"out={tmp_path / 'out'}", "--max-bad", "0.5") == 1
    assert "is of 24 images, and 22 can be used" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_too_many_broken_annotations_end_the_run_before_any_image(coco, main, tmp_path, capsys):
    for row in coco.content["annotations"][:5]:
        row["caption"] = ""
    assert main(*coco.settings(), f"out={tmp_path / 'out'}", "--max-bad", "0.02") == 1
    said = capsys.readouterr()
    assert "6 of 180 rows of the annotations can't be used" in said.err
    assert "empty caption" in said.out and "image without a caption" in said.out
    assert list(tmp_path.iterdir()) == [coco.folder]


# ---- what the user may get wrong ----


def test_made_already(coco, main, tmp_path, capsys):
    out = tmp_path / "coco2014-val"
    assert main(*coco.settings(), f"out={out}") == 0
    first = capsys.readouterr().out
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert main(*coco.settings(), f"out={out}") == 0
    assert capsys.readouterr().out == first
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times
    assert main(*coco.settings(), f"out={out}", "--originals") == 1
    assert "was made with another form: delete it, or give another out=DIR" in capsys.readouterr().err
    assert main(*coco.settings(), f"out={coco.folder}") == 1
    assert "holds other files" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "has no lists images and annotations"),
        ('{"images": []}', "has no lists images and annotations"),
        ('{"images": [], "annotations": [{"id": 1, "bbox": []}]}', "has no captions (is it instances_*.json?)"),
        ("PK\x03", "is no JSON"),
    ],
)
def test_files_that_are_no_captions(coco, main, capsys, text, message):
    settings = coco.settings()
    (coco.folder / "captions_val2014.json").write_text(text)
    assert main(*settings) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_mistakes_on_the_command_line(coco, main, tmp_path, capsys):
    images, annotations, protocol = coco.settings()
    out = f"out={tmp_path / 'out'}"
    cases = [
        ((images, annotations, out), "protocol=... is missing"),
        ((images, annotations, "protocl=a"), "did you mean protocol=...?"),
        ((images, images, annotations, protocol), "each once"),
        ((images, annotations, "protocol=coco2014"), "there is no protocol coco2014"),
        ((images, annotations, "protocol=openmoji-test"), "measures on other data"),
        ((images, "annotations=nowhere.json", protocol), "annotations=nowhere.json can't be read"),
        ((f"images={tmp_path}", annotations, protocol, out), "has no COCO_val2014_"),
        ((images, annotations, protocol, f"out={annotations.partition('=')[2]}/out"), "Not a directory"),
        ((images, annotations, protocol, "--max-bad", "2"), "--max-bad from 0 to 1"),
    ]
    for arguments, message in cases:
        assert main(*arguments) == 1
        error = capsys.readouterr().err
        assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
