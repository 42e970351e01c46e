"""Graders of chapter 4."""
import torch

from exercises.grading import expect, gradients, judge_property


def small_var(chapter, scales=(1, 2, 3), **changes):
    """In float64 and in eval mode. The gates of a new transformer are almost shut, so that a wrong
    branch would hardly show: random numbers open them."""
    torch.manual_seed(0)
    sizes = dict(num_classes=5, vocab_size=7, latent_dim=3, depth=2, width=12, heads=3)
    var = chapter.VAR(chapter.VARConfig(scales=scales, **{**sizes, **changes})).double().eval()
    with torch.no_grad():
        for p in var.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return var


# -- The cache -------------------------------------------------------------------------------------

@torch.no_grad()
def test_04_1(chapter):
    # Small numbers to look at: two tokens, then one. 1 image, 1 head, d = 1.
    k, v = torch.tensor([10., 11., 12.]), torch.tensor([20., 21., 22.])
    k, v = k.view(1, 1, 3, 1), v.view(1, 1, 3, 1)
    cache = chapter.KVCache(5)
    for begin, end in ((0, 2), (2, 3)):
        got = cache.append(k[:, :, begin:end], v[:, :, begin:end])
        expect("what append returns", got, (k[:, :, :end], v[:, :, :end]),
               calls_so_far=1 if begin == 0 else 2, new_k=k[0, 0, begin:end, 0],
               new_v=v[0, 0, begin:end, 0])

    # Two blocks of a transformer, each with a cache of its own, filled in turns. The tensors that
    # were returned are kept, so that no new one lies in the memory of an old one.
    keys_and_values = [torch.randn(2, 2, 3, 30, 4).double() for _ in range(2)]
    caches, begin, kept = [chapter.KVCache(30) for _ in range(2)], 0, []
    for new in (4, 1, 9, 16):
        for cache, (k, v) in zip(caches, keys_and_values):
            got = cache.append(k[:, :, begin:begin + new], v[:, :, begin:begin + new])
            expect("what append returns", got,
                   (k[:, :, :begin + new], v[:, :, :begin + new]), tolerance=0,
                   tokens_before=begin, tokens_new=new)
            kept.append((got, [x.clone() for x in got]))
        begin += new
    for got, before in kept:
        expect("what an earlier append returned", list(got), before, tolerance=0)
    expect("what append returns in half precision",
           chapter.KVCache(2).append(*[torch.ones(2, 3, 1, 4).bfloat16()] * 2),
           [torch.ones(2, 3, 1, 4).bfloat16()] * 2)


# -- The block -------------------------------------------------------------------------------------

class Branch(torch.nn.Module):
    """Stands for attention or the MLP: a linear map that remembers what it was given."""

    def __init__(self, width):
        super().__init__()
        self.matrix, self.calls = torch.randn(width, width).double(), []

    def forward(self, x, *rest, **named):
        self.calls.append((x, rest, named))
        return x @ self.matrix


def block_by_hand(block, x, adaln, kept=1.0):
    """x (B, n, D), image by image -> (what attention sees, what the MLP sees, the result).
    kept: the factor of drop-path on both branches"""
    D = x.shape[-1]
    rows = []
    for image, (gate1, gate2, scale1, scale2, shift1, shift2) in zip(x, adaln[:, 0]):
        normed = torch.nn.functional.layer_norm(image, (D,), eps=1e-6)
        first = normed + normed * scale1 + shift1
        image = image + kept * (first @ block.attention.matrix) * gate1
        normed = torch.nn.functional.layer_norm(image, (D,), eps=1e-6)
        second = normed + normed * scale2 + shift2
        rows.append((first, second, image + kept * (second @ block.mlp.matrix) * gate2))
    return [torch.stack(parts) for parts in zip(*rows)]


