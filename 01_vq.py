"""Chapter 1: rounding, learned.

A quantizer replaces a number (or a vector) by the nearest entry of a short list and remembers only
the entry's index. Everything later in this book is rounding: of colours here, of whole feature maps
in chapter 2, and chapter 4 predicts the indices.

    scalar    -0.37 ------------------> bucket 3 of 8 ------> -0.375
    vector    (0.9, 0.1, 0.2) --------> code 17 of 64 ------> (0.8, 0.1, 0.3)
    residual  x = z[17] + rest,  rest = z[4] + smaller rest,  ...      log2(64) bits per level
    sign      (0.9, -0.1, 0.2) -------> + - +  = index 5 ---> (s, -s, s)       no codebook at all

Shapes: x (..., C) vectors to round, idx (...) int64, V codes, C channels, codebook (V, C).

Sources: VQ-VAE (van den Oord et al. 2017, eq. 3 and appendix A.1 for the EMA update), Lloyd 1982,
RQ-VAE (Lee et al. 2022, section 3.1), lookup-free quantization (Yu et al. 2024, section 3),
VAR (Tian et al. 2024, section 3.2).

Differs from the original VAR code: that code ships no training of the codebook. Here codes start
on data, follow it by moving averages, and a code that nobody uses moves to where it is needed.

    python 01_vq.py        a table of errors and out/01_vq.png
"""
import math

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from data import shapes
from report import plots


# -- Numbers: where to put the buckets ------------------------------------------------------------

def uniform_levels(x, levels):
    """Centres of `levels` equal-width buckets between min(x) and max(x). x (N,) -> (levels,)"""
    edges = torch.linspace(float(x.min()), float(x.max()), levels + 1)
    return (edges[:-1] + edges[1:]) / 2


def equal_mass_levels(x, levels):
    """Means of buckets that hold equally many of the numbers. x (N,) -> (levels,)"""
    return torch.stack([part.mean() for part in x.sort().values.tensor_split(levels)])


def lloyd_levels(x, levels, iterations=50):
    """Lloyd's algorithm: give every number to its nearest level, move each level to the mean of
    its numbers, repeat. Neither step can raise the squared error. x (N,) -> (levels,)"""
    centres = equal_mass_levels(x, levels)
    for _ in range(iterations):
        idx = round_to(x, centres)
        total = torch.zeros(levels).index_add_(0, idx, x)
        count = torch.bincount(idx, minlength=levels)
        centres = torch.where(count > 0, total / count.clamp(min=1), centres)
    return centres


def round_to(x, centres):
    """Index of the nearest centre. x (N,), centres (levels,) -> (N,)"""
    return (x[:, None] - centres).abs().argmin(dim=1)


# -- Vectors: a learned codebook -------------------------------------------------------------------

