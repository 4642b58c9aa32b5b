"""Remote shards: whatever the server does, every sample is read once, or the run stops with the address and cause."""

import gzip
import hashlib
import json
import multiprocessing
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from fluxflow_train.data.captions import FIELDS
from fluxflow_train.data.datamodule import ImageData
from fluxflow_train.data.download import Patience, download, shown
from fluxflow_train.data.index import Index, open_table, open_tables
from fluxflow_train.data.shard_cache import NoSpace, ShardCache
from fluxflow_train.data.sources.shards import Shards
from fluxflow_train.data.table import build_table
from fluxflow_train.errors import UserError
from tests.data.flaky_server import FlakyServer

QUICK = Patience(deadline=1.0, first_wait=0.01, longest_wait=0.05, silence=0.2)


@pytest.fixture
def server() -> Iterator[FlakyServer]:
    made = FlakyServer()
    yield made
    made.close()


@pytest.fixture
def shards(server: FlakyServer, make_tar: Callable[..., Path], pairs: Callable[..., Any]) -> list[str]:
    """Four of 6 samples each, on the server."""
    urls = []
    for number in range(4):
        path = make_tar(pairs(6, 6 * number), f"{number}.tar")
        server.files[f"/data/{number}.tar"] = path.read_bytes()
        urls.append(f"{server.url}/data/{number}.tar")
    return urls


@pytest.fixture
def cache(tmp_path: Path) -> Callable[..., ShardCache]:
    def make(max_bytes: int = 10**9, **options: Any) -> ShardCache:
        return ShardCache(tmp_path / "remote", max_bytes, options.pop("patience", QUICK), **options)

    return make


def keys(index: Index) -> list[str]:
    assert all(index.image(sample) and index.captions(sample) for sample in range(len(index)))
    return [index.key(sample) for sample in range(len(index))]


ALL = [f"{number:04d}" for number in range(24)]


