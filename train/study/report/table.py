"""Write the main table of a report: perplexity beside the baselines and the paper, operations, private inference."""

from train.cost.flops import NonlinearOperation, forward_flops, nonlinear_operations, printed_gflops
from train.study.report.document import Document
from train.study.results import Group, Record, student

BASELINES = ("SM+LN+G", "SM+ScFuFFN")
"""The usual decoder, and the softmax-only decoder that temperatures and regularizer are added to."""
SYMBOLS = {"softmax": "SM", "layernorm": "LN", "gelu": "G", "gelu_tanh": "G", "relu": "R"}


def write_table(document: Document, groups: list[Group]) -> None:
    """Add a row for each model and budget, and a legend of the columns."""
    header = ["model", "tokens (M)", "seeds done", "perplexity", f"vs {BASELINES[0]}", f"vs {BASELINES[1]}",
              "published", f"vs {BASELINES[0]} there", "vs published", "NaN", "FFN", "attention",
              "nonlinear operations", "GB", "min"]  # fmt: skip
    titles = [title_of(group) for group in groups]
    document.table(
        header,
        [
            _row(group, groups, title if titles.count(title) == 1 else group.label)
            for group, title in zip(groups, titles, strict=True)
        ],
    )
    document.text(
        "±: 95% interval over seeds (Student's t). The interval of a gap is over pairs of runs of one seed, which read "
        "the same data in the same order. Models of different data are not compared. vs published: only at the "
        "published size. NaN: number of seeds that diverged. FFN and attention: FLOPs of a forward pass over one "
        "sequence, as arXiv 2501.03489 counts them. GB and min: predicted by `python -m train.private_inference`."
    )


def _row(group: Group, groups: list[Group], name: str) -> list[str]:
    record = group.first
    spread = group.mean_and_half_width()
    published = record.row.perplexity if record.row else None
    baseline = _baseline(group, groups, BASELINES[0])
    base_published = baseline.first.row.perplexity if baseline and baseline.first.row else None
    ffn, attention = flops_text(record)
    cost = record.cost
    return [
        name,
        f"{record.planned_tokens / 1e6:.3g}",
        f"{len(group.perplexities)} of {len(group.records)}",
        with_half_width("{:.3f}", spread) if spread else "NaN" if group.diverged else "-",
        *(gap_text(group, _baseline(group, groups, architecture)) for architecture in BASELINES),
        "NaN" if record.row and record.row.diverges else f"{published:g}" if published else "-",
        relative(published, base_published),
        relative(spread[0] if spread else None, published) if at_published_size(record) else "-",
        f"{group.diverged} of {len(group.records)}" if group.diverged else "0",
        ffn,
        attention,
        operations_text(nonlinear_operations(record.model)),
        f"{cost.communication_gb:.2f}" if cost else "-",
        f"{cost.latency_min:.2f}" if cost else "-",
    ]


def with_half_width(form: str, value: tuple[float, float | None]) -> str:
    """Format (3.21, 0.012) as '3.210 ± 0.012'; one seed has no half width."""
    return form.format(value[0]) + ("" if value[1] is None else f" ± {form.replace('+', '').format(value[1])}")


def gap_text(group: Group, baseline: Group | None) -> str:
    """Format how much larger the perplexity is than the baseline's, over the seeds that both have; '-' without any."""
    if baseline is None or baseline is group:
        return "-"
    theirs = {record.seed: record.perplexity for record in baseline.records}
    gaps = [record.perplexity / other - 1 for record in group.records
            if record.perplexity is not None and (other := theirs.get(record.seed)) is not None]  # fmt: skip
    spread = student(gaps)
    return with_half_width("{:+.1%}", spread) if spread else "-"


def flops_text(record: Record) -> tuple[str, str]:
    """Format the FLOPs of (FFN, attention) as the paper does, in B; in M if they are fewer than 1e9."""
    flops = forward_flops(record.model)
    ffn, attention = printed_gflops(record.model)
    return _flops_cell(flops.ffn, ffn), _flops_cell(flops.attention, attention)


def _flops_cell(flops: float, printed: str) -> str:
    return f"{printed}B" if flops >= 1e9 else f"{flops / 1e6:.3g}M"


def _baseline(group: Group, groups: list[Group], architecture: str) -> Group | None:
    """Find the group of that architecture with the same size, length and data."""

    def setting(record: Record) -> tuple[object, ...]:
        model = record.model
        size = (model.num_layers, model.hidden_size, model.seq_length)
        return (*size, record.planned_tokens, record.data, record.vocab_size)

    mine = setting(group.first)
    same = (other for other in groups if setting(other.first) == mine)
    return next((other for other in same if other.first.model.architecture == architecture), None)


def relative(value: float | None, reference: float | None) -> str:
    """Format value / reference - 1 as '+3.1%'; '-' if either is unknown."""
    return "-" if value is None or not reference else f"{value / reference - 1:+.1%}"


def operations_text(operations: dict[str, NonlinearOperation]) -> str:
    """Format operations as the paper's tables do: 'SM:144x128x128 LN:24x128x768'."""
    return " ".join(
        f"{SYMBOLS[kind]}:{operation.count}x{operation.rows}x{operation.columns}"
        for kind, operation in operations.items()
        if kind in SYMBOLS
    )


def at_published_size(record: Record) -> bool:
    """Return whether a run has the size that the paper's row was trained at."""
    return record.row is not None and record.row.config().model == record.model


def title_of(group: Group) -> str:
    """Return a short title: the row's label in the paper, and the budget if it is one of several."""
    record = group.first
    name = record.row.label if record.row and not record.swept else record.label
    return f"{name}, {record.planned_tokens / 1e6:.3g}M" if record.folder.name.startswith("tokens") else name
