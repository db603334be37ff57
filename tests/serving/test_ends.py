"""A server with TLS and a worker of its own: reached by certificate, and gone with all that it began."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import ssl
import threading
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from openai import OpenAI

from served import Model
from server import LIMIT, slip_serve


def certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate for this machine, signed by itself, and its key."""
    key, name = (
        ec.generate_private_key(ec.SECP256R1()),
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")]),
    )
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False
        )
        .sign(key, hashes.SHA256())
    )
    cert, secret = folder / "cert.pem", folder / "key.pem"
    cert.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    pem, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    secret.write_bytes(key.private_bytes(pem, form, serialization.NoEncryption()))
    return cert, secret


def test_tls_and_the_end(model: Model, tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    trusted = ssl.create_default_context(cafile=cert)
    with slip_serve(model.out, tmp_path, "--tls-cert", str(cert), "--tls-key", str(key)) as server:
        assert server.url.startswith("https://127.0.0.1:")
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.root}/health", timeout=LIMIT)  # nobody vouches for it
        assert httpx.get(f"{server.root}/health", verify=trusted, timeout=LIMIT).status_code == 200
        evil = httpx.get(
            f"{server.url}/models", headers={"host": "evil.example"}, verify=trusted, timeout=LIMIT
        )
        assert evil.status_code == 400  # a name of somebody else's that leads here
        workers = children(server.process.pid)
        assert len(workers) == 1

        client = OpenAI(
            base_url=server.url, api_key="none", max_retries=0, timeout=LIMIT,
            http_client=httpx.Client(verify=trusted, timeout=LIMIT),
        )  # fmt: skip
        ask: Any = {"model": "tiny", "prompt": "The", "temperature": 0, "max_tokens": 400}
        assert client.completions.create(**ask | {"max_tokens": 20}).choices[0].text == model.text("The", 20)
        stream, begun, ended = (
            client.completions.create(**ask, stream=True),
            threading.Event(),
            threading.Event(),
        )

        def read() -> None:
            try:
                for _ in stream:
                    begun.set()
            except Exception:
                pass
            ended.set()

        reader = threading.Thread(target=read)
        reader.start()
        assert begun.wait(LIMIT)
        server.process.terminate()
        assert server.process.wait(LIMIT) == 143
        assert ended.wait(LIMIT)
        reader.join(LIMIT)
        client.close()
        assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert "Traceback" not in server.log


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):  # it has ended
            if f"PPid:\t{pid}\n" in status.read_text():
                found.append(int(status.parent.name))
    return found
