"""Is the tokenizer healthy? What each scale does, measured over whole sets of images.

    side          1x1    2x2    3x3    4x4    6x6    8x8
    codes used    12%    40%    45%    64%    61%    99%   share of the codebook that occurs here
    perplexity     29    130    157    231    159    418   as many codes, if all were used equally
    energy left 72.0%  61.2%  51.7%  35.6%  28.0%   2.6%   of the feature map f, after this scale
    psnr, dB     15.7   16.9   17.9   20.7   22.6   30.4   of the image decoded after this scale

A 1x1 map sees one vector per image, so few codes there are normal. Few codes at a *large* scale are
codebook collapse, which longer training does not cure.
"""
import torch

from data.batches import per_pass, to_float
from report import plots


def psnr(image, other, keep=None):
    """Peak signal-to-noise ratio in dB of images (B, 3, H, W) in [-1, 1], one per image: (B,).
    keep (H, W) bool: only of these pixels."""
    error = (image.clamp(-1, 1) - other.clamp(-1, 1)).square()                     # (B, 3, H, W)
    return decibels(error.mean((1, 2, 3)) if keep is None else error[:, :, keep].mean((1, 2)))


def decibels(error):
    """Mean squared error of values in [-1, 1] -> PSNR in dB: 10 log10(range^2 / error), range 2"""
    return 10 * torch.log10(4 / error.clamp(min=1e-10))


def count_codes(tokens, vocab_size):
    """How often each code occurs at each scale. tokens: list of K (B, n_k) -> (K, V) int64"""
    return torch.stack([torch.bincount(t.flatten(), minlength=vocab_size) for t in tokens])


def usage(counts):
    """counts (K, V) -> dict: shares of codes used, perplexities exp(-sum p ln p), both per scale
    and overall."""
    counts = counts.cpu()                                  # Apple GPUs have no float64
    # Of 2**24 codes few occur: only their counts become numbers of 8 bytes.
    seen = [row[row > 0].double() for row in [*counts, counts.sum(0)]]
    p = [part / part.sum() for part in seen]
    perplexity = [float(torch.exp(-(part * part.log()).sum())) for part in p]
    used = [len(part) / counts.shape[1] for part in seen]
    return dict(used=used[:-1], used_overall=used[-1],
                perplexity=perplexity[:-1], perplexity_overall=perplexity[-1])


@torch.no_grad()
def examine(tokenizer, batches, autocast):
    """Health over batches of images (B, 3, H, W) in [-1, 1]. autocast() makes the context in which
    the network runs. -> dict: usage() and, per scale, `left` (share of the energy of f that is
    still missing) and `psnr_after` (mean over the images, dB); `psnr` is that of the last."""
    counts, left, energy, db, n = 0, 0, 0, 0, 0
    for image in batches:
        with autocast():
            f = tokenizer.encode(image)
        f = f.float()
        tokens = tokenizer.quantize(f)
        steps = tokenizer.pyramid(tokens)
        with autocast():
            seen = [psnr(image, tokenizer.decode(f_hat).float()).sum() for f_hat in steps]
        counts = counts + count_codes(tokens, tokenizer.config.vocab_size)
        left = left + torch.stack([(f - f_hat).square().sum() for f_hat in steps]).cpu().double()
        energy = energy + f.square().sum().cpu().double()
        db, n = db + torch.stack(seen).cpu().double(), n + len(image)
    db = (db / n).tolist()
    return dict(psnr=db[-1], **usage(counts), left=(left / energy).tolist(), psnr_after=db)


