"""What a checkpoint can hold beside a plain ResNet-50: encoded weights, torchvision's classifiers, cascades, int8
networks with float layers."""
import copy
import functools
import json
import os

import pytest
import torch
from torch.nn import functional as F

import compress
import data
import export
import finetune
import resnet50
import train
from resnet50 import ResNet50, UserError
from tests.test_int8 import VARIANTS, WIDTHS, build, call, photographs, same_state
from tests.test_resnet50 import randomise

pytestmark = pytest.mark.usefixtures("one_thread")


def matrices(model):
    return [k for k, v in model.state_dict().items() if v.dim() > 1]


def prune(model, share, seed=0):
    """Zeroes that share of every matrix, of negative weights with a negative zero, as weight * mask does."""
    g = torch.Generator().manual_seed(seed)
    for name in matrices(model):
        weight = model.state_dict()[name]
        weight.mul_(torch.rand(weight.shape, generator=g) >= share)
    return model


# ----------------------------------------------------------------------------------------------------- encodings

def naive_int4(weight, group):
    """float (O, ...) -> float32, what 4-bit integers make of it"""
    result = torch.empty_like(weight, dtype=torch.float32).flatten(1)
    for o, row in enumerate(weight.flatten(1)):
        for i in range(0, len(row), group):
            scale = (row[i:i + group].abs().max() / 7).half().float().clamp(min=1e-30)
            result[o, i:i + group] = (row[i:i + group] / scale).round().clamp(-7, 7) * scale
    return result.view(weight.shape)


@pytest.mark.parametrize("shape, group", [((3, 5), 2), ((2, 7, 3, 3), 32), ((4, 64, 1, 1), 64), ((1, 1), 5),
                                          ((5, 8), 9)])
def test_int4_is_the_formula_and_repeats_itself(shape, group):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    stored = resnet50.encode_tensor(weight, f"int4:{group}")
    decoded = resnet50.decode_tensor(stored)
    assert torch.equal(decoded, naive_int4(weight, group)) and decoded.dtype == torch.float32
    bytes_per_row = (weight[0].numel() + 1) // 2 + 2 * -(-weight[0].numel() // group)
    assert sum(t.nbytes for t in stored.values() if isinstance(t, torch.Tensor)) == len(weight) * bytes_per_row
    assert torch.equal(resnet50.decode_tensor(resnet50.encode_tensor(decoded, f"int4:{group}")), decoded)


def test_int4_of_zeros_and_tiny_weights():
    weight = torch.tensor([[0.0, 0.0, 1e-30, -1e-30], [1e-9, 0.0, -3.5, 1.0]])
    decoded = resnet50.decode_tensor(resnet50.encode_tensor(weight, "int4:2"))
    assert decoded.tolist() == [[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, -3.5, 1.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.int64])
@pytest.mark.parametrize("shape", [(0,), (), (1,), (7,), (3, 8), (3, 5, 3, 3)])
def test_sparse_loses_nothing(dtype, shape):
    g = torch.Generator().manual_seed(1)
    tensor = (torch.randn(shape, generator=g) * 50 * (torch.rand(shape, generator=g) < 0.3)).to(dtype)
    stored = resnet50.encode_tensor(tensor, "sparse")
    decoded = resnet50.decode_tensor(stored)
    assert torch.equal(decoded, tensor) and decoded.dtype == dtype
    assert stored["mask"].nbytes == (tensor.numel() + 7) // 8 and len(stored["values"]) == tensor.count_nonzero()


def test_files_are_as_small_as_the_encodings_promise(tmp_path):
    model = prune(ResNet50(), 0.9).to(memory_format=torch.channels_last)

    def size(encoding):
        path = str(tmp_path / "e.pt")
        encode = {name: encoding for name in matrices(model)} if encoding else None
        resnet50.save_checkpoint(path, model, classes=map(str, range(1000)), encode=encode)
        assert resnet50.load_checkpoint(path)["encode"] == (encode or {})
        return os.path.getsize(path)
    dense = size(None)
    assert 0.13 < size("sparse") / dense < 0.14  # 1 bit and a tenth of 32, of 32; batch-norms stay
    assert 0.13 < size("int4:64") / dense < 0.14  # 4 bits and 16 / 64
    assert 0.14 < size("int4:32") / dense < 0.147


