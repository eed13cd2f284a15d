"""The network against torchvision, timm and plain formulas; checkpoints of every origin; what each mistake says."""
import argparse
import io
import json
import math
import os
import signal
import subprocess
import sys
from unittest.mock import MagicMock

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import resnet50
from resnet50 import ResNet50, UserError
from tests.conftest import ROOT


def randomise(model, seed=0):
    """Batch-norm as after training: nothing is the identity."""
    g = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1, generator=g)
            m.running_var.uniform_(0.5, 2, generator=g)
            m.weight.data.uniform_(0.3, 1, generator=g)
            m.bias.data.normal_(0, 0.1, generator=g)
    return model


def test_equals_torchvision_in_outputs_and_one_sgd_step():
    import torchvision
    torch.manual_seed(0)
    theirs, ours = randomise(torchvision.models.resnet50()), ResNet50()
    assert list(theirs.state_dict()) == list(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x, y = torch.randn(3, 3, 97, 65), torch.tensor([5, 999, 0])
    with torch.no_grad():
        assert (theirs.eval()(x) - ours.eval()(x)).abs().max() <= 1e-5
    for model in (theirs.train(), ours.train()):
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    for (name, a), b in zip(theirs.state_dict().items(), ours.state_dict().values()):
        assert torch.allclose(a.float(), b.float(), rtol=1e-5, atol=1e-6), name


def test_flat_1x1_convolutions_train_like_convolutions():
    import train
    torch.manual_seed(0)
    a, b = (randomise(ResNet50(num_classes=7)).to(memory_format=torch.channels_last).double().train() for _ in range(2))
    b.load_state_dict(a.state_dict())
    train.cpu_convolutions(b)
    assert sum(isinstance(m, train.FlatConv) for m in b.modules()) == 36
    x = torch.randn(2, 3, 65, 49).to(memory_format=torch.channels_last).double()
    for m in (a, b):
        m(x).logsumexp(1).sum().backward()
    for (name, p), q in zip(a.named_parameters(), b.parameters()):
        assert torch.allclose(p.grad, q.grad, rtol=1e-9, atol=1e-11), name
    assert [n for n, _ in a.named_parameters()] == [n for n, _ in b.named_parameters()]


@pytest.mark.parametrize("groups", [1, 2])
def test_a_strided_convolution_of_one_pixel_has_a_gradient_of_its_own(groups):
    """And not of what was in memory before. In bfloat16 oneDNN's has, where it has kernels for that"""
    import train
    conv = train.cpu_convolutions(nn.Sequential(nn.Conv2d(64, 64, 3, 2, 1, groups=groups)))[0]
    conv, x, gradients = conv.to(memory_format=torch.channels_last), torch.randn(2, 64, 1, 1), []
    for dtype in (torch.float32, *[torch.bfloat16] * 20):
        del [torch.full((n,), math.nan) for n in range(64, 40000, 400)][:]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = conv(x)
        gradients += torch.autograd.grad(y.float().square().sum(), conv.weight)
        assert y.shape == (2, 64, 1, 1) and torch.allclose(gradients[-1], gradients[0], rtol=0.05, atol=0.1), dtype
    assert conv(x.expand(2, 64, 5, 4)).shape == (2, 64, 3, 2)


def test_size_of_the_variants():
    def params(**config):
        return sum(p.numel() for p in ResNet50(**config).parameters())
    assert params() == 25557032
    assert params(attention="split") == 27483240  # ResNeSt-50 as published
    assert params(attention="se") == 28088024  # timm seresnet50
    assert sum(resnet50.count_macs(ResNet50(), 224).values()) == 4089184256


def test_initial_weights():
    """Convolutions by their outputs (He et al. 2015), as torchvision's; every block as the identity."""
    torch.manual_seed(0)
    model = ResNet50()
    for conv in (m for m in model.modules() if isinstance(m, torch.nn.Conv2d)):
        expected = (2 / (conv.out_channels * conv.kernel_size[0] ** 2)) ** 0.5
        assert 0.95 < conv.weight.std() / expected < 1.05
    assert all(bool((block.bn3.weight == 0).all()) for block in model.blocks())


def test_stride_on_1x1_is_the_2015_network():
    import torchvision
    torch.manual_seed(1)
    theirs = randomise(torchvision.models.resnet50())
    for layer in (theirs.layer2, theirs.layer3, theirs.layer4):
        layer[0].conv1.stride, layer[0].conv2.stride = (2, 2), (1, 1)
    ours = ResNet50(stride_on="1x1")
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        assert (theirs.eval()(x) - ours.eval()(x)).abs().max() <= 1e-5


def test_split_attention_against_the_formula():
    torch.manual_seed(2)
    module = randomise(resnet50.SplitAttention(16, 24)).double().eval()
    x = torch.randn(2, 16, 5, 7, dtype=torch.float64)
    with torch.no_grad():
        u = F.relu(module.bn0(module.conv(x))).view(2, 2, 24, 5, 7)  # (N, radix, C, H, W)
        hidden = F.relu(module.bn1(module.fc1(u.sum(1).mean((2, 3), keepdim=True))))
        attention = module.fc2(hidden).view(2, 2, 24).softmax(1)
        expected = (u * attention[..., None, None]).sum(1)
        assert torch.allclose(module(x), expected, atol=1e-12)


@pytest.mark.parametrize("name, config", [("seresnet50", {"attention": "se"}), ("resnest50d", {"attention": "split"}),
                                          ("resnet50", {})])
def test_timm_weights_load_and_agree(name, config):
    timm = pytest.importorskip("timm")
    torch.manual_seed(3)
    theirs, ours = randomise(timm.create_model(name)), ResNet50(**config)
    resnet50.load_weights(ours, theirs.state_dict(), name)
    x = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        a, b = theirs.eval()(x), ours.eval()(x)
    assert (a - b).abs().max() <= 1e-5 * a.abs().max()


def test_small_stem_keeps_the_resolution():
    model = ResNet50(num_classes=10, stem="small").eval()
    x = model.maxpool(model.bn1(model.conv1(torch.zeros(1, 3, 32, 32))))
    assert x.shape == (1, 64, 32, 32) and model(torch.zeros(2, 3, 33, 31)).shape == (2, 10)


def test_drop_path_keeps_the_mean_and_is_off_in_evaluation():
    torch.manual_seed(4)
    x = torch.ones(20000, 1, 1, 1)
    dropped = resnet50.drop_path(x, 0.3, True)
    assert dropped.unique().tolist() == pytest.approx([0.0, 1 / 0.7]) and abs(dropped.mean() - 1) < 0.02
    assert resnet50.drop_path(x, 0.3, False) is x
    rates = [b.drop_rate for b in ResNet50(drop_path=0.15).blocks()]
    assert rates[0] == 0 and rates[-1] == pytest.approx(0.15) and rates == sorted(rates)


def test_features_and_branches_are_dropped_in_training():
    torch.manual_seed(0)
    model, seen = randomise(ResNet50(num_classes=4, dropout=0.25, drop_path=0.5)).eval(), []
    model.fc.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    pixels, x = torch.randn(4, 3, 32, 32), torch.rand(64, 2048, 1, 1)
    with torch.no_grad():
        for model.training in (False, True):  # its blocks stay in evaluation
            model(pixels)
        plain, dropped = (features[seen[0] > 0] for features in seen)
        assert abs((dropped > 0).float().mean() - 0.75) < 0.03
        assert torch.allclose(dropped, plain / 0.75 * (dropped > 0))
        assert 16 < (model.layer4[2].train()(x) == x).flatten(1).all(1).sum() < 48


@pytest.mark.parametrize("config", [{}, {"attention": "split"}, {"attention": "se", "drop_path": 0.2}])
def test_gradient_checkpointing_changes_nothing_but_memory(config):
    steps = []
    for checkpointing in (False, True):
        torch.manual_seed(5)
        model = ResNet50(num_classes=5, **config).train()
        model.grad_checkpointing = checkpointing
        torch.manual_seed(6)
        model(torch.randn(3, 3, 64, 64)).logsumexp(1).sum().backward()
        steps.append(({n: p.grad for n, p in model.named_parameters()}, model.state_dict()))
    for a, b in zip(*steps):
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_widths_build_a_pruned_network_and_names_are_checked():
    widths = {"conv1": 48, "layer1": 200, "layer1.0.conv1": 40, "layer4.2.conv2": 104}
    model = ResNet50(num_classes=3, widths=widths).eval()
    assert model.layer1[0].conv1.weight.shape == (40, 48, 1, 1) and model.layer2[0].conv1.in_channels == 200
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 3)
    assert ResNet50(**model.config).load_state_dict(model.state_dict())
    for attention in ("none", "split"):  # a stage's first block projects, whatever the widths
        model = ResNet50(attention=attention, widths={"conv1": 64, "layer1": 64})
        assert [n for n, b in model.named_modules() if getattr(b, "downsample", None)] == [
            f"layer{i}.0" for i in range(1, 5)]
    with pytest.raises(ValueError, match="layer9"):
        ResNet50(widths={"layer9": 3})
    with pytest.raises(ValueError, match="stem='huge'"):
        ResNet50(stem="huge")


