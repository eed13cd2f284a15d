"""export.py: every kind of network in every format, read back by other runtimes where they are installed, by
onnx.reference and by processes that do not know this repository; and what is left behind when something goes wrong."""
import errno
import json
import os
import signal
import stat
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from PIL import Image
from torchvision.models import VisionTransformer

import data
import export
import resnet50
from resnet50 import ResNet50, UserError, save_checkpoint
from tests.test_int8 import VARIANTS, build, photographs

SIDE = 75  # odd at every stage
CLASSES = [f"class {i}" for i in range(7)]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(variant, precision) -> file, made once"""
    made = {}

    def make(variant, precision, **more):
        key = variant, precision, tuple(more.items())
        if key not in made:
            model = build(variant)
            if precision == "int8":
                model = resnet50.quantize(model, photographs(5, SIDE, SIDE).split(2), **more)
            made[key] = str(tmp_path_factory.mktemp("net") / f"{variant}-{precision}.pt")
            save_checkpoint(made[key], model, classes=CLASSES)
        return made[key]
    return make


@pytest.fixture
def call(tmp_path):
    def run(path, *flags):
        args = export.get_args_parser().parse_args(["--checkpoint", str(path), "--image-size", str(SIDE), "--out",
                                                    str(tmp_path / "out"), *map(str, flags)])
        return export.main(args)
    return run


def load(path):
    return resnet50.build_model(resnet50.load_checkpoint(path), path)


def logits(path, pixels):
    with torch.no_grad():
        return resnet50.predict(load(path), pixels).numpy()


def sizes(path):
    """names in the folder of an export"""
    return sorted(os.listdir(os.path.dirname(path)))


# ----------------------------------------------------------------------------------------------------------- ONNX

@pytest.mark.parametrize("precision", ["float", "int8"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_onnx_files_compute_the_network(variant, precision, checkpoint, call):
    pixels = variant in ("pruned", "se", "small")
    path = checkpoint(variant, precision)
    found = call(path, "--dynamic-batch", *["--pixels"] * pixels)
    model = onnx.load(found["file"])
    onnx.checker.check_model(model, full_check=True)
    assert found["max_difference"] <= 1e-4 and found["argmax_agreement"] == 100 and found["images"] == 8
    assert found["bytes"] == os.path.getsize(found["file"])
    shown = photographs(3, SIDE, SIDE, seed=5)
    x, wanted = export.feed(shown, load(path), pixels).numpy(), logits(path, shown)
    exact = precision == "int8" and variant not in ("se", "split")
    if precision == "int8":
        assert found["identical_bytes"] == 100 if exact else found["identical_bytes"] > 99.9
        assert all(len(v.raw_data) < 1e4 for v in model.graph.initializer if v.data_type == onnx.TensorProto.FLOAT)
    for n in (1, 3):  # the file itself, in float32
        got, = ReferenceEvaluator(model).run(None, {model.graph.input[0].name: x[:n]})
        assert np.abs(got - wanted[:n]).max() <= (1e-4 if exact or precision == "float" else 0.05) * abs(wanted).max()
    onnxruntime = pytest.importorskip("onnxruntime")
    got, = onnxruntime.InferenceSession(found["file"]).run(None, {model.graph.input[0].name: x})
    assert np.abs(got - wanted).max() <= (1e-4 if exact or precision == "float" else 0.05) * abs(wanted).max()
    if "openvino" in found["runtimes"]:
        assert found["runtimes"]["openvino"]["max_difference"] <= (1e-4 if precision == "float" else 0.1), found


def test_runtimes_that_requantize_in_float32_give_our_bits(checkpoint):
    """A whole network at 224 pixels, as wide as it is: what EXACT and one residual scale are for. The convolutions
    behind a residual are float32 in onnxruntime, and exact even so."""
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    net = ResNet50(num_classes=9)
    for block in net.blocks():
        torch.nn.init.constant_(block.bn3.weight, 0.3)
    pixels = photographs(4, 96, 96, seed=1)
    net.train()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0
        net(resnet50.normalize(pixels, net.preprocess))
    net = resnet50.quantize(net.eval(), [pixels])
    args = export.get_args_parser().parse_args(["--pixels", "--batch-size", "4"])
    args.image_size, args.opset = 96, 20
    model, watched = export.onnx_model(net, args, export.Exported(net, pixels=True))
    for _, name in watched:
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, None))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    ours = {}
    net.run(pixels, watch=lambda step, y: ours.__setitem__(step.name, y.numpy()))
    got = onnxruntime.InferenceSession(model.SerializeToString(), options).run(
        None, {"pixels": pixels.permute(0, 2, 3, 1).numpy()})
    same = [(ours[name].reshape(y.shape) == y).mean() for (name, _), y in zip(watched, got[1:], strict=True)]
    assert len(same) == 51 and min(same) > 0.9999 and np.median(same) == 1


def test_float_layers_and_checkpoints_from_before(checkpoint, call, tmp_path):
    """Mixed precision; and residual gains that differ by channel, which took another form in older files"""
    model = build("plain")
    for kept, same in ((["conv1", "layer1.1.conv3", "layer2.0.conv3", "layer3.2.conv2", "fc"], 90),
                       (["layer4.2.conv1", "layer4.2.conv3"], 99.99)):  # a value that is rounded otherwise has heirs
        mixed = resnet50.quantize(model, photographs(5, SIDE, SIDE).split(2), float_layers=kept)
        save_checkpoint(tmp_path / "mixed.pt", mixed, classes=CLASSES)
        found = call(tmp_path / "mixed.pt", "--dynamic-batch", "--overwrite")
        assert found["identical_bytes"] > same and found["max_difference"] < 1e-2
    old = load(checkpoint("plain", "int8"))
    block = old.get_submodule("layer2.1.conv3")
    block.gain[::2] += 1
    block.mult[::3] += 5
    save_checkpoint(tmp_path / "old.pt", old, classes=CLASSES)
    found = call(tmp_path / "old.pt", "--dynamic-batch", "--overwrite")
    assert found["identical_bytes"] == 100
    kinds = [n.op_type for n in onnx.load(found["file"]).graph.node]
    assert kinds.count("Mul") == 4  # two here, one for the pixels, one behind the average


@pytest.mark.parametrize("flag, kinds", [("--signed", {onnx.TensorProto.INT8}),
                                         ("--quantize-adds", {onnx.TensorProto.UINT8})])
def test_coarser_forms_for_other_runtimes(flag, kinds, checkpoint, call):
    path = checkpoint("pruned", "int8")
    found = call(path, "--dynamic-batch", flag, "--pixels")
    model = onnx.load(found["file"])
    values = {v.name: v for v in model.graph.initializer}
    zeros = [values[n.input[2]] for n in model.graph.node if n.op_type == "QuantizeLinear"]
    assert {z.data_type for z in zeros} == kinds and "identical_bytes" not in found
    if flag == "--signed":
        assert all((onnx.numpy_helper.to_array(values[n.input[2]]) == 0).all() for n in model.graph.node
                   if n.op_type.endswith("quantizeLinear") or n.op_type == "QuantizeLinear")
    else:  # both inputs of every Add come from a DequantizeLinear
        made = {o: n.op_type for n in model.graph.node for o in n.output}
        adds = [n for n in model.graph.node if n.op_type == "Add"]
        assert len(adds) == 12 and all({made[i] for i in n.input} == {"DequantizeLinear"} for n in adds)
    shown = photographs(8, SIDE, SIDE, seed=5)
    got, = ReferenceEvaluator(model).run(None, {"pixels": export.feed(shown, None, True).numpy()})
    wanted = logits(path, shown)
    assert 0 < np.abs(got - wanted).max() < 0.2 * np.abs(wanted).max()


@pytest.mark.parametrize("precision", ["float", "int8"])
def test_opsets_load(precision, checkpoint, call):
    onnxruntime = pytest.importorskip("onnxruntime")
    shown = photographs(1, SIDE, SIDE, seed=5)
    path = checkpoint("split" if precision == "float" else "pruned", precision)
    wanted = logits(path, shown)
    for opset in (13, 17, 18, 20):  # the ends, and around what changed for its operations in 18
        found = call(path, "--opset", opset, "--name", f"opset{opset}", "--top-k", 2, "--softmax")
        assert onnx.load(found["file"]).opset_import[0].version == opset == found["opset"]
        x = export.feed(shown, load(path), False).numpy()
        values, classes = onnxruntime.InferenceSession(found["file"]).run(None, {"input": x})
        order = torch.from_numpy(wanted).softmax(1).topk(2)
        assert np.allclose(values, order.values, atol=1e-4) and (classes == order.indices.numpy()).all()


@pytest.mark.parametrize("precision", ["float", "int8"])
@pytest.mark.parametrize("flags, outputs", [
    ([], ["logits"]), (["--softmax"], ["probabilities"]), (["--top-k", 3], ["top_logits", "top_classes"])])
def test_a_file_says_what_it_is(precision, flags, outputs, checkpoint, call):
    found = call(checkpoint("plain", precision), "--batch-size", 3, "--pixels", *flags)
    model = onnx.load(found["file"])
    with open(found["file"] + ".json") as f:
        beside = json.load(f)
    said = {p.key: p.value for p in model.metadata_props}
    assert json.loads(said["classes"]) == CLASSES == beside["classes"] and beside["outputs"] == outputs
    assert json.loads(said["preprocess"])["crop"] == SIDE == beside["preprocess"]["crop"]
    assert beside["preprocess"]["exif"] is False and beside["cascade"] is None and "cascade" not in said
    assert said["precision"] == beside["precision"] == {"float": "float32"}.get(precision, precision)
    assert beside["input"] == dict(name="pixels", dtype="uint8", shape=[3, SIDE, SIDE, 3], layout="NHWC",
                                   normalized=False)
    graph = model.graph
    assert [d.dim_value for d in graph.input[0].type.tensor_type.shape.dim] == beside["input"]["shape"]
    assert [o.name for o in graph.output] == outputs and found["images"] == 6
    assert sizes(found["file"]) == ["resnet50.onnx", "resnet50.onnx.json"]
    assert found["opset"] == model.opset_import[0].version == 20
    assert not any(v.external_data for v in graph.initializer)


def test_half_precision(checkpoint, call):
    """Also where a variance is beyond float16's 65504"""
    path = checkpoint("se", "float")
    large = resnet50.load_checkpoint(path)
    for key, times in (("conv1.weight", 1e3), ("bn1.running_mean", 1e3), ("bn1.running_var", 1e6)):
        large["model"][key] *= times
    torch.save(large, path := os.path.join(os.path.dirname(path), "large.pt"))
    half, whole = call(path, "--fp16", "--dynamic-batch"), call(path, "--dynamic-batch", "--name", "whole")
    assert half["precision"] == "float16" and 0 < half["max_difference"] < 1e-2
    weights = [onnx.load(found["file"]).graph.initializer for found in (half, whole)]
    assert {v.data_type for v in weights[0]} == {onnx.TensorProto.FLOAT16}
    assert 2 * sum(len(v.raw_data) for v in weights[0]) == sum(len(v.raw_data) for v in weights[1])


