"""Chapter 1: rounding, learned.

A transformer ends in a softmax over a finite list of symbols, so an image must become symbols
first. Quantizing does that: each number (or vector) is replaced by the nearest entry of a short
list, and only the entry's index is kept. This chapter quantizes colours, chapter 2 whole feature
maps, and chapter 4 predicts the indices. (Ignore `# Exercise`: it marks what a course blanks out.)

    scalar    -0.37 ------------------> bucket 3 of 8 ------> -0.375
    vector    (0.9, 0.1, 0.2) --------> code 17 of 64 ------> (0.8, 0.1, 0.3)
    residual  x = z[17] + rest,  rest = z[4] + smaller rest,  ...      log2(64) bits per round
    sign      (0.9, -0.1, 0.2) -------> + - +  = index 5 ---> (s, -s, s)       no codebook at all

Shapes: x (..., C) vectors to quantize, idx (...) int64, V codes, C channels, codebook (V, C).

Sources: VQ-VAE (van den Oord et al. 2017, eq. 3 and appendix A.1 for the EMA update), Lloyd 1982,
RQ-VAE (Lee et al. 2022, section 3.1), lookup-free quantization (Yu et al. 2024, section 3),
VAR (Tian et al. 2024, section 3.2).

Differs from the original VAR code: that code ships no training of the codebook. Here codes start
on data, follow it by moving averages, and a code that nobody uses moves to where it is needed.

    python 01_vq.py        a table of errors and out/01_vq.png, in seconds
"""
import math

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from data import shapes
from report import plots


# -- Numbers: where to put the levels --------------------------------------------------------------

def uniform_levels(x, levels):
    """Centres of equal-width buckets between min(x) and max(x). x (N,) -> (levels,)"""
    edges = torch.linspace(float(x.min()), float(x.max()), levels + 1)
    return (edges[:-1] + edges[1:]) / 2


def equal_mass_levels(x, levels):
    """Means of buckets that hold equally many of the numbers. x (N,) -> (levels,)"""
    return torch.stack([part.mean() for part in x.sort().values.tensor_split(levels)])


def lloyd_levels(x, levels, iterations=50):
    """Lloyd's algorithm: assign every number to its nearest level, move each level to the mean of
    its numbers, repeat. Neither step can raise the squared error, and it ends below equal mass.
    That uses levels about alike, but error is what counts: in the tails numbers are few and far
    apart, so a level there should serve fewer of them. x (N,) -> (levels,)"""
    centres = equal_mass_levels(x, levels)
    # Exercise 01_1
    for _ in range(iterations):
        idx = round_to(x, centres)
        total = torch.zeros(levels).index_add_(0, idx, x)
        count = torch.bincount(idx, minlength=levels)
        centres = torch.where(count > 0, total / count.clamp(min=1), centres)
    return centres


def round_to(x, centres):
    """Index of the nearest centre. x (N,), centres (levels,) -> (N,)"""
    return (x[:, None] - centres).abs().argmin(dim=1)


# -- Learning through a quantizer ------------------------------------------------------------------

def straight_through(x, code):
    """The code in the forward pass; in the backward pass the gradient goes to x, as if x had not
    been quantized: the gradient of rounding itself is zero almost everywhere. -> x_hat (..., C)"""
    # Exercise 01_2
    return x + (code - x).detach()


def commitment_loss(x, code):
    """Moves x towards its code (VQ-VAE, eq. 3, third term). Without it nothing keeps x near the
    codes: the decoder likes codes far apart, so x grows, and the codes lag behind. -> ()"""
    # Exercise 01_2
    return F.mse_loss(x, code.detach())


def codebook_loss(x, code):
    """Moves the code towards the vectors that use it (eq. 3, second term). It takes the code
    itself: straight_through's result has no gradient to the codebook. -> ()"""
    # Exercise 01_2
    return F.mse_loss(code, x.detach())


# -- Vectors: a learned codebook -------------------------------------------------------------------

class Quantizer(nn.Module):
    """What chapter 2 asks of a quantizer. A new kind defines nearest(x (..., C)) -> idx (...) and
    lookup(idx) -> codes (..., C), and gets a line in QUANTIZERS; the methods below are for codes
    that learn. groups: list of (..., C), one for each scale of chapter 2; indices: their codes."""
    started = True                           # False: its codes are still to be placed on data

    @classmethod
    def build(cls, vocab_size, dim, learn):
        """As chapter 2's settings ask. Raises ValueError for sizes that cannot be."""
        return cls(vocab_size, dim, learn)

    def extra_loss(self, x):
        """What vectors (..., C) should obey beyond the commitment. -> ()"""
        return x.new_zeros(())

    def start_on_data(self, groups):
        """Place the codes."""

    def observe(self, groups, indices):
        """Remember which vectors used which code."""

    def update(self, accepted=True):
        """Learn from what was observed, if the training step was accepted (bool, or a tensor)."""