def test_normalize_and_predict_against_torchvision():
    from torchvision.transforms.v2 import functional as T
    pixels = torch.randint(0, 256, (3, 3, 40, 32), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    expected = T.normalize(pixels.float() / 255, resnet50.PREPROCESS["mean"], resnet50.PREPROCESS["std"])
    got = resnet50.normalize(pixels, resnet50.PREPROCESS)
    assert (got - expected).abs().max() < 2e-6 and got.is_contiguous(memory_format=torch.channels_last)
    model = ResNet50(num_classes=4).eval()
    assert torch.equal(resnet50.predict(model, pixels), model(got)) and pixels.dtype == torch.uint8
    with torch.inference_mode():
        once = resnet50.per_channel_once((0.1, 0.2, 0.3), "cpu")
    assert torch.equal(once, resnet50.per_channel((0.1, 0.2, 0.3), "cpu")) and not once.is_inference()
    assert once is resnet50.per_channel_once((0.1, 0.2, 0.3), "cpu")


# ------------------------------------------------------------------------------------------------ checkpoints

@pytest.fixture
def model():
    torch.manual_seed(7)
    return randomise(ResNet50(num_classes=6, widths={"layer3.1.conv1": 128}, drop_path=0.1))


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


def test_checkpoint_round_trip(model, tmp_path):
    path = str(tmp_path / "a.pt")
    model.preprocess.update(crop=192, interpolation="bicubic")
    resnet50.save_checkpoint(path, model, classes=list("abcdef"), metrics={"top1": 50.0}, args={"lr": 0.1})
    raw = torch.load(path, weights_only=True)
    assert (raw["format"] == "resnet50/1" and raw["classes"] == list("abcdef")
            and raw["config"]["widths"] == {"layer3.1.conv1": 128})
    again = resnet50.build_model(resnet50.load_checkpoint(path), path)
    assert same_weights(model, again) and again.preprocess == model.preprocess and again.config == model.config
    assert not again.training and again.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(UserError, match="stride_on=3x3, not 1x1"):
        resnet50.build_model(resnet50.load_checkpoint(path), path, stride_on="1x1")
    assert os.listdir(tmp_path) == ["a.pt"]


def test_ours_load_in_torchvision(tmp_path):
    import torchvision
    ours, path = ResNet50(num_classes=9), str(tmp_path / "a.pt")
    resnet50.save_checkpoint(path, ours, classes=[str(i) for i in range(9)])
    torchvision.models.resnet50(num_classes=9).load_state_dict(torch.load(path, weights_only=True)["model"])


@pytest.mark.parametrize("wrap", [
    lambda s: s,
    lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}, "epoch": 3},
    lambda s: {"model": {f"_orig_mod.module.{k}": v for k, v in s.items()}, "optimizer": {}},
    lambda s: {"model": {k: v * 0 for k, v in s.items()},
               "model_ema": {"n_averaged": torch.tensor(4), **{f"module.{k}": v for k, v in s.items()}},
               "args": argparse.Namespace(lr=0.1, model="resnet50")},
    lambda s: {"state_dict": {k: v * 0 for k, v in s.items()}, "state_dict_ema": s, "arch": "resnet50",
               "args": argparse.Namespace(aa=None)},
    lambda s: {k: v for k, v in s.items() if not k.endswith("num_batches_tracked")},
])
def test_foreign_files(wrap, tmp_path):
    torch.manual_seed(8)
    reference, path = randomise(ResNet50(num_classes=6)), str(tmp_path / "f.pth")
    torch.save(wrap(reference.state_dict()), path)
    loaded = resnet50.load_checkpoint(path)
    assert loaded["format"] is None and loaded["classes"] is None
    assert same_weights(reference, resnet50.build_model(loaded, path))


