"""The decoder and the resize of csrc/ against Pillow, torchvision and PyTorch; batches by threads; damaged files."""
import io
import os
import re
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import csrc
import data
from csrc import reference
from resnet50 import PREPROCESS
from tests.conftest import ROOT
from tests.test_data import arguments

KINDS = {"444": dict(subsampling=0), "422": dict(subsampling=1), "420": dict(subsampling=2), "grey": {},
         "progressive": dict(subsampling=2, progressive=True), "coarse": dict(subsampling=2, quality=20),
         "fine": dict(subsampling=0, quality=100), "restarts": dict(subsampling=2, restart_marker_blocks=3)}
SIZES = [(97, 131), (64, 64), (17, 200), (1, 1), (8, 9), (300, 33)]


@pytest.fixture(scope="module", autouse=True)
def decoder():
    if not csrc.load() or not csrc.libjpeg():
        pytest.skip("the extension was built without libjpeg-turbo")


def photograph(h, w, seed=0):
    """uint8 (h, w, 3): smooth, with edges and noise"""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((w, h), Image.Resampling.BICUBIC)
    return np.clip(np.asarray(coarse).astype(int) + rng.normal(0, 12, (h, w, 3)) * (rng.random((h, w, 1)) < 0.5),
                   0, 255).astype(np.uint8)


def encoded(h, w, kind, seed=0):
    buffer = io.BytesIO()
    image = Image.fromarray(photograph(h, w, seed))
    (image.convert("L") if kind == "grey" else image).save(buffer, "JPEG", **{"quality": 90, **KINDS[kind]})
    return buffer.getvalue()


def tensor(content):
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def crop(content, row, size, kernel="bilinear", gap=0, shape=(0, 0), function=csrc.crop_images):
    """One image -> uint8 (3, H, W), or None"""
    out = torch.full((1, 3, *size), 77, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    files = content if isinstance(content, torch.Tensor) else tensor(content)
    place, shape, row = (torch.tensor([x]) for x in ((0, 0, len(files)), shape, row))
    done = function(out, [files], place, shape, row, kernel, gap)
    return out[0] if done else None


def random_case(rng, h, w, most=90):
    """-> a row of crops, and the size of what is wanted"""
    height, width = (int(rng.integers(1, n + 1)) for n in (h, w))
    full = rng.integers(1, most, 2)
    size = [int(rng.integers(1, n + 1)) for n in full]
    row = [rng.integers(0, h - height + 1), rng.integers(0, w - width + 1), height, width, *full,
           *(rng.integers(0, n - s + 1) for n, s in zip(full, size)), rng.integers(0, 2)]
    return [int(n) for n in row], size


def naive(pixels, row, size, kernel="bilinear"):
    top, left, height, width, h, w, y, x, flip = row
    box = torch.from_numpy(pixels[top:top + height, left:left + width].copy()).permute(2, 0, 1)[None]
    box = box.contiguous(memory_format=torch.channels_last)
    made = F.interpolate(box, (h, w), mode=kernel, antialias=True)[0, :, y:y + size[0], x:x + size[1]]
    return made.flip(2) if flip else made


# -------------------------------------------------------------------------------------------------------- resize

@pytest.mark.parametrize("kernel", ["bilinear", "bicubic"])
@pytest.mark.parametrize("function", [csrc.crop_images, reference.crop_images], ids=["extension", "pytorch"])
def test_the_resize_is_pytorchs(function, kernel):
    rng = np.random.default_rng(1)
    for i in range(300):
        h, w = (int(n) for n in rng.integers(1, (8, 300)[i % 2], 2))
        row, size = random_case(rng, h, w, (9, 240)[i // 2 % 2])
        pixels = rng.integers(0, 256, (h, w, 3), dtype=np.uint8) // 255 ** (i % 5 == 0) * 255 ** (i % 5 == 0)
        got = crop(torch.from_numpy(pixels.reshape(-1)), row, size, kernel, shape=(h, w), function=function)
        assert torch.equal(got, naive(pixels, row, size, kernel)), (h, w, row, size)


def test_the_resize_is_as_exact_as_bytes_allow():
    """Against float64, with the filter's formula: half a level for each of the two roundings, and their weights' own"""
    rng = np.random.default_rng(2)
    for _ in range(40):
        h, w = (int(n) for n in rng.integers(1, 200, 2))
        row, size = random_case(rng, h, w, 120)
        pixels = rng.integers(0, 256, (h, w, 3), dtype=np.uint8)
        part = pixels[row[0]:row[0] + row[2], row[1]:row[1] + row[3]].astype(float)
        for axis in (1, 0):
            n, full = part.shape[axis], row[4 + axis]
            centre, wide = (np.arange(full) + 0.5) * n / full, max(n / full, 1)
            weights = np.maximum(0, 1 - np.abs(np.arange(n) + 0.5 - centre[:, None]) / wide)
            part = np.moveaxis(np.tensordot(weights / weights.sum(1, keepdims=True), part, (1, axis)), 0, axis)
        wanted = part[row[6]:row[6] + size[0], row[7]:row[7] + size[1]]
        got = crop(torch.from_numpy(pixels.reshape(-1)), row, size, shape=(h, w)).permute(1, 2, 0).numpy()
        assert np.abs((got[:, ::-1] if row[8] else got) - wanted).max() < 1.05


@pytest.mark.parametrize("isa", ["plain", "avx2"])
def test_every_instruction_set_gives_the_same_bytes(isa):
    if ("plain", "avx2", "vnni", "amx").index(csrc.isa()) < ("plain", "avx2").index(isa):
        pytest.skip(f"no {isa} here")
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k",
                           "resize_is_pytorchs and extension or boxes_of_jpegs and 420"], cwd=ROOT, text=True,
                          env={**os.environ, "RESNET50_ISA": isa}, capture_output=True)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-2000:]


