"""Graders of chapter 1: slow and plain solutions, compared on small inputs."""
import torch

from exercises.grading import expect, gradients, judge_property


def slow_lloyd(x, centres, iterations):
    """x (N,), centres (levels,) -> (levels,), number by number"""
    for _ in range(iterations):
        members = [[] for _ in centres]
        for number in x:
            members[int((centres - number).abs().argmin())].append(number)
        centres = torch.stack([torch.stack(own).mean() if own else old
                               for own, old in zip(members, centres)])
    return centres


def test_01_1(chapter):
    middle = torch.tensor([1., 1., 1., 1., 1., 6.])        # the second of three levels stays unused
    last = torch.tensor([0., 6., 6., 6.])                  # here the third
    for x, levels, iterations in ((torch.tensor([0., 1., 5., 6., 7., 20.]), 2, 1), (middle, 3, 2),
                                  (last, 3, 2), (torch.randn(50) ** 3, 7, 3),
                                  (torch.randn(40), 5, 20)):
        start, given = chapter.equal_mass_levels(x, levels), x.clone()
        expect("lloyd_levels", chapter.lloyd_levels(given, levels, iterations),
               slow_lloyd(x, start, iterations), x=x, levels=levels, iterations=iterations)
        expect("x after lloyd_levels", given, x)


def test_01_2(chapter):
    for shape in ((2, 3), (5, 3, 2)):
        x, code = (torch.randn(shape, requires_grad=True) for _ in range(2))
        weight, given = torch.randn(shape), dict(x=x, code=code)
        x_hat, nothing = chapter.straight_through(x, code), torch.zeros(shape)
        expect("straight_through", x_hat, code, **given)
        at_x, at_code = gradients("straight_through", weight * x_hat, x, code)
        expect("the gradient of sum(weight * x_hat) at x", at_x, weight, weight=weight, **given)
        expect("the gradient of sum(weight * x_hat) at the code", at_code, nothing, **given)

        pull = 2 * (x - code).detach() / x.numel()         # of the mean squared difference, at x
        for name, moves_x, moves_code in (("commitment_loss", 1, 0), ("codebook_loss", 0, 1)):
            loss = getattr(chapter, name)(x, code)
            expect(name, loss, (x - code).square().sum() / x.numel(), **given)
            at_x, at_code = gradients(name, loss, x, code)
            expect(f"the gradient of {name} at x", at_x, moves_x * pull, **given)
            expect(f"the gradient of {name} at the code", at_code, -moves_code * pull, **given)


def slow_update(quantizer, good):
    """What update() must leave. -> hits (V,), sums (V, C), codebook (V, C)"""
    d, hits, sums = quantizer.decay, quantizer.hits.clone(), quantizer.sums.clone()
    codes = quantizer.codebook.detach().clone()
    for i in range(quantizer.vocab_size if good else 0):
        hits[i] = d * hits[i] + (1 - d) * quantizer.count[i]
        sums[i] = d * sums[i] + (1 - d) * quantizer.total[i]
        if quantizer.learn == "ema" and hits[i] > 1e-3:
            codes[i] = sums[i] / hits[i]
    return hits, sums, codes


def test_01_3(chapter):
    broken = torch.tensor(float("inf"))
    for learn, accepted, spoil in (("ema", True, 0), ("ema", torch.tensor(True), 0),
                                   ("gradient", True, 0), ("ema", False, 0), ("ema", True, broken)):
        quantizer = chapter.VectorQuantizer(6, 2, learn=learn, decay=0.75, revive=False)
        # The last four codes stay unused: one never was used, one too rarely, one rarely.
        quantizer.hits.copy_(torch.tensor([1., 2., 0., 0.0005, 0.02, 5.]))
        quantizer.sums.copy_(torch.randn(6, 2) * quantizer.hits[:, None])
        for _ in range(2):
            quantizer.observe([torch.randn(5, 2) + spoil], [torch.tensor([0, 1, 1, 0, 1])])
            given = dict(learn=learn, good=accepted and not spoil, hits=quantizer.hits.clone(),
                         count=quantizer.count.clone(), sums=quantizer.sums.clone(),
                         total=quantizer.total.clone(), decay=0.75)
            wanted = slow_update(quantizer, given["good"])
            quantizer.update(accepted)
            for name, want in zip(("hits", "sums", "codebook"), wanted):
                expect(f"{name} after update()", getattr(quantizer, name), want, **given)


def test_01_4(chapter):
    for depth, shape in ((1, (3, 2)), (2, (3, 2)), (3, (2, 5, 3))):
        books = [chapter.VectorQuantizer(4, shape[-1]) for _ in range(depth + 1)]
        for quantizer in (books, books[0]):              # one for each round, or one for all
            x = torch.randn(shape)
            rest, indices = x.clone(), []
            for i in range(depth):
                codes = (books[i] if quantizer is books else quantizer).codebook
                indices.append((rest[..., None, :] - codes).square().sum(-1).argmin(-1))
                rest = rest - codes[indices[-1]]
            given = x.clone()
            x_hat, found = chapter.residual_quantize(given, quantizer, depth)
            expect("x after residual_quantize", given, x)
            expect("the indices", found, indices, x=x, depth=depth)
            expect("x_hat", x_hat, x - rest, x=x, depth=depth)


def test_01_property(chapter):
    judge_property(chapter.property_01, "01_4")
