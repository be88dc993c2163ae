"""Write the model card of an exported model (README.md) and the picture of its heads."""

import math
from pathlib import Path
from typing import Any

from data.files.own import write_atomically
from train.pictures.files import write_picture
from train.pictures.maps import head_map_figure
from train.run.reader import Row, RunReader

HEAD_MAP = "head_map.png"


def write_card(folder: Path, run: Path, step: int, facts: dict[str, Any], notes: list[str], is_gpt2: bool) -> None:
    """Write README.md, and head_map.png if the run has logged entropies by that step.

    Args:
        folder: of the exported model.
        run: folder of the run.
        step: of the checkpoint.
        facts: name -> value, the first rows of the table.
        notes: sentences on how it was exported.
        is_gpt2: whether it is a stock GPT-2.

    Raises:
        RunError: a file of the run is damaged.
    """
    reader = RunReader(run)
    described = reader.description() or {}
    model = described["config"]["model"]
    heads, losses = _heads_at(reader, step), _validation_at(reader, step)
    rows = {
        **facts,
        "step": f"{step:,}",
        **losses,
        "commit of the training code": described.get("git_commit") or "unknown",
    }
    trust = "" if is_gpt2 else ", trust_remote_code=True"
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [softmax-only, private-inference, attention-entropy]" if not is_gpt2 else "tags: [gpt2]",
        "---",
        "",
        f"# {model['architecture']}, {model['num_layers']} layers of width {model['hidden_size']}",
        "",
        "A language model trained with the entropy-guided softmax-only transformer (arXiv 2501.03489).",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("."{trust})',
        f'model = AutoModelForCausalLM.from_pretrained("."{trust})',
        'inputs = tokenizer("def main(", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=30)[0]))",
        "```",
        "",
        f"A text has at most {model['seq_length']} tokens. In training, the end-of-document token separated texts: "
        "begin with it if there is no prompt.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows.items()),
        "",
        *(f"{note}\n" for note in notes),
    ]
    if heads is not None:
        moment, entropy_nats = heads
        lines += [
            "## Entropy of the attention heads",
            "",
            f"Mean over positions, {moment}. ln T = {math.log(model['seq_length']):.2f} nats.",
            "",
            f"![Mean entropy of each head]({HEAD_MAP})",
            "",
            "| layer | mean | heads (nats) |",
            "|--:|--:|---|",
            *(
                f"| {layer} | {sum(row) / len(row):.2f} | {' '.join(f'{value:.2f}' for value in row)} |"
                for layer, row in enumerate(entropy_nats)
            ),
            "",
        ]
        title = f"{model['architecture']}\n{moment}"
        write_picture(head_map_figure(entropy_nats, model["seq_length"], title), folder / HEAD_MAP, dpi=150)
    write_atomically(folder / "README.md", "\n".join(lines))


def _evaluation_at(reader: RunReader, step: int) -> Row | None:
    evaluation = reader.evaluation()
    return evaluation if evaluation is not None and evaluation.get("step") == step else None


def _heads_at(reader: RunReader, step: int) -> tuple[str, list[list[float]]] | None:
    """Return where the entropies of a checkpoint were measured, and they [L][N]; null counts as NaN."""
    evaluation = _evaluation_at(reader, step)
    logged = [row for row in reader.entropies() if row["step"] <= step and row.get("entropy_nats")]
    if evaluation is not None:
        moment, found = "on the whole validation split", evaluation["entropy_nats"]
    elif logged:
        moment, found = f"in training, step {logged[-1]['step']:,}", logged[-1]["entropy_nats"]
    else:
        return None
    return moment, [[math.nan if value is None else float(value) for value in row] for row in found]


def _validation_at(reader: RunReader, step: int) -> dict[str, str]:
    """Return the validation loss of a checkpoint, or the last one before it."""
    rows = [row for row in reader.metrics() if row["step"] <= step and row.get("validation_loss") is not None]
    found = _evaluation_at(reader, step) or (rows[-1] if rows else None)
    if found is None or found.get("validation_loss") is None:
        return {}
    loss, tokens = found["validation_loss"], found.get("validation_tokens", 0)
    then = "" if found["step"] == step else f", at step {found['step']:,}"
    return {
        "validation loss": f"{loss:.4f} nats a token over {tokens:,} tokens{then}",
        "validation perplexity": f"{math.exp(min(loss, 700)):.3f}{then}",
    }
