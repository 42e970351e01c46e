"""Graders of chapter 5."""
import math
from importlib import import_module

import numpy as np
import torch
import torch.nn.functional as F

from exercises.compare import (Wrong, call, case, expect, expect_gradients, expect_like,
                               unpack)
from exercises.properties import small_tokenizer


class Model(torch.nn.Module):
    """Stands for the transformer: notes its inputs, returns the logits it was made with."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.calls = logits, []

    def forward(self, labels, teacher_inputs):
        self.calls.append((labels, teacher_inputs))
        return 1 * self.logits                             # under no_grad: cut off


def slow_losses(logits, tokens):
    """logits (B, L, V), tokens (B, L) -> nats (B, L), right (B, L)"""
    nats, right = torch.zeros(tokens.shape), torch.zeros(tokens.shape, dtype=torch.bool)
    for b, t in np.ndindex(*tokens.shape):
        row, code = logits[b, t].tolist(), int(tokens[b, t])
        most = max(row)
        nats[b, t] = most + math.log(sum(math.exp(x - most) for x in row)) - row[code]
        right[b, t] = row.index(most) == code              # of equal logits, the first
    return nats, right


def grade_05_1(chapter):
    for scales, dtype in (((1, 2, 3), torch.float32), ((2, 3), torch.bfloat16)):
        tokenizer = small_tokenizer(import_module("02_multiscale_vqvae"), scales)
        L = sum(side ** 2 for side in scales)
        tokens, labels = torch.randint(5, (2, L)), torch.tensor([7, 3])
        logits = 3 * torch.randn(2, L, 5)
        logits[0, :2] = torch.tensor([0., 200, 0, 0, 0])   # losses of 200 and 0
        logits[0, 2:4] = 1.0                               # ties
        tokens[0, :4] = torch.tensor([0, 1, 1, 0])
        logits = logits.to(dtype).requires_grad_()
        model = Model(logits)
        found = call(chapter.token_losses, model, tokenizer, tokens, labels)
        loss, right = unpack("token_losses", found, "the loss", "right")
        case(scales=scales, tokens=tokens, logits_dtype=dtype)
        expect("how often the model is called", len(model.calls), 1)
        expect("labels, the model's first argument", model.calls[0][0], labels)
        inputs, maps = model.calls[0][1], tokens.split([side ** 2 for side in scales], 1)
        expect("teacher inputs, the model's second argument", inputs,
               tokenizer.teacher_inputs(list(maps)))
        if inputs.requires_grad:
            raise Wrong("a gradient can reach the tokenizer, which is frozen: make the "
                        "inputs under torch.no_grad()")
        wanted, right_wanted = slow_losses(logits, tokens)
        nexts = slow_losses(logits, tokens.roll(-1, 1))[0]
        if torch.is_tensor(loss) and loss.shape == (2, L - 1):
            nexts = nexts[:, :-1]
        expect("the loss", loss, wanted, slips={
            "the targets are shifted by one, as in a language model; here output i "
            "predicts token i": nexts,
            "the softmax is taken twice": slow_losses(logits.softmax(-1), tokens)[0]})
        expect("right (is the token the argmax? of equal logits, the first counts)", right,
               right_wanted)
        want = F.cross_entropy(logits.float().transpose(1, 2), tokens, reduction="none")
        expect_gradients("loss", loss, want, 0.02, logits=logits)


def epochs_of(chapter, n, batch, seed):
    """Four epochs, taken from the batches laid end to end -> (4, n)"""
    stream = []
    for step in range(-(-4 * n // batch)):
        got = call(chapter.batch_indices, step, n, batch, seed)
        expect_like("batch_indices, as a tensor,", torch.from_numpy(got.copy()),
                    torch.arange(batch))
        stream.append(got.copy())
    case(n=n, batch=batch, seed=seed)
    return np.concatenate(stream)[:4 * n].reshape(4, n)


def grade_05_2(chapter):
    for n, batch in ((10, 5), (11, 4), (13, 1), (9, 30), (10, 10)):
        epochs = epochs_of(chapter, n, batch, seed=3)
        for number, epoch in enumerate(epochs):
            if sorted(epoch) != list(range(n)):
                raise Wrong(f"epoch {number} does not hold each of {n} images once: the "
                            f"batches, laid end to end, have {epoch.tolist()}")
        other = epochs_of(chapter, n, batch, seed=4)
        if len(set(map(tuple, [range(n), *epochs, *other]))) < 9:
            raise Wrong("each epoch of each seed needs a random order of its own: seed 3 "
                        f"has {epochs.tolist()}, seed 4 {other.tolist()}")
        for step in reversed(range(4 * n // batch)):       # as runs that resume there
            got = call(chapter.batch_indices, step, n, batch, 3)
            if (got != epochs.flatten()[step * batch:(step + 1) * batch]).any():
                raise Wrong("the same step gives other images when it is called again: "
                            "they may depend on step and seed, but not on earlier calls")


def grade_05_3(chapter):
    for factors in ((1.0, 1.0), (1e-3, 25.0), (1e-3, 0.02), (1.0, 1e-4), (1.0, 0.0)):
        for shape in ((2,), (3, 2, 1, 2)):
            check_weight(chapter.adaptive_weight, shape, *factors)


def check_weight(adaptive_weight, shape, size, factor):
    """Both losses also depend on another parameter, which must not matter, and are curved,
    so that their gradients have graphs of their own."""
    weight, another = (torch.randn(shape, requires_grad=True) for _ in range(2))
    weight.grad, another.grad = torch.ones(shape), torch.ones(shape)
    along, across = torch.randn(shape), torch.randn(shape)
    other = size * ((weight * along).sum().square() + (weight * another).square().sum())
    adversarial = factor * (weight.sin() * across * another).sum()
    long = 2 * size * ((weight * along).sum() * along + weight * another.square()).detach()
    short = (factor * weight.cos() * across * another).detach()
    lengths = [math.sqrt(sum(x * x for x in g.flatten().tolist())) for g in (long, short)]
    wanted = torch.tensor(min(lengths[0] / (lengths[1] + 1e-4), 1e4))
    got = call(adaptive_weight, other, adversarial, weight,
               gradient_of_other=long.flatten(), gradient_of_adversarial=short.flatten())
    for p in (weight, another):
        if p.grad is None or not p.grad.eq(1).all():
            raise Wrong("a .grad was changed: torch.autograd.grad leaves it alone")
    expect("adaptive_weight", got, wanted, 1e-4, slips={
        "the ratio is upside down": torch.tensor(lengths[1] / (lengths[0] + 1e-4))})
    if got.requires_grad:
        raise Wrong("the weight must be a constant, but a gradient can flow through it")
    try:
        (other + got * adversarial).backward()
    except RuntimeError:
        raise Wrong("after the call nothing can go backward through the losses: keep their "
                    "graphs with retain_graph=True") from None