def test_networks_that_are_no_plain_resnet50(call, tmp_path):
    shown = photographs(2, SIDE, SIDE, seed=5)
    torch.manual_seed(0)
    base = build("plain")
    dynamic = resnet50.quantize_classifier(base)
    adapted = ResNet50(**{**base.config, "adapter": 3}).eval()
    for block in adapted.blocks():
        torch.nn.init.normal_(block.adapter.up.weight, std=0.1)
    other = resnet50.torchvision_model("mobilenet_v2", 7)
    for name, model in dict(dynamic=dynamic, adapted=adapted, other=other).items():
        save_checkpoint(tmp_path / f"{name}.pt", model, classes=CLASSES)
        found = call(tmp_path / f"{name}.pt", "--dynamic-batch", "--name", name)
        assert found["max_difference"] < 1e-4
        x = resnet50.normalize(shown, model.preprocess).numpy()
        got, = ReferenceEvaluator(found["file"]).run(None, {"input": x})
        with torch.no_grad():
            assert np.abs(got - resnet50.predict(model, shown).numpy()).max() < 1e-4


def test_attention_of_transformers_and_what_onnx_lacks(monkeypatch):
    """As torchvision's vit_b_16 has it, whose 86 million weights would take a while"""
    def file(flags):
        args = export.get_args_parser().parse_args(flags)
        args.image_size, args.opset = 32, 20
        exported = export.Exported(model)
        with torch.no_grad():
            return export.onnx_model(model, args, exported)[0], export.Case(photographs(3, 32, 32), model, exported)
    torch.manual_seed(0)
    model = VisionTransformer(32, 16, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=8, num_classes=7).eval()
    torch.nn.init.normal_(model.heads.head.weight)
    model.precision, model.preprocess = "float", resnet50.PREPROCESS
    for flags in ["--batch-size", "3"], ["--dynamic-batch"]:
        made, case = file(flags)
        assert export.compare(export.reference_call(made), [case])["max_difference"] < 1e-6
    monkeypatch.setattr(model, "forward", lambda x: torch.fft.fft(x.mean((2, 3))).real)
    with pytest.raises(UserError, match="--format onnx: .*fft.* not supported"):
        file(["--dynamic-batch"])


