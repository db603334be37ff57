"""Fuzz target: frames read from a stream that arrives in any pieces, by both sides, through `Connection`."""

from __future__ import annotations

import socket
import time
from typing import cast

from fuzz_protocol import NONCE, SPLIT_ID, check, header_bytes
from sliplm.errors import SlipError
from sliplm.network.transport import Connection
from sliplm.protocol import frames as wire
from sliplm.protocol.frames import Header, Kind
from sliplm.protocol.side import State
from sliplm.protocol.vault_side import Product, VaultSide, Welcome
from sliplm.protocol.worker_side import Evidence, Hello, WorkerSide

MAX_LEN = 4096

SHAPES = [(6, 4), (3, 5), (20000, 2)]
_CUTS = 16  # the first bytes of the input say how long the pieces are


class Pieces:
    """A socket that has the bytes already, gives them in pieces, and then is closed."""

    family = socket.AF_INET

    def __init__(self, data: bytes) -> None:
        self._cuts, self._data = data[:_CUTS] or b"\0", memoryview(data[_CUTS:])
        self._turn = 0
        self.asked_for = 0

    def fileno(self) -> int:
        return -1

    def setblocking(self, _flag: bool) -> None:
        pass

    def recv_into(self, view: memoryview) -> int:
        """The next piece."""
        cut = self._cuts[self._turn % len(self._cuts)]
        self._turn += 1
        self.asked_for = max(self.asked_for, len(view))
        count = min(len(view), len(self._data), 1 + cut * (1 if cut < 128 else 64))
        view[:count] = self._data[:count]
        self._data = self._data[count:]
        return count

    def send(self, view: memoryview) -> int:
        return len(view)

    def shutdown(self, _how: int) -> None:
        pass

    def close(self) -> None:
        pass


def target(data: bytes) -> None:
    """The bytes come to a worker, and to a vault that has asked for a product."""
    for side in (WorkerSide(SPLIT_ID, SHAPES), greeted_vault(), asking_vault()):
        pieces = Pieces(data)
        connection = Connection(cast(socket.socket, pieces), "peer")
        try:
            while True:
                event = connection.receive(side, deadline=time.monotonic() + 60)
                check(event, SHAPES)
                answer(side, event)
        except SlipError:
            pass
        assert pieces.asked_for <= max(16384, wire.MAX_PAYLOAD)


def answer(side: VaultSide | WorkerSide, event: object) -> None:
    """Go on as an honest program does."""
    if isinstance(side, WorkerSide):
        if isinstance(event, Hello):
            side.welcome(NONCE, wants_evidence=event.nonce[0] == 1)
        elif not isinstance(event, Evidence):
            side.product(1)
    else:
        if isinstance(event, Welcome) and side.state is State.PROVING:
            side.evidence(b"")
        if isinstance(event, (Welcome, Product)):
            side.multiply(1, 2)


def greeted_vault() -> VaultSide:
    """A vault that waits for its WELCOME."""
    side = VaultSide(SPLIT_ID, SHAPES)
    side.hello(NONCE)
    return side


def asking_vault() -> VaultSide:
    """A vault that waits for a PRODUCT."""
    side = greeted_vault()
    welcome = WorkerSide(SPLIT_ID, SHAPES)
    frame = greeted_vault_hello()
    welcome.header(frame[:28])
    welcome.payload(frame[28:])
    told = welcome.welcome(NONCE)
    side.header(told[:28])
    side.payload(told[28:])
    side.multiply(1, 2)
    return side


def greeted_vault_hello() -> bytes:
    """The HELLO of a vault."""
    return VaultSide(SPLIT_ID, SHAPES).hello(NONCE)


def seeds() -> list[bytes]:
    """Honest streams of both sides, in small and large pieces."""
    hello = greeted_vault_hello()
    ask = header_bytes(Header(Kind.MULTIPLY, 1, 1, 2, 0, 40)) + bytes(40)
    wide = header_bytes(Header(Kind.MULTIPLY, 2, 2, 1, 0, 8)) + bytes(8)
    deal = header_bytes(Header(Kind.DEAL, 3, 0, 4, 0, wire.DEAL_BYTES)) + bytes(wire.DEAL_BYTES)
    worker = WorkerSide(SPLIT_ID, SHAPES)
    worker.header(hello[:28])
    worker.payload(hello[28:])
    welcome = worker.welcome(NONCE)
    product = header_bytes(Header(Kind.PRODUCT, 1, 1, 2, 9, 24)) + bytes(24)
    fault = header_bytes(Header(Kind.FAULT, 0, 3, 0, 0, 4)) + b"oops"
    proving = hello[:-32] + b"\1" + hello[-31:]
    evidence = header_bytes(Header(Kind.EVIDENCE, 0, 0, 0, 0, 3)) + b"tdx"
    streams = [
        hello + ask + wide + deal,
        proving + evidence + ask,
        welcome + product + fault,
        product + fault,
    ]
    return [bytes([cut]) * _CUTS + stream for stream in streams for cut in (0, 27, 255)]
