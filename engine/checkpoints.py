"""Files of a run: checkpoints, written whole or not at all, the log, and downloads."""
import hashlib
import http.client
import json
import os
import socket
from pathlib import Path

import torch

from engine import BadInput
from engine.device import best_precision, cores
from engine.distributed import agreed, barrier, rank, say, world

DOWNLOADS = Path(__file__).resolve().parents[1] / "data" / "downloads"
TRAINING_ONLY = ("optimizers", "scaler", "critic")         # entries that sampling does not need


def save_atomically(value, path):
    """Write a file that replaces `path` only when it is complete: a text as it is, other values
    for torch.load. Raises OSError that names `path`"""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            if isinstance(value, str):
                file.write(value.encode())
            else:
                torch.save(value, file)
            file.flush()
            os.fsync(file.fileno())       # the bytes must reach the disk before the name does
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:               # torch reports a full disk by the latter
        raise OSError(f"cannot write {path}: {str(error).splitlines()[0]}") from None
    finally:
        temporary.unlink(missing_ok=True)


# -- Checkpoints -----------------------------------------------------------------------------------

def load_checkpoint(path):
    """The dict in a checkpoint, on the CPU. Only tensors and plain values are loaded, so a
    hostile file can do no harm. Raises BadInput"""
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:            # missing, truncated, another format, or code in it
        raise BadInput(f"{path}: not a readable checkpoint ({type(error).__name__})") from None


def load_model(path, part, model_class, config_class):
    """The part "tokenizer" or "transformer" of a file, which may hold both. -> (the model, frozen
    and in eval mode; the rest of its checkpoint). Raises BadInput"""
    state = load_checkpoint(path)
    state = state.get(part, state)
    try:
        model = model_class(config_class(**state["config"]))
        model.load_state_dict(state["model"])
    except Exception as error:            # what does not fit raises nearly anything
        reason = str(error).splitlines()[0]
        raise BadInput(f"{path}: does not hold a {part} ({reason})") from None
    about = {key: state[key] for key in state if key not in ("model", *TRAINING_ONLY)}
    return model.eval().requires_grad_(False), about


def model_fingerprint(model):
    """A short text that differs whenever any weight differs."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode() + value.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def save(path, facts, modules, optimizers, step):
    """Write the checkpoint of a stage, in rank 0. Every process must call this. facts: plain
    values to keep; modules: {name: module}"""
    if rank() == 0:
        weights = {name: module.state_dict() for name, module in modules.items()}
        states = [optimizer.state_dict() for optimizer in optimizers]
        save_atomically(dict(facts, **weights, optimizers=states, step=step), path)
    barrier()


def resume(path, facts, settings, modules, optimizers):
    """Load the checkpoint of a stage, if there is one, and write the settings to
    settings.json. -> the steps it was trained for

    With settings.fresh the checkpoint is removed, and with a tokenizer the log and the
    transformer, too. Raises BadInput if the file is damaged or its settings differ from
    facts["settings"]; a setting that an older checkpoint lacks has its default."""
    if rank() == 0 and settings.fresh:
        path.unlink(missing_ok=True)
        if path.stem == "tokenizer":
            path.with_name("transformer.pt").unlink(missing_ok=True)
            path.with_name("log.jsonl").unlink(missing_ok=True)
    barrier()
    start = 0
    if path.exists():
        state = load_checkpoint(path)
        defaults = vars(type(modules["model"].config)()) | vars(type(settings)())
        refuse_changes(path, facts["settings"], state.get("settings"), defaults)
        try:
            for name, module in modules.items():
                module.load_state_dict(state[name])
            for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            start = state["step"]
        except torch.OutOfMemoryError:
            raise
        except Exception:
            raise BadInput(f"{path} is damaged; --fresh starts over") from None
        say(f"{path.stem}: resuming at step {start}")
    if rank() == 0:
        text = json.dumps(vars(settings), indent=1)
        save_atomically(text, path.with_name("settings.json"))
    return start


def refuse_changes(path, settings, before, defaults):
    """Raises BadInput if the settings in the checkpoint, `before`, are others."""
    if not before:
        raise BadInput(f"{path} was copied from --tokenizer-file: give --stage transformer, "
                       "or choose another folder with --out")
    before = defaults | before
    changed = [f"{name} {before.get(name)} -> {value}" for name, value in settings.items()
               if before.get(name) != value]
    if changed:
        raise BadInput(f"{path} was trained with other settings ({', '.join(changed)}): use the "
                       "old ones, choose another folder with --out, or start over with --fresh")


def export(folder, path):
    """Write both models of a run to one file to give away, in half precision."""
    both = {}
    for name in ("tokenizer", "transformer"):
        state = load_checkpoint(Path(folder) / f"{name}.pt")
        both[name] = {key: state[key] for key in state if key not in TRAINING_ONLY}
        for key, value in state["model"].items():
            state["model"][key] = value.half() if value.is_floating_point() else value
    save_atomically(both, path)


# -- The folder of a run ---------------------------------------------------------------------------

def open_run(settings, device):
    """Lock the folder of a run, and choose precision and workers if the settings leave them open.
    -> the lock, which lasts until this process ends. Raises BadInput if another run has it"""
    folder = Path(settings.out)
    lock = claim(folder) if rank() == 0 else None
    first = folder / ("transformer.pt" if settings.stage == "transformer" else "tokenizer.pt")
    if settings.precision == "auto":      # a run keeps the precision it had before
        again = first.exists() and not settings.fresh
        before = load_checkpoint(first).get("settings", {}) if again else {}
        settings.precision = agreed(before.get("precision") or best_precision(device))
    if settings.workers < 0:
        settings.workers = max(1, min(16, cores() // world()))
    return lock


def claim(folder):
    """Lock a folder until this process ends, even if it is killed. -> the lock. Raises BadInput"""
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / ".lock", "a")
    try:
        import fcntl
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise BadInput(f"{folder} is in use by another run: wait for it, stop it, or choose "
                       "another folder with --out") from None
    except (ImportError, OSError):                         # Windows, or a disk without locks
        pass
    return lock


def log(path, step, line, **numbers):
    """Print a line, and append numbers to log.jsonl beside the checkpoint `path`, in rank 0."""
    if rank() == 0:
        print(line, flush=True)
        with open(path.with_name("log.jsonl"), "a") as file:
            file.write(json.dumps(dict(stage=path.stem, step=step, **numbers)) + "\n")


def download(url, path, sha256=""):
    """Fetch a file unless it is there. It gets its name only when complete and right.
    -> path. Raises BadInput"""
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"downloading {url} to {path}", flush=True)
    socket.setdefaulttimeout(30)
    try:
        torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256 or None)
    except (OSError, http.client.HTTPException, RuntimeError) as error:
        raise BadInput(f"could not download {url} ({error}): try again, or put the file at "
                       f"{path}") from None
    return path
