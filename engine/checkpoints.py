"""Checkpoints: written whole or not at all, read without trusting them, put together when the
weights are spread over processes."""
import hashlib
import zipfile

import torch

from engine import BadInput
from engine.files import written_whole


def save_atomically(value, path):
    try:
        with written_whole(path) as file:
            torch.save(value, file)
    except RuntimeError as error:                          # how torch reports a full disk
        raise OSError(f"cannot write {path}: {str(error).splitlines()[0]}") from None


def load_checkpoint(path):
    """A file written by this script; tensors and plain values only, so a hostile file can do no
    harm. The tensors are on the CPU and are read from the file when they are used: processes on one
    machine share them, and what nobody uses takes no memory. Raises BadInput, with one line, for
    anything else."""
    try:
        in_place = zipfile.is_zipfile(path)                # files of before torch 1.6 are none
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=in_place)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such checkpoint") from None
    except Exception as error:               # truncated, something else, or code instead of tensors
        raise BadInput(f"{path}: not a readable checkpoint ({type(error).__name__}); "
                       "expected a file written by 05_train.py") from None
    if not isinstance(state, dict):
        raise BadInput(f"{path}: not a checkpoint of 05_train.py")
    return state


def model_fingerprint(model):
    """A short name for exactly these weights."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode() + value.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def export(folder, path):
    """One file to give away: both models without their optimizers, in half precision."""
    both = {}
    for part in ("tokenizer", "transformer"):
        state = load_checkpoint(folder / f"{part}.pt")
        state = {k: v for k, v in state.items() if k not in ("optimizers", "critic")}
        weights = {k: v.half() if v.is_floating_point() else v for k, v in state["model"].items()}
        both[part] = {**state, "model": weights}
    save_atomically(both, path)


def save(path, stage, step):
    """All of a stage after `step` steps. Every process calls this, rank 0 writes."""
    mine = stage.processes.rank == 0
    weights = {name: whole(part.state_dict(), mine) for name, part in stage.modules.items()}
    optimizers = [whole(optimizer.state_dict(), mine) for optimizer in stage.optimizers]
    if mine:
        save_atomically(dict(stage.about, **weights, step=step, optimizers=optimizers), path)
    stage.processes.barrier()


def resume(path, stage):
    """Load the checkpoint of a stage. -> the steps that it was trained for, 0 if there is none
    Raises BadInput for the checkpoint of another run, or a damaged one."""
    if not path.exists():
        return 0
    state = load_checkpoint(path)
    check_identity(path, state, stage)
    try:
        for name, module in stage.modules.items():
            own, saved = module.state_dict(), state[name]
            module.load_state_dict({key: spread(saved[key], own.get(key)) for key in saved})
        for optimizer, saved in zip(stage.optimizers, state["optimizers"], strict=True):
            owners = [p for group in optimizer.param_groups for p in group["params"]]
            for i, values in saved["state"].items():
                values.update({k: spread(v, owners[i]) for k, v in values.items()})
            optimizer.load_state_dict(saved)
    except torch.OutOfMemoryError:
        raise
    except (KeyError, ValueError, RuntimeError, TypeError, AttributeError, IndexError):
        raise BadInput(f"{path} is damaged; --fresh starts over") from None
    return state["step"]


def check_identity(path, state, stage):
    """Raises BadInput unless the checkpoint was made with the stage's settings, all of them."""
    old, new = state.get("settings"), stage.about["settings"]
    if not isinstance(old, dict) or set(old) != set(new):
        raise BadInput(f"{path} was saved by another version of this code or is no {stage.name}; "
                       "--fresh trains again from scratch")
    changed = [f"{key} {old[key]} -> {new[key]}" for key in new if old[key] != new[key]]
    if changed:
        raise BadInput(f"{path} was trained with other settings ({', '.join(changed)}); "
                       "give the old ones, or --fresh starts over (with --stage transformer "
                       "only stage 2), --out takes another folder")


def whole(state, mine=True):
    """The same state with every weight that is spread over processes put together, on the CPU of
    the process that keeps it (`mine`). All processes must call this."""
    if isinstance(state, dict):
        return {key: whole(value, mine) for key, value in state.items()}
    if isinstance(state, list):
        return [whole(value, mine) for value in state]
    if not hasattr(state, "full_tensor"):
        return state
    full = state.full_tensor()
    return full.cpu() if mine else None


def spread(value, like):
    """A copy of a whole tensor of the same shape as `like`, laid out in memory as it is (fused
    optimizers walk through both side by side), and cut as it is if that is spread over processes.
    Of anything else, a copy as it is: nothing goes on living in the file it came from."""
    if not torch.is_tensor(value) or not torch.is_tensor(like) or value.shape != like.shape:
        return value.clone() if torch.is_tensor(value) else value
    if not hasattr(like, "full_tensor"):
        return torch.empty_like(like, dtype=value.dtype).copy_(value)
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