def check_up(tokenizer, held_out, device, autocast, path=None):
    """Examine the tokenizer on held-out images, uint8 (N, H, W, 3), and draw ten of them
    into the file `path`. autocast: as in `examine`. -> the report as text, what `examine` found"""
    images = (to_float(part.to(device)) for part in held_out.split(per_pass(held_out.shape[1])))
    numbers = examine(tokenizer, images, autocast)
    if path:
        some = held_out[::max(1, len(held_out) // 10)][:10]      # test sets are sorted by class
        save_picture(path, tokenizer, to_float(some.to(device)))
    return describe(tokenizer, numbers, len(held_out)), numbers


def short(scales, health):
    """For the log line: 'used 100% (1: 14% 2: 33% ... 8: 100%)'."""
    each = " ".join(f"{side}: {part:.0%}" for side, part in zip(scales, health["used"]))
    return f"used {health['used_overall']:.0%} ({each})"


def table(scales, health):
    """The lines shown at the top of this file, for the log."""
    rows = [("side", [f"{side}x{side}" for side in scales]),
            ("codes used", [f"{x:.0%}" for x in health["used"]]),
            ("perplexity", [f"{x:.0f}" for x in health["perplexity"]]),
            ("energy left", [f"{x:.1%}" for x in health["left"]]),
            ("psnr, dB", [f"{x:.1f}" for x in health["psnr_after"]])]
    wide = max(7, *[len(x) + 2 for _, cells in rows for x in cells])
    return "\n".join(f"    {name:<12}" + "".join(x.rjust(wide) for x in cells)
                     for name, cells in rows)


def warnings(tokenizer, health, images_seen):
    """What is wrong, in words, and which setting to try. -> list of lines, empty if all is well

    A scale has collapsed when it has more than 16 tokens, saw at least 4 V vectors, and still uses
    less than a fifth of the V codes."""
    config, lines = tokenizer.config, []
    V = config.vocab_size
    for k, side in enumerate(config.scales):
        enough = images_seen * side * side >= 4 * V
        if side * side > 16 and enough and health["used"][k] < 0.2:
            lines.append(f"warning: scale {side}x{side} has collapsed, {health['used'][k]:.0%} of "
                         f"{V} codes in use; try another --quantizer, --set learn=ema, a smaller "
                         "--tokenizer-lr or a smaller --vocab-size")
        if k and config.residual and health["left"][k] > health["left"][k - 1] + 0.01:
            lines.append(f"warning: scale {side}x{side} makes the features worse, not better (left "
                         f"{health['left'][k - 1]:.0%} -> {health['left'][k]:.0%}); train longer, "
                         "or try a larger vq_weight or a smaller --tokenizer-lr")
    return lines


def describe(tokenizer, numbers, images):
    """The report on held-out images as text; adds its warnings to `numbers`, what `examine` found.
    images: how many there were"""
    numbers["warnings"] = warnings(tokenizer, numbers, images)
    tokens = images * sum(side * side for side in tokenizer.scales)
    most = min(1, tokens / tokenizer.config.vocab_size)    # each token can be one code at most
    possible = "" if most == 1 else f" ({most:.0%} possible)"
    return "\n".join([f"psnr {numbers['psnr']:.2f} dB | used {numbers['used_overall']:.0%} of the "
                      f"codes{possible} | {images} images", table(tokenizer.scales, numbers),
                      *numbers["warnings"]])


@torch.no_grad()
def decoded(tokenizer, tokens):
    """The image after each scale: tokens -> K images (B, 3, H, W) in [-1, 1], on the CPU"""
    return [tokenizer.decode(f_hat).float().clamp(-1, 1).cpu()
            for f_hat in tokenizer.pyramid(tokens)]


@torch.no_grad()
def save_picture(path, tokenizer, image):
    """One sheet: real images, what is decoded after each scale, and where the last one errs.
    image (B, 3, H, W) in [-1, 1]; of large ones only the first few are shown."""
    image = image[:max(4, min(10, 640 // image.shape[-1]))]
    rows = [image.cpu(), *decoded(tokenizer, tokenizer.image_to_tokens(image))]
    names = [f"after {side}x{side}, {psnr(rows[0], row).mean():.1f} dB"
             for side, row in zip(tokenizer.scales, rows[1:])]
    error = (rows[-1] - rows[0]).abs().mean(1) / 2         # 1 is black for white
    heat = plots.heat_maps(error, 0, 0.2)
    plots.save_grid(path, torch.cat([*((row + 1) / 2 for row in rows), heat]), len(image),
                    row_labels=["real", *names, "error, 0 to 20 %"])
