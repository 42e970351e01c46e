"""The judge: a small classifier trained on a data set, and what is measured with it.

Would a classifier give an image the class that was meant (accuracy)? Are images, taken
together, distributed like real ones (Fréchet distance, precision, recall)? The numbers
compare runs on one data set with one judge. They are not the FID of the literature, which
uses the Inception network.

    images (N, 3, H, W) in [0, 1]  ->  features (N, F)  ->  logits (N, classes)
"""
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from data.batches import image_fingerprint, per_pass, picture_batches, rows_of, to_float
from data.registry import dataset_named, load_splits
from engine import BadInput
from engine.checkpoints import load_checkpoint, save_atomically
from engine.device import cores
from engine.progress import progress


class Judge(nn.Module):
    """Halve the image three times, average, classify."""

    def __init__(self, num_classes, width):
        super().__init__()
        layers = []
        for c_in, c in ((3, width), (width, 2 * width), (2 * width, 4 * width)):
            layers += [nn.Conv2d(c_in, c, 3, stride=2, padding=1, bias=False),
                       nn.BatchNorm2d(c), nn.SiLU(),
                       nn.Conv2d(c, c, 3, padding=1, bias=False),
                       nn.BatchNorm2d(c), nn.SiLU()]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(4 * width, num_classes)

    def features(self, images):
        """(N, 3, H, W) in [0, 1] -> (N, F), the averaged last map"""
        return self.body(2 * images - 1).mean(dim=(2, 3))


@torch.random.fork_rng(devices=[])        # the caller's random numbers stay as they are
def judge_of(dataset, images, labels, num_classes, device="cpu", augment=True, steps=None):
    """The judge of a data set, in eval mode, trained when it is first needed and kept in
    out/. images: uint8 (N, H, W, 3) or read on demand; labels (N,); augment: vary the
    images, see varied(), because a judge that never saw blur, dimming or shifts is
    stricter; steps: None for those in data/registry.py"""
    how, kind = dataset_named(dataset), "" if augment else "strict_"
    steps = steps or how.judge_steps
    path = Path("out") / f"judge_{kind}{steps}_{image_fingerprint(images)}.pt"
    torch.default_generator.manual_seed(0)
    judge = Judge(num_classes, how.judge_width).to(device)
    if path.exists():
        judge.load_state_dict(load_checkpoint(path))
        return judge.eval()
    labels, generator = torch.as_tensor(labels), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, max(steps, 2))
    drawn = []

    def crops():
        for _ in range(steps):
            drawn.append(torch.randint(len(labels), (128,), generator=generator))
            yield [(row, -1) for row in drawn[-1].tolist()]

    batches = picture_batches(images, crops(), cores())
    batches = progress(batches, steps, "steps of the judge", lambda batch: 1)
    for step, batch in enumerate(batches):
        image = (to_float(batch) + 1) / 2                                # (128, 3, H, W)
        if augment:
            image = varied(image, generator, how.mirrored)
        logits = judge.head(judge.features(image.to(device)))            # (128, classes)
        loss = F.cross_entropy(logits, labels[drawn[step]].to(device), label_smoothing=0.02)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    save_atomically(judge.state_dict(), path)
    return judge.eval()


