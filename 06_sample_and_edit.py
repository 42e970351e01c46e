"""Chapter 6: sample, in-paint, out-paint, change a class, and ask how likely a picture is.

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
always kept; kept tokens are rounded again as f_hat grows, not replayed from another picture; the
likelihood, which training minimised all along, can be asked for.

The pictures and tables made of this are in data/gallery.py, data/density.py and data/judge.py.

    python 06_sample_and_edit.py                        newest run in out/, else the shipped model
    python 06_sample_and_edit.py --task inpaint --box 0.3 0.3 0.7 0.7
    python 06_sample_and_edit.py --released d16 --classes goldfish volcano
"""
from importlib import import_module
from itertools import repeat
from pathlib import Path

import torch
import torch.nn.functional as F

from data import BadInput, density, gallery, imagenet, judge, pictures, released
from data.batches import held_out, to_float
from data.plumbing import OneLineParser, number, one_line, pick_device, progress

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
def sample_tokens(tokenizer, var, labels, *, cfg=0.0, top_k=0, top_p=0.0, temperature=1.0,
                  smooth=False, generator=None, choose=None):
    """The loop. choose(k, tokens_k, f_hat) may replace drawn tokens. labels (B,) -> K tokens maps
    (B, n), or with `smooth` mixtures of codes (B, n, C), which do as well.

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
    f_hat, inputs, tokens = 0, None, []
    for k in range(K):
        ratio = k / max(K - 1, 1)
        if inputs is not None:
            inputs = inputs.to(conditioning[0].dtype).repeat(2 if cfg > 0 else 1, 1, 1)
        logits = var.step(k, inputs, conditioning, cache).float()
        if cfg > 0:
            t = cfg * ratio
            logits = (1 + t) * logits[:B] - t * logits[B:]
        logits = keep_likely(logits / temperature, top_k, top_p)
        if smooth:
            tokens_k = soften(logits, ratio, tokenizer.quantizer.codebook, generator)
        else:
            tokens_k = draw(logits, generator)
        if choose is not None:
            tokens_k = choose(k, tokens_k, f_hat)
        f_hat, inputs = tokenizer.next_input(k, f_hat, tokens_k)
        tokens.append(tokens_k)
    return tokens


def to_picture(tokenizer, f_hat):
    """f_hat -> image (B, 3, H, W) in [0, 1]"""
    with torch.no_grad():
        return (tokenizer.decode(f_hat).clamp(-1, 1) + 1) / 2


def generate(tokenizer, var, labels, *, cfg=1.5, top_k=0, top_p=0.0, temperature=1.0, smooth=False,
             generator=None, tokens=None, keep=None):
    """Sample pictures of the classes in labels (B,). -> (B, 3, H, W) in [0, 1]

    tokens (list of K (B, n)) and keep (list of K (n,) bool): where keep is True the given token is
    replayed instead of drawn. Raises BadInput for a label the model does not know."""

    if (tokens is None) != (keep is None) or (smooth and tokens is not None):
        raise BadInput("tokens and keep go together, and without smooth")

    def replay(k, tokens_k, f_hat):
        return torch.where(keep[k].to(tokens_k.device), tokens[k], tokens_k)
    drawn = sample_tokens(tokenizer, var, labels, cfg=cfg, top_k=top_k, top_p=top_p, smooth=smooth,
                          temperature=temperature, generator=generator,
                          choose=replay if tokens is not None else None)
    return to_picture(tokenizer, tokenizer.features(drawn))


@torch.no_grad()
def log_likelihood(tokenizer, var, tokens, labels):
    """ln p(tokens | class), exactly: the sum over scales, and over the positions of each, of
    ln p(token | coarser scales, class). One pass through the transformer has them all.

    tokens: list of K (B, n); labels (B,), num_classes: no class -> (B, K) nats, per scale"""
    inputs = tokenizer.teacher_inputs(tokens).to(var.start.dtype)
    logits = var(labels, inputs).float()                                 # (B, L, V)
    wanted = torch.cat(tokens, 1)[..., None]                             # (B, L, 1)
    each = logits.log_softmax(-1).gather(-1, wanted)[..., 0]             # (B, L)
    return torch.stack([part.sum(1) for part in each.split([t.shape[1] for t in tokens], 1)], 1)


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


def edit(tokenizer, var, image, keep, labels, *, cfg=1.5, top_k=0, top_p=0.0, temperature=1.0,
         generator=None, paste=False, soft=0, replay=False, looks=(6, 2)):
    """Repaint the part of a picture where keep is False, as class labels (B,).

    image (B, 3, H, W) in [-1, 1], keep (H, W) bool -> (B, 3, H, W) in [0, 1]. Hidden pixels are
    replaced before anything reads the picture: they cannot change the result.

    paste: put the kept pixels themselves back over the tokenizer's rendering of them, over `soft`
    pixels from the edge ever more. looks: how often to paint, and then to look without painting.
    replay, with looks=(1, 0): keep the picture's tokens whatever is drawn around them, as the
    paper's demo does (but for its leak), for comparison."""
    side = tokenizer.config.image_size
    if not tuple(image.shape[-2:]) == tuple(keep.shape) == (side, side):
        raise BadInput(f"picture and mask must be {side}x{side}, not {tuple(image.shape[-2:])} and "
                       f"{tuple(keep.shape)}")
    keep = keep.to(image.device)
    if generator is None:
        generator = torch.Generator(keep.device).manual_seed(int(torch.randint(2**62, ())))
    start, shown = generator.get_state(), hide(image, keep)
    # Cells of which half or more is kept count as known; the rest of such a cell is continued.
    whole = F.adaptive_avg_pool2d(keep.float()[None, None], tokenizer.scales[-1])
    known = (whole >= 0.5).to(image.dtype)

    def choose(k, tokens_k, f_hat):
        """Half of a cell known is enough to fix its token: what it gets wrong of the kept part, the
        finer scales put right, since they round what is still missing."""
        missing = target - f_hat if tokenizer.config.residual else target
        filled = torch.ones_like(known) if look else known               # is there anything to see?
        r = tokenizer.look_at(missing * filled, k) / tokenizer.look_at(filled, k).clamp(min=1e-6)
        kept = seen[k] if replay else tokenizer.quantizer.nearest(r)
        return torch.where(tokenizer.look_at(known, k)[..., 0] >= 0.5, kept, tokens_k)

    # At first the hidden part is a blur, and coarse maps, a few tokens for the whole picture, know
    # half of it. So paint again beside what was painted, with the same random numbers, until both
    # parts agree. Last, the tokenizer alone looks at kept and painted as at any picture.
    for look in range(sum(looks) if keep.any() else 1):
        with torch.no_grad():
            target = tokenizer.encode(shown)
        tokens = seen = tokenizer.quantize(target)
        if look < looks[0]:
            generator.set_state(start)
            tokens = sample_tokens(tokenizer, var, labels, cfg=cfg, top_k=top_k, top_p=top_p,
                                   temperature=temperature, generator=generator, choose=choose)
        result = to_picture(tokenizer, tokenizer.features(tokens))
        shown = torch.where(keep, image, 2 * result - 1)
    if paste or soft:
        weight = fade(keep, soft)
        result = weight * ((shown + 1) / 2) + (1 - weight) * result
    return result


