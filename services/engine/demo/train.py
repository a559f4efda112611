"""Trains the demo pair that ships with Baton: a small Llama target and a tiny draft, on Python's own standard library.

Runs offline: the corpus is the source of the interpreter that runs it, so whoever has Python can repeat it.
`python -m services.engine.demo.train all --out DIR` makes tokenizer, target and draft; `evaluate` prints the figures of the README.
Needs the `dev` extra (transformers is the trainer's model and the parity oracle of the tests; serving never imports it).
Source: Muon, Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/), with the update scale of Liu et al. 2025 (arXiv 2502.16982).
"""

import argparse
import hashlib
import json
import math
import shutil
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB_SIZE = 4096
CONTEXT_TOKENS = 4096
END_OF_TEXT = "<|endoftext|>"
TARGET_TOKENS_PER_STEP, DRAFT_TOKENS_PER_STEP = 4096, 2048
TEMPERATURE, TOP_P = 0.6, 0.95  # of generation; the draft learns the target's distribution at this temperature
# Drawn for each step. Whole contexts must come at every learning rate: positions that were never trained do not extrapolate.
WINDOW_TOKENS = (512, 512, 512, 1024, 2048, 4096)
LIBRARY_SHARE = 0.65  # of the windows; the rest come from the library's tests, which are two thirds of the bytes
SKIPPED_FOLDERS = {"site-packages", "__pycache__", "pydoc_data", "idlelib", "lib2to3", "encodings"}

CHAT_TEMPLATE = (
    "{% for message in messages %}# {{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}# assistant:{% endif %}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Source files as text: what is trained on, from the library and from its tests, and what is held out (library only)."""

    library: list[str]
    tests: list[str]
    held_out: list[str]


def read_corpus() -> Corpus:
    """Every .py file of the running interpreter's standard library; one library file in fifty is held out, chosen by its path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    library, tests, held_out = [], [], []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if SKIPPED_FOLDERS.intersection(parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a few test files are written in other encodings on purpose
            continue
        if any(part.startswith(("test", "bad")) for part in parts):
            tests.append(text)
        elif hashlib.blake2b("/".join(parts).encode()).digest()[0] < 5:
            held_out.append(text)
        else:
            library.append(text)
    return Corpus(library=library, tests=tests, held_out=held_out)


def train_tokenizer(corpus: Corpus, out: Path) -> Tokenizer:
    """Byte-level BPE of VOCAB_SIZE entries, written in the Hugging Face layout."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus.library, trainer)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "model_max_length": CONTEXT_TOKENS,
        "chat_template": CHAT_TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    """All texts as one [T] int64 stream, END_OF_TEXT before each."""
    end_id = tokenizer.token_to_id(END_OF_TEXT)
    ids = [np.array([end_id, *encoding.ids]) for encoding in tokenizer.encode_batch(texts)]
    return torch.from_numpy(np.concatenate(ids))


def target_config() -> LlamaConfig:
    return _llama_config(hidden_size=384, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=6, head_dim=64)


def draft_config() -> LlamaConfig:
    return _llama_config(hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4, head_dim=32)


def _llama_config(**sizes: Any) -> LlamaConfig:
    return LlamaConfig(
        **sizes,
        vocab_size=VOCAB_SIZE,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
    )


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalized, for matrices: about half the steps of AdamW at this size.

    torch.optim.Muon does the same in bfloat16, which processors without bfloat16 instructions run several times slower.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], *, lr: float, momentum: float = 0.95, weight_decay: float = 0.05) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no closure is ever passed
        for group in self.param_groups:
            for parameter in group["params"]:
                buffer = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                buffer.lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonalize(parameter.grad.lerp(buffer, group["momentum"]))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(parameter.shape)))


