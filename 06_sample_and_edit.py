"""Chapter 6: sample, in-paint, out-paint, change a class, and ask how likely an image is.

One loop over the scales does it all: predict the logits of map k, draw its tokens, add them to
f_hat, show f_hat to scale k+1. Editing adds one rule to this loop: where the image is kept, the
token is not drawn but computed, as the code nearest to what f_hat *still misses* of the image:

    k        1x1     2x2        3x3          ...      8x8
    keep      x      x .       x x .                 x x x x x . . .     x  computed
                     x .       x x .                 x x x x x . . .     .  drawn by the model

A coarse token covers both the kept and the new part, so one pass is not enough: edit() makes six
with the same noise, each starting from the previous result, and then two without drawing.

Shapes: labels (B,); logits (B, n, V), n = h_k*w_k; tokens: list of K (B, n); image (B, 3, H, W) in
[-1, 1] coming in, [0, 1] going out; keep (H, W) bool, True = leave as it is.

Sources: VAR (Tian et al. 2024), sections 3 and 5 (zero-shot editing); classifier-free guidance (Ho
and Salimans 2022); top-p sampling (Holtzman et al. 2020); FID (Heusel et al. 2017).

Differs from the original VAR code: hidden pixels are replaced before encoding (there they leak into
the kept tokens through the encoder); the 1x1 token is not always kept; kept tokens are quantized
again as f_hat grows, not replayed; an edit takes several passes; likelihoods are computed, too.

    python 06_sample_and_edit.py                        newest run in out/, else the shipped model
    python 06_sample_and_edit.py --task inpaint --box 0.3 0.3 0.7 0.7
    python 06_sample_and_edit.py --released d16 --classes goldfish volcano
"""
from functools import partial
from importlib import import_module

import torch
import torch.nn.functional as F

from engine import BadInput, released
from engine.options import one_line
from report import command_line, gallery, judge
from report.density import density

vqvae = import_module("02_multiscale_vqvae")
transformer = import_module("04_var_transformer")
training = import_module("05_train")


# -- Drawing tokens --------------------------------------------------------------------------------

def keep_likely(logits, top_k=0, top_p=0.0):
    """Set all but the likely logits to -inf, in a copy. top_k > 0 leaves exactly k, ties or not;
    0 < top_p < 1 leaves the fewest that together hold top_p or more. (..., V) -> (..., V)"""
    # Exercise 06_1
    V, k = logits.shape[-1], top_k if top_k > 0 else logits.shape[-1]
    if k >= V and not 0 < top_p < 1:
        return logits
    value, order = logits.topk(min(k, V), dim=-1)          # likeliest first
    if 0 < top_p < 1:
        # tail: the probability of a token and all less likely ones, summed from the right. If it
        # is at most 1 - top_p, the tokens to the left already hold top_p.
        tail = value.softmax(-1).flip(-1).cumsum(-1).flip(-1)
        drop = tail <= 1 - top_p
        drop[..., 0] = False                               # the likeliest always stays
        value = value.masked_fill(drop, -torch.inf)
    return torch.full_like(logits, -torch.inf).scatter(-1, order, value)


def draw(logits, generator=None):
    """One token per position. logits (B, n, V) -> (B, n)"""
    p = logits.softmax(-1).flatten(0, 1)
    return torch.multinomial(p, 1, replacement=True, generator=generator).view(logits.shape[:2])


def soften(logits, progress, codebook, generator=None):
    """"Smooth" sampling of the original code: a mixture of codes (Gumbel-softmax), not one code. It
    looks pleasant but is no sample from the model. logits (B, n, V) -> code vectors (B, n, C)

    progress is k / (K - 1). From the first scale to the last the logits double and the temperature
    falls from 0.27 by 95 %: from mixtures to nearly one code. The original gives no reason."""
    noise = -torch.empty_like(logits).exponential_(generator=generator).log()      # Gumbel
    temperature = 0.27 * (1 - 0.95 * progress)
    return ((logits * (1 + progress) + noise) / temperature).softmax(-1) @ codebook


