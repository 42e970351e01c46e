"""Chapter 6: sample, inpaint, outpaint, change a class, and ask how probable an image is.

One loop over the scales draws an image: predict the logits of map k, draw its tokens, add
them to f_hat, feed f_hat to scale k+1. Editing adds one rule: where the image is kept, the
token is not drawn but computed, as the code nearest to what f_hat *still misses* of it:

    k        1x1     2x2        3x3          ...      8x8
    keep      x      x .       x x .                 x x x x x . . .   x  computed
                     x .       x x .                 x x x x x . . .   .  drawn by the model

Shapes: labels (B,); logits (B, n, V), n = h_k*w_k; tokens: list of K (B, n); image
(B, 3, H, W), in [-1, 1] coming in, [0, 1] going out; keep (H, W), True = leave as it is.

Sources: VAR (Tian et al. 2024), section 3 and appendix B; guidance (Ho and Salimans 2022);
top-p (Holtzman et al. 2020). Unlike in the original code, hidden pixels, which leak there,
are replaced before encoding, kept tokens are computed anew as f_hat grows instead of
replayed, and an edit takes several passes.

    python 06_sample_and_edit.py                  newest run in out/, else the shipped model
    python 06_sample_and_edit.py --task inpaint --box 0.3 0.3 0.7 0.7
"""
import os
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

# Threads that spin while they wait make a run beside a busy process forty times slower.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")            # read when torch is imported

import torch
import torch.nn.functional as F

from data import imagenet
from engine import BadInput
from engine.device import best_precision, pick_device
from engine.options import Parser, number, run_main
from engine.released import fetch, fill, read_tokenizer, read_transformer
from report import gallery

vqvae = import_module("02_multiscale_vqvae")
transformer = import_module("04_var_transformer")
training = import_module("05_train")


# -- Drawing tokens ------------------------------------------------------------------------

def keep_likely(logits, top_k=0, top_p=0.0):
    """Set all but the likely logits to -inf, in a copy. top_k > 0 leaves exactly k, ties or
    not; 0 < top_p < 1 leaves the fewest that hold top_p or more. (..., V) -> (..., V)"""
    # Exercise 06_1
    V, k = logits.shape[-1], top_k if top_k > 0 else logits.shape[-1]
    if k >= V and not 0 < top_p < 1:
        return logits
    value, order = logits.topk(min(k, V), dim=-1)          # likeliest first
    if 0 < top_p < 1:
        # tail: the probability of a token and all less likely ones, summed from the right.
        # If it is at most 1 - top_p, the tokens to the left already hold top_p.
        tail = value.softmax(-1).flip(-1).cumsum(-1).flip(-1)
        drop = tail <= 1 - top_p
        drop[..., 0] = False                               # the likeliest always stays
        value = value.masked_fill(drop, -torch.inf)
    return torch.full_like(logits, -torch.inf).scatter(-1, order, value)


def draw(logits, generator=None):
    """One token per position. logits (B, n, V) -> (B, n). The generator may be a list, one
    per image: then an image does not depend on the others of its batch."""
    if isinstance(generator, list):
        images = zip(logits.split(1), generator, strict=True)
        return torch.cat([draw(image, one) for image, one in images])
    p = logits.softmax(-1).flatten(0, 1)                                        # (B*n, V)
    tokens = torch.multinomial(p, 1, replacement=True, generator=generator)
    return tokens.view(logits.shape[:2])


def soften(logits, progress, codebook, generator=None):
    """The original's "smooth" sampling: mixtures of codes, nearly single ones at the end.
    It looks pleasant but is no sample from the model. logits (B, n, V) -> (B, n, C)"""
    if isinstance(generator, list):
        images = zip(logits.split(1), generator, strict=True)
        return torch.cat([soften(image, progress, codebook, one) for image, one in images])
    noise = -torch.empty_like(logits).exponential_(generator=generator).log()   # Gumbel
    temperature = 0.27 * (1 - 0.95 * progress)
    return ((logits * (1 + progress) + noise) / temperature).softmax(-1) @ codebook


