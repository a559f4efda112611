"""Builds step frames: what one router has not heard yet, in columns. Knows messages and values, nothing else."""

from array import array

from protos.baton.v1 import common_pb2, decode_pb2
from services.core.types import TokenEvent
from services.mesh import convert


class FrameBuilder:
    """Collects until take(); a frame that could not be sent yet grows, so that a slow moment costs no extra messages."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._handles = array("I")
        self._positions = array("I")
        self._token_ids = array("I")
        self._logprobs: list[decode_pb2.EntryLogprobs] = []
        self._endings: list[decode_pb2.Ending] = []
        self._prefilled: list[decode_pb2.Prefilled] = []
        self._prompt_logprobs: list[decode_pb2.PromptLogprobs] = []

    @property
    def has_first_tokens(self) -> bool:
        return bool(self._prefilled)

    @property
    def num_tokens(self) -> int:
        return len(self._handles)

    @property
    def is_empty(self) -> bool:
        return not (self._handles or self._endings or self._prefilled)

    def add_token(self, handle: int, event: TokenEvent) -> None:
        """One token of the choice `handle`, what comes with it, and its end if it is the last."""
        assert event.token_id is not None
        assert event.position is not None
        if event.prompt_logprobs is not None:
            self._prompt_logprobs.append(convert.prompt_logprobs_to_proto(handle, event.prompt_logprobs))
        if event.logprobs is not None:
            entry = decode_pb2.EntryLogprobs(entry=len(self._handles), logprobs=convert.logprobs_to_proto(event.logprobs))
            self._logprobs.append(entry)
        self._handles.append(handle)
        self._positions.append(event.position)
        self._token_ids.append(event.token_id)
        if event.finish_reason is not None:
            self._endings.append(decode_pb2.Ending(handle=handle, finish_reason=convert.finish_reason_to_proto(event.finish_reason)))

    def add_prefilled(self, prefilled: decode_pb2.Prefilled) -> None:
        self._prefilled.append(prefilled)

    def add_error(self, handle: int, error: common_pb2.Error) -> None:
        """The end of the whole request whose first choice is `handle`."""
        self._endings.append(decode_pb2.Ending(handle=handle, error=error))

    def take(self, load: common_pb2.WorkerLoad | None) -> decode_pb2.StepFrame:
        """All that has been collected, as one frame."""
        frame = decode_pb2.StepFrame(
            handles=convert.pack_u32(self._handles),
            positions=convert.pack_u32(self._positions),
            token_ids=convert.pack_u32(self._token_ids),
            logprobs=self._logprobs,
            endings=self._endings,
            prefilled=self._prefilled,
            prompt_logprobs=self._prompt_logprobs,
            load=load,
        )
        self._clear()
        return frame
