"""Which of several caches' teachers each term learns from, and whether their mixture is known well enough."""

from __future__ import annotations

from collections.abc import Sequence

from featurestore.errors import MissingFeatureError
from featurestore.format.schema import LogitsSpec
from featurestore.reader import CacheReader
from student.data.stores import CacheStores
from student.errors import UserError
from student.losses.catalogue import catalogue
from student.metrics import kl_exactness
from student.objective.files import ObjectiveRequest, TermRequest
from student.objective.terms import Objective
from student.objective.weights import Weight

_CHOOSE = "choose one for it in an objective file, e.g. `teacher: 0`"


def teachers_of(request: TermRequest, stores: CacheStores) -> tuple[int, ...]:
    """Numbers of the caches that a term learns from: the one that it names; else of a loss on distributions
    all of them, mixed, of one on states the first, of one on labels none.

    Raises:
        UserError: it names no cache, or its loss cannot learn from a mixture.
    """
    if request.teacher is not None:
        return (_number(request, stores),)
    loss = request.loss
    if len(stores) == 1 or loss.kind not in ("head", "dense"):
        return (0,)
    if not loss.needs:
        return ()
    if loss.kind == "dense" or not loss.mixes:
        known = ", ".join(name for name, one in catalogue().items() if one.mixes)
        raise UserError(
            f"{request.where}: {loss.name} is not linear in the teacher's probabilities, so it cannot learn "
            f"from the mixture of {len(stores)} teachers (these can: {known}); {_CHOOSE}"
        )
    temperature = float(request.options.get("temperature", 1.0))
    if temperature != 1.0:
        raise UserError(
            f"{request.where}: temperature {temperature:g}: draws say nothing at other temperatures than 1, "
            f"so the mixture of {len(stores)} teachers is not known; {_CHOOSE}, or one term for each teacher"
        )
    return tuple(range(len(stores)))


def _number(request: TermRequest, stores: CacheStores) -> int:
    """UserError unless the term names one of the caches."""
    given = request.teacher
    if isinstance(given, int) and 0 <= given < len(stores):
        return given
    if isinstance(given, str) and given in stores.names:
        return stores.names.index(given)
    there = ", ".join(f"{number} or {name}" for number, name in enumerate(stores.names))
    raise UserError(f"{request.where}: teacher {given!r}: no such STORE; there are {there}")


def final_weights(
    request: ObjectiveRequest, given: Sequence[float] | None, count: int
) -> Sequence[float] | None:
    """Weights of the teachers of `count` caches at the end of a training; None for equal ones.

    given: those of --teacher-weights.

    Raises:
        UserError: the objective has some as well, or not as many as there are caches.
    """
    if request.teachers is None:
        return given
    if given is not None:
        raise UserError(f"{request.where} and --teacher-weights exclude each other; keep one")
    if count == 1:
        raise UserError(f"{request.where} has no effect on one STORE; leave it out, or give several")
    if len(request.teachers) != count:
        raise UserError(f"{request.where}: {len(request.teachers)} weights for {count} STOREs; give {count}")
    return [weight.at(1.0) for weight in request.teachers]


def weights_of(request: ObjectiveRequest, stores: CacheStores) -> tuple[Weight, ...]:
    """The weight of each cache's teacher over the training."""
    return request.teachers or tuple(map(Weight.constant, stores.weights))


def check_mixture(objective: Objective, stores: CacheStores, learned: Sequence[LogitsSpec | None]) -> None:
    """UserError where a term learns from the mixture and a cache says nothing of tokens outside its heads.

    learned: of each cache the distribution that is learned from, None for the widest.
    """
    term = next((term for term in objective.terms if len(term.teachers) > 1), None)
    if term is None:
        return
    for reader, name, spec in zip(stores.readers, stores.names, learned, strict=True):
        if not mixes(reader, spec or widest_of(reader)):
            given = spec is not None and not spec.tail and mixes(reader, widest_of(reader))
            fix = (
                "leave --top-k, --top-p and --tail 0 out"
                if given
                else "add draws with `distily-cache generate ... --tail 16`"
            )
            raise UserError(
                f"{term.label}: the mixture of {len(stores)} teachers needs draws from outside the heads of "
                f"each, and {name} gives none: its share of a token that another head holds is not known; "
                f"{fix}, or write one term for each teacher (`teacher: 0`, `teacher: 1`) in an objective file"
            )


def mixes(reader: CacheReader, spec: LogitsSpec | None) -> bool:
    """Whether a distribution of a cache says something of every token: by draws, or since heads are whole."""
    if spec is None:
        return False
    return spec.tail > 0 or kl_exactness(spec, reader.identity.vocab_size) == "exact"


def measured(stores: CacheStores) -> tuple[int, ...]:
    """The caches that held-out metrics compare with: the mixture of all, if they give one, else the first
    that holds distributions.
    """
    widest = [widest_of(reader) for reader in stores.readers]
    if all(mixes(reader, spec) for reader, spec in zip(stores.readers, widest, strict=True)):
        return tuple(range(len(stores)))
    return (next((store for store, spec in enumerate(widest) if spec is not None), 0),)


def measured_words(objective: Objective, stores: CacheStores) -> str:
    """What held-out metrics compare with, in a sentence."""
    if len(objective.measured) > 1:
        when = ", that of the end of the training" if objective.shares_move else ""
        return (
            f"held-out metrics compare with the mixture {stores.mixture}{when}; held-out KL is the weighted "
            "mean of the KL to each teacher"
        )
    lacking = [
        name
        for reader, name in zip(stores.readers, stores.names, strict=True)
        if not mixes(reader, widest_of(reader))
    ]
    return (
        f"held-out metrics compare with {stores.names[objective.measured[0]]} alone, since a mixture needs "
        f"draws from outside the heads (`generate ... --tail 16`), which {', '.join(lacking)} lacks"
    )


def widest_of(reader: CacheReader) -> LogitsSpec | None:
    """The distribution of all samples; None where there is none."""
    try:
        spec = reader.find("logits")
    except MissingFeatureError:
        return None
    assert isinstance(spec, LogitsSpec)
    return spec
