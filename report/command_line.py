"""The command line of chapter 6: options, and the runs, classes, images and masks they name."""
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data import folder, imagenet
from data.batches import rows_of, stack, to_float
from data.registry import dataset_named, find_class, load_data, subset
from engine import BadInput, devices
from engine.checkpoints import model_fingerprint
from engine.options import OneLineParser, number
from engine.progress import progress

SHIPPED = Path(__file__).resolve().parents[1] / "data" / "pretrained"
PICTURES = ("sample", "guidance", "think", "reconstruct", "inpaint", "outpaint", "edit")
ON_REQUEST = ("density", "evaluate")                       # these take longer
BOXES = {"inpaint": (0.5, 0, 1, 1), "edit": (0.1, 0.1, 0.9, 0.9)}    # fractions of the side


def read_arguments(description):
    """-> the options as a namespace; device becomes a torch.device."""
    p = OneLineParser(description=description, allow_abbrev=False)
    add = p.add_argument
    add("--run", help="folder of a run, or a shipped file; default: newest in out/")
    add("--released", choices=("d16", "d20", "d24", "d30", "d36"),
        help="the paper's models (d36: 512 px)")
    add("--tokenizer-file", help="released tokenizer, instead of downloading it")
    add("--var-file", help="released transformer, instead of downloading it")
    add("--task", default="all", choices=("all", *PICTURES, *ON_REQUEST),
        help="all: every task except density and evaluate")
    add("--classes", nargs="+", metavar="NAME", help="names or indices; default: ten")
    add("--n", type=number(int, 1),
        help="images per class (sample, export) or in all (density, evaluate)")
    add("--cfg", type=number(float, 0), help="guidance at the last scale: how far to go beyond "
        "what the class alone predicts; 0: none, still of the class [the run's own]")
    add("--top-k", type=number(int, 0), help="draw from the k most probable tokens; 0: from all")
    add("--top-p", type=number(float, 0),
        help="draw from the fewest tokens that have probability p together; 0: from all")
    add("--smooth", action="store_true", help="mix codes instead of drawing one")
    add("--image", help="image to edit or to weigh; default: held-out ones")
    add("--box", nargs=4, type=number(float, 0), metavar=("X0", "Y0", "X1", "Y1"),
        help="region to repaint, in fractions of the side")
    add("--mask", help="image file instead of a box; white: repaint")
    add("--grow", nargs=4, type=number(float, 0), default=(0.25,) * 4,
        metavar=("LEFT", "TOP", "RIGHT", "BOTTOM"),
        help="outpaint: room to add, in fractions of the side [0.25 each]")
    add("--paste", action="store_true",
        help="put the original pixels back into the region that is kept")
    add("--export-npz", metavar="FILE",
        help="only write samples of every class for the ImageNet evaluator")
    add("--data-dir", default="", help="folder of the held-out images")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    add("--precision", default="auto", choices=("auto", "float32", "float16", "bfloat16"),
        help="of transformer and decoder [float32; models above 100 M parameters: float16 on a "
        "CUDA GPU, bfloat16 on a CPU that is fast at it]")
    add("--seed", type=number(int, 0), default=0)
    add("--out", help="folder for the results; default: out/NAME")
    args = p.parse_args()
    check_options(args)
    for path in filter(None, (args.image, args.mask)):
        read(path)                                         # fail before anything is loaded or drawn
    args.device = devices.pick_device(args.device)
    return args


def check_options(args):
    """Raise BadInput for options that contradict each other or are out of range."""
    x0, y0, x1, y1 = args.box or (0, 0, 1, 1)
    files = bool(args.tokenizer_file) + bool(args.var_file)
    for wrong, message in (
            (not (x0 < x1 <= 1 and y0 < y1 <= 1),
             f"--box {args.box}: need 0 <= X0 < X1 <= 1 and 0 <= Y0 < Y1 <= 1"),
            (args.run and (args.released or files) or files == 1 and not args.released,
             "give --run, or --released, or both --tokenizer-file and --var-file"),
            ((args.top_p or 0) > 1, f"--top-p {args.top_p}: a probability, at most 1"),
            (args.smooth and args.task not in ("all", "sample", "guidance"),
             f"--smooth only works for samples, not with --task {args.task}"),
            (not 0 < max(args.grow) <= 2,
             f"--grow {args.grow}: fractions of the side, at most 2, and not all 0"),
            (args.task == "evaluate" and args.classes,
             "--task evaluate uses all classes: leave out --classes"),
            ((args.n or 0) > 1_000_000, f"--n {args.n}: at most a million")):
        if wrong:
            raise BadInput(message)


