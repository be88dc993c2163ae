"""Folders of a GPT-2: the transformers library must compute the same logits, and damage gets one clear line."""

from pathlib import Path
from typing import Any

import pytest
import torch

from model.initialize import named_parameters
from model.transformer import Transformer
from tests.train.initial.gpt2 import write_gpt2
from train.checkpoint.root import CheckpointError
from train.initial.weights import read_source

pytest.importorskip("safetensors")
VOCAB_SIZE, POSITIONS = 61, 16


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"prefix": "", "files": 3},
        {"activation_function": "relu"},
        {"activation_function": "gelu", "tie_word_embeddings": False},
    ],
)
def test_transformers_computes_the_same_logits(tmp_path: Path, form: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    write_gpt2(tmp_path, VOCAB_SIZE, POSITIONS, **form)
    source = read_source(str(tmp_path))
    assert source.left_out == () and source.model.biases == "all"
    ours = Transformer(source.model, VOCAB_SIZE)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(str(tmp_path)).eval()
    if form.get("tie_word_embeddings") is False:  # the folder has no head, and transformers draws one
        theirs.lm_head.weight.data.copy_(theirs.transformer.wte.weight.data)
    tokens = torch.randint(VOCAB_SIZE, (3, POSITIONS), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, parameter in named_parameters(ours):
            parameter.copy_(source.weights[name])
        expected = theirs(tokens).logits
        assert (ours(tokens.T)[0].transpose(0, 1) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_the_digest_is_of_the_weights(tmp_path: Path) -> None:
    write_gpt2(tmp_path, VOCAB_SIZE, POSITIONS)
    before = read_source(str(tmp_path)).sha256
    assert read_source(str(tmp_path)).sha256 == before
    content = bytearray((tmp_path / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(content)
    assert read_source(str(tmp_path)).sha256 != before


def test_what_cannot_be_read(tmp_path: Path) -> None:
    def fault(name: str, **described: Any) -> str:
        folder = tmp_path / name
        write_gpt2(folder, VOCAB_SIZE, POSITIONS, **described)
        if name == "cut":
            (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9])
        if name == "pickled":
            (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        with pytest.raises(CheckpointError) as error:
            read_source(str(folder))
        assert "\n" not in str(error.value) and str(folder) in str(error.value)
        return str(error.value)

    assert "activation_function is 'silu'; known ones: gelu, gelu_new" in fault("a", activation_function="silu")
    assert "scale_attn_by_inverse_layer_idx is True" in fault("b", scale_attn_by_inverse_layer_idx=True)
    assert "lacks h.2.ln_1.weight, and config.json says 3 layers" in fault("c", n_layer=3)
    assert "vocab_size is 0" in fault("v", vocab_size=0)
    assert "h.0.mlp.c_fc.weight has shape [32, 64], and config.json says [32, 48]" in fault("d", n_inner=48)
    assert "model.safetensors: cannot be read" in fault("cut")
    assert "holds neither model.safetensors nor" in fault("pickled")
    assert 'n_embd is "wide", expected a whole number' in fault("e", n_embd="wide")
    with pytest.raises(CheckpointError, match="holds neither a GPT-2"):
        read_source(str(tmp_path / "nothing"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "softmax_only"}')
    with pytest.raises(CheckpointError, match=r"a model of type softmax_only.*name its run"):
        read_source(str(tmp_path / "other"))