def test_half_precision_and_safetensors(tmp_path):
    reference = randomise(ResNet50(num_classes=6))
    half = {k: v.half() if v.is_floating_point() else v for k, v in reference.state_dict().items()}
    torch.save(half, tmp_path / "h.pth")
    model = resnet50.build_model(resnet50.load_checkpoint(str(tmp_path / "h.pth")), "h.pth")
    assert model.fc.weight.dtype == torch.float32 and torch.equal(model.fc.weight, half["fc.weight"].float())
    safetensors = pytest.importorskip("safetensors.torch")
    path = str(tmp_path / "s.safetensors")
    safetensors.save_file(reference.state_dict(), path, metadata={"format": "pt"})
    assert same_weights(reference, resnet50.build_model(resnet50.load_checkpoint(path), path))
    safetensors.save_file(half, path)
    assert same_weights(model, resnet50.build_model(resnet50.load_checkpoint(path), path))


class Foreign:
    pass


def test_mistakes_are_one_line_naming_file_and_keys(model, tmp_path):
    path = str(tmp_path / "x.pt")

    def message(**config):
        with pytest.raises(UserError) as caught:
            resnet50.build_model(resnet50.load_checkpoint(path), path, **config)
        text = str(caught.value)
        assert path in text and "\n" not in text and caught.value.code in (2, 3)
        return text

    state = ResNet50(num_classes=6).state_dict()
    torch.save({k: v for k, v in state.items() if k != "layer2.0.bn1.weight"}, path)
    assert "missing layer2.0.bn1.weight" in message()
    torch.save({**state, "extra.weight": torch.zeros(1)}, path)
    assert "surplus extra.weight" in message()
    torch.save(state, path)
    assert "fc.weight (6, 2048) instead of (1000, 2048)" in message(num_classes=1000)
    assert "missing layer1.0.se.fc1.weight" in message(attention="se")
    torch.save({**state, "format": "resnet50/9"}, path)
    assert "resnet50/9" in message()
    torch.save({"model": Foreign(), "when": __import__("fractions").Fraction(1, 2)}, path)
    text = message()
    assert "refused" in text and "Foreign" in text and "fractions.Fraction" in text
    for content in (b"", b"not a checkpoint at all", b"\x80\x02garbage", b"PK\x03\x04", b"\x10\0\0\0\0\0\0\0{nonsense"):
        with open(path, "wb") as f:
            f.write(content)
        message()
    for content in ([1, 2], {0: torch.zeros(2)}, {0: "cat"}):
        torch.save(content, path)
        message()
    assert "holds no weights" in message()
    path = str(tmp_path / "absent.pt")
    assert "No such file" in message()
    path = str(tmp_path)
    message()


