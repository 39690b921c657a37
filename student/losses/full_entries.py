"""Entries of kind `dense`: losses on the full distribution, from final states and two LM heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from student.losses import full
from student.losses.catalogue import Loss, Need, Option, Paper
from student.losses.full_pass import fisher_mse

_TEMPERATURE = Option(1.0, "of both distributions", low=0.05, high=100.0)
_SKEW = Paper("DistiLLM: Towards Streamlined Distillation for Large Language Models", "2402.03898")
_MSE = Paper("Comparing Kullback-Leibler Divergence and MSE Loss in Knowledge Distillation", "2105.08919")
_LKD = Paper("A Closer Look at Knowledge Distillation with Features, Logits, and Gradients", "2203.10163")


def _entry(
    name: str,
    function: Callable[..., Any],
    formula: str,
    paper: Paper,
    options: Mapping[str, Option],
    needs: Need = Need.FULL,
) -> Loss:
    return Loss(
        name=f"full_{name}",
        kind="dense",
        function=function,
        formula=formula,
        paper=paper,
        needs=needs,
        exactness="exact",
        statement="over the whole vocabulary, up to the rounding of the stored final states",
        options=options,
    )


DENSE_LOSSES: tuple[Loss, ...] = (
    _entry(
        "kl",
        full.forward_kl,
        "T² Σ p log(p / q)",
        Paper("Distilling the Knowledge in a Neural Network", "1503.02531"),
        {"temperature": _TEMPERATURE},
    ),
    _entry(
        "reverse_kl",
        full.reverse_kl,
        "T² Σ q log(q / p)",
        Paper("MiniLLM: Knowledge Distillation of Large Language Models", "2306.08543"),
        {"temperature": _TEMPERATURE},
    ),
    _entry(
        "jsd",
        full.jsd,
        "T² (β KL(p‖m) + (1−β) KL(q‖m)), m = βp + (1−β)q",
        Paper("On-Policy Distillation of Language Models (GKD)", "2306.13649"),
        {
            "beta": Option(0.5, "share of the teacher", low=0.0, high=1.0, open=True),
            "temperature": _TEMPERATURE,
        },
    ),
    _entry(
        "skew_kl",
        full.skew_kl,
        "T² KL(p ‖ αp + (1−α)q)",
        _SKEW,
        {
            "alpha": Option(0.1, "share of the teacher in the mixture", low=0.0, high=1.0, open=True),
            "temperature": _TEMPERATURE,
        },
    ),
    _entry(
        "skew_reverse_kl",
        full.skew_reverse_kl,
        "T² KL(q ‖ (1−α)p + αq)",
        _SKEW,
        {
            "alpha": Option(0.1, "share of the student in the mixture", low=0.0, high=1.0, open=True),
            "temperature": _TEMPERATURE,
        },
    ),
    _entry(
        "adaptive_kl",
        full.adaptive_kl,
        "T² (w KL(p‖q) + (1−w) KL(q‖p)), w: share of Σ|p−q| on the tokens of mass μ",
        Paper("Rethinking Kullback-Leibler Divergence in Knowledge Distillation for LLMs", "2404.02657"),
        {
            "mu": Option(0.5, "mass of the tokens that count as the head", low=0.0, high=1.0, open=True),
            "temperature": _TEMPERATURE,
        },
    ),
    _entry(
        "cakld",
        full.confidence_kl,
        "γ KL(q‖p) + (1−γ) KL(p‖q), γ: mean of p(label)",
        Paper("BitDistiller: Unleashing the Potential of Sub-4-Bit LLMs", "2402.10631"),
        {"confidence": Option(None, "γ; without it, the mean over 256 training samples", low=0.0, high=1.0)},
        needs=Need.FULL | Need.LABEL,
    ),
    _entry(
        "tvd",
        full.total_variation,
        "½ Σ |p − q|",
        Paper("f-Divergence Minimization for Sequence-Level Knowledge Distillation", "2307.15190"),
        {},
    ),
    _entry(
        "soft_mse",
        full.soft_mse,
        "Σ (p − q)²",
        Paper("Verification of Forecasts Expressed in Terms of Probability (Brier, 1950)"),
        {},
    ),
    _entry("logit_mse", full.logit_mse, "1/V Σ (z_S − z_T)²", _MSE, {}),
    _entry(
        "logit_mse_centred",
        full.centred_logit_mse,
        "1/V Σ ((z_S − mean z_S) − (z_T − mean z_T))²",
        _MSE,
        {},
    ),
    _entry("logit_mse_fisher", full.fisher_logit_mse, "½ dᵀ (diag p − p pᵀ) d, d = z_S − z_T", _LKD, {}),
    Loss(
        name="fisher_mse",
        kind="hidden",
        function=fisher_mse,
        formula="½ Σ F_d (h_S − h_T)²_d, F_d = Σ p(y) (∂ log p(y) / ∂ h_d)², h: final states",
        paper=_LKD,
        needs=Need.FULL,
        exactness="exact",
        statement="up to the rounding of the stored final states; KL(p‖q) to second order, F without what is "
        "off its diagonal",
    ),
)
