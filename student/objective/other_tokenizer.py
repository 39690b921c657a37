"""What an objective is for a student whose tokenizer is not the teacher's, and what there is none of."""

from __future__ import annotations

from dataclasses import replace

from featurestore.format.schema import LogitsSpec
from student.errors import UserError
from student.losses.catalogue import Need
from student.metrics import kl_exactness
from student.objective.terms import Objective, Term

WHY = "the student's tokenizer is not the teacher's"


def across_tokenizers(
    objective: Objective,
    learned: LogitsSpec | None,
    widest: LogitsSpec | None,
    vocab_size: int,
    wanted: str | None,
) -> Objective:
    """The objective with `shared` of each term and of held-out metrics settled.

    learned, widest: the distribution that is trained on and the one that is measured with, None where there
    is none. vocab_size: the teacher's. wanted: --token-map.

    Raises:
        UserError: a loss cannot be computed, or --token-map first cannot be had.
    """
    for term in objective.terms:
        _check(term)
    if objective.balanced:
        raise UserError(f"balance: gradient_norm: not supported where {WHY}; give the terms weights instead")
    for term in objective.head:
        if wanted == "first" and term.loss.needs and not _pushes(term):
            raise UserError(
                f"--token-map first: {term.label} is not linear in the teacher's probabilities, so it "
                "learns from shared tokens; leave the flag out, or take kl at temperature 1"
            )
    if wanted == "first" and learned is not None and not _complete(learned, vocab_size):
        raise UserError(
            "--token-map first: without draws nothing is known of the tokens outside the heads, of which "
            "each begins with some token of the student; add draws with `distily-cache generate ... --tail "
            "16` (and leave --top-k, --top-p and --tail 0 out), or take --token-map shared"
        )
    terms = tuple(
        replace(term, shared=wanted == "shared" or not _pushes(term) or not _complete(learned, vocab_size))
        for term in objective.terms
    )
    return replace(
        objective, terms=terms, measures_shared=wanted == "shared" or not _complete(widest, vocab_size)
    )


def _check(term: Term) -> None:
    """UserError for a loss that needs the teacher at every position of the student, or its tokens."""
    loss = term.loss
    reason = {
        "dense": "compares logits token by token",
        "structure": "compares all positions of a sample with each other",
        "relation": "compares all positions of a sample with each other",
    }.get(loss.kind)
    if Need.FULL in loss.needs:
        reason = "needs the teacher's whole vocabulary"
    elif Need.LABEL in loss.needs and not loss.spans:
        reason = "needs the teacher's probability of the student's next token"
    if reason is not None:
        raise UserError(
            f"{term.label}: {loss.name} {reason}, and {WHY}; take a loss on the stored distribution (kl, "
            "jsd, uld, ...), span_likelihood, or one of hidden states at single positions, e.g. hidden_mse"
        )


def _pushes(term: Term) -> bool:
    """Whether a loss can learn from estimates: value and gradient of the KL are linear in them."""
    return term.loss.name == "kl" and term.temperature == 1.0


def _complete(spec: LogitsSpec | None, vocab_size: int) -> bool:
    """Whether a distribution says something of every token."""
    return spec is not None and (spec.tail > 0 or kl_exactness(spec, vocab_size) == "exact")
