"""Order, tokens or independence: what decides how good samples are?

    python experiments/order.py                                        shapes
    python experiments/order.py --dataset cifar10 --data-dir DIR       three classes
    python experiments/order.py --dataset shapes64 --steps 1300        a grid of 16x16

Raster order and next scale differ in the number of tokens, in what they say, in their order
and in whether those of one step are drawn independently. ROWS differ in one of these at a
time. Where tokens come one by one or in halves, an input also holds the code of a token of
the step before. All rows take equal arithmetic (tokens times steps), except "equal images".
Images held back from training choose each row's learning rate and sampling.
"""
import math
import time
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from trial import BASES, Trial, drawing, run_main, transformer, trial_parser
from report import judge, plots


class Reordered(torch.nn.Module):
    """Makes a tokenizer look as if its tokens came in other steps, for chapters 4 to 6.
    steps: lists of positions among the L tokens of all maps; by_map: whether a map begins
    only when the coarser ones are complete, so that f_hat can be an input."""

    def __init__(self, tokenizer, steps, by_map):
        super().__init__()
        self.tokenizer, self.decode, self.by_map = tokenizer, tokenizer.decode, by_map
        self.sizes, self.K = [len(step) for step in steps], len(steps)
        # A buffer, so that the cached tokens of one order are not taken for another's.
        self.register_buffer("order", torch.tensor(sum(steps, [])))          # (L,)
        self.scales = (1,) * len(self.order)              # for chapter 5: maps of one token
        self.config = SimpleNamespace(**vars(tokenizer.config) | dict(
            scales=self.scales, latent_dim=2 * tokenizer.config.latent_dim))
        map_of = transformer.masking.scale_of_token(tokenizer.scales)[self.order]
        self.previous, last, done = [], [], 0              # -1: at the start of a map
        for size in self.sizes:
            if by_map and done and map_of[done] != map_of[done - 1]:
                last = []
            self.previous += [last[i % len(last)] if last else -1 for i in range(size)]
            last = list(range(done, done + size))
            done += size

    def image_to_tokens(self, image):                      # -> K steps (B, n)
        tokens = torch.cat(self.tokenizer.image_to_tokens(image), 1)         # (B, L)
        return list(tokens[:, self.order].split(self.sizes, 1))

    def maps(self, tokens):
        """The first tokens in this order (B, n) -> all maps, 0 where a token is missing"""
        flat = tokens.new_zeros(len(tokens), len(self.order))                # (B, L)
        flat[:, self.order[:tokens.shape[1]]] = tokens
        return list(flat.split([side * side for side in self.tokenizer.scales], 1))

    def features(self, tokens):
        return self.tokenizer.features(self.maps(torch.cat(tokens, 1)))

    def inputs(self, tokens, begin, end):
        """The first tokens (B, n) -> inputs of tokens begin..end (B, end - begin, 2C)"""
        codes = self.tokenizer.quantizer.lookup(tokens)                      # (B, n, C)
        codes = F.pad(codes, (0, 0, 0, 1))[:, self.previous[begin:end]]
        f_hats = torch.zeros_like(codes)
        if self.by_map:
            later = self.tokenizer.teacher_inputs(self.maps(tokens))         # (B, L - 1, C)
            f_hats = F.pad(later, (0, 0, 1, 0))[:, self.order[begin:end]]
        return torch.cat([f_hats, codes], 2)

    def teacher_inputs(self, tokens):                      # -> (B, L - 1, 2C)
        return self.inputs(torch.cat(tokens, 1), 1, len(self.order))

    def next_input(self, k, tokens, tokens_k):
        """In place of f_hat, chapter 6 keeps the tokens drawn so far (B, n), 0 at first."""
        tokens = torch.cat([tokens, tokens_k], 1) if k else tokens_k
        if k + 1 == self.K:
            return tokens, None
        begin = tokens.shape[1]
        return tokens, self.inputs(tokens, begin, begin + self.sizes[k + 1])


class StepwiseVAR(transformer.VAR):
    """Chapter 4's transformer for steps of any sizes."""

    def __init__(self, config, sizes):
        super().__init__(config)
        self.ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
        step = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        self.mask = step[:, None] >= step[None, :]                           # (L, L)

    def step(self, k, inputs, conditioning, cache):
        begin, end = self.ends[k], self.ends[k + 1]
        x = conditioning.row + self.start if k == 0 else self.word_embed(inputs)
        x = x + self.scale_embed.weight[begin:end] + self.position[:, begin:end]
        for block, adaln, block_cache in zip(self.blocks, conditioning.blocks, cache):
            x = block(x, adaln, cache=block_cache)
        return self.predict(x, conditioning)


