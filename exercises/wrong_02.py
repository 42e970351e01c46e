"""Wrong answers to the tasks of chapter 2: what it does wrong -> (a part of the solution, what
replaces it); None stands for the whole blank."""

WRONG = {
    "02_1": {
        "leaves phi out": ("0.5 * h + 0.5 * self.phis[self.phi_index[k]](h)", "h"),
        "replaces the map by what phi makes of it":
            ("0.5 * h + 0.5 * self.phis[self.phi_index[k]](h)", "self.phis[self.phi_index[k]](h)"),
        "adds phi to the whole map": ("0.5 * h + 0.5 *", "h +"),
        "gives every scale a phi of its number": ("self.phis[self.phi_index[k]]",
                                                  "self.phis[min(k, len(self.phis) - 1)]"),
        "applies phi before it enlarges":
            ("        h = self.upsample_from(z, k)\n"
             "        return 0.5 * h + 0.5 * self.phis[self.phi_index[k]](h)\n",
             "        side = self.scales[k]\n"
             "        h = z.transpose(1, 2).unflatten(2, (side, side))\n"
             "        h = 0.5 * h + 0.5 * self.phis[self.phi_index[k]](h)\n"
             "        return self.upsample_from(h.flatten(2).transpose(1, 2), k)\n"),
        "mixes channels with places": ("x.transpose(1, 2).unflatten(2, (self.scales[k], self.scales[k]))",
                                       "x.reshape(len(x), -1, self.scales[k], self.scales[k])"),
        "swaps rows and columns": ("U.t() @ x @ U if", "(U.t() @ x @ U).transpose(2, 3) if"),
        "copies vectors instead of enlarging smoothly":
            ("U.t() @ x @ U if k < self.K - 1 else x",
             "F.interpolate(x, size=self.scales[-1:] * 2, mode='nearest')"),
        "swaps U and its transpose": ("U.t() @ x @ U", "U @ x @ U.t()"),
    },
    "02_2": {
        "yields nothing": (None, "yield"),
        "quantizes f at every scale": ("f - f_hat.detach() if self.config.residual else f", "f"),
        "takes away the codes without phi":
            ("self._add(k, f_hat, tokens_k)",
             "f_hat + self.upsample_from(self.quantizer.lookup(tokens_k), k)"),
        "takes away the last scale only": ("f_hat = self._add(k, f_hat, tokens_k)",
                                           "f_hat = self.embed(k, tokens_k)"),
        "lets gradients through what is left over": ("f - f_hat.detach()", "f - f_hat"),
        "detaches the sum so far": ("self._add(k, f_hat, tokens_k)",
                                    "self._add(k, f_hat.detach(), tokens_k)"),
        "detaches f as well": ("f - f_hat.detach()", "(f - f_hat).detach()"),
        "yields f_hat of the scale before":
            ("            f_hat = self._add(k, f_hat, tokens_k)\n"
             "            yield x, tokens_k, f_hat\n",
             "            yield x, tokens_k, f_hat\n"
             "            f_hat = self._add(k, f_hat, tokens_k)\n"),
        "yields the codes instead of the vectors": ("yield x,", "yield self.quantizer.lookup(tokens_k),"),
        "stops after the first scale": ("            yield x, tokens_k, f_hat",
                                        "            yield x, tokens_k, f_hat\n            return"),
        "adds where it should subtract": ("f - f_hat.detach()", "f + f_hat.detach()"),
        "picks single cells instead of means of areas":
            ("self.downsample_to(target, k)",
             "F.interpolate(target, size=self.scales[k:k + 1] * 2).flatten(2).transpose(1, 2)"),
        "changes the f_hat that it yielded":
            ("f_hat = self._add(k, f_hat, tokens_k)", "f_hat += self.embed(k, tokens_k)"),
        "returns instead of yielding": ("yield x,", "return x,"),
        "yields a constant x": ("yield x,", "yield x.detach(),"),
        "yields a constant f_hat": ("yield x, tokens_k, f_hat", "yield x, tokens_k, f_hat.detach()"),
    },
    "02_3": {
        "shows a scale itself": ("self.pyramid(tokens)[:-1]", "self.pyramid(tokens)[1:]"),
        "shows the last map only":
            ("self.pyramid(tokens)[:-1]",
             "[self.embed(k, tokens_k) for k, tokens_k in enumerate(tokens)][:-1]"),
        "shows f_hat at its own size": ("self.downsample_to(f_hat, k + 1)",
                                        "self.downsample_to(f_hat, k)"),
        "shows the finished f_hat to every scale": ("self.pyramid(tokens)[:-1]",
                                                    "[self.features(tokens)] * (self.K - 1)"),
        "fails with a single scale": ("torch.cat([empty, *shown], dim=1)", "torch.cat(shown, dim=1)"),
        "joins along the batch": ("torch.cat([empty, *shown], dim=1)", "torch.cat([empty, *shown])"),
        "is one scale late": ("self.pyramid(tokens)[:-1]",
                              "[0 * self.features(tokens), *self.pyramid(tokens)[:-2]][:self.K - 1]"),
        "includes the last scale":
            ("        steps = self.pyramid(tokens)[:-1]\n"
             "        shown = [self.downsample_to(f_hat, k + 1) for k, f_hat in enumerate(steps)]\n",
             "        steps = [torch.zeros_like(self.features(tokens)), *self.pyramid(tokens)[:-1]]\n"
             "        shown = [self.downsample_to(f_hat, k) for k, f_hat in enumerate(steps)]\n"),
    },
    "02_4": {
        "swaps f and f_hat":
            ("vq.commitment_loss(f, f_hat)", "vq.commitment_loss(f_hat, f)"),
        "puts beta on the codebook loss":
            (None, "last = k == self.K - 1\n"
                   "weight = self.K - self.config.coarse * (self.K - 1) if last else self.config.coarse\n"
                   "loss = loss + weight * vq.commitment_loss(f, f_hat)\n"
                   "loss = loss + weight * self.config.beta * vq.codebook_loss(f, f_hat)\n"),
        "forgets the commitment":
            ("            loss = loss + weight * self.config.beta * vq.commitment_loss(f, f_hat)\n", ""),
        "forgets the codebook loss":
            ("            loss = loss + weight * vq.codebook_loss(f, f_hat)        "
             "# moves phi (and codes)\n", ""),
        "detaches nothing":
            (None, "last = k == self.K - 1\n"
                   "weight = self.K - self.config.coarse * (self.K - 1) if last else self.config.coarse\n"
                   "loss = loss + weight * (1 + self.config.beta) * F.mse_loss(f, f_hat)\n"),
        "gives all scales the weight 1":
            ("weight = self.K - self.config.coarse * (self.K - 1) if last else self.config.coarse",
             "weight = 1"),
        "gives the last scale the weight 1":
            ("self.K - self.config.coarse * (self.K - 1) if last", "1 if last"),
        "keeps the last scale's loss only": ("loss = loss + weight * self.config.beta",
                                             "loss = weight * self.config.beta"),
        "puts beta on both": ("loss + weight * vq.codebook_loss",
                              "loss + weight * self.config.beta * vq.codebook_loss"),
        "compares x with its codes instead of f with f_hat":
            ("vq.codebook_loss(f, f_hat)", "vq.codebook_loss(x, self.quantizer.lookup(tokens_k))"),
    },
    "02_property": {
        "is never called": ("    holds()\n", ""),
        "compares shapes only":
            ("        assert torch.allclose(inputs, torch.cat([inputs[:, :0], *shown[:-1]], dim=1), "
             "atol=1e-5)\n", ""),
        "tries one schedule only": ("scales=schedules", "scales=st.just((1, 2, 3))"),
        "fails with a single scale itself": ("torch.cat([inputs[:, :0], *shown[:-1]], dim=1)",
                                             "torch.cat(shown[:-1], dim=1)"),
    },
}
