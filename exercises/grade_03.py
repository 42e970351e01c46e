"""Graders of chapter 3."""
import math

import torch

from exercises.compare import Wrong, call, case, expect, gradients
from exercises.grading import judge_property

# Small first, so that the first difference found is a small one. Sides need not grow and may
# repeat: a mask that compares sides, or counts a side once, passes for some of these only.
SCHEDULES = [(1, 2), (2, 1), (1, 1, 1), (2, 2), (1, 2, 3), (3,), (1, 2, 2, 1), (2, 1, 3, 2)]


def scale_of_each(scales):
    """(1, 2) -> [0, 1, 1, 1, 1]"""
    return [k for k, side in enumerate(scales) for _ in range(side * side)]


def mask_by_loops(scales):
    owner = scale_of_each(scales)
    return torch.tensor([[other <= mine for other in owner] for mine in owner])


def attention_by_loops(q, k, v, mask, factor):
    """One query at a time, over the keys it may attend to. -> (B, heads, queries, d)"""
    rows = []
    for i in range(q.shape[2]):
        scores = factor * (q[:, :, i:i + 1] * k[:, :, mask[i]]).sum(-1)        # (B, heads, keys)
        weights = torch.exp(scores - scores.amax(-1, keepdim=True))
        weights = weights / weights.sum(-1, keepdim=True)
        rows.append((weights[..., None] * v[:, :, mask[i]]).sum(2))
    return torch.stack(rows, dim=2)


def random_qkv(queries, keys, dtype=torch.float64):
    """B = 2, 3 heads, d = 5: no two sizes that could be taken for each other."""
    return [torch.randn(2, 3, n, 5, dtype=torch.float64).to(dtype)
            for n in (queries, keys, keys)]


def equal_scores(queries, keys):
    """q = 0 makes all scores equal; v, the identity, makes the result the table of weights."""
    size = (1, 1, keys, keys)
    return torch.zeros(1, 1, queries, keys), torch.ones(size), torch.eye(keys).view(size)


def expect_gradients(name, function, slow, queries, keys):
    """The gradients of the sum of squares, at q, k and v."""
    qkv = [x.requires_grad_() for x in random_qkv(queries, keys)]
    found, wanted = (gradients(name, f(*qkv) ** 2, *qkv) for f in (function, slow))
    for letter, got, want in zip("qkv", found, wanted):
        expect(f"the gradient of {name}.square().sum() at {letter}", got, want)


def grade_03_1(chapter):
    for scales in SCHEDULES:
        want = mask_by_loops(scales)
        triangle = torch.ones_like(want).tril()
        expect("block_causal_mask", call(chapter.block_causal_mask, scales), want,
               slips={"it is a triangle, as for text; a token attends to all of its own map, "
                      "also to tokens after it": triangle})


def grade_03_2(chapter):
    little = torch.tensor([[True, False, False], [True, False, True]])
    expect("attention (q = 0, so all scores are equal; v is the identity)",
           call(chapter.attention, *equal_scores(2, 3), little),
           torch.tensor([[[[1, 0, 0], [0.5, 0, 0.5]]]]))
    mask = torch.tensor([[True, False, False, False, False, False, True],
                         [True, True, False, False, False, True, False],
                         [False, True, True, True, True, True, True],
                         [True, True, True, True, True, True, True]])
    for given, used in ((None, torch.ones_like(mask)), (mask, mask)):
        for qk_factor in (None, 0, 0.3, 1.0, 2.5):
            qkv = random_qkv(4, 7)
            factor = 1 / math.sqrt(5) if qk_factor is None else qk_factor
            expect("attention", call(chapter.attention, *qkv, given, qk_factor),
                   attention_by_loops(*qkv, used, factor))
    for queries, keys in ((7, 7), (1, 4)):               # training; the first token of a cache
        qkv, everything = random_qkv(queries, keys), torch.ones(queries, keys).bool()
        expect("attention", call(chapter.attention, *qkv),
               attention_by_loops(*qkv, everything, 5 ** -0.5))
    # However large the score of a hidden key and small that of the others: it gets no weight.
    # A softmax over all keys, cleaned up afterwards, has nothing left to divide.
    for size in (10., 1000.):
        q, k = torch.tensor([[size, 0.]]), torch.tensor([[-size, 0.], [5., 5.]])
        v, seen = torch.tensor([[1., 2.], [3., 4.]]), torch.tensor([[True, False]])
        got = call(chapter.attention, *(x[None, None] for x in (q, k, v)), seen, 1.0)
        expect("attention (the second key is hidden)", got, v[None, None, :1])
    # bfloat16 keeps 8 bits.
    halves = random_qkv(4, 7, torch.bfloat16)
    for qk_factor in (0, 0.7):
        want = attention_by_loops(*[x.double() for x in halves], mask, qk_factor).bfloat16()
        expect("attention in bfloat16", call(chapter.attention, *halves, mask, qk_factor), want,
               tolerance=0.03)
    expect_gradients("attention", lambda *qkv: chapter.attention(*qkv, mask, 0.7),
                     lambda *qkv: attention_by_loops(*qkv, mask, 0.7), 4, 7)


