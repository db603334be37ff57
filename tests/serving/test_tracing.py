"""Traces: a request, its steps, their exchanges by worker; nothing of what was said."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import httpx2 as httpx
import pytest

pytest.importorskip("opentelemetry.sdk", reason="needs sliplm[otel]")

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from rogues import serving
from served import Model
from server import Paced, until
from sliplm.engines.transformers.batching import Batch
from sliplm.engines.transformers.load import load
from sliplm.engines.transformers.loop import Room
from sliplm.errors import InputError
from sliplm.serving import clients
from sliplm.serving.app import build
from sliplm.serving.clients import Clients
from sliplm.serving.desk import Desk
from sliplm.serving.figures import Figures
from sliplm.serving.limits import Limits
from sliplm.serving.served import Served
from sliplm.serving.tracing import Traces, to_collector
from sliplm.shares.share import open_worker

PROMPT = "a secret between us"


class Traced(NamedTuple):
    """A server's inside, with two workers."""

    app: Any
    key: str
    exporter: InMemorySpanExporter
    workers: dict[str, Paced]
    served: Served

    def ask(self, *prompts: str, most: int = 4) -> list[Any]:
        """What comes of requests made at once."""

        async def all_of_them() -> list[Any]:
            transport = httpx.ASGITransport(app=self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                headers = {
                    "authorization": f"Bearer {self.key}",
                    "traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01",
                }
                bodies = [
                    {"model": "tiny", "prompt": text, "max_tokens": most, "temperature": 0}
                    for text in prompts
                ]
                asked = [client.post("/v1/completions", json=body, headers=headers) for body in bodies]
                return list(await asyncio.gather(*asked))

        return asyncio.run(all_of_them())

    def spans(self, kind: str = "") -> list[ReadableSpan]:
        found = sorted(self.exporter.get_finished_spans(), key=lambda span: span.start_time or 0)
        return [span for span in found if span.name.startswith(kind)]


@pytest.fixture
def traced(model: Model, tmp_path: Path) -> Iterator[Traced]:
    exporter = InMemorySpanExporter()
    key = clients.add(tmp_path, "alice")
    liar, honest = (Paced(open_worker(model.out / "worker")) for _ in range(2))
    with serving(liar, tmp_path / "a") as one, serving(honest, tmp_path / "b") as two:
        loaded = load(model.out / "vault", [one, two], share=model.out / "worker")
        with loaded.slip, Batch(loaded, Room(1024, 24, 4)) as batch:
            served = Served("tiny", loaded, model.tokenizer, batch)
            traces = Traces(SimpleSpanProcessor(exporter))
            desk = Desk(served, Clients(tmp_path), Limits(), Figures(served), traces)
            yield Traced(build(desk), key, exporter, {one: liar, two: honest}, served)


def test_a_request_its_steps_and_their_exchanges(traced: Traced) -> None:
    [answer] = traced.ask(PROMPT)
    assert answer.status_code == 200
    [request] = traced.spans("text_completion")
    told = dict(request.attributes or {})
    assert told.pop("sliplm.request") == answer.headers["x-request-id"]
    assert told == {
        "gen_ai.operation.name": "text_completion", "gen_ai.request.model": "tiny", "sliplm.answers": 1,
        "gen_ai.usage.input_tokens": len(PROMPT), "gen_ai.usage.output_tokens": 4, "sliplm.end": "answered",
    }  # fmt: skip
    assert request.parent is None  # a client's own trace is not read
    [prefill], decodes = traced.spans("prefill"), traced.spans("decode")
    assert len(decodes) == 3
    groups = traced.served.model.slip.groups
    for step in (prefill, *decodes):
        assert step.parent is not None and request.context is not None
        assert (step.parent.span_id, step.links) == (request.context.span_id, ())
        inside = [
            s for s in traced.spans("exchange") if s.parent and s.parent.span_id == step.context.span_id
        ]
        assert [span.attributes["sliplm.group"] for span in inside] == list(groups)
        assert {span.attributes["server.address"] for span in inside} <= set(traced.workers)
        for span in inside:
            assert step.start_time <= span.start_time <= span.end_time <= step.end_time
    assert prefill.attributes["sliplm.rows.prompt"] == len(PROMPT)


def test_requests_of_one_step_are_linked(traced: Traced) -> None:
    assert [a.status_code for a in traced.ask("a", "b", "c", most=12)] == [200] * 3
    contexts = {span.context.span_id for span in traced.spans("text_completion")}
    shared = [span for span in traced.spans() if span.links]
    assert shared
    for span in shared:
        assert {span.parent.span_id, *(link.context.span_id for link in span.links)} <= contexts
        assert len(span.links) < span.attributes["sliplm.requests"] <= 3


def test_a_lie_is_an_error_of_its_exchange(traced: Traced) -> None:
    traced.ask("a")
    [first] = {span.attributes["server.address"] for span in traced.spans("exchange")}
    traced.workers[first].lies = True
    [answer] = traced.ask("a")
    assert answer.status_code == 200
    [bad] = [span for span in traced.spans() if span.status.status_code is StatusCode.ERROR]
    assert (bad.name, bad.status.description) == ("exchange", "VerificationError")
    assert bad.attributes["server.address"] == first


def test_a_trace_tells_nothing_of_what_was_said(traced: Traced) -> None:
    [answer] = traced.ask(PROMPT, most=8)
    said = answer.json()["choices"][0]["text"]
    everything = "".join(span.to_json() for span in traced.spans())
    for secret in (PROMPT, json.dumps(said)[1:-1], traced.key, "alice"):
        assert secret not in everything
    assert not [span for span in traced.spans() if span.events]
    allowed = (str, int, float)
    values = [value for span in traced.spans() for value in (span.attributes or {}).values()]
    assert values and all(isinstance(value, allowed) for value in values)  # no arrays


@contextmanager
def collector() -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """Something that listens as a collector does, and what it was sent."""
    got: list[tuple[str, bytes]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", got
        finally:
            server.shutdown()
            thread.join()


def test_a_collector_gets_what_is_left_at_the_end() -> None:
    with collector() as (url, got):
        traces = to_collector(url)
        traces.begin("1", "chat", "tiny", []).end("answered", 3, 4)
        traces.close()
        until(lambda: bool(got))
    [(path, body)] = got
    assert path == "/v1/traces"
    assert b"chat tiny" in body


@pytest.mark.parametrize(
    "url", ["", "collector:4318", "ftp://collector", "http://", "http://me:pass@collector"]
)
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(InputError, match="a collector's address"):
        to_collector(url)