def strengths(cfg, K):
    """Guidance t at each of K scales: cfg itself if it is a list, else steps from 0 to cfg.
    Strong guidance at coarse scales, which decide *what* is drawn, would cost variety."""
    if not hasattr(cfg, "__len__"):
        # Exercise 06_2
        cfg = [cfg * (k / (K - 1)) for k in range(K)] if K > 1 else [cfg]
        # End of exercise
    if len(cfg) != K or not all(0 <= t < torch.inf for t in cfg):
        raise BadInput(f"cfg {cfg}: give a number of at least 0, or {K}, one per scale")
    return cfg


def as_labels(labels, var):
    """A list, an array or a tensor of classes -> (B,) int64 on the device of `var`"""
    labels, count = torch.as_tensor(labels).reshape(-1), var.config.num_classes
    if not len(labels) or not torch.isin(labels.cpu(), torch.arange(count + 1)).all():
        raise BadInput(f"labels must lie in 0..{count - 1}, or be {count} for no class")
    return labels.to(var.head.weight.device, torch.int64)


def mixed_precision(var):
    """The context in which to call `var`: autocast if its linear layers are in 16 bits"""
    device, dtype = var.head.weight.device, var.head.weight.dtype
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def to_image(tokenizer, var, tokens):
    """tokens -> image (B, 3, H, W) in [0, 1], decoded in the precision of `var`"""
    f_hat = tokenizer.features(tokens)                                        # (B, C, h, w)
    with mixed_precision(var):
        image = tokenizer.decode(f_hat)
    return (image.float().clamp(-1, 1) + 1) / 2


@torch.no_grad()
def sample_tokens(tokenizer, var, labels, *, cfg=0.0, top_k=0, top_p=0.0, temperature=1.0,
                  smooth=False, generator=None, choose=None):
    """The loop. choose(k, drawn, f_hat) -> tokens may replace what was drawn. labels (B,)
    -> K token maps (B, n), or with `smooth` mixtures of codes (B, n, C), which a tokenizer
    accepts as well. Temperature 0 takes the likeliest tokens. cfg: a number or a list.

    Guidance: t = 0 is the plain prediction for the class, t > 0 moves beyond it, away from
    the prediction without a class (elsewhere often w = 1 + t). It helps because each token
    is drawn, up to a factor, from p(token|class) [p(token|class) / p(token)]^t, given the
    coarser maps: what speaks for the class counts more."""
    labels, K, no_class = as_labels(labels, var), tokenizer.K, var.config.num_classes
    B, t = len(labels), strengths(cfg, K)
    if not temperature > 1e-6:                             # the limit of temperature 0
        temperature, top_k = 1.0, 1
    guided = any(t)
    if guided:
        # The second half of the batch has no class: the row that label dropout trained.
        labels = torch.cat([labels, torch.full_like(labels, no_class)])         # (2B,)
    with mixed_precision(var):
        conditioning, cache = var.conditioning(labels), var.new_cache()
    f_hat, inputs, tokens = 0, None, []
    for k in range(K):
        if guided and k > 0:
            inputs = inputs.repeat(2, 1, 1)                                     # (2B, n, C)
        with mixed_precision(var):
            logits = var.step(k, inputs, conditioning, cache).float()           # (2B, n, V)
        if guided:
            # Exercise 06_2
            logits = (1 + t[k]) * logits[:B] - t[k] * logits[B:]                # (B, n, V)
            # End of exercise
        logits = keep_likely(logits / temperature, top_k, top_p)                # (B, n, V)
        tokens_k = draw(logits, generator) if not smooth else soften(
            logits, k / max(K - 1, 1), tokenizer.quantizer.codebook, generator)
        if choose is not None:
            tokens_k = choose(k, tokens_k, f_hat)                               # (B, n)
        f_hat, inputs = tokenizer.next_input(k, f_hat, tokens_k)   # (B, C, h, w), (B, n, C)
        tokens.append(tokens_k)
    return tokens