def test_04_2(chapter):
    torch.manual_seed(0)
    config = chapter.VARConfig(depth=2, width=6, heads=3)
    x, adaln = torch.randn(2, 5, 6).double(), torch.randn(2, 1, 6, 6).double()
    mask, cache = object(), object()                     # only passed on, so anything will do
    for name, kept, changes in (
            ("Block.forward with all gates 0", 1.0, {0: 0.0, 1: 0.0}),
            ("Block.forward with the gate of the MLP 0", 1.0, {1: 0.0}),
            ("Block.forward with the gate of attention 0", 1.0, {0: 0.0}),
            ("Block.forward with scale_by and shift 0", 1.0, {2: 0.0, 3: 0.0, 4: 0.0, 5: 0.0}),
            ("Block.forward", 1.0, {}),
            ("Block.forward where drop_path drops everything", 0.0, {}),
            ("Block.forward where drop_path doubles everything", 2.0, {})):
        block = chapter.Block(config, drop_rate=0.5).double().eval()
        block.attention, block.mlp = Branch(6), Branch(6)
        if kept != 1:
            block.drop_path = lambda h: h * kept
        table, given = adaln.clone(), x.clone()
        for i, number in changes.items():
            table[:, :, i] = number
        first, second, want = block_by_hand(block, x, table, kept)
        got = block(given, table, mask, cache)
        shapes = dict(x=(2, 5, 6), adaln=(2, 1, 6, 6))
        for part, calls, seen in (("attention", block.attention.calls, first),
                                  ("the MLP", block.mlp.calls, second)):
            assert len(calls) == 1, f"{name}: {part} ran {len(calls)} times, expected once"
            expect(f"{name}: what {part} is given", calls[0][0], seen, **shapes)
        expect(name, got, want, **shapes)
        assert torch.equal(given, x), f"{name}: the caller's x was changed"

        _, rest, named = block.attention.calls[0]
        passed = {**dict(zip(("mask", "cache"), rest)), **named}
        for word, value in (("mask", mask), ("cache", cache)):
            assert passed.get(word) is value, f"{name}: attention was not handed the {word}"
        _, rest, named = block.mlp.calls[0]
        assert not rest and not named, f"{name}: the MLP takes x alone"

    block = chapter.Block(config, drop_rate=0.5).double().eval()
    block.attention, block.mlp = Branch(6), Branch(6)
    grads = []
    for function in (block, lambda *given: block_by_hand(block, *given)[2]):
        given = [tensor.clone().requires_grad_() for tensor in (x, adaln)]
        grads.append(gradients("Block.forward", function(*given) ** 2, *given))
    for name, got, want in zip(("x", "adaln"), *grads):
        expect(f"gradient of the sum of squares of Block.forward at {name}", got, want)

    # In training drop-path leaves out a branch of an image, not of a token or a number.
    block = chapter.Block(config, drop_rate=0.5).double().train()
    block.attention, block.mlp = Branch(6), Branch(6)
    adaln = adaln.clone()
    adaln[:, :, 1] = 0
    many = torch.randn(1, 5, 6).double().expand(60, 5, 6)
    got = block(many, adaln[:1].expand(60, 1, 6, 6))
    whole = block_by_hand(block, many[:1], adaln[:1], 2.0)[2][0]
    left_out = torch.stack([(row - many[0]).abs().amax() < 1e-5 for row in got])
    full = torch.stack([(row - whole).abs().amax() < 1e-5 for row in got])
    assert (left_out | full).all() and left_out.any() and full.any(), (
        "Block.forward in training: each branch of an image must be left out, or kept and divided "
        "by the chance of being kept: self.drop_path does this to what a branch adds")


# -- One step of sampling --------------------------------------------------------------------------

def teacher_inputs_of(var, batch):
    return torch.randn(batch, var.L - var.first, var.config.latent_dim).double()


@torch.no_grad()
def test_04_3(chapter):
    for scales, changes in (((1,), {}), ((1, 2), {}), ((1, 2, 3), {}), ((2, 1, 3), {}),
                            ((1, 2, 3, 4), {}), ((1, 2, 3), dict(shared_adaln=True, depth=3)),
                            ((1, 3, 2), dict(qk_norm=False, depth=1))):
        var = small_var(chapter, scales, **changes)
        labels, shown = torch.tensor([4, 0, 5]), teacher_inputs_of(var, 3)
        want, before = var(labels, shown), shown.clone()
        conditioning, cache, begin = var.conditioning(labels), var.new_cache(), 0
        for k, side in enumerate(scales):
            inputs = shown[:, begin - var.first:begin - var.first + side ** 2] if k else None
            got = var.step(k, inputs, conditioning, cache)
            expect("step, against the same scale in forward", got, want[:, begin:begin + side ** 2],
                   k=k, scales=scales, labels=labels)
            begin += side ** 2
            filled = [block_cache.filled for block_cache in cache]
            assert filled == [begin] * len(cache), (
                f"step with k = {k}, scales = {scales}: the caches of the blocks hold {filled} "
                f"tokens, expected {begin} each")
        assert torch.equal(shown, before), "step: the caller's inputs were changed"

        # Two halves of a batch, done separately, know nothing of each other.
        conditioning, cache = var.conditioning(labels[1:]), var.new_cache()
        expect("step with two of the three images", var.step(0, None, conditioning, cache),
               want[1:, :var.first], k=0, scales=scales, labels=labels[1:])


def test_04_property(chapter):
    judge_property(chapter.property_04, "04_3")
