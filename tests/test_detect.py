"""finetune.py --task detect: annotations of every layout and every fault in them, the parts against plain loops and
pycocotools, the run stopped and resumed."""
import contextlib
import io
import itertools
import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import data
import finetune
import train
from resnet50 import ResNet50, UserError, load_checkpoint, load_model, save_checkpoint
from tests.conftest import equal_state
from tests.test_finetune import WIDTHS, interrupted, new_network

CLASSES = ["bar", "disk"]


def scene(seed):
    """PIL image 60 to 110 pixels wide with one to three shapes -> image, [(class, x1, y1, x2, y2)]"""
    rng = np.random.default_rng(seed)
    width, height = (int(v) for v in rng.integers(60, 110, 2))
    image, boxes = Image.new("RGB", (width, height), tuple(int(c) for c in rng.integers(0, 80, 3))), []
    for _ in range(int(rng.integers(1, 4))):
        name, (w, h) = CLASSES[int(rng.integers(2))], rng.integers(14, 40, 2)
        x, y = int(rng.integers(0, width - w)), int(rng.integers(0, height - h))
        colour = tuple(int(c) for c in rng.integers(140, 255, 3))
        pen = ImageDraw.Draw(image)
        (pen.ellipse if name == "disk" else pen.rectangle)((x, y, x + int(w) - 1, y + int(h) - 1), fill=colour)
        boxes.append((name, x, y, x + int(w), y + int(h)))
    return image, boxes


def voc(filename, boxes, extra=""):
    items = "".join(f"<object><name>{n}</name><difficult>{more[0] if more else 0}</difficult><bndbox>"
                    f"<xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
                    for n, x1, y1, x2, y2, *more in boxes)
    return f"<annotation><path>/elsewhere/{filename}</path><filename>{filename}</filename>{items}{extra}</annotation>"


def scenes(split, count):
    return {f"{split}{i}.jpg": scene([split == "val", i]) for i in range(count)}


NARROW = "import finetune\nfinetune.Pyramid.out_channels, finetune.PROPOSALS = 16, 32\n"  # a step in half a second


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setattr(finetune.Pyramid, "out_channels", 16)
    monkeypatch.setattr(finetune, "PROPOSALS", 32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """12 training and 5 validation images as raccoon's layout has them"""
    root = tmp_path_factory.mktemp("detect") / "voc"
    for split, count in (("train", 12), ("val", 5)):
        for sub in ("images", "annotations"):
            (root / split / sub).mkdir(parents=True)
        for name, (image, boxes) in scenes(split, count).items():
            image.save(root / split / "images" / name, quality=95)
            (root / split / "annotations" / name.replace("jpg", "xml")).write_text(voc(name, boxes))
    return str(root)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("source") / "source.pt")
    save_checkpoint(path, new_network(widths=WIDTHS), classes=list("abcde"))
    return path


def parse(*flags):
    return finetune.get_args_parser().parse_args(["--task", "detect", *(str(f) for f in flags)])


@pytest.fixture
def tune(folder, source, tmp_path):
    def call(*flags, out="run", root=folder):
        return finetune.main(parse("--data", root, "--checkpoint", source, "--out", tmp_path / out, "--workers", 0,
                                   "--image-size", 64, "--batch-size", 3, "--amp-dtype", "float32", *flags))
    return call


def opened(root, *flags):
    return finetune.open_boxes(str(root), parse("--data", root, *flags))


# ------------------------------------------------------------------------------------------------------- annotations

def standard_voc(root):
    for sub in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / sub).mkdir(parents=True)
    for split, count in (("train", 12), ("val", 5)):
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(f"{split}{i}  1" for i in range(count)))
        for name, (image, boxes) in scenes(split, count).items():
            image.save(root / "JPEGImages" / name, quality=95)
            (root / "Annotations" / name.replace("jpg", "xml")).write_text(voc(name, boxes))


def coco_content(split, count):
    images, notes = [], []
    for i, (name, (image, boxes)) in enumerate(scenes(split, count).items()):
        images.append(dict(id=70 + i, file_name=name, width=image.width, height=image.height))
        notes += [dict(id=len(notes) + k, image_id=70 + i, category_id=9 * (1 + CLASSES.index(n)), iscrowd=0,
                       bbox=[x1, y1, x2 - x1, y2 - y1]) for k, (n, x1, y1, x2, y2) in enumerate(boxes)]
    return dict(images=images, annotations=notes, categories=[dict(id=18, name="disk"), dict(id=9, name="bar"),
                                                             dict(id=3, name="never")])


def coco(root):
    (root / "annotations").mkdir(parents=True)
    for split, count in (("train", 12), ("val", 5)):
        (root / f"{split}2017").mkdir()
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(coco_content(split, count)))
        for name, (image, _) in scenes(split, count).items():
            image.save(root / f"{split}2017" / name, quality=95)


def roboflow(root):
    for split, name in (("train", "train"), ("val", "valid")):
        (root / name).mkdir(parents=True)
        count = 12 if split == "train" else 5
        (root / name / "_annotations.coco.json").write_text(json.dumps(coco_content(split, count)))
        for file, (image, _) in scenes(split, count).items():
            image.save(root / name / file, quality=95)


@pytest.mark.parametrize("layout", ["split", standard_voc, coco, roboflow])
def test_every_layout_gives_the_same_boxes(layout, folder, tmp_path):
    root = folder
    if layout != "split":
        root = str(tmp_path / "set")
        layout(tmp_path / "set")
    files, val, classes, known, notes = opened(root)
    assert classes == CLASSES and (len(files), len(val)) == (12, 5)
    for split, part in (("train", files), ("val", val)):
        expected = scenes(split, 12 if split == "train" else 5)
        assert {os.path.basename(part.path(i)) for i in range(len(part))} == set(expected)
        for i in range(len(part)):
            _, boxes = expected[os.path.basename(part.path(i))]
            mine = known[part.path(i)]
            assert mine.boxes.tolist() == [list(map(float, b[1:])) for b in boxes]
            assert mine.labels.tolist() == [1 + CLASSES.index(b[0]) for b in boxes]
            assert mine.areas.tolist() == [(b[3] - b[1]) * (b[4] - b[2]) for b in boxes]
            assert not mine.crowd.any() and not mine.ignored.any()
    assert any(n.startswith("train: 12 images") for n in notes)


def test_without_a_validation_set_a_hash_of_the_names_makes_one(folder, tmp_path):
    root = tmp_path / "one"
    shutil.copytree(os.path.join(folder, "train"), root / "train")
    files, val, _, _, notes = opened(root, "--val-split", 0.4)
    assert len(files) + len(val) == 12 and len(val) and any("held out by a hash" in n for n in notes)
    with pytest.raises(UserError, match="has a validation set of its own") as caught:
        opened(folder, "--val-split", 0.4)
    assert caught.value.code == 2
    with pytest.raises(UserError, match="--val-split 0.0: must lie between 0 and 1"):
        opened(root, "--val-split", 0)


