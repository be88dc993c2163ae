"""Attention entropies of this project's runs. Tensor names carry their shape: B sequences, N heads, T tokens."""

from pathlib import Path

import torch
from torch import Tensor

from model.transformer import Transformer
from train.checkpoint.whole import find_checkpoint, load_whole, open_run


class OwnModel:
    """The model of a run. No weights are read before `load`.

    Args:
        run: the run_dir.
        step: of the checkpoint; None takes the newest intact one.
        data: another prepared dataset with the same tokenizer, or None.
        allow_commands: whether the run's own dataset may be read by a command.

    Attributes:
        name: for the report.
        longest: the most tokens that a sequence may have.
        usual_length: tokens of a sequence if nothing else is asked for.

    Raises:
        RunError, ConfigError, DataError: there is no run, or its dataset's tokenizer cannot be read.
    """

    def __init__(self, run: Path, step: int | None, data: str | None, allow_commands: bool) -> None:
        self._config, self._manifest, self._tokenizer = open_run(run, data, allow_commands)
        self._step = step
        self._model: Transformer | None = None
        self.name = str(run)
        self.longest = self.usual_length = self._config.model.seq_length

    def encode(self, text: str) -> tuple[list[int], list[int]]:
        """Return the tokens of a text, and those that stand before every sequence: none."""
        return self._tokenizer.encode(text), []

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Read the weights.

        Raises:
            RunError, CheckpointError: there is no checkpoint that fits.
        """
        saved = find_checkpoint(self._config, self._manifest, self._step)
        self._model = load_whole(saved, self._config, device, dtype)
        self.name = f"{self.name}, step {saved.step}"

    def head_entropies(self, tokens_BT: Tensor) -> list[Tensor]:
        """Run whole sequences; return each layer's mean entropies over positions in nats, [B, N]."""
        assert self._model is not None, "load it first"
        return [entropy_BNT.mean(-1) for entropy_BNT in self._model.hidden_states(tokens_BT.t())[1]]
