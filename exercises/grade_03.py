"""Graders of chapter 3."""
import math

import torch

from exercises.grading import expect, gradients, judge_property

# Small first, so that the first difference met is a small one. Sides need not grow, and may repeat:
# a mask that compares sides, or counts side instead of side * side, passes for some of these only.
SCHEDULES = [(1, 2), (2, 1), (1, 1, 1), (2, 2), (1, 2, 3), (3,), (1, 2, 2, 1), (2, 1, 3, 2)]


def scale_of_each(scales):
    """Written out, so that nothing of the chapter judges itself. (1, 2) -> [0, 1, 1, 1, 1]"""
    return [k for k, side in enumerate(scales) for _ in range(side * side)]


def mask_by_loops(scales):
    owner = scale_of_each(scales)
    return torch.tensor([[other <= mine for other in owner] for mine in owner])


def attention_by_loops(q, k, v, mask, factor):
    """One query at a time, over the keys it may look at. -> (B, heads, queries, d)"""
    rows = []
    for i in range(q.shape[2]):
        allowed = mask[i]
        scores = factor * (q[:, :, i:i + 1] * k[:, :, allowed]).sum(-1)          # (B, heads, keys)
        weights = torch.exp(scores - scores.amax(-1, keepdim=True))
        weights = weights / weights.sum(-1, keepdim=True)
        rows.append((weights[..., None] * v[:, :, allowed]).sum(2))
    return torch.stack(rows, dim=2)


