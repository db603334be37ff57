"""The loop of transformers' continuous batching, with what it lacks put in its places: see `batching`."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Final, NamedTuple, cast

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager, OutputRouter
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestState
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING, FIFOScheduler

from sliplm.engines.transformers.drawing import Drawing, Token
from sliplm.errors import InputError, SlipError

logger = logging.getLogger(__name__)
logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)  # its warnings show tokens of prompts

PAGE: Final = 32  # tokens
_SCHEDULER: Final = "sliplm"


class Room(NamedTuple):
    """Memory of a batch.

    Attributes:
        tokens: that the cache of keys and values holds, of all requests together.
        batch: rows of one step.
        requests: in one step.
    """

    tokens: int = 8192
    batch: int = 256
    requests: int = 32


@dataclass(eq=False)
class Request:
    """What is generated for one prompt.

    Attributes:
        prompt: token ids.
        most: how many tokens are generated at most.
        drawing: how they are chosen.
        adapter: of the vault's share, or None.
        tell: called in the batch's thread after each token, and at the end; it must not wait.
        tokens: what was generated so far, an end token included.
        computed: some of it was, or is now.
        done: nothing more comes.
        error: why not, where it failed.
    """

    prompt: Sequence[int]
    most: int
    drawing: Drawing
    adapter: str | None
    tell: Callable[[Request], None]
    tokens: list[Token] = field(default_factory=list)
    computed: bool = False
    done: bool = False
    error: Exception | None = None
    alone: bool = False  # it shared a batch that failed for somebody's input

    def __repr__(self) -> str:
        return f"Request({len(self.prompt)} tokens, {len(self.tokens)} of {self.most} generated)"


class Step(NamedTuple):
    """One step of a batch, for those who watch it.

    Attributes:
        requests: that it computed for.
        rows: tokens that it computed.  prompt: those of them that are of prompts.
        begun, ended: seconds of `perf_counter`.
        failed: the kind of error that ended it, or None.
    """

    requests: tuple[Request, ...]
    rows: int
    prompt: int
    begun: float
    ended: float
    failed: str | None = None


class Manager(ContinuousBatchingManager):  # type: ignore[misc]
    """The library's loop, with what is ours put in its places."""

    def __init__(
        self,
        model: PreTrainedModel,
        room: Room,
        requests: dict[str, Request],
        watchers: Sequence[Callable[[Step], None]],
    ) -> None:
        super().__init__(
            model=model,
            generation_config=GenerationConfig(
                do_sample=False, eos_token_id=end_tokens(model) or [-1], max_new_tokens=room.tokens
            ),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=PAGE,
                num_blocks=math.ceil(room.tokens / PAGE),
                max_batch_tokens=room.batch,
                max_requests_per_batch=min(room.requests, room.batch),
                max_memory_percent=1.0,
                allow_block_sharing=False,
                use_async_batching=False,
                auto_switch_to_flash=False,
                scheduler_type=_SCHEDULER,
                cpu_group_timeout=None,
            ),
        )
        self._requests, self._watchers = requests, watchers
        self.output_router = _Router(requests)

    def _create_batch_processor(self) -> Any:
        processor = super()._create_batch_processor()
        processor.scheduler.requests = self._requests
        processor.model_runner._sample = self._draw
        return processor

    def _generation_step(self) -> None:
        """One step of the batch, and who watches is told of it."""
        if not self._watchers:
            self._step()
            return
        step, begun = self._told(), perf_counter()
        error = self._step()
        failed = None if error is None else type(error).__name__
        step = step._replace(begun=begun, ended=perf_counter(), failed=failed)
        for watcher in tuple(self._watchers):
            watcher(step)

    def _told(self) -> Step:
        """What is about to be computed; a request that has no token yet, or takes several rows, is read."""
        requests, rows, prompt = [], 0, 0
        for future in self.batch_processor.inputs_and_outputs.requests_in_batch:
            request, length = self._requests.get(future.state.request_id), future.query_length
            rows += length
            if request is not None:
                requests.append(request)
                prompt += length if length > 1 or not request.tokens else 0
        return Step(tuple(requests), rows, prompt, 0.0, 0.0)

    def _step(self) -> Exception | None:
        """One step of the batch.  What a layer raises fails its requests; the loop goes on."""
        batch = [future.state for future in self.batch_processor.inputs_and_outputs.requests_in_batch]
        asked = [request for state in batch if (request := self._requests.get(state.request_id))]
        slip = getattr(self.model, "slip", None)
        for each in asked:
            each.computed = True
        try:
            if slip is None or not asked:
                super()._generation_step()
                return None
            with slip.adapter(asked[0].adapter):
                super()._generation_step()
        except Exception as error:  # whatever a layer raises: a batch is lost, and not the server
            if not isinstance(error, SlipError):
                logger.exception("a step of the batch failed")
            if isinstance(error, InputError) and len(batch) > 1:
                self._part(batch)
            else:
                self._fail(asked, error)
            self.batch_processor.inputs_and_outputs.requests_in_batch = []  # nothing of this step is taken up
            return error
        return None

    def _fail(self, asked: Sequence[Request], error: Exception) -> None:
        for request in asked:
            request.error = error
        self.batch_processor.handle_batch_error(error)

    def _give_up(self, name: str, request: Request, error: Exception) -> None:
        """One request fails by itself."""
        request.error, request.done = error, True
        self._requests.pop(name, None)
        self.cancel_request(name)
        request.tell(request)

    def _part(self, batch: Sequence[RequestState]) -> None:
        """Begin each request of the batch again, from what it has so far, in a batch of its own."""
        scheduler = self.batch_processor.scheduler
        for state in batch:
            if (request := self._requests.get(state.request_id)) is not None:
                request.alone = True
            scheduler.finish_request(state.request_id)
            scheduler.add_waiting_request(state.create_equivalent_initial_request())

    def _draw(self, scores: Tensor, out: Tensor) -> None:
        """Each request's next token.

        Args:
            scores: float32 [1, requests that get a token, vocabulary].
            out: where the tokens go, int32 [1, as many or more].
        """
        states = [
            future.state
            for future in self.batch_processor.inputs_and_outputs.requests_in_batch
            if future.has_new_token
        ]
        likeliest = scores[0, : len(states)].argmax(dim=-1).tolist()
        for row, state in enumerate(states):
            request = self._requests.get(state.request_id)
            if request is None:  # cancelled
                continue
            request.alone = False
            how = request.drawing
            try:
                token = Token(likeliest[row], math.nan, ()) if how.greedy else how.next(scores[0, row])
            except Exception as error:  # it costs nobody else of the batch
                logger.exception("a token could not be drawn")
                self._give_up(state.request_id, request, error)
                continue
            request.tokens.append(token)
            likeliest[row] = token.id
        out[0, : len(states)] = torch.tensor(likeliest, dtype=out.dtype)