@pytest.mark.parametrize("fault, complaint", [
    ("missing image", "train3.xml: its image gone.jpg is not in"), ("no xml", "train3.xml: "),
    ("no box", "train3.xml: an object without bndbox/xmin"), ("no name", "train3.xml: an object without name"),
    ("no encoding", "train3.xml: unknown encoding"), ("not a number", "train3.xml: "),
    ("not an image", "train3.jpg: ")])
def test_a_bad_annotation_is_named_or_left_out(fault, complaint, folder, tmp_path):
    root = shutil.copytree(folder, tmp_path / "bad")
    note, image = root / "train" / "annotations" / "train3.xml", root / "train" / "images" / "train3.jpg"
    if fault == "missing image":
        image.unlink()
        note.write_text(voc("gone.jpg", [("disk", 1, 1, 9, 9)]))
    elif fault == "no xml":
        note.write_text("<annotation><object>")
    elif fault == "no box":
        note.write_text(voc("train3.jpg", [], "<object><name>disk</name></object>"))
    elif fault == "no name":
        note.write_text(voc("train3.jpg", [("", 1, 1, 9, 9)]))
    elif fault == "no encoding":
        note.write_text('<?xml version="1.0" encoding="none-such"?>' + voc("train3.jpg", [("disk", 1, 1, 9, 9)]))
    elif fault == "not a number":
        note.write_text(voc("train3.jpg", [("disk", 1, 1, 9, 9)]).replace(">2<", ">two<", 1))
    else:
        image.write_bytes(b"no image")
    with pytest.raises(UserError) as caught:
        opened(root)
    assert complaint in str(caught.value) and caught.value.code == 3
    files, _, _, _, notes = opened(root, "--on-corrupt", "skip")
    assert len(files) == 11 and any("left out" in n and "train3" in n for n in notes)


def test_a_validation_image_is_left_out_of_training(folder, tmp_path):
    root = shutil.copytree(folder, tmp_path / "twice")
    shutil.copy(root / "val" / "images" / "val2.jpg", root / "train" / "images" / "train5.jpg")
    files, val, _, _, notes = opened(root)
    assert (len(files), len(val)) == (11, 5) and any("train5.jpg is" in n and "val2.jpg" in n for n in notes)


def test_odd_boxes(folder, tmp_path):
    root = shutil.copytree(folder, tmp_path / "odd")
    note = root / "train" / "annotations" / "train0.xml"
    image = scene([False, 0])[0]
    note.write_text(voc("other/name.jpg".replace("other/", ""), [
        ("disk", 5, 5, 5, 20), ("disk", 30, 30, 20, 40), ("bar", 500, 500, 600, 600), ("bar", -20, -20, 10, 12),
        ("disk", 2, 3, 20, 30, 1)]))
    files, _, _, known, notes = opened(root)
    mine = next(v for k, v in known.items() if k.endswith("train0.jpg"))  # found under the xml's own name
    assert mine.boxes.tolist() == [[0, 0, 10, 12], [2, 3, 20, 30]] and mine.ignored.tolist() == [False, True]
    assert any(n.startswith("3 boxes without an area") and "train0.jpg" in n for n in notes) and image.width > 20
    assert any(n.startswith("1 images have boxes that lie outside") for n in notes)
    note.write_text(voc("train0.jpg", []))  # an image of nothing but background
    assert len(opened(root)[0]) == 12
    (root / "val" / "annotations" / "val0.xml").write_text(voc("val0.jpg", [("cat", 1, 1, 9, 9)]))
    with pytest.raises(UserError, match="val0.jpg: class cat is not among the training set's: bar, disk"):
        opened(root)


@pytest.mark.parametrize("layout", ["split", "roboflow"])
def test_images_of_another_size_than_was_annotated_are_named(layout, folder, tmp_path):
    """Made smaller since, or shown turned by their tag to whoever drew the boxes: these lie elsewhere, if inside"""
    root = tmp_path / "set"
    if layout == "split":
        shutil.copytree(folder, root)
        for i, text in enumerate(("<width>9</width><height>8</height>", "<width>0</width><height>0</height>", "")):
            boxes = scene([False, i])[1]
            (root / "train" / "annotations" / f"train{i}.xml").write_text(
                voc(f"train{i}.jpg", boxes, f"<size>{text}</size>"))
    else:
        roboflow(root)
        content = coco_content("train", 12)
        content["images"][0].update(width=content["images"][0]["height"], height=content["images"][0]["width"])
        content["images"][1].update(width=0, height=0)
        del content["images"][2]["width"]
        (root / "train" / "_annotations.coco.json").write_text(json.dumps(content))
    said = [n for n in opened(root)[4] if "another size" in n]
    assert len(said) == 1 and said[0].startswith("1 images ") and said[0].endswith("train0.jpg")


@pytest.mark.parametrize("change, complaint", [
    (lambda c: "{", "JSONDecodeError"), (lambda c: json.dumps({"images": []}), "categories"),
    (lambda c: json.dumps(dict(c, annotations=c["annotations"] + [dict(image_id=1, category_id=9, bbox=[0] * 4)])),
     "KeyError: 1"),
    (lambda c: json.dumps(dict(c, categories=[*c["categories"], dict(id=9, name="box")])),
     "two categories have the id 9"),
    (lambda c: json.dumps(dict(c, annotations=c["annotations"] + [dict(image_id=70, category_id=9, bbox=[0])])),
     "ValueError"),
    (lambda c: json.dumps(dict(c, images=c["images"] + [dict(id=1, file_name="gone.jpg")])), "gone.jpg is not in")])
def test_bad_coco_files(change, complaint, tmp_path):
    roboflow(tmp_path / "set")
    path = tmp_path / "set" / "train" / "_annotations.coco.json"
    path.write_text(change(coco_content("train", 12)))
    with pytest.raises(UserError, match="_annotations.coco.json") as caught:
        opened(tmp_path / "set")
    assert complaint in str(caught.value)
    if complaint[0] in "KgV":  # one annotation or image: the rest can be used
        files, _, _, _, notes = opened(tmp_path / "set", "--on-corrupt", "skip")
        assert len(files) == 12 and any("left out" in n and complaint in n for n in notes)


def test_coco_s_own_areas_and_crowds(tmp_path):
    roboflow(tmp_path / "set")
    content = coco_content("train", 12)
    content["annotations"][0].update(area=7.5, iscrowd=1)
    (tmp_path / "set" / "train" / "_annotations.coco.json").write_text(json.dumps(content))
    files, _, _, known, _ = opened(tmp_path / "set")
    mine = known[files.path(0)]
    assert mine.areas[0] == 7.5 and mine.crowd.tolist() == [True] + [False] * (len(mine.labels) - 1)


