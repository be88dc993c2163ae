"""Score tasks of multiple choice with the model that trains, under any layout.

A task is a file of one JSON object a line:

    {"context": "The sky is", "choices": [" blue", " green"], "answer": 0}

The model answers with the choice to which it gives the largest probability after the context. Accuracy is the share of
documents answered right. As in lm-evaluation-harness's `acc`, probabilities are not divided by length.

Each choice is one evaluation of one micro-batch whose only counted labels are the choice's tokens, and its
cross-entropy is the score. This is the pass of the validation loss, so it works wherever that does. It is also
wasteful: the other rows of the micro-batch do nothing, and every replica does the same. So use few documents.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from data.errors import DataError
from data.files.address import local_path
from data.files.own import open_to_read, read_within
from data.files.strict_json import MOST_BYTES, check_shape, parse_json
from data.shards.manifest import Manifest
from data.shards.tokenizer import Tokenizer
from parallel.engine.telemetry import metric_means
from parallel.launch import local_device
from parallel.micro_batch import IGNORED_LABEL, MicroBatch
from parallel.sharding.megatron import Groups
from parallel.sharding.stage import StageStatistics
from train.config import Config

Evaluate = Callable[[Iterator[MicroBatch], list[int]], StageStatistics]
SHAPE = {"context": str, "choices": [str], "answer": int}


@dataclass(frozen=True)
class Choice:
    """Tokens of a context and a choice after it.

    Attributes:
        tokens: at most seq_length + 1, the last ones.
        num_scored: how many of the last tokens are the choice's.
    """

    tokens: list[int]
    num_scored: int


@dataclass(frozen=True)
class Document:
    """A question: its choices, and the index of the right one."""

    choices: list[Choice]
    answer: int


def load_tasks(config: Config, manifest: Manifest) -> dict[str, list[Document]]:
    """Read and tokenize the tasks of a configuration, the first `downstream.samples` documents of each.

    Raises:
        DataError: a file cannot be read, or a line is no document; names the file, the line and what was expected.
    """
    settings = config.downstream
    if not settings.interval or not settings.tasks:
        return {}
    tokenizer = Tokenizer(manifest.tokenizer_path)
    return {
        name: [_document(*line, tokenizer, config.model.seq_length) for line in _lines(address, settings.samples)]
        for name, address in settings.tasks.items()
    }


def accuracy(documents: list[Document], groups: Groups, config: Config, evaluate: Evaluate) -> float:
    """Return the share of documents answered right; all ranks call.

    Args:
        evaluate: runs micro-batches through the stage (Engine.evaluate).
    """
    right = 0
    for document in documents:
        costs = [_cross_entropy(choice, groups, config, evaluate) for choice in document.choices]
        right += costs.index(min(costs)) == document.answer
    return right / len(documents)


def _cross_entropy(choice: Choice, groups: Groups, config: Config, evaluate: Evaluate) -> float:
    """Return the negative log-probability of a choice after its context, in nats."""
    statistics = evaluate(iter([micro_batch_of(choice, groups, config)]), [1])
    # The mean over replicas, where context-parallel ones hold parts of the sum.
    return metric_means(statistics, groups)["ce_loss"] * groups.grid.cp


def micro_batch_of(choice: Choice, groups: Groups, config: Config) -> MicroBatch:
    """Return this rank's share of a micro-batch whose first row is the choice, and whose other labels do not count."""
    length, rows = config.model.seq_length, config.training.micro_batch_size
    inputs, targets = choice.tokens[:-1], choice.tokens[1:]
    tokens_TB = torch.zeros(length, rows, dtype=torch.int64)
    labels_TB = torch.full((length, rows), IGNORED_LABEL, dtype=torch.int64)
    tokens_TB[: len(inputs), 0] = torch.tensor(inputs)
    scored = slice(len(inputs) - choice.num_scored, len(inputs))
    labels_TB[scored, 0] = torch.tensor(targets[scored])
    positions = groups.grid.positions(length)
    held, device = slice(positions.start, positions.stop), local_device()
    starts = torch.zeros(rows, length, dtype=torch.int64) if config.data.attention_within_documents else None
    return MicroBatch(
        tokens_TB[held].contiguous().to(device),
        labels_TB[held].contiguous().to(device),
        None if starts is None else starts.to(device),
    )


def _lines(address: str, samples: int) -> Iterator[tuple[str, bytes]]:
    """Yield the first lines of a file, each with its place for messages."""
    file = local_path(address)
    try:
        with open_to_read(file) as opened:
            lines = read_within(opened, MOST_BYTES).splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read ({error}); name a file in downstream.tasks") from None
    if not lines:
        raise DataError(f"{file}: holds no document; give one JSON object a line")
    yield from ((f"{file}:{number}", line) for number, line in enumerate(lines[:samples], start=1))


def _document(place: str, line: bytes, tokenizer: Tokenizer, seq_length: int) -> Document:
    try:
        tree = parse_json(line)
        check_shape(tree, SHAPE)
        if len(tree["choices"]) < 2 or "" in tree["choices"]:
            raise ValueError("choices are fewer than two, or empty")
        if not 0 <= tree["answer"] < len(tree["choices"]):
            raise ValueError(f"answer is {tree['answer']}, expected the index of a choice")
    except ValueError as error:
        raise DataError(f"{place}: {error}; expected an object with context, choices and answer") from None
    return Document([_choice(tree["context"], text, tokenizer, seq_length) for text in tree["choices"]], tree["answer"])


def _choice(context: str, choice: str, tokenizer: Tokenizer, seq_length: int) -> Choice:
    """Tokenize both as one text, which begins after an end of document."""
    shared, whole = len(tokenizer.encode(context)), [tokenizer.end_of_document, *tokenizer.encode(context + choice)]
    num_scored = max(1, len(whole) - 1 - shared)
    kept = whole[-(seq_length + 1) :]
    return Choice(kept, min(num_scored, len(kept) - 1))
