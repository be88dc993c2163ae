"""Files of weights and configurations as the transformers library reads them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.exchange.exported import VOCAB_SIZE, logits, plain, read_json, small
from train.exchange.folder import gpt2_parameters
from train.exchange.hf import MODELING, gpt2_config, hf_config, to_hf
from train.exchange.safetensors_file import INDEX, write_safetensors

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("shard_bytes", [1 << 30, 10_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_are_what_the_library_reads(tmp_path: Path, shard_bytes: int, dtype: torch.dtype) -> None:
    from safetensors.torch import load_file

    tensors = {f"t{size}": torch.randn(size, 40).to(dtype) for size in (1, 70, 100, 3)} | {"scalar": torch.ones(1)}
    assert write_safetensors(tmp_path, tensors.items(), shard_bytes) == 174 * 40 + 1
    files = sorted(tmp_path.glob("*.safetensors"))
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
    if len(files) == 1:
        assert files[0].name == "model.safetensors" and not (tmp_path / INDEX).exists()
        return
    index = read_json(tmp_path / INDEX)
    assert all(name in load_file(tmp_path / file) for name, file in index["weight_map"].items())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize(
    "ingredients",
    [
        {"architecture": "SM+LN+G"},
        {"architecture": "SM+LN+R", "temperature": "per_head", "temperature_init": 0.5},
        {"architecture": "SM+LN", "tied_head": False, "weight_norm": "FFN"},
    ],
)
def test_a_stock_gpt2(tmp_path: Path, ingredients: dict[str, Any]) -> None:
    config, model = small(**ingredients)
    write_safetensors(tmp_path, gpt2_parameters(plain(config, model)), 20_000)
    (tmp_path / "config.json").write_text(json.dumps(gpt2_config(config, VOCAB_SIZE, 1, "float32")))
    tokens = torch.randint(VOCAB_SIZE, (3, 16))
    expected = logits(model, tokens)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded).__name__ == "GPT2LMHeadModel"
    assert (logits(loaded, tokens) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_our_own_network(tmp_path: Path) -> None:
    config, model = small(final_norm=False)
    weights = plain(config, model)
    write_safetensors(tmp_path, to_hf(weights), 10_000)
    (tmp_path / "config.json").write_text(json.dumps(hf_config(weights, VOCAB_SIZE, 1, "float32")))
    source = Path(__file__).parents[3] / "train" / "exchange" / "modeling.py"
    (tmp_path / f"{MODELING}.py").write_text(source.read_text())
    tokens = torch.randint(VOCAB_SIZE, (3, 16))
    expected = logits(model, tokens)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert (logits(loaded, tokens) - expected).abs().max() < 1e-5 * expected.abs().max()
    loaded.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert torch.equal(logits(again, tokens), logits(loaded, tokens))