def test_truncation_anywhere_is_an_error_not_a_crash(tmp_path):
    path = str(tmp_path / "t.pt")
    resnet50.save_checkpoint(path, ResNet50(num_classes=2, widths={f"layer{i}": 16 for i in range(1, 5)}), classes="ab")
    with open(path, "rb") as f:
        whole = f.read()
    for cut in (1, 9, 100, len(whole) // 3, len(whole) - 1000, len(whole) - 1):
        with open(path, "wb") as f:
            f.write(whole[:cut])
        with pytest.raises(UserError, match="t.pt"):
            resnet50.load_checkpoint(path)


def test_class_lists(tmp_path):
    path = str(tmp_path / "c.json")

    def read(value):
        with open(path, "w") as f:
            json.dump(value, f)
        return resnet50.read_classes(path)
    assert read(["b", "a"]) == (["b", "a"], None)
    assert read([{"index": 1, "wnid": "n2", "name": "y"}, {"index": 0, "wnid": "n1", "name": "x"}]) == (
        ["x", "y"], ["n1", "n2"])
    for bad in ({"a": 1}, [1, 2], [{"index": 5, "name": "x"}], [{"name": "x"}], 3):
        with pytest.raises(UserError, match="c.json"):
            read(bad)


KILLED_WRITER = """
import os, sys, signal, builtins
sys.path.insert(0, {root!r})
import resnet50
path, limit = sys.argv[1], int(sys.argv[2])
real = builtins.open
class Dying:
    def __init__(self, f): self.f = f
    def __enter__(self): return self
    def __exit__(self, *a): self.f.close()
    def write(self, data):
        self.f.write(bytes(data)[:limit]); self.f.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    def __getattr__(self, name): return getattr(self.f, name)
builtins.open = lambda file, mode="r", *a, **k:\
 Dying(real(file, mode, *a, **k)) if "w" in mode else real(file, mode, *a, **k)
resnet50.write_atomic(path, b"n" * 1000)
"""


@pytest.mark.parametrize("limit", [0, 1, 999, 1000])
def test_kill_during_a_write_keeps_the_old_file(limit, tmp_path):
    path, other = tmp_path / "last.pt", tmp_path / ".best.pt.1.tmp"
    path.write_bytes(b"old")
    other.write_bytes(b"what another process writes")
    done = subprocess.run([sys.executable, "-c", KILLED_WRITER.format(root=ROOT), str(path), str(limit)])
    assert done.returncode == -signal.SIGKILL and path.read_bytes() == b"old"
    assert len(os.listdir(tmp_path)) == 3  # the killed writer's temporary file...
    resnet50.write_atomic(str(path), b"newer")
    assert path.read_bytes() == b"newer" and {path, other} == {*tmp_path.iterdir()}  # ...goes with the next write


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    said, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: said.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))))
    monkeypatch.setattr(os, "replace", lambda *names: said.append("renamed") or replace(*names))
    resnet50.write_atomic(str(tmp_path / "last.pt"), b"new")
    assert said == [f".last.pt.{os.getpid()}.tmp", "renamed", tmp_path.name]


