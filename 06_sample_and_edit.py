"""Chapter 6: sample, in-paint, out-paint, change a class, evaluate, use the released weights.

One loop does it all. Scale after scale: predict, choose tokens, add them to f_hat, show the result
to the next scale. Editing differs in one line: where the picture is to be kept, the token is not
drawn but computed, as the rounding of *what is still missing* between the picture and f_hat:

    k        1x1     2x2        3x3          ...      8x8
    keep      .      x .       x x .                 x x x x x . . .     x  rounded from picture
                     x .       x x .                 x x x x x . . .     .  drawn by the model

Shapes: labels (B,); logits (B, n, V), n = h_k*w_k; tokens: list of K (B, n); image (B, 3, H, W) in
[-1, 1] coming in, [0, 1] going out; keep (H, W) bool, True = leave as it is.

Sources: VAR (Tian et al. 2024), sections 3 and 5 (zero-shot editing); classifier-free guidance (Ho
and Salimans 2022); top-p sampling (Holtzman et al. 2020); FID (Heusel et al. 2017).

Differs from the original VAR code: what is hidden is hidden before encoding (there the encoder sees
the whole picture, and hidden pixels leak into the tokens that are kept); the 1x1 token is not
always kept; kept tokens are rounded again as f_hat grows, not replayed from another picture.

    python 06_sample_and_edit.py                        newest run in out/, else the shipped model
    python 06_sample_and_edit.py --task inpaint --box 0.3 0.3 0.7 0.7
    python 06_sample_and_edit.py --released d16 --classes goldfish volcano
"""
import time
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from data import BadInput, folder, health, imagenet, judge, pictures, released
from data.batches import fingerprint, load_data, per_pass, rows_of, sample_of, to_float
from data.plumbing import OneLineParser, clock, number, one_line, pick_device

vqvae = import_module("02_multiscale_vqvae")
transformer = import_module("04_var_transformer")
training = import_module("05_train")


# -- Drawing tokens --------------------------------------------------------------------------------

def keep_likely(logits, top_k=0, top_p=0.0):
    """Set all but the likely logits to -inf, in a copy. top_k > 0 leaves exactly k, whatever is
    equal; 0 < top_p < 1 leaves the fewest that together hold top_p or more. (..., V) -> (..., V)"""
    V = logits.shape[-1]
    if 0 < top_k < V:
        best = logits.topk(top_k, dim=-1).indices
        logits = torch.full_like(logits, -torch.inf).scatter(-1, best, logits.gather(-1, best))
    if 0 < top_p < 1:
        value, order = logits.sort(dim=-1, descending=False)
        drop = value.softmax(-1).cumsum(-1) <= 1 - top_p
        drop[..., -1] = False                              # the likeliest always stays
        logits = logits.masked_fill(drop.scatter(-1, order, drop), -torch.inf)
    return logits


def draw(logits, generator=None):
    """One token per position. logits (B, n, V) -> (B, n)"""
    p = logits.softmax(-1).flatten(0, 1)
    return torch.multinomial(p, 1, replacement=True, generator=generator).view(logits.shape[:2])


def soften(logits, ratio, codebook, generator=None):
    """"Smooth" sampling of the original: a mixture of codes by Gumbel-softmax instead of one code;
    pleasant to look at, not a sample from the model. -> code vectors (B, n, C)"""
    noise = torch.empty_like(logits).exponential_(generator=generator).log()
    temperature = max(0.27 * (1 - 0.95 * ratio), 0.005)
    return ((logits * (1 + ratio) - noise) / temperature).softmax(-1) @ codebook


