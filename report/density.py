"""The other half of a generative model: how probable is an image?

An image's tokens have an exact probability under the transformer (chapter 6, log_likelihood). From
that follow
    a measure      -log2 p: bits per token, per scale, per pixel
    a classifier   Bayes' rule: p(class | tokens) ~ p(tokens | class) p(class), all classes alike
    a compressor   an arithmetic coder would need -log2 p bits for the tokens of each scale. After
                   each scale an image can be decoded: rate (bytes) against distortion (PSNR)

The tokenizer is many to one. These are probabilities of token maps, not of pixels: do not compare
them with the bits per dimension of models of pixels.

Shapes: nats (N, K), ln p of the tokens of each scale; db (N, K), the PSNR after each scale;
scales: the K sides of the maps; V codes.
"""
import io
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data.batches import per_pass, to_float
from engine.progress import progress
from report import health, plots


def density(out, tokenizer, weigh, image, labels, classes, names):
    """Bits, Bayes' rule and bytes of images (N, 3, H, W) in [-1, 1].

    weigh(tokens, labels (B,)) -> nats (B, K); labels: indices into `classes`, None if unknown;
    names: of all classes"""
    nats, db = likelihoods(tokenizer, weigh, image, [*classes, len(names)])      # last: no class
    scales, V = tokenizer.scales, tokenizer.config.vocab_size
    right = nats[:, :-1].sum(2).argmax(1) if labels is None else torch.tensor(labels)
    known = nats[torch.arange(len(nats)), right]                                 # (N, K)
    bits_table(known, nats[:, -1], scales, V, image.shape[-1])
    if labels is None and len(classes) > 1:
        posterior(nats[0, :-1], [names[c] for c in classes])
    elif len(classes) > 1:
        bayes(nats[:, :-1], right, scales)
    rate_distortion(out, image, known, db, scales, V, len(names))


@torch.no_grad()
def likelihoods(tokenizer, weigh, image, classes):
    """ln p(tokens of each scale | class), (N, classes, K), and PSNR after each scale, (N, K)"""
    device, db = next(tokenizer.parameters()).device, []

    def passes():
        for part in image.split(max(1, min(per_pass(image.shape[-1]), 100))):
            tokens = tokenizer.image_to_tokens(part.to(device))
            db.append(torch.stack([health.psnr(image, part)
                                   for image in health.decoded(tokenizer, tokens)], 1))
            for c in classes:
                yield weigh(tokens, torch.full_like(tokens[0][:, 0], c)).cpu()
    parts = list(progress(passes(), len(image) * len(classes), "images times classes"))
    n = len(classes)
    nats = torch.cat([torch.stack(parts[i:i + n], 1) for i in range(0, len(parts), n)])
    return nats, torch.cat(db)


def bits_table(known, none, scales, V, side):
    """Print bits per scale, token and pixel. known, none: nats (N, K) with the class given, and
    without a class; images of side x side pixels"""
    n, pixels, count = torch.tensor([s * s for s in scales]), side ** 2, len(known)
    known, none = (-x.double().mean(0) / math.log(2) for x in (known, none))     # (K,) bits

    def line(name, per_scale, total):
        print(f"    {name:<22}" + "".join(f"{x:>9}" for x in [*per_scale, total]))
    print(f"{count} image(s); without a model every token costs {math.log2(V):g} bits")
    line("side", [f"{s}x{s}" for s in scales], "all")
    line("tokens", n.tolist(), int(n.sum()))
    for name, bits in (("bits, class known", known), ("bits, no class", none)):
        line(name, [f"{x:.1f}" for x in bits], f"{bits.sum():.1f}")
    line("bits per token", [f"{x:.2f}" for x in known / n], f"{known.sum() / n.sum():.2f}")
    line("bits per pixel", [f"{x:.3f}" for x in known / pixels], f"{known.sum() / pixels:.3f}")
    if float(known.sum()) > math.log2(V) * int(n.sum()):
        print("more bits than without a model: it has never seen such images")


def bayes(nats, labels, scales):
    """Print how often the most probable class is the right one, judged by all scales or only by
    the coarse ones. nats (N, classes, K); labels (N,): which of these classes is right"""
    right = [float((nats[:, :, :k + 1].sum(2).argmax(1) == labels).double().mean())
             for k in range(nats.shape[2])]
    print(f"Bayes' rule names the class right for {right[-1]:.1%} of {len(labels)} images "
          f"(by chance {1 / nats.shape[1]:.1%})")
    print("    from scales up to " + ", ".join(
        f"{s}x{s}: {part:.1%}" for s, part in zip(scales, right)))


def posterior(nats, names):
    """Print the most probable classes of one image. nats (classes, K) -> p (classes,)"""
    p, best = nats.sum(1).softmax(0).sort(descending=True)
    print("p(class | tokens), all classes alike before: " + ", ".join(
        f"{names[i]} {x:.1%}" for i, x in zip(best[:5].tolist(), p.tolist())))