@pytest.mark.parametrize("quantized", [False, True])
def test_encoded_checkpoint_round_trip(quantized, tmp_path):
    path, model = str(tmp_path / "e.pt"), prune(build("plain"), 0.6)
    model = resnet50.quantize(model, [photographs(2, 64, 64)]) if quantized else model
    names = matrices(model)
    encode = dict.fromkeys(names, "sparse") | ({} if quantized else {"fc.weight": "int4:16"})
    expected = copy.deepcopy(model)
    if not quantized:
        expected.fc.weight.copy_(naive_int4(model.fc.weight, 16))
    for _ in range(2):  # what was loaded is written as it was
        resnet50.save_checkpoint(path, model, classes="abcdefg", encode=encode)
        raw = torch.load(path, weights_only=True)
        assert isinstance(raw["model"][names[0]], dict) and isinstance(raw["model"]["fc.bias"], torch.Tensor)
        loaded = resnet50.load_checkpoint(path)
        encode, model = loaded["encode"], resnet50.build_model(loaded, path)
        assert same_state(model, expected)


def test_damaged_encodings_name_file_and_key(tmp_path):
    path, model = str(tmp_path / "e.pt"), build("plain")
    encode = {"conv1.weight": "sparse", "fc.weight": "int4:16"}
    resnet50.save_checkpoint(path, model, classes="abcdefg", encode=encode)
    whole = torch.load(path, weights_only=True)
    changes = [("conv1.weight", key, value) for key, value in (
        ("encoding", "sparser"), ("encoding", None), ("encoding", "int4:16"), ("shape", [16, 3, 7, 8]), ("shape", "x"),
        ("shape", [10 ** 9, 10 ** 9]), ("shape", [-16, -147]), ("mask", torch.zeros(293, dtype=torch.uint8)),
        ("mask", None), ("mask", torch.zeros(294)), ("values", torch.zeros(3)), ("values", [1.0]))]
    changes += [("fc.weight", key, value) for key, value in (
        ("encoding", "int4"), ("encoding", "int4:0"), ("encoding", "int4:8"), ("encoding", "int4:x"), ("shape", []),
        ("shape", [7, 3000]), ("values", torch.zeros(7, 9, dtype=torch.uint8)), ("scales", torch.zeros(7, 5)))]
    for name, key, value in changes:
        torch.save({**whole, "model": {**whole["model"], name: {**whole["model"][name], key: value}}}, path)
        with pytest.raises(UserError, match=f"e.pt: {name}: damaged encoding") as caught:
            resnet50.load_checkpoint(path)
        assert "\n" not in str(caught.value)
    for value in (None, 3, {}, [1]):
        torch.save({**whole, "model": {**whole["model"], "bn1.weight": value}}, path)
        with pytest.raises(UserError, match="e.pt: bn1.weight: damaged encoding"):
            resnet50.load_checkpoint(path)
    torch.save({**whole, "model": 3, "config": None}, path)
    with pytest.raises(UserError, match="e.pt: damaged: has no model, config"):
        resnet50.load_checkpoint(path)
    for field in ("model", "config", "classes", "preprocess"):
        torch.save({k: v for k, v in whole.items() if k != field}, path)
        with pytest.raises(UserError, match=f"e.pt: damaged: has no {field}"):
            resnet50.load_checkpoint(path)


def test_damaged_fields_and_weights_name_the_file(tmp_path):
    path, model = str(tmp_path / "e.pt"), build("plain")
    resnet50.save_checkpoint(path, model, classes="abcdefg")
    whole, view = torch.load(path, weights_only=True), resnet50.get_args_parser().parse_args(["--checkpoint", path])
    changes = [(dict([change]), f"has no {change[0]} of use") for change in (
        ("classes", 3), ("classes", [3] * 7), ("wnids", 3), ("preprocess", 3), ("preprocess", dict(crop=10 ** 9)),
        ("preprocess", dict(mean=torch.zeros(3))), ("preprocess", dict(std=[1, 1, 0])),
        ("preprocess", dict(mean=[10 ** 400, 0, 0])), ("config", {3: 4}), ("config", dict(stem=torch.zeros(3))),
        ("metrics", torch.zeros(3)), ("args", [1]), ("args", dict(data=1)), ("args", dict(val_split="x")), ("ema", 3),
        ("preprocess", dict(std={1: 1, 2: 2, 3: 3})))]
    changes += [(dict(config={**whole["config"], **config}), words) for config, words in (
        (dict(num_classes=10 ** 9), "does not fit this network: .*fc.weight"), (dict(num_classes=-1), "num_classes=-1"),
        (dict(dropout=2.0), "dropout=2.0 is no rate"), (dict(adapter=-1), "negative"))]
    changes += [(dict(model={**whole["model"], "fc.bias": value}), words) for value, words in (
        (torch.zeros(7, dtype=torch.int8), "wrong type fc.bias torch.int8 instead of torch.float32"),
        (torch.zeros(7).to_sparse(), "fc.bias: is no plain tensor"))]
    for change, words in [*changes, (dict(ema={"fc.bias": 3}), "fc.bias: is no plain tensor")]:
        torch.save({**whole, **change}, path)
        with pytest.raises(UserError, match=f"e.pt: .*{words}") as caught:
            resnet50.load_model(view)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="classifier='int8' is of float networks"):
        resnet50.Int8ResNet50(classifier="int8")
    deep = functools.reduce(lambda inner, _: [inner], range(2000), 0)
    assert not resnet50.is_sound("metrics", dict(deep=deep))


