"""The strict index: what it reads, and how each kind of damage is answered."""

import gzip
import os
import pickle
import shutil
import tarfile
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fluxflow_train.data.captions import FIELDS
from fluxflow_train.data.index import Index, open_table, open_tables
from fluxflow_train.data.selection import Policy, Selection
from fluxflow_train.data.shard_cache import ShardCache
from fluxflow_train.data.table import build_table
from fluxflow_train.errors import UserError


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_reads_what_tarfile_wrote(make_tar, pairs, cache, format):
    members = pairs(5)
    path = make_tar(members, format=format)
    index = Index([str(path)], cache)
    assert len(index) == 5
    for row in range(5):
        assert index.key(row) == f"{row:04d}"
        assert index.image(row) == members[2 * row][1]
        assert index.captions(row) == [f"caption {row}"]
    assert index.column("width").tolist() == [24] * 5
    assert index.column("height").tolist() == [16] * 5


def test_long_names_folders_and_several_shards(make_tar, pairs, encoded, cache):
    long = "folder/" + "long" * 60
    first = make_tar([(f"{long}.png", encoded(1)), (f"{long}.txt", "große Straße".encode())], "a.tar")
    second = make_tar(pairs(3), "b.tar")
    index = Index([str(first), str(second)], cache)
    assert index.sizes == [1, 3]
    assert index.key(0) == long
    assert index.captions(0) == ["große Straße"]
    assert index.key(3) == "0002"
    with pytest.raises(IndexError, match="expected 0 to 3"):
        index.key(4)


def test_more_shards_than_open_files(make_tar, pairs, cache, monkeypatch):
    monkeypatch.setattr("fluxflow_train.data.index._MAX_OPEN_FILES", 2)
    paths = [str(make_tar(pairs(1, first=n), f"{n}.tar")) for n in range(5)]
    index = Index(paths, cache)
    assert [index.captions(n % 5) for n in range(10)] == [[f"caption {n % 5}"] for n in range(10)]


class TestSidecar:
    def test_is_used_and_memory_mapped(self, make_tar, pairs, cache):
        path = make_tar(pairs(3))
        built = open_table(str(path), cache)
        stored = open_table(str(path), cache)
        assert (path.parent / "shard.tar.index").exists()
        assert any(isinstance(array, np.memmap) for array in _bases(stored.columns))
        assert np.array_equal(stored.columns, built.columns)
        assert stored.header == built.header
        assert [stored.key(row) for row in range(3)] == ["0000", "0001", "0002"]

    def test_is_built_anew_for_another_tar(self, make_tar, pairs, cache):
        path = make_tar(pairs(3))
        open_table(str(path), cache)
        make_tar(pairs(4))
        assert len(open_table(str(path), cache)) == 4

    @pytest.mark.parametrize("keep", [0, 10, 100, -1])
    def test_cut_short_is_built_anew(self, make_tar, pairs, cache, keep):
        path = make_tar(pairs(3))
        open_table(str(path), cache)
        sidecar = path.parent / "shard.tar.index"
        sidecar.write_bytes(sidecar.read_bytes()[:keep])
        assert len(open_table(str(path), cache)) == 3

    def test_goes_to_the_cache_where_the_folder_takes_no_file(self, make_tar, pairs, cache):
        path = make_tar(pairs(3))
        (path.parent / "shard.tar.index").mkdir()  # stands for a read-only folder, which root could write to
        assert len(open_table(str(path), cache)) == 3
        assert len(list(cache.glob("*.index"))) == 1
        assert not list(path.parent.glob("*.tmp"))

    def test_nowhere_to_write(self, make_tar, pairs, tmp_path):
        path = make_tar(pairs(3))
        (path.parent / "shard.tar.index").mkdir()
        blocked = tmp_path / "file"
        blocked.touch()
        with pytest.raises(UserError, match=r"can't write the index .*data\.root"):
            open_table(str(path), blocked)

    def test_two_processes_at_once(self, make_tar, pairs, cache):
        path = make_tar(pairs(200))
        with get_context("fork").Pool(2) as pool:
            fingerprints = pool.starmap(_fingerprint, [(str(path), cache)] * 4)
        assert len(set(fingerprints)) == 1
        assert not list(path.parent.glob(".*.tmp"))


