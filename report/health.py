"""Is the tokenizer healthy? What each scale does, measured on held-out images.

    side          1x1    2x2    3x3    4x4    6x6    8x8
    codes used    12%    40%    45%    64%    61%    99%   share of the codebook that occurs
    perplexity     29    130    157    231    159    418   as many codes, all equally often
    energy left 72.0%  61.2%  51.7%  35.6%  28.0%   2.6%   of the feature map f, afterwards
    psnr, dB     15.7   16.9   17.9   20.7   22.6   30.4   of the image decoded so far

A 1x1 map sees one vector per image, so few codes there are normal. Few codes at a *large*
scale mean codebook collapse, which longer training does not cure.
"""
import torch

from data.batches import per_pass, to_float
from report import plots


def psnr(image, other, keep=None):
    """Peak signal-to-noise ratio of images (B, 3, H, W) in [-1, 1], or of the pixels in
    keep (H, W) bool -> (B,) in dB"""
    error = (image.clamp(-1, 1) - other.clamp(-1, 1)).square()           # (B, 3, H, W)
    error = error.flatten(2) if keep is None else error[:, :, keep]      # (B, 3, pixels)
    return decibels(error.mean((1, 2)))


def decibels(error):
    """Mean squared error of values in [-1, 1] -> PSNR in dB, 10 log10(range^2 / error)"""
    return 10 * torch.log10(4 / error.clamp(min=1e-10))


def count_codes(tokens, vocab_size):
    """tokens: list of K (B, n_k) -> how often each code occurs at each scale, (K, V)"""
    return torch.stack([torch.bincount(t.flatten(), minlength=vocab_size) for t in tokens])


def usage(counts):
    """counts (K, V) -> dict: the share of codes used and the perplexity, exp(-sum p ln p),
    for each scale and for all scales together"""
    used, perplexity = [], []
    for row in [*counts, counts.sum(0)]:
        p = row[row > 0].double() / row.sum()
        used.append(len(p) / len(row))
        perplexity.append(float(torch.exp(-(p * p.log()).sum())))
    return dict(used=used[:-1], used_overall=used[-1],
                perplexity=perplexity[:-1], perplexity_overall=perplexity[-1])


@torch.no_grad()
def examine(tokenizer, batches, autocast):
    """Health over batches of images (B, 3, H, W) in [-1, 1]. autocast() makes the context
    in which the networks run. -> dict: usage(); for each scale `left`, the share of the
    energy of f that is still missing, and `psnr_after` in dB; and `psnr`, its last value"""
    counts, left, energy, db, n = 0, 0, 0, 0, 0
    for image in batches:
        with autocast():
            f = tokenizer.encode(image)
        f = f.float()                                                    # (B, C, h, w)
        tokens = tokenizer.quantize(f)
        steps = tokenizer.pyramid(tokens)                                # K (B, C, h, w)
        with autocast():
            seen = [psnr(image, tokenizer.decode(f_hat).float()).sum() for f_hat in steps]
        counts = counts + count_codes(tokens, tokenizer.config.vocab_size)
        left = left + torch.stack([(f - f_hat).square().sum() for f_hat in steps]).double()
        energy = energy + f.square().sum().double()
        db = db + torch.stack(seen).double()
        n += len(image)
    db = (db / n).tolist()
    return dict(psnr=db[-1], **usage(counts), left=(left / energy).tolist(), psnr_after=db)


def check_up(tokenizer, held_out, device, autocast, path=None):
    """Examine the tokenizer on held-out images, uint8 (N, H, W, 3), and draw ten of them
    into the file `path`. -> a report as text, the dict of examine() with `warnings`"""
    parts = held_out.split(per_pass(held_out.shape[1]))
    health = examine(tokenizer, (to_float(part.to(device)) for part in parts), autocast)
    health["warnings"] = warnings(tokenizer.config, health, len(held_out))
    if path:
        some = held_out[::max(1, len(held_out) // 10)][:10]              # of all classes
        save_picture(path, tokenizer, to_float(some.to(device)))
    line = (f"psnr {health['psnr']:.2f} dB | used {health['used_overall']:.0%} of the codes"
            f" | {len(held_out)} images")
    return "\n".join([line, *table(tokenizer.scales, health), *health["warnings"]]), health


def short(scales, health):
    """For the log line: "used 100% (1: 14% 2: 33% ... 8: 100%)" """
    each = " ".join(f"{side}: {part:.0%}" for side, part in zip(scales, health["used"]))
    return f"used {health['used_overall']:.0%} ({each})"


def table(scales, health):
    """-> the lines shown at the top of this file"""
    rows = [("side", [f"{side}x{side}" for side in scales]),
            ("codes used", [f"{x:.0%}" for x in health["used"]]),
            ("perplexity", [f"{x:.0f}" for x in health["perplexity"]]),
            ("energy left", [f"{x:.1%}" for x in health["left"]]),
            ("psnr, dB", [f"{x:.1f}" for x in health["psnr_after"]])]
    return [f"    {name:<12}" + "".join(f"{x:>8}" for x in cells) for name, cells in rows]


def warnings(config, health, images):
    """-> what is wrong, a line each. A scale has collapsed if it has more than 16 tokens,
    saw at least 4 V vectors, and still uses less than a fifth of the V codes."""
    V, lines = config.vocab_size, []
    for k, side in enumerate(config.scales):
        used, left = health["used"][k], health["left"]
        if side * side > 16 and images * side * side >= 4 * V and used < 0.2:
            lines.append(f"warning: scale {side}x{side} has collapsed, {used:.0%} of {V} "
                         "codes are in use; try --learn ema, or a smaller --tokenizer-lr or "
                         "--vocab-size")
        if k and config.residual and left[k] > left[k - 1] + 0.01:
            lines.append(f"warning: scale {side}x{side} makes the features worse (energy "
                         f"left {left[k - 1]:.0%} -> {left[k]:.0%}); train longer, or try a "
                         "smaller --tokenizer-lr")
    return lines


@torch.no_grad()
def decoded(tokenizer, tokens):
    """The image after each scale: tokens -> K images (B, 3, H, W) in [-1, 1], on the CPU"""
    return [tokenizer.decode(f_hat).float().clamp(-1, 1).cpu()
            for f_hat in tokenizer.pyramid(tokens)]


@torch.no_grad()
def save_picture(path, tokenizer, image):
    """One sheet: the images, what is decoded after each scale, and where the last one errs.
    image (B, 3, H, W) in [-1, 1]; only the first few of large ones are shown."""
    image = image[:max(4, min(10, 640 // image.shape[-1]))]
    rows = [image.cpu(), *decoded(tokenizer, tokenizer.image_to_tokens(image))]
    names = [f"after {side}x{side}, {psnr(rows[0], row).mean():.1f} dB"
             for side, row in zip(tokenizer.scales, rows[1:])]
    error = (rows[-1] - rows[0]).abs().mean(1) / 2         # 1: black in place of white
    shown = [*((row + 1) / 2 for row in rows), plots.heat_maps(error, 0, 0.2)]
    plots.save_grid(path, torch.cat(shown), len(image),
                    row_labels=["original", *names, "error, 0 to 20 %"])