def test_coco_s_file_names_may_go_around(tmp_path):
    roboflow(tmp_path / "set")
    (tmp_path / "set" / "pictures").mkdir()
    content = coco_content("train", 12)
    for i, image in enumerate(content["images"]):
        name = image["file_name"]
        image["file_name"] = f"./{name}" if i % 2 else f"../pictures//{name}"
        if not i % 2:
            (tmp_path / "set" / "train" / name).rename(tmp_path / "set" / "pictures" / name)
    (tmp_path / "set" / "train" / "_annotations.coco.json").write_text(json.dumps(content))
    files, _, _, known, _ = opened(tmp_path / "set")
    assert len(files) == 12
    for i in range(12):
        boxes = scene([False, int(os.path.basename(files.path(i))[5:-4])])[1]
        assert known[files.path(i)].boxes.tolist() == [list(map(float, b[1:])) for b in boxes]


def test_pairs_that_were_renamed_stay_pairs(folder, tmp_path):
    """Numbered anew together, while the xml still has the old name, which is now another image's; of two images with an
    annotation's name it says which"""
    root = shutil.copytree(folder, tmp_path / "set")
    for sub, end in (("annotations", "xml"), ("images", "jpg")):
        paths = [root / "train" / sub / f"{name}.{end}" for name in ("train0", "train1", "spare")]
        for old, new in ((0, 2), (1, 0), (2, 1)):
            paths[old].rename(paths[new])
    scene([False, 7])[0].save(root / "train" / "images" / "train2.png")
    (root / "train" / "annotations" / "train2.xml").write_text(voc("train2.png", scene([False, 7])[1]))
    files, _, _, known, _ = opened(root)
    for name, seed in (("train0.jpg", 1), ("train1.jpg", 0), ("train2.png", 7)):
        boxes = next(b for path, b in known.items() if path.endswith(name)).boxes.tolist()
        assert boxes == [list(b[1:]) for b in scene([False, seed])[1]]


@pytest.mark.parametrize("layout", ["split", "roboflow"])
def test_an_image_of_two_annotations_is_named_or_has_the_first(layout, folder, tmp_path):
    """A file name copied along with its xml, or sets put together: the boxes of one of them would be lost"""
    root = tmp_path / "set"
    if layout == "split":
        shutil.copytree(folder, root)
        (root / "train" / "annotations" / "train5 (copy).xml").write_text(voc("train5.jpg", [("disk", 1, 1, 9, 9)]))
        complaint = "train5.xml: its image .*train5.jpg is that of .*train5 .copy..xml too"
    else:
        roboflow(root)
        content = coco_content("train", 12)
        content["images"].append(dict(id=1, file_name="./train5.jpg"))
        content["annotations"].append(dict(id=1, image_id=1, category_id=9, bbox=[1, 1, 8, 8]))
        (root / "train" / "_annotations.coco.json").write_text(json.dumps(content))
        complaint = "_annotations.coco.json: image 1: its image .*train5.jpg is that of image 75 too"
    with pytest.raises(UserError, match=complaint):
        opened(root)
    files, _, _, known, notes = opened(root, "--on-corrupt", "skip")
    assert len(files) == 12 and len({files.path(i) for i in range(12)}) == 12
    assert any(n.startswith("1 train annotations are left out") for n in notes)
    boxes = next(b for path, b in known.items() if path.endswith("train5.jpg")).boxes.tolist()
    assert boxes == ([[1, 1, 9, 9]] if layout == "split" else [list(b[1:]) for b in scene([False, 5])[1]])


def test_images_that_share_a_number_are_refused(tmp_path):
    """Each would have the other's boxes too"""
    roboflow(tmp_path / "set")
    content = coco_content("train", 12)
    for note in content["annotations"]:
        note["image_id"] -= note["image_id"] == 73
    content["images"][3]["id"] = 72
    (tmp_path / "set" / "train" / "_annotations.coco.json").write_text(json.dumps(content))
    for flags in ((), ("--on-corrupt", "skip")):
        with pytest.raises(UserError, match="_annotations.coco.json: not COCO annotations .*two images have the id 72"):
            opened(tmp_path / "set", *flags)


def test_names_with_blanks_in_a_list(tmp_path):
    root = tmp_path / "set"
    standard_voc(root)
    for sub, end in (("Annotations", ".xml"), ("JPEGImages", ".jpg")):
        (root / sub / f"train3{end}").rename(root / sub / f"my picture{end}")
    names = root / "ImageSets" / "Main" / "train.txt"
    names.write_text(names.read_text().replace("train3  1", "my picture\nmy picture"))  # twice is once
    files = opened(root)[0]
    assert len(files) == 12 and any(files.path(i).endswith("my picture.jpg") for i in range(12))


def test_lists_and_annotations_as_other_systems_write_them(tmp_path):
    """With a mark of the byte order, as on Windows; names whose bytes are no UTF-8; macOS's files beside the files"""
    root = tmp_path / "set"
    standard_voc(root)
    for sub, end in (("Annotations", ".xml"), ("JPEGImages", ".jpg")):
        os.rename(root / sub / f"train3{end}", os.path.join(os.fsencode(root / sub), b"gr\xfcn" + end.encode()))
    names = root / "ImageSets" / "Main" / "train.txt"
    names.write_bytes(b"\xef\xbb\xbf" + names.read_bytes().replace(b"train3  1", b"gr\xfcn"))
    files = opened(root)[0]
    assert len(files) == 12 and any(files.path(i).endswith(os.fsdecode(b"gr\xfcn.jpg")) for i in range(12))
    shutil.rmtree(root / "ImageSets")
    (root / "Annotations" / "._train0.xml").write_bytes(b"\0\5\x16\7")
    assert sum(map(len, opened(root)[:2])) == 17
    roboflow(tmp_path / "coco")
    path = tmp_path / "coco" / "train" / "_annotations.coco.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(opened(tmp_path / "coco")[0]) == 12


def test_folders_of_two_names_are_read_once(folder, tmp_path):
    """As by systems to which Annotations and annotations are the same"""
    root = shutil.copytree(folder, tmp_path / "set")
    for old, new in (("annotations", "Annotations"), ("images", "JPEGImages")):
        os.symlink(old, root / "train" / new)
    assert len(opened(root)[0]) == 12


def test_a_second_file_of_annotations_is_not_passed_over(tmp_path):
    root = tmp_path / "set"
    coco(root)
    (root / "annotations" / "instances_train2014.json").write_text(json.dumps(coco_content("train", 3)))
    shutil.copytree(root / "train2017", root / "train2014")
    with pytest.raises(UserError, match="instances_train2017.json: not read, as instances_train2014.json is"):
        opened(root)
    assert len(opened(root, "--on-corrupt", "skip")[0]) == 3
    assert finetune.annotations(str(root), True).keys() == {"val"}  # to score takes neither
    os.unlink(root / "annotations" / "instances_train2014.json")
    assert len(opened(root)[0]) == 12


