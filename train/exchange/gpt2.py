"""Map parameters to GPT-2's names and layout in the transformers library, and back.

Ours (model/transformer.py) on the left, GPT-2's on the right; `h.0` stands for every layer:

    embedding.word.weight                       [V, D]      wte.weight              [V, D]
    embedding.position.weight                   [T, D]      wpe.weight              [T, D]
    layers.0.attention_norm.weight, bias        [D]         h.0.ln_1.weight, bias   [D]
    layers.0.attention.query_key_value.weight   [N 3 H, D]  h.0.attn.c_attn.weight  [D, 3 N H]
    layers.0.attention.query_bias, key_bias     [N, H]      h.0.attn.c_attn.bias    [3 N H]
    layers.0.attention.output.weight            [D, N H]    h.0.attn.c_proj.weight  [N H, D]
    layers.0.ffn_norm.weight, bias              [D]         h.0.ln_2.weight, bias   [D]
    layers.0.ffn.up.weight                      [F, D]      h.0.mlp.c_fc.weight     [D, F]
    layers.0.ffn.down.weight                    [D, F]      h.0.mlp.c_proj.weight   [F, D]
    head.norm.weight, bias                      [D]         ln_f.weight, bias       [D]
    head.weight, if the head is not tied        [V, D]      lm_head.weight          [V, D]

    with model.biases = 'all':
    layers.0.attention.output_bias              [D]         h.0.attn.c_proj.bias    [D]
    layers.0.ffn.up_bias                        [F]         h.0.mlp.c_fc.bias       [F]
    layers.0.ffn.bias                           [D]         h.0.mlp.c_proj.bias     [D]

GPT-2 stores matrices transposed. Its c_attn holds all queries, then all keys, then all values. Ours holds query, key
and value of one head, then of the next. A value's bias b adds W_o b to every position, since a row's weights sum to 1:
`from_gpt2` adds that to the output's bias, and `to_gpt2` writes zeros. Without 'all', `to_gpt2` writes zeros for every
other bias, and `without_place` yields them to whoever reads a GPT-2.

Both directions take a function that reads one parameter and yield one at a time, so a large model needs little memory.
Our parameters are plain here: normalized weights are already normalized, and there are no temperatures, alpha or beta.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from model.config import ModelConfig

Read = Callable[[str], Tensor]
"""Returns the parameter of that name."""
BODY = "transformer."
"""GPT2LMHeadModel puts this before every name but lm_head.weight; GPT2Model does not."""
UNTIED_HEAD = ("head.weight", "lm_head.weight")

_ENDS = {
    "embedding.word.weight": "wte.weight",
    "embedding.position.weight": "wpe.weight",
    "head.norm.weight": "ln_f.weight",
    "head.norm.bias": "ln_f.bias",
}
_NORMS = {
    "attention_norm.weight": "ln_1.weight",
    "attention_norm.bias": "ln_1.bias",
    "ffn_norm.weight": "ln_2.weight",
    "ffn_norm.bias": "ln_2.bias",
}
_TRANSPOSED = {
    "attention.output.weight": "attn.c_proj.weight",
    "ffn.up.weight": "mlp.c_fc.weight",
    "ffn.down.weight": "mlp.c_proj.weight",
}
_QKV, _QUERY_BIAS, _KEY_BIAS = (f"attention.{name}" for name in ("query_key_value.weight", "query_bias", "key_bias"))
_THEIR_QKV, _THEIR_QKV_BIAS = "attn.c_attn.weight", "attn.c_attn.bias"
_BIASES = {
    "attention.output_bias": "attn.c_proj.bias",
    "ffn.up_bias": "mlp.c_fc.bias",
    "ffn.bias": "mlp.c_proj.bias",
}


def to_gpt2(model: ModelConfig, read: Read) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter of GPT-2 by its name in GPT2LMHeadModel, made from ours.

    Args:
        model: resolved; of a shape that GPT-2 has (`reasons_against`).
        read: returns one of our parameters, plain.
    """
    for ours, theirs in _ENDS.items():
        yield BODY + theirs, read(ours)
    for layer in range(model.num_layers):
        here, there = f"layers.{layer}.", f"{BODY}h.{layer}."
        for ours, theirs in _NORMS.items():
            yield there + theirs, read(here + ours)
        qkv = unstacked(read(here + _QKV), model.num_attention_heads)
        yield there + _THEIR_QKV, torch.cat(qkv).T.contiguous()
        query = read(here + _QUERY_BIAS).flatten()
        yield there + _THEIR_QKV_BIAS, torch.cat([query, read(here + _KEY_BIAS).flatten(), torch.zeros_like(query)])
        for ours, theirs in _TRANSPOSED.items():
            yield there + theirs, read(here + ours).T.contiguous()
        for ours, theirs in _BIASES.items():
            size = model.ffn_width if ours == "ffn.up_bias" else model.hidden_size
            has_place = model.biases == "all"
            yield there + theirs, read(here + ours) if has_place else torch.zeros(size, dtype=query.dtype)
    if not model.tied_head:
        yield UNTIED_HEAD[1], read(UNTIED_HEAD[0])


