"""The engine on Triton's kernels, here in Triton's interpreter: the tokens that the CPU's own functions give, batched, chunked and cached.

The interpreter takes a tenth of a second for a launch, so there are few requests and few tokens of each; prompts are whole.
"""

import copy
from dataclasses import replace

import pytest

from kernels import BackendName, backend_of
from services.engine.models.decoder import Decoder
from tests.exactness.test_engine_exactness import spread
from tests.exactness.workloads import Workload, check_balanced, make_core, run


@pytest.fixture
def triton_decoder(workload: Workload) -> Decoder:
    decoder = copy.copy(workload.decoder)
    decoder.backend = backend_of(BackendName.TRITON)
    return decoder


@pytest.mark.parametrize(
    ("workload", "num_requests", "num_tokens"), [("gemma", 3, 3), ("int8", 3, 3), ("latent", 2, 2)], indirect=["workload"]
)
def test_tokens_when_triton_computes_them_are_those_of_the_cpu(
    workload: Workload, triton_decoder: Decoder, num_requests: int, num_tokens: int
) -> None:
    requests = [
        replace(request, sampling=replace(request.sampling, max_tokens=num_tokens, min_tokens=0))
        for request in spread(workload.requests, num_requests)
    ]
    core = make_core(triton_decoder, prefill_chunk_tokens=100)
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