class VectorQuantizer(nn.Module):
    """Rounds vectors to the nearest (Euclidean) of V learned codes.

    vocab_size  V, the number of codes
    dim         C, the length of a vector
    beta        weight of the commitment loss (0.25 in VQ-VAE and VAR)
    learn       "ema": codes are running means of what was assigned to them, without gradients;
                "gradient": codes are parameters, pulled by the codebook loss
    decay       memory of the running means: 0.99 remembers about the last 100 steps
    revive      move codes that fell out of use onto vectors that are badly served
    """

    def __init__(self, vocab_size, dim, beta=0.25, learn="ema", decay=0.99, revive=True):
        super().__init__()
        if learn not in ("ema", "gradient"):
            raise ValueError(f"learn must be 'ema' or 'gradient', not {learn!r}")
        self.vocab_size, self.dim = vocab_size, dim
        self.beta, self.learn, self.decay, self.revive = beta, learn, decay, revive
        codebook = torch.randn(vocab_size, dim) / math.sqrt(dim)
        if learn == "gradient":
            self.codebook = nn.Parameter(codebook)
        else:
            self.register_buffer("codebook", codebook)
        self.register_buffer("hits", torch.ones(vocab_size))          # running mean of uses a step
        self.register_buffer("sums", codebook.detach().clone())       # running sum of the users
        self.register_buffer("initialised", torch.tensor(False))
        # Since the last update: uses of each code, and the sum of the vectors that used it.
        self.register_buffer("count", torch.zeros(vocab_size), persistent=False)
        self.register_buffer("total", torch.zeros(vocab_size, dim), persistent=False)
        # `initialised` as the CPU knows it, so that no step waits for a GPU's answer: codes lie on
        # data (started), and the step that put them there was accepted (settled).
        self.started = self.settled = False

    def nearest(self, x):
        """x (..., C) -> idx (...) int64: the code with the smallest squared distance."""
        flat = x.reshape(-1, self.dim)
        # |x - z|^2 = |x|^2 - 2 x.z + |z|^2; |x|^2 is the same for every code and can be left out.
        distance = torch.addmm(self.codebook.square().sum(1), flat, self.codebook.t(), alpha=-2)
        return distance.argmin(dim=1).view(x.shape[:-1])

    def lookup(self, idx):
        """idx (...) -> vectors (..., C)"""
        return F.embedding(idx, self.codebook)

    def forward(self, x):
        """x (..., C) -> (x_hat (..., C), idx (...), loss ()).

        x_hat carries a straight-through gradient: forwards the code, backwards as if x had passed
        unchanged. The loss (VQ-VAE, eq. 3) is taken *before* that line: afterwards x_hat no longer
        depends on the codebook, which would then never learn."""
        if self.training and not self.started:
            self.start_on_data([x])
        idx = self.nearest(x.detach())
        code = self.lookup(idx)
        loss = self.beta * F.mse_loss(x, code.detach())               # the encoder commits
        if self.learn == "gradient":
            loss = loss + F.mse_loss(code, x.detach())                # the codes follow
        if self.training:
            self.observe([x], [idx])
            self.update()
        return x + (code - x).detach(), idx, loss

    def extra_loss(self, x):
        """Nothing beyond the commitment: the codebook itself keeps the usage up."""
        return x.new_zeros(())

    @torch.no_grad()
    def start_on_data(self, groups):
        """First step only: put the codes on vectors of the first batch, an equal share from each
        group. groups: list of (..., C). A codebook far from the data never gets used at all."""
        self.started = True
        if bool(self.initialised):           # it comes from a checkpoint
            return
        self.codebook.copy_(self._draw(groups, self.vocab_size))
        self.hits.fill_(1.0)
        self.sums.copy_(self.codebook)

    @torch.no_grad()
    def observe(self, groups, indices):
        """Remember which vectors used which code, for the next update. groups: list of (..., C),
        indices: list of (...); in chapter 2 there is one group per scale."""
        x = torch.cat([g.reshape(-1, self.dim) for g in groups]).float()
        idx = torch.cat([i.reshape(-1) for i in indices])
        self.count.index_add_(0, idx, x.new_ones(len(idx)))
        self.total.index_add_(0, idx, x)
        if self.revive:
            self.fresh = self._draw(groups, self.vocab_size)

    @torch.no_grad()
    def update(self, accepted=True):
        """One learning step from all that was observed since the last one. A step that was refused
        because its loss or gradient is not finite (accepted: bool, or a tensor of one) leaves no
        trace. Moving averages as in VQ-VAE, appendix A.1:
        hits = decay hits + (1 - decay) count,  sums = decay sums + (1 - decay) total,
        code = sums / hits."""
        if dist.is_initialized():            # every process must see the statistics of all of them,
            dist.all_reduce(self.count)      # or their codebooks drift apart
            dist.all_reduce(self.total)
        good = self.total.isfinite().all() & accepted
        self.hits.lerp_(torch.where(good, self.count, self.hits), 1 - self.decay)
        self.sums.lerp_(torch.where(good, self.total, self.sums), 1 - self.decay)
        if self.learn == "ema":
            alive = good & (self.hits > 1e-3)          # 0 / 0 would turn an unused code into nan
            mean = self.sums / self.hits.clamp(min=1e-3)[:, None]
            self.codebook.copy_(torch.where(alive[:, None], mean, self.codebook))
        if self.revive:
            self._revive(good)
        self.count.zero_()
        self.total.zero_()
        self.initialised.logical_or_(good)
        if not self.settled:                 # if refused, the next step puts the codes on its data
            self.started = self.settled = bool(self.initialised)

    def _revive(self, good):
        """Codes used less than a tenth as often as the average (and less than once a step) jump
        onto vectors of this batch. Their statistics jump along: left stale, the next moving-average
        step would carry the code straight back to where nobody needs it."""
        dead = good & (self.hits < (0.1 * self.hits.mean()).clamp(max=1.0))
        self.codebook.copy_(torch.where(dead[:, None], self.fresh, self.codebook))
        self.sums.copy_(torch.where(dead[:, None], self.fresh, self.sums))
        self.hits.masked_fill_(dead, 1.0)

    def _draw(self, groups, n):
        """n vectors drawn from the groups, every group equally often however small it is: the
        coarse scales of chapter 2 have few vectors, and need codes all the same. -> (n, C)"""
        flat = [g.detach().reshape(-1, self.dim).float() for g in groups]
        weight = torch.cat([f.new_full((len(f),), 1 / len(f)) for f in flat])
        if n > len(weight):
            rows = torch.multinomial(weight, n, replacement=True)
        else:                                # as multinomial does it, which makes a GPU wait
            rows = (weight / torch.empty_like(weight).exponential_()).topk(n).indices
        drawn = torch.cat(flat)[rows]
        # Twice the same vector would be one code wasted; a nudge of 1 % lets the two part ways.
        drawn = drawn + 0.01 * drawn.square().mean().sqrt() * torch.randn_like(drawn)
        if dist.is_initialized():
            dist.broadcast(drawn, 0)
        return drawn


