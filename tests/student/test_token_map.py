"""Distributions over a teacher's tokens as ones over the tokens of a student with another tokenizer, against
dense sums in float64 that are spelled out.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from torch import Tensor

from student.alignment.vocabulary import Vocabulary
from student.data.retokenised import rows
from student.data.token_map import (
    DeviceMap,
    NextTokens,
    TokenMap,
    first_tokens,
    merged,
    shared_tokens,
    token_map,
)
from student.losses.lm_head import HeadTransform
from student.losses.sparse import SparseTargets, cross_entropy, forward_kl, where_known
from student.losses.sparse_pass import sparse_head_loss
from student.losses.transport import universal_logit

EPS = torch.finfo(torch.float64).eps


def vocabulary(texts: list[bytes], roles: dict[int, tuple[str, ...]] | None = None) -> Vocabulary:
    own = {text[0]: index for index, text in enumerate(texts) if len(text) == 1}
    return Vocabulary(
        texts=tuple(texts), roles=roles or {}, byte_ids=tuple(own.get(byte, -1) for byte in range(256))
    )


# A student of bytes, its own ids in another order, with an end token.
BYTES = vocabulary([b"", *(bytes([byte]) for byte in reversed(range(256)))], {0: ("</s>", "eos")})


def teacher_of(size: int) -> Vocabulary:
    """Texts of 1 to 5 letters out of few, all different, which begin alike; token 0 ends a text, 1 is
    special and nothing that a student has.
    """
    rng = np.random.default_rng(0)
    texts: dict[bytes, None] = dict.fromkeys([b"", b"#"])
    while len(texts) < size:
        texts[bytes(rng.choice(list(b"abcdefgh"), rng.integers(1, 8)))] = None
    listed = list(texts)
    listed[1] = b""
    return vocabulary(listed, {0: ("</s>", "eos"), 1: ("<x>",)})


def byte_map(size: int) -> tuple[Vocabulary, TokenMap]:
    teacher = teacher_of(size)
    return teacher, token_map(teacher, BYTES, None)  # type: ignore[arg-type]  # bytes need no encoder


def following(actual: list[int], depth: list[int], known: list[bool], logprob: Tensor) -> NextTokens:
    return NextTokens(
        known_N=torch.tensor(known),
        depth_N=torch.tensor(depth),
        actual_N=torch.tensor(actual),
        logprob_N=logprob,
    )


def whole(logits_NV: Tensor, label_N: Tensor) -> SparseTargets:
    """The whole vocabulary as a head."""
    logprob, ids = logits_NV.log_softmax(-1).sort(-1, descending=True)
    outside = torch.full_like(label_N, -math.inf, dtype=logits_NV.dtype)
    return SparseTargets(ids_NK=ids, logprob_NK=logprob, tail_N=outside, label_N=label_N)


def dense(targets: SparseTargets, row: int) -> dict[int, float]:
    """The columns of a row by token; each token is in one of them."""
    real = torch.isfinite(targets.logprob_NK[row])
    ids = targets.ids_NK[row][real].tolist()
    assert len(set(ids)) == len(ids)
    assert bool((targets.ids_NK[row][~real] == targets.ids_NK[row, 0]).all())
    return dict(zip(ids, targets.logprob_NK[row][real].exp().tolist(), strict=True))


def pushed(teacher: Vocabulary, p_V: list[float], actual: int, depth: int) -> dict[int, float]:
    """What comes next by the definition: of tokens that begin with what was read, and are longer."""
    begun = teacher.texts[actual][:depth]
    sums: dict[int, float] = defaultdict(float)
    for index, (text, p) in enumerate(zip(teacher.texts, p_V, strict=True)):
        if depth == 0 and index in teacher.roles:
            if index == 0:
                sums[0] += p
        elif text.startswith(begun) and len(text) > depth:
            sums[256 - text[depth]] += p
    total = math.fsum(sums.values())
    return {token: p / total for token, p in sums.items()}


@pytest.mark.parametrize("size", [31, 199, 49_152])
def test_first_tokens_of_whole_heads_are_the_dense_push_forward(size: int) -> None:
    teacher, tokens = byte_map(size)
    logits = 3 * torch.randn(4, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    long = [index for index, text in enumerate(teacher.texts) if len(text) >= 3]
    actual, depth = [long[0], long[1], long[2], 0], [0, 1, 2, 0]
    label = torch.tensor([256 - teacher.texts[a][d] if a else 0 for a, d in zip(actual, depth, strict=True)])
    logprob = logits.log_softmax(-1)[torch.arange(4), torch.tensor(actual)]
    made = first_tokens(
        whole(logits, label), following(actual, depth, [True] * 4, logprob), DeviceMap.of(tokens)
    )
    for row in range(4):
        wanted = pushed(teacher, logits[row].softmax(-1).tolist(), actual[row], depth[row])
        found = dense(made, row)
        assert found == pytest.approx(wanted, rel=size * EPS, abs=1e-300)
        assert int(made.ids_NK[row, 0]) == max(wanted, key=wanted.__getitem__)


def test_draws_are_unbiased_whatever_comes_next() -> None:
    """The mean over all pairs of draws from the tail, by their probability, is the push-forward itself."""
    teacher, tokens = byte_map(31)
    p = torch.randn(31, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    p[1] = -math.inf  # all mass is on texts
    p = p.softmax(-1)
    order = p.argsort(descending=True)
    head, tail = order[:4], order[4:-1]
    for actual in (int(head[1]), int(tail[2])):
        label = 256 - teacher.texts[actual][0] if actual else 0
        rest = p[tail] / p[tail].sum()
        mean: dict[int, float] = defaultdict(float)
        weight = 0.0
        for one, other in itertools.product(range(len(tail)), repeat=2):
            draws = tail[[one, other]]
            if (draws == actual).all():
                continue  # nothing is left of which to know more
            chance = float(rest[one] * rest[other])
            share = p[tail].sum() / 2
            logs = [share, share] if one != other else [share * 2, torch.tensor(0.0)]
            drawn = draws if one != other else torch.stack([draws[0], head[0]])
            targets = SparseTargets(
                ids_NK=torch.cat([head, drawn]).unsqueeze(0),
                logprob_NK=torch.cat([p[head], torch.stack(logs)]).log().unsqueeze(0),
                tail_N=torch.tensor([-math.inf]),
                label_N=torch.tensor([label]),
                draws=2,
            )
            made = first_tokens(
                targets, following([actual], [0], [True], p[[actual]].log()), DeviceMap.of(tokens)
            )
            assert sum(dense(made, 0).values()) == pytest.approx(1, rel=1e-12)
            for token, value in dense(made, 0).items():
                mean[token] += chance * value
            weight += chance
        wanted = pushed(teacher, p.tolist(), actual, 0)
        assert {t: v / weight for t, v in mean.items()} == pytest.approx(wanted, rel=1e-12)


def test_a_token_that_is_in_no_column_counts_by_its_stored_probability() -> None:
    teacher, tokens = byte_map(31)
    actual, other = 5, 9
    label = 256 - teacher.texts[actual][0]
    targets = SparseTargets(
        ids_NK=torch.tensor([[other]] * 3),
        logprob_NK=torch.tensor([[math.log(0.75)]] * 3),
        tail_N=torch.full((3,), math.log(0.25)),
        label_N=torch.tensor([label] * 3),
    )
    logprob = torch.tensor([math.log(0.25), math.nan, math.log(0.25)])
    made = first_tokens(
        targets, following([actual] * 3, [0] * 3, [True, True, False], logprob), DeviceMap.of(tokens)
    )
    begins = 256 - teacher.texts[other][0]
    assert dense(made, 0) == pytest.approx({begins: 0.75, label: 0.25} if begins != label else {label: 1})
    assert dense(made, 1)[begins] == pytest.approx(1)
    assert dense(made, 2) == {label: 1.0}
    assert made.known_N is not None and made.known_N.tolist() == [True, True, False]


def shared_map(size: int) -> tuple[TokenMap, list[int]]:
    """A map to a student that has every third token, in reverse."""
    shared = np.array([(size - index) // 3 if index % 3 == 0 else -1 for index in range(size)], np.int32)
    pieces = shared[:, None]
    made = TokenMap(
        shared_V=shared,
        pieces_VL=pieces,
        counts_V=(shared >= 0).astype(np.int32),
        prefix_VL=pieces * 0,
        choices_VR=pieces,
        shares_VR=(pieces >= 0).astype(np.float32),
    )
    return made, shared.tolist()


@pytest.mark.parametrize(("size", "head"), [(31, 7), (199, 50), (49_152, 12)])
def test_shared_tokens_keep_their_probability_and_all_else_is_outside(size: int, head: int) -> None:
    tokens, shared = shared_map(size)
    logits = 3 * torch.randn(6, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    label = torch.arange(6)
    all_of_it = whole(logits, label)
    kept = SparseTargets(
        ids_NK=all_of_it.ids_NK[:, :head],
        logprob_NK=all_of_it.logprob_NK[:, :head],
        tail_N=all_of_it.logprob_NK[:, head:].logsumexp(-1),
        label_N=label,
    )
    ahead = following([3] * 6, [0, 0, 0, 0, 1, 0], [True] * 5 + [False], torch.zeros(6, dtype=torch.float64))
    made = shared_tokens(kept, ahead, DeviceMap.of(tokens))
    assert made.known_N is not None
    for row in range(6):
        wanted = {
            shared[token]: p
            for token, p in zip(kept.ids_NK[row].tolist(), kept.logprob_NK[row].exp().tolist(), strict=True)
            if shared[token] >= 0
        }
        known = row < 4 and bool(wanted)
        assert bool(made.known_N[row]) == known
        assert dense(made, row) == pytest.approx(wanted if known else {int(label[row]): 1.0}, rel=4 * EPS)
        outside = 1 - sum(wanted.values()) if known else 0.0
        assert float(made.tail_N[row].exp()) == pytest.approx(outside, rel=size * EPS, abs=size * EPS)


def test_shared_tokens_keep_the_share_with_which_they_are_written() -> None:
    """Token 3 is written as itself in 1 of 4 places, and what comes next all or nothing of it."""
    tokens, shared = shared_map(31)
    seen = tokens.with_choices(np.array([3, 3, 3, 6]), np.array([30, 30, 30, shared[6]]))
    logits = torch.randn(2, 31, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    p = logits.softmax(-1)
    label = torch.tensor([30, shared[6]])  # token 6 comes next: merged with others, and as it is
    ahead = following([6, 6], [0, 0], [True, True], p.log()[:, 6])
    made = shared_tokens(whole(logits, label), ahead, DeviceMap.of(seen))
    for row in range(2):
        share = dict.fromkeys(range(0, 31, 3), 1.0) | {3: 0.25, 6: float(row)}
        wanted = {shared[token]: float(p[row, token]) * part for token, part in share.items() if part}
        assert dense(made, row) == pytest.approx(wanted, rel=1e-6)
        assert float(made.tail_N[row].exp()) == pytest.approx(1 - sum(wanted.values()), rel=1e-6)
        assert made.logprob_NK[row].isfinite().sum() == len(wanted)
        assert bool((made.logprob_NK[row, : len(wanted)].diff() <= 0).all())


def test_the_loss_is_the_dense_one_where_there_is_a_row_and_that_of_the_label_elsewhere() -> None:
    """Value and gradient of the KL through the fused head, with 257 outputs and a teacher of 49,152
    tokens.
    """
    size = 49_152
    teacher, tokens = byte_map(size)
    generator = torch.Generator().manual_seed(5)
    logits = 3 * torch.randn(5, size, generator=generator, dtype=torch.float64)
    actual, depth, known = [40, 41, 42, 43, 44], [0, 0, 0, 0, 0], [True, False, True, True, False]
    label = torch.tensor([256 - teacher.texts[a][0] for a in actual])
    logprob = logits.log_softmax(-1)[torch.arange(5), torch.tensor(actual)]
    made = first_tokens(whole(logits, label), following(actual, depth, known, logprob), DeviceMap.of(tokens))
    hidden = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    weight = torch.randn(257, 7, generator=generator, dtype=torch.float64).requires_grad_()
    found = sparse_head_loss(
        hidden_ND=hidden,
        weight_VD=weight,
        bias_V=None,
        targets=made,
        terms=[(where_known(forward_kl), 1.0), (cross_entropy, 0.0)],
        transform=HeadTransform(),
        chunk=2,
    )
    (gradient,) = torch.autograd.grad(found.total, weight)
    log_q = (hidden @ weight.t()).log_softmax(-1)
    values = []
    for row in range(5):
        if not known[row]:
            values.append(-log_q[row, label[row]])
            continue
        p = pushed(teacher, logits[row].softmax(-1).tolist(), actual[row], 0)
        values.append(sum(v * (math.log(v) - log_q[row, token]) for token, v in p.items()))
    (wanted,) = torch.autograd.grad(torch.stack(values).sum(), weight)  # type: ignore[arg-type]
    torch.testing.assert_close(found.terms_SN[0], torch.stack(values).detach(), rtol=size * EPS, atol=1e-12)  # type: ignore[arg-type]
    torch.testing.assert_close(gradient, wanted, rtol=size * EPS, atol=1e-11)


def test_uld_compares_the_whole_head_whatever_is_shared() -> None:
    tokens, _ = shared_map(31)
    logits = torch.randn(1, 31, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    made = shared_tokens(
        whole(logits, torch.tensor([2])),
        following([3], [0], [True], torch.zeros(1, dtype=torch.float64)),
        DeviceMap.of(tokens),
    )
    hidden = torch.randn(1, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    weight = torch.randn(11, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    from student.losses.sparse import Reduction

    found = sparse_head_loss(
        hidden_ND=hidden,
        weight_VD=weight,
        bias_V=None,
        targets=made,
        terms=[(universal_logit, 1.0)],
        transform=HeadTransform(),
        reduction=Reduction(ranked=True),
    )
    p = logits[0].softmax(-1).sort(descending=True).values
    q = (hidden @ weight.t())[0].softmax(-1).sort(descending=True).values
    wanted = (p[:11] - q).abs().sum() + (p[:11] - q).sum().abs()
    assert float(found.terms_SN[0]) == pytest.approx(float(wanted), rel=1e-12)


def test_equal_columns_become_one() -> None:
    ids = torch.tensor([[4, 2, 4, 4, 2, 9, 4]])
    mass = torch.tensor([[0.1, 0.2, 0.0, 0.3, 0.05, 0.25, 0.1]])
    found_ids, found = merged(ids, mass)
    columns = {int(i): float(m) for i, m in zip(found_ids[0], found[0], strict=True) if m > 0}
    assert columns == pytest.approx({4: 0.5, 2: 0.25, 9: 0.25})
    assert int((found > 0).sum()) == 3
    assert int(found_ids[0, 0]) == 4


def test_rows_are_read_on_inside_a_token_as_far_as_its_text_is_cut_alike() -> None:
    """Teacher: [x][abc][d][e]; student of bytes; boundaries behind x, abc, d, e."""
    teacher = vocabulary([b"x", b"abc", b"d", b"e"])
    tokens = token_map(teacher, BYTES, None)  # type: ignore[arg-type]
    student = np.array([256 - byte for byte in b"xabcde"])
    pairs = np.array([[0, 0], [1, 3], [2, 4], [3, 5]])
    row, depth, actual = rows(pairs, np.arange(4), student, tokens)
    assert row.tolist() == [0, 0, 0, 1, 2, -1]
    assert depth.tolist() == [0, 1, 2, 0, 0, 0]
    assert actual.tolist() == [1, 1, 1, 2, 3, 0]
    # Where the student's tokens are not those of the token's own text, nothing is known behind the first.
    other = student.copy()
    other[2] = 256 - ord("z")
    assert rows(pairs, np.arange(4), other, tokens)[0].tolist() == [0, 0, -1, 1, 2, -1]
    # Without a boundary behind the second token, the row ends with it; what is before the first has none.
    fewer = rows(pairs[[1, 3]], np.arange(4), student, tokens)
    assert fewer[0].tolist() == [-1, -1, -1, 1, -1, -1]
    assert rows(np.zeros((0, 2), np.int64), np.arange(4), student, tokens)[0].tolist() == [-1] * 6


def test_of_rows_at_one_position_the_last_counts() -> None:
    """A special token that the student lacks adds nothing: what follows it is what the student predicts."""
    teacher = vocabulary([b"x", b"", b"abc"], {1: ("<x>",)})
    tokens = token_map(teacher, BYTES, None)  # type: ignore[arg-type]
    student = np.array([256 - byte for byte in b"xabc"])
    row, depth, actual = rows(np.array([[0, 0], [1, 0], [2, 3]]), np.arange(3), student, tokens)
    assert (row.tolist(), depth.tolist(), actual.tolist()) == ([1, 1, 1, -1], [0, 1, 2, 0], [2, 2, 2, 0])


def test_a_token_counts_for_what_was_read_in_its_places() -> None:
    """Of three places and the text's own first piece: a dense sum over what the student read there."""
    teacher, tokens = byte_map(31)
    seen = tokens.with_choices(np.array([5, 5, 5, 9]), np.array([7, 7, 300, 300]))
    piece = {token: 256 - teacher.texts[token][0] for token in (5, 9)}
    shares = {5: {7: 2 / 4, 300: 1 / 4, piece[5]: 1 / 4}, 9: {300: 1 / 2, piece[9]: 1 / 2}}
    for token, wanted in shares.items():
        found = zip(seen.choices_VR[token].tolist(), seen.shares_VR[token].tolist(), strict=True)
        assert {choice: share for choice, share in found if share} == pytest.approx(wanted)
    logits = torch.randn(1, 31, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    p = logits.softmax(-1)[0].tolist()
    sums: dict[int, float] = defaultdict(float)
    for token, mass in enumerate(p):
        if token == 1:
            continue
        if token == 11:  # what comes next counts for the label
            sums[400] += mass
            continue
        first = 256 - teacher.texts[token][0] if token else 0
        for choice, share in shares.get(token, {first: 1.0}).items():
            sums[choice] += share * mass
    ahead = following([11], [0], [True], logits.log_softmax(-1)[0, [11]])
    made = first_tokens(whole(logits, torch.tensor([400])), ahead, DeviceMap.of(seen))
    total = math.fsum(sums.values())
    assert dense(made, 0) == pytest.approx({token: mass / total for token, mass in sums.items()}, rel=1e-6)
    # Inside a token its own text counts.
    long = next(index for index, text in enumerate(teacher.texts) if len(text) >= 3)
    ahead = following([long], [1], [True], logits.log_softmax(-1)[0, [long]])
    label = torch.tensor([256 - teacher.texts[long][1]])
    made = first_tokens(whole(logits, label), ahead, DeviceMap.of(seen))
    assert dense(made, 0) == pytest.approx(pushed(teacher, p, long, 1))
