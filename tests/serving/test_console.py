"""The console: who may see it, that it shows what a worker saw, and its page in a browser."""

from __future__ import annotations

import asyncio
import base64
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from browser import Page, browser, chromium
from rogues import Honest, serving
from served import Model
from server import LIMIT, Paced, Server, slip_serve, until
from sliplm.engines.transformers.batching import Batch
from sliplm.engines.transformers.drawing import Drawing
from sliplm.engines.transformers.load import load
from sliplm.engines.transformers.loop import Request, Room
from sliplm.errors import InputError
from sliplm.serving import clients, samples
from sliplm.serving.door import PAGE, STATE, Door
from sliplm.serving.lookout import Lookout
from sliplm.serving.samples import Samples
from sliplm.serving.served import Served
from sliplm.shares.share import open_worker

MARKUP = "<img src=x onerror=alert(1)><script>alert(2)</script>"


class Three(NamedTuple):
    """A server with three workers."""

    server: Server
    workers: dict[str, Paced]
    stops: dict[str, ExitStack]
    keys: dict[str, str]
    folder: Path


@pytest.fixture(scope="module")
def three(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Three]:
    folder = tmp_path_factory.mktemp("console")
    people = folder / "clients"
    keys = {
        "operator": clients.add(people, "operator", console=True, activations=True),
        "onlooker": clients.add(people, "onlooker", console=True, ask=False),
        "bob": clients.add(people, "bob"),
        "graph": clients.add(people, "graph", watch=True, ask=False),
    }
    workers, stops = {}, {}
    with ExitStack() as stack:
        for i in range(3):
            worker, stop = Paced(open_worker(model.out / "worker")), stack.enter_context(ExitStack())
            address = stop.enter_context(serving(worker, folder / f"w{i}"))
            workers[address], stops[address] = worker, stop
        with slip_serve(model.out, folder, "--clients", str(people), workers=[*workers]) as server:
            yield Three(server, workers, stops, keys, folder)


# --- who may see it -----------------------------------------------------------------------------------------


def test_nothing_is_shown_without_a_key_for_it(three: Three) -> None:
    server, keys = three.server, three.keys
    assert server.get(STATE).status_code == 401
    assert server.get(STATE, "slip-x").status_code == 401
    for name in ("bob", "graph"):
        assert server.get(STATE, keys[name]).status_code == 403
    assert server.get("/metrics", keys["operator"]).status_code == 403
    assert server.post("/completions", {}, keys["onlooker"]).status_code == 403
    shown = server.get(STATE, keys["operator"])
    assert shown.headers["cache-control"] == "no-store"
    assert shown.json()["activations"]
    assert not server.get(STATE, keys["onlooker"]).json()["activations"]
    assert server.get(f"{STATE}?since=-1", keys["operator"]).status_code == 400


def test_the_page_holds_nothing_and_lets_nothing_in(three: Three) -> None:
    for path in PAGE:
        found = three.server.get(path)
        assert found.status_code == 200
        assert found.headers["cache-control"] == "no-store"
        policy = found.headers["content-security-policy"].split("; ")
        assert {"default-src 'none'", "script-src 'self'", "frame-ancestors 'none'", "form-action 'none'",
                "require-trusted-types-for 'script'"} <= set(policy)  # fmt: skip
        assert found.headers["x-content-type-options"] == "nosniff"
        assert not {"set-cookie", "access-control-allow-origin"} & set(found.headers)
        text = found.text
        assert not any(
            word in text for word in ("innerHTML", "localStorage", "sessionStorage", "cookie", "eval(")
        )
        assert "tiny" not in text and not any(address in text for address in three.workers)
        assert not [word for word in ("http://", "https://") if word in text]


def test_a_server_without_keys_shows_no_console() -> None:
    said: list[Any] = []

    async def send(message: Any) -> None:
        said.append(message)

    async def nothing(*_: Any) -> Any:
        raise AssertionError

    door = Door(nothing, None, lambda client, refusal: None)
    asyncio.run(door({"type": "http", "path": STATE, "headers": []}, nothing, send))
    assert said[0]["status"] == 403
    assert b"--clients" in said[1]["body"]


def test_activations_are_shown_on_the_console_only(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="on the console only"):
        clients.add(tmp_path, "eve", activations=True)


# --- what it shows ------------------------------------------------------------------------------------------


class Look(NamedTuple):
    """A batch with a worker that remembers what it saw."""

    batch: Batch
    vault: Any
    worker: Honest
    samples: Samples

    def ask(self, most: int = 6) -> None:
        over = threading.Event()
        request = Request(
            [5, 6, 7], most, Drawing(0.0), None, lambda request: over.set() if request.done else None
        )
        self.batch.submit(request)
        assert over.wait(LIMIT)
        assert request.error is None