def test_classes_that_are_numbers(tmp_path):
    """One of them missing, as tools write what has no name"""
    roboflow(tmp_path / "set")
    for split, count in (("train", 12), ("valid", 5)):
        content = coco_content(split[:5].replace("valid", "val"), count)
        content["categories"] = [dict(id=18, name=7), dict(id=9, name=None)]
        (tmp_path / "set" / split / "_annotations.coco.json").write_text(json.dumps(content))
    assert opened(tmp_path / "set")[2] == ["7", "None"]


def test_what_is_too_thin_for_float32_is_left_out(tmp_path):
    """Tools that cut boxes leave such: a loss of it, and a ratio of anchors, would not be finite"""
    roboflow(tmp_path / "set")
    content = coco_content("train", 12)
    content["annotations"] += [dict(id=900 + i, image_id=70 + i, category_id=9, bbox=[40.3, 20.1, width, 20.0])
                               for i, width in enumerate((1.4e-14, 1e-7, 1e-5))]
    (tmp_path / "set" / "train" / "_annotations.coco.json").write_text(json.dumps(content))
    files, _, _, known, notes = opened(tmp_path / "set")
    assert any(n.startswith("3 boxes without an area") for n in notes)
    images = finetune.BoxImages(files, known, parse("--data", "x", "--image-size", 64), replace=True)
    for i in range(len(files)):
        _, rows, _ = images[(0, i, 0)]
        assert (rows[1:, 2:4] > rows[1:, :2]).all()