def test_what_cannot_be_encoded_is_refused_before_the_file_is_touched(tmp_path):
    path, model = str(tmp_path / "e.pt"), build("plain")
    resnet50.save_checkpoint(path, model, classes="abcdefg")
    before = os.path.getsize(path)
    model.fc.weight[0, 0] = float("nan")
    model.layer1[0].conv1.weight[0] = 1e6
    for encode, words in (({"fc.wait": "sparse"}, "no tensor of this network: fc.wait"),
                          ({"conv1.weight": "zip"}, "conv1.weight: encoding 'zip' is neither"),
                          ({"conv1.weight": "int4:0"}, "'int4:0' is neither"),
                          ({"bn1.weight": "int4:8"}, r"bn1.weight: int4 takes float weights \(O, ...\), not"),
                          ({"fc.weight": "int4:8"}, "fc.weight: a weight is not finite"),
                          ({"layer1.0.conv1.weight": "int4:8"}, "too large")):
        with pytest.raises(UserError, match=f"e.pt: not written: .*{words}"):
            resnet50.save_checkpoint(path, model, classes="abcdefg", encode=encode)
    assert os.path.getsize(path) == before


# --------------------------------------------------------------------------------------- torchvision's classifiers

def classifier(arch="resnet18", seed=0):
    torch.manual_seed(seed)
    return randomise(resnet50.torchvision_model(arch, 7), seed)


@pytest.mark.parametrize("arch", ["regnet_x_400mf", "mobilenet_v3_small", "squeezenet1_1", "mnasnet0_5"])
def test_torchvision_classifiers_are_checkpoints(arch, tmp_path):
    import torchvision
    path, model, pixels = str(tmp_path / "t.pt"), classifier(arch), photographs(2, 64, 64)
    model.preprocess.update(crop=64)
    resnet50.save_checkpoint(path, copy.deepcopy(model), classes="abcdefg")
    raw = torch.load(path, weights_only=True)
    assert raw["precision"] == "float" and raw["config"] == {"arch": arch, "num_classes": 7}
    if arch != "mnasnet0_5":  # which asks for a version beside the weights
        torchvision.models.get_model(arch, num_classes=7).load_state_dict(raw["model"])
    again = resnet50.build_model(resnet50.load_checkpoint(path), path)
    assert same_state(model, again) and again.preprocess == model.preprocess and again.config == model.config
    with torch.no_grad():
        assert torch.equal(resnet50.predict(again, pixels), model(resnet50.normalize(pixels, model.preprocess)))
    assert not again.training and next(again.parameters()).is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(UserError, match="t.pt: was made with num_classes=7, not 9"):
        resnet50.build_model(raw, path, num_classes=9)
    with pytest.raises(UserError, match="t.pt: .*stem"):
        resnet50.build_model(raw, path, stem="deep")
    with pytest.raises(UserError, match=f"--fused: takes a float ResNet-50 .*, not {arch} in"):
        resnet50.fuse(model)


def test_torchvision_networks_that_are_no_classifiers_are_refused(tmp_path):
    path = str(tmp_path / "t.pt")
    resnet50.save_checkpoint(path, classifier(), classes="abcdefg")
    for arch, words in (("resnet51", "'resnet51' is no classifier of torchvision"), (None, "None is no classifier"),
                        ("fasterrcnn_resnet50_fpn", "no classifier"), ("fcn_resnet50", "no classifier"),
                        ("quantized_resnet18", "no classifier"), ("inception_v3", "auxiliary classifiers")):
        with pytest.raises(UserError, match=words):
            resnet50.torchvision_model(arch, 7)
        with pytest.raises(UserError, match=f"t.pt: .*{words}"):
            resnet50.build_model({**torch.load(path), "config": {"arch": arch, "num_classes": 7}}, path)
    for classes in (-1, "7", None):
        with pytest.raises(UserError, match="arch resnet18, num_classes"):
            resnet50.torchvision_model("resnet18", classes)