@pytest.fixture
def look(model: Model, tmp_path: Path) -> Iterator[Look]:
    worker = Honest(open_worker(model.out / "worker"))
    tokenizer: PreTrainedTokenizerBase = model.tokenizer
    with serving(worker, tmp_path / "w") as address:
        loaded = load(model.out / "vault", [address], share=model.out / "worker")
        with loaded.slip, Batch(loaded, Room(1024, 24, 4)) as batch:
            seen = Samples(Lookout(Served("tiny", loaded, tokenizer, batch)))
            yield Look(batch, loaded.slip, worker, seen)


def test_a_console_shows_what_the_worker_saw_and_only_while_it_is_open(
    look: Look, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "_EVERY", 0.0)
    look.ask()
    assert look.vault.watchers == look.batch.watchers == []  # nobody is told anything
    assert look.samples.look(0, bare=True)["rows"] == []
    look.worker.messages.clear()
    look.ask()
    shown = look.samples.look(0, bare=True)
    group = look.vault.groups.index(shown["group"])
    seen = [x for asked, x in look.worker.messages if asked == group]
    assert len(shown["rows"]) == len(seen) == 6  # a prompt, and five tokens
    for row, message in zip(shown["rows"], seen, strict=True):
        n = min(samples.WIDE, message.shape[1])
        masked = np.frombuffer(base64.b64decode(row["masked"]), np.uint8)
        assert np.array_equal(masked, message[0, :n] >> 24)
        true = np.frombuffer(base64.b64decode(row["true"]), np.uint8).astype(int) - 128
        assert np.abs(true).max() == 127
        assert not np.array_equal(masked, true + 128)
    assert sum(shown["counts"]) == sum(message.size for message in seen)
    assert (
        shown["counts"] == np.bincount(np.concatenate([m.ravel() for m in seen]) >> 27, minlength=32).tolist()
    )

    step = shown["step"]
    assert (step["rows"], step["prompt"], step["requests"], step["failed"]) == (1, 0, 1, None)
    assert [each[0] for each in step["exchanges"]] == list(look.vault.groups)
    for _, _, failed, *times, computed in step["exchanges"]:
        assert failed is None
        assert times == sorted(times) and times[0] >= 0 and times[-1] <= step["milliseconds"]
        assert 0 < computed <= times[3] - times[2] + 1

    assert look.samples.look(shown["rows"][-1]["number"], bare=True)["rows"] == []
    others = look.samples.look(0, bare=False)["rows"]
    assert len(others) == 6 and all(row["true"] is None for row in others)


def test_true_activations_are_kept_for_who_may_see_them_and_then_forgotten(
    look: Look, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "_EVERY", 0.0)
    look.samples.look(0, bare=False)
    look.ask()
    assert all(row.true is None for row in look.samples._kept.rows)  # nobody may see them
    look.samples.look(0, bare=True)
    look.ask()
    kept = [row.true for row in look.samples._kept.rows if row.true is not None]
    assert len(kept) == 6
    assert "true" not in repr(look.samples)
    monkeypatch.setattr(look.samples, "_bare_until", time.monotonic())
    look.samples.look(0, bare=False)
    until(lambda: look.samples.rest() or not any(true.any() for true in kept))
    assert all(row.true is None for row in look.samples._kept.rows)
    assert look.samples.open
    monkeypatch.setattr(look.samples, "_until", time.monotonic())
    until(lambda: look.samples.rest() or not look.samples.open)
    assert not look.samples._kept.rows
    assert look.vault.watchers == look.batch.watchers == []
    look.ask()
    assert not look.samples._kept.rows


# --- the page -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    chromium()
    with browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


FOCUS = "document.activeElement.id"
TURNS = "document.querySelectorAll('#talk .turn').length"


def talk(page: Page, text: str) -> None:
    """Say something, by keyboard alone, and wait for the answer."""
    assert page.js(FOCUS) == "message"
    before = page.js(TURNS)
    page.type(text)
    page.press("Enter")
    page.until(f"{TURNS} === {before + 2} && document.getElementById('stop').disabled")


def talk_until(page: Page, seen: str) -> None:
    """Go on until there is something: who is slow for a moment is not asked at once."""
    for _ in range(10):
        talk(page, "Again")
        for _ in range(5):  # looks
            if page.js(f"document.querySelectorAll('{seen}').length"):
                return
            time.sleep(0.2)
    raise AssertionError(f"there never was {seen}")


def asked_last(server: Server, key: str) -> str:
    """Which worker answers now."""
    up = [one for one in parties(server, key) if one["state"] == "up" and one["served"]]
    return str(min(up, key=lambda one: (one["verified"], -one["served"]))["address"])


