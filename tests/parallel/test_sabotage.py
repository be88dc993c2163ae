"""Test the comparison with one process itself: each of these bugs, put back into the code, must make it fail."""

from typing import Any

import pytest

from parallel.layout import parse_layout
from parallel.local_ranks import RankError, run_ranks
from tests.parallel.sabotage import measure_with
from tests.parallel.tiny import tiny_config
from train.compare.comparison import TOLERANCE, compare
from train.compare.layouts import apply_layout, global_batches, reference_layout
from train.compare.measurement import Measured, assemble

BUGS = [
    ("pipe_partitioned", "tp=2:pp=2:sp=1", "float32"),
    ("replicated_gradients_not_summed", "tp=2:sp=1", "float32"),
    ("replicated_gradients_not_summed", "tp=2", "float32"),
    ("replicated_gradients_summed_of_the_last_micro_batch", "tp=2:sp=1", "float32"),
    ("split_parameters_not_marked", "tp=2", "float32"),
    ("tied_copies_not_summed", "pp=2", "float32"),
    ("tied_copy_counted_twice", "pp=2", "float32"),
    ("penalty_not_divided_by_micro_batches", "tp=1", "float64"),
    ("context_ranks_averaged_not_summed", "cp=2", "float64"),
    ("local_heads_as_global", "tp=2", "float64"),
    ("local_layers_as_global", "pp=2", "float64"),
    ("thresholds_of_other_heads", "cp=2", "float64"),
    ("mean_entropy_not_reduced", "dp=2:acc=2", "float64"),
    ("causal_targets_of_the_packed_sequence", "tp=2", "float64"),
    ("temperatures_of_other_heads", "cp=2", "float64"),
    ("every_context_rank_at_position_zero", "cp=2", "float64"),
    ("vocabulary_not_summed", "tp=2", "float64"),
    ("vocabulary_of_a_neighbour", "tp=2", "float64"),
    ("diagonal_of_the_first_columns", "tp=2", "float64"),
    ("diagonal_of_the_first_columns", "tp=2:sp=1", "float64"),
    ("diagonal_taken_for_whole", "tp=2", "float64"),
    ("diagonal_taken_for_whole", "tp=2:sp=1", "float64"),
    ("features_of_other_ranks", "tp=2:sp=1", "float64"),
    ("micro_batches_before_the_last_but_one_forgotten", "tp=2:sp=1:acc=4", "float32"),
    ("documents_begin_at_zero_on_later_stages", "pp=2", "float32"),
]
CHOICES: dict[str, dict[str, Any]] = {
    "mean_entropy_not_reduced": {"granularity": "per_head"},
    "causal_targets_of_the_packed_sequence": {"target": "causal", "within_documents": True},
    "diagonal_of_the_first_columns": {"fused_ffn": "split"},
    "diagonal_taken_for_whole": {"fused_ffn": "split"},
    "features_of_other_ranks": {"fused_ffn": "split"},
    "documents_begin_at_zero_on_later_stages": {"within_documents": True},
}


@pytest.mark.slow
@pytest.mark.parametrize(("bug", "layout", "dtype"), BUGS, ids=[f"{bug}-{layout}" for bug, layout, _ in BUGS])
def test_a_bug_is_noticed(bug: str, layout: str, dtype: str) -> None:
    parsed, tolerance = parse_layout(layout), TOLERANCE[dtype]
    config = tiny_config(**CHOICES.get(bug, {}))
    reference = reference_layout(config, [parsed])
    vocab_size, batches = global_batches(config, 1)

    def measured(layout: Any, bug: str | None) -> Measured:
        applied = apply_layout(config, layout, reference)
        ranks = run_ranks(measure_with, layout.world_size, bug, applied, vocab_size, batches, dtype)
        gradients = [assemble([rank["gradients"][0] for rank in ranks], vocab_size)]
        return Measured(ranks[0]["losses"], gradients, ranks[0]["entropy_nats"], {})

    expected = measured(reference, None)
    assert compare(measured(parsed, None), expected).within(tolerance), "without the bug the layouts must agree"
    try:
        found = measured(parsed, bug)
    except RankError as error:
        assert "holds another gradient" in str(error), "the bug must compute wrongly, not fail to run"
        return
    assert not compare(found, expected).within(tolerance)
