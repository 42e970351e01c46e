"""Graders of chapter 2. Sides, channels and batch have no common factor, so that nothing that
mixes them has the right shape by chance. Six scales and four phis: each scale's phi differs
from what other rules of sharing would give."""
from types import GeneratorType

import torch
import torch.nn.functional as F

from exercises.compare import Wrong, call, case, describe, expect, gradients, unpack
from exercises.grading import judge_property

SCALES, PHIS = (1, 2, 3, 4, 5, 7), [0, 0, 1, 2, 3, 3]


def random_tokenizer(chapter, scales=SCALES, **changes):
    return chapter.MultiScaleVQVAE(chapter.TokenizerConfig(
        image_size=2 * scales[-1], scales=scales, vocab_size=11, latent_dim=6, channels=4,
        groups=2, unshuffle=2, **changes)).eval()


def random_tokens(scales, B=2):
    return [torch.randint(11, (B, side * side)) for side in scales]


def as_vectors(f, side):
    """(B, C, h, w) -> (B, side*side, C), each the mean of its area"""
    small = F.interpolate(f, size=(side, side), mode="area")
    cells = [small[..., row, column] for row in range(side) for column in range(side)]
    return torch.stack(cells, dim=1)


def enlarged(x, side):
    """(B, n*n, C) -> (B, C, side, side)"""
    n = round(x.shape[1] ** 0.5)
    small = torch.stack([row.transpose(1, 2) for row in x.split(n, dim=1)], dim=2)
    return F.interpolate(small, size=(side, side), mode="bicubic")


def added(tokenizer, k, z):
    """What scale k adds to f_hat, (B, C, h, w). z: tokens, or vectors in their place"""
    z = z if z.is_floating_point() else tokenizer.quantizer.codebook[z]
    h = enlarged(z, tokenizer.scales[-1])
    return (h + tokenizer.phis[tokenizer.phi_index[k]](h)) / 2


def grade_02_1(chapter):
    tokenizer = random_tokenizer(chapter)
    assert tokenizer.phi_index == PHIS
    for k, tokens_k in enumerate(random_tokens(SCALES)):
        x = torch.randn(2, tokens_k.shape[1], 6)
        given = dict(scales=SCALES, phi_index=PHIS)
        expect("upsample_from", call(tokenizer.upsample_from, x, k, **given),
               enlarged(x, SCALES[-1]), 1e-4)
        bare = enlarged(tokenizer.quantizer.codebook[tokens_k], SCALES[-1])
        got, want = call(tokenizer.embed, k, tokens_k, **given), added(tokenizer, k, tokens_k)
        expect("embed", got, want, 1e-4, slips={"phi is left out": bare})
        weight = tokenizer.phis[PHIS[k]].weight
        expect("the gradient of embed.sum() at the weights of its phi",
               *gradients("embed", got, weight), *gradients("embed", want, weight), 1e-3)
        # Mixtures of codes, which may stand for tokens, have a gradient of their own.
        call(tokenizer.embed, k, x, **given)
        mixtures = x.requires_grad_()
        found, right = (gradients("embed", y ** 2, mixtures)[0]
                        for y in (tokenizer.embed(k, mixtures), added(tokenizer, k, mixtures)))
        expect("the gradient of embed.square().sum() at its vectors", found, right, 1e-3)


def algorithm_1(tokenizer, f):
    """-> x, tokens, f_hat of all scales, slowly"""
    f_hat, rounds = torch.zeros_like(f), []
    for k, side in enumerate(tokenizer.scales):
        x = as_vectors(f - f_hat.detach(), side)
        tokens_k = (x[:, :, None] - tokenizer.quantizer.codebook).square().sum(-1).argmin(-1)
        f_hat = f_hat + added(tokenizer, k, tokens_k)
        rounds.append((x, tokens_k, f_hat))
    return rounds


def grade_02_2(chapter):
    tokenizer = random_tokenizer(chapter)
    f = torch.randn(3, 6, 7, 7, requires_grad=True)
    before, wanted, rounds = f.detach().clone(), algorithm_1(tokenizer, f), []
    case(f=f, scales=SCALES)
    yielded = tokenizer.rounds(f)
    if not isinstance(yielded, GeneratorType):
        raise Wrong(f"rounds(f) is {describe(yielded)}; it must yield one round after another")
    for k, (want, got) in enumerate(zip(wanted, yielded)):
        got = unpack(f"what round {k} yields", got, "x", "tokens_k", "f_hat")
        for name, *pair in zip(("x", "tokens_k", "f_hat"), got, want):
            expect(f"{name} of round {k} (counted from 0)", *pair, 1e-4)
        rounds.append(got)
    expect("the number of rounds", len(rounds) + len(list(yielded)), len(SCALES))
    expect("f after rounds(f)", f, before)
    for k, (got, want) in enumerate(zip(rounds, wanted)):
        expect(f"f_hat of round {k}, compared after the last round (does += change it?)",
               got[2], want[2], 1e-4)
        # Of what is left over, f may learn, and phi must not; of f_hat, phi learns.
        for i, name in ((0, "x"), (2, "f_hat")):
            expect_gradients(f"{name} of round {k}", got[i], want[i], f, tokenizer.phis[0].weight)


