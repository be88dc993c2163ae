"""Read a GPT-2 from a folder as the transformers library writes it: config.json and safetensors files.

    config.json                      sizes, activation
    model.safetensors                every parameter; or, in several files:
    model.safetensors.index.json     "weight_map": which file holds which parameter

Names may have GPT2LMHeadModel's "transformer." before them or not. The buffers of attention masks that older versions
saved are no parameters. Pickled weights (pytorch_model.bin) are never read: a pickle may run any program.
"""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.errors import first_line
from data.files.own import open_to_read
from data.files.strict_json import check_shape, read_json
from model.config import ModelConfig
from model.transformer import global_shapes
from train.checkpoint.root import CheckpointError
from train.config.sections import LARGEST_VOCABULARY
from train.exchange.gpt2 import BODY, UNTIED_HEAD, from_gpt2, to_gpt2
from train.exchange.safetensors_file import INDEX
from train.initial.source import Source
from train.run.names import CONFIG

WEIGHTS = "model.safetensors"
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "linear": "identity",
}
"""GPT-2's word for an activation -> ours."""
SHAPE = {
    "n_layer": int,
    "n_embd": int,
    "n_head": int,
    "vocab_size": int,
    "n_positions?": int,
    "n_ctx?": int,
    "n_inner?": (int, type(None)),
    "activation_function?": str,
    "tie_word_embeddings?": bool,
    "layer_norm_epsilon?": float,
}
FIXED = {
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
"""Keys of config.json that our model has one value for, which is also GPT-2's default."""
PIECE_BYTES = 1 << 24
_MASK = re.compile(r"h\.\d+\.attn\.(masked_)?bias")


def is_gpt2_folder(folder: Path) -> bool:
    """Return whether a folder holds a config.json of a GPT-2 in the transformers library's form.

    Raises:
        CheckpointError: it is that of another model.
    """
    try:
        described = read_json(folder / CONFIG)
    except (OSError, ValueError):
        return False
    if not isinstance(described, dict):
        return False
    kind = described.get("model_type", "gpt2" if "n_embd" in described else None)
    if kind not in (None, "gpt2"):
        raise CheckpointError(
            f"{folder}: holds a model of type {kind!s:.40}, and only GPT-2s and runs are read; if train.export wrote "
            "it, name its run"
        )
    return kind is not None


def read_gpt2_folder(folder: Path) -> Source:
    """Read a GPT-2.

    Raises:
        CheckpointError: a file is missing or damaged, or the model is none that ours can compute.
    """
    model, vocab_size = _model(folder)
    files = _files(folder)
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors.update(_tensors(folder / file))
    head = tensors.pop(UNTIED_HEAD[1], None)
    if not model.tied_head:
        tensors[UNTIED_HEAD[1]] = tensors["wte.weight"] if head is None else head

    def read(name: str) -> Tensor:
        return tensors[name.removeprefix(BODY)].float()

    left_out = _check_tensors(folder, model, vocab_size, tensors)
    weights = dict(from_gpt2(model, read))
    return Source(str(folder), "GPT-2", _digest(folder, [CONFIG, *files]), model, weights, left_out=left_out)


def _model(folder: Path) -> tuple[ModelConfig, int]:
    """Return the model that config.json describes, and its vocabulary size."""
    file = folder / CONFIG
    try:
        described: dict[str, Any] = read_json(file)
        check_shape(described, SHAPE)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: {first_line(error)}; name the folder of a GPT-2") from None
    for key, value in FIXED.items():
        if described.get(key, value) != value:
            raise CheckpointError(f"{file}: {key} is {described[key]!r}, and this model computes {value!r} only")
    activation = described.get("activation_function", "gelu_new")
    if activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise CheckpointError(f"{file}: activation_function is {activation!r}; known ones: {known}")
    model = ModelConfig(
        architecture="SM+LN+G",
        num_layers=described["n_layer"],
        hidden_size=described["n_embd"],
        num_attention_heads=described["n_head"],
        seq_length=described.get("n_positions", described.get("n_ctx", 1024)),
        ffn_hidden_size=described.get("n_inner"),
        activation=ACTIVATIONS[activation],  # type: ignore[arg-type]
        biases="all",
        tied_head=described.get("tie_word_embeddings", True),
    )
    if not 1 <= described["vocab_size"] <= LARGEST_VOCABULARY:
        raise CheckpointError(f"{file}: vocab_size is {described['vocab_size']}, expected 1 to {LARGEST_VOCABULARY:,}")
    if faults := model.faults():
        raise CheckpointError(f"{file}: {'; '.join(faults)}")
    return model.resolved(), described["vocab_size"]


def _files(folder: Path) -> list[str]:
    """Return the names of the files that hold the weights."""
    if not (folder / INDEX).exists():
        if not (folder / WEIGHTS).exists():
            raise CheckpointError(
                f"{folder}: holds neither {WEIGHTS} nor {INDEX}; save the model with safetensors, say by "
                "save_pretrained(safe_serialization=True)"
            )
        return [WEIGHTS]
    try:
        index = read_json(folder / INDEX)
        check_shape(index, {"weight_map": dict})
        files = sorted(set(index["weight_map"].values()))
        if not all(isinstance(file, str) and "/" not in file for file in files):
            raise ValueError("weight_map names something that is no file in this folder")
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder / INDEX}: {first_line(error)}; restore the file") from None
    return [INDEX, *files]


