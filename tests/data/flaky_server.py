"""A server on loopback that answers by script: each request takes the next of its path's moves, then serves well."""

import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


class FlakyServer:
    """`files` by path; `moves` by path: "drop", "cut", "nothing", "slow", "503", "429", "whole" (no ranges), "any" (a
    range of whatever is there now) or "" (well served). `always`: the move when those are used up.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.moves: dict[str, list[str]] = {}
        self.always: dict[str, str] = {}
        self.requests: Counter[str] = Counter()
        self.ranges: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.partition("?")[0]
        self.requests[path] += 1
        script = self.moves.get(path)
        move = script.pop(0) if script else self.always.get(path, "")
        if path not in self.files:
            return request.send_error(404)
        if move == "drop":
            return request.connection.close()
        if move in ("503", "429"):
            request.send_response(int(move))
            request.send_header("Retry-After", "0")
            request.send_header("Content-Length", "0")
            return request.end_headers()
        data, first = self.files[path], 0
        asked = request.headers.get("Range")
        tag = f'"{hash(data)}"'
        if asked and move != "whole" and (move == "any" or request.headers.get("If-Range", tag) == tag):
            self.ranges.append(asked)
            first = int(asked.removeprefix("bytes=").rstrip("-"))
            request.send_response(206)
            request.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        else:
            request.send_response(200)
        request.send_header("ETag", tag)
        request.send_header("Content-Length", str(len(data) - first))
        request.end_headers()
        if move == "slow":
            time.sleep(0.3)
        end = first + (len(data) - first) // 2 if move == "cut" else 0 if move == "nothing" else len(data)
        request.wfile.write(data[first:end])
        return request.connection.close() if end < len(data) else None
