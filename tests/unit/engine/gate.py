"""Holds an engine thread at chosen steps, so that nothing in a test depends on who is faster."""

import asyncio
import threading
from collections.abc import Sequence

import pytest

from services.core.types import SampledToken, TokenLogprobs
from services.engine.batch import StepBatch
from services.engine.core import EngineCore
from services.engine.sampler import SampleRow, ScoreRow

TIMEOUT_S = 30.0  # how long a broken engine may hang before a test fails


class Gate:
    """Holds the engine thread before each step's computation until it is let through; `fails` makes it raise instead."""

    def __init__(self, core: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fails = False
        self._arrived = threading.Semaphore(0)
        self._permits = threading.Semaphore(0)
        self._is_open = threading.Event()
        self._execute = core._runner.execute
        monkeypatch.setattr(core._runner, "execute", self.execute)

    def execute(
        self, batch: StepBatch, samples: Sequence[SampleRow], scores: Sequence[ScoreRow] = ()
    ) -> tuple[list[SampledToken], list[TokenLogprobs]]:
        self._arrived.release()
        if not self._is_open.is_set():
            assert self._permits.acquire(timeout=TIMEOUT_S)
        if self.fails:
            raise RuntimeError("a secret of the engine thread")
        return self._execute(batch, samples, scores)

    async def wait_step(self) -> None:
        """Until the engine thread stands before a step."""
        assert await asyncio.to_thread(self._arrived.acquire, timeout=TIMEOUT_S)

    def step(self) -> None:
        """Lets one step through."""
        self._permits.release()

    def open(self) -> None:
        """Lets all further steps through."""
        self._is_open.set()
        self._permits.release()
