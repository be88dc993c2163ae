"""The application: configuration, the training loop, evaluation, pictures. `load` opens a trained model."""

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from data.shards.tokenizer import Tokenizer
    from model.transformer import Transformer

# `python -m train.plan` and worker processes ("-c") search the working directory first. If this package was
# found elsewhere, search it last, so that a user's own folder `data` or `model` hides none of ours.
if sys.argv[:1] in (["-m"], ["-c"]) and sys.path[0] in ("", os.getcwd()) and not os.path.exists("train/__init__.py"):
    sys.path.append(sys.path.pop(0))


def load(
    run: str | os.PathLike[str],
    *,
    step: int | None = None,
    device: "str | torch.device | None" = None,
    dtype: "torch.dtype | None" = None,
    data: str | None = None,
    allow_commands: bool = False,
) -> "tuple[Transformer, Tokenizer]":
    """Load a run's model and its tokenizer, whatever layout trained it.

        model, tokenizer = load("runs/quickstart")
        tokens_TB = torch.tensor(tokenizer.encode("def main():")).unsqueeze(1)
        logits_TBV, entropies_BNT = model(tokens_TB.to(model.head.weight.device))
        entropies_BNT[0].mean((0, 2))       # the first layer's heads, in nats

    Args:
        run: the run_dir.
        step: of the checkpoint; the newest intact one by default.
        device: the GPU if there is one, else the CPU.
        dtype: of the weights; float32 by default, as they were saved.
        data: another prepared dataset with the same tokenizer, if the run's own is gone.
        allow_commands: whether the run's own dataset may be read by a command ('pipe:').

    Returns:
        The model, in evaluation mode, and the tokenizer of the run's dataset.

    Raises:
        RunError, ConfigError, CheckpointError, DataError: all are ValueErrors or RuntimeErrors whose message is one
            line; the run, its dataset or the checkpoint cannot be used.
    """
    from train.checkpoint.whole import load_run

    return load_run(run, step=step, device=device, dtype=dtype, data=data, allow_commands=allow_commands)
