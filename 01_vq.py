"""Chapter 1: rounding, learned.

A transformer ends in a softmax over a finite list of symbols, so an image must first become
symbols. Quantizing replaces each number (or vector) with the nearest entry of a short list
and keeps only its index. The entry is close and a decoder is smooth, so the image changes
little. But rounding is not smooth: a small change of a vector changes nothing, or jumps to
another entry. (`# Exercise`: see exercises/.)

    scalar    -0.37 ----------------> level 2 of 0..7 ----> -0.375
    vector    (0.9, 0.1, 0.2) ------> code 17 of 64 ------> (0.8, 0.1, 0.3)
    residual  x = z[17] + rest,  rest = z[4] + smaller rest, ...    log2(64) bits per round
    signs     (0.9, -0.1, 0.2) -----> + - +  = index 5 ---> (0.58, -0.58, 0.58), no codebook

Shapes: x (..., C) vectors, idx (...) int64 indices, codebook z (V, C): V codes, C channels.

Sources: VQ-VAE (van den Oord et al. 2017), RQ-VAE (Lee et al. 2022), lookup-free
quantization (Yu et al. 2024). Differs from the original VAR code, where gradients move the
codes: here they start on data, follow it as running means, and move elsewhere if unused.

    python 01_vq.py        a table of errors and out/01_vq.png, in seconds
"""
import math

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F


# -- Numbers: where to put the levels ------------------------------------------------------

def uniform_levels(x, levels):
    """Centres of equally wide buckets between min(x) and max(x). x (N,) -> (levels,)"""
    edges = torch.linspace(float(x.min()), float(x.max()), levels + 1)
    return (edges[:-1] + edges[1:]) / 2


def equal_mass_levels(x, levels):
    """Means of buckets that hold equally many numbers each. x (N,) -> (levels,)"""
    return torch.stack([part.mean() for part in x.sort().values.tensor_split(levels)])


def lloyd_levels(x, levels, iterations=50):
    """Lloyd's algorithm: assign every number to its nearest level, move each level to the
    mean of its numbers, repeat. No step raises the squared error. Equal mass, the start,
    uses all levels alike, but numbers in the tails are few and far apart, so a level there
    should serve fewer of them. x (N,) -> (levels,)"""
    centres = equal_mass_levels(x, levels)
    # Exercise 01_1
    for _ in range(iterations):
        idx = round_to(x, centres)                                  # (N,)
        total = torch.zeros(levels).index_add_(0, idx, x)           # (levels,)
        count = torch.bincount(idx, minlength=levels)
        centres = torch.where(count > 0, total / count.clamp(min=1), centres)
    return centres


def round_to(x, centres):
    """Index of the nearest centre. x (N,), centres (levels,) -> (N,)"""
    return (x[:, None] - centres).abs().argmin(dim=1)


# -- Learning through a quantizer ----------------------------------------------------------
#
# A VQ-VAE trains its encoder, decoder and codes with one loss (eq. 3; sg: stop gradient),
#
#     L = |image - decoded|^2  +  |sg(x) - code|^2  +  beta |x - sg(code)|^2
#         reconstruction          codebook loss        commitment loss
#
# where x = encoder(image) and decoded = decoder(straight_through(x, code)). The second term
# is not needed if codes are running means of their vectors (EMA, below).

def straight_through(x, code):
    """The code in the forward pass; in the backward pass the gradient goes to x as if x had
    not been quantized, because the gradient of rounding is zero almost everywhere. This is
    a heuristic: nothing justifies it except that it works. -> x_hat (..., C)"""
    # Exercise 01_2
    return x + (code - x).detach()


def commitment_loss(x, code):
    """Keeps x close to its code. Without it x moves faster than the codes can follow, and the
    decoder sees something far from x. -> (), a scalar"""
    # Exercise 01_2
    return F.mse_loss(x, code.detach())


def codebook_loss(x, code):
    """Moves the code towards x. It needs the code itself: no gradient reaches the code through
    the output of straight_through(). -> ()"""
    # Exercise 01_2
    return F.mse_loss(code, x.detach())


# -- Vectors: a learned codebook -----------------------------------------------------------

