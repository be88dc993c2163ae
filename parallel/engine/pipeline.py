"""DeepSpeed's pipeline with its 1F1B schedule: each pipeline rank runs one `Stage` as its single layer."""

from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from parallel.deepspeed_internals import count_once
from parallel.micro_batch import MicroBatch
from parallel.sharding.megatron import Groups
from parallel.sharding.stage import Stage


def inputs_and_labels(batch: MicroBatch) -> tuple[Tensor | tuple[Tensor, ...], Tensor]:
    """Split a micro-batch into the first stage's inputs and the last stage's labels, as DeepSpeed expects."""
    if batch.document_start_BT is None:
        return batch.tokens_TB, batch.labels_TB
    return (batch.tokens_TB, batch.document_start_BT), batch.labels_TB


class PipelineStage(PipelineModule):
    """Runs a stage's body; the last stage's loss comes from `Stage.loss`.

    The last stage holds a tied head as a second copy of the embedding. Both start equal, and their gradients are summed
    over the two stages before the optimizer steps. The copy does not count in the gradient norm.
    """

    def __init__(self, stage: Stage, groups: Groups) -> None:
        grid = groups.grid
        super().__init__(
            layers=[LayerSpec(nn.Identity) for _ in range(grid.pp)],
            topology=PipeModelDataParallelTopology(num_pp=grid.pp, num_mp=grid.tp, num_dp=grid.replicas),
            loss_fn=stage.loss,
            partition_method="uniform",
        )
        self.stage = stage
        self.passes_documents = not grid.is_last_stage
        self.embedding_ends = groups.embedding_ends
        tied = self.stage.tied_weight
        for parameter in stage.parameters():
            count_once(parameter, is_copy=parameter is tied and not grid.is_first_stage)

    def forward(self, x: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        """Return the next stage's input: hidden states and, if they came with the tokens, document starts."""
        x, *document_start = x if isinstance(x, tuple) else (x,)
        hidden = self.stage.body(x, *document_start)
        return (hidden, *document_start) if document_start and self.passes_documents else hidden

    def get_tied_weights_and_groups(self) -> list[tuple[nn.Parameter, ProcessGroup]]:
        """Return the gradients that DeepSpeed sums before a step: the tied embedding, over first and last stage."""
        tied = self.stage.tied_weight
        return [] if tied is None or self.embedding_ends is None else [(tied, self.embedding_ends)]

    def _synchronize_tied_weights(self) -> None:
        """Do nothing: tied copies start equal, since initial values depend on the seed and the name alone."""