def test_a_cascade_becomes_two_files(checkpoint, call, monkeypatch, tmp_path):
    small, big = load(checkpoint("pruned", "int8")), load(checkpoint("plain", "float"))
    save_checkpoint(tmp_path / "cascade.pt", resnet50.Cascade(small, big, 0.6), classes=CLASSES)

    def full(model, *more, inner=export.onnx_file):
        if model.precision == "float":
            raise OSError(errno.ENOSPC, "No space left on device")
        return inner(model, *more)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="resnet50-big.onnx: not written"):
        patch.setattr(export, "onnx_file", full)
        call(tmp_path / "cascade.pt")
    assert os.listdir(tmp_path / "out") == []
    found = call(tmp_path / "cascade.pt", "--dynamic-batch")
    assert found["threshold"] == 0.6 and set(found["members"]) == {"small", "big"}
    assert [found["members"][k]["precision"] for k in ("small", "big")] == ["int8", "float32"]
    assert sizes(found["members"]["big"]["file"]) == [f"resnet50-{k}.onnx{e}" for k in ("big", "small")
                                                      for e in ("", ".json")]
    for name, member in found["members"].items():
        with open(member["file"] + ".json") as f:
            assert json.load(f)["cascade"] == dict(member=name, threshold=0.6)
        said = {p.key: p.value for p in onnx.load(member["file"]).metadata_props}
        assert json.loads(said["cascade"]) == dict(member=name, threshold=0.6)


# ----------------------------------------------------------------------------------------------- PyTorch's formats