def orthogonalize(matrix: torch.Tensor) -> torch.Tensor:
    """[m, n] → the nearest matrix with singular values about 1, by five quintic Newton-Schulz steps."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def optimizers_of(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [Muon(matrices, lr=4e-3), torch.optim.AdamW(others, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0)]


def draft_from(target: LlamaForCausalLM) -> LlamaForCausalLM:
    """A new draft whose embedding is the target's in its principal directions: it knows from the start which tokens are alike."""
    draft = LlamaForCausalLM(draft_config())
    embedding = target.model.embed_tokens.weight.detach()
    _, _, directions = torch.linalg.svd(embedding, full_matrices=False)
    projected = embedding @ directions[: draft.config.hidden_size].T
    draft.model.embed_tokens.weight.data.copy_(projected * (draft.config.initializer_range / projected.std()))
    return draft


def draw_windows(streams: list[torch.Tensor], count: int, window: int, generator: torch.Generator) -> torch.Tensor:
    """Random windows from the library's stream and the tests', [count, window + 1] int64."""
    rows = []
    for _ in range(count):
        stream = streams[int(torch.rand(1, generator=generator) > LIBRARY_SHARE)]
        start = int(torch.randint(len(stream) - window - 1, (1,), generator=generator))
        rows.append(stream[start : start + window + 1])
    return torch.stack(rows)