class VectorQuantizer(nn.Module):
    """Rounds a vector to the nearest (Euclidean distance) of V learned codes of length C.

    learn   "ema": a code is the running mean of the vectors that use it, without gradients;
            "gradient": codes are parameters, moved by the codebook loss
    decay   memory of the running means: 0.99 averages over about the last 100 steps
    revive  whether codes that fell out of use move onto vectors of the current batch"""

    def __init__(self, vocab_size, dim, learn="ema", decay=0.99, revive=True):
        super().__init__()
        self.vocab_size, self.dim = vocab_size, dim
        self.ema, self.decay, self.revive = learn == "ema", decay, revive
        codebook = torch.randn(vocab_size, dim) / math.sqrt(dim)    # of norm about 1
        self.codebook = nn.Buffer(codebook) if self.ema else nn.Parameter(codebook)
        # Running means per step: how often each code is used, and the sum of its vectors.
        self.hits = nn.Buffer(torch.ones(vocab_size))               # (V,)
        self.sums = nn.Buffer(codebook.clone())                     # (V, C)
        self.initialised = nn.Buffer(torch.tensor(False))           # do codes lie on data?

    @torch.no_grad()
    def nearest(self, x):
        # |x - z|^2 = |x|^2 - 2 x.z + |z|^2, and |x|^2 is the same for every code z.
        flat, squares = x.reshape(-1, self.dim), self.codebook.square().sum(1)
        distance = torch.addmm(squares, flat, self.codebook.T, alpha=-2)     # (N, V)
        return distance.argmin(dim=1).view(x.shape[:-1])                     # (...)

    def lookup(self, idx):
        return F.embedding(idx, self.codebook)                               # (..., C)

    def extra_loss(self, x):
        return x.new_zeros(())               # only lookup-free quantization needs one

    @torch.no_grad()
    def start_on_data(self, groups):
        """Place the codes on vectors of the first batch, because a code far from all data
        would never be used; codes from a checkpoint stay. groups: a list of vectors (..., C),
        one entry per scale in chapter 2, a single one here. Each group serves about equally
        many codes: coarse scales have few vectors but need codes, too."""
        flat = [g.reshape(-1, self.dim) for g in groups]                     # (n, C) each
        weight = [f.new_full((len(f),), 1 / len(f)) for f in flat]
        drawn = self.draw_vectors(torch.cat(flat), torch.cat(weight), self.vocab_size)
        if not self.initialised and drawn.isfinite().all():
            self.codebook.copy_(drawn)
            self.sums.copy_(drawn)
            self.initialised.fill_(True)

    @torch.no_grad()
    def learn(self, groups, indices):
        """Learn from a batch: vectors, list of (..., C), and indices, list of (...)."""
        x = torch.cat([g.reshape(-1, self.dim) for g in groups]).float()     # (N, C)
        idx = torch.cat([i.reshape(-1) for i in indices])                    # (N,)
        count = torch.bincount(idx, minlength=self.vocab_size).float()       # (V,)
        total = torch.zeros_like(self.sums).index_add_(0, idx, x)            # (V, C)
        if dist.is_initialized():            # each process sees a part of the batch
            dist.all_reduce(count)
            dist.all_reduce(total)
        if not total.isfinite().all():
            return                           # a non-finite batch changes nothing
        self.move_codes(count, total)
        # Codes used less than a tenth as often as the average, and not once per step, move
        # onto vectors with a large error. Their statistics move along: stale ones would carry
        # a code straight back. Starting at the average use gives it time to find vectors.
        mean = self.hits.mean()
        dead = self.hits < (0.1 * mean).clamp(max=1.0)                       # (V,)
        if self.revive and dead.any():
            error = (x - self.lookup(idx)).square().sum(1)                   # (N,)
            fresh = self.draw_vectors(x, error.clamp(1e-12, 1e12), int(dead.sum()))
            self.codebook[dead] = fresh                                      # (dead, C)
            self.hits[dead] = mean
            self.sums[dead] = mean * fresh

    def move_codes(self, count, total):
        """The EMA update (VQ-VAE, appendix A.1), with d = decay:
        hits = d hits + (1 - d) count,  sums = d sums + (1 - d) total,  code = sums / hits.
        count (V,): how many vectors chose each code; total (V, C): their sum"""
        # Exercise 01_3
        self.hits.lerp_(count, 1 - self.decay)
        self.sums.lerp_(total, 1 - self.decay)
        if self.ema:
            used = self.hits > 1e-3          # a code without vectors has no mean: 0 / 0
            self.codebook[used] = self.sums[used] / self.hits[used, None]

    def draw_vectors(self, x, weight, count):
        """Some of the vectors x (N, C), each drawn with a probability that is proportional to
        its weight (N,). -> (count, C), the same in all processes"""
        rows = torch.multinomial(weight, count, replacement=len(x) < count)
        drawn = x[rows].float()                                              # (count, C)
        # The same vector twice would waste a code: noise of 1 % lets the two move apart.
        drawn = drawn + 0.01 * drawn.square().mean().sqrt() * torch.randn_like(drawn)
        if dist.is_initialized():
            dist.broadcast(drawn, 0)         # otherwise the codebooks would drift apart
        return drawn


