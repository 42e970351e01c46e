"""Properties: what must hold for every input. Hypothesis looks for an input that breaks them.

    python exercises/properties.py 01       tries property_01 on 01_vq.py, once that is filled

A property is a function of a chapter (the module). It raises an AssertionError if the chapter
violates it. It is graded by accepting the reference solution and noticing the wrong ones.
"""
import argparse
import math
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import torch
from hypothesis import Phase, given, settings, strategies as st

ROOT = Path(__file__).resolve().parent.parent

sizes, seeds = st.integers(1, 5), st.integers(0, 10_000)
schedules = st.sets(st.integers(1, 6), min_size=1, max_size=4).map(lambda s: tuple(sorted(s)))
# No deadline, as the first call takes longer; no explaining, as that takes seconds.
check = settings(max_examples=30, deadline=None, derandomize=True, database=None,
                 phases=(Phase.explicit, Phase.generate, Phase.shrink))


def property_01(chapter):
    """What residual_quantize returns: an index for each round, each nearest to what was left, and
    the sum of their codes."""
    # Exercise 01_property
    @check
    @given(depth=sizes, vocab_size=sizes, dim=sizes, seed=seeds)
    def holds(depth, vocab_size, dim, seed):
        torch.manual_seed(seed)
        quantizers = [chapter.VectorQuantizer(vocab_size, dim) for _ in range(depth)]
        x = torch.randn(2, 3, dim)
        before = x.clone()
        x_hat, indices = chapter.residual_quantize(x, quantizers, depth)
        assert torch.equal(x, before) and len(indices) == depth
        so_far = torch.zeros_like(x)
        for quantizer, idx in zip(quantizers, indices):
            assert torch.equal(idx, quantizer.nearest(x - so_far))
            so_far = so_far + quantizer.lookup(idx)
        assert torch.allclose(x_hat, so_far, atol=1e-6)

    holds()


def small_tokenizer(chapter, scales):
    """A tokenizer of chapter 2 with random weights, 8 codes and 3 channels."""
    return chapter.MultiScaleVQVAE(chapter.TokenizerConfig(
        image_size=2 * scales[-1], scales=scales, vocab_size=8, latent_dim=3, channels=4, groups=2,
        unshuffle=2)).requires_grad_(False)


def property_02(chapter):
    """teacher_inputs shows all at once what next_input shows one scale at a time."""
    # Exercise 02_property
    @check
    @given(scales=schedules, seed=seeds)
    def holds(scales, seed):
        torch.manual_seed(seed)
        tokenizer = small_tokenizer(chapter, scales)
        tokens = [torch.randint(8, (2, side * side)) for side in scales]
        f_hat, shown = 0, []
        for k, tokens_k in enumerate(tokens):
            f_hat, following = tokenizer.next_input(k, f_hat, tokens_k)
            shown.append(following)
        inputs = tokenizer.teacher_inputs(tokens)
        assert inputs.shape == (2, sum(side * side for side in scales[1:]), 3)
        assert torch.allclose(inputs, torch.cat([inputs[:, :0], *shown[:-1]], dim=1), atol=1e-5)

    holds()


def property_03(chapter):
    """One token speaks to its own scale and to all finer ones, and to nobody else."""
    # Exercise 03_property
    def masked(q, k, v, scales):
        return chapter.attention(q, k, v, chapter.block_causal_mask(scales))

    # Side 10 fills a group of its own. Lists with a group before it or after it are rare.
    @settings(check, max_examples=100)
    @given(scales=st.lists(st.sampled_from([1, 2, 3, 10]), min_size=1, max_size=4), data=st.data())
    def holds(scales, data):
        torch.manual_seed(data.draw(seeds))
        scale = torch.tensor([k for k, side in enumerate(scales) for _ in range(side * side)])
        own = (scale == data.draw(st.sampled_from(range(len(scales))))).nonzero().flatten()
        token = own[data.draw(st.sampled_from([0, -1]))]       # the first or last of a scale
        q, k, v = torch.randn(3, 2, 2, len(scale), 4)
        new_k, new_v = k.clone(), v.clone()
        new_k[:, :, token] += 1
        new_v[:, :, token] += 10
        for attend in (masked, chapter.block_causal_attention):
            moved = attend(q, new_k, new_v, scales) - attend(q, k, v, scales)
            moved = moved.abs().amax((0, 1, 3))                                      # (L,)
            assert torch.equal(moved > 0, scale >= scale[token])

    holds()


