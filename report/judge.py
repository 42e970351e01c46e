"""The judge: a small classifier trained on a data set, and what is measured with it.

Would a classifier give an image the class that was meant (accuracy)? Are images, taken
together, distributed like real ones (Fréchet distance, precision, recall)? The numbers
compare runs on one data set with one judge. They are not the FID of the literature, which
uses the Inception network.

    images (N, 3, H, W) in [0, 1]  ->  features (N, F)  ->  logits (N, classes)
"""
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from data.batches import image_fingerprint, per_pass, picture_batches, rows_of, to_float
from data.registry import dataset_named, load_splits
from engine import BadInput
from engine.checkpoints import save_atomically
from engine.device import cores
from engine.progress import progress


class Judge(nn.Module):
    """Halve the image until about 4 pixels a side are left, average, classify."""

    def __init__(self, num_classes, size, width=24):
        super().__init__()
        halvings = max(1, (size // 4).bit_length() - 1)    # 32 pixels: 16, 8, 4
        widths = [3] + [min(width * 2 ** i, 4 * width) for i in range(halvings)]
        layers = []
        for wide_in, wide_out in zip(widths, widths[1:]):
            for c, stride in ((wide_in, 2), (wide_out, 1)):
                layers += [nn.Conv2d(c, wide_out, 3, stride, 1, bias=False),
                           nn.BatchNorm2d(wide_out), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], num_classes)

    def features(self, images):
        """(N, 3, H, W) in [0, 1] -> (N, F), the averaged last map"""
        return self.body(2 * images - 1).mean(dim=(2, 3))

    def forward(self, images):
        return self.head(self.features(images))            # (N, classes)


# -- Training ------------------------------------------------------------------------------

@torch.random.fork_rng(devices=[])        # the caller's random numbers stay as they are
def judge_of(dataset, images, labels, num_classes, device="cpu"):
    """The judge of a data set, trained when it is first needed and kept in out/. A damaged
    file is replaced."""
    facts = dataset_named(dataset)
    name = f"judge_{Path(dataset).name}_{facts.judge_steps}_{image_fingerprint(images)}.pt"
    judge = Judge(num_classes, len(images[0]), facts.judge_width)
    try:
        judge.load_state_dict(torch.load(Path("out") / name, weights_only=True))
    except Exception:
        judge = train_judge(images, labels, num_classes, steps=facts.judge_steps,
                            width=facts.judge_width, mirrored=facts.mirrored, device=device)
        save_atomically(judge.cpu().state_dict(), Path("out") / name)
    return judge.to(device).eval()


@torch.random.fork_rng(devices=[])
def train_judge(images, labels, num_classes, *, steps, width=24, mirrored=False, seed=0,
                device="cpu", batch_size=128):
    """Train a judge on images, uint8 (N, H, W, 3) or read on demand, and labels (N,).
    -> judge in eval mode. The shapes need 100 steps, about 15 s on one CPU core."""
    labels, size = torch.as_tensor(labels), len(images[0])
    torch.default_generator.manual_seed(seed)
    judge = Judge(num_classes, size, width).to(device).train()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=4e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, max(steps, 2))
    generator, rows = torch.Generator().manual_seed(seed), []

    def batches():
        for _ in range(steps):
            rows.append(torch.randint(len(labels), (batch_size,), generator=generator))
            yield [(int(row), -1) for row in rows[-1]]

    # Files are read ahead, so with them the random numbers also depend on the cores.
    read = picture_batches(images, batches(), cores())
    for step, batch in enumerate(progress(read, steps, "steps of the judge", lambda _: 1)):
        images = augment(as_floats(batch), generator, mirrored).to(device)
        wanted = labels[rows[step]].to(device)
        loss = F.cross_entropy(judge(images), wanted, label_smoothing=0.02)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return judge.eval()


