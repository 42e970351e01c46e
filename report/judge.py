"""The judge: a small classifier trained on a data set, and what is measured with it.

It answers: would a classifier name this image as it was meant (accuracy)? Are the images, taken
together, distributed like real ones (Fréchet distance, precision, recall)? Is this image a copy
from the training set (nearest neighbours)? Its numbers compare runs on one data set with one judge.
They are not the FID of the literature, which uses the Inception network.

    images (N, 3, H, W) in [0, 1]  ->  features (N, F)  ->  logits (N, classes)
"""
import itertools
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from data.batches import image_fingerprint, per_pass, picture_batches, rows_of, to_float
from data.registry import dataset_named
from engine import BadInput
from engine.checkpoints import save_atomically
from engine.devices import loading_workers
from report import gallery


class Judge(nn.Module):
    """Halve the image until about 4 pixels a side are left, average, classify."""

    def __init__(self, num_classes, size, width=24):
        super().__init__()
        halvings = max(1, (size // 4).bit_length() - 1)         # 32 pixels: 16, 8, 4
        widths = [3] + [min(width * 2**i, 4 * width) for i in range(halvings)]
        layers = []
        for wide_in, wide_out in zip(widths, widths[1:]):
            for c, stride in ((wide_in, 2), (wide_out, 1)):
                layers += [nn.Conv2d(c, wide_out, 3, stride, 1, bias=False),
                           nn.BatchNorm2d(wide_out), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], num_classes)

    def features(self, images):
        """(N, 3, H, W) in [0, 1] -> (N, F), the averaged last map."""
        images = (2 * images - 1).contiguous(memory_format=torch.channels_last)
        return self.body(images).mean(dim=(2, 3))

    def forward(self, images):
        return self.head(self.features(images))                 # (N, classes)


# -- Training --------------------------------------------------------------------------------------

@torch.random.fork_rng(devices=[])       # the caller's random numbers stay as they are
def judge_of(dataset, images, labels, num_classes, device="cpu", log=print):
    """The judge of a data set, trained when it is first asked for (see train_judge) and kept in
    out/. A file that is damaged or of another model is replaced."""
    facts = dataset_named(dataset)
    steps, width = facts.judge_steps, facts.judge_width
    path = Path("out") / f"judge_{Path(dataset).name}_{steps}_{image_fingerprint(images)}.pt"
    judge = Judge(num_classes, len(images[0]), width)
    try:
        judge.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception:
        judge = train_judge(images, labels, num_classes, steps=steps, width=width,
                            mirrored=facts.mirrored, device=device, log=log).cpu()
        save_atomically(judge.state_dict(), path)
    return judge.to(device, memory_format=torch.channels_last).eval()


def train_judge(images, labels, num_classes, *, steps, width=24, mirrored=False, seed=0,
                device="cpu", batch_size=128, log=print):
    """Train a judge on images (uint8 (N, H, W, 3), or read on demand) and int64 labels (N,).
    -> judge in eval mode. For the shapes 100 steps are enough: 13 to 20 s on one CPU core, and none
    of 4,000 test images misnamed (seed 0)."""
    labels = torch.as_tensor(labels)
    generator = torch.Generator().manual_seed(seed)
    torch.default_generator.manual_seed(seed)              # torch.manual_seed resets the GPU's too
    judge = Judge(num_classes, len(images[0]), width)
    judge = judge.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=4e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=max(steps, 2))
    # Workers read ahead, so all random numbers of a step are drawn with its rows: the same ones in
    # the same order, however many workers there are.
    ahead, now = itertools.tee((torch.randint(len(labels), (batch_size,), generator=generator),
                                random_changes(batch_size, len(images[0]), generator, mirrored))
                               for _ in range(steps))
    batches, start = middles(images, (rows for rows, _ in ahead)), time.time()
    for step, (batch, (rows, changes)) in enumerate(zip(batches, now), 1):
        batch = augment(as_floats(batch), changes).to(device)
        loss = F.cross_entropy(judge(batch), labels[rows].to(device), label_smoothing=0.02)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            left = (time.time() - start) / step * (steps - step)
            log(f"judge step {step}/{steps} | loss {loss.item():.3f} | eta {left:.0f} s")
    return judge.eval()