def test_torchvision_classifiers_are_trained_evaluated_and_summarized(tiny, tmp_path, capsys):
    model, path = resnet50.torchvision_model("resnet18", 10), str(tmp_path / "t.pt")
    model.preprocess.update(crop=32, resize=36)
    resnet50.save_checkpoint(path, model, classes=sorted(os.listdir(os.path.join(tiny, "train"))))
    exact = "--amp-dtype", "float32"  # in bfloat16 the size of a batch decides how it rounds
    result = call(train, "--data", tiny, "--workers", "0", "--batch-size", "10", "--epochs", "1", "--checkpoint", path,
                  "--model-ema-decay", "0.9", "--image-size", "32", "--out", str(tmp_path / "o"), *exact)
    trained = resnet50.load_checkpoint(result["checkpoint"])
    assert trained["config"] == model.config and not torch.equal(trained["model"]["fc.weight"], model.fc.weight)
    for flag in ("--grad-checkpointing", "--fused-bn"):
        with pytest.raises(UserError, match=f"{flag}.* ResNet-50's"):
            call(train, "--data", tiny, "--checkpoint", path, "--out", str(tmp_path / "no"), flag)
    scored = call(train, "--eval-only", "--data", tiny, "--workers", "0", "--checkpoint", result["checkpoint"], *exact)
    assert scored["images"] == 29 and scored["top1"] == result["top1"]
    capsys.readouterr()
    summary, text = call(resnet50, "--checkpoint", path, "--image-size", "64"), capsys.readouterr().err
    assert summary["params"] == sum(p.numel() for p in model.parameters()) and "layer4" in text and "fc" in text
    by_layer = resnet50.count_macs(resnet50.torchvision_model("resnet50"), 64)
    assert by_layer == resnet50.count_macs(ResNet50(), 64) == resnet50.count_macs(
        resnet50.quantize_classifier(ResNet50()), 64)
    assert sum(row[3] for row in resnet50.summarize(model, 64, 1, torch.device("cpu"))) == summary["macs"]


def test_a_network_without_batch_norm_is_trained_and_resumed_without_its_first_checkpoint(tiny, tmp_path):
    model, path = resnet50.torchvision_model("squeezenet1_1", 10), str(tmp_path / "t.pt")
    resnet50.save_checkpoint(path, model, classes=sorted(os.listdir(os.path.join(tiny, "train"))))
    flags = ("--data", tiny, "--workers", "0", "--batch-size", "10", "--checkpoint", path,
             "--image-size", "32", "--out", str(tmp_path / "o"))
    call(train, *flags, "--epochs", "1")
    os.unlink(path)  # last.pt is all that resuming needs
    result = call(train, *flags, "--epochs", "2", "--resume")
    assert result["samples_seen"] == 100
    trained = resnet50.load_checkpoint(result["checkpoint"])["model"]
    assert not torch.equal(trained["classifier.1.weight"], model.classifier[1].weight)


# ------------------------------------------------------------------------------------------- from script to script

@pytest.mark.parametrize("script, more", [(train, ()), (finetune, ()), (finetune, ("--task", "detect"))])
def test_overwriting_does_not_delete_the_network_that_is_read(script, more, tiny, tmp_path, monkeypatch):
    path, link = tmp_path / "run" / "best.pt", tmp_path / "link.pt"
    resnet50.save_checkpoint(path, ResNet50(num_classes=10, widths=WIDTHS), classes="abcdefghij")
    link.symlink_to(path)
    before = path.read_bytes()
    monkeypatch.setattr(finetune, "DEFAULTS", [str(path)])
    for name in (path, link, *[None] * (script is finetune)):  # finetune.py finds one by itself
        with pytest.raises(UserError, match="--overwrite would delete .*best.pt, which is read") as caught:
            call(script, "--data", tiny, *(["--checkpoint", str(name)] if name else []), "--out", str(path.parent),
                 "--overwrite", *more)
        assert caught.value.code == 2 and path.read_bytes() == before


def hand(script, path, tiny, tmp_path, *flags):
    """What a script's main() makes of a checkpoint"""
    more = () if script is export else ("--data", tiny, "--workers", 0, "--device", "cpu")
    flags = [*flags, *more, "--checkpoint", path, "--out", tmp_path / "out"]
    return script.main(script.get_args_parser().parse_args(list(map(str, flags))))