def varied(image, generator, mirrored):
    """Shift, soften, dim and speckle each image of (N, 3, H, W) in [0, 1] in its own way.
    Reconstructions are soft and slightly off in colour, and a judge that knew only crisp
    images would blame them for it. mirrored: mirror half of them, too"""
    def uniform():
        return torch.rand(len(image), 1, 1, 1, generator=generator)
    side = image.shape[-1]
    reach = max(1, side // 16)
    shift = torch.randint(-reach, reach + 1, (2, len(image), 1), generator=generator)
    soften = uniform() * (uniform() < 0.5)
    stretch, add = 0.85 + 0.3 * uniform(), 0.1 * (uniform() - 0.5)
    noise = torch.randn(image.shape, generator=generator)
    add = add + 0.04 * uniform() * noise
    rows, columns = (torch.arange(side) + shift).clamp(0, side - 1)      # (N, side) each
    if mirrored:
        columns = torch.where(uniform()[:, :, 0, 0] < 0.5, columns.flip(1), columns)
    which = torch.arange(len(image))[:, None, None]
    image = image[which, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    blurred = F.avg_pool2d(F.pad(image, (1,) * 4, mode="replicate"), 3, stride=1)
    return ((image + soften * (blurred - image)) * stretch + add).clamp(0, 1)


def batches_of(images, rows):
    """The images of these rows, a few at a time -> uint8 tensors (n, H, W, 3)"""
    parts = torch.as_tensor(rows).split(per_pass(len(images[0])))
    crops = ([(row, -1) for row in part.tolist()] for part in parts)     # -1: of the centre
    return picture_batches(images, crops, cores())


def rebuilt(tokenizer, images, rows):
    """Their reconstructions, a few at a time -> (n, 3, H, W) in [0, 1]"""
    device = next(tokenizer.parameters()).device
    for part in batches_of(images, rows):
        tokens = tokenizer.image_to_tokens(to_float(part).to(device))
        yield (tokenizer.tokens_to_image(tokens) + 1) / 2


# -- Measures ------------------------------------------------------------------------------

@torch.no_grad()
def extract(judge, batches):
    """Batches of images, uint8 (n, H, W, 3) or float (n, 3, H, W) in [0, 1]
    -> features (N, F), logits (N, classes), on the judge's device"""
    features = []
    for batch in batches:
        image = (to_float(batch) + 1) / 2 if batch.dtype == torch.uint8 else batch
        features.append(judge.features(image.to(judge.head.weight.device)))
    features = torch.cat(features)
    return features, judge.head(features)


def accuracy(logits, labels):
    """The share of images, in [0, 1], to which the judge gives the class in labels (N,)"""
    return (logits.argmax(1).cpu() == torch.as_tensor(labels)).double().mean().item()


def frechet_distance(features_a, features_b):
    """|mean_a - mean_b|^2 + trace(A + B - 2 (A B)^(1/2)) of features (N, F) and (M, F) with
    covariances A and B. A B has the eigenvalues of the symmetric A^(1/2) B A^(1/2)."""
    a, b = features_a.double(), features_b.double()
    A, B = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(A)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ B @ root).clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + A.trace() + B.trace() - 2 * cross)


def precision_recall(features_real, features_fake, k=3):
    """Shares in [0, 1] of fakes that look real and of reals that are covered (Kynkäänniemi
    et al. 2019). A point is inside a set if it is no farther from some member than that
    member's k-th nearest neighbour. Both sets need more than k rows."""
    def share_inside(points, members):
        # The member itself comes first, at distance 0: its k-th neighbour is the (k+1)-th.
        radius = torch.cat([torch.cdist(part, members).kthvalue(k + 1).values
                            for part in members.split(500)])
        inside = torch.cat([(torch.cdist(part, members) <= radius).any(1)
                            for part in points.split(500)])
        return inside.double().mean().item()
    real, fake = features_real.double(), features_fake.double()    # float32 would blur
    return share_inside(fake, real), share_inside(real, fake)


def labels_like(labels, count):
    """`count` labels in the class shares of labels (N,). Equally common classes take turns:
    0, 1, 2, ..., 0, 1, ... In other shares, a Fréchet distance would measure the mix."""
    share = torch.bincount(torch.as_tensor(labels)).double() / len(labels)
    given, drawn = torch.zeros_like(share), []
    for i in range(1, count + 1):
        c = int((share * i - given).argmax())              # the first of equals
        given[c] += 1
        drawn.append(c)
    return torch.tensor(drawn)


def evaluate(args, model):
    """Print a table of held-out, reconstructed and sampled images. args, model: see
    report/gallery.py. Raises BadInput for too few images."""
    _, splits, names = load_splits(args.dataset, args.side, args.data_dir, args.names)
    (real, labels), (test, test_labels) = splits["train"], splits["test"]
    count = min(args.n or 1000, len(real), len(test))
    if count < 4 or names != args.names:
        raise BadInput(f"--task evaluate needs 4 training and 4 held-out images of the "
                       f"model's classes; {args.dataset} has {len(real)} and {len(test)}")
    judge = judge_of(args.dataset, real, labels, len(names), args.device)
    rows, meant = rows_of(len(test), count), labels_like(labels, count)
    known, _ = extract(judge, batches_of(real, rows_of(len(real), count)))
    print(f"{count} images per row, compared with as many of training; no Inception FID")
    print(f"{'':<20}{'in class':>9}{'Fréchet':>9}{'precision':>11}{'recall':>8}")
    for text, batches, wanted in (
            ("held-out images", batches_of(test, rows), test_labels[rows]),
            ("reconstructions", rebuilt(model.tokenizer, test, rows), test_labels[rows]),
            ("samples", [model.sample(meant)], meant)):
        found, logits = extract(judge, batches)
        precision, recall = precision_recall(known, found)
        in_class, distance = accuracy(logits, wanted), frechet_distance(known, found)
        print(f"{text:<20}{in_class:>9.1%}{distance:>9.3f}{precision:>11.2f}{recall:>8.2f}")
