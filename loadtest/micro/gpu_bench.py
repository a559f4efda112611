"""What times kernels on a GPU: a clock that no cache helps, and attention over a pool of random cells. Needs torch, triton, numpy."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from kernels import BackendName, KVFormat, KVLayout, backend_of, reference

CACHE_BYTES = 256 << 20  # more than any L2 holds
LAUNCHES, REPLAYS = 20, 20
Call = Callable[[], Any]


@dataclass
class Row:
    """One line of the table."""

    name: str
    value: str
    passed: bool | None = None
    beside: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Sizes:
    """Full size, or tiny, for Triton's interpreter."""

    tiny: bool

    def __call__(self, full: int, tiny: int) -> int:
        return tiny if self.tiny else full


class Bench:
    """Times calls on the device; without one, runs each once, to see that it runs."""

    def __init__(self, device: torch.device, *, tiny: bool) -> None:
        self.device, self.size = device, Sizes(tiny)

    def seconds(self, calls: Sequence[Call]) -> float:
        """Of one call. `calls` do the same with other memory, enough of it that no cache helps."""
        if self.device.type != "cuda":
            started = time.perf_counter()
            calls[0]()
            return time.perf_counter() - started
        for call in calls[:3]:
            call()  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for index in range(LAUNCHES):
                calls[index % len(calls)]()
        times = []
        for _ in range(REPLAYS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(float(begin.elapsed_time(end)) / 1e3 / LAUNCHES)
        return statistics.median(times)

    def randn(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        dtype = torch.float16 if self.size.tiny and dtype is torch.bfloat16 else dtype  # the interpreter has no bf16
        return torch.randn(*shape, device=self.device).to(dtype)

    def layers(self, bytes_each: int) -> int:
        return 2 if self.size.tiny else max(2, min(64, -(-CACHE_BYTES // bytes_each)))

    def copy_bytes_per_s(self, num_bytes: int) -> float:
        """Bytes moved, those read and those written, when so many are copied."""
        pairs = [(self.randn(num_bytes // 4), self.randn(num_bytes // 4)) for _ in range(self.layers(num_bytes))]
        return 2 * num_bytes / self.seconds([partial(target.copy_, source) for source, target in pairs])


class Attention:
    """A pool of random cells and sequences of one length in it."""

    def __init__(
        self,
        bench: Bench,
        *,
        sequences: int,
        context_len: int,
        query_len: int = 1,
        kv_heads: int = 8,
        heads: int = 32,
        head_dim: int = 128,
        value_dim: int | None = None,
        form: KVFormat = KVFormat.PLAIN,
        backend: BackendName = BackendName.TRITON,
        window: int | None = None,
        **planned: Any,
    ) -> None:
        self.backend = backend_of(backend)
        dtype = torch.float16 if bench.size.tiny else torch.bfloat16
        one = KVLayout(
            num_layers=1,
            num_kv_heads=kv_heads,
            block_size=bench.size(64, 16),
            head_dim=head_dim,
            value_head_dim=value_dim,
            is_latent=value_dim is not None,
            dtype=dtype,
            format=form,
        )
        blocks = -(-context_len // one.block_size)
        self.kv_bytes = sequences * blocks * one.block_bytes
        self.num_layers = bench.layers(self.kv_bytes)
        self.layout = KVLayout(
            num_layers=self.num_layers,
            num_kv_heads=kv_heads,
            block_size=one.block_size,
            head_dim=head_dim,
            value_head_dim=value_dim,
            is_latent=value_dim is not None,
            dtype=dtype,
            format=form,
        )
        self.pool = self.layout.allocate(sequences * blocks, bench.device)
        if form is KVFormat.PLAIN:
            self.pool.normal_()
        else:
            plain = torch.randn(sequences * blocks * one.block_size, kv_heads, 2 * head_dim, device=bench.device)
            for layer in range(self.num_layers):
                self._write(plain, layer)
        order = torch.randperm(sequences * blocks).tolist()
        self.tables = [order[index * blocks : (index + 1) * blocks] for index in range(sequences)]
        self.query = bench.randn(sequences * query_len, heads, head_dim)
        self.query_lens, self.context_lens = [query_len] * sequences, [context_len] * sequences
        self.scale, self.window = head_dim**-0.5, window
        self.plan = self.backend.plan_attention(
            block_tables=self.tables,
            query_lens=self.query_lens,
            context_lens=self.context_lens,
            layout=self.layout,
            num_heads=heads,
            device=bench.device,
            window=window,
            **planned,
        )

    def _write(self, plain: torch.Tensor, layer: int) -> None:
        num_tokens, width = len(plain), plain.shape[2]
        half = width // 4
        qkv = torch.cat((plain[..., : width // 2], plain[..., width // 2 :]), dim=1).contiguous()
        positions = torch.zeros(num_tokens, dtype=torch.int64, device=plain.device)
        slots = torch.arange(num_tokens, device=plain.device)
        cos, sin = torch.ones(1, half, device=plain.device), torch.zeros(1, half, device=plain.device)
        self.backend.rope_and_write_kv(qkv, self.pool, self.layout, layer, positions=positions, slots=slots, cos=cos, sin=sin)

    def call(self, layer: int) -> torch.Tensor:
        return self.backend.paged_attention(self.query, self.pool, layer, self.plan, scale=self.scale)

    def seconds(self, bench: Bench) -> float:
        return bench.seconds([partial(self.call, layer) for layer in range(self.num_layers)])

    def error(self, **more: Any) -> float:
        """Of the last layer, against the reference, which is computed on the CPU."""
        expected, _ = reference.paged_attention(
            self.query.cpu(),
            self.pool.cpu(),
            self.layout,
            self.num_layers - 1,
            block_tables=self.tables,
            query_lens=self.query_lens,
            context_lens=self.context_lens,
            scale=self.scale,
            **more,
        )
        return float((self.call(self.num_layers - 1).cpu().float() - expected.float()).abs().max())
