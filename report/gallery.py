"""Pictures of what a model does: samples, guidance, token maps, edits, attention, entropy.

Each function is given images and a model, and writes PNGs into the folder `out`. What a model has
painted is (N, 3, H, W) in [0, 1]; `names` are the class names of the images."""
import math
import zipfile
from pathlib import Path

import numpy as np
import torch

from engine import BadInput
from engine.files import written_whole
from report import health, plots


def save(out, name, images, columns, **labels):
    """One sheet, `columns` images in a row. labels: those of plots.save_grid()."""
    path = Path(out) / f"{name}.png"
    plots.save_grid(path, images, columns, **labels)
    print(f"wrote {path}")


# -- Samples ---------------------------------------------------------------------------------------

def samples(out, batches, n, names):
    """n images for each name, in one sheet; of more than 16, in a sheet for each name. `batches`
    are tensors (B, 3, H, W), name after name, which are not kept longer than needed.
    names: number of a class -> its name."""
    sheet, waiting = None, list(names)
    for batch in batches:
        batch = plots.to_uint8(batch)
        sheet = batch if sheet is None else np.concatenate([sheet, batch])
        while n > 16 and len(sheet) >= n:                  # one class is complete
            c = waiting.pop(0)
            name = "".join(letter if letter.isalnum() else "_" for letter in names[c])
            save(out, f"samples_{c}_{name}", sheet[:n], math.ceil(math.sqrt(n)))
            sheet = sheet[n:]
    if n <= 16:
        save(out, "samples", sheet, n, row_labels=list(names.values()))


def coarse_to_fine(out, tokenizer, tokens, names):
    """Scale after scale: the token map just added beside the image decoded from all maps so far;
    as a sheet and as a film. tokens: K maps (B, h_k*w_k)"""
    scales, frames = tokenizer.scales, []
    for side, tokens_k, image in zip(scales, tokens, health.decoded(tokenizer, tokens)):
        colours = plots.token_colours(tokens_k, side, tokenizer.config.vocab_size)
        frames.append(plots.cells([x for pair in zip(colours, (image + 1) / 2) for x in pair]))
    save(out, "coarse_to_fine", torch.cat(frames), 2 * len(names), scale=1,
         column_labels=[text for name in names for text in (name, "so far")],
         row_labels=[f"{side}x{side}" for side in scales],
         footer=plots.legend("Under a class name: the token map of this scale; a colour stands for "
                             "the number of a code.\nBeside it: the image decoded from all maps "
                             "down to this row."))
    film = [plots.to_uint8(torch.cat(list(frame), 2)[None])[0] for frame in frames]
    path = Path(out) / "coarse_to_fine.gif"
    plots.save_gif(path, film + [film[-1]] * 3, 500)
    print(f"wrote {path}")


def guidance(out, rows, name, default):
    """One class, drawn with the same random numbers at several strengths of guidance.
    rows: {cfg: images (n, 3, H, W)}"""
    n = len(rows[default])
    save(out, "guidance", torch.cat(list(rows.values())), n,
         row_labels=[f"cfg {cfg:g}" + " (default)" * (cfg == default) for cfg in rows],
         column_labels=[f"{name} {i + 1}" for i in range(n)])


# -- Real images, rebuilt and repainted: image (B, 3, H, W) in [-1, 1] -----------------------------

def reconstructions(out, tokenizer, image):
    """The original, and what is decoded after each scale."""
    rows = [image.cpu(), *health.decoded(tokenizer, tokenizer.image_to_tokens(image))]
    db = [float(health.psnr(row, rows[0]).mean()) for row in rows[1:]]
    print(f"reconstruction: {db[-1]:.1f} dB")
    save(out, "reconstruct", (torch.cat(rows) + 1) / 2, len(image), row_labels=[
        "original", *(f"{s}x{s}, {value:.1f} dB" for s, value in zip(tokenizer.scales, db))])


def edits(out, task, tokenizer, image, keep, results, names, pasted):
    """The original, what is kept, and results {text: (B, 3, H, W) in [0, 1]}. keep (H, W) bool;
    pasted: the kept pixels were put back, so they say nothing about the model"""
    alone = (health.decoded(tokenizer, tokenizer.image_to_tokens(image))[-1] + 1) / 2
    image, keep = image.cpu(), keep.cpu()
    print(f"{task}: images of " + ", ".join(names))
    if keep.any() and not pasted:
        ours, bound = (float(np.mean([health.psnr(2 * x - 1, image, keep).mean() for x in made]))
                       for made in (results.values(), [alone]))
        print(f"{task}: kept region {ours:.1f} dB (the tokenizer alone: {bound:.1f} dB)")
    original = (image + 1) / 2
    shown = torch.where(keep, original, 0.5)
    save(out, task, torch.cat([original, shown, *results.values()]), len(image),
         row_labels=["original", "kept (grey: hidden)", *results])


def canvas(out, image, grow, painted, names):
    """The original, in the middle of white, and the larger picture painted around it.
    grow: left, top, right, bottom in pixels; painted (B, 3, top + H + bottom, left + W + right)"""
    left, top, right, bottom = grow
    original, scale = (image.cpu() + 1) / 2, max(1, round(200 / painted.shape[-1]))
    shown = torch.nn.functional.pad(original, (left, right, top, bottom), value=1.0)
    print("outpaint: images of " + ", ".join(names))
    save(out, "outpaint", torch.cat([shown, painted]), len(image), scale=scale,
         row_labels=["original", "out-painted"], column_labels=names)