def one_by_one(scales):
    return [[i] for i in range(sum(side * side for side in scales))]


def coarse_to_fine(scales):
    """Cells on a grid of step 8, then of 4, 2 and 1."""
    side, cells = scales[0], []
    for stride in (8, 4, 2, 1):
        cells += [row * side + column for row in range(0, side, stride)
                  for column in range(0, side, stride)]
    return [[cell] for cell in dict.fromkeys(cells)]


def halves(scales):
    """On each map the black squares of a chessboard in one step, then the white ones."""
    steps, begin = [], 0
    for side in scales:
        for colour in (1, 0) if side > 1 else (0,):        # a 1x1 map has no black square
            steps.append([begin + i for i in range(side * side)
                          if (i // side + i % side) % 2 == colour])
        begin += side * side
    return steps


def cell_by_cell(scales):
    return [[i + half] for i in range(scales[0] ** 2) for half in (0, scales[0] ** 2)]


# Row -> sides of the maps, V, the steps (None: by map), whether maps come one by one
SIX = (1, 2, 3, 4, 6, 8)
ROWS = {
    "A  8x8, raster": ((8,), 512, one_by_one, False),
    "B  8x8, coarse to fine": ((8,), 512, coarse_to_fine, False),
    "I  8x8, all at once": ((8,), 512, None, True),
    "C  four maps, by map": ((1, 2, 4, 8), 512, None, True),
    "H  the same, V = 128": ((1, 2, 4, 8), 128, None, True),
    "D  six maps, by map": (SIX, 512, None, True),
    "G  six maps, in halves": (SIX, 512, halves, True),
    "E  six maps, one by one": (SIX, 512, one_by_one, True),
    "F  8x8 twice, raster": ((8, 8), 512, cell_by_cell, False),
    "A, equal images": ((8,), 512, one_by_one, False),
    "C, equal images": ((1, 2, 4, 8), 512, None, True),
    "J  16x16, raster": ((16,), 512, one_by_one, False),
    "K  five maps, by map": ((1, 2, 4, 8, 16), 512, None, True),
}
BASES["shapes64"] = dict(image_size=64)                    # the last map is 16x16
RATES = (1.5e-3, 3e-3, 6e-3)
SAMPLING = {f"cfg {t:g}, top-p {p:g}": (t, p)
            for t in (0, 0.75, 1.5, 3) for p in (1, 0.9, 0.8)}


def generate(tokenizer, var, labels, seed, how):
    """Samples of the classes in labels (n,), with constant guidance -> batches in [0, 1]"""
    t, p = SAMPLING[how]
    generator = torch.Generator().manual_seed(seed)
    return [drawing.generate(tokenizer, var, part, cfg=[t] * tokenizer.K, top_p=p % 1,
                             generator=generator) for part in labels.split(100)]


def choose_rate(trial, row, tokenizer, held_back, **how):
    """-> the learning rate after which images held back take the fewest bits"""
    def bits(rate):
        var = trial.train(f"{row}, {rate}", 0, tokenizer, lr=rate, **how)
        return dict(bits=sum(trial.bits(tokenizer, var, held_back)))
    found = {rate: trial.measure(f"{row}, {rate}/held back", 0, partial(bits, rate))["bits"]
             for rate in RATES}
    return min(found, key=found.get)


def choose_sampling(trial, row, tokenizer, var, held_back):
    """-> the name in SAMPLING whose samples are nearest to images held back"""
    def distances():
        images, labels = held_back
        network, _ = trial.judge()
        real, _ = judge.extract(network, judge.batches_of(images, range(len(images))))
        found = {}
        for how in SAMPLING:
            samples = generate(tokenizer, var, torch.from_numpy(labels), 1000, how)
            found[how] = judge.frechet_distance(real, judge.extract(network, samples)[0])
        return found
    found = trial.measure(f"{row}/sampling", 0, distances)
    return min(found, key=found.get)


def numbers(trial, tokenizer, trained, var, seed, how):
    network, _ = trial.judge()
    labels = torch.arange(trial.args.n) % len(trial.names)
    plain = generate(tokenizer, var, labels, seed, "cfg 0, top-p 1")
    best = generate(tokenizer, var, labels, seed, how)
    rebuilt, _ = judge.extract(network, judge.rebuilt(trained, *trial.some("train")))
    found = dict(trial.compare(best, labels), plain=trial.compare(plain)["frechet"])
    found["second"] = trial.compare(best, augment=False)["frechet"]
    found["to_rebuilt"] = judge.frechet_distance(rebuilt, judge.extract(network, best)[0])
    found["per_step"] = trial.bits(tokenizer, var)
    found["bits"] = sum(found["per_step"])
    times = []
    for _ in range(5):
        begin = time.process_time()
        generate(tokenizer, var, labels[:1], seed, how)
        times.append(1000 * (time.process_time() - begin))
    return dict(found, alone=sorted(times)[2])             # the median


def main():
    parser = trial_parser(__doc__, "shapes", steps=500, tokenizer_steps=600, n=2000,
                          seeds=3)
    parser.add_argument("--rows", nargs="+", choices=ROWS, help="[all of this grid]")
    trial, rows, images = Trial("order", parser.parse_args()), {}, {}
    last = trial.settings.image_size // trial.settings.unshuffle       # side of the last map
    grid = [row for row, (scales, *_) in ROWS.items() if scales[-1] == last]
    if not {*(trial.args.rows or grid)} <= {*grid}:
        parser.error(f"--rows: with {trial.args.dataset}, use {'; '.join(grid)}")
    if trial.args.quick:
        grid = grid[::3]
    pictures, labels = trial.data["train"]
    count = min(600, len(labels) // 3)
    held_back = pictures[-count:], labels[-count:]
    trial.data["train"] = pictures[:-count], labels[:-count]
    for row in trial.args.rows or grid:
        scales, V, order, by_map = ROWS[row]
        L, name, rows[row] = sum(side * side for side in scales), f"{scales}, {V}", []
        steps = trial.args.steps * 130 // (130 if "equal images" in row else L)
        for seed in trial.seeds:
            trained = trial.train_tokenizer(name, seed, scales=scales, vocab_size=V)
            tokenizer, how = trained, dict(steps=steps)
            if order is not None:
                tokenizer = Reordered(trained, order(scales), by_map)
                how["model"] = partial(StepwiseVAR, sizes=tokenizer.sizes)
            if seed == 0:
                rate = choose_rate(trial, row, tokenizer, held_back, **how)
            var = trial.train(f"{row}, {rate}", seed, tokenizer, lr=rate, **how)
            if seed == 0:
                best = choose_sampling(trial, row, tokenizer, var, held_back)
                classes = torch.arange(10) % len(trial.names)
                images[row] = torch.cat(generate(tokenizer, var, classes, 0, best))
            found = trial.measure(row, seed, lambda: numbers(
                trial, tokenizer, trained, var, seed, best))
            psnr = trial.reconstructed(name, trained, seed)["psnr"]
            rows[row].append(dict(found, tokens=L, steps=tokenizer.K, rate=rate, how=best,
                                  possible=L * math.log2(V), psnr=psnr))
    dots = {row: [(one["bits"], one["frechet"]) for one in found]
            for row, found in rows.items() if "all at once" not in row}
    plots.save_curve(trial.folder / "bits.png", dots, {row: dots[row][:1] for row in dots},
                     x_label="bits per image", y_label="Fréchet distance, one dot per seed")
    rows["held-out images"] = [trial.floor()]
    trial.show("", {
        "tokens": ("tokens", 0), "steps": ("steps", 0), "learning rate": ("rate", 4),
        "best sampling": ("how", None), "bits possible": ("possible", 0),
        "PSNR, dB": ("psnr", 1), "bits": ("bits", 0), "Fréchet, cfg 0": ("plain", 2),
        "Fréchet, best": ("frechet", 2), "second judge": ("second", 2),
        "to reconstructions": ("to_rebuilt", 2), "precision": ("precision", 2),
        "recall": ("recall", 2), "CPU ms alone": ("alone", 0)}, rows)
    trial.draw(images, footer="Each row with its best learning rate and sampling.")


if __name__ == "__main__":
    run_main(main)