# -- Bytes against quality -------------------------------------------------------------------------

def file_bytes(picture, **how):
    """(bytes of the file, bytes without what every such file says alike, decoded picture) of a
    uint8 (H, W, 3) picture, through Pillow."""
    out = io.BytesIO()
    Image.fromarray(picture).save(out, **how)
    data = out.getvalue()
    if how["format"] == "JPEG":                            # scan data only: no tables, no headers
        start = data.rindex(b"\xff\xda")
        bare = len(data) - start - 2 - int.from_bytes(data[start + 2:start + 4], "big") - 2
    else:
        bare = len(data) - 20                              # WebP: the RIFF container
    return len(data), bare, np.array(Image.open(out).convert("RGB"))


def codec_curve(images, **how):
    """images uint8 (N, H, W, 3) -> (PSNR in dB, bytes of the file, bare bytes), means over the
    images."""
    made = [file_bytes(x, **how) for x in images]
    original, decoded = (to_float(torch.from_numpy(x)) for x in
                         (images, np.stack([m[2] for m in made])))
    db = float(health.psnr(decoded, original).mean())
    return db, np.mean([m[0] for m in made]), np.mean([m[1] for m in made])


def best(points):
    """Of points (bytes, dB) those that no smaller one equals, by size."""
    kept = []
    for size, db in sorted(points, key=lambda point: (point[0], -point[1])):
        if not kept or db > kept[-1][1]:
            kept.append((size, db))
    return kept


def at_size(curve, size):
    """PSNR at a size, on the line between the points [(bytes, dB)] of a curve that rises; nan where
    it does not reach."""
    sizes, values = zip(*curve)
    return float(np.interp(size, sizes, values, left=np.nan, right=np.nan))


def codec_curves(images):
    """JPEG and WebP at many qualities. images uint8 (N, H, W, 3) -> {name: [(bytes, dB), ...]}"""
    qualities = (1, 3, 6, 10, 15, 20, 30, 40, 50, 60, 70, 80, 90, 95)
    jpeg = [codec_curve(images, format="JPEG", quality=q, subsampling=colour)
            for q in qualities for colour in (0, 2)]       # 4:4:4 and 4:2:0, whichever is better
    webp = [codec_curve(images, format="WEBP", quality=q, method=6) for q in qualities]
    return {"JPEG": best((file, db) for db, file, _ in jpeg),
            "JPEG, no headers": best((bare, db) for db, _, bare in jpeg),
            "WebP, no container": best((bare, db) for db, _, bare in webp)}


def rate_distortion(out, image, nats, db, scales, V, classes):
    """Print a table and write rate_distortion.png: PSNR against bytes, beside JPEG and WebP.
    image (N, 3, H, W) in [-1, 1]; nats and db (N, K), the class given; classes: how many"""
    n = torch.tensor([s * s for s in scales])
    fixed = (n.cumsum(0) * math.ceil(math.log2(V)) / 8).tolist()
    # The receiver must be told the class too.
    ideal = ((-nats.double().mean(0) / math.log(2)).cumsum(0) + math.log2(classes)) / 8
    ideal, db = ideal.tolist(), db.double().mean(0).tolist()
    some = torch.arange(0, len(image), max(1, len(image) // 200))        # of all classes
    lines = codec_curves(plots.to_uint8((image[some] + 1) / 2))
    print("bytes per picture, and PSNR in dB; JPEG and WebP (Pillow) at the size of the ideal code")
    print(f"    {'scales up to':<14}{'fixed length':>14}{'ideal code':>12}{'PSNR':>8}"
          + "".join(f"{name:>20}" for name in lines))
    for k, side in enumerate(scales):
        others = [at_size(line, ideal[k]) for line in lines.values()]
        print(f"    {f'{side}x{side}':<14}{fixed[k]:>14.1f}{ideal[k]:>12.1f}{db[k]:>8.1f}"
              + "".join(f"{'-' if math.isnan(x) else f'{x:.1f}':>20}" for x in others))
    for name, line in lines.items():
        enough = np.interp(db[-1], *list(zip(*line))[::-1], right=np.nan)    # bytes for that PSNR
        there = at_size(line, fixed[-1])
        there = "" if math.isnan(there) else f"; {there:.1f} dB at {fixed[-1]:.0f} bytes"
        print(f"    {name}: from {line[0][0]:.0f} bytes ({line[0][1]:.1f} dB) on{there}; "
              + ("never as good as all scales" if math.isnan(enough) else
                 f"as good as all scales from {enough:.0f} bytes on"))
    path = Path(out) / "rate_distortion.png"
    plots.save_curve(path, {"tokens, ideal code": list(zip(ideal, db)),
                            "tokens, fixed length": list(zip(fixed, db)), **lines}, log="x",
                     size=(900, 480), y_label="PSNR, dB",
                     title="quality of the decoded picture",
                     x_label="bytes per picture; the decoders are not counted")
    print(f"wrote {path}")