def find_run(args):
    """--run, or the newest run in out/, or the model that came with the code. -> its path, and the
    files of tokenizer and transformer (None where there is none and the tokenizer is enough)"""
    if args.run and not Path(args.run).exists():
        raise BadInput(f"--run {args.run}: no such folder or file")
    runs = sorted(Path("out").glob("*/transformer.pt"), key=lambda path: path.stat().st_mtime)
    found = [Path(args.run)] if args.run else [*sorted(SHIPPED.glob("*.pt")),
                                               *(path.parent for path in runs)]
    if not found:
        raise BadInput("no run in out/: train one with `python 05_train.py`, or use --run")
    run = found[-1]
    print(f"model: {run}")
    if run.is_file():                                      # it holds both
        return run, (run, run)
    if (run / "transformer.pt").exists():
        return run, (run / "tokenizer.pt", run / "transformer.pt")
    if args.task != "reconstruct" or args.export_npz:
        raise BadInput(f"{run / 'transformer.pt'}: no such file; train the transformer with "
                       "05_train.py, or use --task reconstruct")
    return run, (run / "tokenizer.pt", None)


def check_match(run, about, tokenizer):
    """Raise BadInput if a run's transformer was trained on the tokens of another tokenizer."""
    if run.is_dir() and about["settings"]["tokenizer"] != model_fingerprint(tokenizer):
        raise BadInput(f"{run}: its transformer was trained on the tokens of another tokenizer; "
                       "train it again: 05_train.py --stage transformer --fresh")


def released_facts(args, classes):
    """What a released model's file does not tell: class names, data set, the paper's sampling."""
    names = imagenet.class_names() if classes == 1000 else [f"class {i}" for i in range(classes)]
    return dict(class_names=names, dataset="imagenet" if args.data_dir else None,
                sampling=dict(cfg=1.5, top_k=900, top_p=0.96), folder="released")


# -- The job ---------------------------------------------------------------------------------------