class VectorQuantizer(Quantizer):
    """The nearest (Euclidean) of V learned codes of length C.

    learn   "ema": each code is a running mean of the vectors that use it, without gradients;
            "gradient": codes are parameters, moved by the codebook loss
    decay   memory of the running means: 0.99 averages over about the last 100 steps
    revive  move codes that fell out of use onto vectors of the current batch"""

    def __init__(self, vocab_size, dim, learn="ema", decay=0.99, revive=True):
        super().__init__()
        if learn not in ("ema", "gradient"):
            raise ValueError(f"learn must be 'ema' or 'gradient', not {learn!r}")
        self.vocab_size, self.dim = vocab_size, dim
        self.learn, self.decay, self.revive = learn, decay, revive
        codebook = torch.randn(vocab_size, dim) / math.sqrt(dim)      # of length 1, about
        if learn == "gradient":
            self.codebook = nn.Parameter(codebook)
        else:
            self.register_buffer("codebook", codebook)
        # Running means per step: how often each code was used, and the sum of the vectors it coded.
        self.register_buffer("hits", torch.ones(vocab_size))
        self.register_buffer("sums", codebook.detach().clone())
        self.register_buffer("initialised", torch.tensor(False))
        # The same of this step alone, since the last update.
        self.register_buffer("count", torch.zeros(vocab_size), persistent=False)
        self.register_buffer("total", torch.zeros(vocab_size, dim), persistent=False)
        # `initialised` as the CPU knows it, so that no step waits for a GPU: the codes have been
        # placed on data (started), in a step that was accepted (settled).
        self.started = self.settled = False

    def nearest(self, x):
        flat = x.reshape(-1, self.dim)
        # |x - z|^2 = |x|^2 - 2 x.z + |z|^2, and |x|^2 is the same for every code. addmm computes
        # |z|^2 - 2 x.z without a second (N, V) table.
        distance = torch.addmm(self.codebook.square().sum(1), flat, self.codebook.t(), alpha=-2)
        return distance.argmin(dim=1).view(x.shape[:-1])

    def lookup(self, idx):
        return F.embedding(idx, self.codebook)

    @torch.no_grad()
    def observe(self, groups, indices):
        x = torch.cat([g.reshape(-1, self.dim) for g in groups]).float()
        idx = torch.cat([i.reshape(-1) for i in indices])
        self.count.index_add_(0, idx, x.new_ones(len(idx)))
        self.total.index_add_(0, idx, x)
        if self.revive:
            self.fresh = self._draw(groups)

    @torch.no_grad()
    def update(self, accepted=True):
        """VQ-VAE, appendix A.1: hits = decay hits + (1 - decay) count, sums = decay sums +
        (1 - decay) total, code = sums / hits. A step that was not accepted, as its loss or gradient
        is not finite, leaves no trace."""
        # Sums over all processes: each of them sees a part of the batch.
        over_all_processes(dist.all_reduce, self.count)
        over_all_processes(dist.all_reduce, self.total)
        # Not `if good:`, which would make Python wait for a GPU: torch.where chooses.
        good = self.total.isfinite().all() & accepted
        # Exercise 01_3
        self.hits.lerp_(torch.where(good, self.count, self.hits), 1 - self.decay)
        self.sums.lerp_(torch.where(good, self.total, self.sums), 1 - self.decay)
        if self.learn == "ema":
            alive = good & (self.hits > 1e-3)          # 0 / 0 would turn an unused code into nan
            mean = self.sums / self.hits.clamp(min=1e-3)[:, None]
            self.codebook.copy_(torch.where(alive[:, None], mean, self.codebook))
        # End of exercise
        if self.revive:
            self._move_unused_codes(good)
        self.count.zero_()
        self.total.zero_()
        self.initialised.logical_or_(good)
        if not self.settled:                 # if not accepted, the next step places the codes again
            self.started = self.settled = bool(self.initialised)

    def _move_unused_codes(self, good):
        """Codes used less than a tenth as often as the average (and less than once a step) move
        onto vectors of this batch. Their statistics move along: stale ones would carry the code
        straight back in the next update."""
        dead = good & (self.hits < (0.1 * self.hits.mean()).clamp(max=1.0))
        self.codebook.copy_(torch.where(dead[:, None], self.fresh, self.codebook))
        self.sums.copy_(torch.where(dead[:, None], self.fresh, self.sums))
        self.hits.masked_fill_(dead, 1.0)

    @torch.no_grad()
    def start_on_data(self, groups):
        """Place the codes on vectors of the first batch: a code far from all data would never be
        used."""
        self.started = True
        if bool(self.initialised):           # the codes come from a checkpoint
            return
        self.codebook.copy_(self._draw(groups))
        self.sums.copy_(self.codebook)

    def _draw(self, groups):
        """V vectors drawn at random, those of small groups with a larger chance each: the coarse
        scales of chapter 2 have few vectors and need codes all the same. -> (V, C)"""
        flat = [g.detach().reshape(-1, self.dim).float() for g in groups]
        weight = torch.cat([f.new_full((len(f),), 1 / len(f)) for f in flat])
        drawn = torch.cat(flat)[draw_rows(weight, self.vocab_size)]
        # The same vector twice would waste a code: noise of 1 % lets the two move apart.
        drawn = drawn + 0.01 * drawn.square().mean().sqrt() * torch.randn_like(drawn)
        over_all_processes(dist.broadcast, drawn, 0)                     # process 0 decides
        return drawn