def _bases(array: np.ndarray | None) -> Iterator[np.ndarray]:
    while isinstance(array, np.ndarray):
        yield array
        array = array.base


def _fingerprint(path: str, cache: Path) -> str:
    return Index([path], cache).fingerprint


def test_fingerprint_knows_content_but_not_place_or_time(make_tar, pairs, cache, tmp_path):
    path = make_tar(pairs(3))
    original = Index([str(path)], cache).fingerprint
    (tmp_path / "copy").mkdir()
    copy = shutil.copy(path, tmp_path / "copy" / "shard.tar")
    os.utime(copy, (1, 1))
    assert Index([str(copy)], cache).fingerprint == original
    renamed = shutil.copy(path, tmp_path / "other.tar")
    assert Index([str(renamed)], cache).fingerprint != original
    assert Index([str(make_tar(pairs(4)))], cache).fingerprint != original


class TestDamagedTar:
    """DATA.md section 4: an error that names the shard and the offset."""

    @pytest.fixture
    def tar(self, make_tar, pairs) -> Path:
        return make_tar(pairs(6), format=tarfile.USTAR_FORMAT)

    def refused(self, path: Path, *texts: str) -> None:
        with pytest.raises(UserError) as caught:
            build_table(str(path))
        message = str(caught.value)
        assert str(path) in message
        assert "\n" not in message
        for text in texts:
            assert text in message

    def test_header_checksum_flipped_in_the_middle(self, tar):
        offset = build_table(str(tar)).column("image_offset")[2] - 512
        data = bytearray(tar.read_bytes())
        data[offset + 148] ^= 1
        tar.write_bytes(data)
        self.refused(tar, f"offset {offset}", "damaged header")

    def test_header_checksum_flipped_at_the_start(self, tar):
        data = bytearray(tar.read_bytes())
        data[148] ^= 1
        tar.write_bytes(data)
        self.refused(tar, "offset 0")

    def test_pax_header_flipped(self, make_tar, pairs):
        path = make_tar([("ä" * 90 + ".png", b"x"), *pairs(3)])
        data = bytearray(path.read_bytes())
        data[1024 + 148] ^= 1  # the member's own header, behind its PAX header and record
        path.write_bytes(data)
        self.refused(path)

    def test_cut_at_every_kind_of_place(self, tar):
        table = build_table(str(tar))
        data = tar.read_bytes()
        image = int(table.column("image_offset")[3])
        caption = int(table.column("caption_offset")[3])
        end = int(table.column("caption_offset")[5]) + 512
        for length in (image - 512, image - 300, image, image + 5, caption - 512, caption, caption + 3, end):
            tar.write_bytes(data[:length])
            self.refused(tar, "cut short")

    def test_two_tars_concatenated(self, tar):
        size = tar.stat().st_size
        tar.write_bytes(tar.read_bytes() * 2)
        self.refused(tar, f"offset {size}", "concatenated")

    def test_members_interleaved(self, make_tar, pairs):
        members = pairs(2)
        self.refused(make_tar([members[0], members[2], members[1], members[3]]), "key 0000 comes again", "offset 4096")

    def test_key_repeated_later(self, make_tar, pairs):
        self.refused(make_tar(pairs(3) + pairs(1)), "key 0000 comes again")

    def test_same_name_twice(self, make_tar, pairs):
        members = pairs(1)
        self.refused(make_tar([members[0], members[0], members[1]]), "0000.png is there twice")

    def test_link_instead_of_a_file(self, tmp_path, pairs, make_tar):
        path = make_tar(pairs(1))
        with tarfile.open(path, "a") as tar:
            info = tarfile.TarInfo("0001.png")
            info.type, info.linkname = tarfile.SYMTYPE, "0000.png"
            tar.addfile(info)
        self.refused(path, "0001.png is a link")

    def test_empty_file(self, tmp_path):
        path = tmp_path / "shard.tar"
        path.touch()
        self.refused(path, "0 bytes")

    def test_web_page(self, tmp_path):
        path = tmp_path / "shard.tar"
        path.write_bytes(b"\n<!DOCTYPE html><html>Not found</html>" * 100)
        self.refused(path, "web page")

    def test_something_else(self, tmp_path):
        path = tmp_path / "shard.tar"
        path.write_bytes(b"neither a tar nor a page. " * 100)
        self.refused(path, "not a tar")

    def test_gzip(self, tar):
        tar.write_bytes(gzip.compress(tar.read_bytes()))
        self.refused(tar, "gzip", "unpack")

    def test_missing(self, tmp_path):
        self.refused(tmp_path / "nowhere.tar", "does not exist")

    def test_no_samples(self, make_tar):
        self.refused(make_tar([]), "holds no samples")


