"""Chapter 3: who may look at whom.

A transformer that predicts the next *scale* must not look at finer scales; inside a scale everyone
may look at everyone. This leaks nothing: the positions of map k hold f_hat_{k-1}, which was rebuilt
from the coarser maps alone, at the size of map k, and never map k itself. The tokens of map k are
predicted at once, each independently of the others, given the coarser maps.

    scales (1, 2), 1 + 4 tokens           raster order, 5 blocks of one token
        1  2  2  2  2                         1  2  3  4  5
    1   x  .  .  .  .                     1   x  .  .  .  .
    2   x  x  x  x  x                     2   x  x  .  .  .
    2   x  x  x  x  x                     3   x  x  x  .  .
    2   x  x  x  x  x                     4   x  x  x  x  .
    2   x  x  x  x  x                     5   x  x  x  x  x

Block k looks at a *prefix*: blocks 1..k, all of them, nothing else. So sampling needs no mask: keys
and values of the blocks done so far are cached, and the new block attends to all of them. Training
can go through the same prefixes, and skips the third of the products that a mask would hide.
The order of the cells inside a map does not matter: attention knows only what stands in a position.

Shapes: q, k, v (B, heads, L, d); scales (1, 2, 3, ...) sides; L = sum of squares.

Sources: VAR (Tian et al. 2024), section 3.1 and figure 4; attention as in Vaswani et al. 2017.

Differs from the original VAR code: the mask is a bool, built in one line; raster order is the same
function with scales (1, 1, 1, ...).

    python 03_block_causal_mask.py      checks the claims and writes out/03_block_causal_mask.png
"""
import numpy as np
import torch
import torch.nn.functional as F

from report import plots


def scale_of_token(scales):
    """Which scale each of the L tokens belongs to. (1, 2) -> 0 1 1 1 1, shape (L,) int64, on the
    CPU, also where a model is being built without memory."""
    return torch.cat([torch.full((side * side,), k, device="cpu")
                      for k, side in enumerate(scales)])


def block_causal_mask(scales):
    """(L, L) bool, True = may look: row i may look at column j if j's scale is not finer."""
    scale = scale_of_token(scales)
    return scale[:, None] >= scale[None, :]


def attention(q, k, v, mask=None, qk_factor=None):
    """softmax(qk_factor q.k) v over the keys where `mask` (queries, keys) is True; None: over all.
    qk_factor None: 1/sqrt(d). -> the shape of q"""
    if q.dtype != torch.bfloat16 or q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=qk_factor)
    # On CPUs the fused kernel is two times slower in bfloat16 than the formula, four backwards.
    scores = (q * (qk_factor or q.shape[-1] ** -0.5)) @ k.transpose(-2, -1)
    scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v


def block_causal_attention(q, k, v, scales, mask=None, qk_factor=None):
    """The same as attention(q, k, v, block_causal_mask(scales), qk_factor), by prefixes. `mask`,
    (L, L), saves making it. Small scales share a product, up to 100 tokens, under their rows of
    the mask: computing what is hidden costs less than asking for many small products."""
    groups = []                                            # (1, 2, 3, 4, 6, 8) -> [5 sides], [8]
    for side in scales:
        if groups and sum(s * s for s in groups[-1]) + side * side <= 100:
            groups[-1].append(side)
        else:
            groups.append([side])
    sizes = [sum(s * s for s in group) for group in groups]
    mask = block_causal_mask(scales).to(q.device) if mask is None else mask
    outputs, end = [], sum(sizes)
    # The last prefix first, each a slice of the one before: a slice's gradient is written at the
    # size of what it was cut from, so cutting all from the whole would write 61 tensors of full
    # size at ten scales (L = 680); this writes 16.
    for group, size, part in zip(groups[::-1], sizes[::-1], q.split(sizes, dim=2)[::-1]):
        k, v = k[:, :, :end], v[:, :, :end]
        rows = None if len(group) == 1 else mask[end - size:end, :end]
        outputs.append(attention(part, k, v, rows, qk_factor))
        end -= size
    return torch.cat(outputs[::-1], dim=2)


# -- Demo ------------------------------------------------------------------------------------------

def main():
    torch.manual_seed(0)
    scales = (1, 2, 3, 4)
    mask, scale = block_causal_mask(scales), scale_of_token(scales)
    q, k, v = torch.randn(3, 1, 2, len(scale), 8)
    masked = attention(q, k, v, mask)

    finest = scale == 3                                    # change everything at the finest scale
    k2, v2 = torch.where(finest[:, None], torch.randn(2, 1, 2, len(scale), 8), torch.stack([k, v]))
    moved = (attention(q, k2, v2, mask) - masked).abs().amax((0, 1, 3))
    print(f"finest scale changed: coarser outputs move by {float(moved[~finest].max())}, "
          f"the finest by {float(moved[finest].max()):.2f}")
    assert moved[~finest].max() == 0 and moved[finest].min() > 0

    cached = [attention(q[:, :, scale == i], k[:, :, scale <= i], v[:, :, scale <= i])
              for i in range(len(scales))]                 # one scale at a time, no mask
    difference = float((torch.cat(cached, dim=2) - masked).abs().max())
    print(f"cache without a mask against the masked whole: largest difference {difference:.1e}")
    assert difference < 1e-5

    print("one 8x8 map     steps   products cached   not cached")
    for name, blocks in (("next scale", (1, 2, 3, 4, 6, 8)), ("raster", (1,) * 64)):
        seen = block_causal_mask(blocks).sum(1)            # without a cache, each step computes
        again = int((seen.unique() ** 2).sum())            # its whole prefix again
        print(f"{name:<12} {len(blocks):8} {int(seen.sum()):17,} {again:12,}")
    raster = torch.zeros_like(mask)
    raster[:16, :16] = block_causal_mask((1,) * 16)
    assert torch.equal(raster[:16, :16], torch.ones(16, 16).tril().bool())
    images = [plots.heat_map(m.float().numpy()) for m in (mask, raster)]
    plots.save_grid("out/03_block_causal_mask.png", np.stack(images), columns=2, scale=9,
                    column_labels=["next scale: 1 4 9 16", "raster: 16 blocks of 1"])
    print("wrote out/03_block_causal_mask.png: row looks at column where it is yellow")


if __name__ == "__main__":
    main()