def draw_rows(weight, count):
    """Random rows, each with a chance in proportion to its weight (N,), and none twice if there
    are enough. -> (count,)"""
    if count > len(weight):
        return torch.multinomial(weight, count, replacement=True)
    # Without replacement multinomial computes just this, but makes a GPU wait.
    return (weight / torch.empty_like(weight).exponential_()).topk(count).indices


def over_all_processes(operation, tensor, *more):
    """Where several processes train (chapter 5), make the tensor the same in all of them, in place:
    otherwise their codebooks drift apart. operation: of torch.distributed"""
    if dist.is_initialized():
        operation(tensor, *more)


# -- Signs: a codebook for free --------------------------------------------------------------------

class LookupFreeQuantizer(Quantizer):
    """Every channel keeps only its sign, and the signs, read as bits, are the index.

    bits     C = bits channels and V = 2**bits codes; channel c is bit c, 1 where x is positive
    entropy  weight of the entropy term (Yu et al. 2024, eq. 5)
    Codes lie on the unit sphere (as in binary spherical quantization): entries +-1/sqrt(bits)."""

    def __init__(self, bits, entropy=0.1):
        super().__init__()
        if not 1 <= bits <= 24:
            raise ValueError(f"lfq has one bit per channel and allows 1 to 24, not {bits}: "
                             "give --set latent_dim=9 --vocab-size 512, say")
        self.dim, self.vocab_size = bits, 2 ** bits
        self.entropy, self.size = entropy, 1 / math.sqrt(bits)
        self.register_buffer("powers", 2 ** torch.arange(bits), persistent=False)

    @classmethod
    def build(cls, vocab_size, dim, learn):
        if dim <= 24 and vocab_size != 2 ** dim:
            raise ValueError(f"lfq needs vocab_size = 2**latent_dim = {2 ** dim}")
        return cls(dim)

    @property
    def codebook(self):
        """All sign patterns, (V, C), in index order. Never needed; made only to be looked at."""
        return self.lookup(torch.arange(self.vocab_size, device=self.powers.device))

    def nearest(self, x):
        return ((x > 0).long() * self.powers).sum(-1)      # the sign pattern *is* the nearest code

    def lookup(self, idx):
        bit = (idx[..., None] & self.powers) > 0
        return torch.where(bit, self.size, -self.size)

    def extra_loss(self, x):
        """Entropy of each vector's bits (small: be certain) minus entropy of the average bits
        (large: use every code). Bits count as independent, so V = 2**24 costs 24 sums. The
        factor 4 lets a vector that equals its code count as certain (p = 0.02 or 0.98). -> ()"""
        p = torch.sigmoid(4 * x.reshape(-1, self.dim) / self.size)
        return self.entropy * (_bit_entropy(p).mean(0) - _bit_entropy(p.mean(0))).mean()


def _bit_entropy(p):
    p = p.clamp(1e-6, 1 - 1e-6)
    return -(p * p.log() + (1 - p) * (1 - p).log())


QUANTIZERS = {"vq": VectorQuantizer, "lfq": LookupFreeQuantizer}      # what --quantizer may name


# -- Residuals: several rounds of quantizing -------------------------------------------------------

def residual_quantize(x, quantizer, depth):
    """Quantize x, then what is left, `depth` times (RQ-VAE, eq. 3). quantizer: one for all rounds,
    or a list with one for each. x (..., C) -> (x_hat (..., C), [idx_1 .. idx_depth]).

    A sum of d codes can be up to V**d different points, while only d codebooks of V codes, or one,
    are stored and searched. This is the idea that chapter 2 spreads over scales."""
    quantizers = quantizer if isinstance(quantizer, list) else [quantizer] * depth
    # Exercise 01_4
    x_hat, indices = torch.zeros_like(x), []
    for one in quantizers[:depth]:
        indices.append(one.nearest(x - x_hat))
        x_hat = x_hat + one.lookup(indices[-1])
    return x_hat, indices


