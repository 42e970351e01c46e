"""Graders of chapter 2. Sides, channels and batch have no common factor, so that nothing that
mixes them can have the right shape by chance; two phis serve four scales."""
from types import GeneratorType

import torch
import torch.nn.functional as F

from exercises.grading import Wrong, describe, expect, gradients, judge_property

SCALES = (1, 2, 3, 5)


def random_tokenizer(chapter, scales=SCALES, **changes):
    return chapter.MultiScaleVQVAE(chapter.TokenizerConfig(
        image_size=2 * scales[-1], scales=scales, vocab_size=11, latent_dim=7, channels=4, groups=2,
        unshuffle=2, phis=2, **changes)).eval()


def random_tokens(scales, B=2):
    return [torch.randint(11, (B, side * side)) for side in scales]


def as_map(x):
    """(B, n*n, C) -> (B, C, n, n)"""
    side = round(x.shape[1] ** 0.5)
    return torch.stack([row.transpose(1, 2) for row in x.split(side, dim=1)], dim=2)


def as_vectors(f, side):
    """(B, C, h, w) -> (B, side*side, C), each the mean of its area"""
    small = F.interpolate(f, size=(side, side), mode="area")
    cells = [small[..., row, column] for row in range(side) for column in range(side)]
    return torch.stack(cells, dim=1)


def enlarged(x, side):
    return F.interpolate(as_map(x), size=(side, side), mode="bicubic")


def added(tokenizer, k, tokens_k):
    """What scale k adds to f_hat, (B, C, h, w)"""
    h = enlarged(tokenizer.quantizer.codebook[tokens_k], tokenizer.scales[-1])
    return (h + tokenizer.phis[tokenizer.phi_index[k]](h)) / 2


def test_02_1(chapter):
    tokenizer, side = random_tokenizer(chapter), SCALES[-1]
    for k, tokens_k in enumerate(random_tokens(SCALES)):
        x, given = torch.randn(2, tokens_k.shape[1], 7), dict(k=k, scales=SCALES)
        got = tokenizer.upsample_from(x, k)
        expect("upsample_from(x, k)", got, enlarged(x, side), 1e-4, x=x, **given)
        got, want = tokenizer.embed(k, tokens_k), added(tokenizer, k, tokens_k)
        expect("embed(k, tokens_k)", got, want, 1e-4, tokens_k=tokens_k, **given,
               phi_index=tokenizer.phi_index)
        weight = tokenizer.phis[tokenizer.phi_index[k]].weight
        expect("the gradient of embed(k, tokens_k).sum() at the weights of phi",
               *gradients("embed", got, weight), *gradients("embed", want, weight), 1e-3, **given)
        # Mixtures of codes, which may stand for tokens, have a gradient of their own.
        mixtures = torch.randn(2, tokens_k.shape[1], 7, requires_grad=True)
        h = enlarged(mixtures, side)
        want = (h + tokenizer.phis[tokenizer.phi_index[k]](h)) / 2
        grads = (gradients("embed", y ** 2, mixtures)[0]
                 for y in (tokenizer.embed(k, mixtures), want))
        expect("the gradient of the sum of squares of embed(k, z) at z", *grads, 1e-3, **given)


def algorithm_1(tokenizer, f):
    """-> x, tokens, f_hat of all scales, slowly"""
    f_hat, rounds = torch.zeros_like(f), []
    for k, side in enumerate(tokenizer.scales):
        x = as_vectors(f - f_hat.detach(), side)
        tokens_k = (x[:, :, None] - tokenizer.quantizer.codebook).square().sum(-1).argmin(-1)
        f_hat = f_hat + added(tokenizer, k, tokens_k)
        rounds.append((x, tokens_k, f_hat))
    return rounds


