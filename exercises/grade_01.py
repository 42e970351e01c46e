"""Graders of chapter 1: slow and plain solutions, compared on small inputs."""
import torch

from exercises.compare import call, expect, expect_gradients, unpack


def slow_lloyd(x, centres, iterations):
    """x (N,), centres (levels,) -> (levels,), number by number"""
    for _ in range(iterations):
        members = [[] for _ in centres]
        for number in x:
            members[int((centres - number).abs().argmin())].append(number)
        centres = torch.stack([torch.stack(own).mean() if own else old
                               for own, old in zip(members, centres)])
    return centres


def grade_01_1(chapter):
    for x, start, iterations in (
            (torch.tensor([0., 1., 5., 6., 7., 20.]), torch.tensor([2., 11.]), 1),
            # No number chooses the last level; none chooses the second after it moved to 8.
            (torch.tensor([0., 6., 6., 6.]), torch.tensor([3., 6., 6.]), 2),
            (torch.tensor([0., 2., 14., 19.]), torch.tensor([-2., 5., 30.]), 2),
            (torch.randn(50) ** 3, torch.randn(7), 3),
            (torch.randn(40), torch.randn(5), 20)):
        chapter.equal_mass_levels = lambda x, levels: start.clone()
        got = call(chapter.lloyd_levels, x, len(start), iterations, start=start)
        expect("lloyd_levels", got, slow_lloyd(x, start, iterations))


def grade_01_2(chapter):
    for shape in ((2, 3), (5, 3, 2)):
        x, code = (torch.randn(shape, requires_grad=True) for _ in range(2))
        weight = torch.randn(shape)
        x_hat = call(chapter.straight_through, x, code, weight=weight)
        expect("straight_through", x_hat, code)
        expect_gradients("(weight * straight_through)", weight * x_hat, weight * x, 1e-5,
                         x=x, code=code)
        for name, want in (("commitment_loss", x - code.detach()),
                           ("codebook_loss", x.detach() - code)):
            got = call(getattr(chapter, name), x, code)
            want = want.square().sum() / x.numel()
            expect(name, got, want)
            expect_gradients(name, got, want, 1e-5, x=x, code=code)


@torch.no_grad()
def grade_01_3(chapter):
    d = 0.75                                 # with 0.5, d and 1 - d would look alike
    for learn in ("ema", "gradient"):
        quantizer = chapter.VectorQuantizer(6, 2, learn=learn, decay=d, revive=False)
        # The fourth and fifth fall just below 1e-3 and stay just above it.
        quantizer.hits.copy_(torch.tensor([1., 2., 0., 0.0012, 0.002, 5.]))
        quantizer.sums.copy_(torch.randn(6, 2) * quantizer.hits[:, None])
        for count in ([3., 1., 0., 0., 0., 0.], [2., 0., 1., 0., 0., 4.]):
            count = torch.tensor(count)
            total = torch.randn(6, 2) * count[:, None]
            hits, sums, codes = (x.detach().clone() for x in (
                quantizer.hits, quantizer.sums, quantizer.codebook))
            call(quantizer.move_codes, count, total, learn=learn, decay=d, hits_before=hits,
                 sums_before=sums, codebook_before=codes)
            expect("hits", quantizer.hits, d * hits + (1 - d) * count, slips={
                "decay and 1 - decay are swapped": (1 - d) * hits + d * count})
            expect("sums", quantizer.sums, d * sums + (1 - d) * total)
            for i in range(6 if learn == "ema" else 0):
                if d * hits[i] + (1 - d) * count[i] > 1e-3:
                    codes[i] = quantizer.sums[i] / quantizer.hits[i]
            expect("codebook", quantizer.codebook, codes)


def grade_01_4(chapter):
    two, three = ([chapter.VectorQuantizer(4, dim) for _ in range(3)] for dim in (2, 3))
    # One quantizer for each round, more, one too few, none, or one for all rounds.
    for depth, quantizer, used, shape in (
            (1, two, two[:1], (3, 2)), (2, two, two[:2], (3, 2)), (4, two, two[:], (3, 2)),
            (0, [], [], (3, 2)), (3, three, three[:], (2, 5, 3)),
            (3, three[0], three[:1] * 3, (2, 5, 3))):
        x = torch.randn(shape)
        rest, indices = x.clone(), []
        for book in used:
            distances = (rest[..., None, :] - book.codebook).square().sum(-1)
            indices.append(distances.argmin(-1))
            rest = rest - book.codebook[indices[-1]]
        result = call(chapter.residual_quantize, x, quantizer, depth)
        x_hat, found = unpack("residual_quantize", result, "x_hat", "the list of indices")
        expect("the list of indices", found, indices,
               slips={"every round quantizes x itself": [b.nearest(x) for b in used]})
        expect("x_hat", x_hat, x - rest)