class TestServer:
    @pytest.mark.parametrize(
        "moves", [["drop"], ["cut", "cut", "cut"], ["503", "429", "drop"], ["slow"], ["cut", "whole"]]
    )
    def test_every_sample_once(self, server, shards, cache, tmp_path, moves):
        for number in range(4):
            server.moves[f"/data/{number}.tar"] = list(moves)
        assert keys(Index(shards, tmp_path, remote=cache())) == ALL

    def test_goes_on_where_it_broke_off(self, server, shards, cache, tmp_path):
        server.moves["/data/0.tar"] = ["cut", "cut"]
        size = len(server.files["/data/0.tar"])
        Index(shards[:1], tmp_path, remote=cache())
        assert server.ranges == [f"bytes={size // 2}-", f"bytes={size // 2 + (size - size // 2) // 2}-"]

    @pytest.mark.parametrize("then", ["", "any"])
    def test_another_file_in_the_middle_is_read_from_its_start(self, server, shards, cache, tmp_path, then):
        server.moves["/data/0.tar"] = ["cut", then]
        original = cache()

        def room(_: int) -> None:
            server.files["/data/0.tar"] = server.files["/data/1.tar"]

        download(shards[0], tmp_path / "out", room, original.patience)
        assert (tmp_path / "out").read_bytes() == server.files["/data/1.tar"]

    @pytest.mark.parametrize(
        ("move", "cause"),
        [
            ("drop", "closed|reset|Remote end"),
            ("503", "HTTP 503"),
            ("nothing", "closed after 0 of"),
            ("slow", "timed out"),
        ],
    )
    def test_stops_with_the_address_and_the_cause(self, server, shards, cache, tmp_path, move, cause):
        server.always["/data/2.tar"] = move
        patience = Patience(deadline=0.4, first_wait=0.01, longest_wait=0.05, silence=0.1)
        with pytest.raises(UserError, match=rf"can't read {server.url}/data/2.tar: .*({cause}).*nothing new came for"):
            Index(shards, tmp_path, remote=cache(patience=patience))

    def test_what_is_not_there_is_not_asked_for_again(self, server, cache):
        with pytest.raises(UserError, match=r"/none.tar: HTTP 404"):
            cache().fetch(f"{server.url}/none.tar?secret=1")
        assert server.requests["/none.tar"] == 1

    def test_a_web_page(self, server, cache, tmp_path):
        server.files["/page.tar"] = b"<html>sign in</html>" * 99
        with pytest.raises(UserError, match=rf"{server.url}/page.tar is a web page"):
            Index([f"{server.url}/page.tar"], tmp_path, remote=cache())

    def test_training_reads_each_sample_once_an_epoch(self, server, shards, tmp_path):
        for number in range(4):
            server.moves[f"/data/{number}.tar"] = ["cut", "", "drop", "cut", "503"]
        pattern = f"{server.url}/data/{{0..3}}.tar"
        size = max(map(len, server.files.values()))

        def data(workers: int) -> ImageData:
            made = ImageData(
                Shards(pattern, pattern),
                16,
                4,
                48,
                seed=0,
                window_shards=1,
                num_workers=workers,
                cache_dir=str(tmp_path / "cache"),
                cache_bytes=0,
                remote_cache_bytes=2 * size + 1000,  # half of the data: shards go and come again
            )
            made.prepare_data()
            return made

        seen = [key for batch in data(0).train_dataloader() for key in batch["key"]]
        assert Counter(seen[:24]) == Counter(seen[24:]) == Counter(ALL)
        assert sum(server.requests[f"/data/{n}.tar"] for n in range(4)) > 8
        assert sum(path.stat().st_size for path in (tmp_path / "cache/remote").iterdir()) <= 2 * size + 1000
        assert [key for batch in data(2).train_dataloader() for key in batch["key"]] == seen

    def test_a_cache_too_small_for_the_window(self, server, shards, tmp_path):
        pattern, size = f"{server.url}/data/{{0..3}}.tar", len(server.files["/data/0.tar"])
        data = ImageData(
            Shards(pattern, pattern), 16, 4, 8, seed=0, cache_dir=str(tmp_path), remote_cache_bytes=2 * size
        )
        with pytest.raises(UserError, match=r"data.window_shards=16 remote shards at once.*remote_cache_bytes"):
            data.prepare_data()


