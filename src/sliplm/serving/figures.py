"""Figures to watch, for Prometheus: vLLM's names after the colon, with its label, and our own beside them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sliplm.parties.standing import Status
from sliplm.serving.served import Served

_SECONDS: Final = (
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
)
_TOKENS: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000)


@dataclass
class Figures:
    """What one server counts.

    Attributes:
        registry: of Prometheus, with everything in it.
    """

    served: Served
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)

    def __post_init__(self) -> None:
        disable_created_metrics()  # a series more for each

        def seconds(name: str, what: str) -> Histogram:
            return self._histogram(f"{name}_seconds", what, _SECONDS)

        self.first = seconds("time_to_first_token", "From the request to its first token.")
        self.between = seconds("inter_token_latency", "From one token to the next.")
        self.whole = seconds("e2e_request_latency", "From the request to its last token.")
        self.prompt_size = self._histogram("request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self.answer_size = self._histogram("request_generation_tokens", "Tokens of an answer.", _TOKENS)
        self.prompts = self._counter("prompt_tokens", "Tokens of prompts that were read.")
        self.generated = self._counter("generation_tokens", "Tokens that were generated.")
        self.answered = self._counter("request_success", "Answers, by how they ended.", "finished_reason")
        self.refused = self._counter("request_refused", "Requests without one, by status.", "status")
        for name in self.served.names:  # from nought on
            for each in (self.first, self.between, self.whole, self.prompt_size, self.answer_size):
                each.labels(name)
            self.prompts.labels(name), self.generated.labels(name)
            self.answered.labels(name, "stop"), self.answered.labels(name, "length")
        self.registry.register(_Sides(self.served))

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"sliplm:{name}", what, ["model_name"], buckets=buckets, registry=self.registry)

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(f"sliplm:{name}", what, ["model_name", *labels], registry=self.registry)


class _Sides(Collector):  # type: ignore[misc]
    """What batch and vault count by themselves, read when it is asked for."""

    def __init__(self, served: Served) -> None:
        self._served = served

    def describe(self) -> list[Metric]:
        """Nothing before the first reading."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All of it."""
        name, vault, load = self._served.name, self._served.model.slip, self._served.batch.load
        counters: dict[str, Any] = vault.counters.as_dict()

        def gauge(key: str, what: str, value: float) -> Metric:
            family = GaugeMetricFamily(f"sliplm:{key}", what, labels=["model_name"])
            family.add_metric([name], value)
            return family

        def counted(key: str, what: str, label: str, values: dict[str, float]) -> Metric:
            family = CounterMetricFamily(f"sliplm:{key}", what, labels=["model_name", label])
            for each, value in values.items():
                family.add_metric([name, each], value)
            return family

        yield gauge("num_requests_running", "Answers that are computed now.", load.running)
        yield gauge("num_requests_waiting", "Answers that wait for a place.", load.waiting)
        yield gauge("kv_cache_usage_perc", "The part of the cache that is in use, up to 1.", load.cache)
        yield gauge("mask_stock_bytes", "Memory that ready masks take.", vault.mask_bytes())
        rows = vault.mask_rows().values()
        yield gauge("mask_stock_rows", "Rows of masks that are ready, of all groups.", sum(rows))
        yield gauge("mask_stock_rows_min", "The same of the group that has the fewest.", min(rows))
        yield counted(
            "exchanges", "Exchanges with workers, and what they needed.", "kind",
            {"served": counters["exchanges"], "retried": counters["retries"],
             "renewed": counters["renewals"]},
        )  # fmt: skip
        yield counted(
            "wire_bytes", "Bytes of messages.", "direction",
            {"sent": counters["bytes_sent"], "received": counters["bytes_received"]},
        )  # fmt: skip
        yield counted("rows", "Rows of products, by what became of them.", "kind", _named(counters, "rows"))
        yield counted("stage_seconds", "Seconds by where they went.", "stage", _named(counters, "seconds"))
        yield counted("events", "Events of the audit record.", "event", dict(vault.audit.counts))
        yield from _of_each(name, (("worker", vault.workers), ("dealer", vault.dealers)))


def _named(counters: dict[str, Any], prefix: str) -> dict[str, float]:
    """Counters that begin alike, by the rest of their names."""
    return {
        key.removeprefix(prefix).removeprefix("_") or "all": value
        for key, value in counters.items()
        if key.startswith(prefix)
    }


def _of_each(name: str, forces: Iterable[tuple[str, Sequence[Status]]]) -> Iterator[Metric]:
    """The figures of each worker and dealer."""
    labels = ["model_name", "role", "address"]
    up = GaugeMetricFamily("sliplm:worker_up", "Whether it serves.", labels=[*labels, "state"])
    served = CounterMetricFamily("sliplm:worker_exchanges", "Exchanges, or batches of masks.", labels=labels)
    wrong = CounterMetricFamily("sliplm:failed_checks", "Answers that failed the check.", labels=labels)
    fallen = CounterMetricFamily("sliplm:quarantines", "How often it was quarantined.", labels=labels)
    for role, force in forces:
        for each in force:
            who = [name, role, each.address]
            up.add_metric([*who, each.state], float(each.state == "up"))
            served.add_metric(who, each.served)
            wrong.add_metric(who, each.wrong)
            fallen.add_metric(who, each.quarantines)
    return iter((up, served, wrong, fallen))
