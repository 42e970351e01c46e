"""Graders of chapter 1."""
import torch

from exercises.grading import expect


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
        start = chapter.equal_mass_levels(x, levels)
        expect("lloyd_levels", chapter.lloyd_levels(x.clone(), levels, iterations),
               slow_lloyd(x, start, iterations), x=x, levels=levels, iterations=iterations)
