"""What does one token do? Change one token of map k, keep all others, and look.

    python experiments/one_token.py                                        shapes

The token in the middle of map k becomes its nearest other code or a random one. In the last
row the finer maps are quantized again: they see what is missing now and correct it.
"""
import torch

from trial import Trial, run_main, training, trial_parser
from data.batches import sample_of, to_float
from report import plots


def changed(tokenizer, f, tokens, k, code, again):
    """tokens with the middle one of map k replaced by `code` (B,); again: quantize finer
    maps of f (B, C, h, w) anew. -> image (B, 3, H, W) in [-1, 1]"""
    side = tokenizer.scales[k]
    tokens = [map_k.clone() for map_k in tokens]
    tokens[k][:, (side // 2) * side + side // 2] = code
    f_hat = tokenizer.pyramid(tokens)[k]
    for finer in range(k + 1, tokenizer.K if again else 0):
        rest = tokenizer.downsample_to(f - f_hat, finer)               # (B, n, C)
        tokens[finer] = tokenizer.quantizer.nearest(rest)
        f_hat = f_hat + tokenizer.embed(finer, tokens[finer])
    return tokenizer.tokens_to_image(tokens)


@torch.no_grad()
def main():
    trial = Trial("one_token", trial_parser(__doc__, "shapes", n=500).parse_args())
    tokenizer, _ = training.load_tokenizer(trial.shipped)
    image = to_float(sample_of(trial.data["test"][0], trial.args.n))   # (B, 3, H, W)
    f, generator = tokenizer.encode(image), torch.Generator().manual_seed(0)
    tokens = tokenizer.quantize(f)
    before = tokenizer.tokens_to_image(tokens)
    codes = tokenizer.quantizer.codebook                               # (V, C)
    neighbour = torch.cdist(codes, codes).fill_diagonal_(torch.inf).argmin(1)
    images, rows = {}, {}
    sides = [f"{side}x{side}" for side in tokenizer.scales]
    for way in ("nearest code", "random code", "random code, finer maps again"):
        heat = []
        for k, side in enumerate(tokenizer.scales):
            old = tokens[k][:, (side // 2) * side + side // 2]         # (B,)
            new = neighbour[old] if way == "nearest code" else torch.randint(
                len(codes), old.shape, generator=generator)
            after = changed(tokenizer, f, tokens, k, new, "again" in way)
            heat.append((after - before).abs().mean((0, 1)) / 2)       # (H, W)
        heat = torch.stack(heat)                                       # (K, H, W)
        rows[way] = [dict(zip(sides, 100 * heat.mean((1, 2)).numpy()))]
        images[way] = plots.heat_map((heat + 0.001).log10(), -3, -1)
    trial.show("mean change of a pixel, % of the range",
               {side: (side, 2) for side in sides}, rows)
    trial.draw(images, column_labels=sides, footer="How much a pixel changes, on average, if "
               "the middle token of one map changes.\nDark: 0.1 % of the range, green: 1 %, "
               "yellow: 10 %.")


if __name__ == "__main__":
    run_main(main)