PLAIN_READER = """
import sys, torch
sys.modules["csrc"] = sys.modules["resnet50"] = None  # importing either would fail
kind, path, x = sys.argv[1:]
extra = {"resnet50.json": ""}
model = torch.jit.load(path, _extra_files=extra) if kind == "torchscript" else torch.export.load(
    path, extra_files=extra).module()
with torch.no_grad():
    torch.save(model(torch.load(x)), x)
print(extra["resnet50.json"] if isinstance(extra["resnet50.json"], str) else extra["resnet50.json"].decode())
"""


@pytest.mark.parametrize("kind, variant, precision", [
    *((kind, *network) for kind in ("torchscript", "script", "torch-export")
      for network in (("plain", "int8"), ("se", "float"), ("split", "int8"))), ("torchscript", "small", "float")])
def test_torch_files_need_nothing_of_this_repository(kind, variant, precision, checkpoint, call, tmp_path):
    path = checkpoint(variant, precision)
    flags = ["--format", "torchscript", "--script"] if kind == "script" else ["--format", kind]
    found = call(path, *flags, "--dynamic-batch", "--pixels")
    assert found["max_difference"] < (1e-5 if precision == "float" else 1e-6) and found["images"] == 8
    shown = photographs(4, SIDE, SIDE, seed=5)
    x = str(tmp_path / "x.pt")
    torch.save(export.feed(shown, None, True), x)
    done = subprocess.run([sys.executable, "-I", "-W", "ignore", "-c", PLAIN_READER, flags[1], found["file"], x],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["classes"] == CLASSES
    assert np.allclose(torch.load(x).numpy(), logits(path, shown), atol=1e-5)


@pytest.mark.parametrize("kind", ["torchscript", "script", "torch-export"])
def test_torch_files_with_the_largest_classes(kind, checkpoint, call):
    path, shown = checkpoint("pruned", "float"), photographs(9, SIDE, SIDE, seed=5)  # more than the checks have
    flags = ["--format", "torchscript", "--script"] if kind == "script" else ["--format", kind]
    file = call(path, *flags, "--dynamic-batch", "--softmax", "--top-k", 3)["file"]
    model = torch.export.load(file) if kind == "torch-export" else torch.jit.load(file)
    if kind == "torch-export":
        assert [span.upper for span in model.range_constraints.values()] == [32]
        model = model.module()
    values, classes = model(export.feed(shown, load(path), False))
    wanted = torch.from_numpy(logits(path, shown)).softmax(1).topk(3)
    assert torch.allclose(values, wanted.values, atol=1e-6) and torch.equal(classes, wanted.indices)


def test_scripted_and_traced_are_different_things(checkpoint, call):
    path = checkpoint("plain", "float")
    traced = call(path, "--format", "torchscript", "--name", "traced")["file"]
    scripted = call(path, "--format", "torchscript", "--script", "--name", "scripted")["file"]
    assert torch.jit.load(traced).original_name == "Exported" != torch.jit.load(scripted).original_name


def test_compiled_packages(checkpoint, call):
    found = call(checkpoint("pruned", "int8"), "--format", "aot-inductor", "--batch-size", 2)
    assert found["max_difference"] < 1e-6 and found["images"] == 6
    said = torch._inductor.aoti_load_package(found["file"]).get_metadata()
    assert json.loads(said["resnet50.json"])["classes"] == CLASSES


# ------------------------------------------------------------------------------------------------------- TensorRT

FAKE_TRTEXEC = """#!{python}
import json, sys, numpy, onnxruntime, shutil
flags = dict(f.lstrip("-").partition("=")[::2] for f in sys.argv[1:])
with open({log!r}, "a") as f:
    f.write(json.dumps(flags) + "\\n")
if "onnx" in flags:
    if "{fails}":
        print("[E] [TRT] node of type {fails} is not supported")
        sys.exit(1)
    shutil.copy(flags["onnx"], flags["saveEngine"])
else:
    session = onnxruntime.InferenceSession(flags["loadEngine"])
    name, shape = flags["shapes"].split(":")
    shape = [int(n) for n in shape.split("x")]
    x = numpy.fromfile(flags["loadInputs"].partition(":")[2], numpy.uint8 if name == "pixels" else numpy.float32)
    results = session.run(None, {{name: x.reshape(shape)}})
    rows = [dict(name=o.name, dimensions="x".join(map(str, y.shape)), values=y.ravel().tolist())
            for o, y in zip(session.get_outputs(), results)]
    with open(flags["exportOutput"], "w") as f:
        json.dump(rows, f)
"""


@pytest.fixture
def trtexec(tmp_path, monkeypatch):
    """TensorRT's command as far as export.py uses it; an engine is the ONNX file, which onnxruntime runs"""
    pytest.importorskip("onnxruntime")

    def install(fails=""):
        (tmp_path / "bin").mkdir(exist_ok=True)
        program, log = tmp_path / "bin" / "trtexec", tmp_path / "log"
        program.write_text(FAKE_TRTEXEC.format(python=sys.executable, log=str(log), fails=fails))
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
        return log
    return install


def test_engines_are_built_and_compared(trtexec, checkpoint, call, monkeypatch):
    log = trtexec()
    found = call(checkpoint("plain", "int8"), "--format", "tensorrt", "--signed", "--dynamic-batch", "--max-batch", 16,
                 "--top-k", 2)
    assert found["runtimes"]["tensorrt"]["images"] == 8 and found["file"].endswith("resnet50.engine")
    first = json.loads(log.read_text().splitlines()[0])
    assert "stronglyTyped" in first and first["minShapes"] == f"input:1x3x{SIDE}x{SIDE}"
    assert first["optShapes"] == f"input:8x3x{SIDE}x{SIDE}" and first["maxShapes"] == f"input:16x3x{SIDE}x{SIDE}"
    found = call(checkpoint("plain", "float"), "--format", "tensorrt", "--pixels", "--overwrite")
    assert found["runtimes"]["tensorrt"]["max_difference"] < 1e-4 and found["precision"] == "float32"
    before = os.path.getmtime(found["file"])
    for wrong, words in ((lambda y: np.float32(1.2) * y, "the engine computes something else"),
                         (lambda y: 1 / 0, "the engine does not run: ZeroDivisionError")):
        def engine(path, wrong=wrong):
            run = export.onnxruntime_call(path)
            return lambda x: [wrong(run(x)[0])]
        monkeypatch.setattr(export, "tensorrt_call", engine)
        with pytest.raises(UserError, match=words):
            call(checkpoint("plain", "float"), "--format", "tensorrt", "--pixels", "--overwrite")
    assert os.path.getmtime(found["file"]) == before


def test_an_engine_is_tuned_for_a_batch_that_it_takes(checkpoint, monkeypatch):
    flags, exported = [], export.Exported(load(checkpoint("pruned", "float")))
    monkeypatch.setattr(export, "installed", lambda package: False)
    monkeypatch.setattr(export, "trtexec", lambda *f: flags.extend(f) or open(f[1].partition("=")[2], "w").close())
    args = export.get_args_parser().parse_args(["--image-size", "9", "--dynamic-batch", "--max-batch", "6"])
    export.tensorrt_engine(b"", args, exported)
    assert flags[-3:] == [f"--{k}Shapes=input:{n}x3x9x9" for k, n in (("min", 1), ("opt", 6), ("max", 6))]


def test_what_tensorrt_refuses_is_said(trtexec, checkpoint, call, monkeypatch, tmp_path):
    trtexec("Pad")
    with pytest.raises(UserError, match="node of type Pad is not supported"):
        call(checkpoint("plain", "float"), "--format", "tensorrt")
    assert os.listdir(tmp_path / "out") == []
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="neither the package tensorrt nor trtexec") as caught:
        call(checkpoint("plain", "float"), "--format", "tensorrt")
    assert caught.value.code == 3


