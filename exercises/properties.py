"""Properties: what must hold for every input. Hypothesis looks for one that breaks them.

    python exercises/properties.py 01       tries property_01 on 01_vq.py, once it is filled

A property is a function of a chapter (the module) that raises an AssertionError if the
chapter violates it. To pass, it must accept the reference solution and notice wrong ones.
"""
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings, strategies as st

ROOT = Path(__file__).resolve().parent.parent

sizes, seeds = st.integers(1, 5), st.integers(0, 10_000)
schedules = st.sets(st.integers(1, 6), min_size=1, max_size=4).map(
    lambda sides: tuple(sorted(sides)))


def check(test):
    """Decorator: try 100 examples, the same ones each time."""
    return seed(0)(settings(max_examples=100, deadline=None, database=None,
                            phases=(Phase.generate, Phase.shrink),
                            suppress_health_check=list(HealthCheck))(test))


def property_01(chapter):
    """residual_quantize returns one index per round, each nearest to what was left over,
    and the sum of their codes."""
    # Exercise 01_property
    @check
    @given(depth=sizes, vocab_size=sizes, dim=sizes, number=seeds)
    def holds(depth, vocab_size, dim, number):
        torch.manual_seed(number)
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


def small_tokenizer(chapter, scales, vocab_size=8, latent_dim=3, **changes):
    """A tokenizer of chapter 2 with random weights, in eval mode."""
    return chapter.MultiScaleVQVAE(chapter.TokenizerConfig(
        image_size=2 * scales[-1], scales=scales, vocab_size=vocab_size,
        latent_dim=latent_dim, channels=4, groups=2, unshuffle=2, **changes)).eval()


def property_02(chapter):
    """teacher_inputs gives all at once what next_input gives one scale at a time."""
    # Exercise 02_property
    @check
    @given(scales=schedules, number=seeds)
    def holds(scales, number):
        torch.manual_seed(number)
        tokenizer = small_tokenizer(chapter, scales)
        tokens = [torch.randint(8, (2, side * side)) for side in scales]
        f_hat, expected = 0, [torch.zeros(2, 0, 3)]
        for k, tokens_k in enumerate(tokens):
            f_hat, following = tokenizer.next_input(k, f_hat, tokens_k)
            if following is not None:
                expected.append(following)
        expected, inputs = torch.cat(expected, dim=1), tokenizer.teacher_inputs(tokens)
        assert inputs.shape == expected.shape
        assert torch.allclose(inputs, expected, atol=1e-5)

    holds()


def property_03(chapter):
    """A token moves the outputs of its own map and of all finer ones, and no others."""
    # Exercise 03_property
    def masked(q, k, v, scales):
        return chapter.attention(q, k, v, chapter.block_causal_mask(scales))

    @check
    @given(scales=st.lists(st.integers(1, 3), min_size=1, max_size=4), data=st.data())
    def holds(scales, data):
        torch.manual_seed(data.draw(seeds))
        scale = torch.cat([torch.full((n * n,), k) for k, n in enumerate(scales)])   # (L,)
        own = (scale == data.draw(st.sampled_from(range(len(scales))))).nonzero().flatten()
        token = own[data.draw(st.sampled_from([0, -1]))]       # the first or last of a map
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
    """Scale by scale with a cache gives what one pass with a mask gives."""
    # Exercise 04_property
    @check
    @given(scales=st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple),
           depth=st.integers(1, 2), number=seeds)
    def holds(scales, depth, number):
        torch.manual_seed(number)
        var = chapter.VAR(chapter.VARConfig(
            num_classes=5, scales=scales, vocab_size=7, latent_dim=3, depth=depth, width=8,
            heads=2)).eval()
        with torch.no_grad():
            for p in var.parameters():
                p.add_(0.3 * torch.randn_like(p))
            labels, shown = torch.randint(6, (2,)), torch.randn(2, var.L - var.first, 3)
            got, want = chapter.scale_by_scale(var, labels, shown), var(labels, shown)
            assert got.shape == want.shape
            assert torch.allclose(got, want, rtol=1e-3, atol=1e-3)

    holds()


def property_05(chapter):
    """Every epoch holds each image once, in an order of its own, and a step gives the same
    images whenever it is called."""
    # Exercise 05_property
    @check
    @given(n=st.integers(8, 20), batch=st.integers(1, 25), number=seeds)
    def holds(n, batch, number):
        steps = range(2 * n // batch + 1)    # two epochs, or a bit more
        batches = [chapter.batch_indices(step, n, batch, number) for step in steps]
        for step in reversed(steps):
            again = chapter.batch_indices(step, n, batch, number)
            assert np.array_equal(again, batches[step])
        first, second = np.concatenate(batches)[:2 * n].reshape(2, n)
        assert sorted(first) == sorted(second) == list(range(n))
        assert not np.array_equal(first, second) and not np.array_equal(first, range(n))

    holds()


def property_06(chapter):
    """keep_likely leaves the likeliest logits as they are, and no more than asked for."""
    # Exercise 06_property
    @check
    @given(row=st.lists(st.integers(-2, 2), min_size=1, max_size=6),
           top_k=st.integers(0, 5), top_p=st.sampled_from([0.0, 0.3, 0.5, 0.7, 0.9]))
    def holds(row, top_k, top_p):
        batch = torch.tensor([row, [3 - x for x in row]]).float()
        before = batch.clone()
        result = chapter.keep_likely(batch, top_k, top_p)
        assert torch.equal(batch, before) and result.shape == batch.shape
        for kept, logits in zip(result, batch):
            stays = kept > -torch.inf
            assert stays.any() and torch.equal(kept[stays], logits[stays])
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
    number = " ".join(sys.argv[1:])
    if f"property_{number}" not in globals():
        sys.exit("usage: python exercises/properties.py 01 (or 02 to 06)")
    sys.path.insert(0, str(ROOT))
    chapter = import_module(next(ROOT.glob(f"{number}_*.py")).stem)
    globals()[f"property_{number}"](chapter)
    print(f"property_{number} holds")


if __name__ == "__main__":
    main()
