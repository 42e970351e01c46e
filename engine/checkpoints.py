"""Checkpoints: written whole or not at all, read without trusting the file, and the same file
whether the weights lie in one process or are sharded over many."""
import hashlib
import zipfile
from dataclasses import asdict

import torch

from engine import BadInput
from engine.files import written_whole


def save_atomically(value, path):
    """torch.save that leaves the old file or all of the new one, never half. Raises OSError"""
    try:
        with written_whole(path) as file:
            torch.save(value, file)
    except RuntimeError as error:                          # how torch reports a full disk
        raise OSError(f"cannot write {path}: {str(error).splitlines()[0]}") from None


def load_checkpoint(path):
    """The dict in a file written by 05_train.py. It may hold tensors and plain values only, so a
    hostile file can do no harm. The tensors are on the CPU and are read from the file when they are
    used: processes on one machine share them, and unused ones take no memory. Raises BadInput"""
    try:
        in_place = zipfile.is_zipfile(path)                # not so before torch 1.6
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=in_place)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such checkpoint") from None
    except Exception as error:               # truncated, another format, or code in the file
        raise BadInput(f"{path}: not a readable checkpoint ({type(error).__name__}); "
                       "expected a file written by 05_train.py") from None
    if not isinstance(state, dict):
        raise BadInput(f"{path}: not a checkpoint of 05_train.py")
    return state


def load_part(path, part):
    """What a checkpoint holds of the model `part`, without what only training needs. A file to give
    away holds both models."""
    state = load_checkpoint(path)
    return without_training(state.get(part, state))


def without_training(state):
    return {k: v for k, v in state.items() if k not in ("optimizers", "critic", "loss_scale")}


def model_fingerprint(model):
    """A short text that differs whenever any weight differs."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode() + value.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def export(folder, path):
    """Write both models to one file to give away: in float16, without optimizers."""
    both = {}
    for name in ("tokenizer", "transformer"):
        state = load_part(folder / f"{name}.pt", name)
        weights = {k: v.half() if v.is_floating_point() else v for k, v in state["model"].items()}
        both[name] = {**state, "model": weights}
    save_atomically(both, path)


def adopt_tokenizer(folder, tokenizer, class_names, dataset):
    """Save a tokenizer that was trained elsewhere as the run's own. To resume the run or to sample
    from it, the file that it came from is no longer needed."""
    if folder.writes:
        save_atomically(dict(config=asdict(tokenizer.config), model=tokenizer.state_dict(), step=0,
                             class_names=class_names, dataset=dataset, settings={}),
                        folder.checkpoint("tokenizer"))


def save(path, stage, step):
    """Write the checkpoint of a stage after `step` steps. Every process must call this; rank 0
    writes."""
    writes = stage.processes.rank == 0
    weights = {name: gather(module.state_dict(), writes) for name, module in stage.modules.items()}
    optimizers = [gather(optimizer.state_dict(), writes) for optimizer in stage.optimizers]
    if writes:
        save_atomically(dict(stage.about, **weights, step=step, optimizers=optimizers), path)
    stage.processes.barrier()


def begin(stage, folder, everything):
    """Resume the stage or start it. The folder changes only after the checkpoint was accepted.
    -> number of steps done"""
    start = 0 if stage.settings.fresh else resume(folder.checkpoint(stage.name), stage)
    if stage.settings.fresh:                               # what is there belongs to another run
        for name in stage.fresh_removes:
            folder.remove(name)
    folder.begin(stage.name, start, everything)
    stage.processes.barrier()
    if 0 < start < stage.steps:
        stage.processes.say(f"{stage.name}: resuming at step {start}")
    return start


def resume(path, stage):
    """Load the checkpoint of a stage into its modules and optimizers. -> the steps that it was
    trained for, 0 without a checkpoint. Raises BadInput if it is damaged or of another run."""
    if not path.exists():
        return 0
    state = load_checkpoint(path)
    check_identity(path, state, stage.name, stage.about["settings"])
    try:
        for name, module in stage.modules.items():
            own, saved = module.state_dict(), state[name]
            module.load_state_dict({key: spread(saved[key], own.get(key)) for key in saved})
        for optimizer, saved in zip(stage.optimizers, state["optimizers"], strict=True):
            owners = [p for group in optimizer.param_groups for p in group["params"]]
            for i, values in saved["state"].items():
                values.update({k: spread(v, owners[i]) for k, v in values.items()})
            optimizer.load_state_dict(saved)
        return state["step"]
    except torch.OutOfMemoryError:
        raise
    except (KeyError, ValueError, RuntimeError, TypeError, AttributeError, IndexError):
        raise BadInput(f"{path} is damaged; --fresh starts over") from None


def check_identity(path, state, name, new):
    """Raises BadInput unless the checkpoint of the stage `name` was trained with the settings `new`
    and no others."""
    old = state.get("settings")
    if old == {}:
        raise BadInput(f"{path} came with --tokenizer-file: give --stage transformer")
    if isinstance(old, dict) and "side_power" in new:
        old = {"side_power": 0.0, **old}                   # so it was before there was a choice
    if not isinstance(old, dict) or set(old) != set(new):
        raise BadInput(f"{path} was saved by another version of this code or is no {name}; "
                       "--fresh trains again from scratch")
    changed = [f"{key} {old[key]} -> {new[key]}" for key in new if old[key] != new[key]]
    if changed:
        raise BadInput(f"{path} was trained with other settings ({', '.join(changed)}); "
                       "give the old ones, another folder with --out, or --fresh to start over "
                       "(with --stage transformer only stage 2)")


def gather(state, wanted):
    """A state dict whose sharded tensors are whole, on the CPU. Every process must call this. Only
    those with `wanted` get the tensors, the others None."""
    if isinstance(state, dict):
        return {key: gather(value, wanted) for key, value in state.items()}
    if isinstance(state, list):
        return [gather(value, wanted) for value in state]
    if not hasattr(state, "full_tensor"):
        return state
    full = whole(state)
    return full.cpu() if wanted else None


def whole(tensor):
    """The tensor, gathered from all processes if it is sharded."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def spread(value, like):
    """A copy of the tensor `value` with the memory layout of `like`, because fused optimizers walk
    through a weight and its moments side by side; sharded if `like` is sharded. A value of another
    shape or type is copied unchanged, so that nothing still refers to the file it was read from."""
    if not torch.is_tensor(value) or not torch.is_tensor(like) or value.shape != like.shape:
        return value.clone() if torch.is_tensor(value) else value
    if not hasattr(like, "full_tensor"):
        return torch.empty_like(like, dtype=value.dtype).copy_(value)
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
