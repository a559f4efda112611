"""Steps of fixed size, as CUDA graphs replay them: the same logits and the same pools as a step that was made for its batch.

In Triton's interpreter, where a captured step is one that is computed again in the same memory.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from kernels import BackendName, KVFormat, backend_of
from services.core.errors import InvalidRequest
from services.engine.batch import GroupBatch, StepBatch
from services.engine.decode_graphs import DecodeGraphs
from services.engine.kv_groups import KVGroups
from services.engine.loader import check_cuda, choose_device, choose_dtype, load_model
from services.engine.model_config import load_model_config
from services.engine.models.decoder import Decoder
from services.engine.settings import EngineSettings
from services.engine.weights import WeightReader

BLOCK, NUM_BLOCKS, MAX_MODEL_LEN = 16, 12, 160
# Of each sequence the tokens it has, the new one included; more than Gemma's window of 40, and across blocks.
BATCHES = [(1, 17, 130), (64, 33), (90,)]


@pytest.fixture(scope="module", params=[BackendName.TRITON, BackendName.TRITON_INVARIANT])
def decoder(checkpoints: Path, request: pytest.FixtureRequest) -> Decoder:
    config, reader = load_model_config(checkpoints / "gemma3"), WeightReader(checkpoints / "gemma3")
    return Decoder(config, reader, dtype=torch.float32, max_model_len=MAX_MODEL_LEN, backend=backend_of(request.param))


def make_batch(groups: KVGroups, lengths: tuple[int, ...]) -> StepBatch:
    generator = np.random.default_rng(len(lengths))
    positions = np.array(lengths) - 1
    batches = []
    for group in range(len(groups.windows)):
        order = generator.permutation(NUM_BLOCKS).tolist()
        tables, contexts, slots = [], [], []
        for length in lengths:
            first = groups.first_kept(group, length - 1)
            table = [order.pop() for _ in range(groups.num_blocks(length) - first)]
            tables.append(table)
            contexts.append(length - first * BLOCK)
            slots.append(table[-1] * BLOCK + (length - 1) % BLOCK)
        batches.append(GroupBatch(slots=np.array(slots), block_tables=tables, context_lens=contexts))
    return StepBatch(
        token_ids=generator.integers(0, 300, len(lengths)),
        positions=positions,
        query_lens=[1] * len(lengths),
        groups=batches,
        logit_rows=np.arange(len(lengths)),
    )


def make_pools(decoder: Decoder) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    pools = [layout.allocate(NUM_BLOCKS + 1, torch.device("cpu")) for layout in decoder.kv_layouts(BLOCK)]
    return [pool.normal_(generator=generator) for pool in pools]


@pytest.mark.usefixtures("even_products")
@torch.inference_mode()
def test_step_when_it_is_captured_gives_the_logits_and_writes_the_cells_of_one_that_is_not(decoder: Decoder) -> None:
    groups, layouts = KVGroups(decoder.config.group_windows, BLOCK), decoder.kv_layouts(BLOCK)
    pools, expected_pools = make_pools(decoder), make_pools(decoder)
    sizes: list[int] = []

    def capture(compute: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        def again() -> torch.Tensor:
            logits = compute()
            sizes.append(len(logits))
            return logits

        return again

    graphs = DecodeGraphs(decoder, pools, layouts, groups, max_num_seqs=3, max_model_len=MAX_MODEL_LEN, capture=capture)
    for lengths in BATCHES:
        batch = make_batch(groups, lengths)
        logits = graphs.run(batch)
        assert logits is not None
        torch.testing.assert_close(logits, decoder.forward(batch, expected_pools, layouts), rtol=0, atol=0)
        for pool, expected in zip(pools, expected_pools, strict=True):
            torch.testing.assert_close(pool[:NUM_BLOCKS], expected[:NUM_BLOCKS], rtol=0, atol=0)
    assert sizes == [3, 2, 1]
    # One that is filled up, two sequences of three, has its sums in another order, but for the mode that is for that.
    is_invariant = bool(decoder.backend.INVARIANCE)
    del graphs._captured[2]
    logits = graphs.run(batch := make_batch(groups, BATCHES[1]))
    assert logits is not None and sizes[-1] == 3
    torch.testing.assert_close(logits, decoder.forward(batch, expected_pools, layouts), rtol=0, atol=0.0 if is_invariant else 1e-4)
    for pool, expected in zip(pools, expected_pools, strict=True):
        torch.testing.assert_close(pool[:NUM_BLOCKS], expected[:NUM_BLOCKS], rtol=0, atol=0.0 if is_invariant else 1e-5)


def test_step_when_it_has_more_sequences_or_other_rows_is_not_captured(decoder: Decoder) -> None:
    groups = KVGroups(decoder.config.group_windows, BLOCK)
    pools, layouts = make_pools(decoder), decoder.kv_layouts(BLOCK)
    graphs = DecodeGraphs(decoder, pools, layouts, groups, max_num_seqs=2, max_model_len=MAX_MODEL_LEN, capture=lambda compute: compute)
    batch = make_batch(groups, BATCHES[0])
    assert graphs.run(batch) is None
    prompt = StepBatch(
        token_ids=np.zeros(2, dtype=np.int64),
        positions=np.arange(2),
        query_lens=[2],
        groups=[GroupBatch(slots=np.arange(2), block_tables=[[0]], context_lens=[2])] * 2,
        logit_rows=np.array([1]),
    )
    assert graphs.run(prompt) is None


def test_settings_when_a_gpu_cannot_do_them_are_refused_with_what_it_can(checkpoints: Path) -> None:
    config, latent = (load_model_config(checkpoints / name) for name in ("llama3", "deepseek"))
    check_cuda(EngineSettings(), config, KVFormat.FP8, (8, 9))
    check_cuda(EngineSettings(block_size=32), config, KVFormat.INT4, (8, 0))
    check_cuda(EngineSettings(), latent, KVFormat.PLAIN, (9, 0))
    with pytest.raises(InvalidRequest, match=r"device: compute capability 8\.9 has too little shared memory for latents"):
        check_cuda(EngineSettings(), latent, KVFormat.PLAIN, (8, 9))
    with pytest.raises(InvalidRequest, match=r"kv_dtype: fp8 needs a GPU of compute capability 8\.9 or later; this one has 8\.0"):
        check_cuda(EngineSettings(), config, KVFormat.FP8, (8, 0))
    with pytest.raises(InvalidRequest, match="block_size: 48 is not a power of two"):
        check_cuda(EngineSettings(block_size=48), config, KVFormat.PLAIN, (9, 0))
    with pytest.raises(InvalidRequest, match="device: 'tpu' is not one of auto, cpu, cuda"):
        EngineSettings(device="tpu").validate()
    assert choose_device("cpu") == torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is an NVIDIA GPU here")
def test_device_when_there_is_no_gpu_is_the_cpu_unless_one_was_asked_for() -> None:
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(InvalidRequest, match="device: is cuda, but PyTorch finds no NVIDIA GPU here"):
        choose_device("cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is an NVIDIA GPU here")
def test_batch_invariant_mode_without_a_gpu_is_refused(checkpoints: Path) -> None:
    with pytest.raises(InvalidRequest, match="batch_invariant: is for device cuda; on the CPU float32, the default, keeps tokens apart"):
        load_model(checkpoints / "llama3", EngineSettings(batch_invariant=True))


def test_dtype_when_it_is_automatic_is_the_checkpoints_on_a_gpu_and_fp32_elsewhere(checkpoints: Path) -> None:
    config = load_model_config(checkpoints / "llama3_bf16")
    assert choose_dtype("auto", config, torch.device("cpu")) is torch.float32
    assert choose_dtype("auto", config, torch.device("cuda")) is torch.bfloat16
    assert choose_dtype("float16", config, torch.device("cuda")) is torch.float16
