"""Entropies of models of other projects against the attention matrices that transformers itself returns."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from data.errors import DataError
from train.entropy.__main__ import cut, main
from train.entropy.others import attention, whole_causal_mask

transformers = pytest.importorskip("transformers", reason="needs the extra 'transformers'")

VOCAB, T, TEXT = 61, 12, "the quick brown fox jumps over the lazy dog and then sleeps in the sun. " * 6
SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": VOCAB}
LLAMA = {**SIZES, "intermediate_size": 48, "max_position_embeddings": 32, "num_key_value_heads": 4}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT-2": ("GPT2Config", {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 32, "vocab_size": VOCAB}),
    "GPT-2 with scores divided by the layer": (
        "GPT2Config",
        {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 32, "vocab_size": VOCAB,
         "scale_attn_by_inverse_layer_idx": True},
    ),
    "GPT-NeoX": ("GPTNeoXConfig", {**SIZES, "intermediate_size": 48, "max_position_embeddings": 32}),
    "Llama": ("LlamaConfig", LLAMA),
    "Llama with grouped queries": ("LlamaConfig", {**LLAMA, "num_key_value_heads": 2}),
    "Qwen2": ("Qwen2Config", {**LLAMA, "num_key_value_heads": 1}),
    "Qwen3": ("Qwen3Config", {**LLAMA, "num_key_value_heads": 2, "head_dim": 16}),
    "a window as long as the sequence": ("MistralConfig", {**LLAMA, "num_key_value_heads": 2, "sliding_window": T}),
}  # fmt: skip


def save(folder: Path, kind: str, settings: dict[str, Any], **special: int) -> Any:
    """Build a model with random weights and a tokenizer of bytes, and save both as its users do."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(1)
    config = getattr(transformers, kind)(**settings, **special)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)  # so that heads differ, and some look at few tokens
    model.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [piece for piece in alphabet if piece.isascii() and (piece.islower() or piece == ".")] + ["\u0120"]
    tokenizer = Tokenizer(models.BPE({piece: index for index, piece in enumerate(["<s>", *pieces])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(folder)
    return model


def by_definition(model: Any, tokens_ST: torch.Tensor) -> torch.Tensor:
    """Mean over sequences and positions of -sum a ln a, from the whole attention matrices: [L, N].

    Most models compute their softmax in float32 even in float64.
    """
    model = model.double().eval()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        matrices = model(tokens_ST, output_attentions=True).attentions
    return torch.stack([torch.special.entr(a_SNTT).sum(-1).mean((0, 2)) for a_SNTT in matrices])


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


@pytest.mark.parametrize("name", CONFIGS)
def test_entropies_are_those_of_the_attention_matrices(
    name: str, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, settings = CONFIGS[name]
    model = save(tmp_path / "model", kind, settings)
    command = [str(tmp_path / "model"), "--text", str(text), "--seq-length", str(T), "--dtype", "float64", "--json"]
    assert main([*command, "--samples", "5", "--batch-size", "2"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")(TEXT)["input_ids"]
    expected = by_definition(model, torch.tensor(tokens[: 5 * T]).view(5, T))
    torch.testing.assert_close(
        torch.tensor(report["entropy_nats"], dtype=torch.float64), expected, rtol=1e-6, atol=1e-8
    )
    assert report["sequences"] == 5 and report["ceiling_nats"] > expected.max()


@pytest.mark.parametrize("name", CONFIGS)
def test_the_models_output_is_its_own(name: str, tmp_path: Path, text: Path) -> None:
    from train.entropy.others import OtherModel

    kind, settings = CONFIGS[name]
    model = save(tmp_path / "model", kind, settings).double().eval()
    ours = OtherModel(tmp_path / "model")
    ours.load(torch.device("cpu"), torch.float64)
    tokens_BT = torch.randint(VOCAB, (2, T), generator=torch.Generator().manual_seed(0))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model.base_model(tokens_BT).last_hidden_state
        torch.testing.assert_close(ours._model(tokens_BT).last_hidden_state, expected, rtol=1e-6, atol=1e-6)


def test_files_and_the_table_say_the_same(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "model", *CONFIGS["GPT-2"])
    out = tmp_path / "out"
    assert main([str(tmp_path / "model"), "--text", str(text), "--output", str(out)]) == 0
    report, table = json.loads((out / "entropy.json").read_text()), capsys.readouterr().out
    assert report["seq_length"] == 32 and report["sequences"] == len(TEXT) // 32
    assert report["words"] in table and f"{report['ceiling_nats']:.3f} nats" in table
    for layer, heads in enumerate(report["entropy_nats"]):
        row = next(line.split() for line in table.splitlines() if line.split()[:1] == [str(layer)])
        assert row[1:4] == [f"{sum(heads) / 4:.3f}", f"{min(heads):.3f}", f"{max(heads):.3f}"]
    assert sum(report["class_shares"].values()) == pytest.approx(1)
    assert {file.name for file in out.iterdir()} == {"entropy.json", "head_map.png", "head_shares.png"}


def test_sequences_begin_as_the_tokenizer_begins_a_text() -> None:
    assert cut([1, 2, 3, 4, 5, 6, 7], [0], 3, None) == [[0, 1, 2], [0, 3, 4], [0, 5, 6]]
    assert cut([1, 2, 3, 4], [], 2, 1) == [[1, 2]]
    assert cut([1, 2, 3], [], 4, None) == []


def faults(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 2
    return capsys.readouterr().err


def test_what_cannot_be_measured_is_one_line(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, rest = str(tmp_path / "model"), ["--text", str(text)]
    assert "has no config.json; name a folder that transformers' save_pretrained wrote" in faults(
        [folder, *rest], capsys
    )
    save(tmp_path / "model", *CONFIGS["GPT-2"])
    assert "reads at most 32 tokens" in faults([folder, *rest, "--seq-length", "33"], capsys)
    assert "nowhere: cannot be read" in faults([folder, "--text", "nowhere"], capsys)
    (tmp_path / "short.txt").write_text("ab")
    short = ["--text", str(tmp_path / "short.txt"), "--seq-length", "8"]
    assert "short.txt: has 2 tokens, less than a sequence of 8" in faults([folder, *short], capsys)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"damaged")
    assert "transformers cannot load it as a decoder (" in faults([folder, *rest], capsys)
    (tmp_path / "model" / "config.json").write_text('{"config": {"model": {}}}')
    assert "is a run of this project; name it with --run" in faults([folder, *rest], capsys)
    (tmp_path / "model" / "config.json").write_text('{"model_type": "softmax_only"}')
    assert "was written by train.export" in faults([folder, *rest], capsys)


def test_an_encoder_is_refused(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "model", "BertConfig", {**SIZES, "intermediate_size": 48, "max_position_embeddings": 32})
    assert "attends in both directions" in faults([str(tmp_path / "model"), "--text", str(text)], capsys)


def test_what_the_operator_lacks_is_refused(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "window", "MistralConfig", {**LLAMA, "sliding_window": T - 1})
    arguments = [str(tmp_path / "window"), "--text", str(text), "--seq-length", str(T)]
    assert f"choose --seq-length {T - 1} or less" in faults(arguments, capsys)
    q, module = torch.zeros(1, 2, 3, 4), torch.nn.Identity()
    for others in ({"softcap": 30.0}, {"s_aux": torch.zeros(2)}, {"position_bias": torch.zeros(1)}):
        with pytest.raises(DataError, match="which is not supported"):
            attention(module, q, q, q, None, **others)
    with pytest.raises(DataError, match="masks more than later positions"):
        attention(module, q, q, q, torch.zeros(1, 1, 3, 3))
    assert whole_causal_mask(kv_length=T, local_size=T) is None


def test_without_transformers_the_remedy_is_named(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'entropy-guided-transformer[transformers]'" in faults(
        [str(tmp_path), "--text", str(text)], capsys
    )
