"""The engine on Triton's kernels, here in Triton's interpreter: the tokens that the CPU's own functions give, batched, chunked and cached.

The interpreter takes a tenth of a second for a launch, so there are few requests and few tokens of each; prompts are whole.
"""

import copy
from dataclasses import replace

import pytest
import torch

from kernels import BackendName, backend_of
from services.engine.decode_graphs import Compute
from services.engine.model_runner import ModelRunner
from services.engine.models.decoder import Decoder
from tests.exactness.test_engine_exactness import spread
from tests.exactness.workloads import BLOCK_SIZE, MAX_MODEL_LEN, Workload, check_balanced, make_core, run


@pytest.fixture
def triton_decoder(workload: Workload) -> Decoder:
    decoder = copy.copy(workload.decoder)
    decoder.backend = backend_of(BackendName.TRITON)
    return decoder


@pytest.mark.parametrize(
    ("workload", "num_requests", "num_tokens", "captures"),
    [("gemma", 3, 3, True), ("int8", 3, 3, False), ("latent", 2, 2, False)],
    indirect=["workload"],
)
def test_tokens_when_triton_computes_them_are_those_of_the_cpu(
    workload: Workload, triton_decoder: Decoder, num_requests: int, num_tokens: int, captures: bool
) -> None:
    """With `captures` steps of decoding have one of a few sizes and are computed again and again in the same memory, as CUDA graphs are."""
    requests = [
        replace(request, sampling=replace(request.sampling, max_tokens=num_tokens, min_tokens=0))
        for request in spread(workload.requests, num_requests)
    ]
    num_captured = 0

    def capture(compute: Compute) -> Compute:
        def again() -> torch.Tensor:
            nonlocal num_captured
            num_captured += 1
            return compute()

        return again

    pools = [200] * len(triton_decoder.config.group_windows)
    runner = ModelRunner(triton_decoder, block_size=BLOCK_SIZE, num_blocks=pools)
    if captures:
        runner.capture_decodes(max_num_seqs=6, max_model_len=MAX_MODEL_LEN, capture=capture)
    core = make_core(triton_decoder, num_blocks=200, max_num_seqs=6, prefill_chunk_tokens=100, runner=runner)
    for expected_cached in (False, True):
        outputs = run(core, requests)
        for request in requests:
            output, comparable = outputs[request.request_id, 0], workload.baseline.num_comparable(request.request_id)
            expected = workload.baseline.tokens[request.request_id][:num_tokens]
            assert len(output.tokens) == num_tokens
            assert output.tokens[:comparable] == expected[:comparable]
        assert any(output.cached_tokens > 0 for output in outputs.values()) >= expected_cached
    stats = check_balanced(core)
    assert stats.partial_prefills > 0 and stats.largest_batch > 1
    assert (num_captured > num_tokens) is captures