def test_the_page(page: Page, three: Three, tmp_path: Path) -> None:
    """A whole conversation by keyboard, a liar, a dead worker; nothing of elsewhere, no text that runs."""
    server, key = three.server, three.keys["operator"]
    page.go(f"{server.root}/console")
    assert page.js("getComputedStyle(document.getElementById('room')).display") == "none"
    assert page.js(FOCUS) == "key"
    page.type("slip-wrong")
    page.press("Enter")
    page.until("document.getElementById('door-error').textContent.includes('no such key')")
    page.type(key)
    page.press("Enter")
    page.until("!document.getElementById('room').hidden")
    page.js("document.getElementById('most').value = 12")

    talk(page, MARKUP)
    page.until("document.querySelectorAll('.party.verified').length >= 1")
    page.until("document.getElementById('group').textContent.includes('model.layers.0')")
    page.until("document.getElementById('stages').textContent.includes('worker')")
    assert page.js("document.querySelector('.turn.user .text').textContent") == MARKUP
    assert page.js("document.querySelectorAll('#talk img, #talk script').length") == 0
    assert page.js("document.querySelector('.turn.assistant .text').textContent.length") > 0
    masked, true = page.js("[...document.querySelectorAll('canvas.strip')].map((c) => c.rows.length)")
    assert masked >= 1 and true >= 1

    assert page.js("[...document.querySelectorAll('input, select, textarea')].every((e) => e.labels.length)")
    order = []
    for _ in range(10):
        page.press("Tab")
        order.append(page.js(FOCUS))
    reached = ["send", "anew", "model", "most", "heat", "lock", "talk", "message"]
    assert [name for name in order if name in reached][:8] == reached
    page.js("document.getElementById('message').focus()")

    first = asked_last(server, key)
    three.workers[first].lies = True
    talk_until(page, ".party.quarantined")  # another one answers
    red = page.js("document.querySelector('.party.quarantined').textContent")
    assert first in red and "1 wrong" in red and "is wrong; nothing of it was used" in red
    r, g, b = rgb(page, ".party.quarantined .state")
    assert r > 2 * g and r > 2 * b
    assert "quarantined" in page.js("document.getElementById('said').textContent")

    second = asked_last(server, key)
    three.stops[second].close()
    talk_until(page, ".party.dead")
    assert second in page.js("document.querySelector('.party.dead').textContent")
    grey = rgb(page, ".party.dead .state")
    assert max(grey) - min(grey) < 30
    page.until("document.querySelectorAll('.party.verified').length === 1")

    light = page.js("getComputedStyle(document.body).backgroundColor")
    for dark in (False, True):
        page.picture(tmp_path / f"{dark}.png", dark=dark)
        assert (tmp_path / f"{dark}.png").stat().st_size > 20_000
    assert page.js("getComputedStyle(document.body).backgroundColor") != light

    page.js("document.getElementById('lock').focus()")
    page.press("Enter")
    assert page.js(FOCUS) == "key"
    assert page.js("document.getElementById('talk').childElementCount") == 0
    assert key not in page.js("document.documentElement.outerHTML")
    asked = [event["request"]["url"] for event in page.told("Network.requestWillBeSent")]
    assert len(asked) > 5
    assert all(url.startswith((f"{server.root}/", "data:,")) and key not in url for url in asked)
    assert page.told("Runtime.exceptionThrown") == []
    assert [e["entry"]["text"] for e in page.told("Log.entryAdded") if "401" not in e["entry"]["text"]] == []
    assert page.js("document.cookie.length + localStorage.length + sessionStorage.length") == 0
    assert key not in server.log


def test_an_onlooker_sees_noise_only(page: Page, three: Three) -> None:
    page.go(f"{three.server.root}/console")
    page.type(three.keys["onlooker"])
    page.press("Enter")
    page.until("!document.getElementById('room').hidden")
    body = {"model": "tiny", "prompt": "a", "max_tokens": 4}
    assert three.server.post("/completions", body, three.keys["bob"]).status_code == 200
    page.until("(document.getElementById('masked').rows || []).length > 0")
    assert page.js("(document.getElementById('true').rows || []).length") == 0
    assert page.js(
        "document.getElementById('true-figure').hidden && document.getElementById('message').disabled"
    )
    clients.revoke(three.folder / "clients", "onlooker")
    page.until("document.getElementById('door-error').textContent.includes('no such key')")


def parties(server: Server, key: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = server.get(STATE, key).json()["parties"]
    return found


def rgb(page: Page, selector: str) -> list[int]:
    text = page.js(f"getComputedStyle(document.querySelector('{selector}')).color")
    return [int(part) for part in text.removeprefix("rgb(").rstrip(")").split(",")]
