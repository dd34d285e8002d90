"""A stand-in for W&B's server, as far as wandb-core 0.31 talks to it: it takes runs in and keeps their histories."""

from __future__ import annotations

import contextlib
import gzip
import http.server
import json
import re
import threading
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

HISTORY = "wandb-history.jsonl"
Row = dict[str, Any]


@dataclass
class Server:
    """What arrived. Histories are files of lines, written at the place that the client says: a line sent twice at
    one place is there once, at two places twice."""

    url: str = ""
    lines: defaultdict[tuple[str, str], dict[int, str]] = field(default_factory=lambda: defaultdict(dict))
    """(run, file) -> place -> line."""
    nodes: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    """Whose GPU and CPU are on record. (The clients of a shared run each count their lines from 0.)"""
    config: dict[str, Row] = field(default_factory=dict)
    answers: bool = True
    """False: like a network that is gone."""

    def history(self, run: str) -> list[Row]:
        """The rows of a run, in order."""
        return [json.loads(line) for _, line in sorted(self.lines[run, HISTORY].items())]

    def take(self, run: str, files: Row) -> None:
        """What a client streams."""
        told = files.get("wandb-events.jsonl", {}).get("content", [])
        self.nodes[run] |= {key.partition("/l:")[2] for line in told for key in json.loads(line) if "/l:" in key}
        for name, part in files.items():
            for i, line in enumerate(part.get("content", [])):
                self.lines[run, name][part.get("offset", 0) + i] = line

    def answer(self, query: str, given: Row) -> Row:
        """GraphQL."""
        named = re.search(r"(?:query|mutation)\s+(\w+)", query)
        name, run = named[1] if named else "", str(given.get("name") or given.get("run") or "")
        project = {"id": "p", "name": given.get("project"), "entity": {"id": "e", "name": "me"}}
        count = len(self.lines[run, HISTORY])
        if name == "Viewer":
            return {"viewer": {"id": "u", "entity": "me", "flags": "{}", "username": "me", "teams": {"edges": []}}}
        if name == "RunResumeStatus":
            return {"model": project | {"bucket": self._standing(run, count) if run in self.config else None}}
        if name == "UpsertBucket":
            inserted = run not in self.config
            self.config.setdefault(run, {}).update({k: v for k, v in given.items() if v is not None})
            bucket = {"id": run, "name": run, "displayName": run, "historyLineCount": count, "project": project}
            return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}
        if name == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": f"{self.url}/upload/{file}"} for file in given["files"]]
            return {"createRunFiles": {"runID": run, "uploadHeaders": [], "files": files}}
        return {}

    def _standing(self, run: str, count: int) -> Row:
        tail = [line for _, line in sorted(self.lines[run, HISTORY].items())][-1:]
        events = len(self.lines[run, "wandb-events.jsonl"])
        texts = {"config": "{}", "summaryMetrics": "{}", "historyTail": json.dumps(tail), "eventsTail": "[]"}
        counts = {"historyLineCount": count, "eventsLineCount": events, "logLineCount": 0}
        return {"id": run, "name": run, "wandbConfig": '{"t": 1}', "tags": [], **texts, **counts}


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    """A server on a port of this machine."""
    held = Server()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            if not held.answers:
                self.close_connection = True
                return
            self.reply(self.told(body))

        def told(self, body: bytes) -> Row:
            if self.path.endswith("/graphql"):
                asked = json.loads(body)
                return {"data": held.answer(asked["query"], asked.get("variables") or {})}
            if self.path.endswith("/file_stream"):
                held.take(self.path.split("/")[-2], json.loads(body).get("files") or {})
                return {"exitcode": None, "limits": {}}
            return {}

        def reply(self, told: Row) -> None:
            data = json.dumps(told).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = handle_any

        def log_message(self, *args: Any, **kwargs: Any) -> None:
            pass

        def handle(self) -> None:
            with contextlib.suppress(ConnectionError):
                super().handle()

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        held.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield held
        server.shutdown()
