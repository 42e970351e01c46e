"""Pictures of what a model does: samples, guidance, token maps, attention, entropy, edits.

Every function takes a `studio`, the model as the command line of chapter 6 wants it used, and
writes PNGs into studio.out."""
import math
import os
import zipfile
from pathlib import Path

import numpy as np
import torch

from engine import BadInput
from report import density, health, judge, plots


def sample(studio):
    """A row per class, or of more than 16 pictures per class a sheet per class; then how pictures
    come about."""
    n, names, waiting = studio.args.n or 8, studio.names, list(studio.classes)
    sheet = np.zeros((0, studio.side, studio.side, 3), np.uint8)
    for batch in studio.batches([c for c in waiting for _ in range(n)]):
        sheet = np.concatenate([sheet, plots.to_uint8(batch)])
        while n > 16 and len(sheet) >= n:                  # one class is complete
            c = waiting.pop(0)
            name = "".join(letter if letter.isalnum() else "_" for letter in names[c])
            studio.save(f"samples_{c}_{name}", sheet[:n], math.ceil(math.sqrt(n)))
            sheet = sheet[n:]
    if n <= 16:
        studio.save("samples", sheet, n, row_labels=[names[c] for c in studio.classes])
    coarse_to_fine(studio)


def coarse_to_fine(studio):
    """Scale after scale: the token map just added (a colour per code) beside the picture decoded
    from all maps so far; as a sheet and as a film."""
    classes = studio.classes[:5]
    tokens = studio.draw_tokens(classes)
    cell, V = max(96, studio.side), studio.tokenizer.config.vocab_size
    frames = []
    for side, tokens_k, picture in zip(studio.tokenizer.scales, tokens, studio.pyramid(tokens)):
        colours = plots.token_colours(tokens_k, side, V)
        both = plots.enlarge(colours, cell), plots.enlarge(picture, cell)
        frames.append(torch.stack(both, 1).flatten(0, 1))            # map, picture, map, picture
    columns = [text for c in classes for text in (studio.names[c], "so far")]
    studio.save("coarse_to_fine", torch.cat(frames), 2 * len(classes), column_labels=columns,
                row_labels=[f"{side}x{side}" for side in studio.tokenizer.scales], scale=1)
    film = [plots.to_uint8(torch.cat(list(frame), 2)[None])[0] for frame in frames]
    plots.save_gif(studio.out / "coarse_to_fine.gif", film + [film[-1]] * 3, 500)
    print(f"wrote {studio.out / 'coarse_to_fine.gif'}")


def guidance(studio):
    """One class: rows cfg 0 to 5, columns the same random numbers."""
    c, strengths, columns = studio.classes[0], range(6), 8
    rows = [studio.sample([c] * columns, cfg=float(strength)) for strength in strengths]
    studio.save("guidance", torch.cat(rows), columns, row_labels=[f"cfg {s}" for s in strengths],
                column_labels=[f"{studio.names[c]} {i + 1}" for i in range(columns)])


def reconstruct(studio):
    image, _ = studio.pictures(10)
    with torch.no_grad():
        steps = studio.pyramid(studio.tokenizer.image_to_tokens(image))
    original = (image.cpu() + 1) / 2
    db = [float(health.psnr(step * 2 - 1, original * 2 - 1).mean()) for step in steps]
    print(f"reconstruction: {db[-1]:.1f} dB")
    texts = [f"{s}x{s}, {value:.1f} dB" for s, value in zip(studio.tokenizer.scales, db)]
    studio.save("reconstruct", torch.cat([original] + steps), len(image),
                row_labels=["original"] + texts)


def inpaint(studio):
    repainted(studio, "inpaint", studio.edit, studio.mask((0.5, 0.0, 1.0, 1.0)))


def outpaint(studio):
    grow = [round(part * studio.side) for part in studio.args.grow]
    repainted(studio, "outpaint", studio.outpaint, grow)


def edit_class(studio):
    repainted(studio, "edit", studio.edit, studio.mask((0.1, 0.1, 0.9, 0.9)),
              classes=studio.classes[:10])


