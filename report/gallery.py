"""The tasks of chapter 6: images to work on, and for each task a sheet or a table.

args: the options of chapter 6, and facts about the model: names (of all classes), labels
    ({number: text} of the classes to show), dataset, side (of its images), sampling
model: its tokenizer, and functions of chapter 6 that already know the model:
    draw(labels, seed=0, ...) and repaint(labels, image, keep=...) -> images in [0, 1]
    tokens(labels) -> K token maps        log_likelihood(tokens, labels) -> nats (B, K)
"""
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from data.batches import stack, to_float
from data.folder import decode
from data.registry import dataset_named, find_class, load_data
from engine import BadInput
from engine.progress import progress
from report import health, plots
from report.density import density
from report.judge import evaluate

# What to repaint (outpaint: to keep) without --box and --mask, in fractions of the side.
BOXES = {"inpaint": (0.5, 0, 1, 1), "outpaint": (0.25, 0.25, 0.75, 0.75),
         "edit": (0.1, 0.1, 0.9, 0.9)}


def pick_classes(names, wanted):
    """wanted: names or numbers of classes (none: the first ten) -> {number: label}. Raises
    BadInput for a class that is not among the `names`."""
    labels = {}
    for c in [find_class(names, text) for text in wanted] or range(len(names))[:10]:
        text = plots.class_label(names[c], c)
        labels[c] = f"class {c}" if text in labels.values() else text
    return labels