def property_04(chapter):
    """With a cache, scale by scale, as with a mask, all at once."""
    # Exercise 04_property
    @check
    @given(scales=st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple),
           depth=st.integers(1, 2), seed=seeds)
    def holds(scales, depth, seed):
        torch.manual_seed(seed)
        var = chapter.VAR(chapter.VARConfig(num_classes=5, scales=scales, vocab_size=7,
                                            latent_dim=3, depth=depth, width=8, heads=2)).eval()
        with torch.no_grad():
            for p in var.parameters():
                p.add_(0.3 * torch.randn_like(p))
            labels, shown = torch.randint(6, (2,)), torch.randn(2, var.L - var.first, 3)
            want = var(labels, shown)
            conditioning, cache, begin = var.conditioning(labels), var.new_cache(), 0
            for k, side in enumerate(scales):
                end = begin + side * side
                inputs = shown[:, begin - var.first:end - var.first] if k else None
                got = var.step(k, inputs, conditioning, cache)
                assert got.shape == (2, end - begin, 7)
                assert torch.allclose(got, want[:, begin:end], rtol=1e-3, atol=1e-3)
                begin = end

    holds()


RATE = 0.1


class PlainDescent:
    """An optimizer whose step is as long as the gradient: AdamW would hide a wrong factor."""

    def __init__(self, layer):
        self.layer = layer

    @torch.no_grad()
    def step(self):
        for p in self.layer.parameters():
            if p.grad is not None:
                p -= RATE * p.grad

    def zero_grad(self, set_to_none):
        self.layer.zero_grad(set_to_none)


def small_stage(layer, loss, parts):
    """What chapter 5's train_step needs of a stage; losses are scaled as in float16."""
    from engine.loss_scale import LossScale                # main() lets it be found
    return SimpleNamespace(
        settings=SimpleNamespace(accumulate=parts, clip=math.inf), model=layer, loss=loss,
        modules={"model": layer}, optimizers=[PlainDescent(layer)], loss_scale=LossScale("float16"),
        processes=SimpleNamespace(any=torch.clone), step_without_gradients=lambda accepted: None)


def one_step(chapter, inputs, targets, parts):
    """A step on the squared error of a linear layer, always the same one. inputs (B, 3), targets
    (B, 2) -> (its weights after the step (2, 3), the loss () that the step reports)"""
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)

    def loss(model, part, progress):
        return torch.nn.functional.mse_loss(model(part[0]), part[1]), None

    stage = small_stage(layer, loss, parts)
    result = chapter.train_step(stage, layer, (inputs, targets), 0.0)
    return layer.weight.detach(), result.loss.detach()


def property_05(chapter):
    """A step in parts is the step on the whole batch."""
    # Exercise 05_property
    @check
    @given(rows=sizes, parts=sizes, seed=seeds)
    def holds(rows, parts, seed):
        generator = torch.Generator().manual_seed(seed)
        inputs, targets = (torch.randn(rows * parts, n, generator=generator) for n in (3, 2))
        for at_once, in_parts in zip(one_step(chapter, inputs, targets, 1),
                                     one_step(chapter, inputs, targets, parts)):
            assert torch.allclose(at_once, in_parts, atol=1e-5)

    holds()


def property_06(chapter):
    """keep_likely leaves the likeliest logits as they are, and no more of them than asked for."""
    # Exercise 06_property
    @settings(check, max_examples=200)
    @given(row=st.lists(st.integers(-2, 2), min_size=1, max_size=6), top_k=st.integers(0, 5),
           top_p=st.sampled_from([0.0, 1e-9, 0.3, 0.5, 0.7, 0.9]))
    def holds(row, top_k, top_p):
        batch = torch.tensor([row, [3 - x for x in row]]).float()
        before = batch.clone()
        result = chapter.keep_likely(batch, top_k, top_p)
        assert torch.equal(batch, before) and result.shape == batch.shape
        for kept, logits in zip(result, batch):
            stays = kept > -torch.inf
            assert stays.any() and torch.equal(kept[stays], logits[stays])
            assert not kept.isnan().any()
            assert stays.all() or logits[stays].min() >= logits[~stays].max()
            candidates = logits.sort(descending=True).values[:top_k or len(row)]
            count = int(stays.sum())
            assert count <= len(candidates)
            if top_p == 0:
                assert count == len(candidates)
            else:
                p = candidates.softmax(0)[:count]
                assert p.sum() > top_p - 1e-5 and p[:-1].sum() < top_p + 1e-5

    holds()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("number", choices=[f"0{i}" for i in range(1, 7)], help="of the chapter")
    number = parser.parse_args().number
    sys.path.insert(0, str(ROOT))
    chapter = import_module(next(ROOT.glob(f"{number}_*.py")).stem)
    try:
        globals()[f"property_{number}"](chapter)
    except NotImplementedError as error:     # its first word is the task whose blank was met
        sys.exit(f"fill {str(error).split()[0]} first" if str(error) else "NotImplementedError")
    print(f"property_{number} holds")


if __name__ == "__main__":
    main()
