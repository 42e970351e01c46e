"""Graders of chapter 5."""
import math
from contextlib import contextmanager
from importlib import import_module
from types import SimpleNamespace

import torch

from exercises.grading import Wrong, describe, expect, judge_property
from exercises.properties import RATE, small_stage

m2 = import_module("02_multiscale_vqvae")


# -- 05_1 ------------------------------------------------------------------------------------------

def tiny_tokenizer(scales=(1, 2, 3), V=5, phis=2):
    torch.manual_seed(1)
    return m2.MultiScaleVQVAE(m2.TokenizerConfig(
        image_size=2 * scales[-1], scales=scales, vocab_size=V, latent_dim=4, channels=8, groups=4,
        unshuffle=2, phis=phis)).eval()


class Model:
    """Stands for the transformer: notes what it is shown, returns the logits it was made with."""

    def __init__(self, logits):
        self.logits, self.calls, self.in_autocast, self.now = logits, [], [], False

    def __call__(self, labels, teacher_inputs):
        self.calls.append((labels, teacher_inputs))
        self.in_autocast.append(self.now)
        return 1 * self.logits                             # under no_grad: cut off

    @contextmanager
    def autocast(self):
        self.now = True
        yield
        self.now = False


def a_stage(chapter, tokenizer, model, unwrapped=None):
    """A TransformerStage of which only what per_token needs is there."""
    stage = object.__new__(chapter.TransformerStage)
    stage.tokenizer, stage.sizes = tokenizer, [side ** 2 for side in tokenizer.scales]
    stage.autocast, stage.model = model.autocast, unwrapped
    return stage


def test_05_1(chapter):
    tokenizer = tiny_tokenizer()
    B, L, V = 2, 14, 5
    tokens, labels = torch.randint(V, (B, L)), torch.tensor([7, 3])
    for dtype in (torch.float32, torch.bfloat16):
        logits = (3 * torch.randn(B, L, V)).to(dtype)
        model, unwrapped = Model(logits.requires_grad_()), Model(torch.randn(B, L, V))
        stage = a_stage(chapter, tokenizer, model, unwrapped)
        found = stage.per_token(model, tokens.clone(), labels.clone())
        check_calls(model, unwrapped, tokenizer, tokens, labels, stage.sizes)

        slow, right = torch.zeros(B, L), torch.zeros(B, L, dtype=torch.bool)
        for b in range(B):
            for t in range(L):
                row, code = logits[b, t].tolist(), int(tokens[b, t])
                slow[b, t] = math.log(sum(math.exp(x) for x in row)) - row[code]
                right[b, t] = row.index(max(row)) == code
        if not isinstance(found, (tuple, list)) or len(found) != 2:
            raise Wrong(f"per_token returns two tensors, loss and right, not {describe(found)}")
        how = f" (logits in {dtype})"
        expect("loss" + how, found[0], slow)
        expect("right" + how, found[1], right)
        check_gradient(found[0], logits, tokens)


def check_calls(model, unwrapped, tokenizer, tokens, labels, sizes):
    if unwrapped.calls:
        raise Wrong("self.model was called: call `model`, which wraps it on several GPUs")
    if not model.calls:
        raise Wrong("the model that is handed in was never called")
    given_labels, inputs = model.calls[-1]
    expect("labels, the model's first argument", given_labels, labels)
    with torch.no_grad():
        shown = tokenizer.teacher_inputs(list(tokens.split(sizes, 1)))
    expect("teacher inputs, the model's second argument", inputs, shown)
    if not all(model.in_autocast):
        raise Wrong("the model must be called inside `with self.autocast():`")


def check_gradient(loss, logits, tokens):
    if not loss.requires_grad:
        raise Wrong("no gradient reaches the model: the loss was cut off from the logits")
    loss.sum().backward()
    wanted = logits.detach().float().softmax(-1)
    wanted = wanted - torch.nn.functional.one_hot(tokens, logits.shape[-1])
    expect("gradient of the summed loss for the logits", logits.grad.float(), wanted, 0.02)


# -- 05_2 ------------------------------------------------------------------------------------------

def squared_error(model, part):
    """part: (inputs,), to be reproduced, or (inputs, targets)"""
    return (model(part[0]) - part[-1]).square().mean()


def step_in_parts(chapter, layer, batch, parts):
    """chapter.train_step on a layer. -> its result, and notes of each call of stage.loss: the part,
    the model, the `now` of sync_gradients (None: outside); and how many parts had been computed
    whenever a loss went backward"""
    model = torch.nn.Sequential(layer)                     # as DDP wraps a model
    notes = SimpleNamespace(parts=[], wrapped=[], now=[], sent=[], current=None)

    def loss(given_model, part, progress):
        value = squared_error(given_model, part) * (1 + progress)
        notes.parts.append(part)
        notes.wrapped.append(given_model is model)
        notes.now.append(notes.current)
        value.register_hook(lambda gradient: notes.sent.append(len(notes.parts)))
        return value, f"metrics {len(notes.parts)}"

    @contextmanager
    def sync_gradients(given_model, now):
        notes.current = bool(now)
        yield
        notes.current = None

    chapter.sync_gradients = sync_gradients
    return chapter.train_step(small_stage(layer, loss, parts), model, batch, 0.5), notes


