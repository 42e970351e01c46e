"""Graders of chapter 2. Sides, channels and batch have no common factor, so that nothing
that mixes them has the right shape by chance."""
import torch
import torch.nn.functional as F

from exercises.compare import Wrong, call, case, expect, expect_gradients, unpack
from exercises.properties import small_tokenizer

SCALES = (1, 2, 3, 4, 5, 7)


def random_tokenizer(chapter, scales=SCALES, **changes):
    return small_tokenizer(chapter, scales, vocab_size=13, latent_dim=11, **changes)


def random_tokens(scales):
    return [torch.randint(13, (2, side * side)) for side in scales]


def enlarged(x, side):
    """(B, n*n, C) -> (B, C, side, side)"""
    n = round(x.shape[1] ** 0.5)
    small = torch.stack([row.transpose(1, 2) for row in x.split(n, dim=1)], dim=2)
    return F.interpolate(small, size=(side, side), mode="bicubic")


def added(tokenizer, k, tokens_k):
    """What scale k adds to f_hat, (B, C, h, w)."""
    h = enlarged(tokenizer.quantizer.codebook[tokens_k], tokenizer.scales[-1])
    return (h + tokenizer.phis[tokenizer.phi_index[k]](h)) / 2


def grade_02_1(chapter):
    # With six scales or with ten, other rules than phi_index choose other phis.
    for scales in (SCALES, (2, 2, 2, 2, 3, 3, 3, 4, 4, 5)):
        tokenizer = random_tokenizer(chapter, scales, learn="gradient")
        given = dict(scales=scales, phi_index=tokenizer.phi_index)
        codes = tokenizer.quantizer.codebook
        for k, tokens_k in enumerate(random_tokens(scales)):
            x = torch.randn(2, tokens_k.shape[1], 11)
            got = call(tokenizer.upsample_from, x, k, **given)
            expect("upsample_from", got, enlarged(x, scales[-1]), 1e-4)
            got = call(tokenizer.embed, k, tokens_k, **given)
            want = added(tokenizer, k, tokens_k)
            expect("embed", got, want, 1e-4, slips={
                "phi is left out": enlarged(codes[tokens_k], scales[-1])})
            phi = tokenizer.phis[tokenizer.phi_index[k]].weight
            expect_gradients("embed", got, want, phi=phi, codes=codes)
            call(tokenizer.embed, k, x, **given)           # mixtures may stand for tokens


def algorithm_1(tokenizer, f):
    """-> x, tokens, f_hat of all scales, slowly"""
    f_hat, rounds = torch.zeros_like(f), []
    for k in range(len(tokenizer.scales)):
        x = tokenizer.downsample_to(f - f_hat.detach(), k)
        distances = (x[:, :, None] - tokenizer.quantizer.codebook).square().sum(-1)
        tokens_k = distances.argmin(-1)
        f_hat = f_hat + added(tokenizer, k, tokens_k)
        rounds.append((x, tokens_k, f_hat))
    return rounds


def grade_02_2(chapter):
    tokenizer, parts = random_tokenizer(chapter), ("x", "tokens_k", "f_hat")
    f = torch.randn(3, 11, 7, 7, requires_grad=True)
    before, wanted = f.detach().clone(), algorithm_1(tokenizer, f)
    case(f=f, scales=SCALES)
    yielded = tokenizer.rounds(f)
    if yielded is None:
        raise Wrong("rounds(f) never yields")
    rounds = [unpack(f"round {k}'s yield", got, *parts) for k, got in enumerate(yielded)]
    expect("f after rounds(f)", f, before)
    expect("the number of rounds", len(rounds), len(SCALES))
    for k, (got, want) in enumerate(zip(rounds, wanted)):
        for name, *pair in zip(parts, got, want):
            expect(f"{name} of round {k}, compared after the last (does += change it?),",
                   *pair, 1e-4)
        # Of what is left over, f may learn, and phi must not; of f_hat, phi learns.
        for part, name in ((0, "x"), (2, "f_hat")):
            expect_gradients(f"{name}(round {k})", got[part], want[part], f=f,
                             phi=tokenizer.phis[0].weight)


@torch.no_grad()
def grade_02_3(chapter):
    for scales in ((1, 2), SCALES, (3, 5), (5,)):
        tokenizer, tokens = random_tokenizer(chapter, scales), random_tokens(scales)
        steps, wanted = tokenizer.pyramid(tokens), torch.zeros(2, 0, 11)
        leak = wanted
        for k in range(1, len(scales)):
            wanted = torch.cat([wanted, tokenizer.downsample_to(steps[k - 1], k)], 1)
            leak = torch.cat([leak, tokenizer.downsample_to(steps[k], k)], 1)
        got = call(tokenizer.teacher_inputs, tokens, scales=scales)
        expect("teacher_inputs", got, wanted, 1e-4, slips={
            "this is a leak: what a scale is shown already holds its own tokens, which it "
            "must predict. Scale k + 1 may see f_hat after scale k": leak})
    # A tokenizer in half precision, or on another device ("meta" computes shapes alone).
    for change in (dict(dtype=torch.bfloat16), dict(device="meta")):
        case(scales=(5,), tokenizer=f"a tokenizer with {change}")
        tokens = torch.zeros(2, 25, dtype=torch.int64, device=change.get("device"))
        got = random_tokenizer(chapter, (5,)).to(**change).teacher_inputs([tokens])
        expect("teacher_inputs", got, torch.zeros(2, 0, 11, **change))


def grade_02_4(chapter):
    for scales, beta, coarse in (((1, 2, 3, 7), 0.4, 0.3), ((2, 3, 5), 0.4, 0.0),
                                 ((5,), 0.1, 0.3)):
        given = dict(beta=beta, coarse=coarse)
        tokenizer = random_tokenizer(chapter, scales, learn="gradient", **given)
        f, K = torch.randn(3, 11, scales[-1], scales[-1], requires_grad=True), len(scales)
        wanted = 0
        for k, (_, _, f_hat) in enumerate(algorithm_1(tokenizer, f)):
            weight = (coarse if k < K - 1 else K - coarse * (K - 1)) / K
            moves_f, moves_phi = f - f_hat.detach(), f.detach() - f_hat
            both = beta * moves_f.square().mean() + moves_phi.square().mean()
            wanted = wanted + weight * both
        loss = call(tokenizer.quantize_with_losses, f, scales=scales, **given)[2]
        expect("the vq loss", loss, wanted, 1e-4)
        phi = tokenizer.phis[tokenizer.phi_index[-1]].weight
        expect_gradients("(f.numel() * vq loss)", f.numel() * loss, f.numel() * wanted, f=f,
                         codebook=tokenizer.quantizer.codebook, last_phi=phi)
