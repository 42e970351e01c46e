"""Chapter 3: who may look at whom.

A transformer that predicts the next *scale* must not look at finer scales; inside a scale everyone
may look at everyone, as all tokens of a map are predicted at once. That is a block-causal mask:

    scales (1, 2), 1 + 4 tokens           raster order, 5 blocks of one token
        1  2  2  2  2                         1  2  3  4  5
    1   x  .  .  .  .                     1   x  .  .  .  .
    2   x  x  x  x  x                     2   x  x  .  .  .
    2   x  x  x  x  x                     3   x  x  x  .  .
    2   x  x  x  x  x                     4   x  x  x  x  .
    2   x  x  x  x  x                     5   x  x  x  x  x

Block k looks at a *prefix*: blocks 1..k, all of them, nothing else. So no mask is needed when the
blocks come one after the other (attend to everything cached so far), and the dense mask can be
replaced by K small products over prefixes, which skip what is masked away (a third of the work).

Shapes: q, k, v (B, heads, L, d); scales (1, 2, 3, ...) sides; L = sum of squares.

Sources: VAR (Tian et al. 2024), section 3.1 and figure 4; attention as in Vaswani et al. 2017.

Differs from the original VAR code: the mask here is a bool, built in one line and tested; raster
order is the same function with scales (1, 1, 1, ...).

    python 03_block_causal_mask.py      checks the claims and writes out/03_block_causal_mask.png
"""
import numpy as np
import torch
import torch.nn.functional as F

from report import plots

MASKS = {}                                                 # (device, scales) -> (L, L) bool


def scale_of_token(scales):
    """Which scale each of the L tokens belongs to. (1, 2) -> 0 1 1 1 1, shape (L,) int64"""
    return torch.cat([torch.full((side * side,), k) for k, side in enumerate(scales)])


def block_causal_mask(scales):
    """(L, L) bool, True = may look: row i may look at column j if j's scale is not finer."""
    scale = scale_of_token(scales)
    return scale[:, None] >= scale[None, :]


def mask_on(device, scales):
    """The mask where it is needed, made once: a GPU would wait for every copy."""
    if (device, scales) not in MASKS:
        MASKS[device, scales] = block_causal_mask(scales).to(device)
    return MASKS[device, scales]


def dense_attention(q, k, v, scales, scale=None):
    """The reference: every product is computed, then the forbidden ones are masked away. `scale`
    multiplies q.k (None: 1/sqrt(d)). The softmax is written out because on a CPU its backward pass
    is faster than that of the fused kernel for short sequences. -> (B, heads, L, d)"""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    hidden = ~mask_on(q.device, tuple(scales))
    scores = (q * scale) @ k.transpose(-2, -1)             # (B, heads, L, L)
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v


def masked_attention(q, k, v, scales, scale=None):
    """The same numbers from one fused kernel. -> (B, heads, L, d)"""
    allowed = mask_on(q.device, tuple(scales))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scale)


def prefix_attention(q, k, v, scales, scale=None):
    """The same numbers without a mask: block after block over its prefix. -> (B, heads, L, d)"""
    outputs, begin = [], 0
    for side in scales:
        end = begin + side * side
        outputs.append(F.scaled_dot_product_attention(
            q[:, :, begin:end], k[:, :, :end], v[:, :, :end], scale=scale))
        begin = end
    return torch.cat(outputs, dim=2)


def block_causal_attention(q, k, v, scales, scale=None):
    """Attention under block_causal_mask(scales), exact, by a fast way. Short sequences are trained
    under the mask: computing what is hidden costs less than asking for many small products.
    q, k, v (B, heads, L, d), scale: factor on q.k (None: 1/sqrt(d)) -> (B, heads, L, d)"""
    if q.shape[2] <= 256 and len(scales) <= 16 and torch.is_grad_enabled():
        if q.device.type == "cpu":
            return dense_attention(q, k, v, scales, scale)
        return masked_attention(q, k, v, scales, scale)
    if len(scales) == q.shape[2]:                          # blocks of one token: plain causal
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return prefix_attention(q, k, v, scales, scale)


# -- Demo ------------------------------------------------------------------------------------------

def main():
    torch.manual_seed(0)
    scales = (1, 2, 3, 4)
    L = sum(s * s for s in scales)
    q, k, v = torch.randn(3, 1, 2, L, 8)
    masked = dense_attention(q, k, v, scales)

    finer = scale_of_token(scales) == 3                    # change everything at the finest scale
    k2, v2 = torch.where(finer[:, None], torch.randn(2, 1, 2, L, 8), torch.stack([k, v]))
    moved = (dense_attention(q, k2, v2, scales) - masked).abs().amax((0, 1, 3))
    print(f"finest scale changed: coarser outputs move by {float(moved[~finer].max())}, "
          f"the finest by {float(moved[finer].max()):.2f}")
    assert moved[~finer].max() == 0 and moved[finer].min() > 0

    cached, cache_k, cache_v = [], k[:, :, :0], v[:, :, :0]  # one scale at a time, no mask anywhere
    for part in range(len(scales)):
        here = scale_of_token(scales) == part
        cache_k = torch.cat([cache_k, k[:, :, here]], dim=2)
        cache_v = torch.cat([cache_v, v[:, :, here]], dim=2)
        cached.append(F.scaled_dot_product_attention(q[:, :, here], cache_k, cache_v))
    difference = float((torch.cat(cached, dim=2) - masked).abs().max())
    print(f"cache without a mask against the masked whole: largest difference {difference:.1e}")
    assert difference < 1e-5

    mask, raster = block_causal_mask(scales), block_causal_mask((1,) * L)
    assert torch.equal(raster, torch.ones(L, L).tril().bool())
    print(f"products: next-scale {int(mask.sum())}, raster {int(raster.sum())}, all {L * L}; "
          f"one after the other: next-scale {len(scales)} steps, raster {L}")
    images = [plots.heat_map(m.float().numpy()) for m in (mask, raster)]
    plots.save_grid("out/03_block_causal_mask.png", np.stack(images), columns=2,
                       scale=9, column_labels=["next scale: 1 4 9 16", "raster: 30 blocks of 1"])
    print("wrote out/03_block_causal_mask.png: row looks at column where it is yellow")


if __name__ == "__main__":
    main()