def strengths(cfg, K):
    """Guidance t at each of K scales: cfg itself if it is a list, else equal steps from 0 to cfg:
    strong guidance at coarse scales, which decide *what* is drawn, costs variety. -> K numbers"""
    given = cfg
    if not hasattr(cfg, "__len__"):
        # Exercise 06_2
        cfg = [cfg * (k / max(K - 1, 1)) for k in range(K)]
        # End of exercise
    if len(cfg) != K or not all(0 <= t < torch.inf for t in cfg):
        raise BadInput(f"cfg {given}: a number of at least 0, or a list of {K}, one a scale")
    return cfg


@torch.no_grad()
def sample_tokens(tokenizer, var, labels, *, cfg=0.0, top_k=0, top_p=0.0, temperature=1.0,
                  smooth=False, generator=None, choose=None):
    """The loop. choose(k, drawn, f_hat) -> tokens may replace what is drawn. labels (B,) -> K token
    maps (B, n), or with `smooth` mixtures of codes (B, n, C), which the tokenizer accepts as well.

    Guidance: t = 0 is the plain prediction for the class; t > 0 moves beyond it, away from the
    prediction without a class (other code often counts w = 1 + t). cfg, a number or a list, says
    how far at each scale. It is 0 here; generate() and edit() take 1.5, as the original."""
    K, B, nobody = tokenizer.K, len(labels), var.config.num_classes
    if B == 0 or labels.min() < 0 or labels.max() > nobody:
        raise BadInput(f"labels must lie in 0..{nobody - 1} ({nobody}: no class)")
    t = strengths(cfg, K)
    last_guided = max((k for k in range(K) if t[k] > 0), default=-1)
    if last_guided >= 0:
        # The second half of the batch has no class: the row that label dropout trained.
        labels = torch.cat([labels, torch.full_like(labels, nobody)])
    conditioning, cache = var.conditioning(labels), var.new_cache()
    f_hat, inputs, tokens = 0, None, []
    for k in range(K):
        if inputs is not None:
            inputs = inputs.to(conditioning.row.dtype).repeat(2 if k <= last_guided else 1, 1, 1)
        logits = var.step(k, inputs, conditioning, cache).float()                 # (B or 2B, n, V)
        if k <= last_guided:
            # Exercise 06_2
            logits = (1 + t[k]) * logits[:B] - t[k] * logits[B:]
            # End of exercise
        if k == last_guided:                               # finer scales cost half as much
            conditioning = var.keep_first(B, conditioning, cache)
        logits = keep_likely(logits / temperature, top_k, top_p)                  # (B, n, V)
        tokens_k = (soften(logits, k / max(K - 1, 1), tokenizer.quantizer.codebook, generator)
                    if smooth else draw(logits, generator))                       # (B, n[, C])
        if choose is not None:
            tokens_k = choose(k, tokens_k, f_hat)
        f_hat, inputs = tokenizer.next_input(k, f_hat, tokens_k)
        tokens.append(tokens_k)
    return tokens


@torch.no_grad()
def generate(tokenizer, var, labels, *, cfg=1.5, top_k=0, top_p=0.0, temperature=1.0, smooth=False,
             generator=None, tokens=None, keep=None):
    """Sample images of the classes in labels (B,). cfg: see strengths(). -> (B, 3, H, W) in [0, 1]

    tokens (list of K (B, n)) and keep (list of K (n,) bool): where keep is True the given token is
    replayed instead of drawn. Raises BadInput for a label that the model does not know."""
    if (tokens is None) != (keep is None) or (smooth and tokens is not None):
        raise BadInput("tokens and keep go together, and without smooth")
    choose = None if tokens is None else (
        lambda k, drawn, f_hat: torch.where(keep[k].to(drawn.device), tokens[k], drawn))
    drawn = sample_tokens(tokenizer, var, labels, cfg=cfg, top_k=top_k, top_p=top_p, smooth=smooth,
                          temperature=temperature, generator=generator, choose=choose)
    return (tokenizer.tokens_to_image(drawn) + 1) / 2