class LookupFreeQuantizer(nn.Module):
    """No codebook: every channel keeps only its sign, and the signs, read as bits, are the index.

    bits     C = bits channels and V = 2**bits codes; channel c is bit c, 1 where x is positive
    entropy  weight of the entropy term (Yu et al. 2024, eq. 5)
    Codes lie on the unit sphere (as in binary spherical quantization): entries +-1/sqrt(bits)."""

    def __init__(self, bits, beta=0.25, entropy=0.1):
        super().__init__()
        if not 1 <= bits <= 24:
            raise ValueError(f"bits must be between 1 and 24, not {bits}")
        self.dim, self.vocab_size = bits, 2 ** bits
        self.beta, self.entropy, self.size = beta, entropy, 1 / math.sqrt(bits)
        self.started = True                  # there is no codebook to be placed on data
        self.register_buffer("powers", 2 ** torch.arange(bits), persistent=False)

    @property
    def codebook(self):
        """All sign patterns, (V, C), in index order. Never needed; made only to be looked at."""
        return self.lookup(torch.arange(self.vocab_size, device=self.powers.device))

    def nearest(self, x):
        """x (..., C) -> idx (...) int64. The sign pattern *is* the nearest code."""
        return ((x > 0).long() * self.powers).sum(-1)

    def lookup(self, idx):
        """idx (...) -> vectors (..., C)"""
        bit = (idx[..., None] & self.powers) > 0
        return torch.where(bit, self.size, -self.size)

    def forward(self, x):
        """x (..., C) -> (x_hat (..., C), idx (...), loss ()), like VectorQuantizer."""
        idx = self.nearest(x.detach())
        code = self.lookup(idx)
        loss = self.beta * F.mse_loss(x, code) + self.extra_loss(x)
        return x + (code - x).detach(), idx, loss

    def extra_loss(self, x):
        """Entropy of one vector's bits (small: be certain) minus entropy of the average bits
        (large: use every code). Bits count as independent, so V = 2**24 costs 24 sums. -> ()"""
        p = torch.sigmoid(4 * x.reshape(-1, self.dim) / self.size)
        return self.entropy * (_bit_entropy(p).mean(0) - _bit_entropy(p.mean(0))).mean()

    def observe(self, groups, indices):
        """Nothing to learn from them."""

    def update(self, accepted=True):
        """Nothing to learn."""


def _bit_entropy(p):
    p = p.clamp(1e-6, 1 - 1e-6)
    return -(p * p.log() + (1 - p) * (1 - p).log())


