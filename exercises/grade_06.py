"""Graders of chapter 6."""
import itertools
import math
from importlib import import_module
from types import SimpleNamespace

import torch

from exercises.compare import Wrong, call, case, expect, show
from exercises.grading import judge_property


# -- 06_1 ----------------------------------------------------------------------------------

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
    """got, row (V,): the values that stay are `wanted`, each at its place; all else is -inf."""
    case(logits=row, **inputs)
    stays = got > -math.inf
    if got.isnan().any() or not torch.equal(got[stays], row[stays]):
        raise Wrong(f"keep_likely returns {show(got)}: what stays keeps its value and its place, "
                    "the rest is -inf")
    kept = sorted(got[stays].tolist(), reverse=True)
    if kept != wanted:
        tokens, best = stays.nonzero().flatten().tolist(), row.argsort(descending=True)
        raise Wrong(f"keep_likely keeps tokens {tokens}, {len(tokens)} of {len(row)}; it must "
                    f"keep {len(wanted)}: {sorted(best[:len(wanted)].tolist())}"
                    + (" (or others with equal logits)" if len(set(row.tolist())) < len(row)
                       else "") + ("; the likeliest always stays" if not tokens else ""))


def grade_06_1(chapter):
    plain = torch.tensor([0.5, 3.0, -1.0, 2.0, 1.2])
    ties = torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0, 0.0, 2.0])
    sure = torch.tensor([-200.0, 9.0, -300.0])             # one holds everything
    large = torch.tensor([400.0, 401.0, 399.0, 401.0])     # exp() of these overflows
    for logits in (plain, torch.stack([plain, plain.flip(0)]), ties, sure, large,
                   torch.randn(3, 2, 11), 5 * torch.randn(2, 3, 2, 7)):
        for top_k, top_p in itertools.product((0, 1, 2, 4, 100), (0.0, 1e-9, 0.3, 0.55, 0.9, 1.0)):
            got = call(chapter.keep_likely, logits, top_k, top_p)
            kind = torch.zeros_like(logits)
            expect("keep_likely", kind if torch.is_tensor(got) and got.shape == kind.shape
                   and got.dtype == kind.dtype else got, kind)
            for row, kept in zip(logits.view(-1, logits.shape[-1]), got.view(-1, got.shape[-1])):
                check_row(kept, row, kept_values(row.tolist(), top_k, top_p), top_k=top_k,
                          top_p=top_p)


def grade_06_property(chapter):
    # A few in a thousand small inputs tell the one that need not be noticed.
    judge_property(chapter.property_06, "06_1", unseen=(
        "takes top-p of the distribution before top-k",))


# -- 06_2 ----------------------------------------------------------------------------------

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
        step=lambda k, inputs, conditioning, cache: logits[k][:len(conditioning.row)].clone())
    chapter.sample_tokens(tokenizer, var, torch.arange(B), cfg=cfg)
    return seen


def grade_06_2(chapter):
    B, V = 3, 11
    for K, cfg in ((2, 1.0), (4, 1.5), (3, 4.0), (1, 2.0), (3, [2.0, 0.0, 1.0])):
        t = cfg if isinstance(cfg, list) else [cfg * k / (K - 1) if K > 1 else cfg for k in range(K)]
        case(cfg=cfg, K=K)
        expect("strengths", list(chapter.strengths(cfg, K)), t)
        logits = [torch.randn(2 * B, (k + 1) ** 2, V) for k in range(K)]
        for k, got in enumerate(guided_logits(chapter, logits, cfg, B)):
            cond, uncond = logits[k][:B], logits[k][B:]
            case(cfg=cfg, t=t[k], logit_of_class=cond[0, 0, 0], logit_without=uncond[0, 0, 0])
            # A constant added to all logits of a position changes no probability.
            found = got.log_softmax(-1) if torch.is_tensor(got) else got
            wanted, less = (
                (cond + w * (cond - uncond)).log_softmax(-1) for w in (t[k], t[k] - 1))
            expect(f"log_softmax of the guided logits of scale {k + 1} of {K}", found, wanted,
                   1e-4, slips={"at t = 0 it is the prediction without a class instead of that "
                                "for the class": less})


# -- 06_3 ----------------------------------------------------------------------------------

def random_models(scales, V):
    """A tokenizer and a transformer with random weights, large enough that all matters."""
    vqvae, m4 = import_module("02_multiscale_vqvae"), import_module("04_var_transformer")
    sizes = dict(scales=scales, vocab_size=V, latent_dim=4)
    tokenizer = vqvae.MultiScaleVQVAE(vqvae.TokenizerConfig(
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
        log_p = var.step(k, inputs, conditioning, cache).log_softmax(-1)       # (B, n, V)
        rows = [sum(log_p[b, i, code] for i, code in enumerate(row))
                for b, row in enumerate(tokens_k)]
        found.append(torch.stack(rows))
        f_hat, inputs = tokenizer.next_input(k, f_hat, tokens_k)
    return torch.stack(found, 1)


def grade_06_3(chapter):
    tokenizer, var = random_models((2, 3), 5)
    tokens = [torch.randint(5, (3, n)) for n in (4, 9)]
    labels = torch.tensor([1, 0, 2])                       # 2: no class
    wanted = slow_log_likelihood(tokenizer, var, tokens, labels)
    got = call(chapter.log_likelihood, tokenizer, var, tokens, labels)
    n = torch.tensor([4, 9])
    expect("log_likelihood", 0 * got if torch.is_tensor(got) else got, 0 * wanted)
    slips = {"it is the mean over the positions of a map; probabilities multiply, so their "
             "logarithms are summed": wanted / n, "it is the loss, with the wrong sign": -wanted,
             "it is in bits, not in nats": wanted / math.log(2)}
    if any(torch.allclose(got, value, 1e-4) for value in slips.values()):
        expect("log_likelihood", got, wanted, 1e-4, slips)
    check_sum(chapter, *random_models((1, 2), 3))
    case(labels=labels)
    expect("log_likelihood", got, wanted, 1e-4)
    half = chapter.log_likelihood(tokenizer, var.bfloat16(), tokens, labels)
    expect("log_likelihood of a model in bfloat16", half, wanted, 0.05)
    # Logits far apart: a token of probability e^-200 must not become -inf, nor a rounded 0.
    tokenizer, var = random_models((1, 2), 3)
    var.head.bias.data[1] += 200
    tokens = [torch.zeros(2, n, dtype=torch.int64) for n in (1, 4)]
    labels = torch.tensor([0, 1])
    case(labels=labels, tokens=tokens, note="the logit of code 1 is larger by about 200")
    expect("log_likelihood", chapter.log_likelihood(tokenizer, var, tokens, labels),
           slow_log_likelihood(tokenizer, var, tokens, labels), 1e-4)


def check_sum(chapter, tokenizer, var):
    """Probabilities of all 3^5 images of one token and four."""
    every = torch.tensor(list(itertools.product(range(3), repeat=5)))          # (243, 5)
    for label in (0, 1, 2):
        labels = torch.full((len(every),), label)
        found = chapter.log_likelihood(tokenizer, var, list(every.split([1, 4], 1)), labels)
        total = found.detach().double().sum(1).exp().sum().item()
        if not abs(total - 1) < 1e-4:
            case(label=label)
            raise Wrong(f"the probabilities of all {len(every)} images that a tiny tokenizer can "
                        f"express add up to {total:.7g}, expected 1")
