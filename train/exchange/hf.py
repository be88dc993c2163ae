"""Write plain or folded parameters under the names of train/exchange/modeling.py."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from model.config import ModelConfig
from train.exchange.fold import FoldedWeights
from train.exchange.gpt2 import unstacked
from train.exchange.plain import PlainWeights

MODELING = "modeling_softmax_only"
"""Name of the copy of train/exchange/modeling.py beside the weights."""
_FFN_NAMES = {"none": (), "matrix": ("matrix.weight",), "fused": ("fused.weight", "beta"),
              "two matrices": ("up.weight", "down.weight", "beta")}  # fmt: skip
_FFN_BIASES = {"none": {}, "matrix": {"matrix.bias": "bias"}, "fused": {"fused.bias": "bias"},
               "two matrices": {"up.bias": "up_bias", "down.bias": "bias"}}  # fmt: skip
"""Names in `SoftmaxOnlyForCausalLM` -> ours, of a model with all biases."""
_GPT2_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu", "identity": "linear"}


def to_hf(weights: PlainWeights | FoldedWeights) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter by its name in `SoftmaxOnlyForCausalLM`; a tied head is left out."""
    model = weights.model
    body = "transformer."
    yield f"{body}embedding.word.weight", weights.read("embedding.word.weight")
    if model.positions == "learned":
        yield f"{body}embedding.position.weight", weights.read("embedding.position.weight")
    for layer, kind in enumerate(weights.ffn_kinds):
        for name, tensor in _attention(weights, f"layers.{layer}."):
            yield f"{body}layers.{layer}.{name}", tensor
        for name in _FFN_NAMES[kind]:
            yield f"{body}layers.{layer}.ffn.{name}", weights.read(f"layers.{layer}.ffn.{name}")
        for theirs, ours in _FFN_BIASES[kind].items() if model.biases == "all" else ():
            yield f"{body}layers.{layer}.ffn.{theirs}", weights.read(f"layers.{layer}.ffn.{ours}")
        if model.norm == "layernorm":
            for name in ("weight", "bias"):
                yield f"{body}layers.{layer}.ffn.norm.{name}", weights.read(f"layers.{layer}.ffn_norm.{name}")
    if model.final_norm:
        for name in ("weight", "bias"):
            yield f"{body}final_norm.{name}", weights.read(f"head.norm.{name}")
    if not weights.is_tied:
        yield "lm_head.weight", weights.read("head.weight")


def _attention(weights: PlainWeights | FoldedWeights, here: str) -> Iterator[tuple[str, Tensor]]:
    if weights.model.norm == "layernorm":
        for name in ("attention_norm.weight", "attention_norm.bias"):
            yield name, weights.read(here + name)
    stacked = weights.read(f"{here}attention.query_key_value.weight")
    for name, matrix in zip(
        ("query", "key", "value"), unstacked(stacked, weights.model.num_attention_heads), strict=True
    ):
        yield f"attention.{name}.weight", matrix.contiguous()
    for name in ("query", "key"):
        yield f"attention.{name}.bias", weights.read(f"{here}attention.{name}_bias").flatten()
    yield "attention.output.weight", weights.read(f"{here}attention.output.weight")
    if weights.model.biases == "all":
        yield "attention.output.bias", weights.read(f"{here}attention.output_bias")
    if weights.temperature != "none":
        temperature = weights.read(f"{here}attention.temperature")  # [N] or [N, T]
        yield "attention.temperature", temperature.view(len(temperature), -1).T.contiguous()


def hf_config(
    weights: PlainWeights | FoldedWeights, vocab_size: int, end_of_document: int, dtype: str
) -> dict[str, Any]:
    """Return config.json for transformers.

    Args:
        vocab_size: tokens of the tokenizer.
        end_of_document: id of the token that ends and begins a text.
        dtype: "float32" or "bfloat16".
    """
    model = weights.model
    return {
        "architectures": ["SoftmaxOnlyForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{MODELING}.SoftmaxOnlyConfig",
            "AutoModelForCausalLM": f"{MODELING}.SoftmaxOnlyForCausalLM",
        },
        "model_type": "softmax_only",
        "architecture": model.architecture,
        "activation": model.activation,
        "biases": model.biases,
        "ffn": list(weights.ffn_kinds),
        "final_norm": model.final_norm,
        "intermediate_size": model.ffn_width,
        "norm": model.norm,
        "num_hidden_layers": model.num_layers,
        "positions": model.positions,
        "softmax_temperature": weights.temperature,
        **_sizes(model, vocab_size, end_of_document, dtype, weights.is_tied),
    }


def gpt2_config(model: ModelConfig, vocab_size: int, end_of_document: int, dtype: str) -> dict[str, Any]:
    """Return config.json of a stock GPT-2; arguments as of `hf_config`."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": _GPT2_ACTIVATIONS[model.activation or "identity"],
        "n_inner": model.ffn_width,
        "n_layer": model.num_layers,
        "layer_norm_epsilon": 1e-5,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
        **_sizes(model, vocab_size, end_of_document, dtype, model.tied_head, gpt2=True),
    }


def _sizes(
    model: ModelConfig, vocab_size: int, end_of_document: int, dtype: str, is_tied: bool, gpt2: bool = False
) -> dict[str, Any]:
    names = (
        ("n_embd", "n_head", "n_positions")
        if gpt2
        else ("hidden_size", "num_attention_heads", "max_position_embeddings")
    )
    sizes = dict(zip(names, (model.hidden_size, model.num_attention_heads, model.seq_length), strict=True))
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end_of_document)
    return {**sizes, "vocab_size": vocab_size, "dtype": dtype, "tie_word_embeddings": is_tied, **ends}