class TestSamples:
    """Samples that are incomplete or oddly named: counted, warned of, never merged or lost without a word."""

    def test_dots_in_keys(self, make_tar, encoded, cache):
        members = []
        for number in range(3):
            members += [(f"img.v{number}.2.jpg", encoded(number, format="JPEG")), (f"img.v{number}.2.txt", b"words")]
        index = Index([str(make_tar(members))], cache)
        assert [index.key(row) for row in range(3)] == ["img.v0.2", "img.v1.2", "img.v2.2"]
        assert index.captions(2) == ["words"]
        assert index.dotted_keys == ["img.v0.2", "img.v1.2", "img.v2.2"]

    def test_compound_extensions_are_no_samples(self, make_tar, encoded, cache):
        path = make_tar([("a.jpg", encoded(1, format="JPEG")), ("a.seg.png", encoded(2)), ("a.txt", b"words")])
        index = Index([str(path)], cache)
        assert len(index) == 1
        assert index.image(0) == encoded(1, format="JPEG")
        assert index.dotted_keys == []
        assert index.counts == {"images with dots in the extension, beside one without, not read": 1}

    def test_missing_image_is_counted_and_dropped(self, make_tar, pairs, cache):
        path = make_tar([*pairs(3), ("0003.txt", b"alone")])
        selection = Selection(Index([str(path)], cache), Policy(max_bad_fraction=0.25))
        assert selection.damaged == {"no image": 1}
        assert len(selection) == 3
        with pytest.raises(UserError, match=r"1 of 4 samples are damaged .*max_bad_fraction"):
            Selection(Index([str(path)], cache), Policy(max_bad_fraction=0.2))

    def test_damaged_images_are_counted_by_cause(self, make_tar, pairs, encoded, cache):
        members = [*pairs(3), ("0003.png", b""), ("0004.png", b"not a png"), ("0005.png", encoded(5, (300, 300)))]
        index = Index([str(make_tar(members))], cache)
        policy = Policy(max_bad_fraction=1.0)
        assert Selection(index, policy).damaged == {"empty image": 1, "not an image": 1}
        small = Policy(type(policy.limits)(max_pixels=1000), max_bad_fraction=1.0)
        assert Selection(index, small).damaged == {"empty image": 1, "not an image": 1, "too many pixels": 1}

    def test_missing_caption_by_policy(self, make_tar, pairs, encoded, cache):
        path = make_tar([*pairs(3), ("0003.png", encoded(3)), ("0004.png", encoded(4)), ("0004.txt", b" \n")])
        index = Index([str(path)], cache)
        kept = Selection(index, Policy())
        assert (len(kept), kept.noted["no caption"]) == (5, 2)
        dropped = Selection(index, Policy(missing_caption="drop"))
        assert (len(dropped), dropped.left_out) == (3, {"no caption": 2})
        with pytest.raises(UserError, match="2 samples with no caption, first 0003"):
            Selection(index, Policy(missing_caption="fail"))

    def test_limits_are_a_choice_and_no_damage(self, make_tar, pairs, encoded, cache):
        path = make_tar([*pairs(2), ("0002.png", encoded(2, (90, 3))), ("0003.png", encoded(3, (4, 4)))])
        index = Index([str(path)], cache)
        limits = type(Policy().limits)(min_side=5, max_aspect=4)
        selection = Selection(index, Policy(limits, max_bad_fraction=0.0))
        assert selection.left_out == {"too small": 2}
        assert selection.fingerprint != Selection(index, Policy()).fingerprint

    def test_selected_samples_keep_their_shard(self, make_tar, pairs, cache):
        first = make_tar([("x.txt", b"alone"), *pairs(2)], "a.tar")
        second = make_tar([*pairs(3), ("y.txt", b"alone")], "b.tar")
        selection = Selection(Index([str(first), str(second)], cache), Policy(max_bad_fraction=0.5))
        assert selection.shard_sizes == [2, 3]
        assert [selection.index.key(selection.row(n)) for n in range(5)] == ["0000", "0001", "0000", "0001", "0002"]

    def test_nothing_left(self, make_tar, encoded, cache):
        index = Index([str(make_tar([("a.png", encoded())]))], cache)
        with pytest.raises(UserError, match="no usable sample"):
            Selection(index, Policy(missing_caption="drop"))

    def test_height_and_width_after_rotation(self, make_tar, cache, encoded):
        exif = Image.Exif()
        exif[274] = 6
        index = Index([str(make_tar([("a.jpg", encoded(0, (30, 20), "JPEG", exif=exif))]))], cache)
        assert (index.column("width")[0], index.column("height")[0]) == (20, 30)


