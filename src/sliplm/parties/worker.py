"""The untrusted side: products with the worker share, for every vault that holds a certificate.

A worker knows the integer matrices and sees masked vectors; it keeps nothing and decides nothing.  A dealer
is the same program with a dealer's key: it deals (SPEC step O2) and never multiplies, a worker never deals.
A bad peer costs its own connection only.  Memory: the matrices, and for each of at most MAX_CONNECTIONS
vaults one frame in and one out (`protocol.FRAME_BYTES`, or one row where that is longer).  Who may hold a
connection is up to `seats`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from sliplm.arithmetic.field import uniform_rows
from sliplm.arithmetic.kernels.cuda.lent import Borrowed
from sliplm.arithmetic.kernels.placing import lay_out
from sliplm.errors import (
    AttestationError,
    CredentialError,
    MismatchError,
    PassingCredentialError,
    SlipError,
    WireError,
    WorkerError,
    WorkerFault,
)
from sliplm.network.attestation import (
    NO_SPKI,
    Attester,
    NullAttester,
    NullVerifier,
    Verifier,
    binding,
    judge,
    own_evidence,
)
from sliplm.network.keys import Identity, Revocations, Serving, serving_role
from sliplm.network.listener import Listener, listen
from sliplm.network.transport import Connection
from sliplm.parties import lending, signing
from sliplm.parties.seats import Seats, Visit
from sliplm.protocol.frames import NONCE_BYTES, FaultCode, Party
from sliplm.protocol.worker_side import Deal, Evidence, Hello, Lend, Multiply, Several, WorkerSide
from sliplm.shares.shards import own_shard
from sliplm.shares.share import WorkerShare, open_worker

GREETING_LIMIT: Final = 10.0  # seconds for TLS's handshake, and again for the greeting
FRAME_LIMIT: Final = 60.0  # seconds for a frame to pass once it has begun
IDLE_LIMIT: Final = 3600.0  # seconds between two frames
DRAIN_LIMIT: Final = 30.0  # seconds for the exchanges in hand when the worker stops

_ELEMENTS: Final = np.dtype("<u4")

logger = logging.getLogger(__name__)


class Worker:
    """Serves one worker share.

    Args:
        share: its matrices are laid out for the fastest exact kernel now, which takes a moment.
        threads: cores that one product may use; None for all.
        attester: makes the evidence that vaults are shown.
        verifier: judges the vaults' evidence; they are asked for none unless it is set.
        device: where the products are computed, as `placing.lay_out`.
        role: a worker multiplies only, a dealer deals only; None: what the key folder says, and a worker on
            a Unix socket.

    Raises KernelError if no kernel is exact on this machine, CardError if a card that was named cannot serve
    it, InputError if the share has no group or a row longer than a frame, or for an unknown device.
    """

    def __init__(
        self,
        share: WorkerShare,
        threads: int | None = None,
        attester: Attester | None = None,
        verifier: Verifier | None = None,
        role: Serving | None = None,
        device: str = "auto",
    ) -> None:
        self._wanted, self.role = role, role or "worker"
        self._split_id, self._shard = share.split_id, own_shard(share)
        self._matrices = lay_out([share.matrices[name] for name in share.names], device, threads)
        self._shapes = [matrix.shape for matrix in self._matrices]
        self._side()  # refuses here what it would refuse every vault
        self._attester = attester or NullAttester()
        self._verifier = verifier or NullVerifier()
        self._compute = threading.Lock()  # one product at a time: each takes all cores anyway
        self._seats = Seats()
        self._listener: Listener | None = None
        self._stopping = False
        self._drained = threading.Event()
        self._wake = os.eventfd(0)  # readable from `stop` on, for those who wait between two frames
        weakref.finalize(self, os.close, self._wake)

    def __repr__(self) -> str:
        return f"Worker(split {self._split_id[:8]}, {len(self._matrices)} groups)"

    def _side(self) -> WorkerSide:
        return WorkerSide(self._split_id, self._shapes, self._shard)

    def serve(
        self,
        address: str,
        keys_dir: Path | None = None,
        ready: Callable[[str], None] | None = None,
    ) -> None:
        """Serve until `stop`; `ready` is called with the address once vaults may connect.

        Raises InputError, CredentialError, WorkerUnavailable, as `listener.listen`.
        """
        with listen(address, keys_dir) as listener:
            self._listener = listener
            self._take_role(listener)
            try:
                if listener.credentials is not None:
                    self._watch(Revocations(listener.credentials.folder))
                if ready is not None:
                    ready(listener.address)
                while not self._stopping and (sock := listener.accept()) is not None:
                    self._start(listener, sock)
            finally:
                self._listener = None
                self._drain()

    def _take_role(self, listener: Listener) -> None:
        """Be what the key folder says.  Raises CredentialError if that is not what was asked for."""
        own = None if listener.credentials is None else serving_role(listener.credentials.folder)
        if own is not None and self._wanted not in (None, own) and listener.credentials is not None:
            raise CredentialError(
                f"{listener.credentials.folder} holds a {own}'s certificate, not a {self._wanted}'s: make "
                f"one with `slip keys issue FOLDER NAME --role {self._wanted}`"
            )
        self.role = own or self._wanted or "worker"

    def stop(self) -> None:
        """End `serve`: exchanges in hand are finished and answered, then every connection is closed.

        From any thread or signal handler.
        """
        self._stopping = True  # no lock is taken here: a signal may come while this thread holds it
        os.eventfd_write(self._wake, 1)
        listener = self._listener
        if listener is not None:
            listener.stop()

    def attend(self, connection: Connection, visit: Visit | None = None) -> None:
        """Serve one connection until it ends, and close it; its errors are logged, not raised."""
        side = self._side()
        try:
            self._converse(connection, side, visit)
        except MismatchError as error:
            self._refuse(connection, side, FaultCode.MISMATCH, error)
        except WireError as error:
            self._refuse(connection, side, FaultCode.PROTOCOL, error)
        except AttestationError as error:
            self._refuse(connection, side, FaultCode.EVIDENCE, error)
        except WorkerFault as error:
            self._refuse(connection, side, FaultCode.INTERNAL, error)
        except (WorkerError, CredentialError) as error:
            logger.info("connection over: %s", error)
        except Exception:
            logger.exception("a product failed")
            self._refuse(connection, side, FaultCode.INTERNAL, "the worker failed: see its log")
        finally:
            connection.close()

    def _converse(self, connection: Connection, side: WorkerSide, visit: Visit | None) -> None:
        self._greet(connection, side, visit)
        borrowed: Borrowed | None = None
        while connection.wait(IDLE_LIMIT, self._wake):
            event = connection.receive(side, deadline=time.monotonic() + FRAME_LIMIT)
            if isinstance(event, Lend):
                borrowed = lending.borrow(connection, event.size, self._matrices)
                answer = side.lend(borrowed=borrowed is not None)
                connection.send(answer, deadline=time.monotonic() + FRAME_LIMIT)
            elif isinstance(event, (Multiply, Several, Deal)):  # the protocol lets nothing else through
                self._check_asked(event)
                if visit is not None:
                    visit.busy = True
                if isinstance(event, Several):
                    self._answer_several(connection, side, event)
                elif isinstance(event, Multiply) and event.lent:
                    self._answer_lent(connection, side, event, borrowed)
                else:
                    self._answer(connection, side, event)
                if visit is not None:
                    visit.busy, visit.since = False, time.monotonic()

    def _greet(self, connection: Connection, side: WorkerSide, visit: Visit | None) -> None:
        """HELLO and WELCOME, with the evidence that either side asks for."""
        deadline = time.monotonic() + GREETING_LIMIT
        hello = connection.receive(side, deadline=deadline)
        if not isinstance(hello, Hello):
            raise WireError("the vault did not greet")
        if (hello.party is Party.DEALER) != (self.role == "dealer"):
            raise MismatchError(
                f"the vault means to speak to a {hello.party.name.lower()}, and this is a {self.role}: "
                "correct the address, or start this one with the other key folder or `--role`"
            )
        if visit is not None:
            self._seats.seat(visit)
        nonce, wanted = secrets.token_bytes(NONCE_BYTES), not isinstance(self._verifier, NullVerifier)
        with _own_fault():
            mine = own_evidence(
                self._attester, binding(self.role, _spki(connection.own), hello.nonce), deadline
            )
        connection.send(side.welcome(nonce, mine, wants_evidence=wanted), deadline=deadline)
        if wanted:
            shown = connection.receive(side, deadline=deadline)
            if not isinstance(shown, Evidence):
                raise WireError("the vault showed no evidence")
            with _own_fault():
                judge(self._verifier, shown.evidence, binding("vault", _spki(connection.identity), nonce))
            connection.send(side.accept(), deadline=deadline)

    def _check_asked(self, event: Multiply | Several | Deal) -> None:
        """Whoever deals masks must never see the messages under them, and the other way round."""
        if isinstance(event, Deal) != (self.role == "dealer"):
            raise MismatchError(f"this is a {self.role}: it does not answer a {type(event).__name__.upper()}")

    def _answer(self, connection: Connection, side: WorkerSide, asked: Multiply | Deal) -> None:
        """Step 3: y~ = w x~ mod p; or step O2: u = w r mod p for r made of the batch's key."""
        matrix = self._matrices[asked.group - self._shard.first]
        n = matrix.shape[1]
        if isinstance(asked, Deal):
            r = uniform_rows(asked.key, asked.group, asked.first_row, asked.rows, n)
            x = np.ascontiguousarray(r)
        else:
            x = np.frombuffer(asked.payload, _ELEMENTS).reshape(asked.rows, n)  # no copy
        with self._compute:
            started = time.perf_counter_ns()
            y = matrix.product(x)
            micros = (time.perf_counter_ns() - started) // 1000
        connection.send(side.product(micros), y.data, deadline=time.monotonic() + FRAME_LIMIT)

    def _answer_lent(
        self, connection: Connection, side: WorkerSide, asked: Multiply, borrowed: Borrowed | None
    ) -> None:
        """Step 3, where x~ lies in the lent memory."""
        with self._compute:
            started = time.perf_counter_ns()
            lending.answer(self._matrices[asked.group - self._shard.first], borrowed, asked.rows)
            micros = (time.perf_counter_ns() - started) // 1000
        connection.send(side.product(micros), deadline=time.monotonic() + FRAME_LIMIT)

    def _answer_several(self, connection: Connection, side: WorkerSide, asked: Several) -> None:
        """Step 3 for each of several groups, answered in one frame; all lengths were checked before."""
        elements = np.frombuffer(asked.payload, _ELEMENTS)  # no copy
        first = self._shard.first
        answer = np.empty(
            sum(rows * self._shapes[group - first][0] for group, rows in asked.parts), np.uint32
        )
        read = written = 0
        with self._compute:
            started = time.perf_counter_ns()
            for group, rows in asked.parts:
                m, n = self._shapes[group - first]
                y = self._matrices[group - first].product(elements[read : read + rows * n].reshape(rows, n))
                answer[written : written + rows * m] = y.reshape(-1)
                read, written = read + rows * n, written + rows * m
            micros = (time.perf_counter_ns() - started) // 1000
        connection.send(side.product(micros), answer.data, deadline=time.monotonic() + FRAME_LIMIT)

    def _refuse(
        self, connection: Connection, side: WorkerSide, code: FaultCode, reason: SlipError | str
    ) -> None:
        """Say why, and hang up."""
        logger.warning("refused %s: %s", connection.peer, reason)
        try:
            connection.send(side.fault(code, str(reason)), deadline=time.monotonic() + GREETING_LIMIT)
        except SlipError:
            return  # the peer does not listen any more
        connection.finish()

    def _start(self, listener: Listener, sock: socket.socket) -> None:
        try:
            visit = self._seats.arrive(sock)
        except OSError as error:  # out of descriptors, or the peer has left
            logger.warning("refused a connection: %s", error)
            sock.close()
            return
        visit.thread = threading.Thread(target=self._visit, args=(visit, listener, sock), daemon=True)
        try:
            visit.thread.start()
        except RuntimeError as error:  # out of threads: those in use come back some time
            logger.warning("refused %s: %s", visit.source, error)
            sock.close()
            self._seats.leave(visit)

    def _visit(self, visit: Visit, listener: Listener, sock: socket.socket) -> None:
        """A connection's thread: the handshake, then the conversation."""
        try:
            connection = listener.secure(sock, time.monotonic() + GREETING_LIMIT)
            self._seats.identified(visit, connection.identity)
            self.attend(connection, visit)
        except SlipError as error:
            if not visit.ended:
                logger.warning("refused %s: %s", visit.source, error)
        finally:
            self._seats.leave(visit)

    def _watch(self, revocations: Revocations) -> None:
        watch = threading.Thread(
            target=revocations.watch, args=(partial(self._seats.cut, revocations), self._drained), daemon=True
        )
        watch.start()

    def _drain(self) -> None:
        """Strangers are dropped, vaults have DRAIN_LIMIT to get the answers that they have asked for."""
        self.stop()
        self._seats.end(lambda visit: not visit.greeted, DRAIN_LIMIT)
        self._seats.end(lambda visit: True, GREETING_LIMIT)
        self._drained.set()


