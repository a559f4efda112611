"""The prefill worker: computes prompts and pushes their KV blocks into the pools of decode workers."""
