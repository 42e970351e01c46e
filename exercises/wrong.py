"""The usual wrong answers, which the graders must reject and a property must notice.

WRONG: task -> {what it does wrong: either (a part of the solution, what replaces it) or the
text of the whole blank, the first one if a task has several}"""

WRONG = {
    # -- Chapter 1 -------------------------------------------------------------------------
    "01_1": {
        "divides by N / levels instead of the count":
            ("total / count.clamp(min=1)", "total / (len(x) / levels)"),
        "lets an unused level jump to 0":
            ("torch.where(count > 0, total / count.clamp(min=1), centres)",
             "total / count.clamp(min=1)"),
        "assigns the numbers once, before the loop": """
            idx = round_to(x, centres)
            for _ in range(iterations):
                total = torch.zeros(levels).index_add_(0, idx, x)
                count = torch.bincount(idx, minlength=levels)
                centres = torch.where(count > 0, total / count.clamp(min=1), centres)
            return centres
            """,
        "returns after the first iteration": ("    return centres", "        return centres"),
    },
    "01_2": {
        "returns the code": ("return x + (code - x).detach()", "return code"),
        "overwrites x": ("return x + (code - x).detach()", "x.data = code.data\n    return x"),
        "detaches nothing in the commitment":
            ("F.mse_loss(x, code.detach())", "F.mse_loss(x, code)"),
        "detaches x in the commitment":
            ("F.mse_loss(x, code.detach())", "F.mse_loss(x.detach(), code)"),
        "takes the loss behind straight_through":
            ("F.mse_loss(code, x.detach())",
             "F.mse_loss(straight_through(x, code), x.detach())"),
    },
    "01_3": {
        "swaps decay and 1 - decay":
            ("self.hits.lerp_(count, 1 - self.decay)", "self.hits.lerp_(count, self.decay)"),
        "divides 0 by 0 for an unused code":
            ("self.codebook[used] = self.sums[used] / self.hits[used, None]",
             "self.codebook.copy_(self.sums / self.hits[:, None])"),
        "averages the codes, not the sums and the counts": """
            self.hits.lerp_(count, 1 - self.decay)
            self.sums.lerp_(total, 1 - self.decay)
            if self.ema:
                used = count > 0
                mean = total[used] / count[used, None]
                self.codebook[used] = self.codebook[used].lerp(mean, 1 - self.decay)
            """,
        "moves codes that are parameters": ("if self.ema:", "if True:"),
    },
    "01_4": {
        "quantizes x at every round": ("one.nearest(x - x_hat)", "one.nearest(x)"),
        "returns the last code only": ("x_hat = x_hat + one", "x_hat = one"),
        "uses the first quantizer at every round":
            ("quantizers[:depth]", "quantizers[:1] * depth"),
        "changes x": """
            indices, start = [], x.clone()
            for one in quantizers[:depth]:
                indices.append(one.nearest(x))
                x -= one.lookup(indices[-1])
            return start - x, indices
            """,
    },
    "01_property": {
        "is never called": ("    holds()\n", ""),
        "looks at x_hat only":
            ("            assert torch.equal(idx, quantizer.nearest(x - so_far))\n", ""),
        "expects x_hat to be x": ("torch.allclose(x_hat, so_far", "torch.allclose(x_hat, x"),
    },
    # -- Chapter 2 -------------------------------------------------------------------------
    "02_1": {
        "leaves phi out": ("0.5 * h + 0.5 * self.phis[self.phi_index[k]](h)", "h"),
        "gives every scale a phi of its number":
            ("self.phis[self.phi_index[k]]", "self.phis[min(k, len(self.phis) - 1)]"),
        "mixes channels with places": ("x.transpose(1, 2).unflatten(2, (self.scales[k], -1))",
                                       "x.reshape(len(x), -1, self.scales[k], self.scales[k])"),
        "copies vectors instead of enlarging smoothly": ("bicubic", "nearest"),
    },
    "02_2": {
        "quantizes f at every scale":
            ("f - f_hat.detach() if self.config.residual else f", "f"),
        "takes away the codes without phi":
            ("self._add(k, f_hat, tokens_k)",
             "f_hat + self.upsample_from(self.quantizer.lookup(tokens_k), k)"),
        "lets gradients through what is left over": ("f - f_hat.detach()", "f - f_hat"),
        "detaches the sum so far":
            ("self._add(k, f_hat, tokens_k)", "self._add(k, f_hat.detach(), tokens_k)"),
        "yields nothing": "yield",
    },
    "02_3": {
        "shows a scale itself": ("self.pyramid(tokens)[:-1]", "self.pyramid(tokens)[1:]"),
        "shows the last map only":
            ("self.pyramid(tokens)[:-1]", "list(map(self.embed, range(self.K), tokens))[:-1]"),
        "shows the finished f_hat to every scale":
            ("self.pyramid(tokens)[:-1]", "[self.features(tokens)] * (self.K - 1)"),
        "fails with a single scale":
            ("torch.cat([empty, *inputs], dim=1)", "torch.cat(inputs, dim=1)"),
    },
    "02_4": {
        "swaps f and f_hat":
            ("vq.commitment_loss(f, f_hat)", "vq.commitment_loss(f_hat, f)"),
        "puts beta on both":
            ("loss + weight * vq.codebook_loss",
             "loss + weight * beta * vq.codebook_loss"),
        "gives the last scale the weight of the others":
            ("K - coarse * (K - 1) if k == K - 1 else coarse", "coarse"),
        "compares x with its codes instead of f with f_hat": """
            weight = K - coarse * (K - 1) if k == K - 1 else coarse
            codes = self.quantizer.lookup(tokens_k)
            loss = loss + weight * beta * vq.commitment_loss(x, codes)
            loss = loss + weight * vq.codebook_loss(x, codes)
            """,
    },
    "02_property": {
        "is never called": ("    holds()\n", ""),
        "compares shapes only":
            ("        assert torch.allclose(inputs, expected, atol=1e-5)\n", ""),
        "tries one schedule only": ("scales=schedules", "scales=st.just((1, 2, 3))"),
    },
    # -- Chapter 3 -------------------------------------------------------------------------
    "03_1": {
        "is a triangle, as for text": """
            L = sum(side * side for side in scales)
            return torch.ones(L, L).tril().bool()
            """,
        "hides a token's own scale": (">=", ">"),
        "lets coarse tokens attend to finer ones": (">=", "<="),
        "compares sides, which need not grow": """
            side = torch.tensor([side for side in scales for _ in range(side * side)])
            return side[:, None] >= side[None, :]
            """,
    },
    "03_2": {
        "hides after the softmax, so that the weights add up to less than 1": """
            factor = q.shape[-1] ** -0.5 if qk_factor is None else qk_factor
            weights = (factor * q @ k.transpose(-2, -1)).softmax(-1)
            weights = weights if mask is None else weights * mask
            return weights @ v
            """,
        "sets hidden scores to 0 instead of minus infinity": """
            factor = q.shape[-1] ** -0.5 if qk_factor is None else qk_factor
            scores = factor * q @ k.transpose(-2, -1)
            scores = scores if mask is None else scores * mask
            return scores.softmax(-1) @ v
            """,
        "hides a score by -100, which another may be, too": """
            factor = q.shape[-1] ** -0.5 if qk_factor is None else qk_factor
            scores = factor * q @ k.transpose(-2, -1)
            scores = scores if mask is None else scores.masked_fill(~mask, -100)
            return scores.softmax(-1) @ v
            """,
        "takes a factor of 0 for none": """
            factor = qk_factor or q.shape[-1] ** -0.5
            scores = factor * q @ k.transpose(-2, -1)
            scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
            return scores.softmax(-1) @ v
            """,
    },
    "03_3": {
        "attends to its own scale only":
            ("k[:, :, :end], v[:, :, :end]", "k[:, :, begin:end], v[:, :, begin:end]"),
        "attends to all keys": "return attention(q, k, v, qk_factor=qk_factor)\n",
        "counts the side instead of its square": ("begin + side * side", "begin + side"),
        "computes what the mask then hides":
            "return attention(q, k, v, block_causal_mask(scales), qk_factor)\n",
        "computes the queries of earlier scales again": """
            outputs, begin = [], 0
            for side in scales:
                end = begin + side * side
                rows = attention(q[:, :, :end], k[:, :, :end], v[:, :, :end], None, qk_factor)
                outputs.append(rows[:, :, begin:])
                begin = end
            return torch.cat(outputs, dim=2)
            """,
        "drops the caller's factor": ("values, qk_factor=qk_factor", "values"),
    },
    "03_property": {
        "is never called": ("    holds()\n", ""),
        "asks only that nothing leaks": ("torch.equal(moved > 0, scale >= scale[token])",
                                         "not moved[scale < scale[token]].any()"),
        "draws scales that grow only":
            ("max_size=4)", "max_size=4).map(lambda sides: sorted(set(sides)))"),
    },
    # -- Chapter 4 -------------------------------------------------------------------------
    "04_1": {
        "returns the new keys and values only":
            ("return self.k[:, :, :end], self.v[:, :, :end]", "return k, v"),
        "writes every scale to the beginning":
            ("self.k[:, :, self.filled:end], self.v[:, :, self.filled:end] = k, v",
             "self.k[:, :, :k.shape[2]], self.v[:, :, :k.shape[2]] = k, v"),
        "returns all of its memory, also what is not written yet":
            ("return self.k[:, :, :end], self.v[:, :, :end]", "return self.k, self.v"),
        "loses what does not fit": ("assert end <= self.length", "assert True"),
    },
    "04_2": {
        "forgets the 1 of 1 + stretch":
            ("self.norm(x) * (1 + stretch1)", "self.norm(x) * stretch1"),
        "gates the sum instead of the branch":
            ("x = x + self.drop_path(h * gate1)", "x = (x + self.drop_path(h)) * gate1"),
        "feeds the MLP the attention's output without x":
            ("self.mlp(self.norm(x)", "self.mlp(self.norm(h)"),
        "never drops a branch": ("self.drop_path(h * gate1)", "h * gate1"),
    },
    "04_3": {
        "counts positions from 0 at every scale":
            ("self.position[:, begin:end]", "self.position[:, :end - begin]"),
        "forgets the scale embedding": ("x + self.scale_embed.weight[k] + ", "x + "),
        "adds the class to the inputs of every scale":
            ("else self.word_embed(inputs)", "else self.word_embed(inputs) + conditioning.row"),
        "makes a new cache at every scale":
            ("conditioning.blocks, cache)", "conditioning.blocks, self.new_cache())"),
        "gives all blocks the cache of the first": ("cache=block_cache", "cache=cache[0]"),
    },
    "04_property": {
        "is never called": ("    holds()\n", ""),
        "leaves the gates shut and the head near zero": ("0.3 * torch.randn_like(p)", "0"),
        "demands equality to the last bit":
            ("torch.allclose(got, want[:, begin:end], rtol=1e-3, atol=1e-3)",
             "torch.equal(got, want[:, begin:end])"),
    },
    # -- Chapter 5 -------------------------------------------------------------------------
    "05_1": {
        "shifts the targets by one, as a language model does":
            ("tokens.flatten(), reduction", "tokens.roll(-1, 1).flatten(), reduction"),
        "takes the softmax twice":
            ("logits.flatten(0, 1).float()", "logits.flatten(0, 1).float().softmax(-1)"),
        "takes the logarithm of a rounded softmax": """
            with torch.no_grad():
                maps = list(tokens.split([side * side for side in tokenizer.scales], 1))
                inputs = tokenizer.teacher_inputs(maps)
            logits = model(labels, inputs).float()
            p = logits.softmax(-1).gather(-1, tokens[..., None])[..., 0]
            return -(p + 1e-9).log(), logits.argmax(-1) == tokens
            """,
        "counts ties as right":
            ("logits.argmax(-1) == tokens",
             "logits.gather(-1, tokens[..., None])[..., 0] == logits.amax(-1)"),
    },
    "05_2": {
        "never shuffles": "return np.arange(step * batch, (step + 1) * batch) % n\n",
        "shuffles every epoch alike":
            ("epoch_order(n, seed, epoch)", "epoch_order(n, seed, 0)"),
        "drops the tail of an epoch": """
            epoch, place = divmod(step, n // batch)
            return epoch_order(n, seed, epoch)[place * batch:(place + 1) * batch]
            """,
        "uses a running random state": """
            return np.random.permutation(n)[:batch]
            """,
        "shuffles anew at every step": """
            return np.random.default_rng([seed, step]).permutation(n)[:batch]
            """,
    },
    "05_3": {
        "inverts the ratio":
            ("long.norm() / (short.norm() + 1e-4)", "short.norm() / (long.norm() + 1e-4)"),
        "lets gradients flow through the weight": """
            long = torch.autograd.grad(other, weight, create_graph=True)[0]
            short = torch.autograd.grad(adversarial, weight, create_graph=True)[0]
            return (long.norm() / (short.norm() + 1e-4)).clamp(max=1e4)
            """,
        "clears .grad": """
            other.backward(retain_graph=True)
            long, weight.grad = weight.grad, None
            adversarial.backward(retain_graph=True)
            short, weight.grad = weight.grad, None
            return (long.norm() / (short.norm() + 1e-4)).clamp(max=1e4)
            """,
        "frees the graph of the adversarial loss":
            ("torch.autograd.grad(adversarial, weight, retain_graph=True)",
             "torch.autograd.grad(adversarial, weight)"),
    },
    "05_property": {
        "is never called": ("    holds()\n", ""),
        "lets two epochs be alike": ("not np.array_equal(first, second) and ", ""),
        "draws batches of one image only": ("batch=st.integers(1, 25)", "batch=st.just(1)"),
    },
    # -- Chapter 6 -------------------------------------------------------------------------
    "06_1": {
        "drops the token that crosses top_p":
            ("drop = tail <= 1 - top_p", "drop = value.softmax(-1).cumsum(-1) > top_p"),
        "keeps all that equal the k-th": """
            k = top_k if 0 < top_k < logits.shape[-1] else logits.shape[-1]
            logits = logits.masked_fill(logits < logits.topk(k)[0][..., -1:], -torch.inf)
            if not 0 < top_p < 1:
                return logits
            value, order = logits.sort(-1, descending=True)
            p = value.softmax(-1)
            value = value.masked_fill(p.cumsum(-1) - p >= top_p, -torch.inf)
            return torch.full_like(logits, -torch.inf).scatter(-1, order, value)
            """,
        "changes the caller's tensor":
            ("torch.full_like(logits, -torch.inf).scatter(-1, order, value)",
             "logits.fill_(-torch.inf).scatter_(-1, order, value)"),
        "takes top-p of the distribution before top-k":
            ("value.softmax(-1).flip(-1)", "logits.softmax(-1).gather(-1, order).flip(-1)"),
    },
    "06_2": {
        "guides every scale alike": ("cfg * (k / (K - 1))", "cfg"),
        "swaps the halves": ("(1 + t[k]) * logits[:B] - t[k] * logits[B:]",
                             "(1 + t[k]) * logits[B:] - t[k] * logits[:B]"),
        "counts as u + w (c - u)": ("(1 + t[k]) * logits[:B] - t[k] * logits[B:]",
                                    "logits[B:] + t[k] * (logits[:B] - logits[B:])"),
        "divides by 0 at a single scale": (" if K > 1 else [cfg]", ""),
    },
    "06_3": {
        "averages over positions": ("part.sum(1)", "part.mean(1)"),
        "adds up raw logits": ("logits.log_softmax(-1)", "logits"),
        "takes the logarithm of a rounded softmax":
            ("logits.log_softmax(-1)", "logits.softmax(-1).log()"),
        "asks for no class":
            ("var(labels, inputs)",
             "var(torch.full_like(labels, var.config.num_classes), inputs)"),
        "shows nothing of coarser maps":
            ("tokenizer.teacher_inputs(tokens)", "0 * tokenizer.teacher_inputs(tokens)"),
    },
    "06_property": {
        "is never called": ("    holds()\n", ""),
        "tries top-p alone": ("top_k=st.integers(0, 5)", "top_k=st.just(0)"),
        "does not ask that those who stay hold top_p": ("p.sum() > top_p - 1e-5 and ", ""),
    },
}