def expect_gradients(name, got, want, *inputs):
    found, right = (gradients(name, value, *inputs) for value in (got, want))
    for at, one, other in zip(("f", "the weights of phi 0"), found, right):
        if other.any() and not one.any():
            raise Wrong(f"the gradient of {name} does not reach {at}: what was detached?")
        if one.any() and not other.any():
            raise Wrong(f"the gradient of {name} reaches {at}, which must not learn from it: "
                        "what was not detached?")
        expect(f"the gradient of the sum of {name} at {at} (detach f_hat in what is left "
               "over, but not in the sum)", one, other, 1e-3)


@torch.no_grad()
def grade_02_3(chapter):
    for scales in ((1, 2), SCALES, (3, 5), (5,)):
        tokenizer, tokens = random_tokenizer(chapter, scales), random_tokens(scales)
        steps, empty = [], torch.zeros(2, 0, 6)
        for k, tokens_k in enumerate(tokens):
            steps.append((steps[-1] if k else 0) + added(tokenizer, k, tokens_k))
        wanted, leak = (
            torch.cat([empty, *(as_vectors(f_hat, side) for f_hat, side in zip(s, scales[1:]))], 1)
            for s in (steps, steps[1:]))
        expect("teacher_inputs", call(tokenizer.teacher_inputs, tokens, scales=scales), wanted,
               1e-4, slips={"this is a leak: what a scale is shown already holds its own "
                            "tokens, which it must predict. Scale k + 1 may see f_hat after "
                            "scale k": leak})
    # A tokenizer in half precision, or on another device ("meta" computes shapes alone).
    for scales in ((1, 2), (5,)):
        for change in (dict(dtype=torch.bfloat16), dict(device="meta")):
            tokenizer = random_tokenizer(chapter, scales).to(**change)
            tokens = [t.to(device=change.get("device")) for t in random_tokens(scales)]
            case(scales=scales, tokenizer=f"a tokenizer with {change}")
            wanted = torch.zeros(2, sum(s * s for s in scales[1:]), 6, **change)
            got = tokenizer.teacher_inputs(tokens)
            expect("teacher_inputs", 0 * got if torch.is_tensor(got) else got, wanted)


def grade_02_4(chapter):
    for scales, beta, coarse in (((1, 2, 3, 7), 0.4, 0.3), ((2, 3, 5), 0.4, 0.0), ((5,), 0.1, 0.3)):
        tokenizer = random_tokenizer(chapter, scales, beta=beta, coarse=coarse, learn="gradient")
        f, K = torch.randn(3, 6, scales[-1], scales[-1], requires_grad=True), len(scales)
        wanted = bare = 0
        for k, (x, tokens_k, f_hat) in enumerate(algorithm_1(tokenizer, f)):
            weight = coarse if k < K - 1 else K - coarse * (K - 1)
            commitment = (f - f_hat.detach()).square().mean()
            wanted = wanted + weight * (beta * commitment + (f.detach() - f_hat).square().mean()) / K
            codes = tokenizer.quantizer.codebook[tokens_k]
            bare = bare + weight * (1 + beta) * (x - codes).square().mean() / K
        loss = call(tokenizer.quantize_with_losses, f, scales=scales, beta=beta, coarse=coarse)[2]
        expect("the vq loss", loss, wanted, 1e-4, slips={
            "it compares x with its codes; equation 5 compares f with f_hat": bare})
        last = tokenizer.phi_index[-1]
        inputs = f, tokenizer.quantizer.codebook, tokenizer.phis[last].weight
        found, right = (gradients("the vq loss", f.numel() * value, *inputs)
                        for value in (loss, wanted))
        names = "f", "the codebook", f"the weights of phi {last}"
        for at, got, want in zip(names, found, right):
            expect(f"the gradient of f.numel() * vq loss at {at} (beta {beta})", got, want, 1e-3)


def grade_02_property(chapter):
    judge_property(chapter.property_02, "02_3")