@pytest.mark.parametrize("split, change", [("train", dict(bbox=[1, 1, 0, 5])), ("val", dict(iscrowd=1))])
def test_annotations_without_a_box_to_find_are_refused_at_once(split, change, tmp_path):
    roboflow(tmp_path / "set")
    content = coco_content(split, 12 if split == "train" else 5)
    for note in content["annotations"]:
        note.update(change)
    name = "train" if split == "train" else "valid"
    (tmp_path / "set" / name / "_annotations.coco.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"no box in the {split} annotations") as caught:
        opened(tmp_path / "set")
    assert caught.value.code == 3
    for path in (tmp_path / "set" / name).glob("*.jpg"):
        path.write_bytes(b"damaged")
    if split == "val":  # of which nothing is left to score
        with pytest.raises(UserError, match="no box in the val annotations"):
            finetune.open_boxes(str(tmp_path / "set"), parse("--eval-only", "--on-corrupt", "skip"), CLASSES)


def test_no_annotations(tiny, tmp_path):
    for root, complaint in ((tiny, "no annotations"), (tmp_path / "none", "no such folder")):
        with pytest.raises(UserError, match=complaint):
            opened(root)


# ------------------------------------------------------------------------------------------------------------ the parts

def test_anchors_follow_the_boxes(folder):
    files, _, _, known, _ = opened(folder)
    sizes, ratios = finetune.anchors_of(files, known, 64, 640)
    extents, shapes = [], []
    for i in range(len(files)):
        with Image.open(files.path(i)) as image:
            scale = 64 / min(image.size)
        for x1, y1, x2, y2 in known[files.path(i)].boxes:
            extents.append(scale * ((x2 - x1) * (y2 - y1)) ** 0.5)
            shapes.append((y2 - y1) / (x2 - x1))
    assert sizes[2] == pytest.approx(np.median(extents), abs=0.06)
    assert ratios == pytest.approx(np.quantile(shapes, (0.15, 0.5, 0.85)), abs=1e-3)  # of which the median is 1
    assert all(b >= 1.24 * a for a, b in zip(sizes, sizes[1:])) and ratios[0] < ratios[1] < ratios[2]


def test_boxes_follow_the_image(folder):
    """The shapes are drawn: what the scaled, flipped boxes cover is bright, a margin around them is not the same"""
    files, _, _, known, _ = opened(folder)
    images = finetune.BoxImages(files, known, parse("--data", folder, "--image-size", 80), replace=True)
    flips = 0
    for i, epoch in itertools.product(range(len(files)), range(3)):
        pixels, rows, complaint = images[(epoch, i, 0)]
        again = images[(epoch, i, 0)]
        assert torch.equal(pixels, again[0]) and torch.equal(rows, again[1]) and complaint is None
        height, width, h0, w0, index = rows[0].tolist()
        assert pixels.shape == (height, width, 3) and index == i and 0.79 <= min(height, width) / 80 <= 1.26
        with Image.open(files.path(i)) as image:
            assert (w0, h0) == image.size
        boxes = known[files.path(i)].boxes
        assert len(rows) == 1 + len(boxes) and (rows[1:, 4].numpy() == known[files.path(i)].labels).all()
        straight = boxes * [width / w0, height / h0, width / w0, height / h0]
        flipped = np.stack([width - straight[:, 2], straight[:, 1], width - straight[:, 0], straight[:, 3]], 1)
        mirrored = not np.allclose(rows[1:, :4], straight, atol=1e-3)
        flips += mirrored
        assert np.allclose(rows[1:, :4], flipped if mirrored else straight, atol=1e-3)
        for x1, y1, x2, y2, _ in rows[1:].tolist():
            centre = pixels[int((y1 + y2) / 2), int((x1 + x2) / 2)].float()
            assert centre.max() > 120  # a shape; the background is below 80
    assert 6 < flips < 30
    assert finetune.scale_of(100, 50, 40, 120) == 0.8 and finetune.scale_of(50, 100, 80, 120) == 1.2  # the long side's
    batch, rows, _ = images.collate([images[(0, i, 0)] for i in (0, 1, 2)])
    assert batch.shape[2] % 32 == batch.shape[3] % 32 == 0 and rows.shape[0] == 3


def test_training_goes_without_the_boxes_that_are_neither_right_nor_wrong(folder):
    files, _, _, known, _ = opened(folder)
    i = next(i for i in range(len(files)) if len(known[files.path(i)].boxes) == 3)
    boxes = known[files.path(i)]
    known[files.path(i)] = boxes._replace(crowd=np.array([True, False, False]), ignored=np.array([False, True, False]))
    for training, labels in ((True, boxes.labels[2:]), (False, boxes.labels)):
        images = finetune.BoxImages(files, known, parse("--data", folder, "--image-size", 64), training)
        assert images[(0, i, 0)][1][1:, 4].tolist() == labels.tolist()


def test_boxes_are_found_in_the_original_image(folder):
    _, val, _, known, _ = opened(folder)
    images = finetune.BoxImages(val, known, parse("--data", folder, "--image-size", 40), replace=False)

    class Knows(torch.nn.Module):
        preprocess, config = dict(mean=[0.5] * 3, std=[0.5] * 3), dict(num_classes=2)

        def forward(self, x, rows):
            height, width, h, w, index = rows[0, 0].tolist()
            truth = known[val.path(int(index))]
            return [dict(boxes=torch.tensor(truth.boxes * np.array([width / w, height / h] * 2)),
                         labels=torch.tensor(truth.labels), scores=torch.linspace(0.2, 0.9, len(truth.labels)))]
    score, found = finetune.find_boxes(Knows(), images, 2, train.World())
    assert score["map"] == 100 and all(np.allclose(found[i][0], known[val.path(i)].boxes) for i in range(len(val)))


def test_drawn_boxes_are_those_of_the_threshold_with_their_classes():
    none, image = np.zeros((0, 4)), Image.new("RGB", (200, 100))
    truth = finetune.Boxes(np.array([[10.0, 20, 60, 80]]), *[np.zeros(1, int)] * 4)
    found = np.array([[100.0, 20, 150, 80], [160.0, 20, 190, 80]]), np.array([1, 2]), np.array([0.6, 0.4])
    bar, other = (np.asarray(finetune.draw_boxes(image, found, truth, names, 0.5))
                  for names in (["bar", "x"], ["disk", "x"]))
    assert bar[40, 10].tolist() == [40, 200, 60] and bar[40, 100].tolist() == [230, 40, 40] and not bar[:, 160:].any()
    assert (bar != other).any()
    empty = finetune.draw_boxes(image, (none, none, none), truth, [], 0.5)
    assert not np.asarray(empty)[:, 70:].any() and not np.asarray(image).any()


def test_new_parts_of_a_detector_learn_faster(source, folder):
    args = parse("--data", folder, "--checkpoint", source, "--image-size", 64, "--head-lr-mult", 7)
    model = finetune.load_source(args)[0]
    model.preprocess["mean"] = [0.1, 0.2, 0.3]
    plan = finetune.Detection(args, train.World(), model, opened(folder))
    detector = plan.model(args, CLASSES)
    for name, _ in detector.named_parameters():
        assert plan.share(name) == (1 if name.startswith("backbone.body") else 7), name
    assert detector.preprocess["mean"] == [0.1, 0.2, 0.3]  # as the backbone was trained


def test_the_backbone_carries_the_weights_over_and_sees_what_it_did(source, folder):
    args = parse("--data", folder, "--checkpoint", source, "--image-size", 64)
    model, _, _ = finetune.load_source(args)
    torch.nn.init.constant_(model.bn1.bias, -1.0)  # so that the first ReLU has something to do
    model.config["drop_path"] = 0.5  # of its own training
    detector = finetune.Detection(args, train.World(), model, opened(folder)).model(args, CLASSES)
    body, x = detector.backbone.body, torch.randn(2, 3, 64, 96)
    for key, value in model.state_dict().items():
        assert key.startswith("fc.") or torch.equal(value, body.state_dict()[key])
    seen = []
    model.layer3[-1].register_forward_hook(lambda m, i, o: seen.append(o))
    model.layer4[-1].register_forward_hook(lambda m, i, o: seen.append(o))
    inputs = []
    detector.backbone.fpn.register_forward_pre_hook(lambda m, i: inputs.append(i[0]))
    detector.train()
    with torch.no_grad():
        model(x)
        detector.backbone(x)
    for mine, theirs in zip(seen, (inputs[0]["2"], inputs[0]["3"]), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)
    trained = {n.split(".")[2] for n, p in detector.named_parameters()
               if n.startswith("backbone.body") and p.requires_grad}
    assert trained == {"layer2", "layer3", "layer4"}


@pytest.mark.parametrize("config", [dict(attention="se"), dict(attention="split"), dict(stride_on="1x1"),
                                    dict(stem="small", widths=WIDTHS)])
def test_detectors_on_other_backbones(config):
    full = ResNet50(num_classes=5, **config).config
    detector = finetune.Detector("detect", full, 2, [8, 16, 32, 64, 128], [0.5, 1.0, 2.0], 64, 128, 0.5, 10).eval()
    rows = torch.tensor([[[64.0, 64, 64, 64, 0]]])
    found, maps = detector(torch.randn(1, 3, 64, 64), rows), detector.backbone(torch.randn(1, 3, 64, 64))
    assert detector.roi_heads.box_roi_pool.scales == [maps[str(i)].shape[3] / 64 for i in range(4)]
    assert len(found) == 1 and found[0]["boxes"].shape[1] == 4 and len(found[0]["scores"]) <= 10


def test_the_parts_work_together_as_in_torchvision_s_faster_rcnn():
    from torchvision.models.detection import FasterRCNN
    torch.manual_seed(0)
    mine = finetune.Detector("detect", ResNet50(num_classes=5, widths=WIDTHS).config, 2, [8, 16, 32, 64, 128],
                             [0.5, 1.0, 2.0], 64, 128, 0.4, 20)
    train.freeze(mine.backbone.body)
    theirs = FasterRCNN(mine.backbone, 3, min_size=64, max_size=128, image_mean=[0.0] * 3, image_std=[1.0] * 3,
                        rpn_anchor_generator=mine.rpn.anchor_generator, box_score_thresh=0.01, box_nms_thresh=0.4,
                        box_detections_per_img=20, box_batch_size_per_image=32, rpn_post_nms_top_n_train=1000,
                        rpn_post_nms_top_n_test=300, _skip_resize=True)  # in training; else its own leaves this size
    theirs.rpn.load_state_dict(mine.rpn.state_dict())
    theirs.roi_heads.load_state_dict(mine.roi_heads.state_dict())
    images, rows = torch.randn(2, 3, 64, 96), torch.zeros(2, 3, 5)
    rows[:, 0] = torch.tensor([64.0, 96, 64, 96, 0])
    rows[0, 1], rows[0, 2] = torch.tensor([4.0, 5, 30, 40, 1]), torch.tensor([50.0, 20, 90, 60, 2])
    rows[1, 1] = torch.tensor([10.0, 10, 40, 30, 2])
    targets = [dict(boxes=r[r[:, 4] > 0, :4], labels=r[r[:, 4] > 0, 4].long()) for r in rows[:, 1:]]
    torch.manual_seed(1)
    loss = mine.train()(images, rows)
    torch.manual_seed(1)
    parts = theirs.train()(list(images), targets)
    assert len(parts) == 4 and torch.allclose(loss, sum(parts.values()), rtol=1e-5)
    with torch.no_grad():
        found, expected = mine.eval()(images, rows), theirs.eval()(list(images))
    assert len(found[0]["boxes"]) > 5
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=1e-5) for k in a)


