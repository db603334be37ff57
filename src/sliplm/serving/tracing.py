"""Traces, by OpenTelemetry: a request, the steps that it was computed in, and their exchanges by worker.

They hold names, counts and times: no prompt, answer, activation or key, and no client's name; the request's
number is that of the audit record.  A step of several requests is told under the first of them, with links to
the others.  What clients send as a trace of theirs is not read.  Needs `pip install 'sliplm[otel]'`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from time import perf_counter_ns
from typing import Any
from urllib.parse import urlsplit

from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.trace import Link, NonRecordingSpan, SpanKind, Status, StatusCode, set_span_in_context

from sliplm.arithmetic.field import Elements
from sliplm.engines.transformers.loop import Request, Step
from sliplm.errors import InputError
from sliplm.parties.exchange import Timed
from sliplm.shares.share import sliplm_version


class Traces:
    """Makes spans of what a server does.  It is an `Onlooker` of the batch.

    Args:
        processor: where finished spans go.
    """

    def __init__(self, processor: SpanProcessor) -> None:
        resource = Resource.create({SERVICE_NAME: "sliplm", SERVICE_VERSION: sliplm_version()})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("sliplm")
        self._of: dict[Request, Any] = {}  # contexts of the spans of requests that are under way

    def begin(self, request: str, operation: str, model: str, parts: Sequence[Request]) -> Traced:
        """The span of a request.

        Args:
            request: its number.
            operation: "chat" or "text_completion".
            parts: what the batch computes for it.
        """
        span = self._tracer.start_span(
            f"{operation} {model}", kind=SpanKind.SERVER,
            attributes={"gen_ai.operation.name": operation, "gen_ai.request.model": model,
                        "sliplm.request": request, "sliplm.answers": len(parts)},
        )  # fmt: skip
        if span.is_recording():
            self._of.update(dict.fromkeys(parts, span.get_span_context()))
        return Traced(self, span, parts)

    def exchanged(self, timed: Timed, x: Any, message: Callable[[], Elements]) -> None:
        """Nothing: exchanges are told with their step."""

    def stepped(self, step: Step, exchanges: Sequence[Timed]) -> None:
        """The spans of a step and its exchanges, unless none of its requests is traced."""
        found = [self._of.get(request) for request in step.requests]
        contexts = list({context.span_id: context for context in found if context is not None}.values())
        if not contexts:
            return
        clock = time.time_ns() - perf_counter_ns()
        span = self._tracer.start_span(
            "prefill" if step.prompt else "decode", set_span_in_context(NonRecordingSpan(contexts[0])),
            links=[Link(context) for context in contexts[1:]], start_time=_ns(step.begun, clock),
            attributes={"sliplm.rows": step.rows, "sliplm.rows.prompt": step.prompt,
                        "sliplm.requests": len(step.requests)},
        )  # fmt: skip
        inside = set_span_in_context(span)
        for timed in exchanges:
            self._exchange(timed, inside, clock)
        _end(span, step.failed, _ns(step.ended, clock))

    def forget(self, parts: Sequence[Request]) -> None:
        """Trace nothing more for these."""
        for part in parts:
            self._of.pop(part, None)

    def close(self) -> None:
        """Hand over what is left."""
        self._provider.shutdown()

    def _exchange(self, timed: Timed, inside: Any, clock: int) -> None:
        span = self._tracer.start_span(
            "exchange", inside, kind=SpanKind.CLIENT, start_time=_ns(timed.begun, clock),
            attributes={
                "server.address": timed.worker.partition("?")[0], "sliplm.group": timed.group,
                "sliplm.rows": timed.rows, "sliplm.seconds.burn": timed.taken - timed.begun,
                "sliplm.seconds.mask": timed.asked - timed.taken,
                "sliplm.seconds.wait": timed.answered - timed.asked, "sliplm.seconds.worker": timed.computed,
                "sliplm.seconds.check": timed.checked - timed.answered,
                "sliplm.seconds.open": timed.ended - timed.checked,
            },
        )  # fmt: skip
        _end(span, timed.failed, _ns(timed.ended, clock))


class Traced:
    """A request's span, until it ends."""

    def __init__(self, traces: Traces, span: Any, parts: Sequence[Request]) -> None:
        self._traces, self._span, self._parts = traces, span, parts

    def end(self, how: str, prompt: int, generated: int) -> None:
        """Once.

        Args:
            how: as the audit record has it.
            prompt, generated: tokens.
        """
        self._traces.forget(self._parts)
        self._span.set_attributes(
            {"gen_ai.usage.input_tokens": prompt, "gen_ai.usage.output_tokens": generated, "sliplm.end": how}
        )
        _end(self._span, None if how in ("answered", "given up") else how)


def to_collector(url: str) -> Traces:
    """Traces that go to a collector, by OTLP over HTTP, in batches beside everything else.

    Args:
        url: its base, such as http://127.0.0.1:4318.  Headers, certificates and the part of requests that is
            traced are those of OpenTelemetry's variables of the environment.

    Raises: InputError for what is no such address.
    """
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    found = urlsplit(url)
    if found.scheme not in ("http", "https") or not found.hostname or found.username is not None:
        raise InputError(
            "--traces is a collector's address, such as http://127.0.0.1:4318, without a name or password: "
            "headers are OTEL_EXPORTER_OTLP_HEADERS"
        )
    path = "" if found.path.rstrip("/").endswith("/v1/traces") else "/v1/traces"
    return Traces(BatchSpanProcessor(OTLPSpanExporter(endpoint=url.rstrip("/") + path)))


def _ns(seconds: float, clock: int) -> int:
    return int(seconds * 1e9) + clock


def _end(span: Any, failed: str | None, at: int | None = None) -> None:
    if failed is not None:
        span.set_status(Status(StatusCode.ERROR, failed))
    span.end(at)
