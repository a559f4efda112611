"""Requests as the bytes that go over the wire, made before the clock runs: nothing is tokenized or serialized while it does."""

import json
from typing import Any

from loadtest.files import BadInput
from loadtest.prompts import token_ids
from loadtest.run.job import Target
from loadtest.schedule import PlannedRequest
from protos.baton.v1 import common_pb2, inference_pb2
from services.mesh import convert


def payload(request: PlannedRequest, target: Target, *, block_size: int, seed: int) -> bytes:
    """Greedy, and as many tokens as planned whatever the model thinks of it: the same request gives the same tokens.

    Raises BadInput for prompts of token ids to a chat, which has none.
    """
    tokens = None
    if not request.text:
        tokens = token_ids(request, block_size=block_size, seed=seed, vocab_size=target.vocab_size, first_id=target.first_token).tolist()
    if target.url.startswith("grpc://"):
        prompt = inference_pb2.Prompt(text=request.text)
        if tokens is not None:
            prompt = inference_pb2.Prompt(token_ids=convert.token_ids_to_proto(tokens))
        sampling = common_pb2.SamplingParams(temperature=0.0, max_tokens=request.output_tokens, ignore_eos=True)
        call = inference_pb2.GenerateRequest(model=target.model, prompt=prompt, sampling=sampling, include_timing=target.is_baton)
        return bytes(call.SerializeToString())
    body: dict[str, Any] = {"model": target.model, "max_tokens": request.output_tokens, "temperature": 0, "ignore_eos": True}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    if target.is_baton:
        body["baton_timing"] = True
    if target.endpoint == "chat":
        if tokens is not None:
            raise BadInput("a chat takes texts: --endpoint chat goes with a workload of texts, completions with any")
        body["messages"] = [{"role": "user", "content": request.text}]
    else:
        body["prompt"] = request.text if tokens is None else tokens
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
