"""A loss of one's own: `python custom_loss.py STORE OUTPUT_DIR`; STORE holds hidden states."""

import sys

from torch import Tensor

from distily import DistillationConfig, DistillationTrainer, Loss, LossOption, Need, register_loss


def huber(student_ND: Tensor, teacher_ND: Tensor, delta: float) -> Tensor:
    """Huber's loss between hidden states, [N]: quadratic up to `delta`, then linear."""
    distance_ND = (student_ND.float() - teacher_ND.float()).abs()
    small_ND = distance_ND.clamp(max=delta)
    return (small_ND * (distance_ND - small_ND / 2)).mean(-1)


register_loss(
    Loss(
        name="hidden_huber",
        kind="hidden",
        function=huber,
        needs=Need.HIDDEN,
        options={"delta": LossOption(1.0, "where it turns linear", low=0.0, open=True)},
    )
)
objective = {"terms": [{"loss": "kl"}, {"loss": "hidden_huber", "weight": 0.5, "delta": 2.0}]}
args = DistillationConfig(output_dir=sys.argv[2], objective=objective, max_steps=16)
trainer = DistillationTrainer(args=args, train_dataset=sys.argv[1])
print(trainer.train().metrics)