class Job:
    """What the options ask for, and the models to do it with. about: class_names, dataset (None: no
    images are at hand), sampling (cfg, top_k, top_p), and the folder for results in out/."""

    def __init__(self, args, tokenizer, var, about):
        self.args, self.device, self.tokenizer, self.var = args, args.device, tokenizer, var
        torch.manual_seed(args.seed)
        self.at_once = devices.prepare_to_sample(tokenizer, var, self.device, args.precision)
        self.names, self.dataset = about["class_names"], about["dataset"]
        self.side, self.n, self.tasks = tokenizer.config.image_size, args.n, [args.task]
        if args.export_npz:
            self.tasks = ["export"]
        elif args.task == "all":
            self.tasks = list(PICTURES)
        self.sampling = {k: v if getattr(args, k) is None else getattr(args, k)
                         for k, v in about.get("sampling", {}).items()}
        self.every_class = list(range(len(self.names)))
        self.asked = [find_class(self.names, text) for text in args.classes or []]
        self.classes = list(dict.fromkeys(self.asked)) or self.every_class[:10]
        print("sampling: " + ", ".join(f"{k} {v:g}" for k, v in self.sampling.items()))
        self.out = Path(args.out or Path("out") / about["folder"])
        self.out.mkdir(parents=True, exist_ok=True)

    def generator(self, seed=0):
        return torch.Generator(self.device).manual_seed(self.args.seed + seed)

    def in_batches(self, paint, labels, *more, at_once=None):
        """paint(labels, ...) a few images at a time, as many as fit. labels: ints; more: tensors
        (N, ...) that are cut like them -> the results (n, 3, H, W), on the CPU"""
        cut = [x.split(at_once or self.at_once)
               for x in (torch.tensor(labels, device=self.device), *more)]
        return progress((paint(*part).cpu() for part in zip(*cut)), len(labels))

    def whole_split(self, split):
        """A split of the model's data set, with classes that the model may not know (it may have
        been trained with --classes). The judge is trained on all of them: to tell a horse from a
        ship alone is easy. -> images, labels (N,), names of its classes"""
        if not self.dataset:
            raise BadInput("the released models come without images: give --data-dir, an ImageNet "
                           "folder")
        return load_data(self.dataset, split, self.side, self.args.data_dir)

    def few_images(self):
        """Those that come with the code, if there are any and no --data-dir is given: no download.
        -> as whole_split"""
        examples = self.dataset and dataset_named(self.dataset).examples
        return examples() if examples and not self.args.data_dir else self.whole_split("test")

    def real_images(self, split):
        """The images of the model's classes, with labels in the order of these. -> images, labels
        (N,). Raises BadInput if other classes are there and some of the model's are not."""
        return self.of_known_classes(*self.whole_split(split))

    def of_known_classes(self, images, labels, names):
        if names == self.names:
            return images, labels
        if set(self.names) < set(names):
            known = sorted(map(names.index, self.names))
            images, labels = subset(images, labels, known)
            names = [names[c] for c in known]
        for name in names:                                 # a subset of the classes, say
            if self.names.count(name) != 1:
                raise BadInput(f"these images have a class {name!r}, of which this model knows "
                               f"{self.names.count(name)}: {', '.join(self.names[:5])}, ...")
        return images, np.array([self.names.index(name) for name in names])[labels]

    def labels_in(self, names, labels):
        """The model's labels (N,), counted in another list of class names."""
        if names == self.names:
            return np.asarray(labels)
        return np.array([names.index(self.names[label]) for label in labels])

    def images_to_edit(self, count):
        """--image, or `count` held-out images of the classes, which take turns; at most 10 of one.
        -> (n, 3, H, W) in [-1, 1], labels (a list); None for the images if there are none"""
        if self.args.image:
            c = self.classes[0]
            print(f"--image: taken as class {self.names[c]!r}, the first of --classes")
            return photo(self.args.image, self.side).to(self.device), [c]
        try:
            images, labels = self.of_known_classes(*self.few_images())
            found = [np.flatnonzero(labels == c) for c in self.classes]
            rows = [rows[i] for i in range(10) for rows in found if i < len(rows)][:count]
            if not rows:
                raise BadInput("none of these classes among them")
        except BadInput as error:
            if self.var is None:
                raise
            print(f"no held-out images ({error}): working on images drawn by the model itself")
            return None, self.classes[:count]
        image, labels = pick(images, labels, rows)
        return image.to(self.device), labels

    def images_to_weigh(self, classes):
        """--image (whose class is not known: labels None), or --n held-out images of these classes.
        -> (N, 3, H, W) in [-1, 1], labels (a list of indices into `classes`)"""
        if self.args.image:
            return photo(self.args.image, self.side), None
        images, labels = self.real_images("test")
        rows = np.flatnonzero(np.isin(labels, classes))
        if len(rows) == 0:
            raise BadInput("none of the held-out images is of these classes")
        rows = rows[rows_of(len(rows), self.n or max(1, 5000 // len(classes)))]
        image, labels = pick(images, labels, rows)
        return image, [classes.index(label) for label in labels]

    def kept_region(self, task):
        """--mask, --box or the task's own box -> (side, side) bool, True = keep: where the mask
        file is not white, or outside the box."""
        if self.args.mask:
            keep = torch.from_numpy(square(read(self.args.mask).convert("L"), self.side) <= 127)
        else:
            keep = outside(self.args.box or BOXES[task], self.side)
        if keep.all():
            raise BadInput("nothing to repaint: --mask is nowhere white, or --box is smaller than "
                           f"a pixel of {self.side}")
        return keep.to(self.device)


def outside(box, side):
    """x0, y0, x1, y1 in fractions of the side -> (side, side) bool, False inside the box"""
    keep = torch.ones(side, side, dtype=torch.bool)
    x0, y0, x1, y1 = (round(v * side) for v in box)
    keep[y0:y1, x0:x1] = False
    return keep


def pick(images, labels, rows):
    """-> (n, 3, H, W) in [-1, 1] and labels (a list) of these rows"""
    return to_float(stack([images[int(i)] for i in rows])), labels[rows].tolist()


def photo(path, side):
    """An image file -> (1, 3, side, side) in [-1, 1], its middle square"""
    return to_float(torch.from_numpy(square(read(path), side))[None])


def read(path):
    """An image file as a Pillow image in RGB. Raises BadInput if it is none."""
    try:
        return folder.decode(path)[0]
    except Exception as error:                             # whatever a broken file makes Pillow say
        raise BadInput(f"{path}: not a readable image ({error})") from None


def square(picture, side):
    """The largest square in the middle of a Pillow image, resized. -> uint8 (side, side[, 3])"""
    short = min(picture.size)
    left, top = (picture.width - short) // 2, (picture.height - short) // 2
    return np.array(picture.resize((side, side), Image.LANCZOS,
                                   (left, top, left + short, top + short)))