def residual_quantize(x, quantizer, depth):
    """Round x, then round what is left, `depth` times with the same quantizer (RQ-VAE, eq. 3).
    x (..., C) -> (x_hat (..., C), [idx_1 .. idx_depth]). The sum of d codes can name V**d points
    at the price of d * log2(V) bits: this is the idea that chapter 2 spreads over scales."""
    x_hat, indices = torch.zeros_like(x), []
    for _ in range(depth):
        idx = quantizer.nearest(x - x_hat)
        x_hat = x_hat + quantizer.lookup(idx)
        indices.append(idx)
    return x_hat, indices


def usage(idx, vocab_size):
    """idx (...) -> (share of the codes that occur, perplexity). Perplexity exp(-sum p ln p) is the
    number of codes an even distribution of the same entropy would use: 1 (collapse) .. V."""
    p = torch.bincount(idx.reshape(-1), minlength=vocab_size).double()
    p = p / p.sum()
    perplexity = torch.exp(-(p * p.clamp(min=1e-12).log()).sum())
    return float((p > 0).double().mean()), float(perplexity)


# -- Demo ------------------------------------------------------------------------------------------

def learn_codes(x, vocab_size, depth=1, steps=150, starts=4):
    """Train a quantizer on vectors x (N, C) alone: each update is one step of Lloyd's algorithm
    with a memory. With depth > 1 the codes serve every residual level. The best start is kept."""
    found = []
    for _ in range(starts):
        quantizer = VectorQuantizer(vocab_size, x.shape[1], decay=0.8)
        quantizer.start_on_data([x * 0.5 ** level for level in range(depth)])
        for _ in range(steps):
            x_hat, groups, indices = torch.zeros_like(x), [], []
            for _ in range(depth):
                groups.append(x - x_hat)
                indices.append(quantizer.nearest(groups[-1]))
                x_hat = x_hat + quantizer.lookup(indices[-1])
            quantizer.observe(groups, indices)
            quantizer.update()
        found.append((float((x - x_hat).square().mean()), quantizer.eval()))
    return min(found, key=lambda pair: pair[0])[1]


def main():
    torch.manual_seed(0)
    x = torch.randn(20_000)
    print("8 levels for bell-shaped numbers          mean squared error")
    error = {}
    for name, place in (("equal width", uniform_levels), ("equal mass", equal_mass_levels),
                        ("learned", lloyd_levels)):
        centres = place(x, 8)
        error[name] = float((x - centres[round_to(x, centres)]).square().mean())
        print(f"  {name:<40}{error[name]:.4f}")
    assert error["learned"] < error["equal mass"] < error["equal width"]

    photo = torch.from_numpy(shapes.draw(range(12), size=64)[0]).float() / 255     # (12, 64, 64, 3)
    colours = photo.reshape(-1, 3)
    print("12 pictures, colours as vectors           mean squared error x 1000")
    rows = [photo]
    for vocab_size in (2, 4, 8, 16, 64):
        quantizer = learn_codes(colours[::7], vocab_size)
        rows.append(quantizer.lookup(quantizer.nearest(photo)))
        print(f"  {vocab_size:>3} codes,  {vocab_size.bit_length() - 1:>2} bits per pixel"
              f"{1000 * float((rows[-1] - photo).square().mean()):>21.3f}")
    quantizer, errors = learn_codes(colours[::7], 8, depth=4), []
    for depth in (2, 3, 4):
        x_hat, _ = residual_quantize(colours, quantizer, depth)
        errors.append(float((x_hat - colours).square().mean()))
        print(f"  {depth} levels of the same 8 codes, {3 * depth:>2} bits"
              f"{1000 * errors[-1]:>14.3f}")
    assert all(b < a for a, b in zip(errors, errors[1:])), "every level must shrink the error"
    print("  (levels save codes, not bits: a book of 8 ** 4 codes would round better)")
    sign = LookupFreeQuantizer(8)
    print(f"  signs of 8 channels: {sign.vocab_size} codes for free, "
          f"usage {usage(sign.nearest(torch.randn(9999, 8)), 256)[0]:.0%} on white noise")
    plots.save_grid("out/01_vq.png", torch.cat(rows).permute(0, 3, 1, 2), columns=12,
                       row_labels=["original"] + [f"{v} colours" for v in (2, 4, 8, 16, 64)])
    print("wrote out/01_vq.png")


if __name__ == "__main__":
    main()