def _tensors(file: Path) -> dict[str, Tensor]:
    """Return the parameters of one file by their name without "transformer."; none for the index."""
    if file.name == INDEX:
        return {}
    try:
        import safetensors
    except ImportError:
        raise CheckpointError("reading a GPT-2 needs the package safetensors; pip install safetensors") from None
    try:
        with safetensors.safe_open(str(file), framework="pt") as opened:
            names = {name.removeprefix(BODY): name for name in opened.keys()}  # noqa: SIM118
            return {short: opened.get_tensor(name) for short, name in names.items() if not _MASK.fullmatch(short)}
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{file}: cannot be read ({first_line(error)}); copy it anew") from None


def _check_tensors(folder: Path, model: ModelConfig, vocab_size: int, tensors: dict[str, Tensor]) -> tuple[str, ...]:
    """Check that every parameter is there in the shape that config.json says; return the names of others."""
    last = f"h.{model.num_layers - 1}.ln_1.weight"
    if last not in tensors:  # before the table of shapes is made, which takes long for a wrong number of layers
        raise CheckpointError(f"{folder}: lacks {last}, and {CONFIG} says {model.num_layers} layers; copy both anew")
    shapes = global_shapes(model, vocab_size)
    empty: Callable[[str], Tensor] = lambda name: torch.empty(shapes[name], device="meta")  # noqa: E731
    expected = {name.removeprefix(BODY): tuple(tensor.shape) for name, tensor in to_gpt2(model, empty)}
    missing = [name for name in expected if name not in tensors]
    wrong = [name for name in expected if name in tensors and tuple(tensors[name].shape) != expected[name]]
    if missing:
        raise CheckpointError(f"{folder}: lacks {len(missing)} parameters, first {missing[0]}; copy it anew")
    if wrong:
        name = wrong[0]
        raise CheckpointError(
            f"{folder}: {name} has shape {list(tensors[name].shape)}, and {CONFIG} says {list(expected[name])} "
            f"({len(wrong)} such parameters); copy both from one model"
        )
    return tuple(sorted(tensors.keys() - expected.keys()))


def _digest(folder: Path, files: list[str]) -> str:
    """Return a digest of the names and contents of files."""
    lines = []
    for name in files:
        digest = hashlib.sha256()
        with open_to_read(folder / name) as file:
            while piece := file.read(PIECE_BYTES):
                digest.update(piece)
        lines.append(f"{digest.hexdigest()}  {name}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()
