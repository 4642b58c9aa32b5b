"""Bring one remote file here whole, whatever the network does, or say what it did."""

import errno
import http.client
import logging
import os
import selectors
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.parse import urlsplit, urlunsplit

from fluxflow_train import preemption, rng
from fluxflow_train.errors import UserError

CHUNK = 1 << 20
_PASSING = {408, 425, 429, 500, 502, 503, 504}  # of HTTP: worth another try
_NETWORK = (OSError, http.client.HTTPException)

log = logging.getLogger(__name__)

Room = Callable[[int], None]
"""Called with the bytes that are about to be written."""


@dataclass(frozen=True)
class Patience:
    """How long a transfer may go without a new byte, and how it waits between tries, all in seconds."""

    deadline: float = 300.0
    first_wait: float = 0.5
    longest_wait: float = 30.0
    silence: float = 30.0  # of one connection

    def wait(self, url: str, attempt: int) -> float:
        """Twice as long each time, spread by half so that many clients don't come back at once."""
        spread = rng.generator(zlib.crc32(url.encode()), "retry", attempt).uniform(0.5, 1.0)
        return min(self.longest_wait, self.first_wait * 2**attempt) * spread


class _Answer(NamedTuple):
    body: AbstractContextManager[Any]
    start: int  # position of its first byte in the file
    total: int | None  # bytes of the file
    tag: str  # of this version of it; "" where the server tells none


class Refused(UserError):
    """The server answers, and has no such file or doesn't give it: another try won't mend that."""


class _ForeignError(OSError):
    """What a package behind fsspec raised: its own errors don't tell what passes, so all are tried again."""


class _Foreign(AbstractContextManager):
    """A file of fsspec's, whose reading raises OSError alone."""

    def __init__(self, body: Any) -> None:
        self._body = body

    def __enter__(self) -> "_Foreign":
        return self

    def __exit__(self, *_: Any) -> None:
        self._body.close()

    def read(self, size: int) -> bytes:
        try:
            return self._body.read(size)
        except OSError:
            raise
        except Exception as error:
            raise _ForeignError(f"{type(error).__name__} {error}") from error


class _Final(Exception):
    """The cause of a refusal."""


def download(url: str, target: Path, room: Room, patience: Patience, allow_pipe: bool = False) -> None:
    """Write what is at `url` to `target`: http, https, whatever fsspec knows (s3, gs ...), a path, or `pipe:COMMAND`.

    A transfer that breaks off goes on at the byte it had come to, where the server can do that and the file is still
    the same; after `patience.deadline` seconds without a new byte it is an error.

    Raises:
        UserError: it can't be had; names the address (without what may be secret in it) and the last cause.
            Refused, where it is not there.
        Stopped: a signal came.
    """
    if url.startswith("pipe:"):
        _run(url, target, room, patience, allow_pipe)
        return
    have, furthest, tag, attempt, since = 0, 0, "", 0, time.monotonic()
    with target.open("wb") as file:
        while True:
            try:
                answer = _open(url, have, tag, patience)
                with answer.body as body:
                    if answer.start and tag and answer.tag != tag:  # the rest of another file than we have begun
                        have, tag = 0, ""
                        continue
                    have = answer.start
                    file.truncate(have)
                    file.seek(have)
                    tag = answer.tag
                    while chunk := body.read(CHUNK):
                        preemption.check()
                        room(len(chunk))
                        _write(file, chunk, target)
                        have += len(chunk)
                        if have > furthest:
                            furthest, since, attempt = have, time.monotonic(), 0
                if answer.total is None or have == answer.total:
                    return
                cause = f"the connection closed after {have:,} of {answer.total:,} bytes"
                if have > answer.total:
                    cause, have = f"{have:,} bytes came where {answer.total:,} were announced", 0
            except _Final as error:
                raise Refused(f"can't read {shown(url)}: {error}") from error
            except _NETWORK as error:
                cause = _named(error)
            if time.monotonic() - since > patience.deadline:
                raise UserError(
                    f"can't read {shown(url)}: {cause}; nothing new came for {patience.deadline:g} s of trying."
                    " The same command goes on from here when the server does"
                )
            log.warning("%s: %s; trying again", shown(url), cause)
            _sleep(patience.wait(url, attempt))
            attempt += 1


