"""Attention entropies of models of the transformers library.

The library lets a model's attention be replaced by name. Here it becomes this project's operator, which returns the
same output and each row's entropy, without a T x T matrix. It leaves each head's mean on the attention module.

Tensor names carry their shape: B sequences, N heads, K key heads, T tokens, H head width.
"""

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.errors import DataError, first_line
from data.files.strict_json import read_json
from model.entropy_attention import entropy_attention
from train.run.names import CONFIG

ATTENTION = "attention with entropies"
USUAL_LENGTH, MOST_TOKENS = 1024, 1 << 20
OPTIONS = {"local_files_only": True, "trust_remote_code": False}
NOT_SUPPORTED = {
    "softcap": "bounds its scores (softcap)",
    "s_aux": "adds sinks to its softmax",
    "position_bias": "adds a bias of positions to its scores",
}
"""What an attention may be given that the operator lacks, and what that does."""


class OtherModel:
    """A decoder of the transformers library, in a folder of this machine. No weights are read before `load`.

    No code that lies in the folder is run.

    Args:
        folder: where `save_pretrained` wrote the model and its tokenizer.

    Attributes:
        name: for the report.
        longest: the most tokens that a sequence may have.
        usual_length: tokens of a sequence if nothing else is asked for.

    Raises:
        DataError: transformers is missing, or the folder holds no model and tokenizer that it knows.
    """

    def __init__(self, folder: Path) -> None:
        check_folder(folder)
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.name, self._folder = str(folder), folder
        with _one_line(folder):
            config = transformers.AutoConfig.from_pretrained(folder, **OPTIONS).get_text_config()
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **OPTIONS)
        self._model: nn.Module | None = None
        positions = getattr(config, "max_position_embeddings", None)
        self.longest: int = positions or MOST_TOKENS
        self.usual_length = min(self.longest, USUAL_LENGTH)

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Read the weights.

        Raises:
            DataError: the folder holds no decoder.
        """
        from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM

        AttentionInterface.register(ATTENTION, attention)
        AttentionMaskInterface.register(ATTENTION, whole_causal_mask)
        with _one_line(self._folder):
            whole = AutoModelForCausalLM.from_pretrained(
                self._folder, **OPTIONS, attn_implementation=ATTENTION, dtype=dtype
            )
        self._model = whole.base_model.to(device).eval()  # without the head, whose logits nobody needs

    def encode(self, text: str) -> tuple[list[int], list[int]]:
        """Return the tokens of a text, and those that the model's tokenizer puts before every text."""
        tokens = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        begin = self._tokenizer.bos_token_id
        begins = self._tokenizer("a")["input_ids"][:1] == [begin]
        return tokens, [begin] if begins and begin is not None else []

    def head_entropies(self, tokens_BT: Tensor) -> list[Tensor]:
        """Run whole sequences; return each attention's mean entropies over positions in nats, [B, N].

        Raises:
            DataError: an attention is none that can be measured.
        """
        assert self._model is not None, "load it first"
        self._model(input_ids=tokens_BT, use_cache=False)
        attentions = [module for module in self._model.modules() if hasattr(module, "mean_entropy_BN")]
        found: list[Tensor] = [module.__dict__.pop("mean_entropy_BN") for module in attentions]
        if not found:
            raise DataError(f"{self.name}: its attention does not go through transformers' attention interface")
        if len({entropy_BN.shape for entropy_BN in found}) > 1:
            raise DataError(f"{self.name}: its layers have different numbers of heads, which no head map can show")
        return found


@contextlib.contextmanager
def _one_line(folder: Path) -> Iterator[None]:
    """Turn what transformers and its many parsers raise about a folder into one line."""
    try:
        yield
    except Exception as error:
        raise DataError(f"{folder}: transformers cannot load it as a decoder ({first_line(error)})") from None


def check_folder(folder: Path) -> None:
    """Check that transformers is installed and a folder looks like one of its models.

    Raises:
        DataError: says what is missing and what to do.
    """
    if importlib.util.find_spec("transformers") is None:
        raise DataError(
            "models of other projects need the transformers library; install it: "
            "pip install 'entropy-guided-transformer[transformers]'"
        )
    try:
        config = read_json(folder / CONFIG)
    except FileNotFoundError:
        raise DataError(
            f"{folder}: has no {CONFIG}; name a folder that transformers' save_pretrained wrote, or a run with --run"
        ) from None
    except OSError as error:
        raise DataError(f"{folder / CONFIG}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise DataError(f"{folder / CONFIG}: damaged, {error}; restore it") from None
    if isinstance(config, dict) and "model_type" not in config and isinstance(config.get("config"), dict):
        raise DataError(f"{folder}: is a run of this project; name it with --run")
    if isinstance(config, dict) and config.get("model_type") == "softmax_only":
        raise DataError(
            f"{folder}: was written by train.export, with code that is not run here; name its run with --run"
        )


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Compute causal attention as transformers' attention interface defines it; leave `mean_entropy_BN` on the module.

    Args:
        query: [B, N, T, H].
        key, value: [B, K, T, H].
        attention_mask: None, since whole sequences are run.
        others: what is given to any attention.

    Returns:
        The output, [B, T, N, H], and no weights.

    Raises:
        DataError: the attention is not causal, or has parts that the operator lacks.
    """
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise DataError(f"{type(module).__name__} attends in both directions: it is an encoder's; name a decoder")
    for name, what in NOT_SUPPORTED.items():
        if others.get(name) is not None:
            raise DataError(f"{type(module).__name__} {what}, which is not supported")
    if attention_mask is not None:
        raise DataError(f"{type(module).__name__} masks more than later positions, which is not supported")
    try:
        output_BNTH, entropy_BNT = entropy_attention(query, key, value, scale=scaling)
    except ValueError as error:
        raise DataError(f"{type(module).__name__}: {error}") from None
    assert entropy_BNT is not None
    module.mean_entropy_BN = entropy_BNT.mean(-1)  # type: ignore[assignment]
    return output_BNTH.transpose(1, 2).contiguous(), None


def whole_causal_mask(kv_length: int, local_size: int | None = None, **others: Any) -> None:
    """Return no mask, as transformers' mask interface defines it; the attention is causal by itself.

    Args:
        kv_length: T.
        local_size: window or chunk of the layers that ask for the mask.
        others: what is given to any mask.

    Raises:
        DataError: the layers see only a part of the sequence. Their heads' ceiling is not ln(T!)/T.
    """
    if local_size is not None and local_size < kv_length:
        raise DataError(
            f"some layers see {local_size} tokens at most (a sliding window or chunk), so heads of {kv_length} have "
            f"no common ceiling; choose --seq-length {local_size} or less"
        )
