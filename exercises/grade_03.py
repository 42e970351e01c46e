"""Graders of chapter 3."""
import math

import torch

from exercises.compare import Wrong, call, expect

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
    # A hidden key gets no weight, however large its score and small those of the others.
    for size in (10., 1000.):
        q, k = torch.tensor([[size, 0.]]), torch.tensor([[-size, 0.], [5., 5.]])
        v, seen = torch.tensor([[1., 2.], [3., 4.]]), torch.tensor([[True, False]])
        got = call(chapter.attention, *(x[None, None] for x in (q, k, v)), seen, 1.0)
        expect("attention (the second key is hidden)", got, v[None, None, :1])
    mask = torch.rand(4, 7) < 0.5
    mask[:, 2] = True
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


def grade_03_3(chapter):
    for scales in SCHEDULES:
        mask = mask_by_loops(scales)
        for qk_factor in (None, 0.3, 1.0):
            qkv = random_qkv(len(mask), len(mask))
            factor = 1 / math.sqrt(5) if qk_factor is None else qk_factor
            got = call(chapter.block_causal_attention, *qkv, scales, qk_factor)
            want = attention_by_loops(*qkv, mask, factor)
            expect("block_causal_attention (image, head, token, channel)", got, want)

    attention, products = chapter.attention, []

    def counted(q, k, *others, **named):
        products.append(q.shape[2] * k.shape[2])
        return attention(q, k, *others, **named)

    chapter.attention = counted
    call(chapter.block_causal_attention, *random_qkv(14, 14), (1, 2, 3))
    if sum(products) > 147:                  # 1 * 1 + 4 * 5 + 9 * 14
        raise Wrong(f"block_causal_attention computes {sum(products)} query-key products; "
                    "147 are enough: compute each query once, with the keys of its prefix")
