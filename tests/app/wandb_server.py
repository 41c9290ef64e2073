"""A stand-in for the W&B server, for what the SDK does only with one: it knows runs and takes what is uploaded.

It answers the few requests that `wandb sync` makes, in the way that wandb 0.31 reads them, and nothing else of W&B.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

WHERE = {"id": "p", "name": "p", "entity": {"id": "e", "name": "team"}}


class StandIn(ThreadingHTTPServer):
    """``rows``: the history that each run has, by the line at which it was sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Requests)
        self.rows: dict[str, dict[int, dict[str, Any]]] = {}
        self.requests: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        self.requests.append(operation)
        run = variables.get("name")
        if operation == "RunResumeStatus":
            return {"model": WHERE | {"bucket": self._bucket(run) if run in self.rows else None}}
        if operation == "UpsertBucket":
            new = run not in self.rows
            self.rows.setdefault(run, {})
            return {"upsertBucket": {"bucket": self._bucket(run) | {"project": WHERE}, "inserted": new}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.address}/upload"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "x", "uploadHeaders": [], "files": files}}
        return {}

    def take(self, path: str, sent: dict[str, Any]) -> None:
        """Lines of a run's history."""
        history = sent.get("files", {}).get("wandb-history.jsonl")
        for line, content in enumerate(
            history["content"] if history else (), start=history["offset"] if history else 0
        ):
            self.rows[path.split("/")[-2]][line] = json.loads(content)

    def _bucket(self, run: str) -> dict[str, Any]:
        rows = self.rows[run]
        last = [json.dumps(rows[max(rows)])] if rows else []
        return {
            "id": "x", "name": run, "displayName": run, "description": "", "sweepName": None, "tags": [],
            "config": "{}", "summaryMetrics": "{}", "wandbConfig": '{"t": 1}', "logLineCount": 0,
            "historyLineCount": len(rows), "eventsLineCount": 0, "historyTail": json.dumps(last), "eventsTail": "[]",
        }  # fmt: skip


class Requests(BaseHTTPRequestHandler):
    server: StandIn

    def do_POST(self) -> None:
        sent = json.loads(self._body() or b"{}")
        if self.path.endswith("file_stream"):
            self.server.take(self.path, sent)
            self._reply({})
        else:
            self._reply({"data": self.server.answer(sent.get("operationName", ""), sent.get("variables", {}))})

    def do_PUT(self) -> None:
        self._body()
        self._reply({})

    def do_GET(self) -> None:
        self._reply({})

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _reply(self, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def stand_in() -> Iterator[StandIn]:
    with StandIn() as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()
