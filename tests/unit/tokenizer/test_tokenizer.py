"""Reading a checkpoint's tokenizer, and what it refuses."""

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as RustTokenizer

from services.core.errors import CheckpointError, InvalidRequest
from services.tokenizer.tokenizer import Tokenizer
from tests.unit.tokenizer.conftest import CORPUS


@pytest.fixture
def checkpoint(checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(checkpoints["byte_level"], tmp_path / "checkpoint"))


def test_encode_when_special_tokens_are_added_then_bos_comes_first(tokenizers_by_kind: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers_by_kind["byte_level"]
    with_bos, without = tokenizer.encode("the dog"), tokenizer.encode("the dog", add_special_tokens=False)
    assert with_bos == [tokenizer.bos_token_id, *without]
    assert tokenizer.decode(with_bos) == "the dog"
    assert tokenizer.decode(with_bos, skip_special_tokens=False) == "<s>the dog"


def test_encode_when_text_is_not_unicode_then_invalid_request(tokenizers_by_kind: dict[str, Tokenizer]) -> None:
    with pytest.raises(InvalidRequest, match="surrogate"):
        tokenizers_by_kind["byte_level"].encode("a\ud83d")


def test_encode_when_the_file_saved_limits_then_they_are_off(checkpoint: Path) -> None:
    rust = RustTokenizer.from_file(str(checkpoint / "tokenizer.json"))
    assert len(rust.encode("a b c d e f g h").ids) > 4
    rust.enable_truncation(4)
    rust.enable_padding(length=64)
    rust.save(str(checkpoint / "tokenizer.json"))
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    ids = tokenizer.encode("a b c d e f g h")
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s>a b c d e f g h"


def test_decode_when_ids_are_outside_the_vocabulary_then_they_are_left_out(tokenizers_by_kind: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers_by_kind["byte_level"]
    dog = tokenizer.encode("dog", add_special_tokens=False)
    assert tokenizer.decode([tokenizer.vocab_size, *dog, 10**6]) == "dog"


@pytest.mark.parametrize("text", [*CORPUS[:2], "Zażółć gęślą jaźń 中文 😀🎉"])
def test_token_bytes_when_joined_are_the_text(tokenizers_by_kind: dict[str, Tokenizer], text: str) -> None:
    for kind in ("byte_level", "byte_fallback"):
        tokenizer = tokenizers_by_kind[kind]
        data = b"".join(map(tokenizer.token_bytes, tokenizer.encode(text, add_special_tokens=False)))
        assert data.decode().removeprefix(" ") == text, kind


def test_token_bytes_when_the_token_is_special_or_unknown(tokenizers_by_kind: dict[str, Tokenizer]) -> None:
    for kind, tokenizer in tokenizers_by_kind.items():
        assert tokenizer.bos_token_id is None or tokenizer.token_bytes(tokenizer.bos_token_id).strip() == b"<s>", kind
        assert tokenizer.token_bytes(10**6) == b""


def test_vocab_size_when_tokens_were_added_then_it_counts_them(tokenizers_by_kind: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers_by_kind["byte_level"]
    assert tokenizer.eos_token_id is not None
    assert max(tokenizer.encode("</s>")) < tokenizer.vocab_size == tokenizer._tokenizer.get_vocab_size()


def test_special_ids_when_only_the_map_names_them_then_they_are_found(checkpoint: Path) -> None:
    (checkpoint / "tokenizer_config.json").unlink()
    tokens = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>", "additional_special_tokens": ["x"]}
    (checkpoint / "special_tokens_map.json").write_text(json.dumps(tokens))
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    assert tokenizer.decode([tokenizer.bos_token_id or 0], skip_special_tokens=False) == "<s>"
    assert tokenizer.decode([tokenizer.eos_token_id or 0], skip_special_tokens=False) == "</s>"


@pytest.mark.parametrize(("added_tokens_decoder", "winner"), [(None, "<|zażółć|>"), ({}, "</s>")])
def test_special_ids_when_the_files_disagree_then_the_newer_format_wins(
    checkpoint: Path, added_tokens_decoder: dict[str, str] | None, winner: str
) -> None:
    config = {"eos_token": "</s>"} | ({} if added_tokens_decoder is None else {"added_tokens_decoder": added_tokens_decoder})
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(config))
    (checkpoint / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|zażółć|>"}))
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    assert tokenizer.encode(winner, add_special_tokens=False) == [tokenizer.eos_token_id]


def test_special_ids_when_no_file_names_them_then_none(checkpoint: Path) -> None:
    (checkpoint / "tokenizer_config.json").write_text('{"bos_token": null}')
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    assert tokenizer.bos_token_id is None
    assert tokenizer.eos_token_id is None


def test_detokenizer_when_the_normalizer_changes_a_special_token_then_it_stays_visible_as_in_decode(tmp_path: Path) -> None:
    # Checkpoints converted long ago have <s> with normalized=true; `tokenizers` then no longer takes "▁<s>" for special.
    rust = RustTokenizer(models.BPE(vocab={"▁a": 0}, merges=[]))
    rust.normalizer = normalizers.Prepend("▁")
    rust.decoder = decoders.Metaspace()
    rust.add_special_tokens([AddedToken("<s>", normalized=True, special=True)])
    rust.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_checkpoint(tmp_path)
    detokenizer = tokenizer.detokenizer()
    assert detokenizer.push([0, 1, 0]) + detokenizer.finish() == tokenizer.decode([0, 1, 0])


def test_from_checkpoint_when_the_tokenizer_is_missing_then_checkpoint_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot read") as raised:
        Tokenizer.from_checkpoint(tmp_path)
    assert raised.value.path == str(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b""),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b'{"version": "1.0", "model": {"type": "Telepathy"}}'),
        ("tokenizer_config.json", b"{"),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b'{"eos_token": 2}'),
        ("tokenizer_config.json", b'{"chat_template": {"default": "x"}}'),
        ("tokenizer_config.json", b'{"chat_template": "\xff"}'),
        ("special_tokens_map.json", b"not json"),
        ("chat_template.jinja", b"\xff"),
    ],
)
def test_from_checkpoint_when_a_file_is_broken_then_checkpoint_error_names_it(checkpoint: Path, name: str, content: bytes) -> None:
    (checkpoint / name).write_bytes(content)
    with pytest.raises(CheckpointError) as raised:
        Tokenizer.from_checkpoint(checkpoint)
    assert raised.value.path == str(checkpoint / name)


def test_from_checkpoint_when_eos_is_not_in_the_vocabulary_then_checkpoint_error(checkpoint: Path) -> None:
    (checkpoint / "tokenizer_config.json").write_text('{"eos_token": "<|nowhere|>"}')
    with pytest.raises(CheckpointError, match="nowhere"):
        Tokenizer.from_checkpoint(checkpoint)