def test_02_2(chapter):
    tokenizer = random_tokenizer(chapter)
    f = torch.randn(3, 7, 5, 5, requires_grad=True)
    before = f.detach().clone()
    yielded, wanted, rounds = tokenizer.rounds(f), algorithm_1(tokenizer, f), []
    given = dict(scales=SCALES, phi_index=tokenizer.phi_index)
    if not isinstance(yielded, GeneratorType):
        raise Wrong(f"rounds(f) is {describe(yielded)}; it must yield one round after the other")
    for k, (want, got) in enumerate(zip(wanted, yielded)):
        if not isinstance(got, (list, tuple)) or len(got) != 3:
            raise Wrong(f"round {k} yields {describe(got)}, expected x, tokens_k and f_hat")
        for name, *pair in zip(("x", "tokens_k", "f_hat"), got, want):
            expect(f"{name} of round {k}", *pair, 1e-4, **given)
        rounds.append(got)
    expect("the number of rounds", len(rounds) + len(list(yielded)), len(SCALES))
    expect("f after rounds(f)", f, before)
    for k in range(len(SCALES)):
        name = f"f_hat of round {k}, looked at after the last round (does += change it?)"
        expect(name, rounds[k][2], wanted[k][2], 1e-4, **given)
        # Of what is left over, f may learn, and phi must not; of f_hat, phi learns.
        for i, name in ((0, "x"), (2, "f_hat")):
            inputs = f, tokenizer.phis[0].weight
            found, right = (gradients(f"{name} of round {k}", r[k][i], *inputs)
                            for r in (rounds, wanted))
            for at, got, want in zip(("f", "the weights of phi 0"), found, right):
                expect_reach(f"round {k}, counted from 0: the gradient of {name}", at, got, want)
                expect(f"round {k}: the gradient of {name}.sum() at {at} (detach f_hat in what "
                       "is left over, but not in the sum)", got, want, 1e-3, **given)


def expect_reach(name, at, got, want):
    """A gradient must be nowhere but where one is wanted."""
    if want.any() and not got.any():
        raise Wrong(f"{name} does not reach {at}: what was detached on the way?")
    if got.any() and not want.any():
        raise Wrong(f"{name} reaches {at}, which must not learn from it: what was not detached?")


def test_02_3(chapter):
    for scales in ((1, 2), SCALES, (3, 5), (5,)):
        tokenizer, tokens = random_tokenizer(chapter, scales), random_tokens(scales)
        copies = [tokens_k.clone() for tokens_k in tokens]
        f_hat, wanted = 0, [torch.zeros(2, 0, 7)]
        for k, tokens_k in enumerate(tokens[:-1]):
            f_hat = f_hat + added(tokenizer, k, tokens_k)
            wanted.append(as_vectors(f_hat, scales[k + 1]))
        inputs = tokenizer.teacher_inputs(tokens)
        expect("teacher_inputs(tokens)", inputs, torch.cat(wanted, 1), 1e-4, scales=scales)
        expect("tokens after teacher_inputs", tokens, copies)


def test_02_4(chapter):
    for scales, beta, coarse in ((SCALES, 0.4, 0.3), ((2, 3, 5), 0.4, 0.0), ((5,), 0.1, 0.3)):
        tokenizer = random_tokenizer(chapter, scales, beta=beta, coarse=coarse, learn="gradient")
        f, K = torch.randn(3, 7, 5, 5, requires_grad=True), len(scales)
        given, wanted = dict(scales=scales, beta=beta, coarse=coarse), 0
        for k, (_, _, f_hat) in enumerate(algorithm_1(tokenizer, f)):
            weight = coarse if k < K - 1 else K - coarse * (K - 1)
            commitment = (f - f_hat.detach()).square().mean()
            codebook = (f.detach() - f_hat).square().mean()
            wanted = wanted + weight * (beta * commitment + codebook) / K
        loss = tokenizer.learn_to_quantize(f)[2]
        expect("the vq loss", loss, wanted, 1e-4, **given)
        last = tokenizer.phi_index[-1]
        inputs = f, tokenizer.quantizer.codebook, tokenizer.phis[last].weight
        found, right = (gradients("the vq loss", f.numel() * value, *inputs)
                        for value in (loss, wanted))
        names = "f", "the codebook", f"the weights of phi {last}"
        for at, got, want in zip(names, found, right):
            expect(f"the gradient of f.numel() * vq loss at {at}", got, want, 1e-3, **given)


def test_02_property(chapter):
    judge_property(chapter.property_02, "02_3")