def random_changes(count, side, generator, mirrored=False):
    """The random numbers of augment() for `count` images: shifts (2, N, 1) in pixels; how much to
    soften, scale, add and speckle, each (N, 1, 1, 1); noise (N, 3, side, side); which images to
    mirror (N, 1) bool"""
    reach = max(1, side // 16)

    def uniform():
        return torch.rand(count, 1, 1, 1, generator=generator)
    shift = torch.randint(-reach, reach + 1, (2, count, 1), generator=generator)
    soften = uniform() * (uniform() < 0.5)
    scale, add = 0.85 + 0.3 * uniform(), 0.1 * (uniform() - 0.5)
    noise = torch.randn(count, 3, side, side, generator=generator)
    speckle = 0.04 * uniform()
    mirror = uniform()[:, :, 0, 0] < 0.5 if mirrored else torch.zeros(count, 1, dtype=torch.bool)
    return shift, soften, scale, add, speckle, noise, mirror


def augment(images, changes):
    """Shift, soften, dim and speckle a little, each image on its own: (N, 3, H, W) -> same.

    Reconstructions are soft and slightly off in colour; a judge that only ever saw crisp images
    would blame them for that. Mirroring is for some data sets: in others left and right are the
    label."""
    shift, soften, scale, add, speckle, noise, mirror = changes
    count, side = len(images), images.shape[-1]
    rows, columns = (torch.arange(side) + shift).clamp(0, side - 1)     # (N, side), edge repeated
    columns = torch.where(mirror, columns.flip(1), columns)
    images = images[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    images = images.permute(0, 3, 1, 2)                                 # (N, 3, side, side) again
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    images = images + soften * (blurred - images)
    return (images * scale + add + speckle * noise).clamp(0, 1)


# -- Features --------------------------------------------------------------------------------------

def as_floats(images):
    """uint8 (N, H, W, 3) -> float (N, 3, H, W) in [0, 1]; floats (N, 3, H, W) stay as they are"""
    return images if images.is_floating_point() else images.permute(0, 3, 1, 2).float() / 255


def middles(images, batches):
    """Images in memory or in files (data/batches.py), decoded ahead by workers, centre crops.
    batches: rows (n,) of one after another -> uint8 tensors (n, H, W, 3)"""
    return picture_batches(images, ([(int(i), -1) for i in rows] for rows in batches),
                           loading_workers(1))


def batches_of(images, rows):
    """The images of these rows, a few at a time. -> uint8 tensors (n, H, W, 3)"""
    return middles(images, torch.as_tensor(rows).split(per_pass(len(images[0]))))


def rebuilt(tokenizer, images, rows):
    """Reconstructions of the images of these rows, a few at a time. -> (n, 3, H, W) in [0, 1]"""
    device = next(tokenizer.parameters()).device
    for part in batches_of(images, rows):
        tokens = tokenizer.image_to_tokens(to_float(part).to(device))
        yield (tokenizer.tokens_to_image(tokens).float().cpu() + 1) / 2


@torch.no_grad()
def extract(judge, batches):
    """Batches of images, uint8 (n, H, W, 3) or float (n, 3, H, W) in [0, 1]; none is kept.
    -> features (N, F), logits (N, classes). Logits lie on the CPU; features stay on a CUDA GPU,
    which compares them in float64 faster."""
    device, found = next(judge.parameters()).device, []
    for batch in batches:
        features = judge.features(as_floats(batch).to(device))
        found.append((features.float().to(device if device.type == "cuda" else "cpu"),
                      judge.head(features).float().cpu()))
    features, logits = zip(*found)
    return torch.cat(features), torch.cat(logits)


def accuracy(logits, labels):
    """Share of images, in [0, 1], that are named as the labels (N,) say."""
    return (logits.argmax(1) == torch.as_tensor(labels)).double().mean().item()


def frechet_distance(features_a, features_b):
    """|mean_a - mean_b|^2 + trace(A + B - 2 (A B)^(1/2)) of features (N, F) and (M, F).

    A B has the eigenvalues of the symmetric A^(1/2) B A^(1/2), so symmetric solvers do.
    Raises ValueError for fewer than two rows, which have no covariance."""
    a, b = features_a.double(), features_b.double()
    if len(a) < 2 or len(b) < 2:
        raise ValueError("the Fréchet distance needs at least two images on either side")
    cov_a, cov_b = torch.cov(a.T).reshape(a.shape[1], -1), torch.cov(b.T).reshape(a.shape[1], -1)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(distance.item(), 0.0)  # rounding may leave it a hair below


def precision_recall(features_real, features_fake, k=3):
    """Shares in [0, 1] (Kynkäänniemi et al. 2019): fakes that look real, reals that are covered.

    A point lies in a set when it is within the distance from some member to that member's k-th
    nearest neighbour. Both sets need more than k rows, else ValueError."""
    if min(len(features_real), len(features_fake)) <= k:
        raise ValueError(f"precision and recall with k={k} need more than {k} images a side")

    def share_inside(points, members):
        # The member itself comes first at distance 0, so its k-th neighbour is the (k+1)-th.
        radius = torch.cat([part.kthvalue(k + 1, dim=1).values
                            for part in distances(members, members)])
        inside = torch.cat([(part <= radius).any(1) for part in distances(points, members)])
        return inside.double().mean().item()
    return (share_inside(features_fake, features_real), share_inside(features_real, features_fake))


def distances(points, members):
    """Distances of rows (N, F) from rows (M, F), a few points at a time: (n, M), in float64, as
    float32 blurs small distances."""
    members = members.double()
    for part in points.split(500):
        yield torch.cdist(part.double(), members)


# -- The table -------------------------------------------------------------------------------------

def labels_to_draw(asked, labels, test_labels):
    """Labels of the samples to judge, as many as there are real and held-out images, at most
    `asked`: the classes that there are, in turn. Raises BadInput if these are too few."""
    count = min(asked, len(labels), len(test_labels))
    if count < 4:
        raise BadInput(f"evaluate needs 4 images of each kind; there are {len(labels)} to train "
                       f"on, {len(test_labels)} held out and {asked} to sample")
    return np.resize(np.unique(labels), count).tolist()


def introduce(judge, images, labels):
    """Print how often the judge is right on held-out images of all its classes."""
    logits = extract(judge, batches_of(images, range(len(images))))[1]
    print(f"judge: {accuracy(logits, labels):.2%} right on {len(images):,} held-out images of "
          f"{logits.shape[1]} classes; the figures below are on its features and are no Inception "
          "FID")


def evaluate(out, judge, tokenizer, real, test, test_labels, samples, meant, name):
    """Print a table of real, reconstructed and sampled images; write neighbours.png.

    real, test: images of the training set and held out, in memory or in files; samples: batches
    of images in [0, 1], as classes meant (N,); name: of their row. As many images in each row.
    Labels are those of the judge."""
    first, count = [], len(meant)
    known = extract(judge, batches_of(real, rows_of(len(real), count)))[0]
    rows = rows_of(len(test), count)

    def watched():
        for batch in samples:
            if sum(map(len, first)) < 16:
                first.append(batch[:16].clone())           # to look at: the others are not kept
            yield batch
    print(f"{count} images a row, beside as many to train on (the Frechet distance shrinks with "
          "their number: compare equal ones)")
    print(f"{'':<28}{'in class':>9}{'Frechet':>9}{'precision':>11}{'recall':>8}")
    features = []
    for text, batches, labels in (
            ("held-out images (floor)", batches_of(test, rows), test_labels[rows]),
            ("reconstructions", rebuilt(tokenizer, test, rows), test_labels[rows]),
            (name, watched(), meant)):
        found, logits = extract(judge, batches)
        precision, recall = precision_recall(known, found)
        print(f"{text:<28}{accuracy(logits, labels):>9.1%}{frechet_distance(known, found):>9.3f}"
              f"{precision:>11.2f}{recall:>8.2f}")
        features.append(found)
    enough = min(50_000, 2 ** 30 // (3 * len(real[0]) ** 2))             # at most a gigabyte
    real = torch.cat(list(batches_of(real, rows_of(len(real), enough))))
    neighbours(out, judge, real, torch.cat(first)[:16], features[0], features[-1])


def neighbours(out, judge, real, shown, floor, fake):
    """Has the model copied? Each sample's nearest training image, by the judge's features and by
    its pixels; and how near samples come, beside how near held-out images come by chance.

    real: uint8 (N, H, W, 3); shown: samples in [0, 1]; floor, fake: features of held-out images
    and of all samples, the first of them those shown."""
    known = extract(judge, real.split(500))[0]
    near = [torch.cat([part.min(1).values for part in distances(features, known)])
            for features in (floor, fake)]
    closest = near[0].quantile(0.01)
    closer = (near[1] < closest).double().mean()
    print(f"nearest of {len(known):,} training images: samples are {near[1].median():.2f} away "
          f"(median), held-out images {near[0].median():.2f}; {closer:.1%} of the samples are "
          "nearer than the nearest 1 % of held-out images")
    by_features = next(distances(fake[:len(shown)], known)).argmin(1).cpu()
    by_pixels = torch.cat([next(distances(shown.flatten(1), as_floats(part).flatten(1)))
                           for part in real.split(2000)], 1).argmin(1)
    found = [as_floats(real[rows]) for rows in (by_features, by_pixels)]
    gallery.save(out, "neighbours", torch.cat([shown, *found]), len(shown),
                 row_labels=["sample", "nearest, features", "nearest, pixels"])
