"""Graders of chapter 6."""
import itertools
import math
from importlib import import_module
from types import SimpleNamespace

import torch

from exercises.compare import Wrong, call, case, expect, expect_like, random_var, show
from exercises.properties import small_tokenizer


def kept_values(row, top_k, top_p):
    """What must stay of a row, likeliest first: a list of floats."""
    kept = sorted(row, reverse=True)[:top_k or len(row)]
    if not 0 < top_p < 1:
        return kept
    total, held = sum(math.exp(x - kept[0]) for x in kept), 0.0
    for count, x in enumerate(kept, 1):
        held += math.exp(x - kept[0]) / total
        if held >= top_p:
            break
    return kept[:count]


def check_row(got, row, wanted, **inputs):
    """got, row (V,): only `wanted` must stay, each in its place; the rest is -inf."""
    case(logits=row, **inputs)
    stays = got > -math.inf
    if got.isnan().any() or not torch.equal(got[stays], row[stays]):
        raise Wrong(f"keep_likely returns {show(got)}: what stays keeps its value and its "
                    "place, the rest is -inf")
    if sorted(got[stays].tolist(), reverse=True) != wanted:
        tokens, n = stays.nonzero().flatten().tolist(), len(wanted)
        best = sorted(row.argsort(descending=True)[:n].tolist())
        raise Wrong(f"keep_likely keeps {len(tokens)} token(s), {tokens}; it must keep "
                    f"{n}, {best} (or others with equal logits)")


def grade_06_1(chapter):
    plain = torch.tensor([0.5, 3.0, -1.0, 2.0, 1.2])
    ties = torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0, 0.0, 2.0])
    sure = torch.tensor([-200.0, 9.0, -300.0])             # one holds everything
    large = torch.tensor([400.0, 401.0, 399.0, 401.0])     # exp() of these overflows
    rows = [row[None] for row in (plain, ties, torch.zeros(4), sure, large)]
    limits = list(itertools.product((0, 1, 2, 4, 100), (0.0, 1e-9, 0.3, 0.5, 0.9, 1.0)))
    for logits in (*rows, torch.stack([plain, plain.flip(0)]), torch.randn(3, 2, 11),
                   5 * torch.randn(2, 3, 2, 7)):
        for top_k, top_p in limits:
            got = call(chapter.keep_likely, logits, top_k, top_p)
            expect_like("keep_likely", got, logits)
            for row, kept in zip(logits.flatten(0, -2), got.flatten(0, -2)):
                wanted = kept_values(row.tolist(), top_k, top_p)
                check_row(kept, row, wanted, top_k=top_k, top_p=top_p)


def guided_logits(chapter, logits, cfg, B):
    """Run the loop of chapter 6 on a model that returns these logits, one tensor per scale.
    -> what the loop hands to keep_likely"""
    seen = []

    def keep_likely(guided, top_k, top_p):
        seen.append(guided)
        return torch.zeros(B, guided.shape[1], guided.shape[2])

    chapter.keep_likely = keep_likely
    tokenizer = SimpleNamespace(K=len(logits), next_input=lambda k, f_hat, tokens_k: (
        f_hat, torch.zeros(B, 1, 1)))
    var = SimpleNamespace(
        config=SimpleNamespace(num_classes=4), new_cache=list,
        head=SimpleNamespace(weight=torch.zeros(1)),
        conditioning=lambda labels: SimpleNamespace(row=torch.zeros(len(labels))),
        step=lambda k, inputs, conditioning, cache: logits[k][:len(conditioning.row)])
    chapter.sample_tokens(tokenizer, var, torch.arange(B), cfg=cfg)
    return seen


def grade_06_2(chapter):
    B, V = 3, 11
    for K, cfg, t in ((2, 1.0, [0.0, 1.0]), (4, 1.5, [0.0, 0.5, 1.0, 1.5]), (1, 2.0, [2.0]),
                      (3, 4.0, [0.0, 2.0, 4.0]), (3, [2.0, 0.0, 1.0], [2.0, 0.0, 1.0])):
        case(cfg=cfg, K=K)
        found = torch.tensor([float(x) for x in chapter.strengths(cfg, K)])
        expect("strengths", found, torch.tensor(t))
        logits = [50 * torch.randn(2 * B, (k + 1) ** 2, V) for k in range(K)]    # far apart
        for k, got in enumerate(guided_logits(chapter, logits, cfg, B)):
            c, u = logits[k].chunk(2)
            case(cfg=cfg, t=t[k], class_logit=c[0, 0, 0], no_class_logit=u[0, 0, 0])
            # A constant added to all logits of a position changes no probability.
            expect(f"log_softmax of the guided logits of scale {k + 1} of {K}",
                   got.log_softmax(-1), (c + t[k] * (c - u)).log_softmax(-1), 1e-4, slips={
                       "with t = 0 it is the prediction without a class; it must be that "
                       "for the class": (u + t[k] * (c - u)).log_softmax(-1)})


def slow_log_likelihood(tokenizer, var, tokens, labels):
    """Scale by scale, as sampling meets them. -> (B, K)"""
    conditioning, cache = var.conditioning(labels), var.new_cache()
    f_hat, inputs, found = 0, None, torch.zeros(len(labels), len(tokens))
    for k, tokens_k in enumerate(tokens):
        log_p = var.step(k, inputs, conditioning, cache).log_softmax(-1)       # (B, n, V)
        for b, row in enumerate(tokens_k):
            found[b, k] = sum(log_p[b, i, code] for i, code in enumerate(row))
        f_hat, inputs = tokenizer.next_input(k, f_hat, tokens_k)
    return found


@torch.no_grad()
def grade_06_3(chapter):
    labels, scales = torch.tensor([1, 0, 2]), (2, 3)       # 2: no class
    tokenizer = small_tokenizer(import_module("02_multiscale_vqvae"), scales)
    var = random_var(import_module("04_var_transformer"), scales, vocab_size=8,
                     latent_dim=3, num_classes=2, depth=2, width=16, heads=2)
    tokens = [torch.randint(1, 8, (3, n)) for n in (4, 9)]
    # Beside a code that holds nearly everything, others are improbable, but not -inf.
    for larger in (0, 200):
        var.head.bias.data[0] += larger
        wanted = slow_log_likelihood(tokenizer, var, tokens, labels)
        got = call(chapter.log_likelihood, tokenizer, var, tokens, labels)
        case(labels=labels, tokens=tokens, added_to_logit_0=larger)
        expect("log_likelihood", got, wanted, 1e-4, slips={
            "it is the mean over positions": wanted / torch.tensor([4., 9.])})
    half = chapter.log_likelihood(tokenizer, var.bfloat16(), tokens, labels)
    expect("log_likelihood of a model in bfloat16", half, wanted, 0.05)
