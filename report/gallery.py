"""What chapter 6 shows: images to work on, and for each task a sheet or a table.

args: the options of chapter 6, and facts about the model: names (of all classes), labels
    ({number: text} of the classes to show), dataset, side (of its images)
model: .tokenizer, .cfg (the guidance), and functions of chapter 6 for its two networks:
    .draw_tokens(labels), .log_likelihood(tokens, labels), and for any number of images,
    (n, 3, H, W) in [0, 1], .sample(labels, seed=0, ...), .repaint(labels, image, keep=...)
"""
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ImageOps

from data.batches import per_pass, to_float
from data.folder import decode
from data.registry import chosen_classes, dataset_named, find_class, load_data
from engine import BadInput
from engine.progress import progress
from report import health, plots
from report.judge import evaluate

# What to repaint (outpaint: to keep) without --box and --mask, in fractions of the side.
BOXES = {"inpaint": (0.5, 0, 1, 1), "outpaint": (0.25, 0.25, 0.75, 0.75),
         "edit": (0.1, 0.1, 0.9, 0.9)}


def pick_classes(names, wanted):
    """wanted: --classes (none: the first ten) -> {number: label}. Raises BadInput"""
    labels = {}
    for c in chosen_classes(names, wanted) or range(len(names))[:10]:
        text = plots.class_label(names[c], c)
        labels[c] = f"class {c}" if text in labels.values() else text
    return labels


