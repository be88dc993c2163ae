"""tokenizer.json must give the tokens of our SentencePiece model, whatever the text."""

import random
from pathlib import Path

import pytest

from data.errors import DataError
from data.files.strict_json import to_json
from data.shards.tokenizer import Tokenizer, train_tokenizer
from train.exchange.tokenizer_json import tokenizer_config, tokenizer_json

NAUGHTY = (
    "", " ", "  ", "\t", "\n", "\r\n", "a", " a", "a ", "\t \t\n \n\n  x", "\0", "a\0b",
    "\x01\x07\x1b[0m\x7f", "\x80\x9f",
    "\u2581", "\u2581\u2581x \u2581", "<|end_of_document|>", "x<|end_of_document|>y", "<unk>", "<0x0A>", " \u2047 ",
    "\U0001f600", "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea", "e\u0301\u0302\u0303",
    "\u0301", "\ufeffx",
    "\ufffd", "\ufffe\uffff", "\U0010ffff", "\u202eabc\u202c", "\u200b\u00a0\u3000", "def f(self):\n        return 1\n",
    "日本語 текст עברית عربى", "==========", "-----===", "aaaaaaaaaaaa", "(((((([[[[[", "''''''\"\"\"", "#" * 300,
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> bytes:
    """Train on this project's own code and pages, so that runs of spaces and signs are pieces."""
    root = Path(__file__).parents[3]
    files = sorted([*root.glob("model/*.py"), *root.glob("data/*/*.py"), *root.glob("docs/*/*.md")])
    return train_tokenizer((line for file in files for line in file.read_text().splitlines()), 1500)


def both(model: bytes, folder: Path) -> tuple[Tokenizer, "object"]:
    """Return our tokenizer and the transformers library's."""
    transformers = pytest.importorskip("transformers")
    (folder / "tokenizer.model").write_bytes(model)
    ours = Tokenizer(folder / "tokenizer.model")
    (folder / "tokenizer.json").write_text(to_json(tokenizer_json(ours)))
    (folder / "tokenizer_config.json").write_text(to_json(tokenizer_config(ours, 64)))
    return ours, transformers.AutoTokenizer.from_pretrained(folder)


def test_naughty_texts_and_a_corpus(model: bytes, tmp_path: Path) -> None:
    ours, theirs = both(model, tmp_path)
    corpus = [file.read_text() for file in sorted(Path(__file__).parents[3].glob("train/*.py"))]
    for text in [*NAUGHTY, *corpus]:
        ids = ours.encode(text)
        assert theirs(text)["input_ids"] == ids, repr(text[:100])
        assert theirs.decode(ids) == text
    assert theirs.eos_token_id == theirs.bos_token_id == theirs.pad_token_id == ours.end_of_document


def test_random_texts(model: bytes, tmp_path: Path) -> None:
    ours, theirs = both(model, tmp_path)
    draw = random.Random(0)
    alphabets = ["ab", " =", "a ", "-=#", "\t\n x", "".join(map(chr, range(256))), "es t\u2581", "\u00e9\U0001f600 \0"]
    pieces = [piece for piece in theirs.get_vocab() if not piece.startswith("<")]
    for trial in range(3000):
        source = draw.choice(alphabets) if trial % 2 else draw.sample(pieces, 5)
        text = "".join(draw.choices(source, k=draw.randint(1, 60)))
        ids = ours.encode(text)
        assert theirs(text)["input_ids"] == ids, repr(text)
        assert theirs.decode(ids) == text


def test_broken_ends_decode_as_ours(model: bytes, tmp_path: Path) -> None:
    """A generated text may end within a character; what stands before it must stay."""
    ours, theirs = both(model, tmp_path)
    ids = ours.encode("x\n\t\U0001f600")[:-1]
    assert theirs.decode(ids) == ours.decode(ids) == "x\n\t\ufffd\ufffd\ufffd"


@pytest.mark.parametrize(("kind", "fault"), [("unigram", "not a byte-pair model"), ("bpe", "user-defined or unused")])
def test_other_models_are_refused(kind: str, fault: str, tmp_path: Path) -> None:
    import io

    import sentencepiece

    buffer = io.BytesIO()
    options = {"user_defined_symbols": ["<x>"]} if kind == "bpe" else {}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d e f g"] * 50), model_writer=buffer, model_type=kind, vocab_size=280,
        byte_fallback=True, hard_vocab_limit=False, minloglevel=2, normalization_rule_name="identity",
        add_dummy_prefix=False, remove_extra_whitespaces=False, **options,
    )  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(buffer.getvalue())
    with pytest.raises(DataError, match=fault):
        tokenizer_json(Tokenizer(tmp_path / "tokenizer.model"))
