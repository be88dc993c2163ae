"""Small models with random parameters, and the networks that are exported of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.config import ModelConfig
from model.initialize import named_parameters
from model.taper import set_gate, taper_norms
from model.transformer import Transformer
from train.exchange.fold import FoldedWeights
from train.exchange.hf import hf_config, to_hf
from train.exchange.plain import PlainWeights

VOCAB_SIZE = 50


def small(**ingredients: Any) -> tuple[ModelConfig, Transformer]:
    """Return a model whose norms, biases, scales and temperatures are random too."""
    sizes = {"num_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16, "ffn_hidden_size": 48}
    config = ModelConfig(**{**sizes, **ingredients}).resolved()
    torch.manual_seed(0)
    model = Transformer(config, VOCAB_SIZE, seed=0)
    with torch.no_grad():
        for name, parameter in named_parameters(model):
            if "temperature" in name and config.temperature_form == "raw":
                parameter *= 0.5 + torch.rand_like(parameter)
            else:
                parameter += 0.1 * torch.randn_like(parameter)
        for norm in taper_norms(model):
            norm.scale.fill_(0.7)
    set_gate(taper_norms(model), 0.0)
    return config, model


def plain(config: ModelConfig, model: Transformer, dtype: torch.dtype = torch.float32) -> PlainWeights:
    """Return the plain weights of a model in memory."""
    saved = {name: parameter.detach() for name, parameter in named_parameters(model)}
    saved |= {
        f"{kind}.{name}": buffer for name, buffer in model.named_buffers() for kind in ("buffer", "buffer.tp0of1")
    }
    return PlainWeights(config, lambda name: saved[name].to(dtype), saved)


def network(weights: PlainWeights | FoldedWeights) -> Any:
    """Return the network that transformers would load."""
    from train.exchange.modeling import SoftmaxOnlyConfig, SoftmaxOnlyForCausalLM

    parameters = dict(to_hf(weights))
    config = hf_config(weights, VOCAB_SIZE, 1, "float32")
    for key in ("auto_map", "model_type", "architectures", "dtype"):
        del config[key]
    exported = SoftmaxOnlyForCausalLM(SoftmaxOnlyConfig(**config)).to(next(iter(parameters.values())).dtype).eval()
    missing, unexpected = exported.load_state_dict(parameters, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    exported.tie_weights()
    return exported


@torch.no_grad()
def logits(of: Callable[[Tensor], Any], tokens_BT: Tensor) -> Tensor:
    """Return the logits [B, T, V] of our model or an exported one."""
    if isinstance(of, Transformer):
        return of(tokens_BT.T)[0].transpose(0, 1)
    return of(tokens_BT).logits


def read_json(file: Path) -> Any:
    return json.loads(file.read_text())