def in_batches(args, paint, labels, image=None, seed=0, **options):
    """Call paint() for as many images at a time as fit into memory. Each has a generator of
    its own, so it does not depend on its batch. -> images (n, 3, H, W), on the CPU"""
    memory = 2 ** 31
    if args.device.type == "cuda":
        memory = torch.cuda.get_device_properties(args.device).total_memory
    at_once = max(1, min(100, memory // 2 ** 14 // args.side ** 2))
    painted = []
    for rows in progress(torch.arange(len(labels)).split(at_once), len(labels)):
        generators = [torch.Generator(args.device).manual_seed(args.seed + seed + i)
                      for i in rows.tolist()]
        if image is not None:
            options["image"] = image[rows].to(args.device)
        painted.append(paint(labels=labels[rows], generator=generators, **options).cpu())
    return torch.cat(painted)


# -- Images to work on ---------------------------------------------------------------------

def read_image(path, side):
    """The middle square of a file -> (1, 3, side, side) in [-1, 1]. Raises BadInput"""
    try:
        picture = np.array(ImageOps.fit(decode(path), (side, side)))
    except Exception as error:                             # damaged files raise anything
        raise BadInput(f"{path}: not a readable image ({error})") from None
    return to_float(torch.from_numpy(picture)[None])


def images_to_edit(args, count=10):
    """--image, of the first of --classes or else of no class, or up to `count` held-out
    images whose classes take turns -> (n, 3, side, side) in [-1, 1], labels (n,). Raises
    BadInput if there are none."""
    if args.image:
        label = len(args.names)
        if args.classes:
            label = chosen_classes(args.names, args.classes[:1])[0]
            print(f"{args.image} is taken as class {args.names[label]}")
        return read_image(args.image, args.side), torch.tensor([label])
    shipped = dataset_named(args.dataset).examples
    if shipped and not args.data_dir:
        images, labels, names = shipped()
    else:
        images, labels, names = load_data(args.dataset, "test", args.side, args.data_dir)
    turns = []
    for c in args.labels:
        rows = np.flatnonzero(labels == find_class(names, args.names[c]))
        turns += [(turn, c, row) for turn, row in enumerate(rows.tolist())]
    turns = sorted(turns)[:count]
    if not turns:
        raise BadInput(f"{args.dataset} has no held-out images of these classes")
    image = torch.from_numpy(np.stack([images[row] for _, _, row in turns]))
    return to_float(image), torch.tensor([c for _, c, _ in turns])


def kept_region(args, task):
    """--mask, --box or the task's own box -> (side, side) bool, True = keep. Raises
    BadInput if that is everything or nothing."""
    if args.mask:
        inside = read_image(args.mask, args.side)[0].mean(0) > 0         # where it is white
    else:
        x0, y0, x1, y1 = (round(x * args.side) for x in args.box or BOXES[task])
        inside = torch.zeros(args.side, args.side, dtype=torch.bool)
        inside[y0:y1, x0:x1] = True
    if inside.all() or not inside.any():
        raise BadInput(f"--task {task}: --mask, or --box X0 Y0 X1 Y1 in fractions of the "
                       "side, must leave a part to repaint and a part to keep")
    return inside if task == "outpaint" else ~inside


# -- Tasks ---------------------------------------------------------------------------------

@torch.no_grad()
def show_samples(args, model):
    """Samples of each class. Then how some came about: the token map added at each scale,
    and the image decoded from all maps so far."""
    tokens, tokenizer = model.draw_tokens(list(args.labels)[:5]), model.tokenizer
    rows, n = {}, args.n or 8
    for i, (c, text) in enumerate(args.labels.items()):
        rows[text] = model.sample(torch.full((n,), c), seed=i * n)
    plots.save_grid(args.out / "samples.png", rows)
    rows, names = {}, list(args.labels.values())[:5]
    images = health.decoded(tokenizer, tokens)
    for side, maps, image in zip(tokenizer.scales, tokens, images):
        colours = plots.token_colours(maps, side, tokenizer.config.vocab_size)
        rows[f"{side}x{side}"] = torch.cat([F.interpolate(x, size=max(96, args.side))
                                            for x in (colours, (image + 1) / 2)])
    plots.save_grid(
        args.out / "coarse_to_fine.png", rows, column_labels=names * 2, scale=1,
        footer="Left: the token map of each scale. A colour stands for the number of a "
               "code.\nRight: the image decoded from all maps so far.")


def show_guidance(args, model):
    """The first class at several strengths of guidance."""
    rows, c = {}, min(args.labels)
    for cfg in sorted({0.0, 1.0, 2.0, 3.0, 5.0, model.cfg}):
        text = f"{args.labels[c]}, cfg {cfg:g}" + " (default)" * (cfg == model.cfg)
        rows[text] = model.sample(torch.full((8,), c), cfg=cfg)
    plots.save_grid(args.out / "guidance.png", rows, footer="cfg: guidance at the last "
                    "scale. The images of a column share their random numbers.")


def show_reconstructions(args, model):
    """Images, and what the tokenizer makes of them after each scale."""
    image, _ = images_to_edit(args)
    health.save_picture(args.out / "reconstruct.png", model.tokenizer, image.to(args.device))


@torch.no_grad()
def show_edits(args, model, task):
    """Repaint images without a class, which is the paper's task, then as their own class;
    or as other classes. Print the PSNR of the kept part, and the bits of the whole result:
    given no class, and given its class (in the row "no class": that of the original)."""
    image, labels = images_to_edit(args, 5 if task == "edit" else 10)
    keep, no_class = kept_region(args, task), torch.full_like(labels, len(args.names))
    if task == "inpaint":
        check_no_leak(model.repaint, image[:1], keep, labels[:1])
    wanted = {"no class": no_class}
    if task == "edit":
        wanted = {f"as {text}": labels * 0 + c for c, text in args.labels.items()}
    elif not labels.equal(no_class):                       # no --image without --classes
        wanted["own class"] = labels
    tokens = model.tokenizer.image_to_tokens(image.to(args.device))
    results = {"tokenizer alone": (model.tokenizer.tokens_to_image(tokens).cpu() + 1) / 2}
    for text, classes in wanted.items():
        results[text] = model.repaint(classes, image, keep=keep)
    rows = {"original": (image + 1) / 2,
            "kept (grey: hidden)": torch.where(keep, (image + 1) / 2, 0.5)}
    print(f"{task:<20}kept part   bits given no class   bits given the class")
    for text, result in results.items():
        meant = labels if text == "no class" else wanted.get(text, labels)
        db = health.psnr(2 * result - 1, image, keep).mean()
        tokens = model.tokenizer.image_to_tokens((2 * result - 1).to(args.device))
        free, given = (-model.log_likelihood(tokens, known).sum(1).mean() / math.log(2)
                       for known in (no_class, meant))
        print(f"    {text:<16}{db:>6.1f} dB{free:>22.0f}{given:>23.0f}")
        rows[f"{text}\n{db:.1f} dB, {given:.0f} bits"] = result
    plots.save_grid(
        args.out / f"{task}.png", rows,
        footer="dB: PSNR of the kept part. Bits: what the tokens of the whole result cost "
               "under the\nmodel, given the class (no class: that of the original).")


def check_no_leak(repaint, image, keep, labels):
    """Assert that an edit is the same, to the last bit, whatever the hidden pixels are."""
    other = torch.where(keep, image, torch.rand_like(image) * 2 - 1)
    one, two = (repaint(labels, x, keep=keep, paint_passes=2) for x in (image, other))
    print(f"noise in the hidden pixels changes the result by {(one - two).abs().max():g}")
    assert torch.equal(one, two)


@torch.no_grad()
def show_density(args, model):
    """The other half of a generative model: how probable is an image? The exact probability
    of the tokens of --image or of held-out images gives a measure, -log2 p in bits, and a
    classifier, by Bayes' rule with equally common classes:

        p(class | tokens) = p(tokens | class) / the same summed over the classes

    Many images share the same tokens, so do not compare these bits with the bits per
    dimension of models of pixels."""
    if args.image and not args.classes:
        raise BadInput("--task density --image: name the class of the image with --classes")
    image, labels = images_to_edit(args, args.n or 500)
    classes = list(range(len(args.names)) if args.image else args.labels)
    scales, parts = model.tokenizer.scales, []
    for part in progress(image.split(per_pass(args.side)), len(image)):
        tokens = model.tokenizer.image_to_tokens(part.to(args.device))
        nats = [model.log_likelihood(tokens, [c] * len(part)).cpu()
                for c in [*classes, len(args.names)]]
        parts.append(torch.stack(nats, 1).double())
    nats = torch.cat(parts)                                # (N, classes + 1, K)
    bits = -torch.cat([nats, nats.sum(2, keepdim=True)], 2) / math.log(2)   # K + 1: a sum
    right = torch.tensor([classes.index(c) for c in labels.tolist()])       # (N,)
    known = bits[torch.arange(len(bits)), right].mean(0)   # (K + 1,)
    found = nats[:, :-1].cumsum(2).argmax(1) == right[:, None]   # (N, K), of scales 1..k
    sizes = torch.tensor([s * s for s in scales] + [sum(s * s for s in scales)])
    print(f"{len(image)} images; without a model a token costs log2 V, "
          f"{math.log2(model.tokenizer.config.vocab_size):g} bits")
    for name, values, form in (("side", [*scales, "all"], ""),
                               ("bits given no class", bits[:, -1].mean(0), ".1f"),
                               ("bits given the class", known, ".1f"),
                               ("    per token", known / sizes, ".2f"),
                               ("class found so far", found.double().mean(0), ".0%")):
        print(f"    {name:<22}" + "".join(f"{x:>9{form}}" for x in values))
    print("found by Bayes' rule from this scale and the coarser ones; by chance: "
          f"{1 / len(classes):.0%}")


TASKS = {"sample": show_samples, "guidance": show_guidance,
         "reconstruct": show_reconstructions,
         **{task: partial(show_edits, task=task) for task in BOXES},
         "density": show_density, "evaluate": evaluate}


def export_npz(args, model):
    """Write what the standard ImageNet evaluator reads: samples of all classes in turn,
    uint8 (N, side, side, 3), named arr_0. 50,000 of 256 pixels need 10 GB of memory."""
    path = Path(args.export_npz)
    if path.suffix != ".npz" or path.is_dir() or not path.parent.is_dir():
        raise BadInput(f"--export-npz {path}: give a file *.npz in a folder that exists")
    labels = torch.arange(len(args.names)).repeat(args.n or 50)
    images = np.empty((len(labels), args.side, args.side, 3), np.uint8)
    for begin in range(0, len(labels), 1000):
        drawn = model.sample(labels[begin:begin + 1000], seed=begin)
        images[begin:begin + 1000] = plots.to_uint8(drawn)
    np.savez(path, arr_0=images)
    print(f"wrote {path}: {len(images)} images")