@pytest.mark.parametrize("script, flag", [(train, "--eval-only"), (export, "--pixels"), (compress, "--dynamic")])
def test_a_file_that_holds_no_more_than_a_network_needs(script, flag, tiny, tmp_path):
    path, model = str(tmp_path / "t.pt"), ResNet50(num_classes=10, widths=WIDTHS)
    model.preprocess.update(crop=32, resize=32)
    resnet50.save_checkpoint(path, model, classes=sorted(os.listdir(os.path.join(tiny, "train"))))
    raw = torch.load(path, weights_only=True)
    torch.save({k: raw[k] for k in ("format", "model", "config", "classes", "preprocess")}, path)
    assert hand(script, path, tiny, tmp_path, flag)


def test_the_weights_of_a_last_pt_are_those_that_its_run_was_scored_by(tiny, tmp_path):
    path, classes = str(tmp_path / "t.pt"), sorted(os.listdir(os.path.join(tiny, "train")))
    resnet50.save_checkpoint(path, ResNet50(num_classes=10, widths=WIDTHS), classes=classes)
    result = hand(train, path, tiny, tmp_path, "--batch-size", 10, "--epochs", 1, "--image-size", 32,
                  "--model-ema-decay", 0.9, "--amp-dtype", "float32")
    last = str(tmp_path / "out" / "last.pt")
    best, last = (resnet50.build_model(resnet50.load_checkpoint(p), p) for p in (result["checkpoint"], last))
    raw = torch.load(tmp_path / "out" / "last.pt", weights_only=True)
    assert same_state(best, last) and not torch.equal(raw["model"]["fc.weight"], last.fc.weight)


@pytest.mark.parametrize("script, flags", [
    (train, ("--epochs", 1)), (train, ("--eval-only",)), (finetune, ("--strategy", "layers:1")), (export, ()),
    (compress, ("--distill", "PATH", "--epochs", 1)), (resnet50, ())])
def test_a_size_that_a_network_cannot_take_is_refused(script, flags, tiny, tmp_path):
    """As vision transformers take one alone; this one is left with nothing of an image of 8 pixels"""
    path, ours = str(tmp_path / "t.pt"), str(tmp_path / "ours.pt")
    classes = sorted(os.listdir(os.path.join(tiny, "train")))
    resnet50.save_checkpoint(path, resnet50.torchvision_model("squeezenet1_1", 10), classes=classes)
    resnet50.save_checkpoint(ours, ResNet50(num_classes=10, widths=WIDTHS), classes=classes)
    flags = [path if flag == "PATH" else flag for flag in flags]
    with pytest.raises(UserError, match="--image-size 8: .*too small") as caught:
        if script is resnet50:
            call(script, "--checkpoint", path, "--image-size", "8")
        hand(script, ours if script is compress else path, tiny, tmp_path, *flags, "--image-size", 8)
    assert caught.value.code == 2


def test_training_is_not_begun_with_the_outputs_in_another_order(tiny, tmp_path):
    path, names, classes = str(tmp_path / "t.pt"), tmp_path / "names.json", sorted(data.DEMO_CLASSES)
    resnet50.save_checkpoint(path, ResNet50(num_classes=10, widths=WIDTHS), classes=classes[::-1])
    flags = "--batch-size", 10, "--epochs", 1, "--image-size", 32
    with pytest.raises(UserError, match="t.pt: has the classes in another order"):
        hand(train, path, tiny, tmp_path, *flags)
    names.write_text(json.dumps(classes[::-1]))
    result = hand(train, path, tiny, tmp_path, *flags, "--classes", names, "--overwrite")
    assert resnet50.load_checkpoint(result["checkpoint"])["classes"] == classes[::-1]


def test_training_goes_on_with_the_mean_and_std_that_the_weights_know(tiny, tmp_path):
    """As torchvision's efficientnet_v2_l has them; what the flags say is the size"""
    path, model = str(tmp_path / "t.pt"), ResNet50(num_classes=10, widths=WIDTHS)
    model.preprocess.update(mean=[0.5] * 3, std=[0.5] * 3, interpolation="bicubic")
    resnet50.save_checkpoint(path, model, classes=sorted(os.listdir(os.path.join(tiny, "train"))))
    result = hand(train, path, tiny, tmp_path, "--batch-size", 10, "--epochs", 1, "--image-size", 32)
    assert resnet50.load_checkpoint(result["checkpoint"])["preprocess"] == dict(
        resize=32, crop=32, interpolation="bilinear", mean=[0.5] * 3, std=[0.5] * 3)