def augment(images, generator, mirrored=False):
    """Shift, soften, dim and speckle each of the images (N, 3, H, W) in its own way -> same.

    Reconstructions are soft and slightly off in colour, and a judge that knew only crisp
    images would blame them for it. `mirrored`: where left and right are not the label."""
    def uniform():
        return torch.rand(count, 1, 1, 1, generator=generator)
    count, side = len(images), images.shape[-1]
    reach = max(1, side // 16)
    shift = torch.randint(-reach, reach + 1, (2, count, 1), generator=generator)
    soften = uniform() * (uniform() < 0.5)
    scale, add = 0.85 + 0.3 * uniform(), 0.1 * (uniform() - 0.5)
    noise = torch.randn(images.shape, generator=generator)
    add = add + 0.04 * uniform() * noise
    rows, columns = (torch.arange(side) + shift).clamp(0, side - 1)      # (N, side) each
    if mirrored:
        columns = torch.where(uniform()[:, :, 0, 0] < 0.5, columns.flip(1), columns)
    which = torch.arange(count)[:, None, None]
    images = images[which, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return ((images + soften * (blurred - images)) * scale + add).clamp(0, 1)


# -- Features ------------------------------------------------------------------------------

def as_floats(images):
    """uint8 (N, H, W, 3) -> float (N, 3, H, W) in [0, 1], which is returned as it is"""
    if images.is_floating_point():
        return images
    return images.permute(0, 3, 1, 2).float() / 255


def batches_of(images, rows):
    """The images of these rows, a few at a time -> uint8 tensors (n, H, W, 3)"""
    parts = torch.as_tensor(rows).split(per_pass(len(images[0])))
    batches = ([(int(row), -1) for row in part] for part in parts)
    return picture_batches(images, batches, cores())


def rebuilt(tokenizer, images, rows):
    """Their reconstructions, a few at a time -> (n, 3, H, W) in [0, 1]"""
    device = next(tokenizer.parameters()).device
    for part in batches_of(images, rows):
        tokens = tokenizer.image_to_tokens(to_float(part).to(device))
        yield (tokenizer.tokens_to_image(tokens).float().cpu() + 1) / 2


@torch.no_grad()
def extract(judge, batches):
    """Batches of images, uint8 (n, H, W, 3) or float (n, 3, H, W) in [0, 1]; none is kept.
    -> features (N, F), logits (N, classes), on the judge's device"""
    device = judge.head.weight.device
    features = torch.cat([judge.features(as_floats(batch).to(device)) for batch in batches])
    return features, judge.head(features)


def accuracy(logits, labels):
    """The share of images, in [0, 1], to which the judge gives the class in labels (N,)"""
    return (logits.argmax(1).cpu() == torch.as_tensor(labels)).double().mean().item()


def frechet_distance(features_a, features_b):
    """|mean_a - mean_b|^2 + trace(A + B - 2 (A B)^(1/2)) of features (N, F) and (M, F) with
    covariances A and B. A B has the eigenvalues of A^(1/2) B A^(1/2), which is symmetric.
    Raises ValueError for fewer than two rows, which have no covariance."""
    a, b = features_a.double(), features_b.double()
    if min(len(a), len(b)) < 2:
        raise ValueError("the Fréchet distance needs at least two images on either side")
    A, B = (torch.cov(x.T).reshape(x.shape[1], -1) for x in (a, b))
    values, vectors = torch.linalg.eigh(A)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ B @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + A.trace() + B.trace() - 2 * cross
    return max(distance.item(), 0.0)                       # rounding may leave it below


def precision_recall(features_real, features_fake, k=3):
    """Shares in [0, 1] of fakes that look real and of reals that are covered (Kynkäänniemi
    et al. 2019).

    A point is inside a set if it is no farther from some member than that member's k-th
    nearest neighbour. Both sets need more than k rows, else ValueError."""
    if min(len(features_real), len(features_fake)) <= k:
        raise ValueError(f"precision and recall need more than {k} images on either side")

    def distances(points, members):                        # float32 would blur small ones
        for part in points.double().split(500):
            yield torch.cdist(part, members.double())

    def share_inside(points, members):
        # The member itself comes first at distance 0, so its k-th neighbour is the (k+1)-th.
        radius = torch.cat([part.kthvalue(k + 1, dim=1).values
                            for part in distances(members, members)])
        inside = torch.cat([(part <= radius).any(1) for part in distances(points, members)])
        return inside.double().mean().item()
    return (share_inside(features_fake, features_real),
            share_inside(features_real, features_fake))


# -- The table -----------------------------------------------------------------------------

def evaluate(dataset, data_dir, class_names, tokenizer, draw, count):
    """Print a table of held-out, reconstructed and sampled images, at most `count` of each.
    class_names: of the model; draw(labels (n,)) -> images (n, 3, H, W) in [0, 1]. Raises
    BadInput if there are too few images."""
    side, device = tokenizer.config.image_size, next(tokenizer.parameters()).device
    _, splits, names = load_splits(dataset, side, data_dir, class_names)
    (real, labels), (test, test_labels) = splits["train"], splits["test"]
    count = min(count, len(real), len(test))
    if count < 4 or names != class_names:
        raise BadInput("evaluate needs 4 images to train on and 4 held out, of the classes of "
                       f"the model; {dataset} has {len(real)} and {len(test)}")
    judge = judge_of(dataset, real, labels, len(names), device)
    right = accuracy(extract(judge, batches_of(test, range(len(test))))[1], test_labels)
    print(f"judge: {right:.2%} right on {len(test):,} held-out images of {len(names)} classes")
    print(f"{count} images per row, compared with as many training images; no Inception FID")
    print(f"{'':<20}{'in class':>9}{'Fréchet':>9}{'precision':>11}{'recall':>8}")
    rows, meant = rows_of(len(test), count), torch.arange(count) % len(names)
    known, _ = extract(judge, batches_of(real, rows_of(len(real), count)))
    for text, batches, wanted in (
            ("held-out images", batches_of(test, rows), test_labels[rows]),
            ("reconstructions", rebuilt(tokenizer, test, rows), test_labels[rows]),
            ("samples", [draw(meant)], meant)):
        found, logits = extract(judge, batches)
        precision, recall = precision_recall(known, found)
        in_class, distance = accuracy(logits, wanted), frechet_distance(known, found)
        print(f"{text:<20}{in_class:>9.1%}{distance:>9.3f}{precision:>11.2f}{recall:>8.2f}")