def repainted(studio, name, paint, where, classes=None):
    """In-painting, out-painting or class editing: the original, what is kept (grey: hidden), and
    results: three seeds (one where the canvas grows: slow), or with `classes` a row per class.

    paint(image, where, labels, seed); where: the mask, True = keep, or how far the canvas grows."""
    few = classes is not None or not torch.is_tensor(where)
    image, labels = studio.pictures(5 if few else 10)
    original = shown = (image.cpu() + 1) / 2
    if torch.is_tensor(where):
        keep = where.cpu()
        shown = torch.where(keep, original, 0.5)
    else:
        left, top, right, bottom = where
        shown = torch.nn.functional.pad(original, (left, right, top, bottom), value=0.5)
    rows, texts = [shown], ["kept"]
    seeds = range(3 if torch.is_tensor(where) else 1)
    variants = ([(f"seed {studio.args.seed + s}", labels, s) for s in seeds] if classes is None
                else [(f"as {studio.names[c]}", [c] * len(image), 0) for c in classes])
    for text, wanted, seed in variants:
        rows.append(paint(image, where, wanted, seed))
        texts.append(text)
    print(f"{name}: pictures of " + ", ".join(studio.names[c] for c in labels))
    if torch.is_tensor(where):
        rows, texts = [original] + rows, ["original"] + texts
        if keep.any() and not (studio.args.paste or studio.args.soft is not None):
            print(f"{name}: kept region " + kept_region(studio, image, rows[2:], keep))
    studio.save(name, torch.cat(rows), len(image), row_labels=texts)


def kept_region(studio, image, results, keep):
    """In words: how true the kept part is, beside what the tokenizer alone makes of it."""
    with torch.no_grad():
        alone = studio.tokenizer.tokens_to_image(studio.tokenizer.image_to_tokens(image)).cpu()
    original = (image.cpu() + 1) / 2

    def db(picture):
        error = (picture - original)[:, :, keep].square().mean((1, 2)).clamp(min=1e-10)
        return float(-10 * torch.log10(error).mean())
    ours = sum(map(db, results)) / len(results)
    return f"{ours:.1f} dB (the tokenizer alone: {db((alone + 1) / 2):.1f} dB)"


# -- See it think ----------------------------------------------------------------------------------

def think(studio):
    """Where the next-scale predictor is unsure, and where it looks."""
    image, labels = studio.pictures(10)
    tokens = studio.tokenizer.image_to_tokens(image)
    labels = torch.tensor(labels, device=image.device)
    entropy(studio, image, tokens, labels)
    attention(studio, image[:1], [t[:1] for t in tokens], labels[:1])


@torch.no_grad()
def entropy(studio, image, tokens, labels):
    """Entropy of the prediction at every position and scale, given the picture's coarser maps."""
    scales, V = studio.tokenizer.scales, studio.var.config.vocab_size
    shown = studio.tokenizer.teacher_inputs(tokens).to(studio.var.start.dtype)
    logp = studio.var(labels, shown).float().log_softmax(-1)
    bits = -(logp.exp() * logp).sum(-1).cpu() / math.log(2)              # (B, L)
    cell = max(96, studio.side)
    rows, texts = [plots.enlarge((image.cpu() + 1) / 2, cell)], ["picture"]
    for side, part in zip(scales, bits.split([s * s for s in scales], 1)):
        colours = plots.heat_map(part.numpy(), 0, math.log2(V))       # (B, n, 3)
        maps = torch.from_numpy(colours).view(len(image), side, side, 3).permute(0, 3, 1, 2) / 255
        rows.append(plots.enlarge(maps, cell))
        texts.append(f"{side}x{side}: {float(part.mean()):.1f} bits")
    print(f"entropy of the predictions: dark 0 bits (sure) to yellow {math.log2(V):.1f} (no idea)")
    studio.save("entropy", torch.cat(rows), len(image), row_labels=texts, scale=1,
                column_labels=[studio.names[int(c)] for c in labels])


