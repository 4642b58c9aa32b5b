"""check_shards.py --repair: what is whole is written elsewhere, what is not is counted."""

import importlib.util
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from fluxflow_train.data.index import Index
from tests.data.test_damage import CONTAINERS, COUNT, picture, samples, tar_of

SCRIPT = Path(__file__).parents[2] / "scripts" / "check_shards.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_shards", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def repair(script: ModuleType, tmp_path: Path) -> Callable[..., tuple[int, list[str], dict[str, int]]]:
    """Exit code, keys in the clean shard, and what was dropped."""

    def run(tar: bytes) -> tuple[int, list[str], dict[str, int]]:
        path, out = tmp_path / "in" / "a.tar", tmp_path / "out"
        path.parent.mkdir()
        path.write_bytes(tar)
        code = script.main([str(path), "--repair", str(out), "--jobs", "1"])
        assert path.read_bytes() == tar
        manifest = json.loads((out / "manifest.json").read_text())
        keys: list[str] = []
        if manifest["shards"]:
            index = Index([str(out / "a.tar")], tmp_path / "cache")
            keys = [index.key(sample) for sample in range(len(index))]
            assert all(index.image(sample) for sample in range(len(index)))
            assert script.main([str(out / "a.tar"), "--jobs", "1"]) == 0
        return code, keys, manifest["dropped"].get(str(path), {})

    return run


ALL = [f"{n:04d}" for n in range(COUNT)]


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("checksum flipped, first header", ["0000"]),
        ("checksum flipped, middle header", ["0002"]),
        ("checksum flipped, last header", []),  # a caption
        ("cut inside an image", ["0002", "0003", "0004", "0005"]),
        ("cut between image and caption", ["0003", "0004", "0005"]),
        ("cut behind the last member", []),
        ("two tars concatenated", []),
        ("text behind the end", []),
        ("members interleaved", []),
        ("a key repeated later", []),
        ("a name twice", []),
        ("a symbolic link", ["0003", "0004", "0005"]),
        ("a fifo", ["0003", "0004", "0005"]),
        ("a size that is no number", ["0002"]),
    ],
)
def test_what_is_whole_is_kept(repair, name, lost):
    code, keys, _ = repair(CONTAINERS[name][0])
    assert code == 1
    assert keys == [key for key in ALL if key not in lost]


@pytest.mark.parametrize("name", ["0 bytes", "a web page", "gzip", "random bytes"])
def test_nothing_to_save(repair, name):
    code, keys, dropped = repair(CONTAINERS[name][0])
    assert (code, keys) == (1, [])
    assert any("nothing in it can be saved" in cause for cause in dropped)


def test_damaged_images_and_unsafe_names(repair):
    members = [*samples(2), ("0002.jpg", picture()[:-60]), ("0003.txt", b"alone"), ("../../x/0004.jpg", picture(4))]
    code, keys, dropped = repair(tar_of(members))
    assert (code, keys) == (1, ["0000", "0001", "x/0004"])
    assert dropped == {
        "samples with: damaged image": 1,
        "samples without an image": 1,
        "names that led outside, made relative": 1,
    }


@pytest.mark.parametrize("key", ["x" * 300, "k\u00e9y", "d/" * 90 + "a"])
def test_names_that_ustar_has_no_room_for(repair, key):
    members = [(f"{key}.jpg", picture()), (f"{key}.txt", b"words")]
    assert repair(tar_of(members, tarfile.PAX_FORMAT)) == (0, [key], {})


def test_names_that_become_the_same(repair):
    members = [
        ("a.jpg", picture(0)),
        ("../a.jpg", picture(1)),
        ("b.JPG", picture(2)),
        ("b.jpg", picture(3)),
        ("README", b"x"),
    ]
    code, keys, dropped = repair(tar_of(members))
    assert (code, keys) == (1, ["a", "b"])
    assert dropped == {
        "names that led outside, made relative": 1,
        "samples whose name, made relative, is another's": 1,
        "members that come again, different": 1,
        "samples without an image": 1,
    }


def test_sound_shards_are_copied(repair):
    assert repair(tar_of(samples())) == (0, ALL, {})


def test_in_several_processes_the_order_stays(script, tmp_path, capsys):
    paths = []
    for number in range(3):
        paths.append(tmp_path / f"{number}.tar")
        paths[-1].write_bytes(tar_of(samples(number + 1)))
    assert script.main([*map(str, paths), "--jobs", "2", "--json", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert [(report["path"], report["samples"]) for report in found] == [(str(p), n + 1) for n, p in enumerate(paths)]
    assert "3 shards, 0 unreadable; 6 samples, 0 damaged" in capsys.readouterr().out


def test_a_file_that_is_not_the_manifests(script, tmp_path, capsys):
    (tmp_path / "a.tar").write_bytes(tar_of(samples()))
    (tmp_path / "manifest.json").write_text(json.dumps({"shards": [{"name": "a.tar", "sha256": "00"}]}))
    assert script.main([str(tmp_path / "a.tar")]) == 1
    assert "is not the file that the manifest.json beside it names" in capsys.readouterr().out


def test_never_in_place(script, tmp_path, capsys):
    (tmp_path / "a.tar").write_bytes(tar_of(samples()))
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.tar").write_bytes(tar_of(samples()))
    assert script.main([str(tmp_path / "a.tar"), "--repair", str(tmp_path)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert script.main([str(tmp_path / "a.tar"), str(tmp_path / "d/a.tar"), "--repair", str(tmp_path / "e")]) == 2
    assert "two shards are named a.tar" in capsys.readouterr().err


def test_dots_in_keys_keep_the_members_of_each_together(repair, encoded):
    image = encoded(1, format="JPEG")
    names = ("a.1.jpg", "a.1.k.jpg", "a.1.k.txt", "a.1.txt", "b.jpg", "b.txt")
    code, keys, dropped = repair(tar_of([(name, image if name.endswith("jpg") else b"words") for name in names]))
    assert code == 1 and keys == ["a.1", "a.1.k", "b"] and not any(dropped.values())
