"""What is no request of OpenAI's client: the status, the reason, and the server lives."""

from __future__ import annotations

import contextlib
import json
import resource
import socket
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from served import Running
from server import Server, until
from sliplm.serving import clients, door

BODY = {"model": "tiny", "prompt": "a", "max_tokens": 2}
LONG = {"model": "tiny", "prompt": "a", "max_tokens": 400, "temperature": 0}


@pytest.fixture(autouse=True)
def lives(running: Running) -> Iterator[None]:
    """Whatever came before, a request is answered after it, and no place is taken."""
    yield
    running.worker.pause = 0.0
    found = running.server.post("/completions", BODY, running.keys["bob"])
    assert found.status_code == 200
    until(lambda: load(running) == (0.0, 0.0))


def load(running: Running) -> tuple[float, float]:
    server, key = running.server, running.keys["graph"]
    return server.figure("sliplm:num_requests_running", key), server.figure("sliplm:kv_cache_usage_perc", key)


def code(answer: Any) -> tuple[int, str | None]:
    return answer.status_code, answer.json()["error"]["code"]


def last_asked(running: Running) -> dict[str, Any]:
    lines = (running.folder / "clients" / "audit.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["event"] == "asked"][-1]


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b"[]", b"null", b'"text"', b'{"model": "tiny", "prompt": "\xff\xfe"}', b"\x00" * 100,
        b"[" * 100_000, b'{"model": NaN}', b'{"model": "tiny", "prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b'{"model": "tiny", "prompt": {"$ref": "#"}}', b'{"model": ["tiny"], "prompt": "a"}',
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/completions", "/chat/completions"])
def test_bodies_that_are_none(running: Running, path: str, data: bytes) -> None:
    found = running.server.post(path, data, running.keys["bob"])
    assert found.status_code == 400
    assert found.json()["error"]["message"]


def test_a_body_that_is_too_large(running: Running) -> None:
    key, big = running.keys["bob"], b" " * (3 << 20)
    assert code(running.server.post("/completions", big, key)) == (413, "body_too_large")
    with running.server.connect() as sock:  # without its length
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\n"
        sock.sendall(head.encode() + b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            for _ in range(40):
                sock.sendall(b"10000\r\n" + b" " * 0x10000 + b"\r\n")
        assert b" 413 " in sock.recv(100)


@pytest.mark.parametrize(
    "headers",
    [
        "", "Authorization: Bearer \r\n", "Authorization: Basic YTpi\r\n", "Authorization: Bearer slip-x\r\n",
        "Authorization: Bearer \xff\xfe\r\n", "Authorization: Bearer KEY\r\nAuthorization: Bearer KEY\r\n",
    ],
)  # fmt: skip
def test_without_a_key_no_body_is_read(running: Running, headers: str) -> None:
    """The refusal comes before the body does."""
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n"
    text = (head + headers.replace("KEY", running.keys["bob"]) + "\r\n").encode("latin-1")
    with running.server.connect() as sock:
        sock.sendall(text)
        assert sock.recv(100).startswith(b"HTTP/1.1 401 ")


def test_keys_are_for_what_they_are_for(running: Running) -> None:
    server, keys = running.server, running.keys
    assert code(server.post("/completions", BODY, keys["graph"])) == (403, "not_allowed")
    assert code(server.get("/metrics", keys["bob"])) == (403, "not_allowed")
    assert code(server.get("/metrics")) == (401, "invalid_api_key")
    assert code(server.get("/openapi.json")) == (401, "invalid_api_key")
    assert server.get("/metrics", keys["graph"]).status_code == 200
    body = BODY | {"logprobs": 6}
    assert code(server.post("/completions", body, keys["alice"])) == (403, "not_allowed")
    assert server.post("/completions", body | {"logprobs": 5}, keys["alice"]).status_code == 200
    body = BODY | {"logprobs": 0, "echo": True, "max_tokens": 0}
    assert code(server.post("/completions", body, keys["bob"])) == (403, "not_allowed")


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.usefixtures("slow")
def test_a_client_that_hangs_up(running: Running, stream: bool) -> None:
    """Its place is free again at once, and what it had is charged."""
    with running.server.connect() as sock:
        _send(sock, LONG | {"stream": stream}, running.keys["bob"])
        until(lambda: load(running)[0] > 0)
        if stream:
            assert b"200 OK" in sock.recv(1000)
    until(lambda: load(running) == (0.0, 0.0))
    record = last_asked(running)
    assert record["address"] == "bob"
    assert record["detail"]["generated"] < 400
    assert record["reason"] != "answered"


@pytest.mark.usefixtures("slow")
def test_who_hangs_up_before_a_token_came_pays_for_his_prompt(running: Running) -> None:
    """Else it could have prompts read for nothing, as many as it likes."""
    running.worker.pause = 0.1
    with running.server.connect() as sock:
        _send(sock, LONG | {"prompt": "a" * 60}, running.keys["bob"])
        until(lambda: load(running)[1] > 0)
    until(lambda: load(running) == (0.0, 0.0))
    detail = last_asked(running)["detail"]
    assert (detail["prompt"], detail["generated"], detail["charged"]) == (60, 0, 60)


@pytest.mark.usefixtures("slow")
def test_a_key_that_is_taken_back_in_mid_stream(running: Running) -> None:
    people = running.folder / "clients"
    key = clients.add(people, "mallory")
    until(lambda: running.server.get("/v1/models", key).status_code == 200)
    stream = running.server.client(key).completions.create(**LONG, stream=True)
    next(stream)
    clients.revoke(people, "mallory")
    with pytest.raises(openai.APIError, match="your key was taken back"):
        list(stream)
    assert code(running.server.get("/v1/models", key)) == (401, "invalid_api_key")
    until(lambda: load(running)[0] == 0)


def test_a_thousand_idle_connections(running: Running) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4096)), hard))
    try:
        with contextlib.ExitStack() as idle:
            for i in range(1000):
                sock = idle.enter_context(running.server.connect())
                if i % 2:
                    sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n")  # half a request
            assert running.server.post("/completions", BODY, running.keys["bob"]).status_code == 200
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_bodies_that_never_end_take_no_more_than_their_part(running: Running) -> None:
    """They lie in memory: of one client so many, and no more; others are served."""
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {running.keys['bob']}\r\n"
    )
    part = (head + "Content-Type: application/json\r\nContent-Length: 2000000\r\n\r\n").encode() + b" " * 1000
    with contextlib.ExitStack() as held:
        for _ in range(door.OF_ONE):
            held.enter_context(running.server.connect()).sendall(part)
        until(lambda: running.server.post("/completions", BODY, running.keys["bob"]).status_code == 429)
        assert running.server.post("/completions", BODY, running.keys["alice"]).status_code == 200
    until(lambda: running.server.post("/completions", BODY, running.keys["bob"]).status_code == 200)