# -- What the transformer thinks -------------------------------------------------------------------

@torch.no_grad()
def think(out, tokenizer, var, image, labels, names):
    """Where the transformer is unsure, and where it looks. image (B, 3, H, W) in [-1, 1]; labels:
    its classes (ints)"""
    labels = torch.tensor(labels, device=image.device)
    shown = tokenizer.teacher_inputs(tokenizer.image_to_tokens(image))
    image = (image.cpu() + 1) / 2                          # in [0, 1] from here on
    entropy(out, var, shown, image, labels, names)
    attention(out, var, shown[:1], image[0], labels[:1])


def entropy(out, var, shown, image, labels, names):
    """How uncertain the prediction is at every position and scale, given the coarser maps, which
    are `shown`. image (B, 3, H, W) in [0, 1]"""
    V, scales = var.config.vocab_size, var.config.scales
    log_p = var(labels, shown).float().log_softmax(-1)
    bits, most = -(log_p.exp() * log_p).sum(-1).cpu() / math.log(2), math.log2(V)     # (B, L)
    parts, texts = [*image], ["picture"]
    for side, part in zip(scales, bits.split([s * s for s in scales], 1)):            # (B, n)
        parts += plots.heat_maps(part.unflatten(1, (side, side)), 0, most)
        texts.append(f"{side}x{side}: {float(part.mean()):.1f} bits")
    save(out, "entropy", plots.cells(parts), len(image), row_labels=texts, scale=1,
         column_labels=names, footer=plots.legend(
             "Uncertainty about each token, given the coarser maps of the picture on top. 0 bits: "
             f"one code is certain;\n{most:g} bits: all {V:,} codes are equally likely. At the "
             "left: the mean over each scale.",
             [f"{most * i / 3:.2g}" + " bits" * (i == 3) for i in range(4)]))


@torch.no_grad()
def attention_weights(var, labels, teacher_inputs, queries=slice(None)):
    """Who looks at whom: -> one (B, heads, n, L) per block, n of the L queries, rows sum to 1."""
    found = []

    def listen(attention, inputs):
        q, k, _, qk_factor = attention.project(inputs[0])
        with torch.autocast(q.device.type, enabled=False):
            logits = q[:, :, queries].float() @ k.float().mT * qk_factor
        logits = logits.masked_fill(~var.mask[queries], -torch.inf)
        found.append(logits.softmax(-1))
    handles = [block.attention.register_forward_pre_hook(listen) for block in var.blocks]
    try:
        var(labels, teacher_inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def attention(out, var, shown, image, labels):
    """What the cell in the middle of the last map looks at, block after block, averaged over heads.
    shown: the input for one image; image (3, H, W) in [0, 1]; labels (1,)"""
    scales, L, last = var.config.scales, var.L, var.config.scales[-1]
    query = L - last * last + last // 2 * last + last // 2
    weights = [w[0, :, 0].mean(0).cpu() for w in attention_weights(
        var, labels, shown, slice(query, query + 1))]      # (L,) each
    blocks = sorted({round(i) for i in np.linspace(0, len(weights) - 1, min(6, len(weights)))})
    picture = plots.cells([image])[0]
    cell = picture.shape[-1]
    low, high = (last // 2) * cell // last, (last // 2 + 1) * cell // last
    inside = picture[:, low + 1:high - 1, low + 1:high - 1].clone()
    picture[:, low - 1:high + 1, low - 1:high + 1] = torch.tensor([1.0, 0.1, 0.1])[:, None, None]
    picture[:, low + 1:high - 1, low + 1:high - 1] = inside
    parts, shares = [], torch.zeros(len(scales))
    for i in blocks:
        parts.append(picture)
        for k, part in enumerate(weights[i].split([s * s for s in scales])):
            shares[k] += part.sum() / len(blocks)
            level = (part * L).clamp(min=1e-6).log2().view(1, scales[k], scales[k])
            parts += plots.heat_maps(level, -4, 4)
    texts = [f"{s}x{s}\nattention {share:.0%}\ntokens {s * s / L:.0%}"
             for s, share in zip(scales, shares)]
    save(out, "attention", plots.cells(parts), 1 + len(scales), scale=1,
         row_labels=[f"block {i + 1}" for i in blocks], column_labels=["picture", *texts],
         footer=plots.legend(
             "Where the red cell of the last map looks. Teal: as much as if it looked at all "
             f"{L:,} tokens alike; yellow: 16 times as much.\nOn top: the share of the attention "
             "that each map gets (mean of these blocks), beside its share of the tokens.",
             ["1/16", "1/4", "equal", "4 x", "16 x"]))


# -- For other people's evaluators -----------------------------------------------------------------

def export_npz(path, batches, count, side):
    """Write what the standard ImageNet evaluator reads: uint8 (count, side, side, 3) named arr_0,
    the pixels that a PNG would hold. Each batch (B, 3, H, W) is written when it comes, so 50,000
    images need no memory. Raises BadInput, before anything is drawn, if `path` has no folder."""
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir():
        raise BadInput(f"--export-npz {path}: give a file in a folder that exists")
    header = dict(descr="|u1", fortran_order=False, shape=(count, side, side, 3))
    with written_whole(path) as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as array:
            np.lib.format.write_array_header_1_0(array, header)
            for batch in batches:
                array.write(plots.to_uint8(batch).tobytes())
    print(f"wrote {path}: {count} images")