@torch.no_grad()
def generate(tokenizer, var, labels, *, cfg=1.5, tokens=None, keep=None, **sampling):
    """Sample images of the classes in labels (B,) -> (B, 3, H, W) in [0, 1]. cfg (the
    script passes that of the run) and sampling: the options of sample_tokens().

    tokens (list of K (B, n)) and keep (list of K (n,) bool): where keep is True the given
    token is replayed instead of drawn."""
    if (tokens is None) != (keep is None) or (keep is not None and sampling.get("smooth")):
        raise BadInput("tokens and keep go together, and without smooth")

    def replay(k, drawn, f_hat):
        return torch.where(keep[k].to(drawn.device), tokens[k], drawn)          # (B, n)
    drawn = sample_tokens(tokenizer, var, labels, cfg=cfg, **sampling,
                          choose=None if keep is None else replay)
    return to_image(tokenizer, var, drawn)


@torch.no_grad()
def log_likelihood(tokenizer, var, tokens, labels):
    """ln p(tokens | class), exactly: the sum of ln p(token | coarser maps, class) over all
    positions of a scale, for each scale. One pass through the transformer gives them all.

    tokens: list of K (B, n); labels (B,), num_classes: no class -> (B, K) nats"""
    labels = as_labels(labels, var)
    # Exercise 06_3
    inputs = tokenizer.teacher_inputs(tokens)                            # (B, L - first, C)
    with mixed_precision(var):
        logits = var(labels, inputs).float()                             # (B, L, V)
    wanted = torch.cat(tokens, 1)[..., None]                             # (B, L, 1)
    each = logits.log_softmax(-1).gather(-1, wanted)[..., 0]             # (B, L)
    per_scale = each.split([tokens_k.shape[1] for tokens_k in tokens], 1)
    return torch.stack([part.sum(1) for part in per_scale], 1)           # (B, K)


# -- Editing -------------------------------------------------------------------------------

def hide(image, keep):
    """Replace hidden pixels by a smooth continuation of the kept ones, the only ones read,
    so that the encoder meets no edge that the image lacks. image (B, 3, H, W), keep (H, W)

    Pull-push: halve the image until one pixel is left, averaging kept pixels only; then go
    back up and fill each gap from the next smaller image."""
    weight = keep.to(image.dtype)[None, None]              # (1, 1, H, W): share of it kept
    value, finer = torch.where(keep, image, 0.0), []       # sum of kept pixels / all pixels
    while max(value.shape[2:]) > 1:
        finer.append((value, weight))
        value, weight = (F.avg_pool2d(x, 2, ceil_mode=True) for x in (value, weight))
    filled = value / weight.clamp(min=1e-6)
    for value, weight in reversed(finer):
        filled = F.interpolate(filled, value.shape[2:], mode="bilinear")
        filled = torch.where(weight > 0, value / weight.clamp(min=1e-6), filled)
    return filled


@torch.no_grad()
def edit(tokenizer, var, image, keep, labels, *, cfg=1.5, generator=None, paint_passes=6,
         settle_passes=2, **sampling):
    """Repaint the part of an image where keep is False, as the classes labels (B,).
    sampling: top_k, top_p and temperature, as in sample_tokens().

    image (B, 3, S, S) in [-1, 1], keep (S, S), 1 or True = keep -> (B, 3, S, S) in [0, 1],
    with the kept part as the tokenizer renders it. Nothing reads the hidden pixels.
    paint_passes: how often the hidden part is drawn, at least once
    settle_passes: how often the tokenizer alone then encodes and decodes the result"""
    S, keep = tokenizer.config.image_size, torch.as_tensor(keep).to(image.device)
    if image.shape[2:] != (S, S) or keep.shape != (S, S):
        raise BadInput(f"image and mask must be {S}x{S}, not {list(image.shape)} and "
                       f"{list(keep.shape)}")
    if not ((keep == 0) | (keep == 1)).all():
        raise BadInput("the mask must hold True and False, or 1 and 0, and nothing else")
    keep = keep.bool()
    if not keep.any():
        paint_passes, settle_passes = 1, 0                 # plain sampling
    if generator is None:
        seed = int(torch.randint(2 ** 62, ()))
        generator = torch.Generator(image.device).manual_seed(seed)
    # A cell of the last map is kept if half of its pixels are; hide() fills in the others.
    share = F.adaptive_avg_pool2d(keep.float()[None, None], tokenizer.scales[-1])
    kept_cells = trusted_cells = (share >= 0.5).to(image.dtype)          # (1, 1, h, w)
    composite = hide(image, keep)                          # (B, 3, S, S): kept, and a guess
    # Why repeat? In pass 1 a coarse token on the border is computed from its kept half
    # only. In pass 2 its other half has been drawn, so it is computed from the mean of the
    # whole cell. Pass by pass, the kept and the drawn part come to agree. With the same
    # noise, a pass refines the figure of the pass before; new noise would draw another one.
    generators = generator if isinstance(generator, list) else [generator]
    noise = [one.get_state() for one in generators]
    for _ in range(paint_passes):
        for one, state in zip(generators, noise):
            one.set_state(state)
        tokens = paint(tokenizer, var, composite, kept_cells, trusted_cells, labels,
                       cfg=cfg, generator=generator, **sampling)
        painted = to_image(tokenizer, var, tokens)                           # (B, 3, S, S)
        composite = torch.where(keep, image, 2 * painted - 1)
        trusted_cells = torch.ones_like(kept_cells)        # drawn, no longer guessed
    for _ in range(settle_passes):
        painted = to_image(tokenizer, var, tokenizer.image_to_tokens(composite))
        composite = torch.where(keep, image, 2 * painted - 1)
    return painted


