"""Decoding, folders, order, augmentation and archives: against PIL, torchvision and counting by hand."""
import argparse
import collections
import contextlib
import errno
import io
import os
import resource
import signal
import struct
import tarfile
import threading
import types
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import data
import train
from resnet50 import PREPROCESS, UserError


def picture(mode="RGB", size=(37, 23)):
    rng = np.random.default_rng(0)
    smooth = np.asarray(Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize(size, Image.BICUBIC))
    return Image.fromarray(smooth).convert(mode)


def encode(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


# --------------------------------------------------------------------------------------------------- decoding

@pytest.mark.parametrize("kind, mode", [
    ("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "LA"), ("PNG", "P"),
    ("PNG", "1"), ("WEBP", "RGBA"), ("BMP", "RGB"), ("GIF", "P"), ("PPM", "L"), ("TIFF", "CMYK")])
def test_decode_equals_pil(kind, mode):
    encoded = encode(picture(mode), kind)
    expected = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
    assert np.array_equal(np.asarray(data.decode(encoded)), expected)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_keeps_its_high_byte(kind):
    values = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    got = np.asarray(data.decode(encode(Image.fromarray(values), kind)))
    assert np.array_equal(got, np.repeat((values >> 8).astype(np.uint8)[..., None], 3, 2))


def test_float_and_integer_tiff():
    values = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    got = np.asarray(data.decode(encode(Image.fromarray(values), "TIFF")))[..., 0]
    assert abs(got / 255 - values).max() < 0.01
    for most in (255, 65535):
        assert np.array_equal(np.asarray(data.decode(encode(Image.fromarray(most * values), "TIFF")))[..., 0], got)
    steps = np.arange(256, dtype=np.int32).reshape(16, 16)
    for times in (1, 257):  # bytes, and 16 bits, in 32-bit integers
        assert np.array_equal(np.asarray(data.decode(encode(Image.fromarray(times * steps), "TIFF")))[..., 0], steps)
    holed = values.copy()
    holed[0, 3] = np.nan
    other = np.asarray(data.decode(encode(Image.fromarray(holed), "TIFF")))[..., 0]
    assert other[0, 3] == 0 and (other == got).sum() == 63


def test_a_jpeg_is_decoded_no_smaller_than_is_asked_for():
    encoded = encode(picture(size=(400, 300)), "JPEG")
    sizes = [data.decode(encoded, short_side=side).size for side in (None, 300, 151, 150, 76, 40, 1)]
    assert sizes == [(400, 300)] * 3 + [(200, 150)] * 2 + [(100, 75), (50, 38)]


def test_formats_are_limited_by_content_not_name():
    for kind in ("BMP", "GIF", "PPM", "TIFF"):
        data.decode(encode(picture(), kind))
        with pytest.raises(ValueError, match="not an image in any of JPEG, PNG, WEBP"):
            data.decode(encode(picture(), kind), formats=data.FORMATS)
    for junk in (b"", b"\xff", b"\xff\xd8", b"\xff\xd8\xff", b"GIF89a", b"x" * 1000, b"\x89PNG\r\n\x1a\n"):
        with pytest.raises(ValueError):
            data.decode(junk)


@pytest.mark.parametrize("kind, options", [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {}),
                                           ("GIF", {}), ("BMP", {}), ("TIFF", {})])
def test_cut_anywhere_is_refused(kind, options):
    whole = encode(picture(size=(120, 80)), kind, **options)
    data.decode(whole)
    for cut in [len(whole) * i // 12 for i in range(1, 12)]:
        with pytest.raises(ValueError):
            data.decode(whole[:cut])


def test_jpeg_padded_with_zeros_and_thumbnails():
    whole = encode(picture(size=(200, 200)), "JPEG")
    Image.open(io.BytesIO(whole[:len(whole) // 2] + b"\0" * 9 * len(whole))).load()  # PIL alone says nothing
    with pytest.raises(ValueError, match="no end-of-image marker"):
        data.decode(whole[:len(whole) // 2] + b"\0" * 9 * len(whole))
    thumbnail = encode(picture(), "JPEG")  # an APP1 segment with a complete JPEG, before a body that is cut short
    segment = b"\xff\xe1" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail
    with pytest.raises(ValueError, match="no end-of-image marker"):
        data.decode(whole[:2] + segment + whole[2:len(whole) // 2] + b"\0" * 9 * len(whole))
    data.decode(whole[:2] + segment + whole[2:] + b"trailing bytes")


def test_png_padded_with_zeros():
    whole = encode(picture(), "PNG")
    for cut in range(100, len(whole) - 12, len(whole) // 20):
        padded = whole[:cut] + bytes(len(whole) - cut)
        assert not np.array_equal(Image.open(io.BytesIO(padded)), picture())  # PIL alone says nothing
        with pytest.raises(ValueError, match="no IEND chunk"):
            data.decode(padded)
    data.decode(whole + b"trailing bytes")


def test_several_pictures_in_a_jpeg():
    """MPO, as phones write it: the first is the image, and it must have an end"""
    whole = encode(picture(size=(200, 200)), "MPO", save_all=True, append_images=[picture(size=(100, 100))])
    assert Image.open(io.BytesIO(whole)).format == "MPO"
    for formats in (data.TRAIN_FORMATS, data.FORMATS):
        assert np.array_equal(data.decode(whole, formats), Image.open(io.BytesIO(whole)))
    cut = whole[:len(whole) // 3] + b"\0" * 9 * len(whole)
    Image.open(io.BytesIO(cut)).load()  # PIL alone says nothing
    with pytest.raises(ValueError, match="no end-of-image marker"):
        data.decode(cut)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    encoded = encode(picture(), "JPEG", exif=exif)
    plain, turned = data.decode(encoded), data.decode(encoded, exif=True)
    from PIL import ImageOps
    assert plain.size == (37, 23) and np.array_equal(
        np.asarray(turned), np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(encoded)))))


def test_a_damaged_tag_beside_the_orientation_refuses_no_image():
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 72.0  # the resolution, a fraction
    encoded = encode(picture(), "JPEG", exif=exif)
    assert encoded.count(b"\x01\x1a\0\x05") == 1
    bad = encoded.replace(b"\x01\x1a\0\x05", b"\x01\x31\0\x05")  # becomes the software's name, which is text
    assert np.array_equal(data.decode(bad, exif=True), data.decode(encoded, exif=True))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_damaged_exif_block_refuses_no_image(kind):
    """As programs leave it that wipe where a photograph was taken"""
    for block in (bytes(30), b"II*\0", b"text that is no TIFF file"):
        encoded = encode(picture(), kind, exif=b"Exif\0\0" + block)
        assert np.array_equal(data.decode(encoded, exif=True), Image.open(io.BytesIO(encoded)).convert("RGB"))


def test_every_path_finds_an_orientation():
    """Behind 64 KiB of other metadata, or in XMP alone, where Pillow reads it too"""
    from PIL import ImageOps
    exif = Image.Exif()
    exif[0x0112] = 6
    behind = encode(picture(), "JPEG", exif=exif)
    behind = behind[:2] + (b"\xff\xed\xea\x60" + bytes(59998)) * 2 + behind[2:]
    transform = data.eval_transform(dict(PREPROCESS, resize=16, crop=16))
    for content in (behind, encode(picture(), "JPEG", xmp=b'<rdf:Description tiff:Orientation="6"/>')):
        turned = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
        assert turned.size == (23, 37)
        assert torch.equal(transform.encoded(content, exif=True), transform(turned))


def test_decoding_in_threads_leaves_warnings_as_they_were(monkeypatch):
    """One picture is begun, another one too, and the first is done before it"""
    inner, first, second = data.Image.open, threading.Event(), threading.Event()

    def slow(*args, **options):
        if threading.current_thread() is threads[0]:
            first.set()
            second.wait(5)
        else:
            first.wait(5)
            second.set()
            threads[0].join(5)
        return inner(*args, **options)
    monkeypatch.setattr(data.Image, "open", slow)
    before = list(warnings.filters)
    threads = [threading.Thread(target=data.decode, args=(encode(picture(), "PNG"),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert warnings.filters == before


# ---------------------------------------------------------------------------------------------------- folders

def make(root, layout, extension=".jpg"):
    for folder, count in layout.items():
        os.makedirs(root / folder, exist_ok=True)
        for i in range(count):
            (root / folder / f"{i}{extension}").write_bytes(encode(picture(), "JPEG"))
    return str(root)


def test_classes_come_from_train_alone(tmp_path):
    root = make(tmp_path, {"train/b": 2, "train/a10": 2, "train/a9": 1, "val/b": 1, "val/a9": 2, "val/a10": 0,
                           "train/.ipynb_checkpoints": 1})
    train, val, classes, _, notes = data.open_folder(root)
    assert classes == ["a10", "a9", "b"] and sorted(train.labels) == [0, 0, 1, 2, 2] and sorted(val.labels) == [1, 1, 2]
    assert any(".ipynb_checkpoints ignored" in n for n in notes)
    assert any("no validation image of a10" in n for n in notes)
    assert all(os.path.exists(train.path(i)) and classes[train.labels[i]] in train.path(i) for i in range(len(train)))


@pytest.mark.parametrize("layout, complaint", [
    ({"train/a": 1, "val/a": 1, "val/zebra": 1}, "class folder zebra not among the 1 classes"),
    ({"train/a": 1, "train/empty": 0, "val/a": 1}, "no images in class folder empty"),
    ({"train/a": 1, "val": 0}, "no images"), ({"train": 0}, "no class folders"), ({"val/a": 1}, "but no train/"),
    ({".git": 1}, "no class folders"), ({"a": 1}, "too few to split")])
def test_bad_folders_are_named(layout, complaint, tmp_path):
    with pytest.raises(UserError, match=complaint) as caught:
        data.open_folder(make(tmp_path, layout))
    assert str(tmp_path) in str(caught.value) and caught.value.code == 3


def test_the_folder_around_a_data_set_is_told_from_it(tmp_path):
    """All its images would be of one class, and every answer right"""
    root = make(tmp_path / "around", {"set/train/a": 9, "set/train/b": 9, "set/val/a": 9})
    assert any("one class alone, set" in n for n in data.open_folder(root)[4])
    assert not any("one class" in n for n in data.open_folder(os.path.join(root, "set"))[4])
    parts = make(tmp_path / "parts", {"Train/a": 9, "Train/b": 9, "Test/a": 9, "Test/b": 9})
    assert any("in folders below Test, Train: are" in n for n in data.open_folder(parts)[4])
    deep = make(tmp_path / "deep", {"train/a/more": 3, "train/b": 3, "val/a/more": 1, "val/b": 1})
    assert not any("are those" in n for n in data.open_folder(deep)[4])


def test_missing_folder():
    with pytest.raises(UserError, match="/nowhere: no such folder"):
        data.open_folder("/nowhere")


def test_a_name_is_said_as_it_is():
    """It will be looked for: two blanks, and the narrow one that macOS puts into the names of screenshots"""
    name = "/a  b/Screenshot at 1.02\u202fPM.png"
    with pytest.raises(UserError) as caught:
        data.open_folder(name)
    assert str(caught.value) == f"{name}: no such folder" and str(UserError("of\n  two\n\nlines")) == "of two lines"


def test_class_list_maps_folder_names(tmp_path):
    root = make(tmp_path, {"n03": 2, "n01": 1})
    classes, wnids = ["tench", "crane", "shark", "crane"], ["n01", "n02", "n03", "n04"]
    _, val, got, _, _ = data.open_folder(root, classes, wnids, eval_only=True)
    assert got == classes and sorted(val.labels) == [0, 2, 2]
    assert {os.path.basename(os.path.dirname(val.path(i))): int(val.labels[i])
            for i in range(3)} == {"n01": 0, "n03": 2}
    with pytest.raises(UserError, match="n03 not among the 2 classes"):
        data.open_folder(root, ["tench", "x"], ["n01", "n09"], eval_only=True)
    with pytest.raises(UserError, match="crane"):  # two classes of that name
        data.open_folder(make(tmp_path / "names", {"crane": 1}), classes, wnids, eval_only=True)


def test_names_without_ids_take_the_folders_in_order(tmp_path):
    """torchvision's weights know their classes by name, ImageNet's folders are called by WordNet ids."""
    ids, names = [f"n{1440764 + 3 * i:08}" for i in range(1000)], [f"class {i % 999}" for i in range(1000)]
    root = make(tmp_path, dict.fromkeys(reversed(ids), 1))
    _, val, classes, wnids, notes = data.open_folder(root, names, eval_only=True)
    assert "WordNet ids stand for" in notes[0] and classes == names and wnids == ids
    assert val.labels.tolist() == list(range(1000))
    for others in ([*names, "shark"], [ids[0], *names[1:]]):  # as many as no ids; some that are called so
        with pytest.raises(UserError, match="not among"):
            data.open_folder(root, others, eval_only=True)
    with pytest.raises(UserError, match="not among"):  # two classes may have been named in any order
        data.open_folder(make(tmp_path / "two", {"n02084071": 1, "n02121808": 1}), ["cat", "dog"], eval_only=True)


def test_split_by_hash_is_stable(tmp_path):
    root = make(tmp_path, {"a": 60, "b": 60})
    first = data.open_folder(root, val_split=0.2)
    held = {first[1].path(i) for i in range(len(first[1]))}
    assert (10 <= len(held) <= 40 and len(first[0]) + len(held) == 120
            and not held & {first[0].path(i) for i in range(len(first[0]))})
    make(tmp_path, {"a": 90})  # more images arrive: no earlier one changes sides
    second = data.open_folder(root, val_split=0.2)
    assert held <= {second[1].path(i) for i in range(len(second[1]))}
    _, everything, *_, notes = data.open_folder(root, eval_only=True)
    assert len(everything) == 150 and "--val-split 0.1 scores what training here holds out" in notes[-1]
    held_out = [[part.name(i) for i in range(len(part))] for part in (
        data.open_folder(root)[1], data.open_folder(root, val_split=0.1, eval_only=True)[1])]
    assert held_out[0] == held_out[1] and len(held_out[0]) < 40  # as the note says
    assert len(data.open_folder(make(tmp_path / "t", {"train/a": 50}), eval_only=True)[1]) < 40  # never what is trained
    with pytest.raises(UserError, match="has its own val"):
        data.open_folder(make(tmp_path / "v", {"train/a": 1, "val/a": 1}), val_split=0.3)
    for share in (0, 1, -0.1, float("nan")):
        with pytest.raises(UserError, match=f"--val-split {share}: must lie between"):
            data.open_folder(root, val_split=share)


def test_a_folder_that_cannot_be_read_is_not_left_out(tmp_path, monkeypatch):
    root, inner = make(tmp_path, {"train/a": 2, "train/a/deep": 2, "val/a": 1}), os.scandir

    def scandir(path):
        if str(path).endswith("deep"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return inner(path)
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match="train/a/deep: Permission denied"):
        data.open_folder(root)


def test_links_are_followed_but_not_in_circles(tmp_path):
    root, other = make(tmp_path / "set", {"train/a": 2, "train/b": 1}), make(tmp_path / "other", {"c": 3})
    for at, target in (("train/c", os.path.join(other, "c")), ("val", "train"), ("train/a/up", ".."),
                       ("train/b/out", tmp_path)):
        os.symlink(target, os.path.join(root, at))
    train, val, classes, _, _ = data.open_folder(root)
    assert classes == ["a", "b", "c"] and len(train) == len(val) == 6
    os.symlink("itself", os.path.join(root, "train", "itself"))
    with pytest.raises(UserError, match="/train/itself: Too many levels"):
        data.open_folder(root)


def test_what_is_ignored_is_said(tmp_path, capsys):
    root = make(tmp_path, {"train/a": 2, "train/b": 2, "val/a": 1, "train/.git": 1})
    for name in ("a/1.heic", "a/2.heic", "b/notes.txt", "a/._0.jpg", "of no class.JPG"):
        (tmp_path / "train" / name).write_bytes(b"")
    make(tmp_path, {"test/a": 3}, ".png")  # what is neither train/ nor val/
    data.main(data.get_args_parser().parse_args(["--data", root]))
    said = capsys.readouterr().err
    ignored = said.split(f"{root}: ignored ")[1].split("\n")[0].split(", ")
    assert ignored[:2] == ["3 .png", "2 .heic"] and sorted(ignored[2:]) == ["1 .JPG", "1 .jpg", "1 .txt"]
    assert "hidden folder .git ignored" in said


def test_classes_that_a_split_leaves_without_images_are_named(tmp_path):
    root = make(tmp_path, {f"c{i}": 1 for i in range(30)})
    train, val, classes, _, notes = data.open_folder(root)
    for part, name, here in ((train, "training", val), (val, "validation", train)):
        assert len(np.unique(part.labels)) + len(np.unique(here.labels)) == 30
        first = classes[min(set(range(30)) - set(part.labels.tolist()))]
        assert any(f"no {name} image of {first}" in n for n in notes), notes


def test_files_keep_any_name():
    names = ["ü/é.jpg", "a b/%.png", "日本/x.jpg", os.fsdecode(b"bad\xff/y.jpg"), "plain/z.jpg"]
    files = data.Files("/root", names, [3, 1, 4, 1, 5])
    assert [files.path(i) for i in range(5)] == [os.path.join("/root", n) for n in names]
    part = files.select(np.array([4, 0]))
    assert part.path(1) == "/root/ü/é.jpg" and part.labels.tolist() == [5, 3]


def test_real_folder_with_a_stray_file(shared):
    train, val, classes, _, _ = data.open_folder(os.path.join(shared, "hymenoptera"))
    assert classes == ["ants", "bees"] and len(train) in (244, 245) and len(val) == 153


# ------------------------------------------------------------------------------------- transforms, order, loaders

def arguments(*flags):
    parser = argparse.ArgumentParser()
    data.add_augment_args(parser)
    return parser.parse_args(flags)


@pytest.mark.parametrize("flags", [
    (), ("--hflip", "0"), ("--rotation", "30"), ("--elastic", "40"), ("--color-jitter", "0.4"),
    ("--auto-augment", "ra", "--ra-magnitude", "21", "--ra-std", "1.5"), ("--auto-augment", "ta_wide"),
    ("--random-erase", "1"), ("--rotation", "9", "--elastic", "9", "--random-erase", "1", "--crop-scale", "0.5")])
def test_train_transforms_give_uint8_and_follow_the_seed(flags):
    transform = data.train_transform(32, PREPROCESS, arguments(*flags))

    a, b, c = (transform(picture(size=(60, 45)), seed) for seed in (1, 1, 2))
    assert a.shape == (32, 32, 3) and a.dtype == torch.uint8 and torch.equal(a, b) and not torch.equal(a, c)


def test_augmentations_are_as_strong_as_the_flags_say(monkeypatch):
    from torchvision.transforms import v2
    seen, made = [], []
    monkeypatch.setattr(v2.RandAugment, "forward", lambda self, image: seen.append(self.magnitude) or image)
    randomly = data.train_transform(8, PREPROCESS, arguments("--auto-augment", "ra", "--ra-magnitude", "25",
                                                             "--ra-std", "4"))
    for seed in range(500):  # drawn anew for each image
        randomly(picture(size=(9, 9)), seed)
    assert max(seen) == 30 and 24 < np.mean(seen) < 25.5 and 3 < np.std(seen) < 4.2
    for name in ("RandomRotation", "ElasticTransform", "ColorJitter"):
        monkeypatch.setattr(v2, name, lambda *a, fill=None, **_: made.append((*a, fill)))
    flags = "--rotation", "9", "--elastic", "40", "--color-jitter", "0.4", "--crop-scale", "0.9", "--hflip", "1"
    transform, grey = data.train_transform(8, PREPROCESS, arguments(*flags)), [124, 116, 104]
    assert made == [(9, grey), (40, grey), (0.4, 0.4, 0.4, None)]
    boxes = transform.crops(np.full(99, 100), np.full(99, 100), np.arange(99, dtype=np.uint64))
    assert (boxes[:, 8] == 1).all() and (boxes[:, 2] * boxes[:, 3]).min() > 8800


def distance(a, b):
    """Of two samples, as Kolmogorov and Smirnov have it"""
    at = np.union1d(a, b)
    return np.abs(np.searchsorted(np.sort(a), at, "right") / len(a)
                  - np.searchsorted(np.sort(b), at, "right") / len(b)).max()


@pytest.mark.parametrize("scale", [0.08, 0.9])
@pytest.mark.parametrize("size", [(150, 100), (90, 400), (1, 7)])
def test_crops_are_distributed_as_torchvisions(size, scale):
    from torchvision.transforms import v2
    n, (h, w) = 4000, size
    torch.manual_seed(0)
    theirs, random = np.empty((n, 4)), v2.RandomResizedCrop(8, scale=(scale, 1.0))
    for row in theirs:
        made = random.make_params([torch.empty(3, h, w)])
        row[:] = [made[k] for k in ("top", "left", "height", "width")]
    seeds = np.array([data.seed_for(5, i) for i in range(n)], np.uint64)
    ours = data.random_crops(np.full(n, h), np.full(n, w), seeds, 8, scale, 0.25)
    assert ours.dtype == np.int64 and (ours[:, 4:8] == [8, 8, 0, 0]).all() and abs(ours[:, 8].mean() - 0.25) < 0.03
    assert (ours[:, :2] >= 0).all() and (ours[:, 2:4] >= 1).all() and (ours[:, :2] + ours[:, 2:4] <= size).all()
    sides = [lambda c: c[:, 0], lambda c: c[:, 1], lambda c: c[:, 2], lambda c: c[:, 3],
             lambda c: c[:, 2] * c[:, 3], lambda c: c[:, 2] / c[:, 3], lambda c: c[:, 0] + c[:, 2]]
    # 0.0436 is passed once in a thousand times
    assert max(distance(f(ours[:, :4].astype(float)), f(theirs)) for f in sides) < 0.0436
    room = np.array(size) - ours[:, 2:4]
    inside = ours[(room > 9).all(1), :2] / room[(room > 9).all(1)]
    if len(inside) > 400:  # four standard deviations of numbers that have nothing to do with one another
        assert abs(np.corrcoef(inside.T)[0, 1]) < 4 / len(inside) ** 0.5


def test_uniform_numbers_are_even_and_unrelated():
    numbers = data.uniform(np.arange(20000), 8)
    assert numbers.min() >= 0 and numbers.max() < 1 and np.abs(numbers.mean(0) - 0.5).max() < 0.01
    assert np.abs(np.corrcoef(numbers.T) - np.eye(8)).max() < 0.03
    assert np.abs(np.corrcoef(numbers[:-1, 0], numbers[1:, 0])[0, 1]) < 0.03
    # the generator's published first values for seed 1234567, whose upper 53 bits are the digits
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert data.uniform([1234567], 3)[0].tolist() == [(v >> 11) / 2 ** 53 for v in expected]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_pixels_are_torchvisions_resized_crop(interpolation):
    """Of the same box: equal to torchvision's of a tensor, and within one or two levels of its of a PIL image"""
    from torchvision.transforms import InterpolationMode, v2
    image, mode = picture(size=(150, 100)), InterpolationMode(interpolation)
    transform = data.train_transform(48, dict(PREPROCESS, interpolation=interpolation), arguments("--hflip", "0.5"))
    flips = 0
    for seed in range(20):
        crop, = transform.crops(np.array([100]), np.array([150]), np.array([seed], np.uint64))
        got, flip = transform(image, seed).permute(2, 0, 1), crop[8]
        tensor, pil = (v2.functional.resized_crop(x, *crop[:4].tolist(), [48, 48], mode, antialias=True)
                       for x in (v2.functional.pil_to_tensor(image), image))
        tensor, pil = (x.flip(2) if flip else x for x in (tensor, v2.functional.pil_to_tensor(pil)))
        assert torch.equal(got, tensor) and (got.int() - pil.int()).abs().max() <= 2
        flips += flip
    assert 3 < flips < 17


def test_random_erase_fills_with_the_mean():
    plain = data.train_transform(32, PREPROCESS, arguments("--hflip", "0", "--crop-scale", "1"))
    erased = data.train_transform(32, PREPROCESS, arguments("--hflip", "0", "--crop-scale", "1", "--random-erase", "1"))
    image = Image.new("RGB", (32, 32), (1, 2, 3))
    assert torch.equal(plain(image, 3).unique(dim=0), torch.tensor([[[1, 2, 3]] * 32], dtype=torch.uint8))
    colours = {tuple(c) for c in erased(image, 3).flatten(0, 1).tolist()}
    assert colours == {(1, 2, 3), (124, 116, 104)}


def test_rectangles_are_erased_as_torchvision_does_it():
    """Their sizes and places: quantiles within sampling error, and the share that is erased"""
    from torchvision.transforms import v2
    erase, n, size = v2.RandomErasing(0.3, value=0), 20000, 50
    torch.manual_seed(0)
    theirs = []
    for _ in range(n):
        black = erase(torch.ones(1, size, size))[0] == 0
        rows, columns = (black.any(d).nonzero()[:, 0].tolist() for d in (1, 0))
        theirs.append([rows[0], columns[0], len(rows), len(columns)] if rows else [0] * 4)
    theirs, ours = np.array(theirs), data.erasures(np.arange(n, dtype=np.uint64), size, 0.3)
    kept = [boxes[boxes[:, 2] > 0] for boxes in (theirs, ours)]
    assert abs(len(kept[0]) - len(kept[1])) < 4 * np.sqrt(2 * n * 0.3 * 0.7)
    assert (ours[:, :2] + ours[:, 2:] <= size).all()
    both = [np.column_stack([boxes, boxes[:, 2] * boxes[:, 3], boxes[:, 2] / boxes[:, 3]]) for boxes in kept]
    for a, b in zip(both[0].T, both[1].T):  # two-sample Kolmogorov-Smirnov, at one in 20,000
        assert distance(a, b) < 2.25 * np.sqrt(1 / len(a) + 1 / len(b))
    crops = data.random_crops(np.full(n, 90), np.full(n, 90), np.arange(n, dtype=np.uint64), size, 0.08, 0.5)
    free = kept[1][:, :2] / (size - kept[1][:, 2:])
    for pair in (crops[:, 0], ours[:, 0]), free.T:  # no number is used twice
        assert abs(np.corrcoef(*pair)[0, 1]) < 0.05


@pytest.mark.parametrize("size", [(91, 63), (63, 91), (40, 40), (33, 2000), (4, 3)])
@pytest.mark.parametrize("resize, crop", [(40, 32), (35, 35), (41, 32)])
def test_eval_transform_is_resize_and_centre_crop(size, resize, crop):
    from torchvision.transforms import InterpolationMode, v2
    image = picture(size=size)
    for mode in ("bilinear", "bicubic"):
        got = data.eval_transform(dict(PREPROCESS, resize=resize, crop=crop, interpolation=mode))(image)
        theirs = v2.Compose([v2.Resize(resize, InterpolationMode(mode), antialias=True), v2.CenterCrop(crop)])
        assert torch.equal(got.permute(2, 0, 1), theirs(v2.functional.pil_to_tensor(image)))
        assert np.abs(got.numpy().astype(int) - np.asarray(theirs(image))).max() <= 2
    with pytest.raises(UserError, match="resized to 31 pixels, and 32"):
        data.eval_transform(dict(PREPROCESS, resize=31, crop=32))


def keys_of(order, epoch=0, start=0):
    order.epoch, order.start = epoch, start
    batches = list(order)
    assert len(batches) == len(order)
    return batches


def test_order_uses_every_image_once_and_changes_with_epoch_and_seed():
    labels = np.zeros(103, dtype=np.int32)
    batches = keys_of(data.Order(labels, 10))
    used = [i for b in batches for _, i, _ in b]
    assert len(batches) == 10 and len(set(used)) == 100
    assert keys_of(data.Order(labels, 10)) == batches != keys_of(data.Order(labels, 10), epoch=1)
    assert batches != keys_of(data.Order(labels, 10, seed=1))
    assert {e for b in keys_of(data.Order(labels, 10), epoch=7) for e, _, _ in b} == {7}


@pytest.mark.parametrize("world, accumulate", [(1, 4), (2, 2), (4, 1), (2, 1)])
def test_a_step_uses_the_same_images_on_any_number_of_processes(world, accumulate):
    labels, per = np.zeros(100, dtype=np.int32), 24 // world // accumulate
    whole = [sorted(b) for b in keys_of(data.Order(labels, 24))]
    ranks = [keys_of(data.Order(labels, per, r, world, accumulate)) for r in range(world)]
    steps = [sorted(k for r in ranks for b in r[s * accumulate:(s + 1) * accumulate] for k in b)
             for s in range(len(ranks[0]) // accumulate)]
    assert steps == whole


@pytest.mark.parametrize("n, world", [(9999, 1), (9999, 4), (900, 1), (5, 1)])
def test_an_order_of_chunks_uses_neighbours_near_one_another(n, world):
    chunk, batch = 8, 4 if n > 5 else 5
    labels = np.zeros(n, np.int32)
    used, other = (np.stack([[i for b in keys_of(data.Order(labels, batch, r, world, chunk=chunk), epoch)
                              for _, i, _ in b] for r in range(world)], 1).reshape(-1) for epoch in (1, 2))
    assert len(np.unique(used)) == len(used) == n // (batch * world) * batch * world
    assert (used != other).any()
    if n < 9000:
        return
    slots = np.full(n, -1)
    slots[used] = np.arange(len(used))
    stretch, spread = data.MIXED * chunk, []
    for begin in range(0, n, chunk):
        places = np.sort(slots[begin:begin + chunk][slots[begin:begin + chunk] >= 0])
        # the shortest way around the epoch's end that has all of them
        spread.append(n - np.diff(np.append(places, places[0] + n)).max())
    assert max(spread) < 1.1 * stretch and np.mean(spread) > 0.7 * stretch * (chunk - 1) / (chunk + 1)
    assert abs(np.corrcoef(used, np.arange(len(used)))[0, 1]) < 0.15  # of a folder's classes, too, none comes first
    # any 256 in a row are of many chunks, at the beginning too
    assert min(len(np.unique(used[k:k + 256] // chunk)) for k in range(0, len(used) - 256, 256)) > 140


def test_batches_are_copied_to_a_gpu_one_ahead(monkeypatch):
    """What is asked of CUDA, in order: each copy on the second stream before the network gets the batch before it; the
    network's stream waits for the copy of its own batch alone, and the allocator knows that it uses the memory"""
    said, streams = [], []
    other = types.SimpleNamespace(record_event=lambda: said[-1].removeprefix("copy "))
    reader = types.SimpleNamespace(wait_event=lambda event: said.append(f"wait {event}"))

    class Batch:
        def __init__(self, name):
            self.name = name

        def to(self, device, non_blocking):
            assert non_blocking and streams == [other], "a copy on the network's own stream"
            said.append(f"copy {self.name}")
            return self

        def record_stream(self, stream):
            assert stream is reader
            said.append(f"keep {self.name}")

    @contextlib.contextmanager
    def on(stream):
        streams.append(stream)
        yield
        streams.pop()

    made = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: made.append(device) or other)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: reader)
    loader = data.Ahead([(Batch(f"{i}p"), Batch(f"{i}y"), [str(i)]) for i in range(3)], "cuda")
    for i, (pixels, labels, complaints) in enumerate(loader):
        assert (pixels.name, labels.name, complaints) == (f"{i}p", f"{i}y", [str(i)])
        said.append(f"use {i}")
    assert len(loader) == 3 and said == [
        "copy 0p", "copy 0y", "copy 1p", "copy 1y", "wait 0y", "keep 0p", "keep 0y", "use 0",
        "copy 2p", "copy 2y", "wait 1y", "keep 1p", "keep 1y", "use 1", "wait 2y", "keep 2p", "keep 2y", "use 2"]
    assert len(list(loader)) == 3 and made == ["cuda"]  # one stream for all epochs
    assert list(data.Ahead([], "cuda")) == []


@pytest.mark.cuda
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_on_a_gpu_are_those_of_the_cpu(tiny, workers):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    files = data.open_folder(tiny)[0]
    images = data.Images(files, lambda _: data.train_transform(64, PREPROCESS, arguments()), replace=True)
    order, busy = data.Order(files.labels, 8), torch.randn(2000, 2000, device="cuda")
    pairs = zip(data.make_loader(images, order, workers, "cuda"), data.make_loader(images, order, workers), strict=True)
    sums = []
    for (pixels, labels, _), (wanted, right, _) in pairs:
        assert pixels.is_cuda and pixels.is_contiguous(memory_format=torch.channels_last)
        for _ in range(20):
            busy = busy @ busy / 2000  # the stream is behind with its work
        sums.append(((pixels.double() * torch.arange(64, device="cuda")).sum(), labels.sum(),
                     (wanted.double() * torch.arange(64)).sum(), right.sum()))
    assert all(a.item() == c.item() and b.item() == d.item() for a, b, c, d in sums)


def test_order_resumes_by_arithmetic():
    labels = np.zeros(97, dtype=np.int32)
    for r in range(2):
        whole = keys_of(data.Order(labels, 5, r, 2, 2), epoch=3)
        assert keys_of(data.Order(labels, 5, r, 2, 2), epoch=3, start=40) == whole[4:]
    assert keys_of(data.Order(labels, 5, 0, 2, 2), epoch=3, start=80) == []


def test_order_with_fewer_images_than_a_batch():
    batches = keys_of(data.Order(np.zeros(7, dtype=np.int32), 16))
    assert len(batches) == 1 and sorted(collections.Counter(i for _, i, _ in batches[0]).values()) == [2] * 5 + [3] * 2
    assert len(set(batches[0])) == 16  # an image used again gets another augmentation


def test_repeated_augmentation():
    ranks = [keys_of(data.Order(np.zeros(120, dtype=np.int32), 10, r, 3, repeats=3)) for r in range(3)]
    keys = [k for batches in ranks for b in batches for k in b]
    counts = collections.Counter(i for _, i, _ in keys)
    assert len(keys) == 120 and len(counts) == 40 and set(counts.values()) == {3} and len(set(keys)) == 120
    # one process sees an image once per batch
    assert all(len({i for _, i, _ in b}) == 10 for batches in ranks for b in batches)


def test_balanced_sampling():
    labels = np.array([0] * 900 + [1] * 90 + [2] * 10, dtype=np.int32)
    keys = [k for b in keys_of(data.Order(labels, 100, balanced=True)) for k in b]
    counts = collections.Counter(labels[i] for _, i, _ in keys)
    assert all(270 < counts[c] < 400 for c in range(3)) and len(set(keys)) == len(keys) == 1000


@pytest.mark.parametrize("n, batch, world", [(29, 4, 1), (29, 4, 3), (2, 8, 4), (64, 8, 2)])
def test_evaluation_counts_every_image_once(n, batch, world):
    parts = [[k[1] for b in data.eval_batches(n, batch, r, world) for k in b] for r in range(world)]
    assert sorted(sum(parts, [])) == list(range(n))
    assert all(len(data.eval_batches(n, batch, r, world)) <= len(data.eval_batches(n, batch, 0, world))
               for r in range(world))


def batches_of(root, workers, flags, epoch=2):
    train = data.open_folder(root)[0]
    order = data.Order(train.labels, 8, seed=9)
    order.epoch = epoch
    images = data.Images(train, lambda e: data.train_transform(32, PREPROCESS, arguments(*flags)), seed=9, replace=True)
    return list(data.make_loader(images, order, workers))


@pytest.mark.parametrize("flags", [(), ("--auto-augment", "ta_wide")])  # by threads, by processes
def test_batches_do_not_depend_on_workers_nor_touch_the_generator(tiny, flags):
    torch.manual_seed(123)
    before = torch.get_rng_state()
    reference = batches_of(tiny, 0, flags)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(456)
    for workers in (1, 3):
        for (a, y, _), (b, z, _) in zip(reference, batches_of(tiny, workers, flags), strict=True):
            assert torch.equal(a, b) and torch.equal(y, z)
    assert not torch.equal(reference[0][0], batches_of(tiny, 0, flags, epoch=3)[0][0])
    pixels = reference[0][0]
    assert (pixels.dtype == torch.uint8 and pixels.shape == (8, 3, 32, 32)
            and pixels.is_contiguous(memory_format=torch.channels_last))


@pytest.mark.parametrize("flags", [(), ("--color-jitter", "0.4", "--hflip", "0", "--crop-scale", "1")])
def test_an_augmentation_is_of_one_seed_epoch_image_and_use(tiny, flags):
    files, made = data.open_folder(tiny)[0], {}
    for seed in (0, 1):
        images = data.Images(files, lambda _: data.train_transform(32, PREPROCESS, arguments(*flags)), seed)
        for epoch in (0, 1):
            keys = [(epoch, 3, 0), (epoch, 3, 1), (epoch, 4, 0)]
            for key, pixels in zip(keys, images.batch(keys)[0].permute(0, 2, 3, 1)):
                assert torch.equal(pixels, images[key][0])
                made[seed, *key] = pixels.numpy().tobytes()
    assert len(set(made.values())) == len(made) == 12


def test_a_worker_killed_while_it_hands_over_a_batch_is_named(tiny, monkeypatch):
    def broken(loader):
        yield from ()
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        raise EOFError

    def told(*_):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
    monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", broken)
    previous = signal.signal(signal.SIGALRM, told)  # in the place of SIGCHLD
    try:
        with pytest.raises(RuntimeError, match="DataLoader worker"):
            batches_of(tiny, 1, ("--auto-augment", "ta_wide"))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def test_too_little_shared_memory_ends_the_run(tiny):
    """And does not let it wait for a batch that is gone; what limits files limits those in /dev/shm"""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    args = train.get_args_parser().parse_args(["--device", "cpu", "--eval-only"])
    signal.alarm(120)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16384, limits[1]))
    try:
        with pytest.raises(UserError, match=r"a loader process failed \(unable to .*27\)\); if /dev/shm .*--workers 0"):
            train.run_processes(args, lambda world, stop: batches_of(tiny, 1, ("--auto-augment", "ta_wide")))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.alarm(0)


def test_damaged_files_are_reported_and_replaced_or_left_out(tmp_path):
    root = make(tmp_path, {"train/a": 6, "train/b": 6})
    bad = tmp_path / "train" / "a" / "3.jpg"
    bad.write_bytes(bad.read_bytes()[:200])
    files = data.scan(os.path.join(root, "train"), {"a": 0, "b": 1}, False)[0]
    at = next(i for i in range(len(files)) if files.path(i).endswith("a/3.jpg"))
    crop = lambda _: data.eval_transform(dict(PREPROCESS, resize=16, crop=16))  # noqa: E731
    pixels, label, complaint = data.Images(files, crop, replace=True)[(0, at, 0)]
    assert (pixels.shape == (16, 16, 3) and label == files.labels[at + 1]
            and "a/3.jpg" in complaint and "cut short" in complaint)
    assert data.Images(files, crop)[(0, at, 0)][:2] == (None, -1)
    loader = data.make_loader(data.Images(files, crop), data.eval_batches(len(files), 5), 1)
    seen = list(loader)
    assert sum(len(y) for _, y, _ in seen) == 11 and sum(len(c) for _, _, c in seen) == 1
    os.unlink(files.path(0))
    assert "No such file" in data.Images(files, crop)[(0, 0, 0)][2]


def test_mixing():
    """Of each image with the one before it, in the shares that its probabilities say: blended, or a rectangle of it"""
    x, y = torch.rand(8, 3, 16, 16), torch.arange(8)
    assert data.make_mixer(0, 0, 10) is None
    torch.manual_seed(1)
    kinds = []
    for alphas in ((1e6, 0), (0, 1e6), *[(0.2, 1.0)] * 20):
        mixed, target = data.make_mixer(*alphas, 10)(x, y)
        share, other = target[0, 0], x.roll(1, 0)
        assert torch.allclose(target, share * torch.eye(8, 10) + (1 - share) * torch.eye(8, 10).roll(1, 0))
        kinds.append(torch.allclose(mixed, share * x + (1 - share) * other, atol=1e-6))
        assert kinds[-1] or ((mixed == x) | (mixed == other)).all() and (mixed == x).float().mean() == share
        assert max(alphas) < 2 or (abs(share - 0.5) < 0.01 if kinds[-1] else 0.45 < share < 0.9)  # cut off at the edge
    assert kinds[:2] == [True, False] and set(kinds[2:]) == {True, False}


# ---------------------------------------------------------------------------------------- demo data, archives

def below(root):
    return sorted(os.path.relpath(os.path.join(d, f), root) for d, _, names in os.walk(root) for f in names)


def test_demo_is_deterministic_and_too_hard_for_a_linear_model(tmp_path):
    a, b = (data.make_demo(str(tmp_path / n), train=40, val=12) for n in "ab")
    files = below(a)
    assert len(files) == 520 and all(open(f"{a}/{f}", "rb").read() == open(f"{b}/{f}", "rb").read() for f in files)
    train, val, classes, _, _ = data.open_folder(a)
    assert classes == list(data.DEMO_CLASSES)

    def load(split):
        pixels = [np.asarray(data.decode(open(split.path(i), "rb").read()).resize((24, 24))) for i in range(len(split))]
        return torch.tensor(np.stack(pixels)).flatten(1) / 255 - 0.5, torch.tensor(split.labels).long()
    (x, y), (v, w) = load(train), load(val)
    weights = torch.linalg.solve(x.T @ x + 30 * torch.eye(x.shape[1]), x.T @ torch.nn.functional.one_hot(y).float())
    assert ((v @ weights).argmax(1) == w).float().mean() < 0.6


def test_demo_after_a_kill_and_where_it_cannot_be_written(tmp_path):
    left = tmp_path / f"demo.{os.getpid()}.tmp" / "train" / "checks"
    left.mkdir(parents=True)
    (left / "0009.jpg").write_bytes(b"")
    data.make_demo(str(tmp_path / "demo"), 2, 1)
    assert os.listdir(tmp_path) == ["demo"] and len(os.listdir(tmp_path / "demo" / "train" / "checks")) == 2
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="file/demo: not written .Not a directory"):
        data.make_demo(str(tmp_path / "file" / "demo"), 1, 1)


def tar(path, members, mode="w"):
    with tarfile.open(path, mode) as t:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            info.size = len(content)
            t.addfile(info, io.BytesIO(content))


@pytest.fixture
def archives(tmp_path):
    """ILSVRC2012 in small: two classes whose ILSVRC ids are not in the order of their wnids."""
    jpeg, inner = encode(picture(), "JPEG"), {"train/": b""}  # some have the folder as an entry
    for wnid in ("n01440764", "n02119789"):
        tar(tmp_path / "inner.tar", {f"{wnid}_{i}.JPEG": jpeg for i in (18, 7)})
        inner[f"train/{wnid}.tar"] = (tmp_path / "inner.tar").read_bytes()
    os.unlink(tmp_path / "inner.tar")
    tar(tmp_path / "ILSVRC2012_img_train.tar", inner)
    tar(tmp_path / "ILSVRC2012_img_val.tar", {f"ILSVRC2012_val_{i:08d}.JPEG": jpeg for i in (1, 2, 3)})
    return tmp_path


EXPECTED = ["train/n01440764/n01440764_18.JPEG", "train/n01440764/n01440764_7.JPEG",
            "train/n02119789/n02119789_18.JPEG", "train/n02119789/n02119789_7.JPEG",
            "val/n01440764/ILSVRC2012_val_00000001.JPEG", "val/n01440764/ILSVRC2012_val_00000003.JPEG",
            "val/n02119789/ILSVRC2012_val_00000002.JPEG"]


@pytest.mark.parametrize("compressed", [False, True])
def test_imagenet_with_the_devkit(archives, compressed):
    scipy = pytest.importorskip("scipy.io")
    synsets = np.zeros((2, 1), dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"),
                                      ("children", "O")])
    synsets[0, 0] = (1.0, "n02119789", "kit fox", "a small grey fox", np.zeros((1, 0)))
    synsets[1, 0] = (2.0, "n01440764", "tench", "freshwater dace-like game fish", np.array([[3.0, 400.5]]))

    def imported(out):
        mat = io.BytesIO()
        scipy.savemat(mat, {"synsets": synsets}, do_compression=compressed)
        tar(archives / "ILSVRC2012_devkit_t12.tar.gz", {"ILSVRC2012_devkit_t12/data/meta.mat": mat.getvalue(),
            "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": b"2\n1\n2\n"}, "w:gz")
        return data.import_imagenet(str(archives), str(archives / out))
    for _ in range(2):  # the second run finds everything there
        assert imported("out") == {"train": 4, "val": 3}
        assert below(archives / "out") == EXPECTED
    for number, wnid, said in ((2.0, "../../astray", "not a wnid"), (np.inf, "n01440764", "infinity")):
        synsets[1, 0] = (number, wnid, "tench", "freshwater dace-like game fish", np.zeros((1, 0)))
        with pytest.raises(UserError, match=f"unexpected archive .*{said}"):
            imported("new/out")
    assert not (archives / "new" / "astray").exists()


def test_an_import_that_was_killed_leaves_no_half_image(archives, monkeypatch):
    (archives / "labels").write_text("".join(
        f"ILSVRC2012_val_{i:08d}.JPEG {wnid}\n" for i, wnid in ((1, "n01440764"), (2, "n02119789"), (3, "n01440764"))))
    flags = str(archives), str(archives / "out"), str(archives / "labels")

    def killed(source, target):
        target.write(source.read(100))
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data.shutil, "copyfileobj", killed)
        data.import_imagenet(*flags)
    data.import_imagenet(*flags)
    assert below(archives / "out") == EXPECTED
    assert {(archives / "out" / name).read_bytes() for name in EXPECTED} == {encode(picture(), "JPEG")}


def test_two_imports_at_once(archives, monkeypatch):
    (archives / "labels").write_text("".join(f"ILSVRC2012_val_{i:08d}.JPEG n01440764\n" for i in (1, 2, 3)))
    flags = str(archives), str(archives / "out"), str(archives / "labels")

    def other(source, target, inner=data.shutil.copyfileobj):
        monkeypatch.undo()
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: 0)
            data.import_imagenet(*flags)
        inner(source, target)
    monkeypatch.setattr(data.shutil, "copyfileobj", other)
    assert data.import_imagenet(*flags) == {"train": 4, "val": 3} and len(list((archives / "out").rglob("*.*"))) == 7


@pytest.mark.parametrize("text", [
    "ILSVRC2012_val_00000001.JPEG n01440764\nILSVRC2012_val_00000002.JPEG n02119789\n"
    "ILSVRC2012_val_00000003.JPEG n01440764\n",
    "ImageId,PredictionString\nILSVRC2012_val_00000001,n01440764 85 1 499 272 n09999999 1 2 3 4\n"
    "ILSVRC2012_val_00000003,n01440764 1 1 2 2\nILSVRC2012_val_00000002,n02119789 1 1 2 2\n"])
def test_imagenet_with_a_label_file(archives, text):
    (archives / "labels").write_text(text)
    data.import_imagenet(str(archives), str(archives / "out"), str(archives / "labels"))
    assert below(archives / "out") == EXPECTED


def test_imagenet_mistakes(archives, run):
    done = run("--import-imagenet", archives, "--out", archives / "out", script="data.py")
    assert (done.returncode == 3 and "ILSVRC2012_devkit_t12.tar.gz: no such file" in done.stderr
            and done.stderr.count("\n") == 1)
    for flags, said in ((["--import-imagenet", archives], "needs --out"),
                        (["--import-imagenet", archives, "--out", "x", "--val-split", 0.1], "no --val-split with it")):
        with pytest.raises(UserError, match=said) as caught:
            data.main(data.get_args_parser().parse_args([str(f) for f in flags]))
        assert caught.value.code == 2
    deep = b""  # cells in cells
    for _ in range(2000):
        deep = struct.pack("<12I", 14, 40 + len(deep), 6, 8, 1, 0, 5, 8, 1, 1, 1, 0) + deep
    for content in (b"", b"no matrices, but bytes enough for a header" * 9, bytes(128) + deep):
        tar(archives / "ILSVRC2012_devkit_t12.tar.gz", {"kit/data/meta.mat": content,
            "kit/data/ILSVRC2012_validation_ground_truth.txt": b"1\n"}, "w:gz")
        with pytest.raises(UserError, match="unexpected archive"):
            data.import_imagenet(str(archives), str(archives / "out"))
    (archives / "labels").write_text("ILSVRC2012_val_00000001.JPEG n01440764\n")
    with pytest.raises(UserError, match="no label for ILSVRC2012_val_00000002.JPEG"):
        data.import_imagenet(str(archives), str(archives / "out"), str(archives / "labels"))
    content = (archives / "ILSVRC2012_img_train.tar").read_bytes()
    second = content.index(b"train/n02119789.tar")
    for damaged in (content[:len(content) // 2], content[:second], content[:second + 100],
                    content[:second] + b"?" + content[second + 1:]):  # tarfile takes the last three for the end
        (archives / "ILSVRC2012_img_train.tar").write_bytes(damaged)
        with pytest.raises(UserError, match="damaged"):
            data.import_imagenet(str(archives), str(archives / "out2"), str(archives / "labels"))


def test_a_named_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "0.jpg")
    assert data.read(str(tmp_path / "0.jpg")) == b""
    assert data.Files(str(tmp_path), ["0.jpg"], [0]).content(np.array([0]))[2].tolist() == [[0, 0]]
