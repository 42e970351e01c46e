"""Wrong answers to the tasks of chapter 3: name -> (a part of the solution, what replaces it).
Where there is no such part (None), the second text replaces the whole solution."""

WRONG = {
    "03_1": {
        "is a triangle, as for text": (None, """
L = sum(side * side for side in scales)
return torch.ones(L, L).tril().bool()
"""),
        "hides a token's own scale": (">=", ">"),
        "lets coarse tokens look at finer ones": (">=", "<="),
        "hides all scales but the token's own": (">=", "=="),
        "has True where a token must not look": (">=", "<"),
        "compares sides, which need not grow": (None, """
side = torch.tensor([side for side in scales for _ in range(side * side)])
return side[:, None] >= side[None, :]
"""),
        "has a row for each scale instead of each token": (None, """
scale = torch.arange(len(scales))
return scale[:, None] >= scale[None, :]
"""),
        "holds numbers instead of bools": ("return scale[:, None] >= scale[None, :]",
                                           "return (scale[:, None] >= scale[None, :]).float()"),
    },
    "03_2": {
        "hides after the softmax, so that the weights add up to less than 1": (None, """
factor = q.shape[-1] ** -0.5 if qk_factor is None else qk_factor
weights = (factor * q @ k.transpose(-2, -1)).softmax(-1)
weights = weights if mask is None else weights * mask
return weights @ v
"""),
        "hides after the softmax and divides by the sum that is left, which may be 0": (None, """
factor = q.shape[-1] ** -0.5 if qk_factor is None else qk_factor
weights = (factor * q @ k.transpose(-2, -1)).softmax(-1)
if mask is not None:
    weights = weights * mask
    weights = weights / weights.sum(-1, keepdim=True)
return weights @ v
"""),
        "sets hidden scores to 0 instead of minus infinity": (None, """
factor = q.shape[-1] ** -0.5 if qk_factor is None else qk_factor
scores = factor * q @ k.transpose(-2, -1)
scores = scores if mask is None else scores * mask
return scores.softmax(-1) @ v
"""),
        "hides the keys that may be seen": (None, """
factor = q.shape[-1] ** -0.5 if qk_factor is None else qk_factor
scores = factor * q @ k.transpose(-2, -1)
scores = scores if mask is None else scores.masked_fill(mask, -torch.inf)
return scores.softmax(-1) @ v
"""),
        "forgets 1/sqrt(d)": (None, """
scores = (1.0 if qk_factor is None else qk_factor) * q @ k.transpose(-2, -1)
scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
return scores.softmax(-1) @ v
"""),
        "divides by sqrt(d) also where a factor is given": (None, """
scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5 * (qk_factor or 1.0)
scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
return scores.softmax(-1) @ v
"""),
        "takes a factor of 0 for none": (None, """
factor = qk_factor or q.shape[-1] ** -0.5
scores = factor * q @ k.transpose(-2, -1)
scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
return scores.softmax(-1) @ v
"""),
        "takes a factor of 0 for none in bfloat16": ("if qk_factor is None", "if not qk_factor"),
        "takes the softmax over the queries": (None, """
factor = q.shape[-1] ** -0.5 if qk_factor is None else qk_factor
scores = factor * q @ k.transpose(-2, -1)
scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
return scores.softmax(-2) @ v
"""),
        "has a softmax of its own, which overflows": (None, """
factor = q.shape[-1] ** -0.5 if qk_factor is None else qk_factor
weights = (factor * q @ k.transpose(-2, -1)).exp()
weights = weights if mask is None else weights.masked_fill(~mask, 0)
return weights / weights.sum(-1, keepdim=True) @ v
"""),
        "multiplies the caller's q by the factor in place": (None, """
q *= q.shape[-1] ** -0.5 if qk_factor is None else qk_factor
scores = q @ k.transpose(-2, -1)
scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
return scores.softmax(-1) @ v
"""),
        "forgets the mask in float32": ("attn_mask=mask", "attn_mask=None"),
        "forgets the mask in bfloat16": ("scores if mask is None", "scores if True"),
        "subtracts 1000 from a hidden score, which may be larger": (None, """
factor = q.shape[-1] ** -0.5 if qk_factor is None else qk_factor
scores = factor * q @ k.transpose(-2, -1)
scores = scores if mask is None else scores - 1000 * ~mask
return scores.softmax(-1) @ v
"""),
        "detaches the weights": ("    return F.scaled_dot_product_attention(q, k,",
                                 "    return F.scaled_dot_product_attention(q.detach(), k,"),
    },
    "03_3": {
        "looks at its own scale only": (None, """
outputs, begin = [], 0
for side in scales:
    end = begin + side * side
    outputs.append(attention(q[:, :, begin:end], k[:, :, begin:end], v[:, :, begin:end],
                             qk_factor=qk_factor))
    begin = end
return torch.cat(outputs, dim=2)
"""),
        "looks at all keys": (None, """
return attention(q, k, v, qk_factor=qk_factor)
"""),
        "looks at strictly coarser scales only": (None, """
outputs, begin = [], 0
for side in scales:
    end = begin + side * side
    seen = begin or end
    outputs.append(attention(q[:, :, begin:end], k[:, :, :seen], v[:, :, :seen],
                             qk_factor=qk_factor))
    begin = end
return torch.cat(outputs, dim=2)
"""),
        "computes what the mask then hides": (None, """
return attention(q, k, v, block_causal_mask(scales), qk_factor)
"""),
        "computes the queries of earlier scales again": (None, """
outputs, begin = [], 0
for side in scales:
    end = begin + side * side
    rows = attention(q[:, :, :end], k[:, :, :end], v[:, :, :end], qk_factor=qk_factor)
    outputs.append(rows[:, :, begin:])
    begin = end
return torch.cat(outputs, dim=2)
"""),
        "counts the side instead of its square": (None, """
outputs, begin = [], 0
for side in scales:
    end = begin + side
    outputs.append(attention(q[:, :, begin:end], k[:, :, :end], v[:, :, :end],
                             qk_factor=qk_factor))
    begin = end
return torch.cat(outputs, dim=2)
"""),
        "drops the caller's factor": ("rows, qk_factor", "rows"),
        "returns the last scale first": ("outputs[::-1]", "outputs"),
        "cuts the values from the wrong end": ("v[:, :, :end]", "v[:, :, -end:]"),
        "takes the first rows of the mask for every group": (
            "mask[end - size:end, :end]", "mask[:size, :end]"),
    },
    "03_property": {
        "is never called": ("    holds()\n", ""),
        "asks only that nothing leaks": (
            "torch.equal(moved > 0, scale >= scale[token])",
            "not moved[scale < scale[token]].any()"),
        "expects every output to move": (
            "torch.equal(moved > 0, scale >= scale[token])", "(moved > 0).all()"),
        "draws scales that grow only": (
            "max_size=4)", "max_size=4).map(lambda sides: sorted(set(sides)))"),
        "draws a single scale": ("max_size=4", "max_size=1"),
        "changes the last token only": ("token = own", "token = len(scale) - 1 + 0 * own"),
        "forgets the attention over prefixes": (
            "(masked, chapter.block_causal_attention)", "(masked,)"),
    },
}