# --------------------------------------------------------------------------------------------- when it goes wrong

def test_a_file_that_computes_something_else_is_not_written(checkpoint, call, monkeypatch, tmp_path):
    right = call(checkpoint("plain", "int8"))["file"]
    with open(right, "rb") as f:
        before = f.read()
    inner = export.Graph.weights

    def wrong(self, integers, scale):
        return inner(self, np.flip(integers, 0) if integers.ndim == 4 else integers, scale)
    monkeypatch.setattr(export.Graph, "weights", wrong)
    with pytest.raises(UserError, match="onnx.reference computes something else") as caught:
        call(checkpoint("plain", "int8"), "--overwrite")
    with open(right, "rb") as f:
        assert f.read() == before and caught.value.code == 3
    assert sizes(right) == ["resnet50.onnx", "resnet50.onnx.json"]
    monkeypatch.setattr(export, "conv_int8", None)
    plain = dict(export.PLAIN, max_pool_int8=lambda x, *sizes: export.max_pool_int8(x, *sizes) // 2)
    monkeypatch.setattr(export, "PLAIN", plain)
    with pytest.raises(UserError, match="fresh process computes something else"):
        call(checkpoint("plain", "int8"), "--format", "torchscript")
    assert sizes(right) == ["resnet50.onnx", "resnet50.onnx.json"]


def test_what_is_not_a_number_is_a_difference(checkpoint):
    model = load(checkpoint("plain", "float"))
    case = export.Case(photographs(2, SIDE, SIDE), model, export.Exported(model))
    wrong = case.wanted[0].copy()
    assert export.compare(lambda x: [wrong], [case]) == dict(max_difference=0.0, argmax_agreement=100.0, regret=0.0,
                                                             images=2)
    with pytest.raises(UserError, match="gives float64 .2, 7., expected float32 .2, 7."):
        export.compare(lambda x: [wrong.astype(float)], [case])
    wrong[1, 3] = np.nan
    found = export.compare(lambda x: [wrong], [case])
    assert found["max_difference"] == np.inf and found["argmax_agreement"] == 50
    with pytest.raises(UserError, match="computes something else"):
        export.judge(found, "coarse", "it")
    sure = export.Case(case.pixels, model, export.Exported(model, softmax=True))
    sure.wanted[0][:, 3], wrong = 1e-9, sure.wanted[0].copy()
    wrong[:, 3] = 1e-8
    assert export.compare(lambda x: [wrong], [sure])["max_difference"] > 1
    model.fc.bias.data[0] = np.nan
    with pytest.raises(UserError, match="the network's own logits are not all finite"):
        export.Case(case.pixels, model, export.Exported(model, softmax=True))


def test_a_batch_beyond_all_memory_is_refused_at_once():
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        export.example_pixels(1000, 10 ** 9)


@pytest.mark.parametrize("options", [dict(), dict(softmax=True), dict(top_k=2), dict(softmax=True, top_k=2)], ids=str)
def test_a_network_that_is_sure_of_nothing_is_compared_all_the_same(options, checkpoint):
    """Its probabilities, and even its logits, differ by less than what is allowed; classes that are level may differ"""
    model = load(checkpoint("plain", "float"))
    model.fc.weight.data *= 0.01 / logits(checkpoint("plain", "float"), photographs(4, SIDE, SIDE)).std(1).max()
    model.fc.bias.data.zero_()
    model.fc.weight.data[1], model.fc.bias.data[1] = model.fc.weight[0], 1e-7
    exported = export.Exported(model, **options)
    case = export.Case(photographs(4, SIDE, SIDE), model, exported)

    def file(classes, more=0.0, scale=1.0):
        """The network with its classes in another order, and the first of them more likely"""
        y = exported.head(scale * torch.from_numpy(case.logits)[:, classes] + more * (torch.arange(7) == 0))
        return lambda x: [v.numpy() for v in y] if exported.top_k else [y.numpy()]
    export.judge(export.compare(file(range(7), 2e-7), [case]), "float32", "it")
    export.judge(export.compare(file([1, 0, *range(2, 7)]), [case]), "float32", "it")
    for kind, wrong in (("float16", file([3, 4, 5, 6, 0, 1, 2])), ("coarse", file([3, 4, 5, 6, 0, 1, 2])),
                        ("float32", file(range(7), scale=1.02))):
        with pytest.raises(UserError, match="computes something else"):
            export.judge(export.compare(wrong, [case]), kind, "it")


def test_an_int8_file_is_the_same_in_every_value(checkpoint, call, monkeypatch):
    monkeypatch.setattr(export, "identical_bytes", lambda *a: 99.99)
    with pytest.raises(UserError, match="99.99 % of int8 values; nothing was written"):
        call(checkpoint("plain", "int8"))
    found = dict(max_difference=0.0, argmax_agreement=100.0, regret=0.0, identical_bytes=99.99)
    export.judge(found, "mixed", "it")  # what is computed in floats may round otherwise


LIMITED = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}))\n" \
          "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"