@torch.no_grad()
def log_likelihood(tokenizer, var, tokens, labels):
    """ln p(tokens | class), exactly: the sum of ln p(token | coarser maps, class) over all
    positions of a scale, for each scale. One pass through the transformer gives them all.

    tokens: list of K (B, n); labels (B,), num_classes: no class -> (B, K) nats"""
    # Exercise 06_3
    inputs = tokenizer.teacher_inputs(tokens).to(var.start.dtype)
    logits = var(labels, inputs).float()                                 # (B, L, V)
    wanted = torch.cat(tokens, 1)[..., None]                             # (B, L, 1)
    each = logits.log_softmax(-1).gather(-1, wanted)[..., 0]             # (B, L)
    per_scale = each.split([tokens_k.shape[1] for tokens_k in tokens], 1)
    return torch.stack([part.sum(1) for part in per_scale], 1)           # (B, K)


# -- Editing ---------------------------------------------------------------------------------------

def hide(image, keep):
    """Replace hidden pixels by a smooth continuation of the kept ones, so that the encoder meets no
    edge that the image does not have. Only kept pixels are read. image (B, 3, H, W), keep (H, W)

    Pull-push: halve the image until one pixel is left, averaging kept pixels only; then go back
    up and fill each gap from the next smaller image."""
    weight = keep.to(image.dtype)[None, None]              # (1, 1, H, W): how much of it is kept
    value, finer = torch.where(keep, image, 0.0), []       # sum of kept pixels / pixels in a cell
    while max(value.shape[2:]) > 1:
        finer.append((value, weight))
        value, weight = (F.avg_pool2d(x, 2, ceil_mode=True) for x in (value, weight))
    filled = value / weight.clamp(min=1e-6)
    for value, weight in reversed(finer):
        filled = F.interpolate(filled, value.shape[2:], mode="bilinear")
        filled = torch.where(weight > 0, value / weight.clamp(min=1e-6), filled)
    return filled


@torch.no_grad()
def edit(tokenizer, var, image, keep, labels, *, cfg=1.5, top_k=0, top_p=0.0, temperature=1.0,
         generator=None, soft=None, paint_passes=6, settle_passes=2):
    """Repaint the part of an image where keep is False, as class labels (B,).

    image (B, 3, S, S) in [-1, 1], keep (S, S) bool -> (B, 3, S, S) in [0, 1]. Hidden pixels are
    replaced before anything reads the image and cannot change it. BadInput: wrong size or label.
    paint_passes: how often the hidden part is drawn, at least once
    settle_passes: how often the tokenizer alone then encodes and decodes the result
    soft: None: the kept part stays as the tokenizer renders it; 0: the kept pixels themselves are
        put back; n: they are faded in over n pixels from the edge"""
    S, sizes = tokenizer.config.image_size, (tuple(image.shape[-2:]), tuple(keep.shape))
    if sizes != ((S, S), (S, S)):
        raise BadInput(f"image and mask must be {S}x{S}, not {sizes[0]} and {sizes[1]}")
    keep = keep.to(image.device)
    if generator is None:
        generator = torch.Generator(keep.device).manual_seed(int(torch.randint(2**62, ())))
    if not keep.any():
        paint_passes, settle_passes = 1, 0                 # plain sampling: nothing has to agree
    # A cell of the last map is kept if half of its pixels are; hide() filled in its other pixels.
    share = F.adaptive_avg_pool2d(keep.float()[None, None], tokenizer.scales[-1])
    kept_cells = trusted_cells = (share >= 0.5).to(image.dtype)          # (1, 1, h, w), 0 or 1
    composite = hide(image, keep)                          # (B, 3, S, S): kept pixels and a guess
    noise = generator.get_state()
    for _ in range(paint_passes):
        # The same noise again, so that a pass refines the figure of the pass before. New noise
        # would draw another figure each time where little is kept.
        generator.set_state(noise)
        tokens = paint(tokenizer, var, composite, kept_cells, trusted_cells, labels, cfg=cfg,
                       top_k=top_k, top_p=top_p, temperature=temperature, generator=generator)
        painted = (tokenizer.tokens_to_image(tokens) + 1) / 2            # (B, 3, S, S) in [0, 1]
        composite = torch.where(keep, image, 2 * painted - 1)
        trusted_cells = torch.ones_like(kept_cells)        # drawn, no longer guessed: all count
    for _ in range(settle_passes):
        painted = (tokenizer.tokens_to_image(tokenizer.image_to_tokens(composite)) + 1) / 2
        composite = torch.where(keep, image, 2 * painted - 1)
    if soft is None:
        return painted
    weight = fade(keep, soft)
    return weight * ((composite + 1) / 2) + (1 - weight) * painted