def test_strips_are_resized_or_complained_of(tmp_path):
    """Far longer than wide: PyTorch's pixels by every path, and no exception out of a batch where they are too many"""
    shapes = {"a.jpg": (1, 257), "b.jpg": (600, 2), "c.png": (2, 600), "d.jpg": (1, 60000), "e.png": (70000, 1)}
    for name, (h, w) in shapes.items():
        Image.fromarray(photograph(h, w)).save(tmp_path / name)
    files = data.scan_unlabelled(str(tmp_path))
    for kernel in ("bilinear", "bicubic"):
        transform = data.eval_transform(dict(PREPROCESS, interpolation=kernel))
        images = data.Images(files, lambda _: transform)
        for i, (h, w) in enumerate(shapes.values()):
            pixels, _, complaints = images.batch([(0, i, 0)])
            if max(h, w) > 1000:
                assert len(pixels) == 0 and "too long a strip" in complaints[0]
                with pytest.raises(ValueError, match=f"{w} x {h} pixels: too long a strip"):
                    transform.encoded(data.read(files.path(i)))
                continue
            row, values = transform.crops(*np.array([[h], [w]]), None)[0].tolist(), np.array(data.load(files.path(i)))
            whole = torch.from_numpy(values.reshape(-1))
            wanted = crop(whole, row, (224, 224), kernel, shape=(h, w), function=reference.crop_images)
            assert torch.equal(pixels[0], wanted) and not complaints
    assert [len(images_of(files).batch([(0, i, 0)])[0]) for i in range(len(shapes))] == [1] * len(shapes)


# ---------------------------------------------------------------------------------------------------------- JPEG

@pytest.mark.parametrize("kind", KINDS)
def test_boxes_of_jpegs_are_boxes_of_the_whole_image(kind):
    """Any box of any file, with restart markers or without: Pillow's pixels, which libjpeg-turbo decodes whole"""
    rng = np.random.default_rng(3)
    for h, w in SIZES:
        file = encoded(h, w, kind)
        whole = np.array(data.decode(file))
        assert csrc.jpeg_sizes([tensor(file)], torch.tensor([[0, 0, len(file)]])).tolist() == [[h, w]]
        for pixels in (8, 32, 1000):
            again = csrc.jpeg_restart(tensor(file), pixels)
            assert len(again) and np.array_equal(np.array(data.decode(again.numpy().tobytes())), whole)
            for _ in range(6):
                row, size = random_case(rng, h, w)
                wanted = naive(whole, row, size)
                assert torch.equal(crop(file, row, size), wanted), (h, w, row)
                assert torch.equal(crop(again, row, size), wanted), (h, w, pixels, row)