# -- Demo ------------------------------------------------------------------------------------------

def learn_codes(x, vocab_size, steps=150, starts=4):
    """A codebook for vectors x (N, C) alone: every update is one step of Lloyd's algorithm with a
    memory. Lloyd can get stuck, so the best of a few starts is kept. -> VectorQuantizer"""
    found = []
    for _ in range(starts):
        quantizer = VectorQuantizer(vocab_size, x.shape[1], decay=0.8)
        quantizer.start_on_data([x])
        for _ in range(steps):
            idx = quantizer.nearest(x)
            quantizer.observe([x], [idx])
            quantizer.update()
        found.append((float(F.mse_loss(quantizer.lookup(idx), x)), quantizer))
    return min(found, key=lambda pair: pair[0])[1]


def learn_vq_vae(patches, through, beta=0.25):
    """The smallest VQ-VAE: linear encoder, 64 codes of 4 numbers, linear decoder.
    patches (N, D) -> squared error"""
    encoder, decoder = nn.Linear(patches.shape[1], 4), nn.Linear(4, patches.shape[1])
    quantizer = VectorQuantizer(64, 4, decay=0.9)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], 3e-3)
    quantizer.start_on_data([encoder(patches)])
    for _ in range(300):
        x = encoder(patches)
        idx = quantizer.nearest(x.detach())
        code = quantizer.lookup(idx)
        error = F.mse_loss(decoder(through(x, code)), patches)
        optimizer.zero_grad()
        (error + beta * commitment_loss(x, code)).backward()
        optimizer.step()
        quantizer.observe([x], [idx])
        quantizer.update()
    return error.detach()


def show(text, error):
    print(f"  {text:<44}{error:8.4f}")
    return error


def compare_codebooks(photo):
    """photo (B, H, W, 3) in [0, 1] -> the same, quantized more and more finely, by row label"""
    rows, colours, books = {"original": photo}, photo.reshape(-1, 3)[::7], []
    for V in (2, 4, 16, 64):
        book = learn_codes(colours, V)
        rows[f"{V} colours"] = x_hat = book.lookup(book.nearest(photo))
        one = show(f"{V} codes, {math.log2(V):.0f} bits per pixel", 1000 * F.mse_loss(x_hat, photo))
    for depth in (1, 2, 3, 4):               # each round has codes of its own for what is left
        books.append(learn_codes(colours - residual_quantize(colours, books, depth)[0], 8))
        rows[f"{depth} x 8 codes"] = x_hat = residual_quantize(photo, books, depth)[0]
        text = f"{depth} x 8 codes, {3 * depth} bits per pixel"
        many = show(text, 1000 * F.mse_loss(x_hat, photo))
    assert many < one
    print("  (at equal bits one codebook is better; but for 12 bits it needs 4,096 codes, not 32)")
    return rows


def main():
    torch.manual_seed(0)
    x = torch.randn(20_000)
    print("8 levels for bell-shaped numbers          squared error")
    errors = []
    for name, centres in (("learned", lloyd_levels(x, 8)), ("equal mass", equal_mass_levels(x, 8)),
                          ("equal width", uniform_levels(x, 8))):
        count = torch.bincount(round_to(x, centres), minlength=8)
        name = f"{name}, {count.min():,} to {count.max():,} numbers a level"
        errors.append(show(name, (x - centres[round_to(x, centres)]).square().mean()))
    assert errors == sorted(errors)
    print("12 images, colours as vectors             squared error x 1000")
    photo = torch.from_numpy(shapes.draw(range(12), size=64)[0]).float() / 255     # (12, 64, 64, 3)
    rows = compare_codebooks(photo)
    print("VQ-VAE of 4x4 patches, 64 codes           squared error x 1000")
    patches = F.unfold(photo.permute(0, 3, 1, 2), 4, stride=4).transpose(1, 2).reshape(-1, 48)
    blind = show("encoder blind to the error", 1000 * learn_vq_vae(patches, lambda x, code: code))
    loose = show("straight through, without commitment",
                 1000 * learn_vq_vae(patches, straight_through, beta=0))
    both = show("straight through and commitment", 1000 * learn_vq_vae(patches, straight_through))
    assert both < loose < blind
    idx = LookupFreeQuantizer(8).nearest(torch.randn(9999, 8))
    print(f"signs of 8 channels: 256 codes for free, {len(idx.unique())} used by random vectors")
    plots.save_grid("out/01_vq.png", torch.cat(list(rows.values())).permute(0, 3, 1, 2), columns=12,
                    row_labels=list(rows))
    print("wrote out/01_vq.png")


if __name__ == "__main__":
    main()
