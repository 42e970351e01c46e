"""Wrong answers to the tasks of chapter 6: name -> (a part of the solution, what replaces it)."""

WRONG = {
    "06_1": {
        "drops the token that crosses top_p":
            ("drop = tail <= 1 - top_p", "drop = value.softmax(-1).cumsum(-1) > top_p"),
        "keeps all that equal the k-th": (
            None, "k = top_k if 0 < top_k < logits.shape[-1] else logits.shape[-1]\n"
                  "least = logits.topk(k).values[..., -1:]\n"
                  "logits = logits.masked_fill(logits < least, -torch.inf)\n"
                  "if not 0 < top_p < 1:\n"
                  "    return logits\n"
                  "value, order = logits.sort(-1, descending=True)\n"
                  "p = value.softmax(-1)\n"
                  "value = value.masked_fill(p.cumsum(-1) - p >= top_p, -torch.inf)\n"
                  "return torch.full_like(logits, -torch.inf).scatter(-1, order, value)\n"),
        "changes the caller's tensor": (
            "torch.full_like(logits, -torch.inf).scatter(-1, order, value)",
            "logits.fill_(-torch.inf).scatter_(-1, order, value)"),
        "does not scatter back": (
            "torch.full_like(logits, -torch.inf).scatter(-1, order, value)",
            "F.pad(value, (0, V - value.shape[-1]), value=-torch.inf)"),
        "sets what is dropped to 0": ("torch.full_like(logits, -torch.inf)",
                                      "torch.zeros_like(logits)"),
        "takes top-p of the distribution before top-k": (
            "value.softmax(-1).flip(-1)", "logits.softmax(-1).gather(-1, order).flip(-1)"),
        "keeps one token too many": (
            "drop[..., 0] = False", "drop = drop.roll(1, -1)\n        drop[..., 0] = False"),
        "loses every token when top_p is tiny": (
            "drop[..., 0] = False", "pass"),
        "takes top-p first, then top-k": (
            None, "value, order = logits.sort(-1, descending=True)\n"
                  "p = value.softmax(-1)\n"
                  "if 0 < top_p < 1:\n"
                  "    value = value.masked_fill(p.cumsum(-1) - p >= top_p, -torch.inf)\n"
                  "if top_k > 0:\n"
                  "    value[..., top_k:] = -torch.inf\n"
                  "return torch.full_like(logits, -torch.inf).scatter(-1, order, value)\n"),
        "mixes the rows of a batch": (
            None, "flat = logits.flatten()\n"
                  "k = min(top_k, len(flat)) if top_k > 0 else len(flat)\n"
                  "value, order = flat.topk(k)\n"
                  "if 0 < top_p < 1:\n"
                  "    p = value.softmax(-1)\n"
                  "    value = value.masked_fill(p.cumsum(-1) - p >= top_p, -torch.inf)\n"
                  "return torch.full_like(flat, -torch.inf).scatter(0, order, value)"
                  ".view(logits.shape)\n"),
        "returns probabilities": (
            "return torch.full_like(logits, -torch.inf).scatter(-1, order, value)",
            "return torch.zeros_like(logits).scatter(-1, order, value.softmax(-1))"),
        "ignores top_p without top_k": (
            "if k >= V and not 0 < top_p < 1:", "if k >= V:"),
    },
    "06_2": {
        "guides every scale alike": ("cfg * (k / max(K - 1, 1))", "cfg"),
        "swaps the halves": ("(1 + t[k]) * logits[:B] - t[k] * logits[B:]",
                             "(1 + t[k]) * logits[B:] - t[k] * logits[:B]"),
        "counts as u + w (c - u)": ("(1 + t[k]) * logits[:B] - t[k] * logits[B:]",
                                    "logits[B:] + t[k] * (logits[:B] - logits[B:])"),
        "moves towards the prediction without a class": (
            "(1 + t[k]) * logits[:B] - t[k] * logits[B:]",
            "(1 - t[k]) * logits[:B] + t[k] * logits[B:]"),
        "guides every scale as the last": ("t[k]) * logits[:B] - t[k]",
                                           "t[-1]) * logits[:B] - t[-1]"),
        "lets the strength fall": ("(k / max(K - 1, 1))", "(1 - k / max(K - 1, 1))"),
        "reaches cfg one scale too late": ("(k / max(K - 1, 1))", "k / K"),
        "takes the last scale's strength at the first": ("(k / max(K - 1, 1))", "(k + 1) / K"),
        "divides by 0 at a single scale": ("max(K - 1, 1)", "(K - 1)"),
        "guides probabilities instead of logits": (
            "(1 + t[k]) * logits[:B] - t[k] * logits[B:]",
            "((1 + t[k]) * logits[:B].softmax(-1) - t[k] * logits[B:].softmax(-1))"
            ".clamp(min=1e-9).log()"),
        "takes turns within the batch": (
            "(1 + t[k]) * logits[:B] - t[k] * logits[B:]",
            "(1 + t[k]) * logits[::2] - t[k] * logits[1::2]"),
        "keeps both halves": (
            "(1 + t[k]) * logits[:B] - t[k] * logits[B:]",
            "torch.cat([(1 + t[k]) * logits[:B] - t[k] * logits[B:], logits[B:]])"),
    },
    "06_3": {
        "hands float32 to a model in half precision": (".to(var.start.dtype)", ""),
        "stays in half precision": (".float()", ""),
        "averages over positions": ("part.sum(1)", "part.mean(1)"),
        "adds up raw logits": ("logits.log_softmax(-1)", "logits"),
        "normalises over positions": ("log_softmax(-1)", "log_softmax(1)"),
        "adds up all scales": (
            "torch.stack([part.sum(1) for part in per_scale], 1)",
            "torch.cat(list(per_scale), 1).sum(1)"),
        "multiplies probabilities": (
            "torch.stack([part.sum(1) for part in per_scale], 1)",
            "torch.stack([part.exp().prod(1) for part in per_scale], 1)"),
        "weighs the likeliest code": ("gather(-1, wanted)[..., 0]", "amax(-1)"),
        "asks for no class": ("var(labels, inputs)",
                              "var(torch.full_like(labels, var.config.num_classes), inputs)"),
        "guides, and so weighs another distribution": (
            None, "inputs = tokenizer.teacher_inputs(tokens).to(var.start.dtype)\n"
                  "nobody = torch.full_like(labels, var.config.num_classes)\n"
                  "logits = (2 * var(labels, inputs) - var(nobody, inputs)).float()\n"
                  "wanted = torch.cat(tokens, 1)[..., None]\n"
                  "each = logits.log_softmax(-1).gather(-1, wanted)[..., 0]\n"
                  "per_scale = each.split([tokens_k.shape[1] for tokens_k in tokens], 1)\n"
                  "return torch.stack([part.sum(1) for part in per_scale], 1)\n"),
        "compares with no class": (
            None, "inputs = tokenizer.teacher_inputs(tokens).to(var.start.dtype)\n"
                  "wanted, each = torch.cat(tokens, 1)[..., None], 0\n"
                  "for sign, who in ((1, labels), (-1, torch.full_like(labels, 2))):\n"
                  "    p = var(who, inputs).float().log_softmax(-1)\n"
                  "    each = each + sign * p.gather(-1, wanted)[..., 0]\n"
                  "per_scale = each.split([tokens_k.shape[1] for tokens_k in tokens], 1)\n"
                  "return torch.stack([part.sum(1) for part in per_scale], 1)\n"),
        "shows nothing of coarser maps": (
            "tokenizer.teacher_inputs(tokens)",
            "torch.zeros_like(tokenizer.teacher_inputs(tokens))"),
        "shifts the tokens by one": ("torch.cat(tokens, 1)[..., None]",
                                     "torch.cat(tokens, 1).roll(-1, 1)[..., None]"),
        "counts in bits": ("part.sum(1) for", "part.sum(1) / 0.6931472 for"),
        "returns the loss, which is negative": ("part.sum(1) for", "-part.sum(1) for"),
    },
    "06_property": {
        "never calls what it defines": ("    holds()\n", ""),
        "tries top-k alone": ("st.sampled_from([0.0, 1e-9, 0.3, 0.5, 0.7, 0.9])", "st.just(0.0)"),
        "tries top-p alone": ("top_k=st.integers(0, 5)", "top_k=st.just(0)"),
        "does not ask that those who stay hold top_p": ("p.sum() > top_p - 1e-5 and ", ""),
    },
}