def shown(url: str) -> str:
    """`url` without user, password and query, which may hold secrets: for messages."""
    if url.startswith("pipe:"):
        return "pipe:" + url[5:].split()[0] + " ..." if url[5:].split() else url
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))


def _open(url: str, have: int, tag: str, patience: Patience) -> _Answer:
    scheme = urlsplit(url).scheme
    if scheme in ("http", "https"):
        return _open_http(url, have, tag, patience)
    if "://" in url:
        return _open_fsspec(url, have)
    try:
        body = open(url, "rb")  # noqa: SIM115 (the caller closes it)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise _Final(error.strerror) from error
    body.seek(have)
    return _Answer(body, have, None, "")


def _open_http(url: str, have: int, tag: str, patience: Patience) -> _Answer:
    headers = {"User-Agent": "fluxflow-train", "Accept-Encoding": "identity"}
    if have:
        headers |= {"Range": f"bytes={have}-"} | ({"If-Range": tag} if tag else {})
    try:
        silence = min(patience.silence, patience.deadline)
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=silence)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416 and have:  # shorter than what we have: it is another file now
                return _open_http(url, 0, "", patience)
            if error.code not in _PASSING:
                raise _Final(f"HTTP {error.code} {error.reason}") from error
            asked = error.headers.get("Retry-After", "")
            if asked.isdecimal():
                _sleep(min(int(asked), patience.longest_wait))
        raise
    new = response.headers.get("ETag", "")
    new = "" if new.startswith("W/") else new  # a weak tag promises nothing about bytes
    length = response.headers.get("Content-Length")
    if response.status == 206:
        span, _, total = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
        first = span.partition("-")[0]
        if first.isdecimal() and int(first) == have and total.isdecimal():
            return _Answer(response, have, int(total), new)
        response.close()
        return _open_http(url, 0, "", patience)
    return _Answer(response, 0, int(length) if length is not None else None, new)


def _open_fsspec(url: str, have: int) -> _Answer:
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(url)
        total: Any = system.size(path)
        body: Any = system.open(path, "rb")
    except ImportError as error:
        raise _Final(f"{error}") from error
    except ValueError as error:  # of a scheme that nobody knows
        raise _Final(str(error)) from error
    except (FileNotFoundError, PermissionError) as error:
        raise _Final(f"{type(error).__name__} {error}") from error
    except OSError:
        raise
    except Exception as error:  # of the package that knows the scheme
        raise _ForeignError(f"{type(error).__name__} {error}") from error
    body.seek(have)
    return _Answer(_Foreign(body), have, total, "")


def _run(url: str, target: Path, room: Room, patience: Patience, allow_pipe: bool) -> None:
    if not allow_pipe:
        raise UserError(
            f"{shown(url)} would run a shell command, which is refused: set data.allow_pipe=true if you trust"
            " whoever wrote it"
        )
    command, last, said = url.removeprefix("pipe:"), time.monotonic(), b""
    with target.open("wb") as file, tempfile.TemporaryFile() as errors:
        pipe = subprocess.Popen(
            command,
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            bufsize=0,
            start_new_session=True,  # so that what the shell started ends with it
        )
        with pipe, selectors.DefaultSelector() as waiting:
            assert pipe.stdout is not None
            waiting.register(pipe.stdout, selectors.EVENT_READ)
            try:
                while True:
                    preemption.check()
                    if waiting.select(timeout=0.2):
                        chunk = pipe.stdout.read(CHUNK)
                        if not chunk:
                            break
                        room(len(chunk))
                        _write(file, chunk, target)
                        last = time.monotonic()
                    elif time.monotonic() - last > patience.deadline:
                        raise UserError(f"can't read {shown(url)}: no output for {patience.deadline:g} s")
            except BaseException:
                os.killpg(pipe.pid, signal.SIGKILL)
                raise
        errors.seek(0)
        said = errors.read().strip()
    if pipe.returncode:
        last_line = said.decode(errors="replace").splitlines()[-1:]
        raise UserError(": ".join([f"can't read {shown(url)}: the command ended with {pipe.returncode}", *last_line]))


def _write(file: IO[bytes], chunk: bytes, target: Path) -> None:
    try:
        file.write(chunk)
        file.flush()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"no space in {target.parent}: make some, or set data.root to another disk") from error


def _named(error: BaseException) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code} {error.reason}"
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    return str(reason) or type(reason).__name__


def _sleep(seconds: float) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        preemption.check()
        time.sleep(min(left, 0.2))
