"""The harness asks a server, and is told what share of the heads was sparse."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from elasticore.eval.evaluate import Evaluation
from elasticore.models.loading import load_tokenizer
from recipes.serving.evaluate import decided, run


class Stub(BaseHTTPRequestHandler):
    """Answers every prompt with its own last words, and counts its tokens."""

    prompts: list[list[int]]

    def do_GET(self) -> None:
        count = len(self.prompts)
        lines = [
            "# HELP elasticore_sparse_share Share of sparse heads",
            f"elasticore_sparse_share_count {count}.0",
            f'elasticore_sparse_share_sum{{engine="0"}} {0.75 * count}',
        ]
        self._say("\n".join(lines) + "\n", "text/plain")

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.prompts.extend(asked["prompt"])
        assert asked["temperature"] == 0
        text = load_tokenizer("tiny").decode(asked["prompt"][0])
        choices = [{"index": 0, "text": text}]
        self._say(json.dumps({"choices": choices}), "application/json")

    def _say(self, text: str, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args: Any) -> None:
        """Nothing."""


@pytest.fixture
def url() -> Iterator[str]:
    Stub.prompts = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_tasks_are_asked_and_scored(url: str) -> None:
    tasks = ("ruler-like:niah_single_1", "ruler-like:vt")
    evaluation = Evaluation("tiny", tasks, lengths=(1024,), samples=3)
    rows = run(url, "model", evaluation, positions=2048, at_once=2)
    # Whoever repeats the whole prompt has the needle in the answer.
    assert rows == [{"task": task, "score": 100.0, "prompts": 3, "msr": 0.75} for task in tasks]
    assert len(Stub.prompts) == 6 and all(700 < len(p) <= 1024 for p in Stub.prompts)
    assert decided(url) == (6.0, 4.5)
