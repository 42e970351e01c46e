"""The judge: a small classifier that belongs to a data set, and what is measured with it.

It answers "would a classifier name this picture as meant?" (accuracy), "are the pictures, taken
together, spread like real ones?" (Fréchet distance, precision, recall) and "is this picture a copy
from the training set?" (nearest neighbours). Its numbers compare runs on one data set with one
judge; they are not the FID of the literature, which uses the Inception network.

    images (N, 3, H, W) in [0, 1]  ->  features (N, F)  ->  logits (N, num_classes)
"""

import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from engine import BadInput
from data.batches import fingerprint, in_parts, rows_of, sample_of, to_float


class Judge(nn.Module):
    """Halve the picture until 4 pixels or so are left a side, average, classify."""

    def __init__(self, num_classes, size, width=24):
        super().__init__()
        halvings = max(1, (size // 4).bit_length() - 1)         # 32 pixels: 16, 8, 4
        widths = [3] + [min(width * 2**i, 4 * width) for i in range(halvings)]
        layers = []
        for wide_in, wide_out in zip(widths, widths[1:]):
            layers += [nn.Conv2d(wide_in, wide_out, 3, 2, 1, bias=False),
                       nn.BatchNorm2d(wide_out), nn.SiLU(),
                       nn.Conv2d(wide_out, wide_out, 3, 1, 1, bias=False),
                       nn.BatchNorm2d(wide_out), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], num_classes)

    def features(self, images):
        """(N, 3, H, W) in [0, 1] -> (N, F), the averaged last map."""
        images = (2 * images - 1).contiguous(memory_format=torch.channels_last)
        return self.body(images).mean(dim=(2, 3))

    def forward(self, images):
        return self.head(self.features(images))                 # (N, num_classes)


def train_judge(images_uint8, labels, num_classes, *, steps, seed, device="cpu", batch_size=128,
                log=print):
    """Train a judge on uint8 images (N, H, W, 3) and int64 labels (N,); return it in eval mode.

    For the shapes 100 steps are plenty: 13 to 20 s on one CPU core, none of 4,000 test
    pictures misnamed (seed 0).
    It draws from its own generators: who trains a judge half-way keeps their random numbers.
    """
    labels = torch.as_tensor(labels)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reset the GPU's too
        judge = Judge(num_classes, len(images_uint8[0]))
    judge = judge.to(device, memory_format=torch.channels_last).train()
    optimiser = torch.optim.AdamW(judge.parameters(), lr=4e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=max(steps, 2))
    start = time.time()
    for step in range(1, steps + 1):
        rows = torch.randint(len(labels), (batch_size,), generator=generator)
        batch = _augment(_take(images_uint8, rows), generator).to(device)
        loss = F.cross_entropy(judge(batch), labels[rows].to(device), label_smoothing=0.02)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            left = (time.time() - start) / step * (steps - step)
            log(f"judge step {step}/{steps} | loss {loss.item():.3f} | eta {left:.0f} s")
    return judge.eval()


def load_or_train(path, images_uint8, labels, num_classes, *, steps, seed, device="cpu", log=print):
    """The judge kept at `path`, or a new one that is then kept there (see train_judge).

    A file made for other sizes, classes, steps or seed is replaced. The file knows nothing else
    about the data: keep one path per data set.
    """
    path = Path(path)
    made_for = {"num_classes": int(num_classes), "size": len(images_uint8[0]),
                "steps": int(steps), "seed": int(seed)}
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["made_for"] == made_for:
            judge = Judge(made_for["num_classes"], made_for["size"])
            judge.load_state_dict(saved["state"])
            return judge.to(device, memory_format=torch.channels_last).eval()
    except Exception:  # missing, half written or something else: it is quickly made again
        pass
    judge = train_judge(images_uint8, labels, num_classes, steps=steps, seed=seed, device=device,
                        log=log)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written beside and moved over, so that a reader never meets half a file.
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    torch.save({"made_for": made_for, "state": judge.cpu().state_dict()}, partial)
    os.replace(partial, path)
    return judge.to(device)


def judge_of(dataset, images, labels, num_classes, device="cpu"):
    """The judge of a data set: trained when it is first wanted, then kept in out/."""
    path = Path("out") / f"judge_{Path(dataset).name}_{fingerprint(images)}.pt"
    return load_or_train(path, images, labels, num_classes, seed=0, device=device,
                         steps=100 if dataset == "shapes" else 2000)


def _take(images, rows):
    """The pictures at `rows` as floats (n, 3, H, W) in [0, 1]; `images` is such a tensor already,
    or uint8 (N, H, W, 3): an array, or whatever reads picture i when asked for images[i].
    """
    if torch.is_tensor(images) and images.is_floating_point():
        return images[rows]
    chosen = np.stack([np.asarray(images[int(i)]) for i in rows])
    return torch.from_numpy(chosen).permute(0, 3, 1, 2).float() / 255


def _augment(images, generator):
    """Shift, soften, dim and speckle, a little, each picture on its own: (N, 3, H, W) -> same.

    Reconstructions are soft and slightly off in colour; a judge that only ever saw crisp pictures
    would blame them for that. No mirroring: in some data sets left and right are the label.
    """
    count, side = len(images), images.shape[-1]
    reach = max(1, side // 16)

    def uniform():
        return torch.rand(count, 1, 1, 1, generator=generator)

    by = torch.randint(-reach, reach + 1, (2, count, 1), generator=generator)
    rows, columns = (torch.arange(side) + by).clamp(0, side - 1)    # (N, side), border repeated
    images = images[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    images = images.permute(0, 3, 1, 2)                             # (N, 3, side, side) again
    soft = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    images = images + uniform() * (uniform() < 0.5) * (soft - images)
    images = images * (0.85 + 0.3 * uniform()) + 0.1 * (uniform() - 0.5)
    noise = torch.randn(images.shape, generator=generator)
    return (images + 0.04 * uniform() * noise).clamp(0, 1)


@torch.no_grad()
def extract(judge, images, batch_size=500):
    """(features (N, F), logits (N, classes)) of uint8 or float images (see _take). Logits on the
    CPU; features stay on a CUDA GPU, which compares them in float64 faster."""
    device, found = next(judge.parameters()).device, []
    kept = device if device.type == "cuda" else "cpu"
    for start in range(0, len(images), batch_size):
        batch = _take(images, range(start, min(start + batch_size, len(images)))).to(device)
        features = judge.features(batch)
        found.append((features.float().to(kept), judge.head(features).float().cpu()))
    features, logits = zip(*found)
    return torch.cat(features), torch.cat(logits)


def extract_all(judge, batches):
    """extract() of pictures that come in batches and are not kept."""
    features, logits = zip(*[extract(judge, batch if batch.is_floating_point() else batch.numpy())
                             for batch in batches])
    return torch.cat(features), torch.cat(logits)


def accuracy(judge, images, labels):
    """Share of the pictures, in [0, 1], that the judge names as the labels (N,) say."""
    named = extract(judge, images)[1].argmax(1)
    return (named == torch.as_tensor(labels).cpu()).double().mean().item()


def frechet_distance(features_a, features_b):
    """|mean_a - mean_b|^2 + trace(A + B - 2 (A B)^(1/2)) of features (N, F) and (M, F).

    A B has the eigenvalues of the symmetric A^(1/2) B A^(1/2), so symmetric solvers do.
    Raises ValueError for fewer than two rows, which have no covariance.
    """
    a, b = features_a.double(), features_b.double()
    if len(a) < 2 or len(b) < 2:
        raise ValueError("the Fréchet distance needs at least two pictures on either side")
    cov_a, cov_b = torch.cov(a.T).reshape(a.shape[1], -1), torch.cov(b.T).reshape(a.shape[1], -1)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(distance.item(), 0.0)  # rounding may leave it a hair below


def precision_recall(features_real, features_fake, k=3):
    """Shares in [0, 1] (Kynkäänniemi et al. 2019): fakes that look real, reals that are covered.

    A point lies in a set when it is within the distance from some member to that member's k-th
    nearest neighbour. Both sets need more than k rows, else ValueError.
    """
    if min(len(features_real), len(features_fake)) <= k:
        raise ValueError(f"precision and recall with k={k} need more than {k} pictures a side")

    def share_inside(points, members):
        # The member itself comes first at distance 0, so its k-th neighbour is the (k+1)-th.
        radius = torch.cat([torch.cdist(part, members).kthvalue(k + 1, dim=1).values
                            for part in members.split(1000)])
        inside = [(torch.cdist(part, members) <= radius).any(1) for part in points.split(1000)]
        return torch.cat(inside).double().mean().item()

    real, fake = features_real.double(), features_fake.double()  # float32 blurs small distances
    return share_inside(fake, real), share_inside(real, fake)


def distances(features_query, features_set):
    """(N, F), (M, F) -> distances (N, M)"""
    return torch.cat([torch.cdist(part.double(), features_set.double()).float()
                      for part in features_query.split(100)])


def nearest_neighbours(features_query, features_set):
    """For each of (N, F) the row of (M, F) closest to it: int64 (N,)."""
    return distances(features_query, features_set).argmin(1)


def evaluate(studio):
    """Samples before a judge trained on real pictures: a table, and neighbours.png."""
    (real, labels), (test, test_labels) = studio.load("train"), studio.load("test")
    count = min(studio.args.n or 1000, len(real), len(test))             # as many of each kind
    if count < 4:
        raise BadInput(f"evaluate needs 4 pictures of each kind; there are {len(real)} to train "
                       f"on, {len(test)} held out and {studio.args.n or 1000} to sample")
    judge = judge_of(studio.dataset, real, labels, len(studio.names), studio.device)
    print(f"judge: {accuracy(judge, test, test_labels):.2%} right on {len(test):,} held-out "
          "pictures; the figures below are on its features and are no Inception FID")
    at, first = rows_of(len(test), count), []
    wanted = np.resize(np.unique(labels), count)           # the classes that there are, in turn

    def rebuilt():
        with torch.no_grad():
            for part in in_parts(test, at):
                tokens = studio.tokenizer.image_to_tokens(to_float(part).to(studio.device))
                yield (studio.tokenizer.tokens_to_image(tokens).cpu() + 1) / 2

    def drawn():
        for part in studio.batches(wanted.tolist()):
            if sum(map(len, first)) < 16:
                first.append(part[:16].clone())            # to look at: the others are not kept
            yield part
    known = extract_all(judge, in_parts(real, rows_of(len(real), count)))[0]
    rows = {"held-out pictures (floor)": (extract_all(judge, in_parts(test, at)), test_labels[at]),
            "reconstructions": (extract_all(judge, rebuilt()), test_labels[at]),
            f"samples, cfg {studio.sampling['cfg']:g}": (extract_all(judge, drawn()), wanted)}
    print(f"{count} pictures a row, beside as many to train on (the Frechet distance shrinks with "
          "their number: compare equal ones)")
    print(f"{'':<28}{'in class':>9}{'Frechet':>9}{'precision':>11}{'recall':>8}")
    for name, ((features, logits), meant) in rows.items():
        right = (logits.argmax(1) == torch.as_tensor(meant)).double().mean()
        precision, recall = precision_recall(known, features)
        print(f"{name:<28}{right:>9.1%}{frechet_distance(known, features):>9.3f}"
              f"{precision:>11.2f}{recall:>8.2f}")
    (floor, _), _, (fake, _) = [found for found, _ in rows.values()]
    enough = min(50_000, 2 ** 30 // (3 * studio.side ** 2))              # at most a gigabyte
    neighbours(studio, judge, sample_of(real, enough), torch.cat(first)[:16], floor, fake)


def neighbours(studio, judge, real, shown, floor, fake):
    """Has the model copied? Each sample's nearest training picture, by the judge's features and by
    its pixels; and how near samples come, beside how near held-out pictures come by chance.

    real: uint8 (N, H, W, 3); shown: samples in [0, 1]; floor, fake: features of held-out pictures
    and of all samples, the first of them those shown."""
    known = extract(judge, real.numpy())[0]
    near = [torch.cat([distances(part, known).min(1).values for part in features.split(1000)])
            for features in (floor, fake)]
    closest = near[0].quantile(0.01)
    closer = (near[1] < closest).double().mean()
    print(f"nearest of {len(known):,} training pictures: samples are {near[1].median():.2f} away "
          f"(median), held-out pictures {near[0].median():.2f}; {closer:.1%} of the samples are "
          "nearer than the nearest 1 % of held-out pictures")
    by_features = nearest_neighbours(fake[:len(shown)], known).cpu()
    flat = shown.flatten(1).double()                       # float32 cannot tell near copies apart
    by_pixels = torch.cat([torch.cdist(flat, to_float(part).add(1).div(2).flatten(1).double())
                           for part in real.split(2000)], 1).argmin(1)
    found = [to_float(real[rows]).add(1).div(2) for rows in (by_features, by_pixels)]
    studio.save("neighbours", torch.cat([shown, *found]), len(shown),
                row_labels=["sample", "nearest, features", "nearest, pixels"])
