"""What storing keys and values in fewer bits costs: the perplexity of the demo model over this repository's own texts, by format."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from kernels import KVFormat
from services.engine.demo import TARGET_DIR
from services.engine.model_config import load_model_config
from services.engine.models.decoder import Decoder
from services.engine.weights import WeightReader
from tests.parity.paged_sequences import PagedSequences

ROOT = Path(__file__).parents[2]
LENGTH, COUNT = 512, 12
# Perplexity over that of fp32, less one.
MOST = {KVFormat.INT8: 0.002, KVFormat.FP8: 0.005, KVFormat.INT4: 0.02}


@pytest.fixture(scope="module")
def texts() -> list[list[int]]:
    """Pieces of what lies in the repository, so that they are there wherever tests run."""
    tokenizer = Tokenizer.from_file(str(TARGET_DIR / "tokenizer.json"))
    token_ids: list[int] = []
    for path in (ROOT / "README.md", ROOT / "services/mesh/README.md", ROOT / "services/router/README.md"):
        token_ids.extend(tokenizer.encode(path.read_text()).ids)
    assert len(token_ids) >= COUNT * LENGTH
    return [token_ids[index * LENGTH : (index + 1) * LENGTH] for index in range(COUNT)]


def perplexity(texts: list[list[int]], kv_format: KVFormat) -> float:
    config, reader = load_model_config(TARGET_DIR), WeightReader(TARGET_DIR)
    decoder = Decoder(config, reader, dtype=torch.float32, max_model_len=LENGTH, kv_format=kv_format)
    surprise = []
    for text in texts:
        logits = PagedSequences(decoder, [text], block_size=16).compute({0: LENGTH})[0]
        logprobs = torch.from_numpy(logits).log_softmax(-1)
        surprise.append(-logprobs[:-1].gather(1, torch.tensor(text[1:])[:, None]).mean().item())
    return math.exp(float(np.mean(surprise)))


def test_perplexity_is_nearly_that_of_plain_keys_and_values(texts: list[list[int]]) -> None:
    plain = perplexity(texts, KVFormat.PLAIN)
    assert plain < 4096 / 2  # it knows something
    more = {kv_format: perplexity(texts, kv_format) / plain - 1.0 for kv_format in MOST}
    print(f"perplexity {plain:.2f}; " + ", ".join(f"{kv_format.name.lower()} {100 * share:+.3f} %" for kv_format, share in more.items()))
    for kv_format, most in MOST.items():
        assert abs(more[kv_format]) <= most
        assert more[kv_format] != 0.0  # the format was used
