"""Download an archive straight from the package index that pip is configured for, executing nothing."""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin, urlsplit, urlunsplit
from urllib.request import Request, url2pathname, urlopen

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from sliplm import places
from sliplm.errors import FetchError

_ACCEPT = "application/vnd.pypi.simple.v1+json, text/html;q=0.5"
_SECONDS = 60


def download(name: str, version: str, kind: str, folder: Path) -> Path:
    """Download the archive of a package from pip's find-links folders or indexes into folder.

    Returns:
        The path of the archive, of the hash that the index gives, where it gives one.

    Raises:
        FetchError: no index has it, none can be reached, or it arrived damaged.
    """
    settings = _pip_settings()
    for link in settings.get("find-links", "").split():
        place = places.expanded(url2pathname(urlsplit(link).path) if link.startswith("file:") else link)
        for path in sorted(place.iterdir()) if place.is_dir() else ():
            if _matches(path.name, name, version, kind):
                return Path(shutil.copy(path, folder))
    if settings.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        raise FetchError("pip's settings allow no index, and no find-links folder has it.")
    reasons = []
    first = settings.get("index-url", "https://pypi.org/simple")
    for address in (first, *settings.get("extra-index-url", "").split()):
        page = f"{address.rstrip('/')}/{re.sub(r'[-_.]+', '-', name).lower()}/"
        try:
            for file, url, sha256 in _files(page, settings):
                if _matches(file, name, version, kind):
                    return _save(url, folder / file, sha256, settings)
            reasons.append(f"{_plain(page)} does not list it")
        except (OSError, ValueError, HTTPException) as error:
            reasons.append(f"{_plain(page)}: {error}")
    raise FetchError(f"no index gave it ({'; '.join(reasons)}).")


def _pip_settings() -> dict[str, str]:
    """pip's own view of its configuration files and PIP_ variables, or the variables alone without pip."""
    names = ("find-links", "no-index", "index-url", "extra-index-url", "cert")
    command = [sys.executable, "-P", "-m", "pip", "config", "list", "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    found = {}
    for section in ("global", "download"):
        for line in done.stdout.splitlines() if done.returncode == 0 else ():
            key, _, value = line.partition("=")
            if key.removeprefix(f"{section}.") in names:
                found[key.removeprefix(f"{section}.")] = str(ast.literal_eval(value))
    for key in names:
        if variable := os.environ.get(f"PIP_{key.replace('-', '_').upper()}"):
            found[key] = variable
    return found


def _matches(file: str, name: str, version: str, kind: str) -> bool:
    def same(text: str) -> str:
        return re.sub(r"[-_.]+", "-", text).lower()

    if kind == "sdist":
        return file.endswith(".tar.gz") and same(file.removesuffix(".tar.gz")) == same(f"{name}-{version}")
    # Only wheels that suit every machine, since nothing here is meant to run.
    return file.endswith("-none-any.whl") and same(file).startswith(same(f"{name}-{version}") + "-py")


def _files(page: str, settings: dict[str, str]) -> Iterator[tuple[str, str, str | None]]:
    """(file name, address, sha256 or None) of each file that an index page lists, JSON or HTML."""
    with _open(page + "index.html" if page.startswith("file:") else page, settings) as answer:
        base, body = answer.url, answer.read()
        is_json = "json" in answer.headers.get("Content-Type", "")
    if is_json:
        for file in json.loads(body)["files"]:
            sha256 = file.get("hashes", {}).get("sha256")
            yield Path(file["filename"]).name, urljoin(base, file["url"]), sha256
        return
    links = _Links()
    links.feed(body.decode("utf-8", "replace"))
    for link in links.found:
        url, fragment = urldefrag(urljoin(base, link))
        sha256 = fragment.removeprefix("sha256=") if fragment.startswith("sha256=") else None
        yield unquote(url.rpartition("/")[2]), url, sha256


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.found += [value for key, value in attrs if key == "href" and value]


def _save(url: str, target: Path, sha256: str | None, settings: dict[str, str]) -> Path:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    digest = hashlib.sha256()
    with (
        _open(url, settings) as answer,
        target.open("wb") as out,
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        length = int(answer.headers.get("Content-Length") or 0)
        task = progress.add_task(f"Downloading {target.name}", total=length or None)
        while block := answer.read(1 << 20):
            out.write(block)
            digest.update(block)
            progress.advance(task, len(block))
        if length and out.tell() != length:
            raise ValueError(f"only {out.tell()} of {length} bytes of {target.name} came")
    if sha256 is not None and digest.hexdigest() != sha256:
        raise ValueError(f"{target.name} is not of the hash that the index gives")
    return target


def _open(url: str, settings: dict[str, str]) -> Any:
    parts = urlsplit(url)
    request = Request(_plain(url), headers={"Accept": _ACCEPT, "User-Agent": "sliplm"})
    if parts.username is not None:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        # Unredirected: a private index's password is for that index alone.
        request.add_unredirected_header("Authorization", "Basic " + base64.b64encode(pair.encode()).decode())
    trust = ssl.create_default_context()
    if cert := settings.get("cert"):
        trust.load_verify_locations(**({"capath": cert} if Path(cert).is_dir() else {"cafile": cert}))
    return urlopen(request, timeout=_SECONDS, context=trust)


def _plain(url: str) -> str:
    """The address without a user name and password."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