class _Router(OutputRouter):  # type: ignore[misc]
    """Tells each request of its tokens; what was cancelled meanwhile is told nobody."""

    def __init__(self, requests: dict[str, Request]) -> None:
        super().__init__()
        self._requests = requests

    def deliver(self, output: GenerationOutput) -> None:
        request = self._requests.get(output.request_id)
        if request is None:
            return
        if output.is_finished():
            self._requests.pop(output.request_id, None)
            if output.error is not None and request.error is None:
                request.error = RuntimeError(output.error)
            request.done = True
        request.tell(request)

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        for output in outputs:
            self.deliver(output)


class _OneAdapter(FIFOScheduler):  # type: ignore[misc]
    """The library's order, of those only who may share a batch with whoever waited longest."""

    requests: dict[str, Request]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.requests = {}
        self._last: str | None = None
        super().__init__(*args, **kwargs)

    def _process_candidates(self, candidates: list[RequestState], *args: Any) -> Any:
        return super()._process_candidates(self._together(candidates), *args)

    def _together(self, candidates: list[RequestState]) -> list[RequestState]:
        """Those of one adapter, the adapters taking turns; or one that must be alone."""
        for state in candidates:
            request = self.requests.get(state.request_id)
            if request is not None and request.alone:
                return [state]
        kinds = [self._adapter(state) for state in candidates]
        waiting = sorted(set(kinds), key=lambda kind: (kind is not None, kind or ""))
        if len(waiting) < 2:
            return candidates
        later = [kind for kind in waiting if _after(kind, self._last)]
        self._last = (later or waiting)[0]
        return [state for state, kind in zip(candidates, kinds, strict=True) if kind == self._last]

    def _adapter(self, state: RequestState) -> str | None:
        request = self.requests.get(state.request_id)
        return None if request is None else request.adapter


SCHEDULER_MAPPING[_SCHEDULER] = _OneAdapter


def _after(kind: str | None, last: str | None) -> bool:
    return kind is not None and (last is None or kind > last)


def end_tokens(model: PreTrainedModel) -> list[int]:
    """What ends an answer."""
    for config in (model.generation_config, model.config.get_text_config()):
        found = cast(Any, getattr(config, "eos_token_id", None))
        if found is not None:
            return [found] if isinstance(found, int) else list(found)
    return []
