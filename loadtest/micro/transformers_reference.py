"""The reference of `micro engine`: transformers' generate, run as a script of its own that answers JSON lines.

It runs outside the project's folder and imports nothing of ours, for transformers looks for a package that has the name of our `kernels`.
One line in: {"prompt_lens": [...], "output_lens": [...]}; one line out: {"seconds": …}. Static batching, as generate does it: prompts are
padded on the left to the longest, and the batch runs until its longest output is complete.
"""

import json
import sys
import time

import torch

# Where Baton is installed, its folder `kernels` would be taken for the optional package of that name.
sys.modules["kernels"] = None  # type: ignore[assignment]
import transformers  # noqa: E402


def main() -> None:
    directory, dtype, num_threads = sys.argv[1:4]
    torch.set_num_threads(int(num_threads))
    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()
    generator = torch.Generator().manual_seed(1)
    print(json.dumps({"transformers": transformers.__version__}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        longest = max(job["prompt_lens"])
        lens = torch.tensor(job["prompt_lens"])[:, None]
        ids = torch.randint(1, model.config.vocab_size, (len(lens), longest), generator=generator)
        mask = (torch.arange(longest)[None] >= longest - lens).long()
        num_new = max(job["output_lens"])
        started = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                input_ids=ids, attention_mask=mask, do_sample=False, min_new_tokens=num_new, max_new_tokens=num_new, pad_token_id=0
            )
        print(json.dumps({"seconds": time.perf_counter() - started}), flush=True)


main()
