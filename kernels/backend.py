"""What computes the tensor functions: their signatures, which every backend has, and the choice of one.

A backend is a module with these functions. `reference` says what each must compute, tests/kernels/test_conformance.py checks it, for any
further backend too.
"""

import enum
from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch

from kernels.block_lists import BlockLists
from kernels.kv_layout import KVLayout


class Backend(Protocol):
    """Tensors are contiguous and on one device; a plan is a backend's own.

    INVARIANCE   not empty: a token has the same bits whatever it is batched with, however its prompt is cut, wherever this word and the
                 kind of GPU are the same; products by kernels.Linear are to be made for that as well
    """

    INVARIANCE: str

    def plan_attention(
        self,
        *,
        block_tables: Sequence[Sequence[int]],
        query_lens: Sequence[int],
        context_lens: Sequence[int],
        layout: KVLayout,
        num_heads: int,
        device: torch.device,
        window: int | None = None,
        plain_scores: bool = True,
        ancestors: torch.Tensor | None = None,
        block_lists: Sequence[BlockLists] | None = None,
    ) -> Any:
        """What every layer of one window does in one step; made once per step, used by each of them.

        Arguments as in reference.paged_attention; sequences with one new token come first, a window is positive.

        block_tables   may be longer than contexts are: a plan that is refilled has room for what they have
        num_heads      query heads
        plain_scores   False where paged_attention will be given a softcap or sinks
        ancestors      a tree of new tokens for each sequence, of at most 16
        block_lists    for each sequence which blocks its queries see; not with a window
        """

    def paged_attention(
        self,
        query: torch.Tensor,
        pool: torch.Tensor,
        layer: int,
        plan: Any,
        *,
        scale: float,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """reference.paged_attention without the log sums; the lists it takes are in the plan."""

    def rope_and_write_kv(
        self,
        qkv: torch.Tensor,
        pool: torch.Tensor,
        layout: KVLayout,
        layer: int,
        *,
        positions: torch.Tensor,
        slots: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        query_norm: torch.Tensor | None = None,
        key_norm: torch.Tensor | None = None,
        eps: float = 0.0,
    ) -> torch.Tensor:
        """See reference.rope_and_write_kv."""

    def rope_and_write_latent(
        self,
        query: torch.Tensor,
        cell: torch.Tensor,
        pool: torch.Tensor,
        layout: KVLayout,
        layer: int,
        *,
        positions: torch.Tensor,
        slots: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        norm: torch.Tensor,
        eps: float,
    ) -> None:
        """See reference.rope_and_write_latent."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """See reference.rms_norm; x [T, H]."""

    def add_rms_norm(self, residual: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """See reference.add_rms_norm."""

    def activate_and_mul(self, gate_up: torch.Tensor, activation: str) -> torch.Tensor:
        """See reference.activate_and_mul."""

    def batched_linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x [B, M, K] times weight [B, N, K] transposed: [B, M, N]. Of both only the rows of x need be contiguous."""

    def copy_blocks(
        self,
        source: torch.Tensor,
        source_layout: KVLayout,
        target: torch.Tensor,
        target_layout: KVLayout,
        *,
        source_blocks: torch.Tensor | None = None,
        target_blocks: torch.Tensor | None = None,
        first_source_head: int = 0,
        first_target_head: int = 0,
        num_heads: int | None = None,
    ) -> None:
        """See kv_cells.copy_blocks."""


class CapturableBackend(Backend, Protocol):
    """Whose plans can be used again for other lengths, in the same memory, so that a step can be captured as a CUDA graph."""

    def refill_plan(self, plan: Any, *, block_tables: Sequence[Sequence[int]], context_lens: Sequence[int]) -> None:
        """Copies other tables, none longer than the longest before, and other lengths into a plan for as many sequences, of one new token
        each; without query_lens, which stay."""

    def share_work(self, plan: Any, *, num_heads: int) -> None:
        """Shares a refilled plan's work out again; runs on the device alone."""


class BackendName(enum.StrEnum):
    CPU = "cpu"
    TRITON = "triton"
    TRITON_INVARIANT = "triton-invariant"


def backend_of(name: BackendName) -> Backend:
    """The backend of that name. Triton computes on CUDA; on the CPU in its interpreter, for which TRITON_INTERPRET=1 must be set before."""
    if name is BackendName.CPU:
        from kernels import cpu_backend

        return cast(Backend, cpu_backend)
    # Only now: Triton takes a second, and is not installed everywhere.
    from kernels import triton_backend, triton_invariant

    return cast(Backend, triton_backend if name is BackendName.TRITON else triton_invariant)


def as_capturable(backend: Backend) -> CapturableBackend:
    """The same backend, which must be Triton's."""
    return cast(CapturableBackend, backend)


def backend_for(device: torch.device, *, batch_invariant: bool = False) -> Backend:
    """The fastest backend for tensors on this device; in batch-invariant mode only for CUDA."""
    assert device.type == "cuda" or not batch_invariant
    if device.type != "cuda":
        return backend_of(BackendName.CPU)
    return backend_of(BackendName.TRITON_INVARIANT if batch_invariant else BackendName.TRITON)