def expect_rows(got, want, scales):
    """Compare scale by scale, so that a message says whose rows are wrong."""
    if not torch.is_tensor(got) or got.shape != want.shape:
        expect(f"block_causal_attention (dimension 2: a row for each of {want.shape[2]} tokens)",
               got, want)
    begin = 0
    for k, side in enumerate(scales):
        end = begin + side * side
        expect(f"block_causal_attention, the rows of map {k + 1} ([:, :, {begin}:{end}])",
               got[:, :, begin:end], want[:, :, begin:end])
        begin = end


def grade_03_3(chapter):
    want = mask_by_loops((1, 2)).float()
    got = call(chapter.block_causal_attention, *equal_scores(5, 5), (1, 2))
    expect_rows(got, (want / want.sum(1, keepdim=True))[None, None], (1, 2))
    for scales in SCHEDULES:
        mask = mask_by_loops(scales)
        for qk_factor in (None, 0.3, 1.0):
            qkv = random_qkv(len(mask), len(mask))
            factor = 1 / math.sqrt(5) if qk_factor is None else qk_factor
            got = call(chapter.block_causal_attention, *qkv, scales, qk_factor)
            expect_rows(got, attention_by_loops(*qkv, mask, factor), scales)

    # What is hidden must not be computed: not-a-number would spread through a weight of 0.
    scales = (1, 2, 3)
    qkv = random_qkv(14, 14)
    for x in qkv:
        x[:, :, 5:] = torch.nan
    case(scales=scales)
    if not chapter.block_causal_attention(*qkv, scales)[:, :, :5].isfinite().all():
        raise Wrong("block_causal_attention computes products that a mask then hides: cut keys "
                    "and values to the prefix, k[:, :, :end] (not-a-number in map 3 came out "
                    "at maps 1 and 2)")
    scales, mask = (2, 1, 3), mask_by_loops((2, 1, 3))
    expect_gradients("block_causal_attention",
                     lambda *qkv: chapter.block_causal_attention(*qkv, scales),
                     lambda *qkv: attention_by_loops(*qkv, mask, 5 ** -0.5), 14, 14)
    expect_few_products(chapter, (1, 2, 3, 4, 6, 8))


def expect_few_products(chapter, scales):
    """No more query-key products than all tokens with all."""
    L, attention, products = len(scale_of_each(scales)), chapter.attention, []

    def counted(q, k, *others, **named):
        products.append(q.shape[2] * k.shape[2])
        return attention(q, k, *others, **named)

    chapter.attention = counted
    call(chapter.block_causal_attention, *random_qkv(L, L), scales)
    if sum(products) > L * L:
        raise Wrong(f"block_causal_attention computes {sum(products):,} query-key products, more "
                    f"than {L * L:,}, all tokens with all: are queries of earlier maps computed "
                    "again?")


def grade_03_property(chapter):
    judge_property(chapter.property_03, "03_1")
    # The first two are right in every number, the third as long as nobody passes a factor.
    judge_property(chapter.property_03, "03_3", unseen=(
        "computes what the mask then hides", "computes the queries of earlier scales again",
        "drops the caller's factor"))
