"""The stages of a request, in order: where its time went. (A placeholder list; the mesh's timing record decides.)"""

TTFT_STAGES = (
    "client_to_router",
    "tokenize",
    "admission",
    "route",
    "to_decode",
    "decode_queue",
    "to_prefill",
    "prefill_queue",
    "prefill",
    "transfer_tail",
    "first_token_return",
    "deliver",
)
STAGES = (*TTFT_STAGES[:-1], "retry", "decode", "finish", "to_client")