# -------------------------------------------------------------------------------------------------------- cascade

def cascade(kinds, threshold=0.5):
    """Members of the kinds "float", "int8", "torchvision"; what they say differs much from image to image."""
    def member(kind, seed):
        if kind == "torchvision":
            model = classifier(seed=seed)
        else:
            model = build("plain", seed)
        with torch.no_grad():
            head = model.fc
            head.weight.mul_(4 / resnet50.predict(model, photographs(8, 64, 64)).std())
        return resnet50.quantize(model, [photographs(8, 64, 64)]) if kind == "int8" else model
    return resnet50.Cascade(member(kinds[0], 0), member(kinds[1], 1), threshold).eval()


@pytest.mark.parametrize("kinds", [("torchvision", "float"), ("int8", "torchvision"), ("float", "int8")])
@torch.no_grad()
def test_a_cascade_asks_the_big_network_where_the_small_one_doubts(kinds, tmp_path):
    path, model, pixels = str(tmp_path / "c.pt"), cascade(kinds), photographs(9, 64, 64, seed=3)
    small, big = (resnet50.predict(m, pixels) for m in (model.small, model.big))
    sure = small.softmax(1).amax(1)
    for threshold in (0.0, sure.median().item(), 1.0):
        model.threshold, seen = threshold, []
        handle = model.big.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
        logits = resnet50.predict(model, pixels)
        handle.remove()
        expected = torch.where((sure < threshold)[:, None], big, small)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)  # float kernels differ by the batch's size
        assert model.deferred == (sure < threshold).sum() == sum(seen) and logits.dtype == torch.float32
    assert torch.equal(logits, big) or kinds[1] != "int8"
    model.threshold = sure.median().item()
    resnet50.save_checkpoint(path, model, classes="abcdefg", encode={"small.conv1.weight": "sparse"})
    raw = torch.load(path, weights_only=True)
    assert raw["precision"] == "cascade" and raw["model"] == {} and isinstance(raw["threshold"], float)
    assert [m["precision"] for m in raw["members"]] == [m.precision for m in (model.small, model.big)]
    loaded = resnet50.load_checkpoint(path)
    again = resnet50.build_model(loaded, path)
    assert loaded["encode"] == {"small.conv1.weight": "sparse"} and same_state(model, again)
    assert torch.equal(resnet50.predict(again, pixels), resnet50.predict(model, pixels))
    assert again.deferred == 4 and again.threshold == model.threshold and again.config == model.config
    torch.save(raw["members"][1], path)  # a member is a checkpoint
    assert same_state(resnet50.build_model(resnet50.load_checkpoint(path), path), model.big)


def test_a_cascade_asks_the_big_network_where_the_small_one_has_no_number():
    model, pixels = cascade(("float", "float"), 0.0), photographs(3, 64, 64)
    torch.nn.init.constant_(model.small.fc.bias, float("nan"))
    assert model(pixels).isfinite().all() and model.deferred == 3


def test_a_loaded_cascade_packs_its_int8_members_anew():
    a, b, pixels = (*(cascade(("int8", "int8"), 1.0) for _ in range(2)), photographs(3, 64, 64))
    b.load_state_dict({k: a.state_dict()[k.replace("small", "tmp").replace("big", "small").replace("tmp", "big")]
                       for k in a.state_dict()})
    before = a(pixels)
    a.load_state_dict(b.state_dict())
    assert torch.equal(a(pixels), b(pixels)) and not torch.equal(a(pixels), before)