def test_the_hardest_proposals_remain(source, folder):
    args = parse("--data", folder, "--checkpoint", source, "--image-size", 64, "--ohem", 10 / finetune.PROPOSALS)
    model = finetune.load_source(args)[0]
    detector = finetune.Detection(args, train.World(), model, opened(folder)).model(args, CLASSES)
    heads = detector.roi_heads.train()
    torch.manual_seed(3)
    features = {str(i): torch.randn(1, 16, 16 >> i, 16 >> i) for i in range(4)}
    targets = [dict(boxes=torch.tensor([[4.0, 4, 30, 30]]), labels=torch.tensor([2]))]
    corners = torch.rand(40, 2) * 40
    proposals = [torch.cat([corners, corners + 3 + torch.rand(40, 2) * 20], 1)]
    nn_heads = (heads.box_roi_pool, heads.box_head, heads.box_predictor)
    heads.seen = features, [(64, 64)]
    chosen, _, labels, _ = heads.select_training_samples([proposals[0].clone()], targets)
    everything = torch.cat([proposals[0], targets[0]["boxes"]])
    assert len(chosen[0]) == 10
    with torch.no_grad():
        logits, deltas = nn_heads[2](nn_heads[1](nn_heads[0](features, [everything], [(64, 64)])))
    losses = []
    for p, row, delta in zip(everything, logits, deltas):
        iou = finetune.overlaps(p[None].double().numpy(), targets[0]["boxes"].double().numpy(), np.zeros(1, bool))[0, 0]
        label = 2 if iou >= 0.5 else 0
        loss = -row.log_softmax(0)[label]
        if label:
            goal = heads.box_coder.encode([targets[0]["boxes"]], [p[None]])[0][0]
            for k in range(4):
                miss = abs(delta[4 * label + k] - goal[k])
                loss = loss + (4.5 * miss ** 2 if miss < 1 / 9 else miss - 0.5 / 9)
        losses.append(loss.item())
    hardest = sorted(range(41), key=lambda i: -losses[i])[:10]
    assert {tuple(p.tolist()) for p in chosen[0]} == {tuple(everything[i].tolist()) for i in hardest}


def test_a_detector_in_training_can_be_copied_as_saving_does(source, folder):
    import copy
    args = parse("--data", folder, "--checkpoint", source, "--image-size", 64, "--ohem", 0.5)
    model = finetune.load_source(args)[0]
    detector = finetune.Detection(args, train.World(), model, opened(folder)).model(args, CLASSES).train()
    detector(torch.randn(1, 3, 64, 64)).backward()
    twin = copy.deepcopy(detector)
    assert all(torch.equal(a, b) for a, b in zip(twin.state_dict().values(), detector.state_dict().values()))


def random_sets(seed, images=25, classes=4, crowds=True):
    """-> known, found: boxes near the true ones, elsewhere, of other classes, with ties of scores; among them images
    and a class of nothing"""
    rng, known, found = np.random.default_rng(seed), {}, {}
    for i in range(images):
        k = int(rng.integers(0, 7))
        low = rng.uniform(0, 300, (k, 2))
        boxes = np.concatenate([low, low + rng.uniform(4, 200, (k, 2))], 1)
        labels = rng.integers(1, classes, k)  # the last class never occurs
        crowd = rng.random(k) < (0.2 if crowds else 0)
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(1) * rng.uniform(0.2, 1, k)  # objects do not fill their boxes
        known[i] = finetune.Boxes(boxes, labels, areas, crowd, np.zeros(k, bool))
        near = boxes[rng.integers(0, k, 2 * k)] if k else np.zeros((0, 4))
        near = near + rng.normal(0, 1, near.shape) * rng.choice([0.5, 5, 30], len(near))[:, None]
        far = rng.uniform(0, 300, (4, 2))
        every = np.concatenate([near, np.concatenate([far, far + rng.uniform(4, 100, (4, 2))], 1)])
        every = np.concatenate([np.minimum(every[:, :2], every[:, 2:] - 1), every[:, 2:]], 1)
        if rng.random() < 0.9:
            found[i] = (every, rng.integers(1, classes + 1, len(every)), rng.integers(0, 12, len(every)) / 12)
    return known, found


def reference(known, found, classes, most=100):
    coco = pytest.importorskip("pycocotools.coco")
    from pycocotools.cocoeval import COCOeval
    wh = lambda b: [b[0], b[1], b[2] - b[0], b[3] - b[1]]  # noqa: E731
    notes = [dict(id=n + 1, image_id=i, category_id=int(label), bbox=wh(b), area=float(area), iscrowd=int(c))
             for n, (i, b, label, area, c) in enumerate(
                 (i, *row) for i, t in known.items() for row in zip(t.boxes.tolist(), t.labels, t.areas, t.crowd))]
    results = [dict(image_id=i, category_id=int(label), bbox=wh(b), score=float(s))
               for i, (boxes, labels, scores) in found.items() for b, label, s in zip(boxes.tolist(), labels, scores)]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco.COCO()
        truth.dataset = dict(images=[dict(id=i) for i in known], annotations=notes, info={},
                             categories=[dict(id=c + 1) for c in range(classes)])
        truth.createIndex()
        judge = COCOeval(truth, truth.loadRes(results), "bbox")
        judge.params.maxDets = [1, min(10, most), most]
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    precision = judge.eval["precision"][:, :, :, 0, 2]
    per_class = [100 * p[p > -1].mean() if (p > -1).any() else None for p in precision.transpose(2, 0, 1)]
    keys = dict(map=0, map50=1, map75=2, map_small=3, map_medium=4, map_large=5, recall=8)
    return {**{k: 100 * judge.stats[i] for k, i in keys.items()}, "per_class": per_class}


def assert_same(mine, theirs):
    for key, value in theirs.items():
        values = [(mine[key], value)] if key != "per_class" else list(zip(mine[key], value, strict=True))
        for a, b in values:
            assert (a is None and (b is None or b < 0)) or a == pytest.approx(b, abs=1e-6), (key, a, b)


@pytest.mark.parametrize("seed", range(4))
def test_mean_average_precision_is_coco_s(seed):
    known, found = random_sets(seed, crowds=seed > 0)
    mine = finetune.mean_average_precision(found, known, 4)
    assert_same(mine, reference(known, found, 4))
    assert 0 < mine["map"] < mine["map50"] < 100 and mine["per_class"][3] is None


