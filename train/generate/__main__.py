"""Continue prompts with a trained model:

    python -m train.generate --run runs/quickstart --prompt "def main():"
    python -m train.generate --run runs/quickstart --prompts prompts.txt --top-p 0.9 --seed 7 --json
    cat start.py | python -m train.generate --run runs/quickstart --max-new-tokens 60

One prompt's text appears as it is generated. Several prompts are generated in batches. The same seed gives the same
text, whatever the batch.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from data.command_line import path_argument, print_faults, read_text, real_number, run_command, whole_number
from data.errors import DataError, printable
from data.files.strict_json import parse_row, to_json
from data.shards.tokenizer import Tokenizer
from train.config import ConfigError
from train.run.reader import RunError

if TYPE_CHECKING:
    from model.generation.sampling import Sampling
    from model.transformer import Transformer

USUAL_NEW_TOKENS = 128
UNFINISHED = "\ufffd"
"""What the tokenizer gives for the first bytes of a character whose last byte is still to come."""


@dataclass
class Continuation:
    """A prompt and what follows it.

    Attributes:
        number: of the prompt, from 0; its random numbers depend on it.
        tokens: of the prompt; that of the end of a document if it is empty, so that a new document begins.
        new_tokens: generated so far.
    """

    number: int
    prompt: str
    tokens: list[int]
    new_tokens: list[int] = field(default_factory=list)

    def text(self, tokenizer: Tokenizer) -> str:
        """Return the text that follows the prompt."""
        return tokenizer.decode([*self.tokens, *self.new_tokens])[len(tokenizer.decode(self.tokens)) :]

    def as_text(self, tokenizer: Tokenizer, count: int) -> str:
        """Return prompt and continuation under a line that says which of `count` prompts it is."""
        return f"--- {self.number + 1} of {count} ---\n" + safe(self.prompt + self.text(tokenizer))

    def as_json(self, tokenizer: Tokenizer) -> str:
        """Return a JSON object; `ended` says whether the model ended the document."""
        ended = self.new_tokens[-1:] == [tokenizer.end_of_document]
        return to_json({"prompt": self.prompt, "text": self.text(tokenizer), "tokens": self.new_tokens, "ended": ended})


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    from torch import OutOfMemoryError

    from model.generation.sampling import Sampling
    from train.checkpoint.root import CheckpointError

    sampling = Sampling(0.0 if options.greedy else options.temperature, options.top_k, options.top_p)
    try:
        run(options, sampling)
    except (ConfigError, DataError, RunError, CheckpointError) as error:
        print_faults(error)
        return 2
    except OutOfMemoryError:
        print_faults(DataError("the device's memory is too small; lower --batch-size, or take --dtype bfloat16"))
        return 2
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    from train.checkpoint.whole import add_model_arguments

    parser = argparse.ArgumentParser(
        prog="python -m train.generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--run", required=True, type=path_argument, metavar="DIR", help="folder of a run that has a checkpoint")
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument(
        "--prompt", action="append", metavar="TEXT", help="text to continue; repeat it for several (default: stdin)"
    )
    prompts.add_argument(
        "--prompts",
        type=path_argument,
        metavar="FILE",
        help="a prompt a line; of a .jsonl file, the key 'prompt' of each line",
    )
    add(
        "--max-new-tokens",
        type=whole_number(1),
        metavar="N",
        help=f"tokens after each prompt (default: {USUAL_NEW_TOKENS}, or what the model's seq_length leaves)",
    )
    add("--greedy", action="store_true", help="always take the most likely token, as temperature 0 does")
    add("--temperature", type=real_number(0), default=1.0, metavar="T", help="divides the logits (default: 1)")
    add("--top-k", type=whole_number(1), metavar="K", help="draw from the K most likely tokens")
    add(
        "--top-p",
        type=real_number(1e-6, 1),
        default=1.0,
        metavar="P",
        help="draw from the fewest most likely tokens whose probabilities sum to P, after --top-k (default: 1)",
    )
    add("--seed", type=whole_number(0), default=1, help="of the random numbers (default: %(default)s)")
    add("--batch-size", type=whole_number(1), default=8, metavar="B", help="prompts at a time (default: %(default)s)")
    add("--json", action="store_true", help="print a JSON object a line: prompt, text, tokens, ended")
    add_model_arguments(parser)
    options = parser.parse_args(arguments)
    if options.prompt is None and options.prompts is None and sys.stdin.isatty():
        parser.error("nothing to continue; give --prompt, --prompts or text on standard input")
    return options


def run(options: argparse.Namespace, sampling: "Sampling") -> None:
    """Generate what the command line asks for, and print it.

    Raises:
        ConfigError, DataError, RunError, CheckpointError: it cannot be generated; each line of the message is a fault.
    """
    from train.checkpoint.whole import DTYPES, chosen_device, find_checkpoint, load_whole, open_run

    prompts, device = read_prompts(options), chosen_device(options.device)
    config, manifest, tokenizer = open_run(options.run, options.data, options.allow_commands)
    wanted = [
        Continuation(number, prompt, tokenizer.encode(prompt) or [tokenizer.end_of_document])
        for number, prompt in enumerate(prompts)
    ]
    new_tokens = count_of_new_tokens(wanted, options.max_new_tokens, config.model.seq_length)
    model = load_whole(find_checkpoint(config, manifest, options.step), config, device, DTYPES[options.dtype])
    started = time.perf_counter()
    for first in range(0, len(wanted), options.batch_size):
        batch = wanted[first : first + options.batch_size]
        stream = Stream(batch[0], tokenizer) if len(wanted) == 1 and not options.json else None
        for _ in extended(model, batch, new_tokens, sampling, options.seed, tokenizer.end_of_document):
            if stream is not None:
                stream.write_new()
        if stream is not None:
            stream.finish()
            continue
        for each in batch:
            print(each.as_json(tokenizer) if options.json else each.as_text(tokenizer, len(wanted)), flush=True)
    seconds, count = time.perf_counter() - started, sum(len(each.new_tokens) for each in wanted)
    print(f"{count} tokens in {seconds:.2f} s ({count / seconds:,.0f} tokens/s)", file=sys.stderr)


def extended(
    model: "Transformer", batch: list[Continuation], new_tokens: int, sampling: "Sampling", seed: int, end: int
) -> Iterator[None]:
    """Append a token to each continuation of a batch, and yield, until all have ended.

    Raises:
        DataError: the model's weights are lost.
    """
    from model.generation.decoder import generate

    prompts = [each.tokens for each in batch]
    try:
        for tokens in generate(model, prompts, new_tokens, sampling, seed=seed, first=batch[0].number, end=end):
            for each, token in zip(batch, tokens, strict=True):
                if token is not None:
                    each.new_tokens.append(token)
            yield
    except ValueError as error:
        raise DataError(str(error)) from None


class Stream:
    """Prints a prompt, and what follows it as it grows."""

    def __init__(self, continuation: Continuation, tokenizer: Tokenizer) -> None:
        self._continuation, self._tokenizer, self._written = continuation, tokenizer, 0
        print(safe(continuation.prompt), end="", flush=True)

    def write_new(self) -> None:
        """Print what is new, except a character whose last byte is still to come."""
        self._write(self._continuation.text(self._tokenizer).rstrip(UNFINISHED))

    def finish(self) -> None:
        """Print the rest and end the line."""
        self._write(self._continuation.text(self._tokenizer))
        print()

    def _write(self, text: str) -> None:
        print(safe(text[self._written :]), end="", flush=True)
        self._written = max(self._written, len(text))


def read_prompts(options: argparse.Namespace) -> list[str]:
    """Return the prompts that the command line names.

    Raises:
        DataError: a file cannot be read or holds none, or a prompt is no text.
    """
    if options.prompts is not None:
        prompts = prompts_of(options.prompts)
    elif options.prompt is not None:
        prompts = options.prompt
    else:
        try:
            prompts = [sys.stdin.read()]
        except UnicodeDecodeError as error:
            raise DataError(f"standard input: byte {error.start} is not UTF-8; convert the text") from None
    for number, prompt in enumerate(prompts, 1):
        if any("\ud800" <= char <= "\udfff" for char in prompt):  # what Python makes of bytes that are no text
            raise DataError(f"prompt {number}: is not UTF-8; convert the text")
    return prompts


def prompts_of(file: Path) -> list[str]:
    """Return the prompts in a file, as --prompts defines them."""
    lines = read_text(file).replace("\r\n", "\n").removesuffix("\n").split("\n")
    if lines == [""]:
        raise DataError(f"{file}: holds no prompt; write one a line")
    if file.suffix != ".jsonl":
        return lines
    rows = [parse_row(line.encode()) for line in lines]
    texts = [row.get("prompt") if row is not None else None for row in rows]
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str):
            raise DataError(f'{file}: line {number}: expected a JSON object with a text "prompt"')
    return [text for text in texts if isinstance(text, str)]


def count_of_new_tokens(wanted: list[Continuation], asked: int | None, seq_length: int) -> int:
    """Return how many tokens to generate after each prompt.

    Raises:
        ConfigError: prompts and new tokens do not fit the model; a line for each prompt that is too long.
    """
    faults, least = [], asked or 1
    for each in wanted:
        found, room = len(each.tokens), seq_length - len(each.tokens)
        if least > room:
            remedy = f"ask for at most {room} (--max-new-tokens)" if room > 0 else "shorten the prompt"
            faults.append(
                f"prompt {each.number + 1}: {found} tokens and {least} new ones are more than the model's seq_length = "
                f"{seq_length}; {remedy}"
            )
    if faults:
        raise ConfigError(faults)
    return asked or min(USUAL_NEW_TOKENS, seq_length - max(len(each.tokens) for each in wanted))


def safe(text: str) -> str:
    """Return a text whose control characters, other than line feeds and tabs, do nothing to a terminal."""
    return printable(text, keep="\n\t")


if __name__ == "__main__":
    run_command(main)
