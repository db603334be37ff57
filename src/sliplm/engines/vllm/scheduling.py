"""vLLM's scheduler, which ends the requests whose products could not be had, and no other."""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched import scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import RequestStatus


class Scheduler(scheduler.Scheduler):  # type: ignore[misc]
    """The library's.  NaN in logits means here that a product is missing (`products`)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._spoiled: set[int] = set()

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """As ever, without tokens for requests that failed: they end with an error."""
        counted = model_runner_output.num_nans_in_logits or {}
        lost = [name for name, nans in counted.items() if nans and name in self.requests]
        for name in lost:
            for blocks in self.kv_cache_manager.get_block_ids(name):
                self._spoiled.update(blocks)
        failed = self.finish_requests(lost, RequestStatus.FINISHED_ERROR)
        made = super().update_from_output(scheduler_output, model_runner_output)
        for request in failed:
            told = made.setdefault(request.client_index, EngineCoreOutputs())
            told.outputs.append(
                EngineCoreOutput(
                    request_id=request.request_id,
                    new_token_ids=[],
                    finish_reason=request.get_finished_reason(),
                    events=request.take_events(),
                    trace_headers=request.trace_headers,
                )
            )
        return made

    def _get_new_block_ids_to_zero(self) -> list[int] | None:
        """The blocks of the cache that hold NaN: attention multiplies what a block's next owner has not yet
        written by 0, and 0 times NaN is NaN.
        """
        made, self._spoiled = [*self._spoiled, *(super()._get_new_block_ids_to_zero() or [])], set()
        return made or None