@torch.no_grad()
def paint(tokenizer, var, composite, kept_cells, trusted_cells, labels, **sampling):
    """One pass: sample every scale, but compute the tokens that are kept. -> K token maps (B, n)

    composite (B, 3, S, S) in [-1, 1]: the image with its hidden part filled in. kept_cells and
    trusted_cells (1, 1, h, w), 0 or 1: cells of the last map that must stay, and cells whose
    features may be averaged into a coarser token."""
    target = tokenizer.encode(composite)                                           # (B, C, h, w)

    def choose(k, drawn, f_hat):
        """Half of a coarse cell kept is enough to compute its token: what this token then gets
        wrong in the kept part, finer scales correct, as they quantize what is still missing."""
        missing = target - f_hat if tokenizer.config.residual else target
        covered = tokenizer.downsample_to(trusted_cells, k).clamp(min=1e-6)        # (1, n, 1)
        mean = tokenizer.downsample_to(missing * trusted_cells, k) / covered       # (B, n, C)
        kept = tokenizer.downsample_to(kept_cells, k)[..., 0] >= 0.5               # (1, n)
        return torch.where(kept, tokenizer.quantizer.nearest(mean), drawn)         # (B, n)
    return sample_tokens(tokenizer, var, labels, choose=choose, **sampling)


def fade(keep, soft):
    """The weight of kept pixels in a blend: 0 where hidden, 1 from `soft` pixels inside the edge
    on, and a straight ramp between. keep (H, W) bool -> (H, W)"""
    hidden = (~keep).float()[None, None]
    depth = 1 - hidden
    for _ in range(soft):
        hidden = F.max_pool2d(hidden, 3, 1, 1)             # the hidden part grows by one pixel
        depth = depth + 1 - hidden
    return depth[0, 0] / (soft + 1)