def random_qkv(queries, keys, seed=0, dtype=torch.float64):
    """B = 2, 3 heads, d = 5: no two sizes that could be taken for each other."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (queries, keys, keys)
    return [torch.randn(2, 3, n, 5, generator=generator, dtype=torch.float64).to(dtype)
            for n in sizes]


def test_03_1(chapter):
    for scales in SCHEDULES:
        expect("block_causal_mask", chapter.block_causal_mask(scales), mask_by_loops(scales),
               scales=scales)


def equal_scores(queries, keys):
    """q = 0 makes all scores equal, v = the identity makes the result the table of weights."""
    size = (1, 1, keys, keys)
    return torch.zeros(1, 1, queries, keys), torch.ones(size), torch.eye(keys).view(size)


def gradients_of(function, tokens):
    """Of the sum of squares of attention(q, k, v), at q, k and v."""
    qkv = [x.requires_grad_() for x in random_qkv(*tokens)]
    return gradients("attention", function(*qkv) ** 2, *qkv)


def test_03_2(chapter):
    little = torch.tensor([[True, False, False], [True, False, True]])
    want = torch.tensor([[[[1, 0, 0], [0.5, 0, 0.5]]]])
    expect("the weights where all scores are equal",
           chapter.attention(*equal_scores(2, 3), little), want, mask=little)
    mask = torch.tensor([[True, False, False, False, False, False, True],
                         [True, True, False, False, False, True, False],
                         [False, True, True, True, True, True, True],
                         [True, True, True, True, True, True, True]])
    all_keys = torch.ones_like(mask)
    for given, used in ((None, all_keys), (mask, mask)):
        for qk_factor in (None, 0, 0.3, 1.0, 2.5):
            qkv, copies = random_qkv(4, 7), random_qkv(4, 7)
            factor = 1 / math.sqrt(5) if qk_factor is None else qk_factor
            name = f"attention with {'a' if given is not None else 'no'} mask"
            expect(name, chapter.attention(*qkv, given, qk_factor),
                   attention_by_loops(*copies, used, factor),
                   q=qkv[0], k=qkv[1], qk_factor=qk_factor)
            for letter, x, copy in zip("qkv", qkv, copies):
                assert torch.equal(x, copy), f"attention: the caller's {letter} was changed"
    for queries, keys in ((7, 7), (1, 4)):               # training; the first token of a cache
        q, k, v = random_qkv(queries, keys, seed=1)
        used = torch.ones(queries, keys, dtype=torch.bool)
        expect("attention with no mask", chapter.attention(q, k, v),
               attention_by_loops(q, k, v, used, 1 / math.sqrt(5)), q=q, k=k)

    # However large the score of a hidden key: it must get a weight of 0, and the rest must add
    # up to 1. A softmax over all keys, cleaned up afterwards, has nothing left to divide.
    q, k, v = random_qkv(4, 7, dtype=torch.float32)
    k[:, :, 2] *= 1000
    want = attention_by_loops(q.double(), k.double(), v.double(), mask, 1.0).float()
    expect("attention where one key is 1000 times as long as the others",
           chapter.attention(q, k, v, mask, 1.0), want, tolerance=1e-4)
    # bfloat16 keeps 8 bits.
    halves = [x.bfloat16() for x in random_qkv(4, 7)]
    for qk_factor in (0, 0.7):
        want = attention_by_loops(*[x.double() for x in halves], mask, qk_factor).bfloat16()
        expect("attention in bfloat16", chapter.attention(*halves, mask, qk_factor), want,
               tolerance=0.03, qk_factor=qk_factor)
    # The gradient tells whether something was cut off from it.
    got = gradients_of(lambda q, k, v: chapter.attention(q, k, v, mask, 0.7), (4, 7))
    want = gradients_of(lambda q, k, v: attention_by_loops(q, k, v, mask, 0.7), (4, 7))
    for letter, found, expected in zip("qkv", got, want):
        expect(f"gradient of the sum of squares of attention at {letter}", found, expected)


def test_03_3(chapter):
    want = mask_by_loops((1, 2)).float()
    want = want / want.sum(1, keepdim=True)
    expect("the weights where all scores are equal",
           chapter.block_causal_attention(*equal_scores(5, 5), (1, 2)), want.view(1, 1, 5, 5),
           scales=(1, 2))
    # The reference's groups hold up to 100 tokens: here (1, 7, 7), (10) and (2, 1), (3, 8) and (6).
    for scales in [*SCHEDULES, (1, 7, 7), (10, 2, 1), (3, 8, 6)]:
        mask = mask_by_loops(scales)
        for given in (None, mask):
            for qk_factor in (None, 0.3, 1.0):
                q, k, v = random_qkv(len(mask), len(mask), seed=len(mask))
                factor = 1 / math.sqrt(5) if qk_factor is None else qk_factor
                got = chapter.block_causal_attention(q, k, v, scales, given, qk_factor)
                expect("block_causal_attention", got,
                       attention_by_loops(q, k, v, mask, factor), scales=scales,
                       mask="None" if given is None else "given", qk_factor=qk_factor)

    # What is hidden must not be computed either: not-a-number in the last map would spread through
    # a product with its weight of 0. Within 100 tokens the reference does compute what is hidden.
    scales, coarse = (1, 3, 10), 10
    q, k, v = random_qkv(110, 110, dtype=torch.float32)
    for x in (q, k, v):
        x[:, :, coarse:] = torch.nan
    got = chapter.block_causal_attention(q, k, v, scales)
    assert got[:, :, :coarse].isfinite().all(), (
        "block_causal_attention computes products that a mask then hides. Cut keys and values to "
        "the prefix instead: k[:, :, :end]. (With scales = (1, 3, 10), not-a-number in the third "
        "scale came out at the first two.)")
    scales, mask = (2, 1, 3), mask_by_loops((2, 1, 3))
    got = gradients_of(lambda q, k, v: chapter.block_causal_attention(q, k, v, scales), (14, 14))
    want = gradients_of(lambda q, k, v: attention_by_loops(q, k, v, mask, 5 ** -0.5), (14, 14))
    for letter, found, expected in zip("qkv", got, want):
        expect(f"gradient of the sum of squares of block_causal_attention at {letter}",
               found, expected, scales=scales)
    expect_few_products(chapter, (1, 2, 3, 4, 6, 8))


def expect_few_products(chapter, scales):
    """No more products of queries and keys than one look of all tokens at all."""
    L, attention, products = len(scale_of_each(scales)), chapter.attention, []

    def counted(q, k, *others, **named):
        products.append(q.shape[2] * k.shape[2])
        return attention(q, k, *others, **named)

    chapter.attention = counted
    chapter.block_causal_attention(*random_qkv(L, L), scales)
    assert sum(products) <= L * L, (
        f"block_causal_attention computes {sum(products):,} products of queries and keys, more "
        f"than {L * L:,}, all tokens with all. Are queries of earlier scales computed again? "
        f"(scales = {scales})")


def test_03_property(chapter):
    judge_property(chapter.property_03, "03_1")
    # The first two are right in every number, the third as long as nobody passes a factor.
    judge_property(chapter.property_03, "03_3", unseen=(
        "computes what the mask then hides", "computes the queries of earlier scales again",
        "drops the caller's factor"))
