"""Write the folder of an exported model: weights, configuration, tokenizer, model card, the network's Python file."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.files.own import write_atomically
from data.files.strict_json import to_json
from data.shards.tokenizer import Tokenizer
from model.config import ModelConfig
from train.exchange import fold, gpt2
from train.exchange.card import write_card
from train.exchange.fold import FoldedWeights, Folding, WithoutHeadTemperatures
from train.exchange.hf import MODELING, gpt2_config, hf_config, to_hf
from train.exchange.plain import PlainWeights
from train.exchange.safetensors_file import write_safetensors
from train.exchange.source import TrainedModel
from train.exchange.tokenizer_json import tokenizer_config, tokenizer_json
from train.private_inference import private_inference_cost
from train.run.names import CONFIG
from train.run.reader import RunError

LARGEST_CONDITIONS = {"float32": 1e3, "bfloat16": 100.0}
"""Of a basis, unless the user says otherwise. docs/notes/folding.md measures the errors that follow."""


@dataclass(frozen=True)
class Form:
    """What an exported model looks like.

    Attributes:
        format: "hf" or "gpt2".
        dtype: "float32" or "bfloat16", of the weights.
        fold: whether linear FFNs are folded away.
        largest_condition: of a basis of a folded network; None for the default of the dtype.
    """

    format: str = "hf"
    dtype: str = "float32"
    fold: bool = False
    largest_condition: float | None = None

    def check(self, model: ModelConfig) -> None:
        """Raise RunError if a resolved model cannot have this form."""
        if self.format == "gpt2" and (reasons := gpt2.reasons_against(model)):
            raise RunError(f"--format gpt2: no GPT-2 has {', '.join(reasons)}; choose --format hf")
        if self.fold and (reasons := fold.reasons_against(model)):
            raise RunError(f"--fold: {'; '.join(reasons)}; export without --fold")

    def folding(self, plain: PlainWeights) -> Folding:
        """Choose how the FFNs of a model are folded; raise RunError if its weights are lost."""
        products = [plain.ffn_product(layer) for layer in range(plain.model.num_layers)]
        lost = [layer for layer, product in enumerate(products) if not product.isfinite().all()]
        if lost:
            raise RunError(f"--fold: weights of layer {lost[0]} are not finite; choose an earlier --step")
        limit = self.largest_condition or LARGEST_CONDITIONS[self.dtype]
        return fold.fold(products, not plain.model.final_norm, limit)


def write_folder(folder: Path, trained: TrainedModel, tokenizer: Tokenizer, form: Form) -> list[str]:
    """Write everything into an empty folder.

    Args:
        tokenizer: that the run was trained with.

    Returns:
        Lines for the terminal.

    Raises:
        DataError: the tokenizer has no tokenizer.json.
        RunError: a file of the run is damaged.
        CheckpointError: the checkpoint is damaged.
        OSError: a file cannot be written.
    """
    model, vocab_size = trained.config.model, trained.vocab_size
    _write_json(folder / "tokenizer.json", tokenizer_json(tokenizer))
    _write_json(folder / "tokenizer_config.json", tokenizer_config(tokenizer, model.seq_length))
    weights: PlainWeights | FoldedWeights = trained.weights
    notes = []
    if form.fold:
        folding = form.folding(trained.weights)
        weights = FoldedWeights(trained.weights, folding)
        notes = [*folding_words(model, folding), cost_words(model, vocab_size, len(folding.kept))]
    sizes = (vocab_size, tokenizer.end_of_document, form.dtype)
    if form.format == "gpt2":
        tensors, config = gpt2_parameters(trained.weights), gpt2_config(model, *sizes)
    else:
        tensors, config = to_hf(weights), hf_config(weights, *sizes)
        source = Path(__file__).with_name("modeling.py").read_text(encoding="utf-8")
        write_atomically(folder / f"{MODELING}.py", source)
    _write_json(folder / CONFIG, config)
    ends = {key: value for key, value in config.items() if key.endswith("_token_id")}
    _write_json(folder / "generation_config.json", ends)
    values = write_safetensors(folder, _as(getattr(torch, form.dtype), tensors))
    facts = {
        "run": trained.config.run_dir.rstrip("/").rpartition("/")[2],
        "parameters": f"{values:,} in {form.dtype}",
        "context": f"{model.seq_length} tokens",
        "vocabulary": f"{vocab_size:,} tokens",
        "tokens trained on": f"{trained.saved.step * trained.config.tokens_per_step:,}",
        "fingerprint of the data": trained.saved.marker["dataset"]["fingerprint"],
    }
    write_card(folder, trained.run, trained.saved.step, facts, notes, form.format == "gpt2")
    return [f"step {trained.saved.step}: {values:,} parameters in {form.dtype}", *notes]


def folding_words(model: ModelConfig, folding: Folding) -> list[str]:
    """Say what was folded and where it was not."""
    left = ", ".join(map(str, sorted(folding.kept)))
    kept = f"; layers {left} keep one matrix each, since the condition would pass the limit" if left else ""
    lines = [
        f"{model.num_layers - len(folding.kept)} of {model.num_layers} FFNs are folded away; largest condition of a "
        f"basis {max(folding.conditions):.3g}{kept}"
    ]
    if model.temperature == "per_position":
        lines.append(
            "temperatures per position stay: they multiply each query, "
            f"{model.seq_length * model.hidden_size:,} multiplications a layer and sequence"
        )
    return lines


def cost_words(model: ModelConfig, vocab_size: int, kept: int) -> str:
    """Say what folding saves; `kept` is the number of matrices that stay."""
    width = model.hidden_size
    before = model.num_layers * model.block_matrix_elements
    after = (4 * model.num_layers + kept) * width**2
    untied = " (the head is no longer the embedding, which adds as many as that has)" if model.tied_head else ""
    costs = [private_inference_cost(model, vocab_size, matrices) for matrices in (None, kept)]
    return (
        f"parameters of the layers' matrices {before:,} -> {after:,}{untied}; their FLOPs a token {2 * before:,} -> "
        f"{2 * after:,}; private inference of {model.seq_length} tokens {costs[0].communication_gb:.3f} -> "
        f"{costs[1].communication_gb:.3f} GB, {costs[0].latency_min:.2f} -> {costs[1].latency_min:.2f} min"
    )


def gpt2_parameters(plain: PlainWeights) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters of a stock GPT-2, which has no temperatures: those per head are folded into the queries."""
    return gpt2.to_gpt2(plain.model, WithoutHeadTemperatures(plain).read)


def _as(dtype: torch.dtype, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    return ((name, tensor.detach().to(dtype)) for name, tensor in tensors)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    write_atomically(file, to_json(content, indent=1) + "\n")
