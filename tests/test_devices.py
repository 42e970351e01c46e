"""What depends on the device: which one, in which precision, what is compiled and what is not."""
import os
from functools import partial
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import stage_of
from hypothesis import given
from hypothesis import strategies as st

from engine import checkpoints, devices
from engine.processes import Processes

m5 = import_module("05_train")


@pytest.mark.parametrize("device, capability, bfloat16, wanted", [
    ("cuda", (8, 0), True, "bfloat16"), ("cuda", (7, 5), False, "float16"),
    ("cuda", (7, 0), False, "float16"), ("cuda", (6, 1), False, "float32"),
    ("cpu", None, True, "bfloat16"), ("cpu", None, False, "float32"),
    ("mps", None, False, "float32")])
def test_training_is_in_half_precision_where_the_device_multiplies_it_fast(
        monkeypatch, device, capability, bfloat16, wanted):
    monkeypatch.setattr(devices, "fast_bfloat16", lambda device: bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    processes = Processes("cpu")
    processes.device = torch.device(device)
    assert devices.choose_precision(processes) == wanted
    assert [devices.choose_precision(processes, before) for before in (
        "float32", "float16", "bfloat16", "int8")] == ["float32", "float16", "bfloat16", wanted]


def test_large_models_sample_in_half_precision_where_it_is_fast_unless_asked_for(monkeypatch):
    for asked, device, millions, fast, wanted in (
            ("auto", "cpu", 300, False, "float32"), ("auto", "cpu", 300, True, "bfloat16"),
            ("auto", "cuda", 300, True, "float16"), ("auto", "cuda", 50, True, "float32"),
            ("bfloat16", "cpu", 300, False, "bfloat16"), ("float32", "cuda", 300, True, "float32")):
        monkeypatch.setattr(devices, "fast_bfloat16", lambda device: fast)
        found = devices.sampling_precision(asked, torch.device(device), millions * 10 ** 6)
        assert found == getattr(torch, wanted)


@given(total=st.integers(0, 2 ** 38), each=st.integers(1, 2 ** 40))
def test_images_at_once_are_1_to_100_and_fit(total, each):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_properties",
                      lambda device: SimpleNamespace(total_memory=total))
        count = devices.images_that_fit(torch.device("cuda"), each)
    assert type(count) is int and 1 <= count <= 100 and (count == 1 or count * each <= total)
    assert count == 100 or (count + 1) * each > 0.3 * total


def test_convolutions_of_a_gpu_are_exact_in_float32_and_find_their_fastest_kernel():
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = True, False
    Processes("cpu")
    assert torch.backends.cudnn.benchmark and not torch.backends.cudnn.allow_tf32


@pytest.mark.slow
def test_the_critics_weight_does_not_go_backward_through_the_whole_compiled_model(monkeypatch):
    """Its two gradients end at the decoder's last layer: compiled or not, as many convolutions are
    differentiated. (A compiled graph always computes all its gradients.)"""
    monkeypatch.setattr(import_module("torch._functorch.config"), "donated_buffer", False)
    counts = []
    for compiled in (lambda model: model, partial(torch.compile, backend="aot_eager")):
        stage = stage_of("tokenizer", adversarial=1.0, learn="ema")
        model, batches = compiled(stage.model.train()), stage.batches(0)
        stage.critic.model = compiled(stage.critic.model)
        for _ in range(2):                                 # the first places the codes
            m5.train_step(stage, model, next(batches), 0.9)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
            m5.train_step(stage, model, next(batches), 0.9)
        counts += [e.count for e in found.key_averages() if "convolution_backward" in e.key]
    assert len(counts) == 2 and counts[0] == counts[1] > 20


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="asks Linux about memory")
def test_a_checkpoint_is_read_from_the_disk_when_and_where_it_is_used(tmp_path):
    """Eight processes that resume would else hold eight copies of weights and optimizer."""
    def own():
        lines = dict(line.split(":") for line in open("/proc/self/status"))
        return int(lines["RssAnon"].split()[0]) * 1024
    wanted = torch.arange(2e7)                             # 80 MB
    torch.save({"model": wanted}, tmp_path / "model.pt")
    before = own()
    state = checkpoints.load_checkpoint(tmp_path / "model.pt")
    assert torch.equal(state["model"], wanted) and own() - before < 8e6


@pytest.fixture
def alone():
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_sharded_weights_are_multiplied_in_half_precision_but_the_attentions_factor_is_not(
        alone, precision):
    """bfloat16 has 7 bits after the first: the factor would be off by up to 0.4 %."""
    stage = stage_of("transformer", optimizer="adamw")
    stage.settings.shard, stage.settings.precision, seen = True, precision, {}
    names = stage.model.state_dict().keys()
    stage = type(stage)(stage.settings, stage.processes, stage.tokenizer, stage.model.config,
                        stage.data, "abc")
    assert stage.model.state_dict().keys() == names
    layer = stage.model.blocks[1].attention
    for module, name in ((layer, "log_scale"), (layer.qkv, "weight"), (layer.proj, "bias")):
        module.register_forward_pre_hook(
            lambda module, args, name=name: seen.update({name: getattr(module, name).dtype}))
    assert not m5.train_step(stage, stage.model.train(), next(stage.batches(0)), 0.5).skipped
    half = getattr(torch, precision)
    assert seen == dict(log_scale=torch.float32, weight=half, bias=half)
    assert stage.describe(torch.zeros(21), 0.0)[1]["qk_factor"] == pytest.approx(4, abs=0.1)


def test_the_largest_factor_on_queries_and_keys_is_logged_where_products_are_rounded():
    stage = stage_of("transformer")
    for block, value in zip(stage.model.blocks, (0.5, 9.0, 2.0), strict=True):   # 9: cut to ln 100
        block.attention.log_scale.data[:, 1] = value
    loss = torch.zeros(stage.model.L)
    assert "qk_factor" not in stage.describe(loss, 0.0)[1]
    stage.settings.precision = "bfloat16"
    text, numbers = stage.describe(loss, 0.0)
    assert numbers["qk_factor"] == pytest.approx(100) and text.endswith("| qk 100")
    stage.model.blocks[1].attention.log_scale.data.fill_(1.0)
    assert stage.describe(loss, 0.0)[1]["qk_factor"] == pytest.approx(7.389, abs=1e-3)
