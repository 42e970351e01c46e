"""Wrong answers to the tasks of chapter 4: name -> (a part of the solution, what replaces it).
Where there is no such part (None), the second text replaces the whole solution."""

WRONG = {
    "04_1": {
        "returns the new keys and values only": (
            "return self.k[:, :, :end], self.v[:, :, :end]", "return k, v"),
        "writes every scale to the beginning": (
            "self.k[:, :, self.filled:end], self.v[:, :, self.filled:end] = k, v",
            "self.k[:, :, :k.shape[2]], self.v[:, :, :k.shape[2]] = k, v"),
        "never moves on": ("self.filled = end", "pass"),
        "returns all of its memory, also what is not written yet": (
            "return self.k[:, :, :end], self.v[:, :, :end]", "return self.k, self.v"),
        "returns what was there before the new ones": (
            "return self.k[:, :, :end], self.v[:, :, :end]",
            "return self.k[:, :, :end - k.shape[2]], self.v[:, :, :end - k.shape[2]]"),
        "stores the keys as the values too": ("= k, v", "= k, k"),
        "counts heads instead of tokens": (
            "end = self.filled + k.shape[2]", "end = self.filled + k.shape[1]"),
        "counts calls instead of tokens": ("self.filled = end", "self.filled += 1"),
        "puts the new ones before the old ones": (None, """
if self.filled == 0:
    self.k, self.v = k, v
else:
    self.k, self.v = torch.cat([k, self.k], dim=2), torch.cat([v, self.v], dim=2)
self.filled += k.shape[2]
return self.k, self.v
"""),
    },
    "04_2": {
        "forgets the 1 of 1 + scale": ("self.norm(x) * (1 + scale_by1)", "self.norm(x) * scale_by1"),
        "gates the sum instead of the branch": (
            "x = x + self.drop_path(h * gate1)", "x = (x + self.drop_path(h)) * gate1"),
        "has no residual around the MLP": (
            "return x + self.drop_path(h * gate2)", "return self.drop_path(h * gate2)"),
        "does not normalise what enters the MLP": ("self.mlp(self.norm(x)", "self.mlp(x"),
        "scales and shifts before the norm": (
            "self.norm(x) * (1 + scale_by1) + shift1", "self.norm(x * (1 + scale_by1) + shift1)"),
        "shifts first and scales then": (
            "self.norm(x) * (1 + scale_by2) + shift2", "(self.norm(x) + shift2) * (1 + scale_by2)"),
        "uses the first gate twice": ("h * gate2", "h * gate1"),
        "feeds the MLP the attention's output without x": (
            "self.mlp(self.norm(x)", "self.mlp(self.norm(h)"),
        "runs the MLP beside attention, on the same x": (None, """
h1 = self.attention(self.norm(x) * (1 + scale_by1) + shift1, mask, cache)
h2 = self.mlp(self.norm(x) * (1 + scale_by2) + shift2)
return x + self.drop_path(h1 * gate1) + self.drop_path(h2 * gate2)
"""),
        "adds the branches to the normalised x": (None, """
x = self.norm(x)
x = x + self.drop_path(self.attention(x * (1 + scale_by1) + shift1, mask, cache) * gate1)
x = self.norm(x)
return x + self.drop_path(self.mlp(x * (1 + scale_by2) + shift2) * gate2)
"""),
        "never drops a branch": ("self.drop_path(h * gate1)", "h * gate1"),
        "drops x together with the branch": (
            "x + self.drop_path(h * gate2)", "self.drop_path(x + h * gate2)"),
        "does not hand on the cache": ("mask, cache)", "mask)"),
        "hands on the cache as the mask": ("mask, cache)", "cache, mask)"),
        "detaches the branch": ("h * gate1", "h.detach() * gate1"),
    },
    "04_3": {
        "counts positions from 0 at every scale": (
            "self.position[:, begin:end]", "self.position[:, :end - begin]"),
        "forgets the scale embedding": ("x + self.scale_embed.weight[k] + ", "x + "),
        "forgets the positions": (" + self.position[:, begin:end]", ""),
        "takes the embedding of the scale before": (
            "scale_embed.weight[k]", "scale_embed.weight[max(k - 1, 0)]"),
        "forgets the class in the start": ("conditioning.row + self.start", (
            "0 * conditioning.row + self.start")),
        "forgets the start": ("conditioning.row + self.start", (
            "conditioning.row + 0 * self.start")),
        "adds the class to the inputs of every scale": (
            "else self.word_embed(inputs)", "else self.word_embed(inputs) + conditioning.row"),
        "counts the side instead of its square": (
            "sum(side * side for side in self.config.scales[:k])", "sum(self.config.scales[:k])"),
        "takes the first scale for a single token": (
            "sum(side * side for side in self.config.scales[:k])",
            "1 + sum(side * side for side in self.config.scales[1:k]) if k else 0"),
        "uses no cache": ("cache=block_cache", ""),
        "gives all blocks the cache of the first": ("cache=block_cache", "cache=cache[0]"),
        "makes a new cache at every scale": (
            "conditioning.blocks, cache)", "conditioning.blocks, self.new_cache())"),
        "gives all blocks the modulation of the first": (
            "x = block(x, adaln,", "x = block(x, conditioning.blocks[0],"),
        "leaves the class out of the head": (
            "return self.predict(x, conditioning)", "return self.head(self.head_norm(x))"),
        "returns the hidden vectors instead of logits": (
            "return self.predict(x, conditioning)", "return x"),
        "returns probabilities": ("return self.predict(x, conditioning)",
                                  "return self.predict(x, conditioning).softmax(-1)"),
    },
    "04_property": {
        "is never called": ("    holds()\n", ""),
        "leaves the gates shut and the head near zero": ("0.3 * torch.randn_like(p)", "0"),
        "compares shapes only": (
            "                assert torch.allclose(got, want[:, begin:end], rtol=1e-3, atol=1e-3)\n",
            ""),
        "looks at the first scale only": ("enumerate(scales)", "enumerate(scales[:1])"),
        "demands equality to the last bit": (
            "torch.allclose(got, want[:, begin:end], rtol=1e-3, atol=1e-3)",
            "torch.equal(got, want[:, begin:end])"),
        "draws scales of side 1 only": ("st.integers(1, 3), min", "st.integers(1, 1), min"),
        "draws growing scales that begin with 1": (
            "max_size=3).map(tuple)", "max_size=3).map(lambda sides: tuple({1, *sides}))"),
    },
}