def test_the_smallest_numbers(running: Running) -> None:
    body = BODY | {"temperature": 2, "top_p": 1e-300, "seed": 1}
    assert running.server.post("/completions", body, running.keys["bob"]).status_code == 200


def test_no_path_leads_to_another(running: Running) -> None:
    for path in ("/metrics/", "/console/state/", "//metrics", "/health/../metrics", "/console/state;x"):
        found = running.server.get(path, running.keys["bob"])
        assert code(found) in ((404, "not_found"), (403, "not_allowed"))  # the client itself takes .. out
        assert "location" not in found.headers
    assert code(running.server.get("/%6detrics", running.keys["bob"])) == (403, "not_allowed")


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET\r\n\r\n",
        b"GET / HTTP/1.1\r\nx: " + b"y" * 100_000 + b"\r\n\r\n",
    ],
)
def test_what_is_no_http(running: Running, data: bytes) -> None:
    with running.server.connect() as sock:
        with contextlib.suppress(ConnectionError):
            sock.sendall(data + b"\r\n\r\n")
            assert sock.recv(100).startswith((b"HTTP/1.1 400", b""))


def test_whole_numbers_may_be_written_with_a_point(running: Running) -> None:
    text = b'{"model": "tiny", "prompt": [5.0, 6], "max_tokens": 2.0, "seed": 1e2}'
    assert running.server.post("/completions", text, running.keys["bob"]).status_code == 200


def test_the_description_names_the_models(running: Running) -> None:
    schemas = running.server.get("/openapi.json", running.keys["bob"]).json()["components"]["schemas"]
    assert schemas["Chat"]["properties"]["model"]["enum"] == ["tiny", "fr"]
    assert "Troubled" in schemas


def test_other_paths_and_methods(running: Running) -> None:
    server, key = running.server, running.keys["bob"]
    assert code(server.get("/v1/files", key)) == (404, "not_found")
    assert code(server.get("/v1/models/gpt-4", key)) == (404, "model_not_found")
    found = server.get("/v1/completions", key)
    assert code(found) == (405, "method_not_allowed")
    assert found.headers["allow"] == "POST"
    assert code(server.get("/docs", key)) == (404, "not_found")


def _send(sock: socket.socket, body: dict[str, Any], key: str) -> None:
    data = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    sock.sendall(head.encode() + data)


def test_nothing_of_the_server_is_said(running: Running) -> None:
    found = running.server.get("/v1/models", running.keys["bob"])
    assert "server" not in found.headers
    assert isinstance(running.server, Server)
    assert len(found.headers["x-request-id"]) == 24