@pytest.mark.parametrize("kind, size, limit", [
    ("onnx", SIDE, 100_000), ("torch-export", SIDE, 100_000),
    ("torchscript", 2 * SIDE, 1_000_000)])  # has room for the file, but not for the images of a fresh process
def test_a_full_disk_leaves_nothing(kind, size, limit, checkpoint, run, tmp_path):
    done = run("--checkpoint", checkpoint("plain", "int8"), "--image-size", size, "--out", tmp_path / "full",
               "--format", kind, script="export.py", before=LIMITED.format(limit))
    assert done.returncode == 3 and "not written" in done.stderr.splitlines()[-1], done.stderr
    assert "Traceback" not in done.stderr and os.listdir(tmp_path / "full") == [] and done.stdout == ""


def test_sigterm_leaves_nothing(checkpoint, run, tmp_path):
    """While the file is looked at that is not yet named"""
    stop = "export.in_runtime = lambda *a: os.kill(os.getpid(), signal.SIGTERM)\nexport.RUNTIMES = dict(json=None)\n"
    done = run("--checkpoint", checkpoint("pruned", "float"), "--image-size", SIDE, "--out", tmp_path / "out",
               script="export.py", before=stop)
    assert done.returncode == 143 and "Traceback" not in done.stderr and os.listdir(tmp_path / "out") == []


def test_a_folder_that_cannot_be_written(checkpoint, call, tmp_path):
    (tmp_path / "out").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="not written") as caught:
        call(checkpoint("plain", "float"))
    assert caught.value.code == 3 and (tmp_path / "out").read_text().startswith("a file")


def test_existing_files_stay(checkpoint, call):
    path = checkpoint("pruned", "float")
    found = call(path)
    with pytest.raises(UserError, match="resnet50.onnx: exists; --overwrite") as caught:
        call(path)
    assert caught.value.code == 2 and call(path, "--overwrite")["bytes"] == found["bytes"]
    os.unlink(found["file"])  # what lies beside it may be somebody's
    with pytest.raises(UserError, match="resnet50.onnx.json: exists; --overwrite"):
        call(path)
    os.mkdir(found["file"])
    with pytest.raises(UserError, match="resnet50.onnx: is a folder") as caught:
        call(path, "--overwrite")
    assert caught.value.code == 2
    os.rmdir(found["file"])
    os.symlink("nothing", found["file"])
    with pytest.raises(UserError, match="resnet50.onnx: exists; --overwrite"):
        call(path)
    os.unlink(found["file"])
    os.link(path, found["file"])
    with pytest.raises(UserError, match="resnet50.onnx: is the network that is read"):
        call(found["file"], "--overwrite")