@torch.no_grad()
def sample_scales(tokenizer, var, labels, *, cfg=0.0, top_k=0, top_p=0.0, smooth=False,
                  generator=None, choose=None):
    """The loop. choose(k, tokens_k, f_hat) may replace drawn tokens. labels (B,) -> the K f_hats
    (B, C, h, w), coarse to fine.

    Guidance: logits = (1 + t) conditional - t unconditional, t = cfg * k / (K - 1). It ramps up
    with the scale because the coarse scales decide *what* is drawn: strong guidance there makes all
    pictures alike; at fine scales it only sharpens. At the first scale t = 0."""
    if len(labels) == 0 or labels.min() < 0 or labels.max() > var.config.num_classes:
        raise BadInput(f"labels must lie in 0..{var.config.num_classes - 1} "
                       f"({var.config.num_classes}: no class)")
    K, B = tokenizer.K, len(labels)
    if cfg > 0:                                            # second half: "no class", a learnt row
        labels = torch.cat([labels, torch.full_like(labels, var.config.num_classes)])
    conditioning, cache = var.conditioning(labels), var.new_cache()
    side, C = tokenizer.scales[-1], tokenizer.config.latent_dim
    f_hat, inputs, steps = conditioning[0].new_zeros(B, C, side, side), None, []
    for k in range(K):
        ratio = k / max(K - 1, 1)
        if cfg > 0 and inputs is not None:
            inputs = inputs.repeat(2, 1, 1)
        logits = var.step(k, inputs, conditioning, cache).float()
        if cfg > 0:
            t = cfg * ratio
            logits = (1 + t) * logits[:B] - t * logits[B:]
        logits = keep_likely(logits, top_k, top_p)
        if smooth:
            tokens_k = soften(logits, ratio, tokenizer.quantizer.codebook, generator)
        else:
            tokens_k = draw(logits, generator)
        if choose is not None:
            tokens_k = choose(k, tokens_k, f_hat)
        f_hat, inputs = tokenizer.next_input(k, f_hat, tokens_k)
        steps.append(f_hat)
    return steps


def to_picture(tokenizer, f_hat):
    """f_hat -> image (B, 3, H, W) in [0, 1]"""
    with torch.no_grad():
        return (tokenizer.decode(f_hat).clamp(-1, 1) + 1) / 2


def generate(tokenizer, var, labels, *, cfg=1.5, top_k=0, top_p=0.0, smooth=False, generator=None,
             tokens=None, keep=None):
    """Sample pictures of the classes in labels (B,). -> (B, 3, H, W) in [0, 1]

    tokens (list of K (B, n)) and keep (list of K (n,) bool): where keep is True the given token is
    replayed instead of drawn. Raises BadInput for a label the model does not know."""

    if (tokens is None) != (keep is None) or (smooth and tokens is not None):
        raise BadInput("tokens and keep go together, and without smooth")

    def replay(k, tokens_k, f_hat):
        return torch.where(keep[k].to(tokens_k.device), tokens[k], tokens_k)
    steps = sample_scales(tokenizer, var, labels, cfg=cfg, top_k=top_k, top_p=top_p, smooth=smooth,
                          generator=generator, choose=replay if tokens is not None else None)
    return to_picture(tokenizer, steps[-1])


# -- Editing ---------------------------------------------------------------------------------------

def hide(image, keep):
    """Replace hidden pixels by a smooth continuation of the kept ones, so that the encoder meets no
    edge that is not in the picture. Reads kept pixels only. image (B, 3, H, W), keep (H, W)"""
    weight = keep.to(image.dtype)[None, None]
    value, levels = torch.where(keep, image, 0.0), []
    while max(value.shape[2:]) > 1:                        # averages over ever larger windows ...
        levels.append((value, weight))
        value, weight = (F.avg_pool2d(x, 2, ceil_mode=True) for x in (value, weight))
    filled = value / weight.clamp(min=1e-6)
    for value, weight in reversed(levels):                 # ... give way to finer ones where known
        filled = F.interpolate(filled, value.shape[2:], mode="bilinear")
        filled = torch.where(weight > 0, value / weight.clamp(min=1e-6), filled)
    return filled