@torch.no_grad()
def paint(tokenizer, var, composite, kept_cells, trusted_cells, labels, **sampling):
    """One pass: sample every scale, but compute the tokens that are kept. -> K maps (B, n)

    composite (B, 3, S, S) in [-1, 1]: the image with its hidden part filled in. kept_cells
    and trusted_cells (1, 1, h, w), 0 or 1: cells of the last map that must stay, and cells
    whose features may be averaged into a coarser token."""
    target = tokenizer.encode(composite)                                      # (B, C, h, w)

    def choose(k, drawn, f_hat):
        """A token is computed if half of its cell is kept. What it then gets wrong in the
        kept part, finer scales correct, because they quantize what is still missing."""
        missing = target - f_hat if tokenizer.config.residual else target
        covered = tokenizer.downsample_to(trusted_cells, k).clamp(min=1e-6)   # (1, n, 1)
        mean = tokenizer.downsample_to(missing * trusted_cells, k) / covered  # (B, n, C)
        kept = tokenizer.downsample_to(kept_cells, k)[..., 0] >= 0.5          # (1, n)
        return torch.where(kept, tokenizer.quantizer.nearest(mean), drawn)    # (B, n)
    return sample_tokens(tokenizer, var, labels, choose=choose, **sampling)


# -- Models --------------------------------------------------------------------------------

def load_released(tokenizer_state, var_state, scales=None, heads=None):
    """State dicts in the released layout -> (tokenizer, var). Sizes come from the shapes.
    `scales` is needed only for schedules other than the paper's two, `heads` only without
    query/key normalisation. Raises BadInput for another layout."""
    sizes, weights = read_transformer(var_state, scales, heads)
    scales = sizes["scales"]
    with torch.device("meta"):                             # without random weights
        var = transformer.VAR(transformer.VARConfig(**sizes))
    var.mask = transformer.masking.block_causal_mask(scales)
    var.scale_of_token = transformer.masking.scale_of_token(scales)
    fill(var, weights)
    sizes, weights = read_tokenizer(tokenizer_state, scales)
    return fill(vqvae.MultiScaleVQVAE(vqvae.TokenizerConfig(**sizes)), weights), var


def load_model(args):
    """--released, --run, the newest run in out/, or the shipped model -> tokenizer, var and
    facts about them: class_names, dataset, sampling, name"""
    if args.released:
        tokenizer, var = load_released(fetch("vae_ch160v4096z32.pth", args.tokenizer_file),
                                       fetch(f"var_{args.released}.pth", args.var_file))
        return tokenizer, var, dict(
            class_names=[*imagenet.wnid_names().values()], dataset="imagenet",
            name=args.released, sampling=dict(cfg=1.5, top_k=900, top_p=0.96))
    runs = sorted(Path("out").glob("*/transformer.pt"), key=os.path.getmtime)
    shipped = Path(__file__).with_name("data") / "pretrained" / "shapes.pt"
    run = Path(args.run or (runs[-1].parent if runs else shipped))
    print(f"model: {run}")
    tokenizer, _ = training.load_tokenizer(run if run.is_file() else run / "tokenizer.pt")
    var, about = training.load_transformer(run if run.is_file() else run / "transformer.pt")
    name = f"shipped-{run.stem}" if run.is_file() else run.resolve().name
    return tokenizer, var, dict(about, name=name)