def outpaint(tokenizer, var, image, grow, labels, *, soft=None, generator=None, paint_passes=2,
             settle_passes=2, **options):
    """Let the canvas grow by (left, top, right, bottom) pixels around the image. One window of
    the model's size after another is edited, always the unfinished one of which most is known.

    image (B, 3, S, S) in [-1, 1] -> (B, 3, top + S + bottom, left + S + right) in [0, 1]. What is
    known stays as it is, but for a blend over `soft` pixels from its edge (default S/8; 0: none).
    options: cfg, top_k, top_p, temperature of edit(). Raises BadInput for a wrong size or label."""
    (left, top, right, bottom), S = grow, tokenizer.config.image_size
    if tuple(image.shape[-2:]) != (S, S):
        raise BadInput(f"the image must be {S}x{S}, not {tuple(image.shape[-2:])}")
    soft = S // 8 if soft is None else soft
    # Windows move by an eighth of their side, in whole cells of the last map: a cell of which half
    # is known counts as kept, so after half a cell's move nothing would be drawn.
    cell = S // tokenizer.scales[-1]
    step = max(cell, S // 8 // cell * cell)
    windows = [(slice(y, y + S), slice(x, x + S)) for y in window_starts(top, bottom, step)
               for x in window_starts(left, right, step)]
    canvas = F.pad(image, (left, right, top, bottom))                    # (B, 3, H, W) in [-1, 1]
    known = F.pad(torch.ones_like(image[0, 0], dtype=torch.bool), (left, right, top, bottom))
    while not known.all():
        unfinished = [window for window in windows if not known[window].all()]
        rows, columns = max(unfinished, key=lambda window: int(known[window].sum()))
        before, keep = canvas[:, :, rows, columns], known[rows, columns]
        painted = edit(tokenizer, var, before, keep, labels, generator=generator,
                       paint_passes=paint_passes, settle_passes=settle_passes, **options)
        weight = fade(keep, soft)
        canvas[:, :, rows, columns] = weight * before + (1 - weight) * (2 * painted - 1)
        known[rows, columns] = True
    return (canvas + 1) / 2


def window_starts(before, after, step):
    """Where windows start along an axis that grows by `before` and `after` pixels: at the image
    itself, and in whole steps inwards from both ends of the canvas, but no nearer to the image
    than a step unless the end is. (5, 4, 2) -> [0, 2, 5, 7, 9]"""
    def distances(room):
        return [n for n in range(room, 0, -step) if n >= step or n == room]
    return sorted([before - n for n in distances(before)] + [before]
                  + [before + n for n in distances(after)])


# -- Models, and what the command line asks for (report/command_line.py) ---------------------------

def load_released(tokenizer_state, var_state, scales=None, heads=None):
    """State dicts in the released layout -> (tokenizer, var), ready to sample. Sizes are read off
    the shapes; `scales` is needed only for schedules other than the paper's two, `heads` only for
    models without query/key normalisation. Raises BadInput for anything in another layout."""
    sizes, weights = released.read_transformer(var_state, scales, heads)
    tokenizer_sizes, tokenizer_weights = released.read_tokenizer(tokenizer_state, sizes["scales"])
    with released.other_layouts_refused(), released.weights_to_come():
        tokenizer = vqvae.MultiScaleVQVAE(vqvae.TokenizerConfig(**tokenizer_sizes))
        var = transformer.VAR(transformer.VARConfig(**sizes))
    return released.fill(tokenizer, tokenizer_weights), released.fill(var, weights)


def load_models(args):
    """--released, --run, the newest run, or the model that came with the code. -> tokenizer, var
    (None: only a tokenizer has been trained), facts: class_names, dataset, sampling, folder"""
    if args.released or args.var_file:
        tokenizer, var = load_released(released.fetch("vae_ch160v4096z32.pth", args.tokenizer_file),
                                       released.fetch(f"var_{args.released}.pth", args.var_file))
        return tokenizer, var, command_line.released_facts(args, var.config.num_classes)
    run, files = command_line.find_run(args)
    tokenizer, about = training.load_tokenizer(files[0])
    about["folder"] = f"shipped-{run.stem}" if run.is_file() else run.name
    if files[1] is None:
        return tokenizer, None, about
    var, trained = training.load_transformer(files[1])
    command_line.check_match(run, trained, tokenizer)
    return tokenizer, var, {**about, **trained}


def draw_images(job, labels, seed=0, **changes):
    """Any number of images of these classes (ints) -> tensors (n, 3, H, W), as many as fit"""
    options = dict(job.sampling, smooth=job.args.smooth, generator=job.generator(seed), **changes)
    return job.in_batches(lambda part: generate(job.tokenizer, job.var, part, **options), labels)


def repaint(job, method, image, region, labels, seed=0, **options):
    """`method`, edit or outpaint, of any number of images -> (N, 3, ., .) in [0, 1]"""
    options.update(job.sampling, generator=job.generator(seed))
    return torch.cat(list(job.in_batches(
        lambda labels, image: method(job.tokenizer, job.var, image, region, labels, **options),
        labels, image, at_once=1 if method is outpaint else job.at_once)))


def show_samples(job, task):
    """Samples and how they come about, or one class at several strengths of guidance."""
    c, names, n = job.classes[0], {c: job.names[c] for c in job.classes}, job.n or 8
    if task == "guidance":
        rows = {cfg: torch.cat(list(draw_images(job, [c] * 8, cfg=cfg)))
                for cfg in sorted({0.0, 1.0, 2.0, 3.0, 5.0, job.sampling["cfg"]})}
        return gallery.guidance(job.out, rows, names[c], job.sampling["cfg"])
    show_claims(job)
    gallery.samples(job.out, draw_images(job, [c for c in names for _ in range(n)]), n, names)
    tokens = sample_tokens(job.tokenizer, job.var, torch.tensor(job.classes[:5], device=job.device),
                           generator=job.generator(), **job.sampling)
    gallery.coarse_to_fine(job.out, job.tokenizer, tokens, list(names.values())[:5])


def show_claims(job):
    """Two claims of this chapter, on one image and one quick edit of its right half."""
    first, again = (torch.cat(list(draw_images(job, job.classes[:1], seed=1))) for _ in range(2))
    keep = torch.arange(job.side).repeat(job.side, 1) < job.side // 2    # (side, side)
    image = 2 * first - 1
    edited = repaint(job, edit, image.to(job.device), keep.to(job.device), job.classes[:1],
                     seed=2, soft=0, paint_passes=1, settle_passes=0)
    moved = (edited - (image + 1) / 2).abs().amax((0, 1))                # (side, side)
    differ = float((first - again).abs().max())
    print(f"same seed: two images differ by {differ:.1g}; an edit moves kept pixels by "
          f"{float(moved[keep].max()):.1g}, others by up to {float(moved[~keep].max()):.2f}")
    assert moved[keep].max() == 0 and (differ == 0 or job.device.type != "cpu")


def show_edits(job, task):
    """What becomes of real images: repainted, out-painted, reconstructed, looked at."""
    image, labels = job.images_to_edit(5 if task in ("outpaint", "edit") else 10)
    if image is None:                                      # random numbers that no task uses again
        image = 2 * torch.cat(list(draw_images(job, labels, seed=2 ** 31))).to(job.device) - 1
    names = [job.names[c] for c in labels]
    if task == "reconstruct":
        gallery.reconstructions(job.out, job.tokenizer, image)
    elif task == "think":
        gallery.think(job.out, job.tokenizer, job.var, image, labels, names)
    elif task == "outpaint":
        grow = [round(part * job.side) for part in job.args.grow]
        gallery.canvas(job.out, image, grow, repaint(job, outpaint, image, grow, labels), names)
    else:
        keep, soft = job.kept_region(task), 0 if job.args.paste else None
        rows = [(f"drawing {i + 1}", labels, i) for i in range(3)]
        if task == "edit":                                 # the same noise as every class
            rows = [(f"as {job.names[c]}", [c] * len(image), 0) for c in job.classes[:10]]
        results = {text: repaint(job, edit, image, keep, classes, seed, soft=soft)
                   for text, classes, seed in rows}
        gallery.edits(job.out, task, job.tokenizer, image, keep, results, names, job.args.paste)


def measure(job, task):
    """Likelihoods, a judge's verdict, or samples for another evaluator."""
    among = job.classes if job.asked else job.every_class
    if task == "density":
        density(job.out, job.tokenizer, partial(log_likelihood, job.tokenizer, job.var),
                *job.images_to_weigh(among), among, job.names)
    elif task == "evaluate":
        (real, labels), (test, test_labels) = job.real_images("train"), job.real_images("test")
        wanted = judge.labels_to_draw(job.n or 1000, labels, test_labels)
        *everything, names = job.whole_split("train")
        network = judge.judge_of(job.dataset, *everything, len(names), job.device)
        judge.introduce(network, *job.whole_split("test")[:2])
        judge.evaluate(job.out, network, job.tokenizer, real, test,
                       job.labels_in(names, test_labels), draw_images(job, wanted),
                       job.labels_in(names, wanted), f"samples, cfg {job.sampling['cfg']:g}")
    else:
        labels = among * (job.n or 50)                     # in turn: the evaluator looks at parts
        gallery.export_npz(job.args.export_npz, draw_images(job, labels), len(labels), job.side)


def main():
    args = command_line.read_arguments(__doc__.splitlines()[0])
    job = command_line.Job(args, *load_models(args))
    other = {"sample": show_samples, "guidance": show_samples, "density": measure,
             "evaluate": measure, "export": measure}
    for task in job.tasks:
        other.get(task, show_edits)(job, task)


if __name__ == "__main__":
    one_line(main)