class TestContent:
    def test_manifest(self, server, shards, cache, tmp_path):
        rows = [{"name": "0.tar", "sha256": hashlib.sha256(server.files["/data/0.tar"]).hexdigest()}]
        server.files["/data/manifest.json"] = json.dumps({"shards": rows}).encode()
        cache().fetch(shards[0])
        server.files["/data/0.tar"] = server.files["/data/1.tar"]
        with pytest.raises(UserError, match=r"0.tar does not match its manifest: sha256 is"):
            cache().fetch(shards[0] + "?again")
        assert not list((tmp_path / "remote").glob(".*.part"))

    @pytest.mark.parametrize("manifest", [b"", b"<html>", b"[]", b'{"shards": [3]}', b'{"shards": {}}'])
    def test_what_is_no_manifest_of_ours(self, server, shards, cache, manifest):
        server.files["/data/manifest.json"] = manifest
        assert cache().fetch(shards[0]).exists()

    def test_a_manifest_that_can_not_be_had_is_not_passed_over(self, server, shards, cache):
        server.files["/data/manifest.json"] = b"{}"
        server.moves["/data/manifest.json"] = ["503", "drop"]
        assert cache().fetch(shards[0]).exists()
        server.always["/data/manifest.json"] = "503"
        with pytest.raises(UserError, match=r"can't read .*/data/manifest.json: HTTP 503"):
            cache().fetch(shards[1])

    def test_changed_since_it_was_indexed(self, server, shards, cache, tmp_path):
        index = Index(shards[:1], tmp_path, remote=cache())
        for path in (tmp_path / "remote").glob("*.tar"):
            path.unlink()
        server.files["/data/0.tar"] = server.files["/data/1.tar"]
        with pytest.raises(UserError, match=r"0.tar has changed since it was indexed"):
            index.image(0)

    def test_gzip(self, server, shards, cache, tmp_path):
        server.files["/data/0.tar.gz"] = gzip.compress(server.files["/data/0.tar"][:9000]) + gzip.compress(
            server.files["/data/0.tar"][9000:]
        )
        assert keys(Index([f"{shards[0]}.gz"], tmp_path, remote=cache())) == ALL[:6]

    def test_local_gzip(self, server, shards, cache, tmp_path):
        (tmp_path / "a.tar.gz").write_bytes(gzip.compress(server.files["/data/0.tar"]))
        assert keys(Index([str(tmp_path / "a.tar.gz")], tmp_path, remote=cache())) == ALL[:6]

    @pytest.mark.parametrize(("cut", "text"), [(slice(0, -30), "cut short"), (slice(0, 40), "cut short")])
    def test_cut_gzip(self, server, shards, cache, cut, text):
        server.files["/a.tar.gz"] = gzip.compress(server.files["/data/0.tar"])[cut]
        with pytest.raises(UserError, match=rf"a.tar.gz: its gzip compression is {text}"):
            cache().fetch(f"{server.url}/a.tar.gz")

    def test_a_gzip_bomb_ends_at_the_bound(self, server, cache, tmp_path):
        server.files["/bomb.tar.gz"] = gzip.compress(bytes(200 << 20), 9)
        with pytest.raises(UserError, match=r"more than data.remote_cache_bytes"):
            cache(20 << 20).fetch(f"{server.url}/bomb.tar.gz")
        assert sum(path.stat().st_size for path in (tmp_path / "remote").iterdir()) == 0

    def test_fsspec(self, server, shards, cache, tmp_path):
        with fsspec.open("memory://bucket/0.tar", "wb") as file:
            file.write(server.files["/data/0.tar"])  # type: ignore[attr-defined]
        assert keys(Index(["memory://bucket/0.tar"], tmp_path, remote=cache())) == ALL[:6]
        with pytest.raises(UserError, match=r"memory://bucket/none.tar: FileNotFoundError"):
            cache().fetch("memory://bucket/none.tar")

    def test_what_a_package_raises_of_its_own_is_tried_again(self, server, shards, cache, tmp_path):
        tries = []

        class Shaky(fsspec.implementations.memory.MemoryFileSystem):  # as aiohttp's and botocore's: no OSError
            @classmethod
            def _strip_protocol(cls, path):
                return super()._strip_protocol(path.replace("shaky://", "memory://"))

            def info(self, path, **kwargs):
                tries.append(path)
                if len(tries) < 3:
                    raise RuntimeError("server disconnected")
                return super().info(path, **kwargs)

        fsspec.register_implementation("shaky", Shaky, clobber=True)
        with fsspec.open("memory://bucket/0.tar", "wb") as file:
            file.write(server.files["/data/0.tar"])  # type: ignore[attr-defined]
        assert cache().fetch("shaky://bucket/0.tar").read_bytes() == server.files["/data/0.tar"]
        assert len(tries) >= 3

    def test_what_never_passes_is_an_error_in_the_end(self, cache):
        class Locked(fsspec.AbstractFileSystem):
            def info(self, path, **kwargs):
                raise RuntimeError("unable to locate credentials")

        fsspec.register_implementation("locked", Locked, clobber=True)
        with pytest.raises(UserError, match=r"locked://bucket/0.tar: RuntimeError unable to locate credentials;"):
            cache().fetch("locked://bucket/0.tar")

    @pytest.mark.parametrize("url", ["s3://bucket/a.tar", "nonsense://bucket/a.tar"])
    def test_without_the_library_for_it(self, cache, url):
        with pytest.raises(UserError, match=f"can't read {url}: .*(s3fs|nonsense|rotocol)"):
            cache().fetch(url)