def train(
    model: LlamaForCausalLM,
    teacher: LlamaForCausalLM | None,
    tokenizer: Tokenizer,
    corpus: Corpus,
    out: Path,
    tokens: int,
    tokens_per_step: int,
    peak: float,
    hold: float,
) -> None:
    """Trains `model` on `tokens` tokens, on the text itself or on the teacher's distribution over it; saves to `out` on the way.

    The learning rate warms up to `peak` of the full one, stays for the share `hold` of the steps, and falls linearly to nothing.
    """
    generator = torch.Generator().manual_seed(0)
    streams = [encode(tokenizer, corpus.library), encode(tokenizer, corpus.tests)]
    optimizers = optimizers_of(model)
    base_rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    steps = tokens // tokens_per_step  # of one optimizer update each; a window longer than a step makes a longer step
    started, smoothed = time.monotonic(), 0.0
    for step in range(steps):
        progress = step / steps
        rate = peak * min((step + 1) / 50, (1 - progress) / (1 - hold), 1.0)
        for optimizer, base_rate in zip(optimizers, base_rates, strict=True):
            optimizer.param_groups[0]["lr"] = base_rate * rate
        window = WINDOW_TOKENS[int(torch.randint(len(WINDOW_TOKENS), (1,), generator=generator))]
        batch = draw_windows(streams, max(tokens_per_step // window, 1), window, generator)
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits.flatten(0, 1)
        if teacher is None:
            loss = F.cross_entropy(logits, batch[:, 1:].flatten())
        else:
            with torch.no_grad():
                goal = (teacher(input_ids=batch[:, :-1], use_cache=False).logits.flatten(0, 1) / TEMPERATURE).softmax(-1)
            loss = F.cross_entropy(logits / TEMPERATURE, goal)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        smoothed = loss.item() if step == 0 else 0.98 * smoothed + 0.02 * loss.item()
        if step % 50 == 49 or step == steps - 1:
            speed = (step + 1) * tokens_per_step / (time.monotonic() - started)
            print(f"{out.name} step {step + 1}/{steps} loss {smoothed:.3f} {speed:.0f} tokens/s", flush=True)
        if step % 200 == 199 or step == steps - 1:
            save(model, out)


def save(model: LlamaForCausalLM, out: Path) -> None:
    """bf16 safetensors in the Hugging Face layout; the model being trained stays fp32."""
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.generation_config.update(do_sample=True, temperature=TEMPERATURE, top_p=TOP_P)
    copy.to(torch.bfloat16).save_pretrained(out)  # type: ignore[arg-type]  # transformers decorates `to` away


@torch.no_grad()
def evaluate(target: LlamaForCausalLM, draft: LlamaForCausalLM, tokenizer: Tokenizer, corpus: Corpus) -> dict[str, float]:
    """Held-out bits per byte of both models, and how often their greedy tokens agree given the same text before them.

    The text is the held-out files, and what the target itself writes after their beginnings, which is what a draft meets in service.
    """
    window = 1024
    bits = {"target": 0.0, "draft": 0.0}
    num_bytes = agreed = predicted = 0
    for text in corpus.held_out:
        ids = encode(tokenizer, [text])
        num_bytes += len(text.encode())
        for start in range(0, len(ids) - 1, window):
            piece = ids[start : start + window + 1][None]
            logits = {
                name: model(input_ids=piece[:, :-1], use_cache=False).logits.float()
                for name, model in (("target", target), ("draft", draft))
            }
            for name, values in logits.items():
                bits[name] += F.cross_entropy(values[0], piece[0, 1:], reduction="sum").item() / math.log(2)
            agreed += int((logits["target"].argmax(-1) == logits["draft"].argmax(-1)).sum())
            predicted += piece.shape[1] - 1
    return {
        "held_out_bytes": num_bytes,
        "held_out_tokens": predicted,
        "bytes_per_token": num_bytes / predicted,
        "target_bits_per_byte": bits["target"] / num_bytes,
        "draft_bits_per_byte": bits["draft"] / num_bytes,
        "greedy_agreement": agreed / predicted,
        "greedy_agreement_on_its_own_text": _agreement_on_own_text(target, draft, tokenizer, corpus),
    }


@torch.no_grad()
def _agreement_on_own_text(target: LlamaForCausalLM, draft: LlamaForCausalLM, tokenizer: Tokenizer, corpus: Corpus) -> float:
    prompt_tokens, new_tokens = 256, 128
    streams = [encode(tokenizer, [text]) for text in corpus.held_out]
    prompts = torch.stack([ids[:prompt_tokens] for ids in streams if len(ids) >= prompt_tokens])
    torch.manual_seed(0)
    writer: Any = target  # transformers' own annotations do not know it as a generator
    text = writer.generate(
        input_ids=prompts, do_sample=True, temperature=TEMPERATURE, top_p=TOP_P, min_new_tokens=new_tokens, max_new_tokens=new_tokens
    )
    greedy = [model(input_ids=text, use_cache=False).logits[:, prompt_tokens - 1 : -1].argmax(-1) for model in (target, draft)]
    return float((greedy[0] == greedy[1]).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["target", "draft", "evaluate", "all"])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--target-tokens", type=int, default=7_500_000)
    parser.add_argument("--draft-tokens", type=int, default=5_000_000)
    parser.add_argument("--peak", type=float, default=1.0, help="highest learning rate, as a share of the full one")
    parser.add_argument("--hold", type=float, default=0.5, help="share of the steps at that rate")
    parser.add_argument("--init", type=Path, help="continue the target from this checkpoint instead of starting anew")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    corpus = read_corpus()
    target_dir, draft_dir = arguments.out / "target", arguments.out / "draft"
    if arguments.stage in ("target", "all"):
        tokenizer = train_tokenizer(corpus, target_dir)
        model = (
            LlamaForCausalLM.from_pretrained(arguments.init, dtype=torch.float32) if arguments.init else LlamaForCausalLM(target_config())
        )
        tokens, tokens_per_step = arguments.target_tokens, TARGET_TOKENS_PER_STEP
        train(model, None, tokenizer, corpus, target_dir, tokens, tokens_per_step, arguments.peak, arguments.hold)
    tokenizer = Tokenizer.from_file(str(target_dir / "tokenizer.json"))
    target = LlamaForCausalLM.from_pretrained(target_dir, dtype=torch.float32)
    if arguments.stage in ("draft", "all"):
        draft_dir.mkdir(exist_ok=True)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(target_dir / name, draft_dir / name)
        tokens, tokens_per_step = arguments.draft_tokens, DRAFT_TOKENS_PER_STEP
        train(draft_from(target), target, tokenizer, corpus, draft_dir, tokens, tokens_per_step, 1.0, 0.5)
    if arguments.stage in ("evaluate", "all"):
        draft = LlamaForCausalLM.from_pretrained(draft_dir, dtype=torch.float32)
        print(json.dumps(evaluate(target, draft, tokenizer, corpus), indent=2))


if __name__ == "__main__":
    main()
