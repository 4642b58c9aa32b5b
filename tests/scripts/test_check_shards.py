"""The shard checker: sound shards pass, each kind of damage is named and gives exit code 1."""

import importlib.util
import io
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

SCRIPT = Path(__file__).parents[2] / "scripts" / "check_shards.py"


@pytest.fixture(scope="module")
def main() -> Callable[[list[str]], int]:
    spec = importlib.util.spec_from_file_location("check_shards", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def png(size: tuple[int, int] = (32, 32)) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise(size, 50).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_sound_shards(tmp_path, main, capsys):
    for number in range(3):
        write(tmp_path / f"{number:02d}.tar", {"a.png": png(), "a.txt": b"words", "b.png": png()})
    before = sorted(tmp_path.iterdir())
    assert main([str(tmp_path / "{00..02}.tar")]) == 0
    text = capsys.readouterr().out
    assert "3 shards, 0 unreadable; 6 samples, 0 damaged" in text
    assert "1 x no caption" in text
    assert sorted(tmp_path.iterdir()) == before


def test_damaged_images(tmp_path, main, capsys):
    members = {
        "ok.png": png(),
        "cut.png": png()[:500],
        "none.png": b"",
        "page.jpg": b"<html>",
        "big.png": png((99, 99)),
    }
    path = write(tmp_path / "a.tar", members | {"text.txt": b"words"})
    assert main([str(path), "--max-pixels", "9000"]) == 1
    text = capsys.readouterr().out
    for line in (
        "1 x damaged image (first: cut)",
        "1 x empty image (first: none)",
        "1 x not an image (first: page)",
        "1 x too many pixels (first: big)",
        "1 x no image (first: text)",
        "6 samples, 5 damaged",
    ):
        assert line in text


def test_unreadable_shards(tmp_path, main, capsys):
    sound = write(tmp_path / "a.tar", {"a.png": png()})
    cut = tmp_path / "b.tar"
    cut.write_bytes(sound.read_bytes()[:700])
    assert main([str(sound), str(cut), str(tmp_path / "nowhere.tar")]) == 1
    text = capsys.readouterr().out
    assert "offset 0: a.png is cut short" in text
    assert "nowhere.tar does not exist" in text
    assert "3 shards, 2 unreadable; 1 samples, 0 damaged" in text


def test_pattern_that_is_none(main, capsys):
    assert main(["a-{0..3.tar"]) == 2
    assert "a brace has no partner" in capsys.readouterr().err


def test_from_the_command_line(tmp_path):
    path = write(tmp_path / "a.tar", {"a.png": png()[:200]})
    done = subprocess.run([sys.executable, str(SCRIPT), str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "damaged image" in done.stdout
    assert done.stderr == ""
