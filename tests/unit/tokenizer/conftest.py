"""Small checkpoints of the common kinds of tokenizer, built on the spot."""

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as RustTokenizer

from services.tokenizer.tokenizer import Tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's the first of many, isn't it?",
    "def add(a, b):\n    return a + b\n\n    # indented   by   spaces",
    "Zażółć gęślą jaźń; Größe, naïve café; 日本語のテキスト and 中文 text 😀🎉",
]
PLAIN_ADDED = [
    AddedToken("<tool call>", normalized=False),
    AddedToken("Größe größer", normalized=False),
    AddedToken("日本", normalized=False),
    AddedToken("é", normalized=False),  # its one character is in the byte alphabet: the decoder takes it for the byte E9
    AddedToken("<0x42>", normalized=False),  # the byte B for a decoder with byte fallback, plain text for the others
    AddedToken("keep me", normalized=True),
]
SPECIAL_ADDED = [
    AddedToken("<s>", normalized=False, special=True),
    AddedToken("</s>", normalized=False, special=True),
    AddedToken("<|zażółć|>", normalized=False, special=True),
]


def _byte_level() -> RustTokenizer:
    tokenizer = RustTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False))
    return tokenizer


def _byte_level_after_replace() -> RustTokenizer:
    tokenizer = _byte_level()
    tokenizer.decoder = decoders.Sequence([decoders.Replace("ĠĠ", "Ġ"), decoders.ByteLevel()])
    return tokenizer


def _byte_level_in_sequence() -> RustTokenizer:
    tokenizer = _byte_level()
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel()])
    return tokenizer


def _byte_level_normalizer() -> RustTokenizer:
    tokenizer = _byte_level()
    tokenizer.normalizer = normalizers.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("Ġ"), "merged_with_next")
    return tokenizer


def _byte_fallback() -> RustTokenizer:
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁▁", "▁▁▁▁", "\n"]
    tokens += [*"abcdefghijklmnopqrstuvwxyzTI.,;?#+()'", "ó", "é", "日", "\N{REPLACEMENT CHARACTER}", ""]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "a"), ("i", "n"), ("▁", "f"), ("▁", "T"), ("▁", "▁"), ("▁▁", "▁▁")]
    vocab = list(dict.fromkeys([*tokens, *("".join(pair) for pair in merges)]))
    tokenizer = RustTokenizer(
        models.BPE(
            vocab={token: token_id for token_id, token in enumerate(vocab)},
            merges=merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return tokenizer


def _byte_fallback_without_strip() -> RustTokenizer:
    tokenizer = _byte_fallback()
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _byte_fallback_with_deep_strip() -> RustTokenizer:
    tokenizer = _byte_fallback()
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 7, 0)])
    return tokenizer


def _metaspace() -> RustTokenizer:
    tokenizer = RustTokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=150, special_tokens=["<unk>"], show_progress=False))
    return tokenizer


def _word_piece() -> RustTokenizer:
    tokenizer = RustTokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=150, special_tokens=["<unk>"], show_progress=False))
    return tokenizer


def _word_suffix() -> RustTokenizer:
    tokenizer = RustTokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder()
    trainer = trainers.BpeTrainer(vocab_size=150, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _no_decoder() -> RustTokenizer:
    tokenizer = _metaspace()
    tokenizer.decoder = None
    return tokenizer


BUILDERS = {
    "byte_level": _byte_level,
    "byte_level_in_sequence": _byte_level_in_sequence,
    "byte_level_after_replace": _byte_level_after_replace,
    "byte_level_normalizer": _byte_level_normalizer,
    "byte_fallback": _byte_fallback,
    "byte_fallback_without_strip": _byte_fallback_without_strip,
    "byte_fallback_with_deep_strip": _byte_fallback_with_deep_strip,
    "metaspace": _metaspace,
    "word_piece": _word_piece,
    "word_suffix": _word_suffix,
    "no_decoder": _no_decoder,
}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One directory per kind of tokenizer; encoding puts <s> in front."""
    directories = {}
    for kind, build in BUILDERS.items():
        directory = tmp_path_factory.mktemp(kind)
        tokenizer = build()
        tokenizer.add_tokens(PLAIN_ADDED)
        tokenizer.add_special_tokens(SPECIAL_ADDED)
        bos = tokenizer.token_to_id("<s>")
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
        tokenizer.save(str(directory / "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": 1000000000000000019884624838656,
            "bos_token": {"__type": "AddedToken", "content": "<s>", "normalized": False, "special": True},
            "eos_token": "</s>",
        }
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
        directories[kind] = directory
    return directories


@pytest.fixture(scope="session")
def tokenizers_by_kind(checkpoints: dict[str, Path]) -> dict[str, Tokenizer]:
    return {kind: Tokenizer.from_checkpoint(directory) for kind, directory in checkpoints.items()}