def test_a_file_that_does_not_get_its_name_leaves_the_old_description(checkpoint, call, monkeypatch):
    file = call(checkpoint("pruned", "float"))["file"]

    def replace(source, target, inner=os.replace):
        if target == file:
            raise OSError(errno.EPERM, "Operation not permitted")
        inner(source, target)
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(UserError, match="resnet50.onnx: not written .Operation not permitted"):
        call(checkpoint("pruned", "float"), "--overwrite", "--softmax")
    with open(file + ".json") as f:
        assert json.load(f)["outputs"] == ["logits"] and sizes(file) == ["resnet50.onnx", "resnet50.onnx.json"]


def test_preprocessing_beside_the_file_is_that_of_its_size(checkpoint, call):
    path = checkpoint("pruned", "float")
    kept = load(path).preprocess
    found = call(path, "--image-size", 2 * kept["crop"])
    with open(found["file"] + ".json") as f:
        about = json.load(f)["preprocess"]
    assert (about["crop"], about["resize"]) == (2 * kept["crop"], 2 * kept["resize"])
    with open(found["file"] + ".json") as f:
        assert json.load(f)["input"] == dict(name="input", dtype="float32", layout="NCHW", normalized=True,
                                             shape=[1, 3, about["crop"], about["crop"]])


@pytest.mark.parametrize("precision, flags, complaint", [
    ("float", ["--opset", 12], "--opset 12: 13 to 20"), ("float", ["--opset", 21], "--opset 21: 13 to 20"),
    ("float", ["--opset", 17, "--format", "torchscript"], "--opset goes with"), ("int8", ["--fp16"], "--fp16: an int8"),
    ("float", ["--script"], "--script goes with"), ("float", ["--signed"], "--signed goes with an int8"),
    ("float", ["--quantize-adds"], "--quantize-adds goes with an int8"), ("float", ["--bench"], "--bench goes with"),
    ("float", ["--top-k", 8], "--top-k 8: the network has 7"),
    ("float", ["--batch-size", 2, "--dynamic-batch"], "exclude"),
    ("float", ["--max-batch", 9, "--format", "torch-export"], "--max-batch goes with --dynamic-batch"),
    ("float", ["--dynamic-batch", "--max-batch", 64], "--max-batch goes with --dynamic-batch and --format"),
    ("float", ["--dynamic-batch", "--max-batch", 4, "--format", "torch-export"], "up to 5"),
    ("float", ["--name", "a/b"], "--name a/b"), ("float", ["--name", ""], "--name : expected"),
    ("float", ["--images", 3], "--images goes with --data"),
    ("float", ["--data", "x", "--format", "torchscript"], "--data goes with")])
def test_what_cannot_be_honoured_is_refused(precision, flags, complaint, checkpoint, call, monkeypatch):
    monkeypatch.setattr(export, "export", lambda *a: pytest.fail("it was to be refused before"))
    with pytest.raises(UserError) as caught:
        call(checkpoint("pruned", precision), *flags)
    assert complaint in str(caught.value) and caught.value.code == 2


def test_help_needs_no_docstrings(monkeypatch):
    monkeypatch.setattr(export, "__doc__", None)  # as python -OO has it
    assert export.get_args_parser().format_help().startswith("usage: export.py")


def test_a_folder_that_is_not_there_is_named(checkpoint, call, tmp_path):
    with pytest.raises(UserError, match="nowhere: no such folder") as caught:
        call(checkpoint("pruned", "float"), "--data", tmp_path / "nowhere")
    assert caught.value.code == 3 and not (tmp_path / "out").exists()


def test_attention_has_no_signed_form(checkpoint, call):
    with pytest.raises(UserError, match="--signed: not with attention") as caught:
        call(checkpoint("se", "int8"), "--signed")
    assert caught.value.code == 2


# ----------------------------------------------------------------------------------------------- images and times