def edit(tokenizer, var, image, keep, labels, *, cfg=1.5, top_k=0, top_p=0.0, generator=None,
         paste=False, looks=2):
    """Repaint the part of a picture where keep is False, as class labels (B,).

    image (B, 3, H, W) in [-1, 1], keep (H, W) bool -> (B, 3, H, W) in [0, 1]. Hidden pixels are
    replaced before anything reads the picture: they cannot change the result. paste=True puts the
    kept pixels themselves back over the tokenizer's rendering of them.

    looks: through GroupNorm a filling changes the kept part's features too. Every further look sees
    what was painted last time there instead, and paints again with the same random numbers."""
    side = tokenizer.config.image_size
    if not tuple(image.shape[-2:]) == tuple(keep.shape) == (side, side):
        raise BadInput(f"picture and mask must be {side}x{side}, not {tuple(image.shape[-2:])} and "
                       f"{tuple(keep.shape)}")
    keep = keep.to(image.device)
    generator = generator or torch.Generator(keep.device).manual_seed(int(torch.randint(2**62, ())))
    start, shown = generator.get_state(), hide(image, keep)
    # Cells of which half or more is kept count as known; the rest of such a cell is continued.
    whole = F.adaptive_avg_pool2d(keep.float()[None, None], tokenizer.scales[-1])
    known = (whole >= 0.5).to(image.dtype)

    def choose(k, tokens_k, f_hat):
        """Half of a cell known is enough to fix its token: what it gets wrong of the kept part, the
        finer scales put right, since they round what is still missing."""
        missing = target - f_hat if tokenizer.config.residual else target
        share = tokenizer.look_at(known, k)                              # (1, n, 1)
        r = tokenizer.look_at(missing * known, k) / share.clamp(min=1e-6)
        return torch.where(share[..., 0] >= 0.5, tokenizer.quantizer.nearest(r), tokens_k)
    for _ in range(looks):
        with torch.no_grad():
            target = tokenizer.encode(shown)
        generator.set_state(start)
        steps = sample_scales(tokenizer, var, labels, cfg=cfg, top_k=top_k, top_p=top_p,
                              generator=generator, choose=choose)
        result = to_picture(tokenizer, steps[-1])
        shown = torch.where(keep, image, 2 * result - 1)
    return torch.where(keep, (image + 1) / 2, result) if paste else result


# -- The released weights --------------------------------------------------------------------------

def load_released(tokenizer_state, var_state, scales=None, heads=None):
    """State dicts in the released layout -> (tokenizer, var), ready to sample. Sizes are read off
    the shapes; `scales` is needed only for schedules other than the paper's two, `heads` only for
    models without query/key normalisation. Raises BadInput for anything in another layout."""
    tokenizer_state = released.unwrap(tokenizer_state, ("trainer", "vae_local"), "tokenizer")
    var_state = released.unwrap(var_state, ("trainer", "var_wo_ddp"), "transformer")
    for state, key, what in ((tokenizer_state, "quantize.embedding.weight", "tokenizer"),
                             (var_state, "pos_1LC", "transformer")):
        if key not in state:
            raise BadInput(f"not a released VAR {what}: it has no entry {key!r}")
    length = var_state["pos_1LC"].shape[1] if var_state["pos_1LC"].ndim == 3 else 0
    scales = tuple(scales or released.SCALES.get(length, ()))
    if sum(s * s for s in scales) != length:
        raise BadInput(f"the transformer has {length} positions, the scales {scales} make "
                       f"{sum(s * s for s in scales)}: give the scales it was trained with")
    try:
        with torch.device("meta"):                         # no time spent on random weights
            sizes = released.tokenizer_sizes(tokenizer_state, scales)
            tokenizer = vqvae.MultiScaleVQVAE(vqvae.TokenizerConfig(**sizes))
            sizes = released.var_sizes(var_state, scales, heads)
            var = transformer.VAR(transformer.VARConfig(**sizes))
        for model, state, rename in ((tokenizer, tokenizer_state, released.tokenizer_name),
                                     (var, var_state, released.var_name)):
            fill(model, {rename(name): value for name, value in state.items()})
    except (KeyError, RuntimeError, IndexError, ValueError, TypeError) as error:
        raise BadInput(f"not in the released layout: {str(error).splitlines()[0][:150]}") from None
    return tokenizer, var


