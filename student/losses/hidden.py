"""Losses between hidden states of teacher and student, per position and in float32.

Shape letters: N positions, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mse(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """Mean over D of the squared difference, [N]."""
    return (student_ND.float() - teacher_ND.float()).square().mean(-1)


def cosine(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """1 - cosine similarity, [N], in [0, 2]; blind to the scale of either side (DistilBERT, Sanh et al.
    2019).
    """
    return 1.0 - torch.nn.functional.cosine_similarity(student_ND.float(), teacher_ND.float(), dim=-1)