def from_gpt2(model: ModelConfig, read: Read) -> Iterator[tuple[str, Tensor]]:
    """Yield every one of our parameters that GPT-2 has, by our name.

    Args:
        model: resolved; the sizes must be those of the GPT-2.
        read: returns a parameter by its name in GPT2LMHeadModel.
    """
    for ours, theirs in _ENDS.items():
        yield ours, read(BODY + theirs)
    heads = model.num_attention_heads
    for layer in range(model.num_layers):
        here, there = f"layers.{layer}.", f"{BODY}h.{layer}."
        for ours, theirs in _NORMS.items():
            yield here + ours, read(there + theirs)
        yield here + _QKV, stacked(read(there + _THEIR_QKV).T.chunk(3), heads)
        query, key, value = read(there + _THEIR_QKV_BIAS).chunk(3)
        yield here + _QUERY_BIAS, query.view(heads, -1)
        yield here + _KEY_BIAS, key.view(heads, -1)
        for ours, theirs in _TRANSPOSED.items():
            yield here + ours, read(there + theirs).T.contiguous()
        for ours, theirs in _BIASES.items() if model.biases == "all" else ():
            bias = read(there + theirs)
            if ours == "attention.output_bias":
                bias = bias + value @ read(there + _TRANSPOSED["attention.output.weight"])
            yield here + ours, bias
    if not model.tied_head:
        yield UNTIED_HEAD[0], read(UNTIED_HEAD[1])


def without_place(model: ModelConfig, read: Read) -> Iterator[tuple[str, Tensor]]:
    """Yield the biases of a GPT-2 that our model lacks, by their name there; of c_attn.bias only the values' part."""
    for layer in range(model.num_layers if model.biases != "all" else 0):
        there = f"{BODY}h.{layer}."
        yield there + _THEIR_QKV_BIAS, read(there + _THEIR_QKV_BIAS).chunk(3)[2]
        yield from ((there + theirs, read(there + theirs)) for theirs in _BIASES.values())


def reasons_against(model: ModelConfig) -> list[str]:
    """Return why a resolved model is no GPT-2, one reason each; none if it is one.

    A temperature per head and alpha fold into plain weights, so neither is a reason.
    """
    wrong = {
        f"model.norm = {model.norm!r}": model.norm != "layernorm",
        "model.final_norm = false": not model.final_norm,
        "model.positions = 'rotary'": model.positions != "learned",
        "model.fused_ffn = true": bool(model.fused_ffn),
        "model.scaled_ffn = true": bool(model.scaled_ffn),
        "model.temperature = 'per_position'": model.temperature == "per_position",
    }
    return [reason for reason, holds in wrong.items() if holds]


def unstacked(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values of all heads, each [N H, D], of our stacked matrix [N 3 H, D]."""
    heads = qkv.view(num_heads, 3, -1, qkv.shape[-1])
    query, key, value = (heads[:, slot].flatten(0, 1) for slot in range(3))
    return query, key, value


def stacked(parts: Sequence[Tensor], num_heads: int) -> Tensor:
    """Return our stacked matrix [N 3 H, D] of the queries, keys and values of all heads, each [N H, D]."""
    by_head = [part.reshape(num_heads, -1, part.shape[-1]) for part in parts]
    return torch.stack(by_head, dim=1).flatten(0, 2)