def test_mistakes_of_cascades(tmp_path):
    path, model = str(tmp_path / "c.pt"), cascade(("torchvision", "float"))
    with pytest.raises(UserError, match="cascade: its networks disagree in outputs: 7 and 9"):
        resnet50.Cascade(model.small, ResNet50(num_classes=9), 0.5)
    other = build("plain")
    other.preprocess.update(crop=100)
    with pytest.raises(UserError, match="cascade: its networks disagree in preprocess: .*100"):
        resnet50.Cascade(model.small, other, 0.5)
    for threshold in (-0.1, 1.5, float("nan")):
        with pytest.raises(UserError, match="cascade: threshold .* is no probability"):
            resnet50.Cascade(model.small, model.big, threshold)
    with pytest.raises(UserError, match="c.pt: not written: encode names no tensor of this network: conv1.weight"):
        resnet50.save_checkpoint(path, model, classes="abcdefg", encode={"conv1.weight": "sparse"})
    resnet50.save_checkpoint(path, model, classes="abcdefg")
    whole = torch.load(path, weights_only=True)
    for change, words in ((dict(members=whole["members"][:1]), "members are not two checkpoints"),
                          (dict(members=[1, 2]), "members are not two checkpoints"), (dict(members=3), "members are"),
                          (dict(threshold="x"), "threshold 'x' is no probability"),
                          (dict(threshold=2.0), "threshold 2.0 is no probability"),
                          (dict(members=[dict(whole["members"][0], format="resnet50/9")] * 2), "format 'resnet50/9'")):
        torch.save({**whole, **change}, path)
        with pytest.raises(UserError, match=f"c.pt: .*{words}"):
            resnet50.build_model(resnet50.load_checkpoint(path), path)
    del whole["threshold"]
    torch.save(whole, path)
    with pytest.raises(UserError, match="c.pt: damaged: has no threshold"):
        resnet50.load_checkpoint(path)


def test_scripts_take_a_cascade(tiny, tmp_path, capsys):
    small = resnet50.torchvision_model("resnet18", 10)
    big = ResNet50(num_classes=10, widths=WIDTHS, stem="small").eval()
    for model in (small, big):
        model.preprocess.update(crop=32, resize=36)
    model, path = resnet50.Cascade(small, big, 0.15), str(tmp_path / "c.pt")
    resnet50.save_checkpoint(path, model, classes=sorted(os.listdir(os.path.join(tiny, "train"))))
    score = ("--eval-only", "--data", tiny, "--workers", "0")
    assert call(train, "--checkpoint", path, *score)["images"] == 29
    for args, words in (((*score, "--fused"), "float ResNet-50 .* not cascade"),
                        (("--data", tiny, "--out", str(tmp_path / "o")), "cannot be trained"),
                        ((*score, "--amp-dtype", "bfloat16"), "c.pt is cascade"), ((*score, "--stem", "deep"), "stem")):
        with pytest.raises(UserError, match=words):
            call(train, "--checkpoint", path, *args)
    capsys.readouterr()
    summary, text = call(resnet50, "--checkpoint", path), capsys.readouterr().err
    assert "small" in text and "big" in text and "cascade, 32 px" in text
    assert summary["params"] == sum(p.numel() for p in model.parameters())
    assert summary["macs"] == sum(sum(resnet50.count_macs(m, 32).values()) for m in (small, big))
    with pytest.raises(UserError, match="not cascade"):
        call(resnet50, "--checkpoint", path, "--fused")


# -------------------------------------------------------------------------------------------------- float layers

def named(net, *kinds):
    return [step.name for step in net.steps if step.kind in kinds]


def mixed(model, net, names):
    """The float network and what quantize() made of it -> an int8 network whose steps `names` are float."""
    result = resnet50.Int8ResNet50(**model.config, float_layers=names)
    kept = {k: v for k, v in net.state_dict().items() if k.rpartition(".")[0] not in names}
    result.load_state_dict(kept, strict=False)
    mean, std = (torch.tensor(model.preprocess[k], dtype=torch.float64) * 255 for k in ("mean", "std"))

    def folded(step):
        scale, shift = resnet50.batch_norm_affine(model.get_submodule(step.bn))
        weight = model.get_submodule(step.name).weight * scale.view(-1, 1, 1, 1)
        return weight / std.view(1, 3, 1, 1) if step.x == "pixels" else weight, shift
    for step in result.steps:
        if step.name == "fc" in names:
            result.fc.fill([model.fc.weight], model.fc.bias, 0.0, 0.0)
        elif step.name in names:
            old, parts = net.get_submodule(step.name), [folded(s) for s in (step, step.folded) if s]
            low = -(old.zero * old.scale).item()
            result.get_submodule(step.name).fill([w for w, _ in parts], sum(b for _, b in parts), low,
                                                 low + 255 * old.scale.item(), mean)
    result.preprocess = dict(model.preprocess)
    return result


