"""Properties: what must hold for every input. Hypothesis looks for an input that breaks them.

    python exercises/properties.py 01       tries property_01 on 01_vq.py

A property is a function of a chapter (the module). It raises an AssertionError if the chapter
violates it. It is graded by accepting the reference solution and noticing the wrong ones.
"""
import sys
from importlib import import_module
from pathlib import Path

import torch
from hypothesis import Phase, given, settings, strategies as st

ROOT = Path(__file__).resolve().parent.parent

sizes, seeds = st.integers(1, 5), st.integers(0, 10_000)
# No deadline, as the first call takes longer; no explaining, as that takes seconds.
check = settings(max_examples=50, deadline=None, derandomize=True, database=None,
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


def main(number):
    sys.path.insert(0, str(ROOT))
    chapter = import_module(next(ROOT.glob(f"{number}_*.py")).stem)
    globals()[f"property_{number}"](chapter)
    print(f"property_{number} holds")


if __name__ == "__main__":
    main(sys.argv[1])