def test_an_image_is_scored_alike_in_any_batch_and_order(folder):
    _, val, _, known, _ = opened(folder)
    images = finetune.BoxImages(val, known, parse("--data", folder, "--image-size", 64), replace=False)

    def find(batches):
        torch.manual_seed(0)
        model = finetune.Detector("detect", ResNet50(num_classes=5, widths=WIDTHS).config, 2, [8, 16, 32, 64, 128],
                                  [0.5, 1.0, 2.0], 64, 128, 0.5, 10)
        loader = torch.utils.data.DataLoader(images, batch_sampler=batches, collate_fn=images.collate)
        return finetune.find_boxes(model, images, len(batches[0]), train.World(), loader=loader)[1]
    alone = find(data.eval_batches(5, 1))
    for other in (find(data.eval_batches(5, 5)), find(data.eval_batches(5, 1)[::-1])):
        assert alone.keys() == other.keys() == set(range(5)) and len(alone[0][0])
        assert all(np.allclose(a, b, atol=1e-6) for i in alone for a, b in zip(alone[i], other[i]))


def test_what_finds_every_box_scores_100_and_nothing_0():
    known, _ = random_sets(3, crowds=False)
    right = {i: (t.boxes, t.labels, np.linspace(0.3, 0.9, len(t.labels))) for i, t in known.items()}
    score = finetune.mean_average_precision(right, known, 4)
    assert {score[k] for k in ("map", "map50", "map75", "recall")} == {100}
    assert score["per_class"] == [100, 100, 100, None]
    score = finetune.mean_average_precision({}, known, 4)
    assert score["map"] == score["recall"] == 0 and score["per_class"] == [0, 0, 0, None]


def test_at_most_so_many_boxes_count():
    known, found = random_sets(9, images=6)
    mine = finetune.mean_average_precision(found, known, 4, most=2)
    theirs = reference(known, found, 4, most=2)  # its summary of the whole asks for 100
    assert mine["per_class"] == pytest.approx([v for v in theirs["per_class"]], abs=1e-6)


def test_difficult_boxes_are_neither_right_nor_wrong():
    box, none = np.array([[10.0, 10, 50, 50]]), np.zeros(1, bool)
    known = {i: finetune.Boxes(box, np.array([1]), np.array([1600.0]), none, none if i == 0 else ~none) for i in (0, 1)}
    found = {i: (box, np.array([1]), np.array([0.9 - 0.1 * i])) for i in (0, 1)}
    assert finetune.mean_average_precision(found, known, 1)["map"] == 100
    found[1] = (box + 100, np.array([1]), np.array([0.95]))  # elsewhere: wrong
    assert finetune.mean_average_precision(found, known, 1)["map"] == pytest.approx(50)


# ----------------------------------------------------------------------------------------------------------- whole runs

def test_a_run_resumes_to_the_same_bits_and_is_scored(tune, folder, tmp_path, monkeypatch, capsys):
    flags = ["--epochs", 3, "--model-ema-decay", 0.9, "--ohem", 0.5, "--lr", 5e-4]
    result = tune(*flags, out="straight")
    assert "anchors of [" in capsys.readouterr().err
    resumed, _ = interrupted(monkeypatch, lambda: tune(*flags, "--resume", out="stopped"), 2, 6)
    assert not equal_state(tmp_path / "straight" / "last.pt", tmp_path / "stopped" / "last.pt")
    assert resumed["map50"] == result["map50"] and set(result["per_class"]) == set(CLASSES)
    records = [json.loads(line) for line in open(tmp_path / "straight" / "metrics.jsonl")]
    losses = [r["train_loss"] for r in records if r["event"] == "epoch"]
    assert len(losses) == 3 and all("top1" not in r for r in records)
    assert result["map50"] == pytest.approx(max(r["map50"] for r in records if r["event"] == "epoch"), abs=1e-6)
    assert "mAP@0.5" in (tmp_path / "straight" / "curves.svg").read_text()
    with Image.open(tmp_path / "straight" / "predictions.png") as sheet:
        assert sheet.width == 4 * 228 + 8
    before, after = (load_checkpoint(p)["model"] for p in (result["checkpoint"].replace("straight", "stopped"),
                                                           result["checkpoint"]))
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    scored = tune("--eval-only", "--checkpoint", result["checkpoint"])
    assert scored["map50"] == pytest.approx(result["map50"], abs=1e-6) and scored["images"] == 5


def test_a_detector_is_scored_at_its_own_sizes_unless_flags_name_others(tune, folder, tmp_path, monkeypatch):
    own = ("--max-size", 80, "--nms-threshold", 0.3, "--detections", 7)
    path, scores, amps, find = tune("--epochs", 1, *own)["checkpoint"], [], [], finetune.find_boxes
    limits = []
    monkeypatch.setattr(finetune, "find_boxes", lambda model, *rest, **k: (
        amps.append(model.amp), limits.append((model.roi_heads.nms_thresh, model.roi_heads.detections_per_img)),
        find(model, *rest, **k))[2])
    for sizes, flags in ((dict(), ()), (dict(), ("--image-size", 40)), (dict(image_size=40), ()),
                         (dict(), ("--max-size", 48)), (dict(max_size=48), ()),
                         (dict(), ("--amp-dtype", "bfloat16", "--nms-threshold", 0.6, "--detections", 9))):
        changed = torch.load(path, weights_only=True)
        changed["config"].update(sizes)
        torch.save(changed, tmp_path / "changed.pt")
        found = finetune.main(parse("--eval-only", "--checkpoint", tmp_path / "changed.pt", "--data", folder,
                                    "--workers", 0, "--batch-size", 3, *flags))
        scores.append([found[key] for key in ("map", "map50", "recall")])
    assert scores[1] == scores[2] and scores[3] == scores[4] and scores[0] not in scores[1:5]
    assert amps == [None] * 5 + [torch.bfloat16] and limits == [(0.3, 7)] * 5 + [(0.6, 9)]


def test_only_what_is_scored_is_read_to_score(tune, folder, tmp_path):
    path = tune("--epochs", 1)["checkpoint"]
    expected = tune("--eval-only", "--checkpoint", path)
    root = tmp_path / "set"
    shutil.copytree(os.path.join(folder, "val"), root / "val")
    scored = [tune("--eval-only", "--checkpoint", path, root=str(root))]
    (root / "train" / "annotations").mkdir(parents=True)
    (root / "train" / "annotations" / "x.xml").write_text(voc("x.jpg", [("cat", 1, 1, 9, 9)]))
    scored.append(tune("--eval-only", "--checkpoint", path, root=str(root)))
    for result in scored:
        assert all(result[k] == expected[k] for k in ("map", "map50", "recall", "per_class", "images"))
    image = root / "val" / "images" / "val2.jpg"
    image.write_bytes(image.read_bytes()[:-200])
    with pytest.raises(UserError, match="val2.jpg"):
        tune("--eval-only", "--checkpoint", path, root=str(root))
    left = tune("--eval-only", "--checkpoint", path, "--on-corrupt", "skip", root=str(root))
    assert (left["images"], left["corrupt"]) == (4, 1)
    (root / "val" / "annotations" / "val2.xml").unlink()
    without = tune("--eval-only", "--checkpoint", path, root=str(root))
    assert all(left[k] == without[k] for k in ("map", "map50", "recall", "per_class"))


