"""Is the tokenizer healthy? What each scale does, measured on held-out images.

    side          1x1    2x2    3x3    4x4    6x6    8x8
    codes used    12%    40%    45%    64%    61%    99%   share of the codebook that occurs
    perplexity     29    130    157    231    159    418   as many codes, all equally often
    psnr, dB     15.7   16.9   17.9   20.7   22.6   30.4   of the image decoded so far

A 1x1 map sees one vector per image, so few codes there are normal. Few codes at a *large*
scale mean codebook collapse, which longer training does not cure.
"""
import torch

from data.batches import per_pass, to_float
from report import plots


def psnr(image, other, keep=None):
    """Peak signal-to-noise ratio, 10 log10(range^2 / mean squared error), of images
    (B, 3, H, W) in [-1, 1], or of the pixels in keep (H, W) bool -> (B,) in dB"""
    error = (image.clamp(-1, 1) - other.clamp(-1, 1)).square()           # (B, 3, H, W)
    if keep is not None:
        error = error[:, :, keep]                                        # (B, 3, pixels)
    return 10 * torch.log10(4 / error.flatten(1).mean(1).clamp(min=1e-10))


def count_codes(tokens, vocab_size):
    """tokens: list of K (B, n_k) -> how often each code occurs at each scale, (K, V)"""
    return torch.stack([torch.bincount(t.flatten(), minlength=vocab_size) for t in tokens])


def usage(counts):
    """counts (K, V) -> dict: the share of codes used and the perplexity, exp(-sum p ln p),
    for each scale and for all scales together"""
    counts = torch.cat([counts, counts.sum(0)[None]]).double()           # (K + 1, V)
    used = (counts > 0).double().mean(1).tolist()
    p = counts / counts.sum(1, keepdim=True)
    perplexity = torch.special.entr(p).sum(1).exp().tolist()             # entr: -p ln p
    return dict(used=used[:-1], used_overall=used[-1],
                perplexity=perplexity[:-1], perplexity_overall=perplexity[-1])


@torch.no_grad()
def examine(tokenizer, batches, autocast):
    """Health over batches of images (B, 3, H, W) in [-1, 1]. autocast() makes the context
    in which the networks run. -> dict: usage(); `psnr_after` each scale in dB; and `psnr`,
    its last value"""
    counts, db = 0, []
    for image in batches:
        with autocast():
            tokens = tokenizer.image_to_tokens(image)
            found = decoded(tokenizer, tokens)                           # K (B, 3, H, W)
        counts = counts + count_codes(tokens, tokenizer.config.vocab_size)
        db.append(torch.stack([psnr(image.cpu(), rebuilt) for rebuilt in found]))   # (K, B)
    db = torch.cat(db, 1).double().mean(1).tolist()
    return dict(psnr=db[-1], **usage(counts), psnr_after=db)


def check_up(tokenizer, held_out, device, autocast, path):
    """Examine the tokenizer on held-out images, uint8 (N, H, W, 3), and draw some of them
    into the file `path`. -> a report as text, the dict of examine()"""
    some = held_out[::max(1, len(held_out) // 10)][:10]                  # of all classes
    save_picture(path, tokenizer, to_float(some.to(device)))
    parts = held_out.split(per_pass(held_out.shape[1]))
    health = examine(tokenizer, (to_float(part.to(device)) for part in parts), autocast)
    used, scales, V = health["used"][-1], tokenizer.scales, tokenizer.config.vocab_size
    lines = [f"psnr {health['psnr']:.2f} dB | used {health['used_overall']:.0%} of the "
             f"codes | {len(held_out)} images",
             "    side        " + "".join(f"{f'{side}x{side}':>8}" for side in scales)]
    for name, key, form in (("codes used", "used", ".0%"),
                            ("perplexity", "perplexity", ".0f"),
                            ("psnr, dB", "psnr_after", ".1f")):
        lines.append(f"    {name:<12}" + "".join(f"{x:>8{form}}" for x in health[key]))
    if used < 0.2 and len(held_out) * scales[-1] ** 2 >= 4 * V:          # it saw enough
        lines.append(f"warning: the last scale has collapsed, {used:.0%} of {V} codes are "
                     "in use; try --learn ema, or a smaller --tokenizer-lr or --vocab-size")
    return "\n".join(lines), health


def short(scales, health):
    """For the log line: "used 100% (1: 14% 2: 33% ... 8: 100%)" """
    each = " ".join(f"{side}: {part:.0%}" for side, part in zip(scales, health["used"]))
    return f"used {health['used_overall']:.0%} ({each})"


@torch.no_grad()
def decoded(tokenizer, tokens):
    """The image after each scale: tokens -> K images (B, 3, H, W) in [-1, 1], on the CPU"""
    return [tokenizer.decode(f_hat).float().clamp(-1, 1).cpu()
            for f_hat in tokenizer.pyramid(tokens)]


@torch.no_grad()
def save_picture(path, tokenizer, image):
    """One sheet: the images, what is decoded after each scale, and where the last one errs.
    image (B, 3, H, W) in [-1, 1]; only the first few are shown if they are large."""
    image = image[:max(4, 640 // image.shape[-1])]
    found = decoded(tokenizer, tokenizer.image_to_tokens(image))
    image = image.cpu()
    rows = {"original": image / 2 + 0.5}
    for side, row in zip(tokenizer.scales, found):
        rows[f"after {side}x{side}, {psnr(image, row).mean():.1f} dB"] = row / 2 + 0.5
    error = (found[-1] - image).abs().mean(1) / 2          # 1: black in place of white
    plots.save_grid(path, rows | {"error, 0 to 20 %": plots.heat_map(error, 0, 0.2)})