@torch.no_grad()
def attention_weights(var, labels, teacher_inputs, queries=slice(None)):
    """Who looks at whom: -> one (B, heads, n, L) per block, n of the L queries, rows sum to 1."""
    found, may = [], var.scale_of_token[:, None] >= var.scale_of_token[None]

    def listen(attention, inputs):
        q, k, _, scale = attention.project(inputs[0])
        with torch.autocast(q.device.type, enabled=False):
            logits = q[:, :, queries].float() @ k.float().mT * scale
        logits = logits.masked_fill(~may[queries], -torch.inf)
        found.append(logits.softmax(-1))
    handles = [block.attention.register_forward_pre_hook(listen) for block in var.blocks]
    try:
        var(labels, teacher_inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def attention(studio, image, tokens, labels):
    """What one query of the last scale looks at, block after block, averaged over the heads. One
    heat map per scale: teal is as much as if it looked at all tokens alike."""
    scales = studio.tokenizer.scales
    last, L = scales[-1], sum(s * s for s in scales)
    query = L - last * last + last // 2 * last + last // 2               # the cell in the middle
    shown = studio.tokenizer.teacher_inputs(tokens).to(studio.var.start.dtype)
    weights = [w[0, :, 0].mean(0).cpu() for w in
               attention_weights(studio.var, labels, shown, slice(query, query + 1))]
    blocks = sorted({round(i) for i in np.linspace(0, len(weights) - 1, min(6, len(weights)))})
    cell = max(96, studio.side)
    picture = plots.enlarge((image.cpu() + 1) / 2, cell)[0]
    low, high = (last // 2) * cell // last, (last // 2 + 1) * cell // last
    frame = torch.zeros(cell, cell, dtype=torch.bool)
    frame[low - 1:high + 1, low - 1:high + 1] = True
    frame[low + 1:high - 1, low + 1:high - 1] = False
    picture = torch.where(frame, torch.tensor([1.0, 0.1, 0.1])[:, None, None], picture)
    cells, shares = [], torch.zeros(len(scales))
    for i in blocks:
        cells.append(picture)
        for k, part in enumerate(weights[i].split([s * s for s in scales])):
            shares[k] += part.sum() / len(blocks)
            level = (part * L).clamp(min=1e-6).log2().view(scales[k], scales[k])
            colours = torch.from_numpy(plots.heat_map(level.numpy(), -4, 4))
            cells.append(plots.enlarge(colours.permute(2, 0, 1)[None] / 255, cell)[0])
    print("attention of the marked cell: yellow, 16 times as much as if all tokens had the same "
          "share; teal, the same; dark, a sixteenth")
    studio.save("attention", torch.stack(cells), 1 + len(scales), scale=1,
                row_labels=[f"block {i + 1}" for i in blocks],
                column_labels=["query"] + [f"{s}x{s}: {share:.0%}"
                                           for s, share in zip(scales, shares)])


# -- For other people's evaluators -----------------------------------------------------------------

def export(studio):
    """--export-npz: the array that the standard ImageNet evaluator reads, uint8 (N, H, W, 3) named
    arr_0, pixels exactly as a PNG would hold them.

    Class after class in turn, 0 1 2 ... 0 1 2 ...: that evaluator's Inception Score looks at 5,000
    pictures at a time and comes out far too low when these are all of a hundred classes. Pictures
    are written as they are drawn, so 50,000 need no memory."""
    path, classes = Path(studio.args.export_npz), range(len(studio.names))
    if path.is_dir() or not path.parent.is_dir():
        raise BadInput(f"--export-npz {path}: give a file in a folder that exists")
    classes = studio.classes if studio.args.classes else classes
    labels = list(classes) * (studio.args.n or 50)
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    header = dict(descr="|u1", fortran_order=False,
                  shape=(len(labels), studio.side, studio.side, 3))
    try:
        with zipfile.ZipFile(part, "w") as file:
            with file.open("arr_0.npy", "w", force_zip64=True) as array:
                np.lib.format.write_array_header_1_0(array, header)
                for batch in studio.batches(labels):
                    array.write(plots.to_uint8(batch).tobytes())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    print(f"wrote {path}: {len(labels)} pictures, {len(classes)} classes in turn, "
          + ", ".join(f"{name} {value:g}" for name, value in studio.sampling.items())
          + f", seed {studio.args.seed}")


PICTURES = dict(sample=sample, guidance=guidance, think=think, reconstruct=reconstruct,
                inpaint=inpaint, outpaint=outpaint, edit=edit_class)
FIGURES = dict(density=density.density, evaluate=judge.evaluate)         # take longer: on request
