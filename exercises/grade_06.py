"""Graders of chapter 6."""
import itertools
import math
from importlib import import_module
from types import SimpleNamespace

import torch

from exercises.grading import Wrong, expect, judge_property, show

m2, m4 = import_module("02_multiscale_vqvae"), import_module("04_var_transformer")


def expect_kind(name, got, want):
    """The right type, shape and dtype, whatever the values."""
    expect(name, torch.zeros_like(got) if torch.is_tensor(got) else got, torch.zeros_like(want))


# -- 06_1 ------------------------------------------------------------------------------------------

def kept_values(row, top_k, top_p):
    """What must stay of a row, likeliest first: a list of floats."""
    kept = sorted(row, reverse=True)[:top_k or len(row)]
    if not 0 < top_p < 1:
        return kept
    total, held = sum(math.exp(x) for x in kept), 0.0
    for count, x in enumerate(kept, 1):
        held += math.exp(x) / total
        if held >= top_p:
            break
    return kept[:count]


def check_row(got, row, wanted, **inputs):
    """got, row (V,): the values that stay are `wanted`, each at its place, all else is -inf."""
    stays = got > -math.inf
    if got.isnan().any() or not torch.equal(got[stays], row[stays]):
        raise Wrong(f"keep_likely returns {show(got)}: what stays must keep its value and its "
                    f"place, the rest must be -inf\n    with logits = {show(row)}, {inputs}")
    expect("the logits that stay, largest first", sorted(got[stays].tolist(), reverse=True), wanted,
           logits=row, **inputs)


def test_06_1(chapter):
    plain = torch.tensor([0.5, 3.0, -1.0, 2.0, 1.2])
    ties = torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0, 0.0, 2.0])
    sure = torch.tensor([-200.0, 9.0, -300.0])             # one holds everything
    for logits in (plain, torch.stack([plain, plain.flip(0)]), ties, sure,
                   torch.randn(3, 2, 11), 5 * torch.randn(2, 3, 2, 7)):
        for top_k, top_p in itertools.product((0, 1, 2, 4, 100), (0.0, 1e-9, 0.3, 0.55, 0.9, 1.0)):
            mine = logits.clone()
            got = chapter.keep_likely(mine, top_k, top_p)
            if not torch.equal(mine, logits):
                raise Wrong("keep_likely changed the logits of its caller: work on a copy")
            expect_kind("keep_likely", got, logits)
            for row, kept in zip(logits.view(-1, logits.shape[-1]), got.view(-1, got.shape[-1])):
                check_row(kept, row, kept_values(row.tolist(), top_k, top_p), top_k=top_k,
                          top_p=top_p)


def test_06_property(chapter):
    judge_property(chapter.property_06, "06_1")


# -- 06_2 ------------------------------------------------------------------------------------------

def guided_logits(chapter, logits, cfg, B):
    """Run the loop of chapter 6 on a model that returns these logits, one tensor for each scale.
    -> what the loop hands to keep_likely"""
    seen = []

    def keep_likely(guided, top_k, top_p):
        seen.append(guided)
        return torch.zeros(B, guided.shape[1], guided.shape[2])

    chapter.keep_likely = keep_likely
    def first(count, conditioning, cache):
        return SimpleNamespace(row=conditioning.row[:count])

    tokenizer = SimpleNamespace(K=len(logits), next_input=lambda k, f_hat, tokens_k: (
        f_hat, torch.zeros(B, 1, 1)))
    var = SimpleNamespace(
        config=SimpleNamespace(num_classes=4), new_cache=list, keep_first=first,
        conditioning=lambda labels: SimpleNamespace(row=torch.zeros(len(labels))),
        step=lambda k, inputs, conditioning, cache: logits[k][:len(conditioning.row)].clone())
    chapter.sample_tokens(tokenizer, var, torch.arange(B), cfg=cfg)
    return seen


def test_06_2(chapter):
    B, V = 3, 11
    for K, cfg in ((2, 1.0), (4, 1.5), (3, 4.0), (1, 2.0)):
        logits = [torch.randn(2 * B, (k + 1) ** 2, V) for k in range(K)]
        for k, got in enumerate(guided_logits(chapter, logits, cfg, B)):
            cond, uncond = logits[k][:B], logits[k][B:]
            t = cfg * k / max(K - 1, 1)
            wanted = cond + t * (cond - uncond)
            expect(f"logits of scale {k + 1} of {K} with cfg {cfg}", got, wanted,
                   logit_of_class=cond[0, 0, 0], logit_without_class=uncond[0, 0, 0], t=t)


# -- 06_3 ------------------------------------------------------------------------------------------

def random_models(scales, V):
    """A tokenizer and a transformer with random weights, large enough that everything matters."""
    torch.manual_seed(2)
    sizes = dict(scales=scales, vocab_size=V, latent_dim=4)
    tokenizer = m2.MultiScaleVQVAE(m2.TokenizerConfig(
        **sizes, image_size=2 * scales[-1], channels=8, groups=4, unshuffle=2)).eval()
    var = m4.VAR(m4.VARConfig(**sizes, num_classes=2, depth=2, width=16, heads=2)).eval()
    with torch.no_grad():
        for p in var.parameters():
            p.add_(0.5 * torch.randn_like(p))
    return tokenizer, var


@torch.no_grad()
def slow_log_likelihood(tokenizer, var, tokens, labels):
    """Scale by scale, as sampling meets them. -> (B, K)"""
    conditioning, cache = var.conditioning(labels), var.new_cache()
    f_hat, inputs, found = 0, None, []
    for k, tokens_k in enumerate(tokens):
        p = var.step(k, inputs, conditioning, cache).softmax(-1)         # (B, n, V)
        found.append(torch.stack([
            torch.stack([p[b, i, code].log() for i, code in enumerate(row)]).sum()
            for b, row in enumerate(tokens_k)]))
        f_hat, inputs = tokenizer.next_input(k, f_hat, tokens_k)
    return torch.stack(found, 1)


def test_06_3(chapter):
    tokenizer, var = random_models((2, 3), 5)
    tokens = [torch.randint(5, (3, n)) for n in (4, 9)]
    labels = torch.tensor([1, 0, 2])                       # 2: no class
    got = chapter.log_likelihood(tokenizer, var, [t.clone() for t in tokens], labels.clone())
    wanted = slow_log_likelihood(tokenizer, var, tokens, labels)
    expect_kind("log_likelihood", got, wanted)
    check_sum(chapter, *random_models((1, 2), 3))
    expect("log_likelihood", got, wanted, 1e-4, labels=labels)
    half = chapter.log_likelihood(tokenizer, var.bfloat16(), tokens, labels)
    expect("log_likelihood of a model in bfloat16", half, wanted, 0.05, labels=labels)


def check_sum(chapter, tokenizer, var):
    """Probabilities of all 3^5 images of one token and four."""
    every = torch.tensor(list(itertools.product(range(3), repeat=5)))    # (243, 5)
    for label in (0, 1, 2):
        found = chapter.log_likelihood(tokenizer, var, list(every.split([1, 4], 1)),
                                       torch.full((len(every),), label))
        total = found.detach().double().sum(1).exp().sum().item()
        if not abs(total - 1) < 1e-4:
            raise Wrong(f"the probabilities of all {len(every)} images that a tiny tokenizer can "
                        f"express add up to {total:.4g}, expected 1 (label {label})")