def fill(model, state):
    """Give a model made on the meta device its weights; every name must be known and none missing,
    but for what training alone uses."""
    state.pop(None, None)
    own = model.state_dict()
    unused = {"quantizer.hits", "quantizer.sums", "quantizer.initialised"} & set(own)
    wrong = (set(own) - unused) ^ set(state)
    if wrong:
        raise KeyError(f"entries missing or unknown: {sorted(map(str, wrong))[:3]}")
    state.update({name: torch.zeros_like(own[name], device="cpu") for name in unused})
    model.load_state_dict(state, assign=True)
    for name, buffer in model.named_buffers():             # not stored, so still without memory
        if buffer.is_meta:
            owner, _, short = name.rpartition(".")
            fresh = transformer.mask.scale_of_token(model.config.scales)
            setattr(model.get_submodule(owner), short, fresh)
    model.eval().requires_grad_(False)


# -- Command line: which model, which pictures -----------------------------------------------------

class Studio:
    """A model, its class names, and how the command line wants it used."""

    def __init__(self, args):
        self.args, self.device = args, pick_device(args.device)
        torch.manual_seed(args.seed)
        self.dataset, sampling = None, dict(cfg=1.5, top_k=900, top_p=0.96)
        if args.released or args.var_file:
            models = load_released(
                released.fetch("vae_ch160v4096z32.pth", args.tokenizer_file),
                released.fetch(f"var_{args.released}.pth", args.var_file))
            self.tokenizer, self.var = (model.to(self.device) for model in models)
            count = self.var.config.num_classes
            self.names = (imagenet.class_names() if count == 1000 else
                          [f"class {i}" for i in range(count)])
            where = "released"
        else:
            path = find_run(args.run)
            where = path.stem if path.is_file() else path.name
            one = path.is_file()                           # a shipped file holds both
            self.tokenizer, _ = training.load_tokenizer(path if one else path / "tokenizer.pt",
                                                        self.device)
            self.var, about = training.load_transformer(path if one else path / "transformer.pt",
                                                        self.device)
            if not one and about["settings"]["tokenizer"] != training.fingerprint(self.tokenizer):
                raise BadInput(f"{path}: its transformer was trained on the tokens of another "
                               "tokenizer; train it again: 05_train.py --stage transformer --fresh")
            self.names, self.dataset = about["class_names"], about["dataset"]
            sampling = about["sampling"]
            print(f"model: {path}")
        for path in filter(None, (args.image, args.mask)):
            open_picture(path)                             # fail before anything is drawn
        if args.image and not args.classes and args.task != "reconstruct":
            print(f"--classes was not given: working as class {self.names[0]!r}")
        self.out = Path(args.out or Path("out") / where)
        self.out.mkdir(parents=True, exist_ok=True)
        self.sampling = {k: v if getattr(args, k) is None else getattr(args, k)
                         for k, v in sampling.items()}
        self.side = self.tokenizer.config.image_size
        self.classes = ([find_class(self.names, text) for text in args.classes] if args.classes
                        else list(range(len(self.names)))[:10])

    def generator(self, seed=None):
        return torch.Generator(self.device).manual_seed(self.args.seed if seed is None else seed)

    def sample(self, labels):
        """Any number of pictures, in batches that fit. labels: ints -> (N, 3, H, W) on cpu"""
        generator, done, begin = self.generator(), [], time.time()
        for part in torch.tensor(labels, device=self.device).split(max(1, 8000 // self.var.L)):
            done.append(generate(self.tokenizer, self.var, part, smooth=self.args.smooth,
                                 generator=generator, **self.sampling).cpu())
            count, seconds = sum(map(len, done)), time.time() - begin
            if seconds > 3 and count < len(labels):
                eta = clock(seconds / count * (len(labels) - count))
                print(f"  {count}/{len(labels)} pictures | eta {eta}", flush=True)
        return torch.cat(done)

    def pictures(self, count):
        """Pictures to work on: --image, else held-out ones, else ones the model draws itself.
        -> image (n, 3, H, W) in [-1, 1], labels list"""
        if self.args.image:
            photo = open_picture(self.args.image).convert("RGB")
            short = min(photo.size)
            left, top = (photo.width - short) // 2, (photo.height - short) // 2
            photo = photo.resize((self.side, self.side), Image.LANCZOS,
                                 (left, top, left + short, top + short))
            return to_float(torch.from_numpy(np.array(photo))[None]), [self.classes[0]]
        try:
            images, labels, _ = load_data(self.dataset or "", "test", self.side, self.args.data_dir)
            if not np.isin(labels, self.classes).any():
                raise BadInput("none of these classes among them")
        except BadInput as error:
            print(f"no held-out pictures ({error}): working on pictures drawn by the model itself")
            labels = self.classes[:count]
            return self.sample(labels) * 2 - 1, labels
        at = [np.flatnonzero(labels == c)[0] for c in self.classes if (labels == c).any()][:count]
        chosen = torch.from_numpy(np.stack([images[int(i)] for i in at]))
        return to_float(chosen), [int(labels[i]) for i in at]

    def mask(self, default):
        """(H, W) bool, True where --mask is white or --box reaches: the part to repaint."""
        if self.args.mask:
            grey = open_picture(self.args.mask).convert("L").resize((self.side,) * 2, Image.BOX)
            return torch.from_numpy(np.array(grey)) > 127
        x0, y0, x1, y1 = (round(v * self.side) for v in self.args.box or default)
        inside = torch.zeros(self.side, self.side, dtype=torch.bool)
        inside[y0:y1, x0:x1] = True
        return inside

    def save(self, name, images, columns, **labels):
        path = self.out / f"{name}.png"
        pictures.save_grid(path, images, columns, **labels)
        print(f"wrote {path}")


def open_picture(path):
    try:
        return folder.decode(path)[0]
    except Exception as error:                             # whatever a broken file makes Pillow say
        raise BadInput(f"{path}: not a readable picture ({error})") from None


def find_run(given):
    """--run, or the newest run in out/, or the model that came with the code."""
    if given:
        if not Path(given).exists():
            raise BadInput(f"--run {given}: no such folder or file")
        return Path(given)
    runs = sorted(Path("out").glob("*/transformer.pt"), key=lambda path: path.stat().st_mtime)
    shipped = sorted((Path(training.__file__).parent / "data" / "pretrained").glob("*.pt"))
    if not runs and not shipped:
        raise BadInput("no run in out/: train one with `python 05_train.py`, or use --run")
    return runs[-1].parent if runs else shipped[-1]


def find_class(names, text):
    """A class by name or index. Raises BadInput with some of the names there are."""
    if len(names) == 1000 and names == imagenet.class_names():
        return imagenet.find_class(text)
    folded = [name.casefold() for name in names]
    if text.casefold() in folded:
        return folded.index(text.casefold())
    if text.isdecimal() and len(text) < 9 and int(text) < len(names):
        return int(text)
    raise BadInput(f"no class {text!r}; this model has {len(names)}: {', '.join(names[:12])}")


# -- Tasks -----------------------------------------------------------------------------------------

def sample(studio):
    """A grid with a row per class, and how the first pictures came about, scale by scale."""
    n, classes = studio.args.n or 8, studio.classes
    grid = studio.sample([c for c in classes for _ in range(n)])
    studio.save("samples", grid, n, row_labels=[studio.names[c] for c in classes])
    tokenizer, labels = studio.tokenizer, torch.tensor(classes[:10], device=studio.device)
    steps = sample_scales(tokenizer, studio.var, labels, generator=studio.generator(),
                          **studio.sampling)
    stages = [to_picture(tokenizer, f_hat).cpu() for f_hat in steps]
    studio.save("coarse_to_fine", torch.cat(stages), len(labels),
                column_labels=[studio.names[c] for c in classes[:10]],
                row_labels=[f"{s}x{s}" for s in tokenizer.scales])
    zoom = max(1, 96 // studio.side)
    frames = [torch.cat(list(stage), 2)[None] for stage in stages]       # side by side
    frames = [np.kron(pictures.to_uint8(f)[0], np.ones((zoom, zoom, 1), np.uint8)) for f in frames]
    pictures.save_gif(studio.out / "coarse_to_fine.gif", frames + [frames[-1]] * 3, 400)
    print(f"wrote {studio.out / 'coarse_to_fine.gif'}")


def reconstruct(studio):
    image, _ = studio.pictures(10)
    image = image.to(studio.device)
    with torch.no_grad():
        steps = studio.tokenizer.pyramid(studio.tokenizer.image_to_tokens(image))
    last = to_picture(studio.tokenizer, steps[-1])
    print(f"reconstruction: {float(health.psnr(last * 2 - 1, image).mean()):.1f} dB")
    rows = torch.cat([(image + 1) / 2] + [to_picture(studio.tokenizer, f) for f in steps]).cpu()
    studio.save("reconstruct", rows, len(image),
                row_labels=["original"] + [f"{s}x{s}" for s in studio.tokenizer.scales])


def repaint(studio, name, repaint_here, recolour=None):
    """Shared by in-painting, out-painting and class editing: original, what is kept (grey: hidden),
    results (three seeds, or with `recolour` one row per class)."""
    image, labels = studio.pictures(8)
    image, keep = image.to(studio.device), ~repaint_here.to(studio.device)
    shown = torch.where(keep, (image + 1) / 2, 0.5)
    rows, texts = [(image + 1) / 2, shown], ["original", "kept"]
    variants = ([(f"seed {s}", labels, s) for s in range(3)] if recolour is None else
                [(studio.names[c], [c] * len(image), 0) for c in recolour])
    kept_db = []
    for text, classes, seed in variants:
        result = edit(studio.tokenizer, studio.var, image, keep,
                      torch.tensor(classes, device=studio.device),
                      generator=studio.generator(studio.args.seed + seed),
                      paste=studio.args.paste, **studio.sampling)
        if keep.any():
            error = (result - (image + 1) / 2)[:, :, keep].square().mean().clamp(min=1e-10)
            kept_db.append(float(-10 * torch.log10(error)))
        rows.append(result)
        texts.append(text)
    if kept_db:
        print(f"{name}: kept region {np.mean(kept_db):.1f} dB")
    studio.save(name, torch.cat(rows).cpu(), len(image), row_labels=texts)


def inpaint(studio):
    repaint(studio, "inpaint", studio.mask((0.5, 0.0, 1.0, 1.0)))


def outpaint(studio):
    """Keep a window, draw what surrounds it: in-painting with the mask turned inside out."""
    inside = studio.mask((0.0, 0.0, 1.0, 0.6))
    repaint(studio, "outpaint", inside if studio.args.mask else ~inside)


def edit_class(studio):
    others = studio.classes[:6]
    repaint(studio, "edit", studio.mask((0.125, 0.125, 0.875, 0.875)), recolour=others)


def evaluate(studio):
    """Samples before a small judge network that was trained on real pictures. Its Frechet distance
    and precision/recall are on its own features: not comparable with Inception FID."""
    if not studio.dataset:
        raise BadInput("evaluate needs a model trained here: the released ones name no data set")
    where = studio.dataset, studio.args.data_dir
    real, labels, names = load_data(where[0], "train", studio.side, where[1])
    test, test_labels, _ = load_data(where[0], "test", studio.side, where[1])
    if min(len(real), len(test), studio.args.n or 1000) < 4:
        raise BadInput(f"evaluate needs 4 pictures of each kind; there are {len(real)} to train "
                       f"on, {len(test)} held out and {studio.args.n or 1000} to sample")
    steps = 100 if studio.dataset == "shapes" else 2000
    path = Path("out") / f"judge_{Path(studio.dataset).name}_{fingerprint(real)}.pt"
    network = judge.load_or_train(path, real, labels, len(names), steps=steps, seed=0)
    print(f"judge: {judge.accuracy(network, test, test_labels):.2%} right on held-out pictures")
    count = studio.args.n or 1000
    wanted = np.arange(count) % len(names)
    held_out = sample_of(test, count)
    image = to_float(held_out)
    with torch.no_grad():
        rebuilt = torch.cat([studio.tokenizer.tokens_to_image(studio.tokenizer.image_to_tokens(
            part.to(studio.device))).cpu() for part in image.split(per_pass(studio.side))])
    at = rows_of(len(test), count)
    judge.compare(network, sample_of(real, count).numpy(), {
        "held-out pictures (floor)": ((image + 1) / 2, test_labels[at]),
        "reconstructions": ((rebuilt + 1) / 2, test_labels[at]),
        "samples": (studio.sample(wanted.tolist()), wanted)})


TASKS = dict(sample=sample, reconstruct=reconstruct, inpaint=inpaint, outpaint=outpaint,
             edit=edit_class)


def read_arguments(argv=None):
    p = OneLineParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    p.add_argument("--run", help="folder of a run, or a shipped file; default: newest in out/")
    p.add_argument("--released", choices=("d16", "d20", "d24", "d30", "d36"),
                   help="the paper's models")
    p.add_argument("--tokenizer-file", help="released tokenizer, instead of downloading it")
    p.add_argument("--var-file", help="released transformer, instead of downloading it")
    p.add_argument("--task", default="all", choices=("all", *TASKS, "evaluate"))
    p.add_argument("--classes", nargs="+", metavar="NAME", help="names or indices; default: ten")
    p.add_argument("--n", type=number(int, 1), help="pictures per class (evaluate: in all)")
    p.add_argument("--cfg", type=number(float, 0), help="guidance at the last scale; 0: none")
    p.add_argument("--top-k", type=number(int, 0), help="draw among the k likeliest tokens; 0: all")
    p.add_argument("--top-p", type=number(float, 0), help="draw among the likeliest, p in all")
    p.add_argument("--smooth", action="store_true", help="mix codes (--task sample only)")
    p.add_argument("--image", help="picture to reconstruct or edit; default: held-out ones")
    p.add_argument("--box", nargs=4, type=number(float, 0), metavar=("X0", "Y0", "X1", "Y1"),
                   help="part to repaint (outpaint: to keep), in fractions of the side")
    p.add_argument("--mask", help="picture file instead of a box; white: repaint")
    p.add_argument("--paste", action="store_true", help="put the kept pixels themselves back")
    p.add_argument("--data-dir", default="", help="where the held-out pictures lie")
    p.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    p.add_argument("--seed", type=number(int, 0), default=0)
    p.add_argument("--out", help="folder for the pictures; default out/NAME")
    args = p.parse_args(argv)
    if args.box and not (args.box[0] < args.box[2] <= 1 and args.box[1] < args.box[3] <= 1):
        raise BadInput(f"--box {args.box}: need 0 <= X0 < X1 <= 1 and 0 <= Y0 < Y1 <= 1")
    files = bool(args.tokenizer_file) + bool(args.var_file)
    if args.run and (args.released or files) or files == 1 and not args.released:
        raise BadInput("give --run, or --released, or both --tokenizer-file and --var-file")
    if args.top_p is not None and args.top_p > 1:
        raise BadInput(f"--top-p {args.top_p}: a share of probability, at most 1")
    return args


def main():
    args = read_arguments()
    studio = Studio(args)
    if args.task == "evaluate":
        evaluate(studio)
    for name, task in TASKS.items():
        if args.task in ("all", name):
            task(studio)


if __name__ == "__main__":
    one_line(main)