def test_a_spawned_worker_reads_the_same(make_tar, pairs, cache):
    index = Index([str(make_tar(pairs(3)))], cache)
    copy = pickle.loads(pickle.dumps(index))
    assert copy.fingerprint == index.fingerprint
    assert copy.image(2) == index.image(2)


def test_file_cut_after_indexing(make_tar, pairs, cache):
    path = make_tar(pairs(2))
    index = Index([str(path)], cache)
    with open(path, "r+b") as file:
        file.truncate(512)
    with pytest.raises(UserError, match="cut short since it was indexed"):
        index.image(0)


def test_more_shards_than_mapped_tables(make_tar, pairs, cache, monkeypatch):
    monkeypatch.setattr("fluxflow_train.data.index._MAX_OPEN_TABLES", 2)
    paths = [str(make_tar(pairs(2, 2 * number), f"{number}.tar")) for number in range(5)]
    index = Index(paths, cache)
    assert [index.key(sample) for sample in (9, 0, 5, 3, 8, 1)] == ["0009", "0000", "0005", "0003", "0008", "0001"]
    assert len(index._tables) == 2


def test_many_damaged_shards_are_all_named(make_tar, pairs, cache, capsys):
    paths = [str(make_tar(pairs(2, 2 * number), f"{number}.tar")) for number in range(6)]
    for path in (paths[1], paths[4]):
        Path(path).write_bytes(Path(path).read_bytes()[:700])
    with pytest.raises(UserError, match=r"2 of 6 shards can't be read, first shard .*1\.tar") as error:
        open_tables(paths, cache, FIELDS, ShardCache(cache))
    assert "\n" not in str(error.value)
    assert "what is wrong" in capsys.readouterr().err
    assert all(Path(f"{paths[number]}.index").exists() for number in (0, 2, 3, 5))


def test_other_caption_fields_are_another_table(make_tar, encoded, cache):
    path = str(make_tar([("a.png", encoded()), ("a.json", b'{"caption": "one", "meta": {"alt": "two"}}')]))
    assert Index([path], cache).captions(0) == ["one"]
    other = Index([path], cache, ["meta.alt"])
    assert other.captions(0) == ["two"]
    assert other.fingerprint != Index([path], cache).fingerprint