def test_05_2(chapter):
    for tensors, parts, rows in ((2, 1, 3), (2, 3, 2), (1, 5, 3)):
        batch = (torch.randn(parts * rows, 3), torch.randn(parts * rows, 3))[:tensors]
        layer, how = torch.nn.Linear(3, 3), f"in {parts} part(s)"
        whole = 1.5 * squared_error(layer, batch)
        gradient, = torch.autograd.grad(whole, layer.weight)
        wanted = layer.weight.detach() - RATE * gradient
        result, notes = step_in_parts(chapter, layer, batch, parts)
        check_parts(notes, batch, parts, rows)
        expect(f"weights after a step {how}", layer.weight.detach(), wanted)
        expect(f"the loss of a step {how}", result.loss, whole.detach())
        expect("metrics", result.metrics, [f"metrics {i + 1}" for i in range(parts)])
        check_order(notes, parts, result.loss)


def check_parts(notes, batch, parts, rows):
    """Every row in one part, all parts of one size; in which order does not matter."""
    expect("the number of parts given to stage.loss", len(notes.parts), parts)
    for part in notes.parts:
        if not isinstance(part, (tuple, list)) or len(part) != len(batch):
            raise Wrong(f"a part must be a tuple of {len(batch)} tensor(s), like the batch")
        for tensor in part:
            expect("the shape of a tensor of a part", tuple(tensor.shape), (rows, 3))
    for i, tensor in enumerate(batch):
        seen = torch.cat([part[i] for part in notes.parts])
        if sorted(seen.tolist()) != sorted(tensor.tolist()):
            raise Wrong(f"the parts do not hold every row of batch[{i}] once")


def check_order(notes, parts, loss):
    """What one process cannot see in the weights: memory, and what GPUs exchange."""
    if loss.requires_grad or notes.sent != list(range(1, parts + 1)):
        raise Wrong("the graphs of several parts are in memory at once, which the parts were meant "
                    "to avoid: send each loss backward before the next part, and detach `loss`")
    if not all(notes.wrapped):
        raise Wrong("stage.loss must be given `model`, which wraps stage.model on several GPUs")
    once = [False] * (parts - 1) + [True]
    if notes.now != once:
        raise Wrong(f"stage.loss was called with sync_gradients' now = {notes.now}, expected "
                    f"{once} (None: outside)")


def test_05_property(chapter):
    # One process, two tensors, and nothing but weights and loss: some mistakes cannot be seen.
    judge_property(chapter.property_05, "05_2", unseen=(
        "keeps the graphs of all parts", "goes backward once, at the end", "calls stage.model",
        "exchanges gradients after each part", "expects two tensors", "forgets the loss scale",
        "cuts into parts of `accumulate` rows", "gives the whole batch to every part"))


# -- 05_3 ------------------------------------------------------------------------------------------

def test_05_3(chapter):
    for shape in ((2,), (3, 2, 1, 2)):
        for factor in (1.0, 25.0, 0.02, 1e-4, 0.0):
            check_weight(chapter.adaptive_weight, shape, factor)


def check_weight(adaptive_weight, shape, factor):
    """Both losses also depend on another parameter, which must not count, and curve, so that their
    gradients have a graph of their own."""
    weight, another = (torch.randn(shape, requires_grad=True) for _ in range(2))
    along, across = torch.randn(shape), torch.randn(shape)
    other = (weight * along).sum().square() + (weight * another).square().sum()
    adversarial = factor * (weight.sin() * across * another).sum()
    long = 2 * (weight * along).sum() * along + 2 * weight * another.square()
    short = factor * weight.cos() * across * another
    wanted = torch.tensor(min(norm(long) / (norm(short) + 1e-4), 1e4))
    got = adaptive_weight(other, adversarial, weight)
    expect("adaptive_weight", got, wanted, 1e-4, gradient_of_other=long.detach().flatten(),
           gradient_of_adversarial=short.detach().flatten())
    if got.requires_grad:
        raise Wrong("the weight must be a constant, but a gradient can flow through it")
    if weight.grad is not None or another.grad is not None:
        raise Wrong("a .grad was changed: use torch.autograd.grad, which only returns gradients")
    try:
        (other + got * adversarial).backward()
    except RuntimeError as error:
        raise Wrong("after the call nothing can go backward through the losses: keep their graphs "
                    f"with retain_graph ({str(error).split('.')[0]})") from None
    expect("gradient of other + weight * adversarial, after the call", weight.grad,
           (long + wanted * short).detach(), 1e-3)


def norm(gradient):
    return math.sqrt(sum(x * x for x in gradient.flatten().tolist()))