@contextlib.contextmanager
def _own_fault() -> Iterator[None]:
    """A fault of our own attester or verifier is said to be ours, and why is for our log alone."""
    try:
        yield
    except PassingCredentialError as error:
        logger.error("%s", error)  # noqa: TRY400
        raise WorkerFault("the worker cannot show or judge evidence now: see its log") from error


def _spki(identity: Identity | None) -> bytes:
    return NO_SPKI if identity is None else identity.spki


def run(
    share_dir: Path,
    listen: str,
    keys: Path | None,
    *,
    json_ready: bool = False,
    threads: int | None = None,
    until_stdin_closes: Path | None = None,
    role: Serving | None = None,
    device: str = "auto",
    signed_by: Path | None = None,
) -> None:
    """The command `slip worker`: serve a share until SIGTERM or SIGINT.

    With `json_ready` the ready line on stdout is one JSON document {"listening": ADDRESS, "pid": PID}.
    With `until_stdin_closes` the worker also ends with the process that holds the other end of its stdin, and
    removes that folder then: a process that was killed cannot.
    With `signed_by` the share is served only if that key or authority has signed it, as `signing.check`.
    Raises ShareError, KernelError, and what `Worker.serve` raises.
    """
    share = open_worker(share_dir)
    if signed_by is not None:
        signing.check(share, signed_by)
    worker = Worker(share, threads, role=role, device=device)
    if until_stdin_closes is not None:
        orphan = (until_stdin_closes, worker.stop)
        threading.Thread(target=_wait_for_end_of_input, args=orphan, daemon=True).start()

    def ready(address: str) -> None:
        line = json.dumps({"listening": address, "pid": os.getpid()})
        sys.stdout.write(f"{line if json_ready else f'listening on {address}'}\n")
        sys.stdout.flush()

    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, lambda *_: worker.stop()) for number in numbers]
    try:
        worker.serve(listen, keys, ready)
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _wait_for_end_of_input(folder: Path, then: Callable[[], None]) -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    then()
