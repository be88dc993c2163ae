"""Test that the tokenizer restores every text exactly."""

import sysconfig
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.shards.tokenizer import Tokenizer, learnable, train_tokenizer

LINES = (Path(sysconfig.get_path("stdlib")) / "argparse.py").read_text().split("\n")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_tokenizer((line for line in LINES if line), 600))
    return Tokenizer(path)


pieces = st.sampled_from(
    ["\u2581", " ", "  ", "\n", "\r\n", "\t", "def ", "<s>", "</s>", "<|end_of_document|>", "<0x0A>"]
)


@given(st.text() | st.lists(pieces | st.text(max_size=3)).map("".join))
@settings(max_examples=400, deadline=None)
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.end_of_document not in ids
    assert all(0 <= token < tokenizer.vocab_size for token in ids)


def test_every_code_point_comes_back(tokenizer: Tokenizer) -> None:
    text = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x11000), 0x1F600, 0x10FFFF]))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_lines_are_encoded_as_the_library_encodes_the_whole(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = "\n".join(LINES)
    library = sentencepiece.SentencePieceProcessor(model_file=tokenizer.source)
    assert tokenizer.encode(text) == library.encode(text)
    assert len(text) / len(tokenizer.encode(text)) > 2


def test_training_gives_the_same_bytes_again() -> None:
    lines = [line for line in LINES if line]
    assert train_tokenizer(lines, 500) == train_tokenizer(lines, 500)


def test_a_vocabulary_that_the_text_cannot_fill_is_one_clear_line() -> None:
    with pytest.raises(DataError, match=r"--vocab-size 9000.*smaller one") as caught:
        train_tokenizer(["a b c"], 9000)
    assert "\n" not in str(caught.value)


def test_a_vocabulary_below_the_bytes_is_told_to_grow() -> None:
    with pytest.raises(DataError, match=r"--vocab-size 10:.*; choose a larger one$"):
        train_tokenizer(["a b c"], 10)


@pytest.mark.parametrize(
    "changes",
    [
        {"byte_fallback": False},
        {"normalization_rule_name": "nmt_nfkc"},
        {"add_dummy_prefix": True},
        {"remove_extra_whitespaces": True},
    ],
)
def test_a_model_that_loses_text_is_refused(tmp_path: Path, changes: dict) -> None:
    lossless = {
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
    }
    with (tmp_path / "model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(LINES), model_writer=file, vocab_size=500, minloglevel=2, **{**lossless, **changes}
        )
    with pytest.raises(DataError, match="does not restore text exactly"):
        Tokenizer(tmp_path / "model")


def test_a_normaliser_that_no_probe_shows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rules.tsv").write_text("71 72\t78\n")  # "qr" becomes "x"
    with (tmp_path / "model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(LINES),
            model_writer=file,
            vocab_size=500,
            minloglevel=2,
            byte_fallback=True,
            normalization_rule_tsv=str(tmp_path / "rules.tsv"),
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
        )
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "model"))
    assert processor.decode(processor.encode("a qr b")) == "a x b"
    with pytest.raises(DataError, match="it normalises text"):
        Tokenizer(tmp_path / "model")


def test_lines_that_the_library_leaves_out_are_cut() -> None:
    words = [f"{name}{number}" for number in range(9000) for name in ("alpha", "\u00e9psilon")]
    line = " ".join(words)
    pieces = list(learnable(line))
    assert "".join(pieces) == line and len(pieces) > 3
    assert max(len(piece.encode()) for piece in pieces) <= 1 << 16
    assert [word for piece in pieces for word in piece.split()] == words
    assert "".join(learnable("\U0001d11e" * 100_000)) == "\U0001d11e" * 100_000
    assert list(learnable("a\u2585b")) == ["a", "b"] and list(learnable("ab")) == ["ab"] and not list(learnable(""))


@pytest.mark.parametrize("content", [b"", b"no model", None])
def test_what_is_no_model_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "model").write_bytes(content)
    with pytest.raises(DataError, match="model"):
        Tokenizer(tmp_path / "model")