def test_a_detector_is_scored_on_what_was_held_out_of_its_training(tune, folder, tmp_path):
    shutil.copytree(os.path.join(folder, "train"), tmp_path / "set" / "train")
    made = tune("--epochs", 1, "--val-split", 0.4, root=str(tmp_path / "set"))
    scored = tune("--eval-only", "--checkpoint", made["checkpoint"], root=str(tmp_path / "set"))
    assert all(scored[k] == made[k] for k in ("map", "map50", "recall", "images"))
    os.rename(tmp_path / "set", tmp_path / "moved")  # or so it seems: all of a folder that it has not seen is scored
    assert tune("--eval-only", "--checkpoint", made["checkpoint"], root=str(tmp_path / "moved"))["images"] == 12


def test_lists_of_other_names(tmp_path):
    """VOC 2007's test set has test.txt alone; a training that has trainval.txt does not touch it"""
    standard_voc(tmp_path)
    lists = tmp_path / "ImageSets" / "Main"
    (lists / "val.txt").rename(lists / "test.txt")
    (lists / "train.txt").rename(lists / "trainval.txt")
    files, val, *_ = opened(tmp_path, "--val-split", 0.3)
    assert len(files) + len(val) == 12 and "val" not in "".join(map(files.name, range(len(files))))
    (lists / "trainval.txt").unlink()
    files, val, *_ = finetune.open_boxes(str(tmp_path), parse("--eval-only"), CLASSES)
    assert files is None and {val.name(i) for i in range(len(val))} == {f"JPEGImages/val{i}.jpg" for i in range(5)}


def test_a_run_learns(tune, tmp_path):
    tune("--epochs", 8, "--lr", 5e-4, "--trainable-stages", 4)
    records = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]
    losses = [r["train_loss"] for r in records if r["event"] == "epoch"]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3]), losses


def test_statistics_and_lower_stages_stay(tune, source, tmp_path):
    (tmp_path / "run").mkdir()
    for name in ("confusion.csv", "mistakes.png"):  # of a classifier that was here
        (tmp_path / "run" / name).touch()
    result = tune("--epochs", 1, "--trainable-stages", 1, "--lr", 1e-3, "--overwrite")
    assert {"args.json", "best.pt", "predictions.png"} <= (left := set(os.listdir(tmp_path / "run")))
    assert not left & {"confusion.csv", "mistakes.png"}
    before, after = load_checkpoint(source)["model"], load_checkpoint(result["checkpoint"])["model"]
    for name, value in before.items():
        if not name.startswith("fc."):
            moves = name.startswith("layer4") and value.ndim > 1
            assert torch.equal(value, after["backbone.body." + name]) != moves, name


def test_a_detector_is_refused_elsewhere_by_name(tune):
    path = tune("--epochs", 1)["checkpoint"]
    args = train.get_args_parser().parse_args(["--checkpoint", path])
    with pytest.raises(UserError, match="is a detector, which finetune.py --task detect"):
        load_model(args)
    other = path.replace("best.pt", "classifier.pt")
    save_checkpoint(other, new_network(widths=WIDTHS), classes=list("abcde"))
    with pytest.raises(UserError, match="is no detector"):
        finetune.load_detector(other)


@pytest.mark.parametrize("flags, complaint", [
    (["--mixup-alpha", 1], "--mixup-alpha goes with --task classify"), (["--strategy", "head"], "--strategy goes with"),
    (["--eval-only", "--score-threshold", 0.1], "--score-threshold goes with training"),
    (["--eval-only", "--weights", "IMAGENET1K_V2"], "--weights goes with training"),
    (["--ra-std", 1], "--ra-std goes with --task classify"), (["--batch-size", "auto"], "--batch-size auto"),
    (["--nms-threshold", 2], "must lie in (0, 1]")])
def test_what_detection_cannot_honour_is_refused(flags, complaint, tune, capsys):
    with pytest.raises((UserError, SystemExit)) as caught:
        tune(*flags)
    assert caught.value.code == 2
    assert complaint in (str(caught.value) if isinstance(caught.value, UserError) else capsys.readouterr().err)


def test_two_processes_train_and_find_the_same_boxes(run, tune, folder, source, tmp_path):
    flags = ("--task", "detect", "--data", folder, "--workers", 0, "--image-size", 64, "--amp-dtype", "float32")
    more = dict(script="finetune.py", processes=2, before=NARROW)
    done = run(*flags, "--checkpoint", source, "--epochs", 1, "--lr", 1e-3, "--batch-size", 2,
               "--out", tmp_path / "two", **more)
    assert done.returncode == 0, done.stderr[-2000:]
    trained = json.loads(done.stdout.splitlines()[-1])
    before, after = load_checkpoint(source)["model"], load_checkpoint(trained["checkpoint"])["model"]
    assert not torch.equal(before["layer4.0.conv1.weight"], after["backbone.body.layer4.0.conv1.weight"])
    one = tune("--eval-only", "--checkpoint", trained["checkpoint"])
    done = run(*flags, "--eval-only", "--checkpoint", trained["checkpoint"], "--batch-size", 3, **more)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(set(said := done.stderr.splitlines())) == len(said), said
    two = json.loads(done.stdout.splitlines()[-1])
    assert one["recall"] > 0 and two["images"] == 5
    for key in ("map", "map50", "recall"):
        assert one[key] == pytest.approx(trained[key], rel=1e-3) == pytest.approx(two[key], rel=1e-3), key
    done = run(*flags, "--checkpoint", "none.pt", "--out", tmp_path / "y", script="finetune.py")
    assert done.returncode == 3 and "none.pt" in done.stderr.splitlines()[-1]


def test_real_predictions_score_as_pycocotools_says(shared):
    """What is found need not be right: an untrained detector's boxes, shifted ones and the annotations' own"""
    pytest.importorskip("pycocotools")
    root = os.path.join(shared, "raccoon")
    _, val, classes, known, _ = opened(root)
    truth, rng = {i: known[val.path(i)] for i in range(len(val))}, np.random.default_rng(0)
    found = {}
    for i, t in truth.items():
        boxes = np.concatenate([t.boxes + rng.normal(0, 12, t.boxes.shape), t.boxes + rng.normal(0, 60, t.boxes.shape)])
        boxes = np.concatenate([np.minimum(boxes[:, :2], boxes[:, 2:] - 1), boxes[:, 2:]], 1)
        found[i] = (boxes, np.ones(len(boxes), int), rng.random(len(boxes)))
    assert len(val) == 42 and classes == ["raccoon"]
    assert_same(finetune.mean_average_precision(found, truth, 1), reference(truth, found, 1))