def in_batches(paint, args, labels, image=None, seed=0, **options):
    """paint(labels=..., image=..., generator=..., **options) for any number of images, as
    many at a time as fit into memory. Image i is drawn from the seed args.seed + seed + i,
    in a batch of any size. -> all images (n, 3, H, W), on the CPU"""
    memory = 2 ** 31
    if args.device.type == "cuda":
        memory = torch.cuda.get_device_properties(args.device).total_memory
    at_once = max(1, min(100, memory // 2 ** 14 // args.side ** 2))

    def batches():
        for begin in range(0, len(labels), at_once):
            part = labels[begin:begin + at_once]
            if image is not None:
                options["image"] = image[begin:begin + at_once].to(args.device)
            generators = [torch.Generator(args.device) for _ in part]
            for i, generator in enumerate(generators):
                generator.manual_seed(args.seed + seed + begin + i)
            yield paint(labels=part, generator=generators, **options).cpu()
    return torch.cat(list(progress(batches(), len(labels))))


# -- Images to work on ---------------------------------------------------------------------

def read_image(path, side):
    """The middle square of a file -> (1, 3, side, side) in [-1, 1]. Raises BadInput"""
    try:
        picture = decode(path)
    except Exception as error:                             # damaged files raise anything
        raise BadInput(f"{path}: not a readable image ({error})") from None
    picture = ImageOps.fit(picture, (side, side), Image.Resampling.LANCZOS)
    return to_float(stack([np.array(picture)]))


def held_out(args, count, examples=True):
    """Up to `count` held-out images of the classes in args.labels, in turn. examples: the
    few images that are shipped with the code suffice. -> (n, 3, side, side) in [-1, 1],
    labels (n,). Raises BadInput if there are none."""
    shipped = dataset_named(args.dataset).examples
    if shipped and examples and not args.data_dir:
        images, labels, names = shipped()
    else:
        images, labels, names = load_data(args.dataset, "test", args.side, args.data_dir)
    chosen = []
    for c in args.labels:
        if args.names[c] not in names:
            raise BadInput(f"the images of {args.dataset} have no class {args.names[c]!r}")
        rows = np.flatnonzero(labels == names.index(args.names[c]))[:count]
        chosen += [(turn, c, row) for turn, row in enumerate(rows.tolist())]
    chosen = sorted(chosen, key=lambda turn_c_row: turn_c_row[0])[:count]
    if not chosen:
        raise BadInput(f"{args.dataset} has no held-out images of these classes")
    image = to_float(stack([images[row] for _, _, row in chosen]))
    return image, torch.tensor([c for _, c, _ in chosen])


def images_to_edit(args, model, count=10):
    """--image, or held-out images, or if there are none images that the model draws
    -> (n, 3, side, side) in [-1, 1], labels (n,)"""
    labels = torch.tensor(list(args.labels))
    if args.image:
        print(f"{args.image}: taken as class {args.labels[int(labels[0])]}; see --classes")
        return read_image(args.image, args.side), labels[:1]
    try:
        return held_out(args, count)
    except BadInput as error:
        if args.data_dir:
            raise
        print(f"no held-out images ({error}): using images that the model draws")
        labels = labels.repeat(count)[:count]
        return 2 * model.draw(labels, seed=2 ** 31) - 1, labels


def kept_region(args, task):
    """--mask, --box or the task's own box -> (side, side) bool, True = keep. Raises
    BadInput if that is everything."""
    if args.mask:
        inside = read_image(args.mask, args.side)[0].mean(0) > 0         # where it is white
    else:
        x0, y0, x1, y1 = (round(x * args.side) for x in args.box or BOXES[task])
        inside = torch.zeros(args.side, args.side, dtype=torch.bool)
        inside[y0:y1, x0:x1] = True
    keep = inside if task == "outpaint" else ~inside
    if keep.all():
        raise BadInput(f"--task {task}: --box or --mask leaves no pixel to repaint")
    return keep


# -- Tasks ---------------------------------------------------------------------------------

def save(args, name, rows, **labels):
    """One sheet. rows: {text: images (n, 3, H, W) in [0, 1]}; labels: see save_grid()"""
    path = args.out / f"{name}.png"
    images = torch.cat([row.cpu() for row in rows.values()])
    plots.save_grid(path, images, len(images) // len(rows), row_labels=list(rows), **labels)
    print(f"wrote {path}")


def show_samples(args, model):
    """Samples of each class. Then how the first five come about: the token map added at
    each scale, beside the image decoded from all maps so far."""
    rows, n = {}, args.n or 8
    for i, (c, text) in enumerate(args.labels.items()):
        rows[text] = model.draw(torch.tensor([c] * n), seed=i * n)
    save(args, "samples", rows)
    texts, rows, tokenizer = list(args.labels.values())[:5], {}, model.tokenizer
    generator = torch.Generator(args.device).manual_seed(args.seed)
    tokens = model.tokens(list(args.labels)[:5], generator=generator)
    for side, maps, image in zip(tokenizer.scales, tokens, health.decoded(tokenizer, tokens)):
        colours = plots.token_colours(maps, side, tokenizer.config.vocab_size)
        pairs = zip(colours, (image + 1) / 2)
        rows[f"{side}x{side}"] = plots.cells([picture for pair in pairs for picture in pair])
    footer = ("Under a class name: the token map of this scale. A colour stands for the "
              "number of a code.\nBeside it: the image decoded from all maps down to this row.")
    save(args, "coarse_to_fine", rows, scale=1, footer=plots.legend(footer),
         column_labels=[label for text in texts for label in (text, "so far")])


def show_guidance(args, model):
    """The first class at several strengths of guidance. All rows use the same noise."""
    rows, default = {}, args.sampling["cfg"]
    c, label = next(iter(args.labels.items()))
    for cfg in sorted({0.0, 1.0, 2.0, 3.0, 5.0, default}):
        text = f"cfg {cfg:g}" + " (default)" * (cfg == default)
        rows[text] = model.draw(torch.tensor([c] * 8), cfg=cfg)
    save(args, "guidance", rows, column_labels=[f"{label} {i + 1}" for i in range(8)])


def show_reconstructions(args, model):
    """Images, and what the tokenizer makes of them after each scale."""
    image, _ = images_to_edit(args, model)
    path = args.out / "reconstruct.png"
    health.save_picture(path, model.tokenizer, image.to(args.device))
    print(f"wrote {path}")


@torch.no_grad()
def show_edits(args, model, task):
    """Repaint images without a class, which is the paper's task, and with their own; or as
    other classes. Print the PSNR of the kept part and the bits of the whole image."""
    image, labels = images_to_edit(args, model, 5 if task == "edit" else 10)
    keep, tokenizer = kept_region(args, task), model.tokenizer
    if task == "inpaint":
        check_no_leak(model, image[:1], keep, labels[:1])
    wanted = {"no class": torch.full_like(labels, len(args.names)), "own class": labels}
    if task == "edit":
        wanted = {f"as {text}": labels * 0 + c for c, text in args.labels.items()}
    alone = tokenizer.tokens_to_image(tokenizer.image_to_tokens(image.to(args.device)))
    rows = {"tokenizer alone": (alone.cpu() + 1) / 2}
    for text, classes in wanted.items():
        rows[text] = model.repaint(classes, image, keep=keep)
    print(f"{task:<20}{'PSNR of the kept part':>26}{'bits given the class':>26}")
    for text, row in rows.items():
        kept = "nothing is kept"
        if keep.any():
            kept = f"{health.psnr(2 * row - 1, image, keep).mean():.1f} dB"
        tokens = tokenizer.image_to_tokens((2 * row - 1).to(args.device))
        given = wanted.get(text, labels) if task == "edit" else labels
        bits = -model.log_likelihood(tokens, given).sum(1).mean() / math.log(2)
        print(f"    {text:<16}{kept:>26}{bits:>26.0f}")
    shown = torch.where(keep, (image + 1) / 2, 0.5)
    save(args, task, {"original": (image + 1) / 2, "kept (grey: hidden)": shown, **rows})


def check_no_leak(model, image, keep, labels):
    """Assert that an edit is the same, to the last bit, whatever the hidden pixels are."""
    other = torch.where(keep, image, torch.rand_like(image) * 2 - 1)
    one, two = (model.repaint(labels, x, keep=keep, paint_passes=2) for x in (image, other))
    print(f"noise in the hidden pixels changes the result by {(one - two).abs().max():g}")
    assert torch.equal(one, two)


def show_density(args, model):
    """Bits of --image or of held-out images, and what Bayes' rule makes of them."""
    if args.image:
        image, labels = read_image(args.image, args.side), None
    else:
        image, labels = held_out(args, args.n or 500, examples=False)
    no_class = len(args.names)
    density(model.tokenizer, model.log_likelihood, image, labels, args.labels, no_class)


def show_evaluation(args, model):
    """Samples beside held-out images and reconstructions, measured by a classifier."""
    evaluate(args.dataset, args.data_dir, args.names, model.tokenizer, model.draw,
             args.n or 1000)


def export_npz(args, model):
    """Write what the standard ImageNet evaluator reads: samples of all classes in turn,
    uint8 (N, side, side, 3), named arr_0. 50,000 of 256 pixels need 10 GB of memory."""
    path = Path(args.export_npz)
    if path.is_dir() or not path.parent.is_dir():
        raise BadInput(f"--export-npz {path}: give a file in a folder that exists")
    labels = torch.arange(len(args.names)).repeat(args.n or 50)
    images = np.empty((len(labels), args.side, args.side, 3), np.uint8)
    for begin in range(0, len(labels), 1000):
        drawn = model.draw(labels[begin:begin + 1000], seed=begin)
        images[begin:begin + 1000] = plots.to_uint8(drawn)
    np.savez(path, arr_0=images)
    print(f"wrote {path}: {len(images)} images")


TASKS = {"sample": show_samples, "guidance": show_guidance,
         "reconstruct": show_reconstructions,
         "inpaint": partial(show_edits, task="inpaint"),
         "outpaint": partial(show_edits, task="outpaint"),
         "edit": partial(show_edits, task="edit"),
         "density": show_density, "evaluate": show_evaluation}
