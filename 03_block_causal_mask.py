"""Chapter 3: who may attend to whom.

Some generative models are built to turn noise into an image (GAN, diffusion), others around
the probability of an image x. An autoregressive one predicts each part of x from all parts
before it (x_<t: all before t, r_<k: all maps before k):
    p(x) = prod_t p(x_t | x_<t)                            text, token by token
    p(r_1..r_K | class) = prod_k p(r_k | r_<k, class)      VAR, map by map, where
    p(r_k | r_<k, class) = prod_i p(r_k[i] | r_<k, class)  i runs over the tokens of map k
Teacher forcing: training conditions on real parts, so one pass yields every factor.

A token map is predicted in one step. Its positions may attend to each other and to all
coarser maps, but never to finer ones:

    scales (1, 2): 1 + 4 tokens              raster order: 5 maps of one token each
                       1  2  2  2  2                1  2  3  4  5
    start   -> r_1  1  x  .  .  .  .             1  x  .  .  .  .
    f_hat_1 -> r_2  2  x  x  x  x  x             2  x  x  .  .  .
    f_hat_1 -> r_2  2  x  x  x  x  x             3  x  x  x  .  .
    f_hat_1 -> r_2  2  x  x  x  x  x             4  x  x  x  x  .
    f_hat_1 -> r_2  2  x  x  x  x  x             5  x  x  x  x  x

The positions of map k hold f_hat_{k-1}, rebuilt from the coarser maps and resized, never
r_k itself. Attending within a map therefore leaks nothing, and it helps: each position
holds a different place of f_hat_{k-1}. The tokens of map k are still drawn independently;
neighbours fit if the coarser maps have settled what they must agree on.

Map k attends to a *prefix*: maps 1 to k and nothing else. Sampling therefore needs no mask:
a cache holds the keys and values of all maps so far, and the newest map attends to them.

The paper argues that raster order has four weaknesses: a token also depends on tokens to
its right and below, which come later; the top of an image cannot be filled in afterwards;
cells that touch vertically are a row apart in the sequence; n x n tokens take n x n steps.

Shapes: q, k, v (B, heads, L, d); scales (1, 2, 3, ...), the map sides; L = sum of squares.
Sources: VAR (Tian et al. 2024), section 3, figure 4; attention from Vaswani et al. 2017.
Differs from the original code: a bool mask; raster order is the case scales (1, 1, ...),
with the code of the token before as input (experiments/order.py).

    python 03_block_causal_mask.py    checks the claims, writes out/03_block_causal_mask.png
"""
import torch
import torch.nn.functional as F


def scale_of_token(scales):
    """The scale each of the L tokens belongs to. (1, 2) -> 0 1 1 1 1, shape (L,), int64"""
    return torch.cat([torch.full((side * side,), k) for k, side in enumerate(scales)])


def block_causal_mask(scales):
    """(L, L) bool: True where token i (row) may attend to token j (column), that is, where
    the scale of j is not finer than that of i."""
    # Exercise 03_1
    scale = scale_of_token(scales)                                    # (L,)
    return scale[:, None] >= scale[None, :]                           # (L, L)


def attention(q, k, v, mask=None, qk_factor=None):
    """softmax(qk_factor q.k) v over the keys where `mask` (queries, keys) is True; over all
    keys if it is None. A qk_factor of None means 1/sqrt(d). -> (B, heads, queries, d)"""
    # Exercise 03_2
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=qk_factor)


def block_causal_attention(q, k, v, scales, qk_factor=None):
    """What attention() returns under block_causal_mask(scales), computed without a mask:
    the queries of each map attend to a prefix, as with a cache. -> (B, heads, L, d)"""
    # Exercise 03_3
    outputs, begin = [], 0
    for side in scales:
        end = begin + side * side
        queries, keys, values = q[:, :, begin:end], k[:, :, :end], v[:, :, :end]
        outputs.append(attention(queries, keys, values, qk_factor=qk_factor))
        begin = end
    return torch.cat(outputs, dim=2)


# -- Demo ----------------------------------------------------------------------------------

def compare_orders():
    """Query-key products needed to sample an 8x8 map. For n x n tokens they grow as n^4,
    but as n^6 in raster order without a cache, which recomputes the prefix at each step."""
    print("an 8x8 map     steps   query-key products: cached   without a cache")
    for name, scales in (("next scale", (1, 2, 3, 4, 6, 8)), ("raster", (1,) * 64)):
        cached = uncached = end = 0
        for side in scales:
            end += side * side
            cached += side * side * end            # the new queries with all keys so far
            uncached += end * end                  # all queries so far with the same keys
        print(f"{name:<12} {len(scales):7} {cached:28,} {uncached:17,}")
        assert cached == block_causal_mask(scales).sum()
    print("cached, raster order needs fewer products, but in 64 steps, one after another")


def main():
    from report import plots
    torch.manual_seed(0)
    scales = (1, 2, 3, 4)
    mask, finest = block_causal_mask(scales), scale_of_token(scales) == 3
    q, k, v = torch.randn(3, 1, 2, len(mask), 8)                     # (B, heads, L, d) each
    masked = attention(q, k, v, mask)
    new_k = torch.where(finest[:, None], torch.randn_like(k), k)
    new_v = torch.where(finest[:, None], torch.randn_like(v), v)
    moved = (attention(q, new_k, new_v, mask) - masked).abs().amax((0, 1, 3))        # (L,)
    print(f"finest scale changed: coarser outputs move by {float(moved[~finest].max())}, "
          f"the finest by {float(moved[finest].max()):.2f}")
    assert moved[~finest].max() == 0 and moved[finest].min() > 0

    difference = float((block_causal_attention(q, k, v, scales) - masked).abs().max())
    print(f"prefix by prefix without a mask: largest difference {difference:.1e}")
    assert difference < 1e-5

    compare_orders()
    masks = torch.stack([mask, block_causal_mask((1,) * 30)])
    labels = ["next scale: 1 + 4 + 9 + 16 tokens", "raster: 30 tokens"]
    plots.save_grid("out/03_block_causal_mask.png", {"": plots.heat_map(masks, 0, 1)},
                    column_labels=labels, scale=9,
                    footer="Yellow: the row's token attends to the column's token.")


if __name__ == "__main__":
    main()
