"""Wrong answers to the tasks of chapter 1: name -> (a part of the solution, what replaces it)."""

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
        "loses the last levels when they are unused": (", minlength=levels", ""),
    },
}
