"""Entries of kind `head`: losses on the sparse distribution, computed inside the fused LM head."""

from __future__ import annotations

from student.losses.catalogue import Loss, Need, Option, Paper
from student.losses.divergences import (
    adaptive_kl,
    confidence_kl,
    jsd,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    tempered_kl,
    total_variation,
)
from student.losses.ranking import hinge_ranking, logistic_ranking, logit_mse, top1
from student.losses.sparse import cross_entropy, one_for_all, soft_mse, span_likelihood, token_scaled_kl
from student.losses.transport import sinkhorn, universal_logit

_TEMPERATURE = Option(
    1.0, "of both distributions; other than 1 needs `generate --temperatures`", low=0.05, high=100.0
)
_TOP = Option(32, "how many of the teacher's best tokens take part", low=2, high=256, integer=True)
_MERGED = "merging the tokens outside the head into one outcome can only lower an f-divergence"

HEAD_LOSSES: tuple[Loss, ...] = (
    Loss(
        name="kl",
        kind="head",
        function=tempered_kl,
        formula="T² Σ p log(p / q)",
        paper=Paper("Distilling the Knowledge in a Neural Network", "1503.02531"),
        needs=Need.HEAD,
        better=Need.DRAWS,
        exactness="unbiased",
        statement="value and gradient, at temperature 1 with draws; otherwise a lower bound (one bucket for "
        "what is outside the head)",
        options={"temperature": _TEMPERATURE},
        mixes=True,
    ),
    Loss(
        name="ce",
        kind="head",
        function=cross_entropy,
        formula="−log q(label)",
        paper=None,
        needs=Need.NOTHING,
        exactness="exact",
        statement="uses the labels only",
    ),
    Loss(
        name="reverse_kl",
        kind="head",
        function=reverse_kl,
        formula="T² Σ q log(q / p)",
        paper=Paper("MiniLLM: Knowledge Distillation of Large Language Models", "2306.08543"),
        needs=Need.HEAD,
        exactness="bound",
        statement=_MERGED,
        options={"temperature": _TEMPERATURE},
    ),
    Loss(
        name="jsd",
        kind="head",
        function=jsd,
        formula="T² (β KL(p‖m) + (1−β) KL(q‖m)), m = βp + (1−β)q",
        paper=Paper("On-Policy Distillation of Language Models (GKD)", "2306.13649"),
        needs=Need.HEAD,
        exactness="bound",
        statement=_MERGED,
        options={
            "beta": Option(0.5, "share of the teacher", low=0.0, high=1.0, open=True),
            "temperature": _TEMPERATURE,
        },
    ),
    Loss(
        name="skew_kl",
        kind="head",
        function=skew_kl,
        formula="T² KL(p ‖ αp + (1−α)q)",
        paper=Paper("DistiLLM: Towards Streamlined Distillation for Large Language Models", "2402.03898"),
        needs=Need.HEAD,
        exactness="bound",
        statement=_MERGED,
        options={
            "alpha": Option(0.1, "share of the teacher in the mixture", low=0.0, high=1.0, open=True),
            "temperature": _TEMPERATURE,
        },
    ),
    Loss(
        name="skew_reverse_kl",
        kind="head",
        function=skew_reverse_kl,
        formula="T² KL(q ‖ (1−α)p + αq)",
        paper=Paper("DistiLLM: Towards Streamlined Distillation for Large Language Models", "2402.03898"),
        needs=Need.HEAD,
        exactness="bound",
        statement=_MERGED,
        options={
            "alpha": Option(0.1, "share of the student in the mixture", low=0.0, high=1.0, open=True),
            "temperature": _TEMPERATURE,
        },
    ),
    Loss(
        name="adaptive_kl",
        kind="head",
        function=adaptive_kl,
        formula="T² (w KL(p‖q) + (1−w) KL(q‖p)), w: share of Σ|p−q| on the tokens of mass μ",
        paper=Paper(
            "Rethinking Kullback-Leibler Divergence in Knowledge Distillation for LLMs", "2404.02657"
        ),
        needs=Need.HEAD,
        exactness="coarse",
        statement="both divergences are lower bounds, their weight is that of the merged distributions",
        options={
            "mu": Option(0.5, "mass of the tokens that count as the head", low=0.0, high=1.0, open=True),
            "temperature": _TEMPERATURE,
        },
    ),
    Loss(
        name="cakld",
        kind="head",
        function=confidence_kl,
        formula="γ KL(q‖p) + (1−γ) KL(p‖q), γ: mean of p(label)",
        paper=Paper("BitDistiller: Unleashing the Potential of Sub-4-Bit LLMs", "2402.10631"),
        needs=Need.HEAD | Need.LABEL,
        better=Need.DRAWS,
        exactness="bound",
        statement="the reverse part; with draws the forward part is unbiased",
        options={
            "confidence": Option(None, "γ; without it, the mean over 256 training samples", low=0.0, high=1.0)
        },
    ),
    Loss(
        name="tvd",
        kind="head",
        function=total_variation,
        formula="½ Σ |p − q|",
        paper=Paper("f-Divergence Minimization for Sequence-Level Knowledge Distillation", "2307.15190"),
        needs=Need.HEAD,
        exactness="bound",
        statement=_MERGED,
    ),
    Loss(
        name="tsld",
        kind="head",
        function=token_scaled_kl,
        formula="KL(p‖q) · softmax over the sequence of (−log p(label) / 10) · length",
        paper=Paper("Token-Scaled Logit Distillation for Ternary Weight Generative LMs", "2308.06744"),
        needs=Need.HEAD | Need.LABEL,
        better=Need.DRAWS,
        exactness="unbiased",
        statement="as kl: with draws, without them a lower bound; the weights are exact",
        mixes=True,
    ),
    Loss(
        name="soft_mse",
        kind="head",
        function=soft_mse,
        formula="Σ (p − q)²",
        paper=Paper("Verification of Forecasts Expressed in Terms of Probability (Brier, 1950)"),
        needs=Need.HEAD,
        better=Need.DRAWS,
        exactness="unbiased",
        statement="with draws, the gradient, and the value less Σ p² outside the head, a constant; without "
        "them the sum over the head, a lower bound",
        tails=(0.5,),
        mixes=True,
    ),
    Loss(
        name="logit_mse",
        kind="head",
        function=logit_mse,
        formula="1/K Σ ((z_S − mean z_S) − (z_T − mean z_T))² over the head",
        paper=Paper(
            "Comparing Kullback-Leibler Divergence and MSE Loss in Knowledge Distillation", "2105.08919"
        ),
        needs=Need.HEAD,
        exactness="bound",
        statement="times K, of the sum over the vocabulary: a subset centred on itself has the smaller sum",
    ),
    Loss(
        name="top1",
        kind="head",
        function=top1,
        formula="−log q(argmax p)",
        paper=Paper(
            "Training Data-Efficient Image Transformers & Distillation through Attention", "2012.12877"
        ),
        needs=Need.HEAD,
        exactness="exact",
        statement="the teacher's first choice is always in the head",
    ),
    Loss(
        name="hinge_ranking",
        kind="head",
        function=hinge_ranking,
        formula="mean over pairs p_i > p_j of max(0, margin − (z_i − z_j))",
        paper=Paper("Large Margin Rank Boundaries for Ordinal Regression (Herbrich et al., 2000)"),
        needs=Need.HEAD,
        exactness="exact",
        statement="over the pairs of the head's best tokens, but for those that storing in steps of 1/16 nat "
        "made equal (0.7 %)",
        options={"margin": Option(1.0, "wanted distance of two logits", low=0.0, open=True), "top": _TOP},
    ),
    Loss(
        name="logistic_ranking",
        kind="head",
        function=logistic_ranking,
        formula="mean over pairs p_i > p_j of log(1 + exp(−(z_i − z_j)))",
        paper=Paper("Learning to Rank using Gradient Descent (Burges et al., 2005)"),
        needs=Need.HEAD,
        exactness="exact",
        statement="over the pairs of the head's best tokens, but for those that storing in steps of 1/16 nat "
        "made equal (0.7 %)",
        options={"top": _TOP},
    ),
    Loss(
        name="sinkhorn",
        kind="head",
        function=sinkhorn,
        formula="Σ P_ij |p_i − q_j|, P: exp(−|p_i − q_j| / λ), rows and columns scaled in turn",
        paper=Paper("Sinkhorn Distance Minimization for Knowledge Distillation", "2402.17110"),
        needs=Need.HEAD,
        exactness="coarse",
        statement="the form for single positions, on the head's best tokens; not the form over a batch",
        options={
            "regularisation": Option(0.1, "λ", low=1e-3, high=1e3),
            "iterations": Option(20, "of scaling rows and columns", low=1, high=1000, integer=True),
            "top": _TOP,
            "temperature": _TEMPERATURE,
        },
    ),
    Loss(
        name="uld",
        kind="head",
        function=universal_logit,
        formula="Σ |p_(i) − q_(i)|, each side in descending order",
        paper=Paper(
            "Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss", "2402.12030"
        ),
        needs=Need.HEAD,
        exactness="bound",
        statement="the order beyond the head is one summand, by the triangle inequality",
        ranked=True,
    ),
    Loss(
        name="one_for_all",
        kind="head",
        function=one_for_all,
        formula="−(1 + p(label))^γ log q(label) − Σ p log q without the label",
        paper=Paper("One-for-All: Bridge the Gap Between Heterogeneous Architectures", "2310.19444"),
        needs=Need.HEAD | Need.LABEL,
        better=Need.DRAWS,
        exactness="unbiased",
        statement="value and gradient with draws; without, what is outside the head is one bucket. At the "
        "student's last layer, not at exits before it",
        options={"gamma": Option(1.0, "how much more the label weighs", low=0.0, high=10.0)},
        mixes=True,
    ),
    Loss(
        name="span_likelihood",
        kind="head",
        function=span_likelihood,
        formula="P log(P / Q) + (1 − P) log((1 − P) / (1 − Q)), P and Q: likelihoods of a span of text",
        paper=Paper("Unlocking On-Policy Distillation for Any Model Family (GOLD, 2025)"),
        needs=Need.LABEL,
        exactness="exact",
        statement="the KL of two outcomes, the text or any other, at most that over all texts. Spans are "
        "what both tokenizers cut alike; with the teacher's own they are tokens. GOLD itself compares sorted "
        "probabilities of merged spans",
        mixes=True,
        spans=True,
    ),
)