def test_real_photographs(shared):
    """Boxes as in training, of files and of the same with restart markers, against torchvision's decoder and resize"""
    from torchvision.io import ImageReadMode, decode_jpeg
    folder = os.path.join(shared, "raccoon", "train")
    names = sorted(n for n in os.listdir(folder) if n.endswith(".jpg"))[:40]
    for i, name in enumerate(names):
        content = tensor(open(os.path.join(folder, name), "rb").read())
        whole = decode_jpeg(content, ImageReadMode.RGB)
        h, w = whole.shape[1:]
        row = data.random_crops(np.array([h]), np.array([w]), np.array([i], np.uint64), 224, 0.08, 0.5)[0].tolist()
        wanted = naive(whole.permute(1, 2, 0).numpy(), row, (224, 224))
        for file in (content, csrc.jpeg_restart(content)):
            assert (crop(file, row, (224, 224)).int() - wanted.int()).abs().max() <= 2, name


@pytest.mark.parametrize("kind", ["444", "420", "grey", "progressive"])
@pytest.mark.parametrize("restarts", [False, True])
def test_large_boxes_are_decoded_smaller(kind, restarts):
    """At 1/2, 1/4 and 1/8, with what the gap leaves; close to the whole decode, and equal where the gap forbids it"""
    file = encoded(640, 480, kind)
    content = csrc.jpeg_restart(tensor(file)) if restarts else tensor(file)
    smooth = np.array(data.decode(file))
    for size, row in (((60, 50), [0, 0, 640, 480]), ((31, 29), [37, 55, 500, 333]), ((20, 20), [101, 3, 170, 411])):
        row = [*row, *size, 0, 0, 0]
        wanted = naive(smooth, row, size).float()
        small, exact = crop(content, row, size, gap=2), crop(content, row, size, gap=1000)
        assert torch.equal(exact.float(), wanted)
        error = small.float() - wanted
        assert 0 < error.abs().max() < 12 and error.abs().mean() < 1 and abs(error.mean()) < 0.3


def test_metadata_and_pixels_survive_restart_markers():
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[274] = 6
    image = Image.fromarray(photograph(40, 70))
    image.save(buffer, "JPEG", exif=exif, icc_profile=b"profile" * 100, comment=b"said", dpi=(72, 71))
    again = Image.open(io.BytesIO(csrc.jpeg_restart(tensor(buffer.getvalue())).numpy().tobytes()))
    assert again.getexif()[274] == 6 and again.info["icc_profile"] == b"profile" * 100
    assert again.info["comment"] == b"said" and again.info["dpi"] == (72, 71) and again.size == (70, 40)


def test_a_lost_segment_is_damage_and_moves_nothing():
    """Below it the pixels would be those of their neighbours."""
    content = csrc.jpeg_restart(tensor(encoded(160, 200, "444"))).numpy().tobytes()
    marks = [m.start() for m in re.finditer(rb"\xff[\xd0-\xd7]", content)]
    assert len(marks) > 40
    lost = content[:marks[10]] + content[marks[11]:]
    assert crop(tensor(content), [96, 0, 32, 200, 32, 200, 0, 0, 0], (32, 200)) is not None
    assert crop(tensor(lost), [96, 0, 32, 200, 32, 200, 0, 0, 0], (32, 200)) is None
    # a file that never was damaged, behind one that was
    assert crop(tensor(content), [0, 0, 160, 200, 160, 200, 0, 0, 0], (160, 200)) is not None


def segments(content):
    """A JPEG with restart markers -> [headers, segment, marker, segment, ..., marker and end]"""
    start = content.index(b"\xff\xda")
    start += 2 + int.from_bytes(content[start + 2:start + 4], "big")
    return [content[:start], *re.split(rb"(\xff[\xd0-\xd7\xd9])", content[start:])]