def fade(keep, soft):
    """How much a kept pixel counts: 1 from `soft` pixels off the edge on, less nearer to it, 0
    where hidden. keep (H, W) bool -> (H, W)"""
    hidden = (~keep).float()[None, None]
    deep = [1 - F.max_pool2d(hidden, 2 * r + 1, 1, r) for r in range(soft + 1)]
    return sum(deep)[0, 0] / (soft + 1)


def outpaint(tokenizer, var, image, grow, labels, *, soft=None, generator=None, **how):
    """Let the canvas grow by (left, top, right, bottom) pixels around the picture. Window after
    window of the model's size is edited, always the one of which most is known, an eighth further.

    image (B, 3, S, S) in [-1, 1] -> (B, 3, top + S + bottom, left + S + right) in [0, 1]. What is
    known stays as it is but for a blend over `soft` pixels from its edge (S/8; 0: none); `how`:
    cfg, top_k, ... of edit()."""
    (left, top, right, bottom), S = grow, tokenizer.config.image_size
    soft = S // 8 if soft is None else soft
    canvas = F.pad(image, (left, right, top, bottom))
    known = F.pad(torch.ones(S, S, dtype=torch.bool, device=image.device),
                  (left, right, top, bottom))
    starts = [sorted({*range(0, length - S, max(1, S // 8)), length - S}) for length in known.shape]
    windows = [(slice(y, y + S), slice(x, x + S)) for y in starts[0] for x in starts[1]]
    while not known.all():
        at = max((at for at in windows if not known[at].all()), key=lambda at: int(known[at].sum()))
        before, weight = canvas[:, :, *at], fade(known[at], soft)
        painted = edit(tokenizer, var, before, known[at], labels, generator=generator,
                       **{"looks": (2, 2), **how})
        canvas[:, :, *at] = weight * before + (1 - weight) * (2 * painted - 1)
        known[at] = True
    return (canvas + 1) / 2


# -- Command line: which model, which pictures -----------------------------------------------------

def load_released(tokenizer_state, var_state, scales=None, heads=None):
    """State dicts in the released layout -> (tokenizer, var), ready to sample. Sizes are read off
    the shapes; `scales` is needed only for schedules other than the paper's two, `heads` only for
    models without query/key normalisation. Raises BadInput for anything in another layout."""
    return released.build(
        tokenizer_state, var_state, scales=scales, heads=heads,
        make_tokenizer=lambda sizes: vqvae.MultiScaleVQVAE(vqvae.TokenizerConfig(**sizes)),
        make_var=lambda sizes: transformer.VAR(transformer.VARConfig(**sizes)))


class Studio:
    """A model, its class names, and how the command line wants it used."""

    def __init__(self, args):
        self.args, self.device = args, pick_device(args.device)
        torch.manual_seed(args.seed)
        for path in filter(None, (args.image, args.mask)):
            pictures.read(path)                            # fail before anything is loaded or drawn
        self.sampling = dict(cfg=1.5, top_k=900, top_p=0.96)
        where = self.load_released() if args.released or args.var_file else self.load_run()
        self.var = self.var and self.var.to(self.device, self.precision())
        self.side, self.sampling["temperature"] = self.tokenizer.config.image_size, 1.0
        self.sampling.update({k: getattr(args, k) for k in self.sampling
                              if getattr(args, k) is not None})
        self.classes = ([find_class(self.names, text) for text in args.classes] if args.classes
                        else list(range(len(self.names)))[:10])
        if args.image and not args.classes and args.task not in ("reconstruct", "density"):
            print(f"--classes was not given: working as class {self.names[0]!r}")
        self.out = Path(args.out or Path("out") / where)
        self.out.mkdir(parents=True, exist_ok=True)

    def load_released(self):
        args = self.args
        self.tokenizer, self.var = load_released(
            released.fetch("vae_ch160v4096z32.pth", args.tokenizer_file),
            released.fetch(f"var_{args.released}.pth", args.var_file))
        self.tokenizer.to(self.device)
        count = self.var.config.num_classes
        self.names = (imagenet.class_names() if count == 1000 else
                      [f"class {i}" for i in range(count)])
        self.dataset = "imagenet" if count == 1000 and args.data_dir else None
        sizes = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (self.tokenizer, self.var)]
        weights = 4 * sizes[0] + self.precision().itemsize * sizes[1]
        print(f"released model: tokenizer {sizes[0]:.0f} M, transformer {sizes[1]:.0f} M "
              f"parameters, {weights / 1e3:.1f} GB; {self.at_once()} pictures at once")
        return "released"

    def load_run(self):
        """Both models of a run, or of a shipped file; to reconstruct, the tokenizer is enough."""
        path = find_run(self.args.run)
        one = path.is_file()
        print(f"model: {path}")
        self.tokenizer, about = training.load_tokenizer(path if one else path / "tokenizer.pt",
                                                        self.device)
        self.var, file = None, path if one else path / "transformer.pt"
        if self.args.task != "reconstruct" or file.exists():
            if not file.exists():
                raise BadInput(f"{file}: no such file; train the transformer with 05_train.py, or "
                               "use --task reconstruct")
            self.var, about = training.load_transformer(file)
            self.sampling = dict(about["sampling"])
            if not one and about["settings"]["tokenizer"] != training.fingerprint(self.tokenizer):
                raise BadInput(f"{path}: its transformer was trained on the tokens of another "
                               "tokenizer; train it again: 05_train.py --stage transformer --fresh")
        self.names, self.dataset = about["class_names"], about["dataset"]
        return f"shipped-{path.stem}" if one else path.name

    def precision(self):
        """The transformer's numbers; half of the memory, and faster, on a GPU."""
        chosen = self.args.precision
        if chosen == "auto":
            large = bool(self.args.released or self.args.var_file)
            chosen = "float16" if large and self.device.type == "cuda" else "float32"
        return getattr(torch, chosen)

    def at_once(self):
        """How many pictures fit: keys and values for both halves of guidance, a few of the
        decoder's widest maps. Depends on the machine alone, so that a seed repeats its pictures."""
        c, room = self.var.config, 1e9
        if self.device.type == "cuda":
            room = 0.3 * torch.cuda.get_device_properties(self.device).total_memory
        each = 4 * c.depth * self.var.L * c.width * self.precision().itemsize
        each += 24 * self.tokenizer.config.channels * self.tokenizer.config.image_size ** 2
        return int(min(max(1, room // each), 100))

    def generator(self, seed=0):
        return torch.Generator(self.device).manual_seed(self.args.seed + seed)

    def draw_tokens(self, labels):
        """One batch of token maps, never mixtures. labels: ints -> K (B, n)"""
        return sample_tokens(self.tokenizer, self.var, torch.tensor(labels, device=self.device),
                             generator=self.generator(), **self.sampling)

    def batches(self, labels, **changes):
        """Any number of pictures, in batches that fit. labels: ints -> (B, 3, H, W), ... on CPU"""
        generator, settings = self.generator(), {**self.sampling, **changes}
        parts = torch.tensor(labels, device=self.device).split(self.at_once())
        drawn = (generate(self.tokenizer, self.var, part, smooth=self.args.smooth,
                          generator=generator, **settings).cpu() for part in parts)
        return progress(drawn, len(labels))

    def sample(self, labels, **changes):
        return torch.cat(list(self.batches(labels, **changes)))

    def pyramid(self, tokens):
        """What has been painted after each scale: tokens -> K pictures (B, 3, H, W) in [0, 1]"""
        return [to_picture(self.tokenizer, f_hat).cpu() for f_hat in self.tokenizer.pyramid(tokens)]

    def log_likelihood(self, tokens, labels):
        return log_likelihood(self.tokenizer, self.var, tokens, labels)

    def repaint(self, paint, image, where, labels, seed):
        """edit() or outpaint(), in batches that fit. -> (B, 3, H, W) in [0, 1] on the CPU"""
        how = dict(self.sampling, generator=self.generator(seed))
        if self.args.keep == "replay":
            how.update(replay=True, looks=(1, 0))
        if paint is edit:
            how["paste"] = self.args.paste
        if self.args.soft is not None:
            how["soft"] = self.args.soft
        at_once, labels = self.at_once(), torch.tensor(labels, device=self.device)
        return torch.cat([paint(self.tokenizer, self.var, *part, **how).cpu() for part in
                          zip(image.split(at_once), repeat(where), labels.split(at_once))])

    def pictures(self, count):
        """Pictures to work on: --image, else held-out ones of the classes asked for, else ones the
        model draws itself. -> image (n, 3, H, W) in [-1, 1], labels list"""
        if self.args.image:
            photo = pictures.square(pictures.read(self.args.image).convert("RGB"), self.side)
            return to_float(torch.from_numpy(photo)[None]).to(self.device), [self.classes[0]]
        try:
            image, labels = held_out(self.dataset or "", self.side, self.args.data_dir, count,
                                     self.classes)
        except BadInput as error:
            if self.var is None:
                raise
            print(f"no held-out pictures ({error}): working on pictures drawn by the model itself")
            labels = self.classes[:count]
            image = self.sample(labels) * 2 - 1
        return image.to(self.device), labels

    def mask(self, default):
        """(H, W) bool, True where not --mask is white or --box reaches: the part to keep."""
        keep = torch.ones(self.side, self.side, dtype=torch.bool, device=self.device)
        if self.args.mask:
            grey = pictures.square(pictures.read(self.args.mask).convert("L"), self.side)
            return keep & torch.from_numpy(grey <= 127).to(self.device)
        x0, y0, x1, y1 = (round(v * self.side) for v in self.args.box or default)
        keep[y0:y1, x0:x1] = False
        return keep

    def save(self, name, images, columns, **labels):
        path = self.out / f"{name}.png"
        pictures.save_grid(path, images, columns, **labels)
        print(f"wrote {path}")


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

def inpaint(studio):
    gallery.repainted(studio, "inpaint", edit, studio.mask((0.5, 0.0, 1.0, 1.0)))


def outpaint_task(studio):
    grow = [round(part * studio.side) for part in studio.args.grow]
    gallery.repainted(studio, "outpaint", outpaint, grow)


def edit_class(studio):
    gallery.repainted(studio, "edit", edit, studio.mask((0.1, 0.1, 0.9, 0.9)),
                      classes=studio.classes[:10])


PICTURES = dict(sample=gallery.sample, guidance=gallery.guidance, think=gallery.think,
                reconstruct=gallery.reconstruct, inpaint=inpaint, outpaint=outpaint_task,
                edit=edit_class)
FIGURES = dict(density=density.density, evaluate=judge.evaluate)         # take longer: on request


def read_arguments(argv=None):
    p = OneLineParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    p.add_argument("--run", help="folder of a run, or a shipped file; default: newest in out/")
    p.add_argument("--released", choices=("d16", "d20", "d24", "d30", "d36"),
                   help="the paper's models (d36: 512 px)")
    p.add_argument("--tokenizer-file", help="released tokenizer, instead of downloading it")
    p.add_argument("--var-file", help="released transformer, instead of downloading it")
    p.add_argument("--task", default="all", choices=("all", *PICTURES, *FIGURES),
                   help=f"all: all but {' and '.join(FIGURES)} [all]")
    p.add_argument("--classes", nargs="+", metavar="NAME", help="names or indices; default: ten")
    p.add_argument("--n", type=number(int, 1),
                   help="pictures per class (density, evaluate: in all) [8; export 50]")
    p.add_argument("--cfg", type=number(float, 0), help="guidance at the last scale; 0: none")
    p.add_argument("--top-k", type=number(int, 0), help="draw among the k likeliest tokens; 0: all")
    p.add_argument("--top-p", type=number(float, 0), help="draw among the likeliest, p in all")
    p.add_argument("--temperature", type=number(float, 0.01), help="divides the logits [1]")
    p.add_argument("--smooth", action="store_true", help="mix codes instead of drawing one")
    p.add_argument("--image", help="picture to reconstruct or edit; default: held-out ones")
    p.add_argument("--box", nargs=4, type=number(float, 0), metavar=("X0", "Y0", "X1", "Y1"),
                   help="part to repaint, in fractions of the side")
    p.add_argument("--mask", help="picture file instead of a box; white: repaint")
    p.add_argument("--grow", nargs=4, type=number(float, 0), default=(0.25,) * 4,
                   metavar=("LEFT", "TOP", "RIGHT", "BOTTOM"),
                   help="outpaint: room to add, in fractions of the side [0.25 each]")
    p.add_argument("--keep", default="requantise", choices=("requantise", "replay"),
                   help="kept tokens: rounded again at each scale, or as in the paper's demo")
    p.add_argument("--paste", action="store_true", help="put the kept pixels themselves back")
    p.add_argument("--soft", type=number(int, 0),
                   help="the same, faded in over N pixels [0; outpaint: an eighth of the side]")
    p.add_argument("--export-npz", metavar="FILE",
                   help="write samples of every class for the ImageNet evaluator, nothing else")
    p.add_argument("--data-dir", default="", help="where the held-out pictures lie")
    p.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    p.add_argument("--precision", default="auto", help="of the transformer [float32; released "
                   "models on a GPU: float16]", choices=("auto", "float32", "float16", "bfloat16"))
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
    if args.smooth and args.task not in ("all", "sample", "guidance"):
        raise BadInput(f"--smooth mixes codes: it samples and edits nothing, --task {args.task}")
    if max(args.grow) > 8:
        raise BadInput(f"--grow {args.grow}: in sides of the picture, at most 8")
    return args


def main():
    args = read_arguments()
    studio = Studio(args)
    if args.export_npz:
        return gallery.export(studio)
    for name, task in {**PICTURES, **FIGURES}.items():
        if args.task == name or args.task == "all" and name in PICTURES:
            task(studio)


if __name__ == "__main__":
    one_line(main)
