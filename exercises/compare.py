"""What graders call: run a student's function, compare the result, say what is wrong."""
import inspect

import torch

SMALL = 24                       # messages show tensors of up to this many numbers
CASE = []                        # the present inputs, as lines of a message


class Wrong(AssertionError):
    """What a grader says about a wrong answer, and the present inputs."""

    def __init__(self, text):
        super().__init__(text + "".join(CASE))


def case(**inputs):
    """From now on, every message shows these inputs."""
    CASE[:] = [f"\n    with {name} = {show(value)}" for name, value in inputs.items()
               if not isinstance(value, torch.nn.Module)]


def call(function, *inputs, **context):
    """Call a student's function and check that it leaves its inputs as they were. Messages
    show the inputs and the context."""
    given = dict(zip(inspect.signature(function).parameters, inputs))
    case(**given, **context)
    before = []
    for name, value in given.items():
        for x in value if isinstance(value, (list, tuple)) else [value]:
            if torch.is_tensor(x):
                before.append((name, x, x.detach().clone(), x.requires_grad))
    result = function(*inputs)
    for name, x, copy, has_gradient in before:
        if x.requires_grad != has_gradient or not torch.equal(x, copy):
            raise Wrong(f"{function.__name__} changed its input {name} in place: copy it")
    return result


def expect_like(name, got, want):
    """Raise Wrong unless `got` has the shape, the dtype and the device that is wanted."""
    expect(name, torch.zeros_like(got) if torch.is_tensor(got) else got,
           torch.zeros_like(want))


def expect(name, got, want, tolerance=1e-5, slips=None):
    """Raise Wrong unless `got` is what is wanted in type, shape, dtype, device and values.
    name: of what is compared; slips: {what is wrong: the value that this mistake gives}"""
    text = difference(name, got, want, tolerance)
    for mistake, value in (slips or {}).items():
        if text and not difference(name, got, value, tolerance):
            raise Wrong(f"{name} is wrong: {mistake}")
    if text:
        raise Wrong(text)


def unpack(name, got, *parts):
    """Check that a function returned (or yielded) so many parts. -> them"""
    if not isinstance(got, (tuple, list)) or len(got) != len(parts):
        raise Wrong(f"{name} is {describe(got)}, expected {', '.join(parts)}")
    return got


def gradients(name, value, *inputs):
    """The gradient of value.sum() at each input, zeros where none arrives."""
    if not torch.is_tensor(value) or not value.requires_grad:
        raise Wrong(f"{name} has no gradient: is everything detached?")
    try:
        found = torch.autograd.grad(value.sum(), inputs, allow_unused=True,
                                    retain_graph=True)
    except RuntimeError as error:
        if "inplace" not in str(error):
            raise
        raise Wrong(f"{name} has no gradient: what the backward pass needs was changed in "
                    "place (by +=, *=, x[...] = ..., a method that ends in _)") from None
    return [torch.zeros_like(x) if grad is None else grad for x, grad in zip(inputs, found)]


def expect_gradients(name, got, want, tolerance=1e-3, **inputs):
    """Raise Wrong unless got.sum() and want.sum() have the same gradients at the inputs."""
    found, right = (gradients(name, value, *inputs.values()) for value in (got, want))
    for at, one, other in zip(inputs, found, right):
        if one.any() and not other.any():
            raise Wrong(f"the gradient of {name} reaches {at}, which must not learn from "
                        "it: what was not detached?")
        expect(f"the gradient of {name}.sum() at {at}", one, other, tolerance)


def random_var(chapter, scales, **sizes):
    """A transformer of chapter 4 in eval mode. Random numbers open its gates, which are
    almost shut at first, so that a wrong branch would hardly show."""
    var = chapter.VAR(chapter.VARConfig(scales=scales, **sizes)).eval()
    for p in var.parameters():
        p.data.add_(0.4 * torch.randn_like(p))
    return var


def difference(name, got, want, tolerance):
    """How `got` differs from what is wanted, or "" if it does not."""
    if torch.is_tensor(want) and torch.is_tensor(got):
        for what in ("shape", "dtype", "device"):
            one, other = getattr(got, what), getattr(want, what)
            if one != other:
                return f"{name} has {what} {show(one)}, expected {show(other)}"
        return difference_in_values(name, got.detach(), want.detach(), tolerance)
    if isinstance(want, (list, tuple)) and isinstance(got, (list, tuple)):
        if len(got) == len(want):
            parts = [difference(f"{name}[{i}]", *pair, tolerance)
                     for i, pair in enumerate(zip(got, want))]
            return next(filter(None, parts), "")
    elif not torch.is_tensor(want) and type(got) is type(want) and got == want:
        return ""
    return f"{name} is {describe(got)}, expected {describe(want)}"


def difference_in_values(name, got, want, tolerance):
    """Two tensors of one shape, dtype and device: where they first differ, or ""."""
    wrong = got != want
    if want.is_floating_point():
        wrong = ~torch.isclose(got, want, tolerance, tolerance, equal_nan=True)
    if want.is_meta or not wrong.any():
        return ""
    place = wrong.nonzero()[0].tolist()
    one, other = (show(x[tuple(place)].item(), digits=6) for x in (got, want))
    text = f"{name} is wrong{f' at {place}' if place else ''}: got {one}, expected {other}"
    if 1 < want.numel() <= SMALL:
        text += f"\n    got      {show(got)}\n    expected {show(want)}"
    return text


def describe(value):
    """ "a tensor of shape (2, 3)", "a list of 4" """
    if torch.is_tensor(value):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    return "None (nothing after `return` or `yield`?)" if value is None else show(value)


def show(value, digits=4):
    """Numbers, lists and small tensors; of what is larger, the shape."""
    if torch.is_tensor(value):
        return show(value.tolist()) if value.numel() <= SMALL else describe(value)
    if isinstance(value, torch.Size):
        return str(tuple(value))
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(show, value[:SMALL]))}]"
    if isinstance(value, float):
        return f"{value + 0.0:.{digits}g}"                 # + 0.0: -0 becomes 0
    return str(value)[:100]
