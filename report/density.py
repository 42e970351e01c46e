"""The other half of a generative model: not only pictures, but how probable a picture is.

A picture's tokens have an exact probability under the transformer (chapter 6, log_likelihood), and
that makes of it
    a measure      -log2 p: bits per token, per scale, per pixel
    a classifier   Bayes' rule: p(class | tokens) ~ p(tokens | class) p(class), all classes alike
    a compressor   an arithmetic coder would need -log2 p bits for the tokens of each scale: after
                   each scale a picture can be decoded, so bytes buy quality (rate and distortion)

The tokenizer is many to one: these are probabilities of token maps, not of pixels, and no figure
here can be compared with the bits per dimension of models that see every pixel.
"""
import io
import math

import numpy as np
import torch
from PIL import Image

from engine import BadInput
from report import health, plots
from data.batches import per_pass, rows_of, stack, to_float
from engine.progress import progress


def density(studio):
    """Bits, Bayes' rule, bytes: tables on the terminal and rate_distortion.png. Of --image, or of
    held-out pictures; among --classes, or all."""
    among = studio.classes if studio.args.classes else list(range(len(studio.names)))
    image, labels = pictures_to_weigh(studio, among)
    nats, after = likelihoods(studio, image, [*among, len(studio.names)])
    total = nats[:, :-1].sum(2)                            # (N, classes)
    meant = (total.argmax(1) if studio.args.image else     # whose class nobody has told
             torch.tensor([among.index(label) for label in labels]))
    given = nats[torch.arange(len(nats)), meant]
    bits_table(studio, given, nats[:, -1])
    if float(-given.sum(1).mean()) > studio.var.L * math.log(studio.var.config.vocab_size):
        print("more than without a model: it has not seen such pictures")
    if studio.args.image and len(among) > 1:
        p, best = total[0].softmax(0).sort(descending=True)
        print("p(class | tokens), all classes alike before: " + ", ".join(
            f"{studio.names[among[i]]} {x:.1%}" for i, x in zip(best[:5].tolist(), p.tolist())))
    elif len(among) > 1:
        bayes(studio, nats[:, :-1], meant)
    rate_distortion(studio, image, given, after)


def pictures_to_weigh(studio, among):
    """--image, or --n held-out pictures of these classes. -> (N, 3, H, W) in [-1, 1], labels"""
    if studio.args.image:
        return studio.pictures(1)
    images, labels = studio.load("test")
    rows = np.flatnonzero(np.isin(labels, among))
    if len(rows) == 0:
        raise BadInput("none of the held-out pictures is of these classes")
    rows = rows[rows_of(len(rows), studio.args.n or max(1, 5000 // len(among)))]
    return to_float(stack([images[int(i)] for i in rows])), labels[rows].tolist()


@torch.no_grad()
def likelihoods(studio, image, classes):
    """ln p(tokens of each scale | class), (N, classes, K), and the PSNR after each scale, (N, K)"""
    after, size = [], max(1, min(per_pass(studio.side), 100))

    def passes():
        for part in image.split(size):
            maps = studio.tokenizer.image_to_tokens(part.to(studio.device))
            steps = studio.pyramid(maps)
            after.append(torch.stack([health.psnr(x * 2 - 1, part.cpu()) for x in steps], 1))
            for c in classes:
                yield studio.log_likelihood(maps, torch.full_like(maps[0][:, 0], c)).cpu()
    parts = list(progress(passes(), len(image) * len(classes), "pictures times classes"))
    n = len(classes)
    nats = torch.cat([torch.stack(parts[i:i + n], 1) for i in range(0, len(parts), n)])
    return nats, torch.cat(after)


def bits_table(studio, given, none):
    """given, none (N, K): ln p of each scale's tokens, the class known or not"""
    scales, V = studio.tokenizer.scales, studio.tokenizer.config.vocab_size
    n, pixels, count = torch.tensor([s * s for s in scales]), studio.side ** 2, len(given)
    given, none = (-x.double().mean(0) / math.log(2) for x in (given, none))     # (K,) bits

    def line(name, per_scale, total):
        print(f"    {name:<22}" + "".join(f"{x:>9}" for x in [*per_scale, total]))
    print(f"{count} picture(s); without a model every token costs {math.log2(V):g} bits")
    line("side", [f"{s}x{s}" for s in scales], "all")
    line("tokens", n.tolist(), int(n.sum()))
    for name, bits in (("bits, class known", given), ("bits, no class", none)):
        line(name, [f"{x:.1f}" for x in bits], f"{bits.sum():.1f}")
    line("bits per token", [f"{x:.2f}" for x in given / n], f"{given.sum() / n.sum():.2f}")
    line("bits per pixel", [f"{x:.3f}" for x in given / pixels], f"{given.sum() / pixels:.3f}")


def bayes(studio, nats, labels):
    """The class of highest p(class | tokens), with all of them or only those of coarse scales.
    nats (N, classes, K); labels (N,), indices into them"""
    right = [float((nats[:, :, :k + 1].sum(2).argmax(1) == labels).double().mean())
             for k in range(nats.shape[2])]
    print(f"Bayes' rule names the class right for {right[-1]:.1%} of {len(labels)} pictures "
          f"(by chance {1 / nats.shape[1]:.1%})")
    print("    from scales up to " + ", ".join(
        f"{s}x{s}: {part:.1%}" for s, part in zip(studio.tokenizer.scales, right)))


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
    pictures."""
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


def rate_distortion(studio, chosen, nats, after):
    """Table and chart. chosen (N, 3, H, W) in [-1, 1]; nats, after (N, K): ln p of each scale's
    tokens given the class, and PSNR after it."""
    scales, V = studio.tokenizer.scales, studio.tokenizer.config.vocab_size
    n = torch.tensor([s * s for s in scales])
    fixed = (n.cumsum(0) * math.ceil(math.log2(V)) / 8).tolist()
    # The receiver must be told the class too.
    ideal = ((-nats.double().mean(0) / math.log(2)).cumsum(0) + math.log2(len(studio.names))) / 8
    ideal, db = ideal.tolist(), after.double().mean(0).tolist()
    some = torch.arange(0, len(chosen), max(1, len(chosen) // 200))      # of all classes
    images = plots.to_uint8((chosen[some] + 1) / 2)
    steps = (1, 3, 6, 10, 15, 20, 30, 40, 50, 60, 70, 80, 90, 95)
    jpeg = [codec_curve(images, format="JPEG", quality=q, subsampling=colour)
            for q in steps for colour in (0, 2)]           # 4:4:4 and 4:2:0, whichever is better
    webp = [codec_curve(images, format="WEBP", quality=q, method=6) for q in steps]
    lines = {"JPEG": best((file, db) for db, file, _ in jpeg),
             "JPEG, no headers": best((bare, db) for db, _, bare in jpeg),
             "WebP, no container": best((bare, db) for db, _, bare in webp)}
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
    limit = 6 * fixed[-1]
    series = {"tokens, ideal code": list(zip(ideal, db)), "fixed length": list(zip(fixed, db))}
    series |= {name: [point for point in line if point[0] < limit] for name, line in lines.items()}
    path = studio.out / "rate_distortion.png"
    plots.save_curve(path, series, size=(900, 480), y_label="PSNR, dB",
                        title="quality of the decoded picture", x_label="bytes per picture")
    print(f"wrote {path}")
