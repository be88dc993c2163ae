import pytest

from data.errors import DataError, redacted


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://ada:pw@host/a?x=1", "https://***@host/a?x=1"),
        ("see https://ada@host/a and s3://k:s@b/c", "see https://***@host/a and s3://***@b/c"),
        ("https://h/a?token=abc&x=1", "https://h/a?token=***&x=1"),
        (
            "https://h/?X-Amz-Signature=0f&X-Amz-Credential=k%2F1#f",
            "https://h/?X-Amz-Signature=***&X-Amz-Credential=***#f",
        ),
        ("https://h/a?se=2026&sig=zz", "https://h/a?se=2026&sig=***"),
        (
            "pipe:curl -H 'Authorization: Bearer abc' https://h/{}",
            "pipe:curl -H 'Authorization: Bearer ***' https://h/{}",
        ),
        ('pipe:curl -H "X-Auth-Token:abc" h/{}', 'pipe:curl -H "X-Auth-Token:***" h/{}'),
        ("pipe:curl -u ada:pw https://h/{}", "pipe:curl -u *** https://h/{}"),
        ("pipe:get --password=pw --token abc {}", "pipe:get --password=*** --token *** {}"),
        ("API_KEY=abc cat {}", "API_KEY=*** cat {}"),
        ("cannot be read (/ada:pw@host/a)", "cannot be read (/***@host/a)"),
    ],
)
def test_secrets_are_hidden(text: str, shown: str) -> None:
    assert redacted(text) == shown
    assert redacted(shown) == shown
    assert str(DataError(text)) == shown


@pytest.mark.parametrize(
    "text",
    [
        "runs/keyboard at 12:30, key points",
        "training.train_tokens=1000 and tokenizer: damaged, key: x",
        "expected a folder, http(s)://, pipe: or a store; write to a@b.org",
        "tokenizer.model?, --vocab-size 100 --users 3",
        "model.num_layers = 3 must be a whole number",
        "rank 0: line 3: x@y, at 12:30 @home, user@host:path",
    ],
)
def test_other_text_stays(text: str) -> None:
    assert redacted(text) == text
