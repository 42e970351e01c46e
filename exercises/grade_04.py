"""Graders of chapter 4."""
import torch

from exercises.compare import Wrong, call, case, expect, gradients, unpack
from exercises.grading import judge_property


# -- The cache -----------------------------------------------------------------------------

@torch.no_grad()
def grade_04_1(chapter):
    # Two tokens, then one: small numbers to read. 1 image, 1 head, d = 1.
    k, v = (torch.tensor(x).view(1, 1, 3, 1) for x in ([10., 11, 12], [20., 21, 22]))
    cache = chapter.KVCache(5)
    for begin, end in ((0, 2), (2, 3)):
        got = call(cache.append, k[:, :, begin:end], v[:, :, begin:end], tokens_before=begin)
        got = unpack("append", got, "keys", "values")
        expect("append's keys", got[0], k[:, :, :end])
        expect("append's values", got[1], v[:, :, :end])

    # Two blocks of a transformer, each with a cache of its own, filled in turns, to the end.
    # The tensors returned are kept: no new one may lie in the memory of an old one.
    keys_and_values = torch.randn(2, 2, 2, 3, 30, 4).bfloat16()
    caches, begin, kept = [chapter.KVCache(30) for _ in range(2)], 0, []
    for n in (4, 1, 9, 16):
        for cache, (k, v) in zip(caches, keys_and_values):
            new = k[:, :, begin:begin + n], v[:, :, begin:begin + n]
            got = list(call(cache.append, *new, tokens_before=begin))
            expect("append", got, [k[:, :, :begin + n], v[:, :, :begin + n]])
            kept.append((got, [x.clone() for x in got]))
            expect("cache.filled", cache.filled, begin + n)
            expect("the memory of the cache, cache.k and cache.v (write into it)",
                   [cache.k[:, :, :begin + n], cache.v[:, :, :begin + n]], got)
            expect("cache.k.shape", tuple(cache.k.shape), (2, 3, 30, 4))
        begin += n
    for got, before in kept:
        expect("what an earlier append returned", got, before, 0)
    case(length=30, filled=30, new=1)
    try:
        caches[0].append(*[torch.ones(2, 3, 1, 4).bfloat16()] * 2)
    except Exception:
        return
    raise Wrong("a full cache takes one more token: raise an AssertionError instead")


# -- The block -----------------------------------------------------------------------------

class Branch(torch.nn.Module):
    """Stands for attention or the MLP: a linear map that remembers what it was given."""

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
    def new_block():
        block = chapter.Block(chapter.VARConfig(depth=2, width=6, heads=3), drop_rate=0.5)
        block.attention, block.mlp = Branch(), Branch()
        return block.double().eval()

    x, adaln = torch.randn(2, 5, 6).double(), torch.randn(2, 1, 6, 6).double()
    mask, cache = object(), object()                     # only passed on, so anything will do
    for where, kept, zero in (
            ("with all gates 0", 1.0, [0, 1]), ("with the MLP's gate 0", 1.0, [1]),
            ("with attention's gate 0", 1.0, [0]),
            ("with stretch and shift 0", 1.0, [2, 3, 4, 5]), ("", 1.0, []),
            ("where drop_path drops everything", 0.0, []),
            ("where drop_path doubles everything", 2.0, [])):
        block, table = new_block(), adaln.clone()
        if kept != 1:
            block.drop_path = lambda h: h * kept
        table[:, :, zero] = 0
        first, second, want = block_by_hand(block, x, table, kept)
        got = call(block.forward, x, table, mask, cache)
        case(x=x.shape, adaln=adaln.shape)
        name = f"Block.forward {where}".rstrip()
        for part, branch, seen, rest in (
                ("attention", block.attention, first, (mask, cache)),
                ("the MLP", block.mlp, second, (None, None))):
            expect(f"{name}: how often {part} runs", len(branch.calls), 1)
            expect(f"{name}: what {part} is given", branch.calls[0][0], seen)
            if branch.calls[0][1:] != rest:
                raise Wrong(f"{name}: attention takes the mask and the cache, the MLP only x")
        expect(name, got, want)

    block, grads = new_block(), []
    for function in (block, lambda *given: block_by_hand(block, *given)[2]):
        given = [tensor.clone().requires_grad_() for tensor in (x, adaln)]
        grads.append(gradients("Block.forward", function(*given) ** 2, *given))
    for name, got, want in zip(("x", "adaln"), *grads):
        expect(f"the gradient of Block.forward.square().sum() at {name}", got, want)

    # In training, drop-path leaves out a branch of an image, not of a token or a number.
    block, adaln = new_block().train(), adaln[:1].clone()
    adaln[:, :, 1] = 0
    many = x[:1].expand(60, 5, 6)
    got = block(many, adaln.expand(60, 1, 6, 6))
    whole = block_by_hand(block, x[:1], adaln, 2.0)[2]
    left_out, full = ((got - image).abs().amax((1, 2)) < 1e-5 for image in (x[:1], whole))
    if not ((left_out | full).all() and left_out.any() and full.any()):
        raise Wrong("Block.forward in training: a branch of an image is either left out or kept "
                    "and divided by the chance of being kept. self.drop_path does this to what "
                    "a branch adds")


# -- One step of sampling ------------------------------------------------------------------

def small_var(chapter, scales, **changes):
    """In float64 and in eval mode. The gates of a new transformer are almost shut, so that a
    wrong branch would hardly show: random numbers open them."""
    sizes = dict(num_classes=5, vocab_size=7, latent_dim=3, depth=2, width=12, heads=3)
    var = chapter.VAR(chapter.VARConfig(scales=scales, **{**sizes, **changes})).double().eval()
    for p in var.parameters():
        p.add_(0.2 * torch.randn_like(p))
    return var


@torch.no_grad()
def grade_04_3(chapter):
    for scales, changes in (((1, 2), {}), ((1,), {}), ((1, 2, 3), {}), ((2, 1, 3), {}),
                            ((1, 2, 3), dict(shared_adaln=True, depth=3)),
                            ((1, 3, 2), dict(qk_norm=False, depth=1))):
        var, labels = small_var(chapter, scales, **changes), torch.tensor([4, 0, 5])
        shown = torch.randn(3, var.L - var.first, 3).double()
        want = var(labels, shown)
        conditioning, cache, begin = var.conditioning(labels), var.new_cache(), 0
        for k, side in enumerate(scales):
            end = begin + side ** 2
            inputs = shown[:, begin - var.first:end - var.first] if k else None
            got = call(var.step, k, inputs, conditioning, cache, scales=scales, labels=labels)
            case(k=k, scales=scales, positions=f"{begin}..{end - 1} of {var.L}")
            expect("the number of tokens in each block's cache (each block has its own)",
                   [block_cache.filled for block_cache in cache], [end] * len(cache))
            expect("step, compared with forward at these positions,", got, want[:, begin:end])
            begin = end

        # Two halves of a batch, done separately, know nothing of each other.
        conditioning, cache = var.conditioning(labels[1:]), var.new_cache()
        got = call(var.step, 0, None, conditioning, cache, scales=scales, labels=labels[1:])
        expect("step with two of the three images", got, want[1:, :var.first])


def grade_04_property(chapter):
    judge_property(chapter.property_04, "04_3")
