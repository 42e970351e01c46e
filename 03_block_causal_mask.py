"""Chapter 3: who may look at whom.

A transformer that predicts the next *scale* must not look at finer scales; inside a scale everyone
may look at everyone. This leaks nothing: the positions of map k hold f_hat_{k-1}, rebuilt from the
coarser maps alone and resized to the size of map k, never map k itself. The tokens of map k are
predicted at once, each independently of the others, given the coarser maps. That is the model's
assumption: p(map k | coarser maps) is the product over its tokens, in any order. Neighbours fit
together because what they must agree on is settled in the coarser maps, which all of them see.

    scales (1, 2), 1 + 4 tokens           raster order, 5 maps of one token
        1  2  2  2  2                         1  2  3  4  5
    1   x  .  .  .  .                     1   x  .  .  .  .
    2   x  x  x  x  x                     2   x  x  .  .  .
    2   x  x  x  x  x                     3   x  x  x  .  .
    2   x  x  x  x  x                     4   x  x  x  x  .
    2   x  x  x  x  x                     5   x  x  x  x  x

The tokens of a map form one block of the mask, hence its name. Map k looks at a *prefix*: at maps
1..k and nothing else. So sampling needs no mask: the keys and values of earlier maps are cached,
and the new map attends to all of them. Training can also go from prefix to prefix, which skips most
of the products that a mask would hide.

Shapes: q, k, v (B, heads, L, d); scales (1, 2, 3, ...) sides; L = sum of squares.

Raster order loses in four ways (VAR, section 3.1): a token is predicted before those to its right
and below, on which it also depends; so an image cannot be completed from its lower part; cells that
touch are a row apart; and n x n tokens take n x n steps.

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
    """Which scale each of the L tokens belongs to. (1, 2) -> 0 1 1 1 1, shape (L,) int64"""
    return torch.cat([torch.full((side * side,), k) for k, side in enumerate(scales)])


def block_causal_mask(scales):
    """(L, L) bool, True = may look: row i may look at column j if j's scale is not finer."""
    # Exercise 03_1
    scale = scale_of_token(scales)
    return scale[:, None] >= scale[None, :]


def attention(q, k, v, mask=None, qk_factor=None):
    """softmax(qk_factor q.k) v over the keys where `mask` (queries, keys) is True, None: over all.
    qk_factor None: 1/sqrt(d). -> (B, heads, queries, d)"""
    # Exercise 03_2
    if q.dtype != torch.bfloat16 or q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=qk_factor)
    # In bfloat16 on a CPU the fused kernel is slower than the formula.
    qk_factor = q.shape[-1] ** -0.5 if qk_factor is None else qk_factor
    scores = qk_factor * q @ k.transpose(-2, -1)
    scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v


def block_causal_attention(q, k, v, scales, mask=None, qk_factor=None):
    """What attention() gives under block_causal_mask(scales), prefix by prefix. `mask` (L, L) may
    be passed so that it is not built again. -> (B, heads, L, d)"""
    # Exercise 03_3
    mask = block_causal_mask(scales).to(q.device) if mask is None else mask
    # Small scales, up to 100 tokens, share one product under their rows of the mask: computing what
    # is hidden costs less than many small products. (1, 2, 3, 4, 6, 8) -> (1, 2, 3, 4, 6), (8)
    groups = []
    for side in scales:
        if groups and sum(s * s for s in groups[-1]) + side * side <= 100:
            groups[-1].append(side)
        else:
            groups.append([side])
    sizes = [sum(s * s for s in group) for group in groups]
    # The last prefix comes first and each is a slice of the one before, because the gradient of a
    # slice has the size of what it was cut from: with the ten scales of the paper 16 tensors of
    # full size are written backwards, and 61 if every prefix is cut from the whole.
    outputs, end = [], sum(sizes)
    for group, size, part in zip(groups[::-1], sizes[::-1], q.split(sizes, dim=2)[::-1]):
        k, v = k[:, :, :end], v[:, :, :end]
        rows = mask[end - size:end, :end] if len(group) > 1 else None
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

    print("an 8x8 map     steps   query-key products: cached   without a cache")
    for name, sides in (("next scale", (1, 2, 3, 4, 6, 8)), ("raster", (1,) * 64)):
        seen = block_causal_mask(sides).sum(1)             # by each token
        again = int((seen.unique() ** 2).sum())            # every step computes its whole prefix
        print(f"{name:<12} {len(sides):7} {int(seen.sum()):28,} {again:17,}")
    print("with a cache, raster computes fewer products, but in 64 steps that wait for each other")

    images = [plots.heat_map(block_causal_mask(s).numpy()) for s in (scales, (1,) * 16)]
    images[1] = np.pad(images[1], ((0, 14), (0, 14), (0, 0)), constant_values=255)   # white
    plots.save_grid("out/03_block_causal_mask.png", np.stack(images), columns=2, scale=9,
                    column_labels=["next scale: 1 4 9 16", "raster: 16 maps of 1"])
    print("wrote out/03_block_causal_mask.png: row looks at column where it is yellow")


if __name__ == "__main__":
    main()