# -- Residuals: several rounds of quantizing -----------------------------------------------

def residual_quantize(x, quantizer, depth):
    """Quantize x, then what is left, `depth` times (RQ-VAE, eq. 3), with one quantizer or a
    list of one per round. d rounds reach up to V**d points but search only d V codes.
    Chapter 2 has a round per scale. x (..., C) -> (x_hat (..., C), [idx_1 .. idx_depth])"""
    quantizers = quantizer if isinstance(quantizer, list) else [quantizer] * depth
    # Exercise 01_4
    x_hat, indices = torch.zeros_like(x), []
    for one in quantizers[:depth]:
        indices.append(one.nearest(x - x_hat))                      # (...)
        x_hat = x_hat + one.lookup(indices[-1])                     # (..., C)
    return x_hat, indices


# -- Signs: a codebook for free ------------------------------------------------------------

class LookupFreeQuantizer(nn.Module):
    """Keeps the sign of each of C = bits channels: V = 2**bits codes of norm 1. Bit c of
    an index is 1 where channel c is positive. entropy: weight of the extra loss (0.1 in the
    paper, but that costs 2 dB here)"""
    initialised = True                       # there is nothing to place on data

    def __init__(self, bits, entropy=0.01):
        super().__init__()
        self.dim, self.vocab_size = bits, 2 ** bits
        self.entropy, self.size = entropy, 1 / math.sqrt(bits)
        self.powers = nn.Buffer(2 ** torch.arange(bits), persistent=False)

    @property
    def codebook(self):                      # (V, C), for inspection only
        return self.lookup(torch.arange(self.vocab_size, device=self.powers.device))

    def nearest(self, x):                    # the sign pattern *is* the nearest code
        return ((x > 0).long() * self.powers).sum(-1)                        # (...)

    def lookup(self, idx):
        return torch.where((idx[..., None] & self.powers) > 0, self.size, -self.size)

    def learn(self, groups, indices):
        """The codes never move."""

    def extra_loss(self, x):
        """Entropy of each vector's codes (small: be certain) minus the entropy of the mean
        over all vectors (large: use every code), in nats: Yu et al. 2024, equation 5. Single
        bits would not do: if only 000 and 111 occur, every bit is used half of the time. With
        more than 2**12 codes, groups of eight bits count as codes. x (..., C) -> ()"""
        def entropy(p):                      # (..., codes) -> (...)
            return -(p * p.clamp(min=1e-12).log()).sum(-1)
        p = torch.sigmoid(4 * x.reshape(-1, self.dim) / self.size)  # (N, C); 0.98 at a code
        loss = 0
        for bits in p.split(self.dim if self.dim <= 12 else 8, dim=1):
            codes = p.new_ones(len(p), 1)
            for bit in bits.split(1, dim=1):                                 # (N, 1)
                codes = torch.cat([codes * (1 - bit), codes * bit], 1)
            loss = loss + entropy(codes).mean() - entropy(codes.mean(0))
        return self.entropy * loss