@pytest.mark.parametrize("kind", ["444", "422", "420", "grey"])
def test_segments_are_decoded_by_themselves(kind):
    """Every pixel of a photograph and of noise, checks and stripes, whose codes and values are as long as they get; by
    the standard's tables and by their own. Damage outside the box does not matter, inside it is noticed."""
    if csrc.isa() == "plain":
        pytest.skip("left to libjpeg-turbo")
    rng = np.random.default_rng(5)
    y, x = np.mgrid[:100, :136]
    checks, stripes = ((y + x) % 2 * 255)[..., None], ((y // 8 + x // 8) % 2 * 255)[..., None]
    noise = rng.integers(0, 2, (100, 136, 3)) * 255
    sparse = np.where(y[..., None] % 8 < 4, 128, noise // 4 + stripes // 4)
    for pixels in (photograph(100, 136), noise, checks, stripes, np.where(x[..., None] < 68, noise, checks), sparse):
        image = Image.fromarray(np.broadcast_to(pixels, (100, 136, 3)).astype(np.uint8))
        for quality, interval, optimize in ((100, 1, False), (95, 3, True), (100, 4, True), (30, 2, False)):
            buffer = io.BytesIO()
            (image.convert("L") if kind == "grey" else image).save(
                buffer, "JPEG", quality=quality, restart_marker_blocks=interval, optimize=optimize,
                **KINDS[kind if kind != "grey" else "444"])
            content = buffer.getvalue()
            whole, parts = np.array(data.decode(content)), segments(content)
            across = -(-136 // (16 if kind in ("422", "420") else 8))
            if across % interval:
                assert torch.equal(crop(content, [0, 0, 100, 136, 100, 136, 0, 0, 0], (100, 136)),
                                   torch.from_numpy(whole).permute(2, 0, 1))
                continue
            first = parts[1]
            for row in ([40, 30, 60, 106, 60, 106, 0, 0, 0], [50, 60, 33, 17, 33, 17, 0, 0, 0]):
                parts[1] = b""
                assert torch.equal(crop(b"".join(parts), row, row[2:4]), naive(whole, row, row[2:4]))
                under = 1 + 2 * ((row[0] + 8) // (16 if kind == "420" else 8) * (across // interval)
                                 + (row[1] + 8) * across // 136 // interval)
                parts[1], kept = first, parts[under]
                for spoiled in (kept[:-1], b"\xff\x00" * len(kept)):
                    parts[under] = spoiled
                    assert crop(b"".join(parts), row, row[2:4]) is None, (quality, interval, spoiled[-4:])
                parts[under] = kept + b"\xff"  # as markers may begin
                assert torch.equal(crop(b"".join(parts), row, row[2:4]), naive(whole, row, row[2:4]))
                parts[under] = kept + b"\x55"  # which libjpeg-turbo does not always notice
                got = crop(b"".join(parts), row, row[2:4])
                assert got is None or torch.equal(got, naive(whole, row, row[2:4]))
                parts[under] = kept


def test_a_code_that_no_table_has_is_damage():
    """Though it ends where its segment does"""
    buffer = io.BytesIO()
    Image.new("L", (40, 40), 255).save(buffer, "JPEG", quality=100, restart_marker_blocks=1)
    parts, row = segments(buffer.getvalue()), [8, 8, 30, 30, 30, 30, 0, 0, 0]
    assert crop(b"".join(parts), row, (30, 30)).min() == 255
    parts[1 + 2 * 12] = b"\xff\x00"  # and its neighbour begins with ones
    assert parts[1 + 2 * 13][0] >> 7 and crop(b"".join(parts), row, (30, 30)) is None


def without(content, marker):
    """A JPEG file less its header segments of that kind"""
    at, kept = 2, content[:2]
    while content[at + 1] != 0xda:
        end = at + 2 + int.from_bytes(content[at + 2:at + 4], "big")
        kept += content[at:end] * (content[at + 1] != marker)
        at = end
    return kept + content[at:]


def test_the_tables_of_another_file_decode_nothing():
    row, size = [0, 0, 40, 60, 40, 60, 0, 0, 0], (40, 60)
    for other in ("fine", "progressive"):
        assert crop(encoded(40, 60, other), row, size) is not None
        assert crop(without(encoded(40, 60, "420"), 0xdb), row, size) is None  # as Pillow, which takes one for each
        for kind in ("420", "restarts"):
            bare = without(encoded(40, 60, kind), 0xc4)  # by the tables that libjpeg-turbo has for films
            assert torch.equal(crop(bare, row, size), naive(np.array(data.decode(bare)), row, size))


def test_what_is_no_jpeg_of_ours():
    whole = encoded(50, 60, "420")
    cmyk, png = io.BytesIO(), io.BytesIO()
    Image.fromarray(photograph(9, 9)).convert("CMYK").save(cmyk, "JPEG")
    Image.fromarray(photograph(9, 9)).save(png, "PNG")
    for content in (cmyk.getvalue(), png.getvalue(), b"x", whole[:-2], whole[:300], whole[:2], b"\xff\xd8" * 9):
        assert csrc.jpeg_sizes([tensor(content)], torch.tensor([[0, 0, len(content)]])).tolist() == [[0, 0]]
        assert len(csrc.jpeg_restart(tensor(content), 64)) == 0
        assert crop(content, [0, 0, 5, 5, 4, 4, 0, 0, 0], (4, 4)) is None or content == whole[:-2]
    assert crop(whole, [0, 0, 51, 5, 4, 4, 0, 0, 0], (4, 4)) is None  # a box outside


# ------------------------------------------------------------------------------------------------- arguments

GOOD = dict(out=torch.zeros(2, 3, 4, 5, dtype=torch.uint8).contiguous(memory_format=torch.channels_last),
            files=[torch.zeros(n, dtype=torch.uint8) for n in (6 * 7 * 3, 130)],
            places=torch.tensor([[0, 0, 126], [1, 4, 126]]),
            sizes=torch.tensor([[6, 7]] * 2), crops=torch.tensor([[1, 2, 4, 5, 4, 5, 0, 0, 0]] * 2),
            kernel="bilinear", gap=0)


@pytest.mark.parametrize("change, message", [
    (dict(out=torch.zeros(2, 3, 4, 5, dtype=torch.uint8)), "out must be channels_last"),
    (dict(out=torch.zeros(2, 4, 4, 5)), "out must be uint8"),
    (dict(files=[torch.zeros(3)]), "files must be uint8"),
    (dict(places=torch.tensor([[0, 0, 126]])), "places must be int64"),
    (dict(sizes=torch.tensor([[6, 7]] * 2).int()), "sizes must be int64"),
    (dict(crops=torch.zeros(2, 8, dtype=torch.int64)), "crops must be int64"),
    (dict(kernel="nearest"), "kernel must be bilinear or bicubic"),
    (dict(gap=-1), "gap must not be negative"),
    *[(dict(places=torch.tensor([[0, 0, 126], wrong])), r"places\[1\].*outside the 2 files")
      for wrong in ([0, 1, 126], [0, -1, 5], [0, 2 ** 62, 2 ** 62], [2, 0, 5], [-1, 0, 5])],
    (dict(sizes=torch.tensor([[6, 7], [6, 8]])), "image 1|crops.1"),
    (dict(sizes=torch.tensor([[6, 7], [-6, -7]])), "image 1|crops.1"),
    (dict(crops=torch.tensor([[3, 2, 4, 5, 4, 5, 0, 0, 0]] * 2)), "image 0|crops.0"),
    (dict(crops=torch.tensor([[0, 0, 6, 7, 4, 5, 1, 0, 0]] * 2)), r"crops\[0\]"),
    (dict(crops=torch.tensor([[0, 0, 0, 7, 4, 5, 0, 0, 0]] * 2)), r"crops\[0\]"),
    (dict(crops=torch.tensor([[-1, 0, 3, 7, 4, 5, 0, 0, 0]] * 2)), r"crops\[0\]")])
def test_wrong_arguments_are_named(change, message):
    for function in (csrc.crop_images, lambda *a: (reference.check_crop_images(*a), reference.crop_images(*a))):
        with pytest.raises(RuntimeError, match=message):
            function(*{**GOOD, **change}.values())


def test_opcheck():
    file = tensor(encoded(30, 40, "420"))
    places = torch.tensor([[0, 0, len(file)]])
    torch.library.opcheck(torch.ops.resnet50.crop_images.default, tuple(GOOD.values()))
    torch.library.opcheck(torch.ops.resnet50.jpeg_sizes.default, ([file], places))
    torch.library.opcheck(torch.ops.resnet50.jpeg_restart.default, (file, 32))


# --------------------------------------------------------------------------------------------------- data sets

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of every kind of JPEG, PNGs, a CMYK file, one turned by its tag, and one cut short"""
    root = tmp_path_factory.mktemp("decoder") / "set"
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        for i, kind in enumerate(KINDS):
            (root / name / f"{kind}.jpg").write_bytes(encoded(60 + 11 * i, 90 - 7 * i, kind, i))
        Image.fromarray(photograph(33, 44)).save(root / name / "p.png")
        Image.fromarray(photograph(33, 44)).convert("CMYK").save(root / name / "cmyk.jpg")
        exif = Image.Exif()
        exif[274] = 8
        Image.fromarray(photograph(50, 70)).save(root / name / "turned.jpg", exif=exif)
    (root / "a" / "short.jpg").write_bytes(encoded(50, 50, "420")[:-500])
    return str(root)


def images_of(files, exif=False, flags=()):
    args = arguments(*flags)
    return data.Images(files, lambda _: data.train_transform(32, PREPROCESS, args), 7, exif, replace=True)


def order_of(files):
    order = data.Order(np.zeros(len(files), np.int32), 5, seed=1)
    order.epoch = 3
    return order


def batches(root, workers, exif=False, flags=()):
    files = data.scan_unlabelled(root)
    for pixels, labels, complaints in data.make_loader(images_of(files, exif, flags), order_of(files), workers):
        yield pixels.clone(), labels, complaints


@pytest.mark.parametrize("exif", [False, True])
def test_batches_are_what_pillow_and_pytorch_make(folder, exif):
    """Image by image, whatever the threads; a lossless pack gives the same"""
    files = data.scan_unlabelled(folder)
    images = images_of(files, exif)
    wanted = [data.collate([images[key] for key in keys]) for keys in order_of(files)]
    assert sum(len(c) for _, _, c in wanted) == 1
    for workers in (0, 1, 3):
        for (a, y, c), (b, z, d) in zip(batches(folder, workers, exif), wanted, strict=True):
            assert torch.equal(a, b) and torch.equal(y, z) and c == d


@pytest.mark.parametrize("workers", [0, 2])
def test_what_follows_the_crop_is_torchvisions_with_the_images_seed(folder, workers):
    from torchvision.transforms import InterpolationMode, v2
    files, grey = data.scan_unlabelled(folder), [round(255 * m) for m in PREPROCESS["mean"]]
    turn, jitter = v2.RandomRotation(20, InterpolationMode.BILINEAR, fill=grey), v2.ColorJitter(0.4, 0.4, 0.4)
    plain, after = images_of(files), ("--rotation", "20", "--color-jitter", "0.4")
    erased = images_of(files, flags=("--random-erase", "1"))
    found = [batches(folder, workers, flags=flags) for flags in (
        after, (*after, "--random-erase", "1"), ("--random-erase", "1"))]
    fill = torch.tensor(grey, dtype=torch.uint8)[:, None]
    for keys, *three in zip(order_of(files), *found, strict=True):
        for key, got, then, alone in zip(keys, *(pixels for pixels, _, _ in three), strict=True):
            crop = plain[key][0]
            assert torch.equal(alone, erased[key][0].permute(2, 0, 1))
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(data.seed_for(7, *key))
                wanted = torch.from_numpy(np.array(jitter(turn(Image.fromarray(crop.numpy()))))).permute(2, 0, 1)
            assert torch.equal(got, wanted) and not torch.equal(got, crop.permute(2, 0, 1))
            place = (erased[key][0] != crop).any(2)  # the same rectangle, on top of the jitter
            assert place.any() and torch.equal(then[:, ~place], wanted[:, ~place])
            assert (then[:, place] == fill).all()


def test_training_decodes_large_boxes_smaller(tmp_path):
    (tmp_path / "a.jpg").write_bytes(encoded(640, 480, "444"))
    images = images_of(data.scan_unlabelled(str(tmp_path)), flags=("--crop-scale", "0.9"))
    key = 3, 0, 0
    small, whole = images.batch([key])[0][0].float(), images[key][0].permute(2, 0, 1).float()  # Pillow decodes this one
    assert 0 < (small - whole).abs().max() < 12 and (small - whole).abs().mean() < 1


@pytest.mark.parametrize("exif", [False, True])
def test_a_lossless_pack_gives_the_same_batches(folder, tmp_path, exif):
    shutil.copytree(folder, tmp_path / "set")
    os.unlink(tmp_path / "set" / "a" / "short.jpg")
    out = str(tmp_path / "pack")
    data.main(data.get_args_parser().parse_args(["--pack", str(tmp_path / "set"), "--out", out, "--lossless"]))
    theirs, ours = (list(batches(str(root), 2, exif)) for root in (tmp_path / "set", out))
    for (a, y, c), (b, z, d) in zip(theirs, ours, strict=True):
        assert torch.equal(a, b) and torch.equal(y, z) and not c + d


def test_without_the_extension_batches_differ_by_their_decoder_only(folder):
    """Pillow and PyTorch instead: the same boxes, and here the same pixels"""
    code = f"""if True:
        import hashlib, sys, torch
        sys.path.insert(0, {ROOT!r})
        from tests.test_decoder import batches
        for pixels, labels, complaints in batches({folder!r}, 2):
            print(hashlib.sha256(pixels.contiguous().numpy().tobytes()).hexdigest(), len(complaints))"""
    said = [subprocess.run([sys.executable, "-c", code], env={**os.environ, "RESNET50_EXT": mode}, text=True,
                           capture_output=True, check=True).stdout.splitlines()
            for mode in ("off", os.environ.get("RESNET50_EXT", ""))]
    assert said[0] == said[1] and len(said[0]) == 4


def test_memory_is_used_again_and_a_reader_may_leave(folder):
    files = data.scan_unlabelled(folder)
    images = data.Images(files, lambda _: data.eval_transform(dict(PREPROCESS, resize=24, crop=24)))
    loader = data.make_loader(images, data.eval_batches(len(files), 2), 2)
    threads = threading.active_count()
    for _ in range(10):
        first = None
        for pixels, _, _ in loader:
            first = pixels if first is None else first
        kept = first.clone()
    assert len(loader.arrays) <= 2 + 4 + 2  # made or being made, ahead, and held here
    for pixels, _, _ in loader:
        break
    assert torch.equal(first, kept) and torch.equal(pixels, kept)
    assert threading.active_count() == threads


# ------------------------------------------------------------------------------------------- damaged files

def build_fuzz(folder):
    program, cpu = str(folder / "fuzz"), os.path.join(ROOT, "csrc", "cpu")
    sources = [os.path.join(cpu, f"{name}.cpp") for name in ("jpeg", "huffman", "crop_resize", "isa")]
    sources.append(os.path.join(ROOT, "tests", "fuzz_jpeg.cpp"))
    built = subprocess.run(["g++", "-std=c++20", "-O1", "-g", "-DUSE_LIBJPEG", "-fsanitize=address,undefined",
                            "-fno-sanitize-recover=all", "-I", cpu, *sources, "-ljpeg", "-o", program],
                           capture_output=True, text=True)
    if built.returncode and "cannot find" in built.stderr and "san" in built.stderr:
        pytest.skip("no sanitizer's library")
    assert built.returncode == 0, built.stderr[-3000:]
    return program


def test_mutated_files_give_an_error_or_an_image(tmp_path):
    """RESNET50_FUZZ says how many. The decoder and the resize under AddressSanitizer, files with and without
    restart markers."""
    program, files = build_fuzz(tmp_path), []
    for i, kind in enumerate(KINDS):
        content = encoded(40 + 9 * i, 90 - 7 * i, kind)
        for name, file in (("a", content), *((width, csrc.jpeg_restart(tensor(content), width).numpy().tobytes())
                                             for width in (16, 1000))):
            files.append(str(tmp_path / f"{kind}.{name}"))
            with open(files[-1], "wb") as f:
                f.write(file)
    count = int(os.environ.get("RESNET50_FUZZ", "60000"))
    done = subprocess.run([program, "1", str(count), *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    sizes, decoded, restarted = map(int, done.stdout.split())
    assert count > sizes > decoded > count / 20 and 0 < restarted < count / 8  # it got that far


def test_mutated_files_in_a_data_set(tmp_path):
    """Through data.Images: an image or a complaint that names the file, as Pillow alone gives it"""
    rng = np.random.default_rng(4)
    root = tmp_path / "set"
    root.mkdir()
    for i in range(120):
        content = bytearray(encoded(40, 50, list(KINDS)[i % len(KINDS)], i))
        for at in rng.integers(0, len(content), 1 + i % 4):
            content[at] = rng.integers(0, 256)
        (root / f"{i}.jpg").write_bytes(content[:len(content) if i % 3 else int(rng.integers(0, len(content)))])
    files = data.scan_unlabelled(str(root))
    images = data.Images(files, lambda _: data.eval_transform(dict(PREPROCESS, resize=24, crop=24)))
    intact = 0
    for i in range(len(files)):
        pixels, _, complaints = images.batch([(0, i, 0)])
        try:
            data.load(files.path(i))
            assert len(pixels) == 1 and not complaints
            intact += 1
        except ValueError as error:
            assert len(pixels) == 0 and complaints == [f"{files.path(i)}: {error}"]
    assert 20 < intact < 100
