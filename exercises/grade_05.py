"""Graders of chapter 5."""
import math
from importlib import import_module

import numpy as np
import torch

from exercises.compare import Wrong, call, case, expect, unpack
from exercises.grading import judge_property


# -- 05_1 ----------------------------------------------------------------------------------

class Model(torch.nn.Module):
    """Stands for the transformer: notes what it is given, returns the logits it was made with."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.calls = logits, []

    def forward(self, labels, teacher_inputs):
        self.calls.append((labels, teacher_inputs))
        return 1 * self.logits                             # under no_grad: cut off


def tiny_tokenizer(scales):
    vqvae = import_module("02_multiscale_vqvae")
    return vqvae.MultiScaleVQVAE(vqvae.TokenizerConfig(
        image_size=2 * scales[-1], scales=scales, vocab_size=5, latent_dim=4, channels=8,
        groups=4, unshuffle=2)).eval()


def slow_losses(logits, tokens):
    """logits (B, L, V), tokens (B, L) -> nats (B, L), right (B, L)"""
    nats, right = torch.zeros(tokens.shape), torch.zeros(tokens.shape, dtype=torch.bool)
    for b in range(tokens.shape[0]):
        for t in range(tokens.shape[1]):
            row, code = logits[b, t].tolist(), int(tokens[b, t])
            most = max(row)
            nats[b, t] = most + math.log(sum(math.exp(x - most) for x in row)) - row[code]
            right[b, t] = row.index(most) == code          # of equal logits, the first
    return nats, right


def grade_05_1(chapter):
    for scales, dtype in (((1, 2, 3), torch.float32), ((2, 3), torch.bfloat16)):
        tokenizer, L = tiny_tokenizer(scales), sum(side ** 2 for side in scales)
        tokens, labels = torch.randint(5, (2, L)), torch.tensor([7, 3])
        logits = 3 * torch.randn(2, L, 5)
        logits[0, :2] = torch.tensor([0., 200, 0, 0, 0])   # a loss of 200, and one of 0
        tokens[0, :2] = torch.tensor([0, 1])
        logits[0, 2:4], tokens[0, 2:4] = 1.0, torch.tensor([1, 0])
        logits = logits.to(dtype).requires_grad_()
        model = Model(logits)
        found = call(chapter.token_losses, model, tokenizer, tokens, labels, scales=scales)
        loss, right = unpack("token_losses", found, "the loss", "right")
        case(scales=scales, tokens=tokens, logits_dtype=dtype)
        expect("how often the model is called", len(model.calls), 1)
        shown_labels, inputs = model.calls[0]
        expect("labels, the model's first argument", shown_labels, labels)
        maps = list(tokens.split([side ** 2 for side in scales], 1))
        expect("teacher inputs, the model's second argument", inputs,
               tokenizer.teacher_inputs(maps))
        if inputs.requires_grad:
            raise Wrong("a gradient can reach the tokenizer, which is frozen: make the inputs "
                        "under torch.no_grad()")
        wanted, right_wanted = slow_losses(logits, tokens)
        nexts = slow_losses(logits, tokens.roll(-1, 1))[0]
        shift = "the targets are shifted by one, as in a language model; output i predicts " \
                "token i of its own map"
        if torch.is_tensor(loss) and loss.shape == (2, L - 1):
            expect("the loss", loss, wanted, slips={shift: nexts[:, :-1]})
        expect("the loss", loss, wanted, slips={
            shift: nexts, "it is the mean, not one loss per token": wanted.mean().expand(2, L),
            "the softmax is taken twice": slow_losses(logits.softmax(-1), tokens)[0]})
        expect("right (the token is the argmax; of equal logits, the first)", right, right_wanted)
        if not loss.requires_grad:
            raise Wrong("no gradient reaches the model: the loss was cut off from the logits")
        loss.sum().backward()
        wanted = logits.detach().float().softmax(-1) - torch.nn.functional.one_hot(tokens, 5)
        expect("the gradient of loss.sum() at the logits", logits.grad.float(), wanted, 0.02)


# -- 05_2 ----------------------------------------------------------------------------------

def epochs_of(chapter, n, batch, seed, count=4):
    """The first `count` epochs, taken from the batches laid end to end -> (count, n)"""
    stream = []
    for step in range(-(-count * n // batch)):
        case(step=step, n=n, batch=batch, seed=seed)
        got = chapter.batch_indices(step, n, batch, seed)
        if not isinstance(got, np.ndarray) or got.shape != (batch,) or got.dtype != np.int64:
            what = f"{got.dtype} of shape {got.shape}" if hasattr(got, "shape") else got
            raise Wrong(f"batch_indices is {what}, expected a NumPy array of {batch} int64")
        stream.append(got.copy())
    case(n=n, batch=batch, seed=seed)
    return np.concatenate(stream)[:count * n].reshape(count, n)


def grade_05_2(chapter):
    for n, batch in ((10, 5), (11, 4), (13, 1), (9, 30), (10, 10)):
        np.random.seed(1)
        torch.manual_seed(1)
        before = np.random.get_state()[2], torch.random.get_rng_state()
        epochs = epochs_of(chapter, n, batch, seed=3)
        if before[0] != np.random.get_state()[2] or (
                not torch.equal(before[1], torch.random.get_rng_state())):
            raise Wrong("batch_indices moves the global random state, which others use, too")
        for number, epoch in enumerate(epochs):
            if sorted(epoch.tolist()) != list(range(n)):
                raise Wrong(f"epoch {number}, {epoch.tolist()} when the batches are laid end to "
                            f"end, does not hold each of the {n} images once")
            if epoch.tolist() == list(range(n)):
                raise Wrong(f"epoch {number} is not shuffled: {epoch.tolist()}")
        if any((epochs[i] == epochs[j]).all() for i in range(4) for j in range(i)):
            raise Wrong(f"two epochs have the same order, {epochs[0].tolist()}")
        if (epochs_of(chapter, n, batch, seed=4)[0] == epochs[0]).all():
            raise Wrong(f"seeds 3 and 4 give the same first epoch, {epochs[0].tolist()}")
        # A run that resumes in the middle, in another process.
        np.random.seed(2)
        torch.manual_seed(2)
        for step in reversed(range(4 * n // batch)):
            got = call(chapter.batch_indices, step, n, batch, 3)
            if (got != np.resize(epochs, 4 * n)[step * batch:(step + 1) * batch]).any():
                raise Wrong("the same step gives other images when it is called again: the "
                            "answer may depend on step and seed, not on earlier calls")


def grade_05_property(chapter):
    judge_property(chapter.property_05, "05_2")


# -- 05_3 ----------------------------------------------------------------------------------

def grade_05_3(chapter):
    for shape in ((2,), (3, 2, 1, 2)):
        for factor in (1.0, 25.0, 0.02, 1e-4, 0.0):
            check_weight(chapter.adaptive_weight, shape, factor)


def check_weight(adaptive_weight, shape, factor):
    """Both losses also depend on another parameter, which must not matter, and are curved, so
    that their gradients have a graph of their own."""
    weight, another = (torch.randn(shape, requires_grad=True) for _ in range(2))
    weight.grad, another.grad = torch.ones(shape), torch.ones(shape)
    along, across = torch.randn(shape), torch.randn(shape)
    other = (weight * along).sum().square() + (weight * another).square().sum()
    adversarial = factor * (weight.sin() * across * another).sum()
    long = (2 * (weight * along).sum() * along + 2 * weight * another.square()).detach()
    short = (factor * weight.cos() * across * another).detach()
    lengths = [math.sqrt(sum(x * x for x in g.flatten().tolist())) for g in (long, short)]
    wanted = torch.tensor(min(lengths[0] / (lengths[1] + 1e-4), 1e4))
    got = call(adaptive_weight, other, adversarial, weight, gradient_of_other=long.flatten(),
               gradient_of_adversarial=short.flatten())
    for p in (weight, another):
        if p.grad is None or not p.grad.eq(1).all():
            raise Wrong("a .grad was changed: use torch.autograd.grad, which only returns "
                        "gradients")
    expect("adaptive_weight", got, wanted, 1e-4, slips={
        "the ratio is upside down": torch.tensor(lengths[1] / (lengths[0] + 1e-4))})
    if got.requires_grad:
        raise Wrong("the weight must be a constant, but a gradient can flow through it")
    weight.grad = None
    try:
        (other + got * adversarial).backward()
    except RuntimeError:
        raise Wrong("after the call nothing can go backward through the losses: keep their "
                    "graphs with retain_graph=True") from None
    expect("the gradient of other + weight * adversarial, after the call", weight.grad,
           long + wanted * short, 1e-3)