def set_precision(var, name, device):
    """Store all linear layers in this precision. "auto": float32, but 16 bits for more than
    100 M parameters where that is fast. The tokenizer always stays in float32."""
    if name == "auto":
        large = sum(p.numel() for p in var.parameters()) > 1e8
        name = best_precision(device) if large else "float32"
    for layer in var.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.to(getattr(torch, name))


# -- Command line --------------------------------------------------------------------------

def read_arguments():
    parser = Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--run", help="folder of a run, or a shipped file [the newest run in out/]")
    add("--released", choices=("d16", "d20", "d24", "d30", "d36"), help="by the paper")
    add("--tokenizer-file", help="with --released: this file instead of a download")
    add("--var-file", help="with --released: this file instead of a download")
    add("--task", default="all", choices=("all", *gallery.TASKS), help="all: the first six")
    add("--classes", nargs="+", default=[], metavar="NAME", help="or the first N [10]")
    add("--n", type=number(int, 1), help="number of images, per class if they are samples")
    add("--cfg", type=number(float), help="guidance at the last scale; 0: none [the run's]")
    add("--top-k", type=number(int), help="draw from the k likeliest tokens; 0: from all")
    add("--top-p", type=number(float), help="from the fewest that hold share p; 0: all")
    add("--smooth", action="store_true", help="sample mixtures of codes")
    add("--image", help="image to work on [held-out images]")
    add("--box", nargs=4, type=number(float), metavar=("X0", "Y0", "X1", "Y1"),
        help="part to repaint (outpaint: to keep), in fractions of the side")
    add("--mask", help="image file instead of --box: its white part")
    add("--export-npz", metavar="FILE", help="only write samples for ImageNet's evaluator")
    add("--data-dir", default="", help="folder of the data set")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--precision", default="auto", choices=("auto", "float32", "float16", "bfloat16"))
    add("--seed", type=number(int), default=0)
    add("--out", help="folder for the results [out/NAME]")
    args = parser.parse_args()
    if (args.top_p or 0) > 1:
        raise BadInput(f"--top-p {args.top_p}: a probability is at most 1")
    if (args.tokenizer_file or args.var_file) and not args.released:
        raise BadInput("--tokenizer-file and --var-file go with --released")
    return args


def main():
    args = read_arguments()
    args.device = pick_device(args.device)
    tokenizer, var, about = load_model(args)
    set_precision(var, args.precision, args.device)
    both = tokenizer.to(args.device), var.to(args.device)
    args.names, args.dataset = about["class_names"], about["dataset"]
    args.labels = gallery.pick_classes(args.names, args.classes)
    args.side = tokenizer.config.image_size
    args.out = Path(args.out or f"out/{about['name']}")
    sampling = {name: default if getattr(args, name) is None else getattr(args, name)
                for name, default in about["sampling"].items()}
    print("sampling:", ", ".join(f"{name} {x:g}" for name, x in sampling.items()))
    torch.manual_seed(args.seed)
    model = SimpleNamespace(
        tokenizer=tokenizer, cfg=sampling["cfg"],
        draw_tokens=partial(sample_tokens, *both, **sampling),
        log_likelihood=partial(log_likelihood, *both),
        # These two make any number of images, as many at a time as fit into memory.
        sample=partial(gallery.in_batches, args,
                       partial(generate, *both, smooth=args.smooth, **sampling)),
        repaint=partial(gallery.in_batches, args, partial(edit, *both, **sampling)))
    if args.export_npz:
        return gallery.export_npz(args, model)
    tasks = list(gallery.TASKS)[:6] if args.task == "all" else [args.task]
    if args.task == "all" and args.released and not (args.image or args.data_dir):
        tasks = ["sample", "guidance"]                     # there are no images to edit
    for task in tasks:
        gallery.TASKS[task](args, model)


if __name__ == "__main__":
    run_main(main)