class TestPipe:
    def test_is_refused(self, cache, tmp_path):
        with pytest.raises(UserError, match=r"pipe:touch \.\.\. would run a shell command, which is refused"):
            Index([f"pipe:touch {tmp_path}/made"], tmp_path, remote=cache())
        assert not (tmp_path / "made").exists()

    def test_where_it_is_allowed(self, server, shards, cache, tmp_path):
        (tmp_path / "a.tar").write_bytes(server.files["/data/0.tar"])
        assert keys(Index([f"pipe:cat {tmp_path}/a.tar"], tmp_path, remote=cache(allow_pipe=True))) == ALL[:6]

    @pytest.mark.parametrize(
        ("command", "text"), [("echo no >&2; exit 3", "ended with 3: no"), ("sleep 60", "no output for 1 s")]
    )
    def test_failures(self, cache, command, text):
        with pytest.raises(UserError, match=text):
            cache(allow_pipe=True).fetch(f"pipe:{command}")


def fetch(cache: ShardCache, url: str) -> None:
    cache.fetch(url)


class TestCache:
    def test_several_processes_fetch_once(self, server, shards, cache):
        server.moves["/data/0.tar"] = ["slow"]
        patient = cache(patience=Patience(deadline=5.0))
        started = [
            multiprocessing.get_context("fork").Process(target=fetch, args=(patient, shards[0])) for _ in range(3)
        ]
        for process in started:
            process.start()
        for process in started:
            process.join()
        assert [process.exitcode for process in started] == [0, 0, 0]
        assert server.requests["/data/0.tar"] == 1

    def test_the_one_used_longest_ago_goes(self, server, shards, cache):
        size = len(server.files["/data/0.tar"])
        small = cache(3 * size + 2000)
        for url in (*shards[:3], shards[0], shards[3]):
            small._stamped.clear()
            small.fetch(url)
        names = {path.name.partition("-")[2] for path in small.folder.glob("*.tar")}
        assert names == {"0.tar", "2.tar", "3.tar"}

    def test_one_larger_than_all_space(self, server, shards, cache):
        with pytest.raises(UserError, match=r"more than data.remote_cache_bytes = 1,000 bytes"):
            cache(1000).fetch(shards[0])

    def test_indexed_in_more_processes_than_there_is_space_for(self, server, shards, cache, tmp_path, monkeypatch):
        monkeypatch.setattr("os.sched_getaffinity", lambda _: range(8))
        for number in range(4):
            server.moves[f"/data/{number}.tar"] = ["slow"]
        small = cache(max(map(len, server.files.values())) + 1000, patience=Patience(deadline=5.0))
        open_tables(shards, tmp_path, FIELDS, small)
        assert keys(Index(shards, tmp_path, remote=small)) == ALL

    def test_a_copy_that_goes_while_it_is_read(self, server, shards, cache, tmp_path, monkeypatch):
        gone = []

        def read(path: str, *arguments: Any) -> Any:
            if not gone:
                gone.append(Path(path).unlink())
            return build_table(path, *arguments)

        monkeypatch.setattr("fluxflow_train.data.index.build_table", read)
        with pytest.raises(NoSpace, match=r"/data/0.tar had to go while it was read"):
            open_table(shards[0], tmp_path, FIELDS, cache())
        gone.clear()
        open_tables(shards[:1], tmp_path, FIELDS, cache())

    def test_a_copy_for_a_worker(self, server, shards, cache, tmp_path):
        index = pickle.loads(pickle.dumps(Index(shards, tmp_path, remote=cache())))
        assert keys(index) == ALL

    @pytest.mark.parametrize("name", ["../../up.tar", "%2e%2e/a.tar", "a b;c.tar", "x" * 300 + ".tar", ".hidden"])
    def test_names_stay_in_the_folder(self, cache, name):
        place = cache()._name(f"http://host/{name}")
        assert "/" not in place
        assert not place.startswith(".")
        assert len(place) < 120

    def test_secrets_are_not_shown(self):
        assert shown("https://me:pw@host:8/a.tar?sig=x#y") == "https://host:8/a.tar"
        assert shown("pipe:curl -H secret") == "pipe:curl ..."
