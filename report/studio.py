"""The command line of chapter 6: which model, which pictures, which options."""
import functools
from pathlib import Path

import numpy as np
import torch

from data import imagenet
from engine import BadInput, released
from report import gallery, plots
from data.batches import load_data, stack, to_float
from engine.checkpoints import fingerprint
from engine.devices import fast_bfloat16, pick_device
from engine.options import OneLineParser, number
from engine.progress import progress


class Studio:
    """A model, its class names, and how the command line wants it used. `chapter` is chapter 6,
    whose functions do the work."""

    def __init__(self, args, chapter):
        self.args, self.chapter, self.device = args, chapter, pick_device(args.device)
        torch.manual_seed(args.seed)
        for path in filter(None, (args.image, args.mask)):
            plots.read(path)                            # fail before anything is loaded or drawn
        self.sampling = dict(cfg=1.5, top_k=900, top_p=0.96)
        where = self.load_released() if args.released or args.var_file else self.load_run()
        if self.var is not None:
            self.var.to(self.device)
            halved = [m for m in self.var.modules() if isinstance(m, torch.nn.Linear)]
            for layer in (*halved, self.tokenizer.decoder, self.tokenizer.post_quant_conv):
                layer.to(self.precision)                 # what encodes pictures stays exact
        self.side, self.sampling["temperature"] = self.tokenizer.config.image_size, 1.0
        self.sampling.update({k: getattr(args, k) for k in self.sampling
                              if getattr(args, k) is not None})
        self.classes = (list(dict.fromkeys(find_class(self.names, text) for text in args.classes))
                        if args.classes else list(range(len(self.names)))[:10])
        print("sampling: " + ", ".join(f"{k} {v:g}" for k, v in self.sampling.items()))
        if args.image and args.task in ("all", "inpaint", "outpaint", "think"):
            first = self.names[self.classes[0]]
            print(f"--image: taken as class {first!r}, the first of --classes")
        self.out = Path(args.out or Path("out") / where)
        self.out.mkdir(parents=True, exist_ok=True)

    def load_released(self):
        args = self.args
        self.tokenizer, self.var = self.chapter.load_released(
            released.fetch("vae_ch160v4096z32.pth", args.tokenizer_file),
            released.fetch(f"var_{args.released}.pth", args.var_file))
        self.tokenizer.to(self.device)
        count = self.var.config.num_classes
        self.names = (imagenet.class_names() if count == 1000 else
                      [f"class {i}" for i in range(count)])
        self.dataset = "imagenet" if count == 1000 and args.data_dir else None
        sizes = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (self.tokenizer, self.var)]
        weights = 4 * sizes[0] + self.precision.itemsize * sizes[1]
        print(f"released model: tokenizer {sizes[0]:.0f} M, transformer {sizes[1]:.0f} M "
              f"parameters, {weights / 1e3:.1f} GB; {self.at_once()} pictures at once")
        return "released"

    def load_run(self):
        """Both models of a run, or of a shipped file; to reconstruct, the tokenizer is enough."""
        path, training = find_run(self.args.run), self.chapter.training
        one = path.is_file()
        print(f"model: {path}")
        self.tokenizer, about = training.load_tokenizer(path if one else path / "tokenizer.pt",
                                                        self.device)
        self.var, file = None, path if one else path / "transformer.pt"
        if self.args.task != "reconstruct" or self.args.export_npz or file.exists():
            if not file.exists():
                raise BadInput(f"{file}: no such file; train the transformer with 05_train.py, or "
                               "use --task reconstruct")
            self.var, about = training.load_transformer(file)
            self.sampling = dict(about["sampling"])
            if not one and about["settings"]["tokenizer"] != fingerprint(self.tokenizer):
                raise BadInput(f"{path}: its transformer was trained on the tokens of another "
                               "tokenizer; train it again: 05_train.py --stage transformer --fresh")
        self.names, self.dataset = about["class_names"], about["dataset"]
        return f"shipped-{path.stem}" if one else path.name

    @functools.cached_property                             # measured once: it must not change
    def precision(self):
        """The numbers of transformer and decoder. Large models are halved where that is fast."""
        if self.args.precision != "auto":
            return getattr(torch, self.args.precision)
        large = 18 * self.var.config.depth * self.var.config.width ** 2 > 1e8    # parameters
        if large and self.device.type == "cuda":
            return torch.float16
        return torch.bfloat16 if large and fast_bfloat16(self.device) else torch.float32

    def at_once(self):
        """How many pictures fit: keys and values for both halves of guidance, a few of the
        decoder's widest maps. Depends on the machine alone, so that a seed repeats its pictures."""
        c, room = self.var.config, 1e9
        if self.device.type == "cuda":
            room = 0.3 * torch.cuda.get_device_properties(self.device).total_memory
        each = 4 * c.depth * self.var.L * c.width * self.precision.itemsize
        each += 24 * self.tokenizer.config.channels * self.tokenizer.config.image_size ** 2
        return int(min(max(1, room // each), 100))

    def generator(self, seed=0):
        return torch.Generator(self.device).manual_seed(self.args.seed + seed)

    def draw_tokens(self, labels):
        """One batch of token maps, never mixtures. labels: ints -> K (B, n)"""
        labels = torch.tensor(labels, device=self.device)
        return self.chapter.sample_tokens(self.tokenizer, self.var, labels,
                                          generator=self.generator(), **self.sampling)

    def batches(self, labels, seed=0, **changes):
        """Any number of pictures, in batches that fit. labels: ints -> (B, 3, H, W), ... on CPU"""
        generator, settings = self.generator(seed), {**self.sampling, **changes}
        parts = torch.tensor(labels, device=self.device).split(self.at_once())
        drawn = (self.chapter.generate(self.tokenizer, self.var, part, smooth=self.args.smooth,
                                       generator=generator, **settings).cpu() for part in parts)
        return progress(drawn, len(labels))

    def sample(self, labels, **changes):
        return torch.cat(list(self.batches(labels, **changes)))

    def pyramid(self, tokens):
        """What has been painted after each scale: tokens -> K pictures (B, 3, H, W) in [0, 1]"""
        return [self.chapter.to_picture(self.tokenizer, f_hat).cpu()
                for f_hat in self.tokenizer.pyramid(tokens)]

    def log_likelihood(self, tokens, labels):
        return self.chapter.log_likelihood(self.tokenizer, self.var, tokens, labels)

    def edit(self, image, keep, labels, seed):
        """Chapter 6's edit() as the options ask for it. -> (B, 3, H, W) in [0, 1] on the CPU"""
        how = dict(soft=0) if self.args.paste else {}
        return self.repaint(self.chapter.edit, image, keep, labels, seed, **how)

    def outpaint(self, image, grow, labels, seed):
        return self.repaint(self.chapter.outpaint, image, grow, labels, seed, at_once=1)

    def repaint(self, paint, image, where, labels, seed, at_once=None, **how):
        how.update(self.sampling, generator=self.generator(seed))
        if self.args.soft is not None:
            how["soft"] = min(self.args.soft, self.side)
        labels, at_once = torch.tensor(labels, device=self.device), at_once or self.at_once()
        painted = (paint(self.tokenizer, self.var, part, where, wanted, **how).cpu()
                   for part, wanted in zip(image.split(at_once), labels.split(at_once)))
        return torch.cat(list(progress(painted, len(image))))

    def pictures(self, count):
        """Pictures to work on: --image, else held-out ones of the classes asked for, else ones the
        model draws itself. -> image (n, 3, H, W) in [-1, 1], labels list"""
        if self.args.image:
            photo = plots.square(plots.read(self.args.image).convert("RGB"), self.side)
            return to_float(torch.from_numpy(photo)[None]).to(self.device), [self.classes[0]]
        try:
            images, every = self.load("test")
            at = [np.flatnonzero(every == c)[0] for c in self.classes if (every == c).any()][:count]
            if not at:
                raise BadInput("none of these classes among them")
            image, labels = to_float(stack([images[int(i)] for i in at])), every[at].tolist()
        except BadInput as error:
            if self.var is None:
                raise
            print(f"no held-out pictures ({error}): working on pictures drawn by the model itself")
            labels = self.classes[:count]                  # random numbers that no task uses again
            image = torch.cat(list(self.batches(labels, seed=2 ** 31))) * 2 - 1
        return image.to(self.device), labels

    def load(self, split):
        """Real pictures and their labels, in the order of the model's classes. -> images, (N,)"""
        if not self.dataset:
            raise BadInput("no data set at hand: for the released models give --data-dir, an "
                           "ImageNet folder")
        images, labels, names = load_data(self.dataset, split, self.side, self.args.data_dir)
        if names == self.names:
            return images, labels
        for name in names:                                 # a part of the classes, say
            if self.names.count(name) != 1:
                raise BadInput(f"these pictures have a class {name!r}, of which this model knows "
                               f"{self.names.count(name)}: {', '.join(self.names[:5])}, ...")
        return images, np.array([self.names.index(name) for name in names])[labels]

    def mask(self, default):
        """(H, W) bool, True where not --mask is white or --box reaches: the part to keep."""
        keep = torch.ones(self.side, self.side, dtype=torch.bool, device=self.device)
        if self.args.mask:
            grey = plots.square(plots.read(self.args.mask).convert("L"), self.side)
            keep &= torch.from_numpy(grey <= 127).to(self.device)
        else:
            x0, y0, x1, y1 = (round(v * self.side) for v in self.args.box or default)
            keep[y0:y1, x0:x1] = False
        if keep.all():
            raise BadInput("nothing to repaint: --mask is nowhere white, or --box smaller than a "
                           f"pixel of {self.side}")
        return keep

    def tasks(self):
        """What the command line asks for: functions of this studio."""
        if self.args.export_npz:
            return [gallery.export]
        if self.args.task == "all":
            return gallery.PICTURES.values()
        return [{**gallery.PICTURES, **gallery.FIGURES}[self.args.task]]

    def save(self, name, images, columns, **labels):
        path = self.out / f"{name}.png"
        plots.save_grid(path, images, columns, **labels)
        print(f"wrote {path}")


def find_run(given):
    """--run, or the newest run in out/, or the model that came with the code."""
    if given:
        if not Path(given).exists():
            raise BadInput(f"--run {given}: no such folder or file")
        return Path(given)
    runs = sorted(Path("out").glob("*/transformer.pt"), key=lambda path: path.stat().st_mtime)
    shipped = sorted((Path(__file__).parents[1] / "data" / "pretrained").glob("*.pt"))
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
    raise BadInput(f"no class {text!r}; this model has {len(names)}, 0 to {len(names) - 1}: "
                   + ", ".join(names[:12]))


def read_arguments(description):
    p = OneLineParser(description=description, allow_abbrev=False)
    p.add_argument("--run", help="folder of a run, or a shipped file; default: newest in out/")
    p.add_argument("--released", choices=("d16", "d20", "d24", "d30", "d36"),
                   help="the paper's models (d36: 512 px)")
    p.add_argument("--tokenizer-file", help="released tokenizer, instead of downloading it")
    p.add_argument("--var-file", help="released transformer, instead of downloading it")
    p.add_argument("--task", default="all", help="all: every one but density and evaluate",
                   choices=("all", *gallery.PICTURES, *gallery.FIGURES))
    p.add_argument("--classes", nargs="+", metavar="NAME", help="names or indices; default: ten")
    p.add_argument("--n", type=number(int, 1),
                   help="pictures per class (sample, export) or in all (density, evaluate)")
    p.add_argument("--cfg", type=number(float, 0), help="guidance at the last scale: how far to go "
                   "beyond what the class alone predicts; 0: none, still of the class")
    p.add_argument("--top-k", type=number(int, 0), help="draw among the k likeliest tokens; 0: all")
    p.add_argument("--top-p", type=number(float, 0), help="draw among the likeliest, p in all")
    p.add_argument("--temperature", type=number(float, 0.01), help="divides the logits [1]")
    p.add_argument("--smooth", action="store_true", help="mix codes instead of drawing one")
    p.add_argument("--image", help="picture to edit or weigh; default: held-out ones")
    p.add_argument("--box", nargs=4, type=number(float, 0), metavar=("X0", "Y0", "X1", "Y1"),
                   help="part to repaint, in fractions of the side")
    p.add_argument("--mask", help="picture file instead of a box; white: repaint")
    p.add_argument("--grow", nargs=4, type=number(float, 0), default=(0.25,) * 4,
                   metavar=("LEFT", "TOP", "RIGHT", "BOTTOM"),
                   help="outpaint: room to add, in fractions of the side [0.25 each]")
    p.add_argument("--paste", action="store_true", help="put the kept pixels themselves back")
    p.add_argument("--soft", type=number(int, 0),
                   help="the same, faded in over N pixels (outpaint: an eighth of the side)")
    p.add_argument("--export-npz", metavar="FILE",
                   help="write samples of every class for the ImageNet evaluator, nothing else")
    p.add_argument("--data-dir", default="", help="where the held-out pictures lie")
    p.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    p.add_argument("--precision", default="auto", help="of transformer and decoder [float32; "
                   "large models: float16 on a GPU, bfloat16 where a CPU is fast at it]",
                   choices=("auto", "float32", "float16", "bfloat16"))
    p.add_argument("--seed", type=number(int, 0), default=0)
    p.add_argument("--out", help="folder for the pictures; default out/NAME")
    args = p.parse_args()
    if args.box and not (args.box[0] < args.box[2] <= 1 and args.box[1] < args.box[3] <= 1):
        raise BadInput(f"--box {args.box}: need 0 <= X0 < X1 <= 1 and 0 <= Y0 < Y1 <= 1")
    files = bool(args.tokenizer_file) + bool(args.var_file)
    if args.run and (args.released or files) or files == 1 and not args.released:
        raise BadInput("give --run, or --released, or both --tokenizer-file and --var-file")
    if args.top_p is not None and args.top_p > 1:
        raise BadInput(f"--top-p {args.top_p}: a share of probability, at most 1")
    if args.smooth and args.task not in ("all", "sample", "guidance"):
        raise BadInput(f"--smooth mixes codes: it samples and edits nothing, --task {args.task}")
    if not 0 < max(args.grow) <= 2:
        raise BadInput(f"--grow {args.grow}: in sides of the picture, at most 2, and not all 0")
    if args.task == "evaluate" and args.classes:
        raise BadInput("--task evaluate is over all classes: leave out --classes")
    if args.n and args.n > 1_000_000:
        raise BadInput(f"--n {args.n}: at most a million")
    return args
