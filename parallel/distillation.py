"""A teacher beside a stage that holds all layers: an unmodified model whose predictions the student learns to give.

Every rank holds the whole teacher and runs it, without gradients, on its own micro-batches. So data parallelism and
every stage of ZeRO work as they do without one; tensor, pipeline and context parallelism are refused by the
configuration, since there no rank sees all of the student's logits and positions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.distillation import linear_divergence, relative_distance
from model.transformer import Head, Transformer


@dataclass(frozen=True)
class Distillation:
    """A teacher and how much it counts. It is no module: its weights are not the stage's.

    Attributes:
        teacher: whole, frozen, on this rank's device.
        weight: factor of the divergence of predictions.
        temperature: tau of that divergence.
        hidden_weight: factor of the distance of the residuals after each layer; 0 leaves it out.
    """

    teacher: Transformer
    weight: float
    temperature: float
    hidden_weight: float

    def loss(
        self,
        head: Head,
        x_TBD: Tensor,
        states_TBD: list[Tensor],
        tokens_TB: Tensor,
        document_start_BT: Tensor | None,
    ) -> Tensor:
        """Return what the teacher adds to the loss of one micro-batch, in nats a token.

        Args:
            head: the student's.
            x_TBD: what enters it.
            states_TBD: the student's residual after each layer.
            tokens_TB: of the micro-batch.
            document_start_BT: as in `Transformer.hidden_states`.
        """
        taught_TBD: list[Tensor] = []
        teacher_head = self.teacher.head
        assert teacher_head is not None
        with torch.no_grad():
            y_TBD, _ = self.teacher.hidden_states(tokens_TB, document_start_BT, taught_TBD)
            y_TBD = teacher_head.norm(y_TBD)
        loss = self.weight * linear_divergence(
            head.norm(x_TBD),
            head.weight,
            y_TBD,
            teacher_head.weight,
            vocab_size=head.vocab_size,
            temperature=self.temperature,
        )
        if self.hidden_weight:
            loss = loss + self.hidden_weight * relative_distance(states_TBD, taught_TBD)
        return loss / tokens_TB.numel()
