"""Wrong answers to the tasks of chapter 5: name -> (a part of the solution, what replaces it)."""

WRONG = {
    "05_1": {
        "shifts the targets by one, as a language model does":
            ("tokens.flatten(), reduction", "tokens.roll(-1, 1).flatten(), reduction"),
        "compares the outputs but the last with the tokens but the first":
            (None, "with torch.no_grad():\n"
                   "    inputs = self.tokenizer.teacher_inputs(list(tokens.split(self.sizes, 1)))\n"
                   "with self.autocast():\n"
                   "    logits = model(labels, inputs)[:, :-1]\n"
                   "tokens = tokens[:, 1:]\n"
                   "loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten(),\n"
                   "                       reduction='none')\n"
                   "return loss.view_as(tokens), logits.argmax(-1) == tokens\n"),
        "takes the softmax twice":
            ("logits.flatten(0, 1).float()", "logits.flatten(0, 1).float().softmax(-1)"),
        "returns the mean": ('reduction="none")', 'reduction="mean").expand(tokens.numel())'),
        "works in the precision of the logits":
            ("logits.flatten(0, 1).float()", "logits.flatten(0, 1)"),
        "shows the tokens themselves to the model":
            ("self.tokenizer.teacher_inputs(list(tokens.split(self.sizes, 1)))",
             "self.tokenizer.quantizer.lookup(tokens[:, :-1])"),
        "calls self.model": ("model(labels, inputs)", "self.model(labels, inputs)"),
        "forgets autocast": ("with self.autocast():", "if True:"),
        "computes the logits without gradients":
            ("with self.autocast():", "with self.autocast(), torch.no_grad():"),
        "returns a share of right tokens, as numbers":
            ("logits.argmax(-1) == tokens", "(logits.argmax(-1) == tokens).float()"),
        "mixes positions and codes":
            (None, "with torch.no_grad():\n"
                   "    inputs = self.tokenizer.teacher_inputs(list(tokens.split(self.sizes, 1)))\n"
                   "with self.autocast():\n"
                   "    logits = model(labels, inputs)\n"
                   "B, L, V = logits.shape\n"
                   "logits_BVL = logits.float().view(B, V, L)\n"
                   "loss = F.cross_entropy(logits_BVL, tokens, reduction='none')\n"
                   "return loss, logits.argmax(-1) == tokens\n"),
        "calls the least likely code right": ("argmax", "argmin"),
    },
    "05_2": {
        "adds up the parts instead of averaging":
            ("scale(part_loss / len(parts))", "scale(part_loss)"),
        "divides the logged loss alone":
            (None, "parts = list(zip(*[tensor.chunk(stage.settings.accumulate)\n"
                   "                   for tensor in batch]))\n"
                   "loss, metrics = 0, []\n"
                   "for i, part in enumerate(parts):\n"
                   "    with sync_gradients(model, now=i == len(parts) - 1):\n"
                   "        part_loss, part_metrics = stage.loss(model, part, progress)\n"
                   "        stage.loss_scale.scale(part_loss).backward()\n"
                   "    loss = loss + part_loss.detach() / len(parts)\n"
                   "    metrics.append(part_metrics)\n"),
        "steps after each part":
            ("metrics.append(part_metrics)",
             "metrics.append(part_metrics)\n"
             "        stage.loss_scale.unscale(stage.modules.values())\n"
             "        step_unless(torch.tensor(False), stage.optimizers)"),
        "clears the gradients before each part":
            ("part_loss, part_metrics =",
             "stage.model.zero_grad()\n            part_loss, part_metrics ="),
        "adds up the logged loss": ("part_loss.detach() / len(parts)", "part_loss.detach()"),
        "logs the loss of the last part":
            ("loss = loss + part_loss.detach() / len(parts)", "loss = part_loss.detach()"),
        "keeps the graphs of all parts":
            ("part_loss.detach() / len(parts)", "part_loss / len(parts)"),
        "goes backward once, at the end":
            (None, "parts = list(zip(*[tensor.chunk(stage.settings.accumulate)\n"
                   "                   for tensor in batch]))\n"
                   "loss, metrics = 0, []\n"
                   "for i, part in enumerate(parts):\n"
                   "    with sync_gradients(model, now=i == len(parts) - 1):\n"
                   "        part_loss, part_metrics = stage.loss(model, part, progress)\n"
                   "    loss = loss + part_loss / len(parts)\n"
                   "    metrics.append(part_metrics)\n"
                   "stage.loss_scale.scale(loss).backward()\n"
                   "loss = loss.detach()\n"),
        "calls stage.model":
            ("stage.loss(model, part, progress)", "stage.loss(stage.model, part, progress)"),
        "exchanges gradients after each part": ("now=i == len(parts) - 1", "now=True"),
        "forgets the loss scale":
            ("stage.loss_scale.scale(part_loss / len(parts)).backward()",
             "(part_loss / len(parts)).backward()"),
        "cuts into parts of `accumulate` rows":
            (".chunk(stage.settings.accumulate)", ".split(stage.settings.accumulate)"),
        "expects two tensors":
            ("zip(*[tensor.chunk(stage.settings.accumulate) for tensor in batch])",
             "zip(batch[0].chunk(stage.settings.accumulate),"
             " batch[1].chunk(stage.settings.accumulate))"),
        "gives the whole batch to every part":
            ("stage.loss(model, part, progress)", "stage.loss(model, batch, progress)"),
    },
    "05_3": {
        "inverts the ratio":
            ("long.norm() / (short.norm() + 1e-4)", "short.norm() / (long.norm() + 1e-4)"),
        "lets gradients flow through the weight":
            (None, "long, = torch.autograd.grad(other, weight, create_graph=True)\n"
                   "short, = torch.autograd.grad(adversarial, weight, create_graph=True)\n"
                   "return (long.norm() / (short.norm() + 1e-4)).clamp(max=1e4)\n"),
        "divides the losses":
            ("long.norm() / (short.norm() + 1e-4)",
             "other.detach() / (adversarial.detach() + 1e-4)"),
        "squares the lengths":
            ("long.norm() / (short.norm() + 1e-4)",
             "long.square().sum() / (short.square().sum() + 1e-4)"),
        "adds 1e-4 to the ratio":
            ("long.norm() / (short.norm() + 1e-4)", "long.norm() / short.norm() + 1e-4"),
        "knows no largest weight": (".clamp(max=1e4)", ""),
        "adds gradients to .grad":
            (None, "before = weight.grad\n"
                   "other.backward(retain_graph=True)\n"
                   "long = weight.grad.clone()\n"
                   "weight.grad = None\n"
                   "adversarial.backward(retain_graph=True)\n"
                   "short, weight.grad = weight.grad, before\n"
                   "return (long.norm() / (short.norm() + 1e-4)).clamp(max=1e4)\n"),
        "frees the graph of the adversarial loss":
            ("torch.autograd.grad(adversarial, weight, retain_graph=True)",
             "torch.autograd.grad(adversarial, weight)"),
        "takes a length for each row":
            ("long.norm() / (short.norm() + 1e-4)",
             "long.norm(dim=-1).mean() / (short.norm(dim=-1).mean() + 1e-4)"),
        "divides elementwise":
            ("long.norm() / (short.norm() + 1e-4)", "(long / (short + 1e-4)).norm()"),
        "returns a plain number": (".clamp(max=1e4)", ".clamp(max=1e4).item()"),
    },
    "05_property": {
        "never calls what it defines": ("    holds()\n", ""),
        "draws one part alone": ("parts=sizes", "parts=st.just(1)"),
        "draws equal rows": ("torch.randn(rows * parts, n, generator=generator)",
                             "torch.randn(1, n, generator=generator).repeat(rows * parts, 1)"),
        "looks at the weights alone": ("torch.allclose(at_once, in_parts, atol=1e-5)",
                                       "at_once.dim() == 0 or "
                                       "torch.allclose(at_once, in_parts, atol=1e-5)"),
    },
}
