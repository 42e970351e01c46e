"""The usual wrong answers, which graders must reject and properties must notice.

WRONG: task -> {what it does wrong: (a part of the solution, what replaces it) or a text for
the whole blank, the first one if a task has several}"""

WRONG = {
    "01_1": {
        "divides by N / levels": ("count.clamp(min=1)", "(len(x) / levels)"),
        "lets an unused level jump to 0":
            ("torch.where(count > 0, total / count.clamp(min=1), centres)",
             "total / count.clamp(min=1)"),
        "returns after one iteration": ("    return centres", "        return centres"),
    },
    "01_2": {
        "returns the code": ("return x + (code - x).detach()", "return code"),
        "overwrites x":
            ("return x + (code - x).detach()", "x.data = code.data\n    return x"),
        "detaches nothing in the commitment": ("x, code.detach()", "x, code"),
        "takes x_hat for the code": ("mse_loss(code,", "mse_loss(x + code - x.detach(),"),
    },
    "01_3": {
        "swaps decay and 1 - decay": ("hits.lerp_(count, 1 - ", "hits.lerp_(count, "),
        "divides 0 by 0 for an unused code": ("self.hits > 1e-3", "self.hits > -1"),
        "moves only the codes of this batch": ("self.hits > 1e-3", "count > 0"),
        "moves codes that are parameters": ("if self.ema:", "if True:"),
    },
    "01_4": {
        "quantizes x at every round": ("one.nearest(x - x_hat)", "one.nearest(x)"),
        "returns the last code only":
            ("return x_hat, indices", "return one.lookup(indices[-1]), indices"),
        "uses one quantizer only": ("quantizers[:depth]", "quantizers[:1] * depth"),
        "changes x": ("return x_hat", "x -= x_hat\n    return x_hat"),
    },
    "01_property": {
        "is never called": ("    holds()\n", ""),
        "looks at x_hat only": ("idx, quantizer.nearest(x - so_far)", "idx, idx"),
    },
    "02_1": {
        "leaves phi out": ("0.5 * h + 0.5 * self.phis[self.phi_index[k]](h)", "h"),
        "gives every scale a phi of its number": ("self.phi_index[k]", "min(k, 3)"),
        "mixes channels with places":
            ("x.transpose(1, 2).unflatten(2, (self.scales[k], -1))",
             "x.reshape(len(x), -1, self.scales[k], self.scales[k])"),
        "copies vectors instead of enlarging smoothly": ("bicubic", "nearest"),
    },
    "02_2": {
        "quantizes f at every scale": ("f - f_hat.detach() if", "f if"),
        "subtracts the codes without phi":
            ("self._add(k, f_hat, tokens_k)",
             "f_hat + self.upsample_from(self.quantizer.lookup(tokens_k), k)"),
        "lets gradients through what is left over": ("f - f_hat.detach()", "f - f_hat"),
        "detaches the sum so far": ("_add(k, f_hat,", "_add(k, f_hat.detach(),"),
    },
    "02_3": {
        "shows a scale itself": ("pyramid(tokens)[:-1]", "pyramid(tokens)[1:]"),
        "shows the last map only":
            ("self.pyramid(tokens)", "list(map(self.embed, range(self.K), tokens))"),
        "fails with a single scale": ("[empty, *inputs]", "inputs"),
    },
    "02_4": {
        "swaps f and f_hat": ("commitment_loss(f, f_hat)", "commitment_loss(f_hat, f)"),
        "puts beta on both": ("weight * vq.codebook", "weight * beta * vq.codebook"),
        "gives the last scale the weight of the others":
            ("K - coarse * (K - 1) if k == K - 1 else coarse", "coarse"),
    },
    "02_property": {
        "tries one schedule only": ("scales=schedules", "scales=st.just((1, 2, 3))"),
    },
    "03_1": {
        "is a triangle, as for text":
            ("scale[:, None] >= scale[None, :]",
             "torch.ones(len(scale), len(scale)).tril() > 0"),
        "hides a token's own scale": (">=", ">"),
        "compares sides, which need not grow":
            ("scale_of_token(scales)", "torch.tensor(scales)[scale_of_token(scales)]"),
    },
    "03_2": {
        "hides after the softmax": """
            factor = q.shape[-1] ** -0.5 if qk_factor is None else qk_factor
            weights = (factor * q @ k.mT).softmax(-1)
            return (weights if mask is None else weights * mask) @ v
            """,
        "hides by -100":
            ("attn_mask=mask", "attn_mask=None if mask is None else -100 * (~mask).to(q)"),
        "takes a factor of 0 for none": ("scale=qk_factor", "scale=qk_factor or None"),
    },
    "03_3": {
        "attends to its own scale only":
            ("k[:, :, :end], v[:, :, :end]", "k[:, :, begin:end], v[:, :, begin:end]"),
        "attends to all keys": "return attention(q, k, v, qk_factor=qk_factor)",
        "counts the side instead of its square": ("begin + side * side", "begin + side"),
        "computes what the mask then hides":
            "return attention(q, k, v, block_causal_mask(scales), qk_factor)",
    },
    "03_property": {
        "asks only that nothing leaks":
            ("torch.equal(moved > 0, scale >= scale[token])",
             "not moved[scale < scale[token]].any()"),
        "draws scales that grow only":
            ("max_size=4)", "max_size=4).map(lambda sides: sorted(set(sides)))"),
    },
    "04_1": {
        "returns the new ones only": ("self.k[:, :, :end], self.v[:, :, :end]", "k, v"),
        "writes every scale to the beginning":
            ("self.k[:, :, self.filled:end], self.v[:, :, self.filled:end]",
             "self.k[:, :, :k.shape[2]], self.v[:, :, :k.shape[2]]"),
        "returns all memory": ("self.k[:, :, :end], self.v[:, :, :end]", "self.k, self.v"),
        "loses what does not fit": ("assert end <= self.length", "assert True"),
    },
    "04_2": {
        "forgets the 1 of 1 + stretch": ("(1 + stretch1)", "stretch1"),
        "gates x, too": ("x = x + self.drop", "x = x * gate1 + self.drop"),
        "leaves x out of the MLP's input": ("mlp(self.norm(x)", "mlp(self.norm(h)"),
        "never drops a branch": ("self.drop_path(h * gate1)", "h * gate1"),
    },
    "04_3": {
        "counts positions from 0 at every scale": ("begin:end]", ":end - begin]"),
        "forgets the scale embedding": (" + self.scale_embed.weight[k]", ""),
        "makes a new cache at every scale": ("blocks, cache)", "blocks, self.new_cache())"),
        "gives all blocks the cache of the first": ("cache=block_cache", "cache=cache[0]"),
    },
    "04_property": {
        "leaves the gates shut": ("0.3 * torch.randn_like(p)", "0"),
    },
    "05_1": {
        "shifts the targets by one, as a language model does":
            ("tokens.flatten(), reduction", "tokens.roll(-1, 1).flatten(), reduction"),
        "takes the softmax twice": ("(0, 1).float()", "(0, 1).float().softmax(-1)"),
        "computes in the precision of the logits": (".float()", ""),
        "counts ties as right":
            ("logits.argmax(-1) == tokens",
             "logits.gather(-1, tokens[..., None])[..., 0] == logits.amax(-1)"),
    },
    "05_2": {
        "never shuffles": "return np.arange(step * batch, (step + 1) * batch) % n",
        "shuffles every epoch alike": ("(n, seed, epoch)", "(n, seed, 0)"),
        "drops the images that fill no batch":
            ("    epochs =", "    n = n // batch * batch or n\n    epochs ="),
        "gives other images when a step is repeated":
            ("    places =",
             "    asked = globals().setdefault('asked', [])\n"
             "    asked.append((step, n, batch, seed))\n"
             "    seed += 1000 * asked.count(asked[-1])\n    places ="),
    },
    "05_3": {
        "inverts the ratio": ("return", "long, short = short, long\n    return"),
        "keeps a gradient": ("(other, weight, retain_", "(other, weight, create_"),
        "adds to .grad": ("long = ", "other.backward(retain_graph=True)\n    long = "),
        "frees the graph of the adversarial loss":
            ("(adversarial, weight, retain_graph=True)", "(adversarial, weight)"),
    },
    "05_property": {
        "lets two epochs be alike": ("not np.array_equal(first, second) and ", ""),
    },
    "06_1": {
        "drops the token that crosses top_p":
            ("tail <= 1 - top_p", "value.softmax(-1).cumsum(-1) > top_p"),
        "keeps all that equal the last kept":
            ("return torch.full_like(logits, -torch.inf).scatter(-1, order, value)",
             "least = value.nan_to_num(neginf=9).amin(-1, True)\n"
             "    return logits.where(logits >= least, -torch.inf)"),
        "keeps one token too many": ("tail <= 1", "tail.roll(1, -1) <= 1"),
        "cuts every row where the first is cut":
            ("drop[..., 0]", "drop[:] = drop[:1].clone()\n        drop[..., 0]"),
        "returns probabilities": ("value.masked_fill(", "value.softmax(-1).masked_fill("),
        "ignores top_k without top_p": ("if k >= V and not", "if not"),
        "changes the caller's tensor": ("torch.full_like(logits, ", "logits.fill_("),
    },
    "06_2": {
        "guides every scale alike": ("cfg * (k / (K - 1))", "cfg"),
        "swaps the halves": ("* logits[:B] - t[k] * logits[B:]",
                             "* logits[B:] - t[k] * logits[:B]"),
        "counts as u + w (c - u)": ("(1 + t[k]) * logits[:B] - t[k] * logits[B:]",
                                    "logits[B:] + t[k] * (logits[:B] - logits[B:])"),
        "divides by 0 at a single scale": (" if K > 1 else [cfg]", ""),
    },
    "06_3": {
        "averages over positions": ("part.sum(1)", "part.mean(1)"),
        "takes the log of a rounded softmax": ("log_softmax(-1)", "softmax(-1).log()"),
        "asks for no class": ("var(labels, ", "var(labels * 0 + var.config.num_classes, "),
        "shows nothing of coarser maps": ("inputs = ", "inputs = 0 * "),
    },
    "06_property": {
        "tries top-p alone": ("top_k=st.integers(0, 5)", "top_k=st.just(0)"),
        "does not ask that what stays holds top_p": ("p.sum() > top_p - 1e-5 and ", ""),
    },
}
