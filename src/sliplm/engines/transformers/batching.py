"""Many requests at once: transformers' continuous batching, whose loop outlives every product that fails.

Its scheduler, paged cache and loop are the library's.  Ours are four things that it lacks:

    an error inside a layer     ends its loop, and with it every request, for good.  Here it fails the
                                requests of that batch.  Where the error is about an input, they are tried
                                again, each alone: the one that cannot be computed fails by itself
    one sampling for everybody  here each request has its own (`drawing`)
    adapters                    the requests of one batch choose the same one; adapters take turns
    its memory                  by default most of the machine's; here as much as is said

Sharing of equal beginnings is off: how fast an answer begins would tell one user what another has asked.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple

from transformers import PreTrainedModel
from transformers.generation.continuous_batching.model_runner import infer_max_single_request_tokens

from sliplm.closing import Closing
from sliplm.engines.transformers.drawing import Drawing
from sliplm.engines.transformers.loop import Manager, Request, Room, Step, end_tokens
from sliplm.errors import BusyError, InputError, SlipError

logger = logging.getLogger(__name__)

_STOP_LIMIT: Final = 10.0
_TRIAL_LIMIT: Final = 300.0


class Load(NamedTuple):
    """How busy a batch is: requests that compute, those that wait, and the part of the cache in use."""

    running: int
    waiting: int
    cache: float


class Batch(Closing):
    """Answers many requests at once with one model.

    Args:
        model: a split model (or, in tests, any other).
        room: its memory.

    Attributes:
        longest: tokens that prompt and answer may have together.
        watchers: told of each step after it, in its thread; they must not wait or raise.
        ends: the tokens that end an answer.

    Raises: InputError for a model that cannot be batched; what a product raises.
    """

    def __init__(self, model: PreTrainedModel, room: Room = Room()) -> None:  # noqa: B008
        self._model, self._room = model, room
        self._requests: dict[str, Request] = {}
        self.watchers: list[Callable[[Step], None]] = []
        self._lock = threading.Lock()
        self._made = 0
        self._closed = False
        self.ends = frozenset(end_tokens(model))
        try:
            self._manager = Manager(model, room, self._requests, self.watchers)
            self._manager.warmup()
        except (ValueError, AttributeError, KeyError) as error:
            raise _unbatched(model, error) from error
        taken = infer_max_single_request_tokens(self._manager.batch_processor.cache)
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
        self.longest = int(min(taken, context))
        self._manager.start()
        try:
            self._try_out()
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"Batch({len(self._requests)} requests)"

    @property
    def alive(self) -> bool:
        """Whether it computes: not after `close`, nor between an error of its own and `revive`."""
        return not self._closed and self._manager.is_running()

    @property
    def load(self) -> Load:
        """How busy it is now."""
        processor = self._manager.batch_processor
        if processor is None:
            return Load(0, 0, 0.0)
        scheduler = processor.scheduler
        running = len(scheduler.active_requests)
        return Load(
            running,
            max(0, len(self._requests) - running),
            1.0 - float(processor.cache.compute_free_capacity()),
        )

    def submit(self, request: Request) -> None:
        """Begin to answer.

        Raises: InputError for more tokens than there is room for, or when closed; BusyError while the loop
            begins anew.
        """
        if not request.prompt or request.most < 1 or len(request.prompt) + request.most > self.longest:
            raise InputError(f"prompt and answer take 2 to {self.longest} tokens together")
        with self._lock:
            if self._closed:
                raise InputError("the batch is closed")
            self._made += 1
            name = str(self._made)
            self._requests[name] = request
            self._revive()
            begun = self._manager.add_request(
                list(request.prompt), request_id=name, max_new_tokens=request.most, streaming=True
            )
            if begun is None:
                del self._requests[name]
                raise BusyError("the batch begins anew: ask again")

    def cancel(self, request: Request) -> None:
        """Compute nothing more for a request, and free its place; harmless when it is done."""
        with self._lock:
            for name, found in list(self._requests.items()):
                if found is request:
                    del self._requests[name]
                    self._manager.cancel_request(name)

    def close(self) -> None:
        """Stop; what is under way fails."""
        with self._lock:
            closed, self._closed = self._closed, True
        if not closed:
            self._manager.stop(block=True, timeout=_STOP_LIMIT, hard_stop=True)

    def _try_out(self) -> None:
        """One token: what a model cannot do in a batch shows before it is asked for.  Raises: InputError."""
        told = threading.Event()
        request = Request([0, 0], 1, Drawing(), None, lambda request: told.set() if request.done else None)
        self.submit(request)
        if not told.wait(_TRIAL_LIMIT):
            raise InputError(f"a first token took more than {_TRIAL_LIMIT:.0f} seconds")
        if isinstance(request.error, SlipError):
            raise request.error
        if request.error is not None:
            raise _unbatched(self._model, request.error)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """A block in which the batch computes nothing: another thread may use the model meanwhile.

        transformers' loop and a call of the model beside it disturb each other: the logits of both are wrong.

        Raises: BusyError while the loop begins anew.
        """
        try:
            pause = self._manager.pause()
            pause.__enter__()
        except RuntimeError as error:
            raise BusyError("the batch begins anew: ask again") from error
        try:
            yield
        finally:
            pause.__exit__(None, None, None)

    def revive(self) -> None:
        """Begin the loop anew where it has ended by an error of its own: to be called now and then."""
        with self._lock:
            if not self._closed:
                self._revive()

    def _revive(self) -> None:
        status = self._manager.background_thread_status
        if status.fatal_error is not None and not self._manager.is_running():
            logger.error("the batch's loop had ended and is started again")
            self._manager.start()


def _unbatched(model: PreTrainedModel, error: Exception) -> InputError:
    return InputError(
        f"transformers has no continuous batching for {type(model).__name__} ({error}): serve another model, "
        "or answer one caller at a time with slip generate"
    )
