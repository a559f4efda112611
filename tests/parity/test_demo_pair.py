"""The demo pair as it ships: one tokenizer, small enough for a repository, and a draft that is worth asking."""

import inspect
import json

import torch

from services.engine.demo import TARGET_DIR
from services.engine.model_config import load_model_config
from services.engine.models.decoder import Decoder
from services.engine.weights import WeightReader
from services.tokenizer.tokenizer import Tokenizer
from tests.parity.paged_sequences import PagedSequences

DEMO = TARGET_DIR.parent


def test_demo_pair_has_one_tokenizer_and_takes_at_most_20_mb() -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (DEMO / "target" / name).read_bytes() == (DEMO / "draft" / name).read_bytes()
    files = [path for folder in ("target", "draft") for path in (DEMO / folder).iterdir()]
    assert sum(path.stat().st_size for path in files) <= 20e6


def test_demo_draft_often_has_the_greedy_token_of_the_target() -> None:
    token_ids = Tokenizer.from_checkpoint(DEMO / "target").encode(inspect.getsource(json))[:600]
    greedy = []
    for name in ("target", "draft"):
        config = load_model_config(DEMO / name)
        decoder = Decoder(config, WeightReader(DEMO / name), dtype=torch.float32, max_model_len=1024)
        greedy.append(PagedSequences(decoder, [token_ids], block_size=64).compute({0: len(token_ids)})[0].argmax(-1))
    assert (greedy[0] == greedy[1]).mean() > 0.5  # 0.64 over the held-out files
