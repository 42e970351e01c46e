"""Graders of chapter 3."""
import math

import torch

from exercises.compare import Wrong, call, expect, expect_gradients, expect_like

# Small first, so that messages are short. Sides need not grow and may repeat: a mask that
# compares sides, or counts a side once, passes for some of these only.
SCHEDULES = [(1, 2), (2, 1), (1, 1, 1), (2, 2), (1, 2, 3), (3,), (1, 2, 2, 1), (2, 1, 3, 2)]


def mask_by_loops(scales):
    owner = [k for k, side in enumerate(scales) for _ in range(side * side)]
    return torch.tensor([[other <= mine for other in owner] for mine in owner])


def attention_by_loops(q, k, v, mask, factor):
    """One query at a time, over the keys it may attend to. -> (B, heads, queries, d)"""
    rows = []
    for i in range(q.shape[2]):
        scores = factor * (q[:, :, i:i + 1] * k[:, :, mask[i]]).sum(-1)  # (B, heads, keys)
        weights = torch.exp(scores - scores.amax(-1, keepdim=True))
        weights = weights / weights.sum(-1, keepdim=True)
        rows.append((weights[..., None] * v[:, :, mask[i]]).sum(2))
    return torch.stack(rows, dim=2)


def random_qkv(queries, keys, dtype=torch.float64):
    """B = 2, 3 heads, d = 5: no two sizes that could be taken for each other."""
    return [torch.randn(2, 3, n, 5).to(dtype) for n in (queries, keys, keys)]


def grade_03_1(chapter):
    for scales in SCHEDULES:
        got, want = call(chapter.block_causal_mask, scales), mask_by_loops(scales)
        triangle = torch.ones_like(want).tril()
        expect("block_causal_mask", got, want, slips={
            "it is a triangle, as for text; a token attends to its whole map": triangle})


def grade_03_2(chapter):
    q, k, v = torch.zeros(1, 1, 2, 3), torch.ones(1, 1, 3, 3), torch.eye(3)[None, None]
    little = torch.tensor([[True, False, False], [True, False, True]])
    expect("attention (all scores are 0, and v = the identity shows the weights)",
           call(chapter.attention, q, k, v, little),
           torch.tensor([[[[1, 0, 0], [0.5, 0, 0.5]]]]))
    mask = torch.tensor([[True, False, False, False, False, False, True],
                         [True, True, False, False, False, True, False],
                         [False, True, True, True, True, True, True],
                         [True, True, True, True, True, True, True]])
    for given, dtype, tolerance in (
            (None, torch.float64, 1e-5), (mask, torch.float64, 1e-5),
            (mask, torch.bfloat16, 0.03)):                 # which keeps 8 bits
        used = torch.ones_like(mask) if given is None else given
        for qk_factor in (None, 0, 0.3, 1.0, 2.5):
            qkv = random_qkv(4, 7, dtype)
            factor = 1 / math.sqrt(5) if qk_factor is None else qk_factor
            got = call(chapter.attention, *qkv, given, qk_factor)
            want = attention_by_loops(*[x.double() for x in qkv], used, factor)
            expect("attention", got, want.to(dtype), tolerance)
    # A hidden key gets no weight, however large its score and small those of the others.
    for size in (10., 1000.):
        q, k = torch.tensor([[size, 0.]]), torch.tensor([[-size, 0.], [5., 5.]])
        v, seen = torch.tensor([[1., 2.], [3., 4.]]), torch.tensor([[True, False]])
        got = call(chapter.attention, *(x[None, None] for x in (q, k, v)), seen, 1.0)
        expect("attention (the second key is hidden)", got, v[None, None, :1])
    q, k, v = (x.requires_grad_() for x in random_qkv(4, 7))
    expect_gradients("attention", chapter.attention(q, k, v, mask, 0.7),
                     attention_by_loops(q, k, v, mask, 0.7), q=q, k=k, v=v)


def grade_03_3(chapter):
    for scales in SCHEDULES:
        mask = mask_by_loops(scales)
        for qk_factor in (None, 0.3, 1.0):
            qkv = random_qkv(len(mask), len(mask))
            factor = 1 / math.sqrt(5) if qk_factor is None else qk_factor
            got = call(chapter.block_causal_attention, *qkv, scales, qk_factor)
            want = attention_by_loops(*qkv, mask, factor)
            expect_like(f"block_causal_attention ({len(mask)} tokens)", got, want)
            sizes = [side * side for side in scales]
            expect("block_causal_attention: rows_of_map", got.split(sizes, 2),
                   want.split(sizes, 2))
    scales, mask = (2, 1, 3), mask_by_loops((2, 1, 3))
    q, k, v = (x.requires_grad_() for x in random_qkv(14, 14))
    got = chapter.block_causal_attention(q, k, v, scales)
    want = attention_by_loops(q, k, v, mask, 5 ** -0.5)
    expect_gradients("block_causal_attention", got, want, q=q, k=k, v=v)

    attention, products = chapter.attention, []

    def counted(q, k, *others, **named):
        products.append(q.shape[2] * k.shape[2])
        return attention(q, k, *others, **named)

    chapter.attention = counted
    call(chapter.block_causal_attention, *random_qkv(14, 14), (1, 2, 3))
    if sum(products) > 147:                  # 1 * 1 + 4 * 5 + 9 * 14
        raise Wrong(f"block_causal_attention computes {sum(products)} query-key products; "
                    "147 are enough: compute each query once, with the keys of its prefix")
