"""Wrong answers to the tasks of chapter 1: what it does wrong -> (a part of the solution, what
replaces it); None stands for the whole blank."""

WRONG = {
    "01_1": {
        "divides by N / levels instead of the count":
            ("total / count.clamp(min=1)", "total / (len(x) / levels)"),
        "lets an unused level jump to 0":
            ("torch.where(count > 0, total / count.clamp(min=1), centres)",
             "total / count.clamp(min=1)"),
        "divides 0 by 0 for an unused level":
            ("torch.where(count > 0, total / count.clamp(min=1), centres)", "total / count"),
        "assigns the numbers once, before the loop":
            (None, "idx = round_to(x, centres)\n"
                   "for _ in range(iterations):\n"
                   "    total = torch.zeros(levels).index_add_(0, idx, x)\n"
                   "    count = torch.bincount(idx, minlength=levels)\n"
                   "    centres = torch.where(count > 0, total / count.clamp(min=1), centres)\n"
                   "return centres\n"),
        "returns after the first iteration": ("    return centres", "        return centres"),
        "has no count for the last levels where they are unused": (", minlength=levels", ""),
        "moves levels to the median":
            (None, "for _ in range(iterations):\n"
                   "    idx = round_to(x, centres)\n"
                   "    centres = torch.stack([x[idx == i].median() if (idx == i).any() else c\n"
                   "                           for i, c in enumerate(centres)])\n"
                   "return centres\n"),
    },
    "01_2": {
        "returns the code": ("return x + (code - x).detach()", "return code"),
        "returns the code without any gradient":
            ("return x + (code - x).detach()", "return code.detach()"),
        "sends the gradient to the code": ("x + (code - x).detach()", "code + (x - x.detach())"),
        "detaches nothing in straight_through": ("(code - x).detach()", "(code - x)"),
        "returns x": ("x + (code - x).detach()", "x + (code - code).detach()"),
        "detaches nothing in the commitment": ("F.mse_loss(x, code.detach())",
                                               "F.mse_loss(x, code)"),
        "detaches x in the commitment": ("F.mse_loss(x, code.detach())",
                                         "F.mse_loss(x.detach(), code)"),
        "multiplies the codebook loss by beta": ("F.mse_loss(code, x.detach())",
                                                 "0.25 * F.mse_loss(code, x.detach())"),
        "sums over channels": ("F.mse_loss(code, x.detach())",
                               "(code - x.detach()).square().sum(-1).mean()"),
        "takes the loss behind straight_through":
            ("F.mse_loss(code, x.detach())", "F.mse_loss(straight_through(x, code), x.detach())"),
    },
    "01_3": {
        "swaps decay and 1 - decay":
            ("torch.where(good, self.count, self.hits), 1 - self.decay",
             "torch.where(good, self.count, self.hits), self.decay"),
        "divides 0 by 0 for an unused code":
            (None, "self.hits.lerp_(torch.where(good, self.count, self.hits), 1 - self.decay)\n"
                   "self.sums.lerp_(torch.where(good, self.total, self.sums), 1 - self.decay)\n"
                   "if self.learn == 'ema' and good:\n"
                   "    self.codebook.copy_(self.sums / self.hits[:, None])\n"),
        "averages the codes, not the sums and the counts":
            (None, "if good:\n"
                   "    self.hits.lerp_(self.count, 1 - self.decay)\n"
                   "    self.sums.lerp_(self.total, 1 - self.decay)\n"
                   "    if self.learn == 'ema':\n"
                   "        used = self.count > 0\n"
                   "        mean = self.total[used] / self.count[used, None]\n"
                   "        self.codebook[used] = self.codebook[used].lerp(mean, 1 - self.decay)\n"),
        "learns from a step that was not accepted":
            ("torch.where(good, self.count, self.hits)", "self.count"),
        "moves codes that are parameters": ('if self.learn == "ema":', "if True:"),
        "keeps the last step only":
            (None, "if good:\n"
                   "    self.hits.copy_(self.count)\n"
                   "    self.sums.copy_(self.total)\n"
                   "    used = self.hits > 0\n"
                   "    if self.learn == 'ema':\n"
                   "        self.codebook[used] = self.sums[used] / self.hits[used, None]\n"),
        "divides by the count of this step":
            ("self.sums / self.hits.clamp(min=1e-3)[:, None]",
             "self.sums / self.count.clamp(min=1e-3)[:, None]"),
        "divides by at least 1": ("self.hits.clamp(min=1e-3)", "self.hits.clamp(min=1)"),
        "forgets the codebook": (None, "if good:\n"
                                       "    self.hits.lerp_(self.count, 1 - self.decay)\n"
                                       "    self.sums.lerp_(self.total, 1 - self.decay)\n"),
    },
    "01_4": {
        "quantizes x at every round": ("one.nearest(x - x_hat)", "one.nearest(x)"),
        "returns the last code only": ("x_hat = x_hat + one", "x_hat = one"),
        "returns what is left": ("return x_hat, indices", "return x - x_hat, indices"),
        "returns the last index only": ("return x_hat, indices", "return x_hat, indices[-1:]"),
        "adds the sum so far instead of subtracting it": ("x - x_hat", "x + x_hat"),
        "uses the first quantizer at every round":
            ("quantizers[:depth]", "quantizers[:1] * depth"),
        "changes x": (None, "indices, start = [], x.clone()\n"
                            "for one in quantizers[:depth]:\n"
                            "    indices.append(one.nearest(x))\n"
                            "    x -= one.lookup(indices[-1])\n"
                            "return start - x, indices\n"),
        "goes one round too far": ("quantizers[:depth]", "[*quantizers[:depth], quantizers[-1]]"),
    },
    "01_property": {
        "is never called": ("    holds()\n", ""),
        "counts the indices only": (None, "x = torch.randn(3, 2)\n"
                                          "book = chapter.VectorQuantizer(4, 2)\n"
                                          "found = chapter.residual_quantize(x, book, 3)[1]\n"
                                          "assert len(found) == 3\n"),
        "looks at x_hat only": ("            assert torch.equal(idx, quantizer.nearest(x - so_far))\n", ""),
        "looks at the indices only": ("        assert torch.allclose(x_hat, so_far, atol=1e-6)\n", ""),
        "expects x_hat to be x": ("torch.allclose(x_hat, so_far", "torch.allclose(x_hat, x"),
    },
}