def test_images_of_a_folder_are_compared(checkpoint, call, tiny, monkeypatch, tmp_path):
    """By an installed runtime, else by onnx.reference; one that fails is reported and does not stop the export."""
    flags = ("--dynamic-batch", "--data", os.path.join(tiny, "val"), "--images", 6)
    found = call(checkpoint("plain", "int8"), *flags)
    for name in export.RUNTIMES:
        if export.installed(name):
            assert found["runtimes"][name]["on_images"]["images"] == 6, name
    monkeypatch.setattr(export, "RUNTIMES", {})
    found = call(checkpoint("plain", "int8"), *flags, "--overwrite")
    assert found["runtimes"]["onnx.reference"]["on_images"]["argmax_agreement"] == 100
    assert found["runtimes"]["onnx.reference"]["batch"] == 1 and "100.0 % of 6 images" in list(export.table(found))[1]

    monkeypatch.setattr(export, "RUNTIMES", {"json": lambda path: lambda x: [np.full((len(x), 7), np.nan, np.float32)]})
    assert call(checkpoint("plain", "int8"), "--overwrite")["runtimes"] == {
        "json": {"error": "what it computes is not a number"}}

    def broken(path):
        raise ValueError("no such instruction\nand more")
    (tmp_path / "halved.py").write_text("raise OSError('libhalf.so: not found')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(export, "RUNTIMES", {"json": broken, "halved": lambda path: export.imported("halved")})
    assert call(checkpoint("plain", "int8"), "--overwrite")["runtimes"] == {
        "json": {"error": "ValueError: no such instruction"},
        "halved": {"error": "halved cannot be imported: OSError: libhalf.so: not found"}}


def test_an_interrupt_is_not_taken_for_a_missing_package(monkeypatch, tmp_path):
    (tmp_path / "interrupted.py").write_text("import signal\ntry:\n    signal.raise_signal(signal.SIGINT)\n"
                                             "except KeyboardInterrupt:\n    raise ImportError('numpy')\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what runs behind it
    try:
        with pytest.raises(KeyboardInterrupt):
            export.imported("interrupted")
    finally:
        signal.signal(signal.SIGINT, before)


def test_images_are_turned_where_training_turned_them(tmp_path):
    tag, model = Image.Exif(), build("plain")
    tag[0x0112] = 6
    picture = Image.fromarray(photographs(1, 40, 60)[0].permute(1, 2, 0).numpy())
    picture.save(tmp_path / "a.png", exif=tag)
    save_checkpoint(str(tmp_path / "c.pt"), model, classes=CLASSES, wnids=CLASSES[::-1], args=dict(exif=True))
    args = export.get_args_parser().parse_args(["--data", str(tmp_path), "--image-size", "32", "--dynamic-batch"])
    case, = export.real_images(args, model, resnet50.load_checkpoint(tmp_path / "c.pt"), export.Exported(model))
    about = export.describe(model, resnet50.load_checkpoint(tmp_path / "c.pt"), args, export.Exported(model), None)
    assert about["preprocess"]["exif"] is True and about["wnids"] == CLASSES[::-1]
    transform = data.eval_transform(export.geometry(model, 32))
    assert torch.equal(case.pixels[0].permute(1, 2, 0), transform(picture.transpose(Image.Transpose.ROTATE_270)))
    args.dynamic_batch, args.batch_size = False, 2  # a file for two takes no one image
    with pytest.raises(UserError, match="fewer than 2 images"):
        export.real_images(args, model, resnet50.load_checkpoint(tmp_path / "c.pt"), export.Exported(model))
    for name in "bc":
        picture.save(tmp_path / f"{name}.png")
    case, = export.real_images(args, model, resnet50.load_checkpoint(tmp_path / "c.pt"), export.Exported(model))
    assert len(case.pixels) == 2


def test_benchmark_says_how_much_faster_than_pytorch(checkpoint, monkeypatch):
    model, clock = load(checkpoint("pruned", "float")), {"pytorch": 8.0, "rival": 2.0, "slow": 16.0}
    monkeypatch.setattr(export, "BENCH_SECONDS", 0.0)
    monkeypatch.setattr(export, "contenders", lambda *_: {name: lambda batch, ms=ms: lambda x: ms * len(x)
                                                          for name, ms in clock.items()})
    monkeypatch.setattr(export, "measure", lambda call, *_: call())
    args = export.get_args_parser().parse_args(["--image-size", "32"])
    for name, row in export.bench(model, args, export.Exported(model), "").items():
        ratio = 8 / clock[name]
        assert row == dict(latency_ms_bs1=clock[name], images_per_second_bs32=1000 / clock[name],
                           over_pytorch_bs1=ratio, over_pytorch_bs32=ratio)


QUICK = "import copy, torch\nexport.BENCH_SECONDS = 0.0\ntorch.compile = lambda module, **k: copy.copy(module)\n"


@pytest.mark.parametrize("precision", ["float", "int8"])
def test_benchmark_lists_what_is_installed(precision, checkpoint, run, tmp_path):
    """In a process of its own: the runtimes leave its main thread without a valid stack for signal handlers."""
    done = run("--checkpoint", checkpoint("pruned", precision), "--image-size", SIDE, "--dynamic-batch", "--bench",
               "--pixels", "--out", tmp_path, script="export.py", before=QUICK)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])["bench"]
    assert set(found) == {"pytorch", "torch.compile", "extension"} | {n for n in export.RUNTIMES if export.installed(n)}
    for row in found.values():
        assert row["latency_ms_bs1"] > 0 and row["images_per_second_bs32"] > 0
    assert found["pytorch"]["over_pytorch_bs1"] == 1 and "images/s, 32" in done.stderr
