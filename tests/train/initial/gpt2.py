"""A GPT-2 folder as the transformers library writes it, made without that library."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LAYERS, WIDTH, HEADS, INNER = 2, 32, 4, 64


def gpt2_tensors(vocab_size: int, positions: int, prefix: str = "transformer.") -> dict[str, Tensor]:
    """Return random parameters, with attention-mask buffers that are none, as older versions saved."""
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (vocab_size, WIDTH), "wpe.weight": (positions, WIDTH)}
    for layer in range(LAYERS):
        shapes |= {
            f"h.{layer}.{name}": shape
            for name, shape in {
                "ln_1.weight": (WIDTH,), "ln_1.bias": (WIDTH,), "ln_2.weight": (WIDTH,), "ln_2.bias": (WIDTH,),
                "attn.c_attn.weight": (WIDTH, 3 * WIDTH), "attn.c_attn.bias": (3 * WIDTH,),
                "attn.c_proj.weight": (WIDTH, WIDTH), "attn.c_proj.bias": (WIDTH,),
                "mlp.c_fc.weight": (WIDTH, INNER), "mlp.c_fc.bias": (INNER,),
                "mlp.c_proj.weight": (INNER, WIDTH), "mlp.c_proj.bias": (WIDTH,),
            }.items()
        }  # fmt: skip
    shapes |= {"ln_f.weight": (WIDTH,), "ln_f.bias": (WIDTH,)}
    noise = torch.Generator().manual_seed(3)
    tensors = {}
    for name, shape in shapes.items():
        is_gain = "ln_" in name and name.endswith("weight")
        tensors[prefix + name] = 0.2 * torch.randn(shape, generator=noise) + (1.0 if is_gain else 0.0)
    for layer in range(LAYERS):
        tensors[f"{prefix}h.{layer}.attn.bias"] = torch.tril(torch.ones(1, 1, positions, positions))
        tensors[f"{prefix}h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    return tensors


def write_gpt2(
    folder: Path, vocabulary: int, positions: int, *, prefix: str = "transformer.", files: int = 1, **described: Any
) -> dict[str, Tensor]:
    """Write a GPT-2's folder and return its tensors; `described` changes keys of config.json."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"n_layer": LAYERS, "n_embd": WIDTH, "n_head": HEADS, "n_inner": INNER}
    config = {"model_type": "gpt2", **sizes, "n_positions": positions, "vocab_size": vocabulary}
    (folder / "config.json").write_text(json.dumps({**config, "activation_function": "gelu_new", **described}))
    tensors = gpt2_tensors(vocabulary, positions, prefix)
    if files == 1:
        save_file(tensors, folder / "model.safetensors")
        return tensors
    names, place = sorted(tensors), {}
    for number in range(files):
        file = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        part = {name: tensors[name] for name in names[number::files]}
        save_file(part, folder / file)
        place |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
    return tensors