def test_full_disk_keeps_the_old_file(tmp_path):
    path = tmp_path / "last.pt"
    path.write_bytes(b"old")
    code = (f"import resource, signal, sys; sys.path.insert(0, {ROOT!r}); import resnet50\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
            f"resnet50.run_script(lambda a: resnet50.write_atomic({str(path)!r}, b'x' * 100000), None, 'test')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 3 and "last.pt: not written" in done.stderr and done.stderr.count("\n") == 1
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["last.pt"]


def test_a_checkpoint_that_memory_does_not_take_keeps_the_old_file(tmp_path, monkeypatch):
    class Small(io.BytesIO):
        def write(self, part):
            if self.tell() + len(part) > 1e6:
                raise MemoryError
            return super().write(part)
    path = tmp_path / "last.pt"
    path.write_bytes(b"old")
    monkeypatch.setattr(io, "BytesIO", Small)
    with pytest.raises(UserError, match=r"last.pt: not written \(out of memory\)"):
        resnet50.save_checkpoint(str(path), ResNet50(num_classes=2), classes=["a", "b"])
    for error, said in (MemoryError(), "out of memory"), (RuntimeError("CUDA error: illegal address"), "^CUDA error"):
        monkeypatch.setattr(torch, "save", MagicMock(side_effect=error))
        with pytest.raises(Exception, match=said):
            resnet50.save_checkpoint(str(path), ResNet50(num_classes=2), classes=["a", "b"])
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["last.pt"]


def test_streams_that_take_nothing_and_ctrl_c(tmp_path):
    """Full or closed, stderr is no reason to end; a result that stdout does not take is an error, and Ctrl-C one line.
    In a process of its own: libraries that other tests load leave a signal's handler without a valid stack."""
    code = f"""if 1:
        import os, signal, sys; sys.path.insert(0, {ROOT!r}); import resnet50
        def main(how):
            print("half way", file=sys.stderr, flush=True)
            with open("file", "w") as f:
                assert f.fileno() > 2
            os.rename("file", how)
            return {{}}
        for how in ("full", "closed"):
            if not os.fork():
                for number in (1, 2):
                    os.dup2(os.open("/dev/full", os.O_WRONLY), number)
                if how == "closed":
                    sys.stdout = sys.stderr = sys.__stderr__ = None
                    os.closerange(1, 3)
                resnet50.run_script(main, how, "test")
                sys.exit()
            print(how, os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        resnet50.run_script(lambda args: signal.raise_signal(signal.SIGINT), None, "test")"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (130, "full 3\nclosed 0\n", "test: interrupted\n")
    assert sorted(os.listdir(tmp_path)) == ["closed", "full"]


def test_what_is_too_large_is_one_line(capsys):
    parse = resnet50.get_args_parser().parse_args
    for flag in "--batch-size", "--image-size":
        with pytest.raises(SystemExit) as caught:
            resnet50.run_script(resnet50.main, parse(["--device", "cpu", flag, str(10 ** 9)]), "test")
        said, = (line for line in capsys.readouterr().err.splitlines() if line.startswith("test: error: "))
        assert caught.value.code == 2 and "can't allocate memory" in said
    error = RuntimeError("adaptive_avg_pool2d_backward_cuda does not have a deterministic implementation, but you\n")
    with pytest.raises(SystemExit):  # VGG's, with --deterministic
        resnet50.run_script(MagicMock(side_effect=error), None, "test")
    assert capsys.readouterr().err.startswith("test: error: adaptive_avg_pool2d_backward_cuda does not have")
    for flags in ["--batch-size", str(10 ** 30)], ["--device", "cuda:9999999999"], ["--device", "cuda:\u0663"]:
        with pytest.raises(SystemExit) as caught:
            parse(flags)
        assert caught.value.code == 2


def test_command_line(tmp_path):
    def call(*args, **env):
        return subprocess.run([sys.executable, "resnet50.py", "--device", "cpu", *args], capture_output=True, text=True,
                              cwd=ROOT, env={**os.environ, **env})
    done = call("--image-size", "64", "--profile")
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["params"] == 25557032 and result["macs"] == sum(resnet50.count_macs(ResNet50(), 64).values())
    assert "layer4" in done.stderr and "aten::" in done.stderr
    path = str(tmp_path / "p.pt")
    resnet50.save_checkpoint(path, ResNet50(num_classes=2, stem="small", widths={"layer4": 64}), classes="ab")
    assert json.loads(call("--checkpoint", path, "--image-size", "32").stdout)["params"] == sum(
        p.numel() for p in ResNet50(num_classes=2, stem="small", widths={"layer4": 64}).parameters())
    done = call("--checkpoint", str(tmp_path / "none.pt"))
    assert done.returncode == 3 and done.stderr.strip().splitlines() == [
        f"resnet50.py: error: {tmp_path}/none.pt: No such file or directory"]
    done = call(RESNET50_EXT="maybe")
    assert done.returncode == 2 and done.stderr == "resnet50.py: error: RESNET50_EXT=maybe: expected off, cpu or " \
        "require, or nothing\n"
    if not torch.cuda.is_available():
        done = call("--device", "cuda")  # the last one named counts
        assert done.returncode == 2 and done.stderr == "resnet50.py: error: --device cuda: PyTorch sees no CUDA " \
            "devices here\n"
    assert (call("--weights", "NOPE").returncode == 2
            and call("--attention", "split", "--stride-on", "1x1").returncode == 2)