# Names for --quantizer. A new one is a class with what LookupFreeQuantizer has.
QUANTIZERS = {"vq": VectorQuantizer, "lfq": lambda V, dim, learn: LookupFreeQuantizer(dim)}


# -- Demo ----------------------------------------------------------------------------------

def show(text, error):
    print(f"  {text:<46}{error:8.4f}")
    return error


def show_levels(name, centres, x):
    idx = round_to(x, centres)
    count = torch.bincount(idx)
    text = f"{name}, {count.min():,} to {count.max():,} numbers per level"
    return show(text, F.mse_loss(centres[idx], x))


def learn_codes(x, vocab_size):
    """Codes for vectors x (N, C): each update is a step of Lloyd's algorithm with memory."""
    quantizer = VectorQuantizer(vocab_size, x.shape[1], decay=0.8)
    quantizer.start_on_data([x.unique(dim=0)])
    for _ in range(150):
        quantizer.learn([x], [quantizer.nearest(x)])
    return quantizer


def learn_vq_vae(patches, through, beta=0.25):
    """The smallest VQ-VAE. patches (N, D); through(x, code) is decoded -> 1000 x error"""
    torch.manual_seed(0)                     # all start alike
    encoder, decoder = nn.Linear(patches.shape[1], 4), nn.Linear(4, patches.shape[1])
    quantizer = VectorQuantizer(64, 4, decay=0.9)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], 3e-3)
    quantizer.start_on_data([encoder(patches)])
    for _ in range(300):
        x = encoder(patches)                                        # (N, 4)
        idx = quantizer.nearest(x)                                  # (N,)
        code = quantizer.lookup(idx)                                # (N, 4)
        error = F.mse_loss(decoder(through(x, code)), patches)
        optimizer.zero_grad()
        (error + beta * commitment_loss(x, code)).backward()
        optimizer.step()
        quantizer.learn([x], [idx])          # EMA, in place of the codebook loss
    return 1000 * error.detach()


def compare_codebooks(photo):
    """photo (B, H, W, 3) in [0, 1] -> {label: the same, quantized}, ever more finely"""
    rows, colours, books = {}, photo.reshape(-1, 3)[::7], []
    for V in (4, 16, 64):
        book = learn_codes(colours, V)
        rows[f"{V} codes, {math.log2(V):.0f} bits"] = book.lookup(book.nearest(photo))
    for depth in (1, 2, 3, 4):               # each round has its own codes for what is left
        left = colours - residual_quantize(colours, books, depth - 1)[0]
        books.append(learn_codes(left, 8))
        rows[f"{depth} x 8 codes, {3 * depth} bits"] = residual_quantize(photo, books, depth)[0]
    return rows


def main():
    from data import shapes
    from report import plots
    torch.manual_seed(0)
    print("8 levels for normally distributed numbers       squared error")
    x = torch.randn(20_000)
    learned = show_levels("learned", lloyd_levels(x, 8), x)
    equal_mass = show_levels("equal mass", equal_mass_levels(x, 8), x)
    assert learned < equal_mass < show_levels("equal width", uniform_levels(x, 8), x)
    print("12 images, colours as vectors, bits per pixel   squared error x 1000")
    photo = torch.from_numpy(shapes.draw(range(12), size=64)[0]) / 255     # (12, 64, 64, 3)
    rows = compare_codebooks(photo)
    errors = [show(label, 1000 * F.mse_loss(x_hat, photo)) for label, x_hat in rows.items()]
    assert errors[-1] < errors[2], "four rounds with 8 codes each beat 64 codes"
    print("VQ-VAE of 4x4 patches, 64 codes                 squared error x 1000")
    patches = photo.reshape(12, 16, 4, 16, 4, 3).transpose(2, 3).reshape(-1, 48)
    blind = show("without straight-through", learn_vq_vae(patches, lambda x, code: code))
    loose = show("without commitment", learn_vq_vae(patches, straight_through, beta=0))
    both = show("with both", learn_vq_vae(patches, straight_through))
    assert both < loose < blind
    rows = {"original": photo} | rows                      # (12, 64, 64, 3) each
    plots.save_grid("out/01_vq.png", {text: x.movedim(3, 1) for text, x in rows.items()})


if __name__ == "__main__":
    main()