def check_steps(model, net, other, pixels):
    """Each step of the mixed network `other`, given what it read, is the int8 network's or the float network's."""
    names, got = other.config["float_layers"], {"pixels": pixels}
    logits = other.run(pixels, watch=lambda step, y: got.update({step.name: y}))
    grids = {}

    def real(name):
        if name == "pixels":
            return resnet50.normalize(pixels, model.preprocess)
        return got[name] if got[name].is_floating_point() else (got[name].float() - grids[name][1]) * grids[name][0]

    def byte(name):
        if not got[name].is_floating_point():
            return got[name]
        return ((got[name] / grids[name][0]).round() + grids[name][1]).clamp(0, 255).byte()

    def conv(step, x):
        return model.get_submodule(step.bn)(model.get_submodule(step.name)(x))
    for step in other.steps:
        module = other.get_submodule(step.name)
        grids[step.name] = grids[step.x] if step.kind in ("maxpool", "pool") else (
            module.scale.float(), getattr(module, "zero", 0))
        reads = {k: getattr(step, k) for k in ("x", "residual", "x2") if getattr(step, k)}
        floating = step.name in names if step.kind in ("conv", "linear") else any(
            got[name].is_floating_point() for name in reads.values())
        assert got[step.name].is_floating_point() == (floating or step.kind == "linear"), step
        if not floating:
            expected = net.call(step, **{k: byte(name) for k, name in reads.items()})
            assert torch.equal(got[step.name], expected), step
            continue
        module, x = model.get_submodule(step.name) if step.kind != "avgpool" else None, real(step.x)
        if step.kind == "conv":
            y = conv(step, x)
            y = y if step.x2 is None else y + conv(step.folded, real(step.x2))
            y = y if step.residual is None else y + real(step.residual)
            expected = F.relu(y) if step.relu else y
        elif step.kind == "gate":
            expected = module.mix(x) if step.residual is None else F.relu(module(x) + real(step.residual))
        else:
            expected = module(x) if module else x.mean((2, 3))
        assert (got[step.name] - expected).abs().max() <= 1e-4 * expected.abs().max(), step
    return logits


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_float_layers_compute_as_the_float_network(variant):
    model, pixels = build(variant), photographs(2, 75, 50, seed=5)
    net = resnet50.quantize(model, photographs(5, 75, 50).split(2))
    convs = named(net, "conv")
    for names in (["layer2.0.conv3"], [convs[0], *[name for name in convs if name.startswith("layer3.0.")]], ["fc"],
                  convs[1::3] + ["layer4.2.conv3"]):
        other = mixed(model, net, names)
        logits = check_steps(model, net, other, pixels)
        assert torch.equal(other(pixels), logits) and torch.equal(resnet50.predict(other, pixels), logits)
        assert not torch.equal(logits, net(pixels))
    other, expected = mixed(model, net, named(net, "conv", "linear")), resnet50.predict(model, pixels)
    check_steps(model, net, other, pixels)
    assert (other(pixels) - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("variant", ["plain", "se"])
def test_float_layers_in_checkpoints(variant, tmp_path):
    path, model, pixels = str(tmp_path / "m.pt"), build(variant), photographs(2, 64, 64)
    net = resnet50.quantize(model, [pixels])
    other = mixed(model, net, ["conv1", "layer2.0.conv3", "fc"])
    resnet50.save_checkpoint(path, other, classes="abcdefg", encode={"fc.weight": "int4:8"})
    loaded = resnet50.load_checkpoint(path)
    again = resnet50.build_model(loaded, path)
    assert loaded["config"] == other.config == {**model.config, "float_layers": ["conv1", "layer2.0.conv3", "fc"]}
    other.fc.weight.copy_(naive_int4(other.fc.weight, 8))
    assert same_state(again, other) and torch.equal(again(pixels), other(pixels))
    assert sum(resnet50.count_macs(other, 64).values()) == sum(resnet50.count_macs(net, 64).values())
    assert "float_layers" not in net.config and net.config == resnet50.Int8ResNet50(**model.config,
                                                                                    float_layers=[]).config
    folded = ["layer3.0.downsample.0"] if variant == "plain" else [""]
    for names in (["conv9"], ["layer1.0"], ["maxpool"], "fc", folded):
        loaded["config"]["float_layers"] = names
        with pytest.raises(UserError, match="m.pt: .*float_layers names no convolution or linear layer"):
            resnet50.build_model(loaded, path)
    loaded["precision"] = "float"
    with pytest.raises(UserError, match="m.pt: .*float_layers"):
        resnet50.build_model(loaded, path)


def test_float_layers_are_compiled_and_exported():
    model, pixels = build("plain"), photographs(2, 64, 64)
    other = mixed(model, resnet50.quantize(model, [pixels]), ["conv1", "layer2.0.conv3"])
    for f in (torch.compile(other, fullgraph=True, backend="eager"), torch.export.export(other, (pixels,)).module()):
        torch.testing.assert_close(f(pixels), other(pixels))
