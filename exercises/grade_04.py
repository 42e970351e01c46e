"""Graders of chapter 4."""
import torch

from exercises.compare import Wrong, call, case, expect, random_var, unpack


@torch.no_grad()
def grade_04_1(chapter):
    # Two blocks of a transformer, each with its own cache, filled in turns, to the end.
    keys_and_values = torch.randn(2, 2, 2, 3, 30, 4).bfloat16()
    caches, begin = [chapter.KVCache(30) for _ in range(2)], 0
    for n in (4, 1, 9, 16):
        for cache, (k, v) in zip(caches, keys_and_values):
            end = begin + n
            want = k[:, :, :end], v[:, :, :end]
            got = call(cache.append, k[:, :, begin:end], v[:, :, begin:end], filled=begin)
            got = unpack("append", got, "keys", "values")
            expect("(keys, values) from append", got, want)
            expect("cache.filled", cache.filled, end)
            expect("cache.k.shape", tuple(cache.k.shape), (2, 3, 30, 4))
            expect("the memory, (cache.k, cache.v) up to here (write into it),",
                   (cache.k[:, :, :end], cache.v[:, :, :end]), want)
        begin = end
    for cache, new in ((caches[0], 1), (chapter.KVCache(1), 2)):
        case(length=cache.length, filled=cache.filled, new=new)
        try:
            cache.append(*[torch.ones(2, 3, new, 4)] * 2)
        except AssertionError:
            continue
        raise Wrong("a cache takes more than fits into it: raise an AssertionError instead")


class Branch(torch.nn.Module):
    """Stands for attention or the MLP: a linear map that remembers its inputs."""

    def __init__(self):
        super().__init__()
        self.matrix, self.calls = torch.randn(6, 6).double(), []

    def forward(self, x, mask=None, cache=None):
        self.calls.append((x, mask, cache))
        return x @ self.matrix


def block_by_hand(block, x, adaln, kept=1.0):
    """x (B, n, D), image by image -> (what attention sees, what the MLP sees, the result).
    kept: the factor of drop-path on both branches"""
    rows = []
    for image, (gate1, gate2, stretch1, stretch2, shift1, shift2) in zip(x, adaln[:, 0]):
        normed = torch.nn.functional.layer_norm(image, image.shape[-1:], eps=1e-6)
        first = normed + normed * stretch1 + shift1
        image = image + kept * (first @ block.attention.matrix) * gate1
        normed = torch.nn.functional.layer_norm(image, image.shape[-1:], eps=1e-6)
        second = normed + normed * stretch2 + shift2
        rows.append((first, second, image + kept * (second @ block.mlp.matrix) * gate2))
    return [torch.stack(parts) for parts in zip(*rows)]


def grade_04_2(chapter):
    x, adaln = torch.randn(2, 5, 6).double(), torch.randn(2, 1, 6, 6).double()
    mask, cache = object(), object()                       # anything will do
    for where, kept, zero in (
            ("with both gates 0", 1.0, [0, 1]),
            ("where drop_path drops everything", 0.0, []),
            ("where drop_path doubles everything", 2.0, []), ("", 1.0, [])):
        block = chapter.Block(chapter.VARConfig(depth=2, width=6, heads=3), drop_rate=0.5)
        block.attention, block.mlp, name = Branch(), Branch(), f"Block.forward {where}"
        block.drop_path = lambda h: h * kept
        table = adaln.clone()
        table[:, :, zero] = 0
        first, second, want = block_by_hand(block, x, table, kept)
        got = call(block.forward, x, table, mask, cache)
        case(x=x, adaln=adaln)
        for part, branch, seen, rest in (
                ("attention", block.attention, first, (mask, cache)),
                ("the MLP", block.mlp, second, (None, None))):
            expect(f"{name}: how often {part} runs", len(branch.calls), 1)
            expect(f"{name}: what {part} is given", branch.calls[0][0], seen)
            if branch.calls[0][1:] != rest:
                raise Wrong("attention is given mask and cache, the MLP only x")
        expect(name, got, want)


@torch.no_grad()
def grade_04_3(chapter):
    for scales, changes in (((1, 2), {}), ((1,), {}), ((1, 2, 3), {}), ((2, 1, 3), {}),
                            ((1, 2, 3), dict(shared_adaln=True, depth=3)),
                            ((1, 3, 2), dict(qk_norm=False, depth=1))):
        sizes = dict(num_classes=5, vocab_size=7, latent_dim=3, depth=2, width=12, heads=3)
        var = random_var(chapter, scales, **(sizes | changes)).double()
        labels = torch.tensor([4, 0, 5])
        shown = torch.randn(3, var.L - var.first, 3).double()
        want = var(labels, shown)
        conditioning, cache, begin = var.conditioning(labels), var.new_cache(), 0
        for k, side in enumerate(scales):
            end = begin + side ** 2
            inputs = shown[:, begin - var.first:end - var.first] if k else None
            got = call(var.step, k, inputs, conditioning, cache, scales=scales)
            case(k=k, scales=scales, positions=f"{begin}..{end - 1} of {var.L}")
            expect("the number of tokens in each block's cache (each block has its own)",
                   [block_cache.filled for block_cache in cache], [end] * len(cache))
            expect("step, compared with forward at its positions,", got, want[:, begin:end])
            begin = end
