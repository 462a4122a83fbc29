import io
import json
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import write_cifar
from PIL import Image

from sifar import Predictor, TrainConfig, UserError, get_dls, get_learner, load_learner
from sifar.data.datasets import load_data
from sifar.data.image import MAX_PIXELS, MAX_SIDE
from sifar.runs.calibration import judge
from sifar.share.export import some_images, write_learner

RED, WHITE = (255, 0, 0), (255, 255, 255)


@pytest.fixture(scope="module")
def predictor(exported):
    return Predictor(exported[0])


@pytest.fixture(scope="module")
def digits():
    "20 test pictures (20,32,32,3) of digits."
    cfg = TrainConfig(dataset="digits", arch="resnet8")
    return some_images(get_learner(get_dls(cfg), cfg), 20)


def encode(img, format="png", **kwargs):
    "The bytes of an image file."
    buffer = io.BytesIO()
    img.save(buffer, format, **kwargs)
    return buffer.getvalue()


def test_probabilities_are_those_of_the_validation_pipeline(predictor, exported, digits):
    learn = load_learner(exported[0])
    with learn.no_bar():
        want = learn.get_preds(dl=learn.dls.test_dl(list(digits), rm_type_tfms=0))[0]
    np.testing.assert_allclose(predictor.probs([predictor.read(o) for o in digits]), want, atol=1e-6)
    with learn.no_bar():
        label, _, probs = learn.predict(digits[0])
    assert predictor.predict(digits[0], 1)[0] == (label, pytest.approx(probs.max().item(), abs=1e-6))


def test_predictions_come_with_the_likeliest_first(predictor, digits):
    top = predictor.predict(digits[0], 3)
    assert (
        len(top) == 3
        and top == sorted(top, key=lambda o: -o[1])
        and {label for label, _ in top} <= set("0123456789")
    )
    assert len(predictor.predict(digits[0])) == 5 and len(predictor.predict(digits[0], 99)) == 10
    assert sum(p for _, p in predictor.predict(digits[0], 10)) == pytest.approx(1, abs=1e-5)


def test_a_batch_is_the_same_as_one_after_another(predictor, digits):
    one = [predictor.predict(o) for o in digits]
    for images, bs in ((list(digits), 64), ((Image.fromarray(o) for o in digits), 3)):
        batch = predictor.predict_batch(images, bs=bs)
        assert [[label for label, _ in o] for o in batch] == [[label for label, _ in o] for o in one]
        np.testing.assert_allclose(
            [[p for _, p in o] for o in batch], [[p for _, p in o] for o in one], atol=1e-6
        )
    assert predictor.predict_batch([]) == []


# ---- what an image may be ----


def colour(predictor, image):
    "The colour in the middle of what the model sees."
    return np.asarray(predictor.read(image))[16, 16].tolist()


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "I;16", "F"]
)
def test_every_mode_of_pillow_is_read(predictor, mode):
    grey = Image.new("L", (50, 40), 255)
    img = Image.fromarray(np.full((40, 50), 65_535, np.uint16)) if mode == "I;16" else grey.convert(mode)
    assert colour(predictor, img) == [255] * 3


@pytest.mark.parametrize(
    "img, format, want",
    [
        (Image.new("RGB", (40, 40), RED), "png", RED),
        (Image.new("RGB", (40, 40), RED), "bmp", RED),
        (Image.new("RGB", (40, 40), RED), "gif", RED),
        (Image.new("RGBA", (40, 40), (0, 0, 0, 0)), "png", WHITE),
        (Image.new("RGBA", (40, 40), (255, 0, 0, 255)), "webp", RED),
        (Image.fromarray(np.full((40, 40), 32_768, np.uint16)), "png", (127, 127, 127)),
        (Image.fromarray(np.full((40, 40), 32_768, np.uint16)), "tiff", (127, 127, 127)),
    ],
)
def test_files_are_read_from_bytes_and_paths(predictor, tmp_path, img, format, want):
    content = encode(img, format)
    (tmp_path / "picture").write_bytes(content)
    for image in (content, tmp_path / "picture", str(tmp_path / "picture")):
        np.testing.assert_allclose(colour(predictor, image), want, atol=2)


def test_a_picture_that_moves_gives_its_first_frame(predictor):
    frames = [Image.new("P", (40, 40), i) for i in (1, 2)]
    for o in frames:
        o.putpalette([0, 0, 0, *RED, 0, 255, 0])
    assert colour(predictor, encode(frames[0], "gif", save_all=True, append_images=frames[1:])) == list(RED)


def test_exif_rotation_is_applied(predictor):
    img = Image.new("RGB", (64, 64), "blue")
    img.paste("red", (0, 0, 64, 32))  # above
    exif = Image.Exif()
    exif[274] = 6  # lies on its side: what is above belongs to the right
    seen = np.asarray(predictor.read(encode(img, "jpeg", exif=exif, quality=95)))
    assert seen[16, 28, 0] > 200 > 50 > seen[16, 4, 0]


@pytest.mark.parametrize("turn", [0, 90])
def test_of_a_long_picture_more_than_the_square_in_the_middle_is_seen_and_not_all(predictor, turn):
    img = Image.new("RGB", (400, 100), "blue")  # halfway between 100 x 100 and all of it is 200 x 100
    img.paste("red", (100, 0, 300, 100))
    assert (np.asarray(predictor.read(img.rotate(turn, expand=True))) == RED).all()
    img.paste("blue", (120, 0, 280, 100))  # nine tenths of that are 180 x 90
    seen = np.asarray(predictor.read(img.rotate(turn, expand=True)).rotate(-turn))
    assert (seen[:, [0, -1]] == RED).all() and (seen[:, 3:-3] == (0, 0, 255)).all()


@pytest.fixture(scope="module")
def photo():
    "A picture of 90 x 60 pixels whose left side is not its right one."
    return Image.linear_gradient("L").rotate(90).resize((90, 60)).convert("RGB")


@pytest.fixture
def of_mirrored(exported, tmp_path):
    "The learner as if it had been trained on mirror images too."
    shutil.copy(exported[0] / "learner.pkl", tmp_path)
    about = json.loads((exported[0] / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps({**about, "mirror": True}))
    return tmp_path / "learner.pkl"


def test_more_views_are_of_a_picture_and_of_its_mirror_image(of_mirrored, photo):
    probs = {}
    for views in (1, 2, 4):
        predictor = Predictor(of_mirrored, views=views)
        for mirrored, img in ((False, photo), (True, photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT))):
            probs[views, mirrored] = dict(predictor.predict(img, 10))
            (batch,) = predictor.predict_batch([img], 10)
            assert dict(batch) == pytest.approx(probs[views, mirrored], abs=1e-6)
    assert probs[1, False] != pytest.approx(probs[2, False], abs=1e-3)
    assert probs[2, False] != pytest.approx(probs[2, True], abs=1e-3)
    assert probs[4, False] == pytest.approx(probs[4, True], abs=1e-5)
    with pytest.raises(UserError, match="views is 3"):
        Predictor(of_mirrored, views=3)


def test_a_model_that_was_trained_without_mirror_images_looks_at_none(exported, photo):
    two, four = (dict(Predictor(exported[0], views=n).predict(photo, 10)) for n in (2, 4))
    assert four == two, "digits are not mirrored"


def test_an_image_that_has_the_size_already_has_one_view(of_mirrored, predictor, digits):
    want = predictor.predict(digits[0], 10)
    assert dict(Predictor(of_mirrored, views=4).predict(digits[0], 10)) == pytest.approx(dict(want), abs=1e-6)


@pytest.mark.parametrize(
    "x, want",
    [
        (np.full((9, 9), 255, np.uint8), 255),
        (np.full((9, 9, 1), 255, np.uint8), 255),
        (np.ones((9, 9, 3), np.float32), 255),
        (np.full((9, 9, 3), 255.0), 255),
        (np.full((9, 9, 4), 255, np.uint8), 255),
        (np.full((9, 9, 3), 65_535, np.uint16), 255),
        (np.full((9, 9), 255, np.uint16), 1),
        (np.ones((9, 9), bool), 255),
        (np.full((9, 9, 3), 0.5), 128),
        (np.full((9, 9), np.nan), 0),
        (np.full((1, 1, 3), 255, np.int64), 255),
        (np.full((9, 9, 3), 255, np.uint8)[:, ::-1], 255),
    ],
)
def test_arrays_of_any_type_are_read(predictor, x, want):
    assert colour(predictor, x) == [want] * 3


def bomb():
    "A PNG file of a few bytes that says it has 30,000 x 30,000 pixels."
    content = bytearray(encode(Image.new("L", (1, 1))))
    content[16:24] = (30_000).to_bytes(4, "big") * 2
    import zlib

    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


@pytest.mark.parametrize(
    "image, text",
    [
        (b"", "The image is not an image that can be read here"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        (bomb(), "The image"),
        ("https://example.org/a.png", "https://example.org/a.png is missing"),
        (None, "not a NoneType"),
        (np.zeros((3, 32, 32)), "shape (3, 32, 32)"),
        (np.zeros((0, 5, 3)), "shape (0, 5, 3)"),
        (np.zeros((2, 2), complex), "complex128"),
        (Image.new("1", (MAX_SIDE + 1, 1)), "is too large: 16,385 x 1 pixels"),
        (Image.new("1", (8001, MAX_PIXELS // 8000)), "8,001 x 8,000"),
        (np.zeros((8001, 8001), np.uint8), "8,001 x 8,001"),
        (Image.new("RGB", (0, 5)), "only 0 x 5"),
        (encode(Image.new("RGB", (64, 64), RED), "jpeg")[:300], "The image cannot be read as an image"),
    ],
)
def test_what_is_no_image_is_one_line(predictor, image, text):
    with pytest.raises(UserError) as e:
        predictor.predict(image)
    assert text in e.value.text and "\n" not in e.value.text


def test_no_other_program_is_started_to_read_a_picture(predictor, tmp_path, monkeypatch):
    (tmp_path / "gs").write_text("#!/bin/sh\ntouch $(dirname $0)/ran\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(UserError, match="is not an image"):
        predictor.predict(
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n0 0 9 9 rectfill\n%%EOF\n"
        )
    assert not (tmp_path / "ran").exists()


def test_arguments_that_make_no_sense_are_one_line(predictor, digits):
    for f in (
        lambda: predictor.predict(digits[0], 0),
        lambda: predictor.predict(digits[0], "3"),
        lambda: predictor.predict_batch(digits, bs=0),
        lambda: predictor.predict_batch("a.png"),
    ):
        with pytest.raises(UserError):
            f()


# ---- whether it is sure ----


def test_an_answer_has_the_probabilities_of_the_temperature_and_says_whether_to_trust_them(
    predictor, exported, digits
):
    metrics = json.loads((exported[0] / "metrics.json").read_text())
    assert predictor.confidence == metrics["confidence"] and predictor.confidence["temperature"] != 1
    top, verdict = predictor.answer(digits[0], 10)
    t = predictor.confidence["temperature"]
    powers = {label: p ** (1 / t) for label, p in predictor.predict(digits[0], 10)}
    assert dict(top) == pytest.approx({k: v / sum(powers.values()) for k, v in powers.items()}, abs=1e-4)
    verdicts = [predictor.answer(x).verdict for x in digits]
    assert verdict == verdicts[0] and "sure" in verdicts and len(set(verdicts)) > 1
    assert verdicts == judge(predictor.probs(digits), predictor.confidence).tolist()
    assert judge(np.full((1, 10), 0.1), predictor.confidence) == ["unknown"]


def test_without_a_confidence_half_of_the_probability_is_sure(exported, digits, tmp_path):
    shutil.copy(exported[0] / "learner.pkl", tmp_path)
    alone = Predictor(tmp_path)
    for x in digits:
        answer = alone.answer(x)
        assert answer.top == alone.predict(x)
        assert answer.verdict == ("sure" if answer.top[0][1] >= 0.5 else "unsure")


@pytest.mark.parametrize("confidence", [5, {}, {"temperature": 0, "threshold": 1, "sure": 1}, "1e999", None])
def test_a_confidence_that_is_none_is_one_line(exported, tmp_path, confidence):
    shutil.copy(exported[0] / "learner.pkl", tmp_path)
    about = json.loads((exported[0] / "model.json").read_text())
    if confidence == "1e999":
        about["confidence"]["sure"] = float("inf")
    else:
        about["confidence"] = confidence
    (tmp_path / "model.json").write_text(json.dumps(about).replace("Infinity", "1e999"))
    if confidence is None:
        assert Predictor(tmp_path).confidence is None
        return
    with pytest.raises(UserError, match="model.json is damaged"):
        Predictor(tmp_path)


# ---- where it looks ----


def test_covering_what_the_heat_map_shows_takes_more_of_the_class_than_covering_the_rest(predictor, digits):
    def loss(covered, i, before):
        return before - predictor.probs(covered[None])[0, i]

    hot, cold = [], []
    for x in digits:
        label, p = predictor.predict(x, 1)[0]
        heat = predictor.heat_map(x, label)
        assert heat.shape == (32, 32) and heat.min() >= 0 and heat.max() == pytest.approx(1, abs=0.2)
        order = heat.ravel().argsort()
        for pixels, out in ((order[-200:], hot), (order[:200], cold)):
            covered = x.copy()
            covered.reshape(-1, 3)[pixels] = covered.mean((0, 1))
            out.append(loss(covered, predictor.vocab.index(label), p))
    assert np.mean(hot) > np.mean(cold) + 0.05


def test_another_class_has_another_heat_map(predictor, digits):
    maps = [predictor.heat_map(digits[0], o) for o in "18"]
    assert np.abs(maps[0] - maps[1]).max() > 0.1


@pytest.mark.parametrize(
    "arch, there", [("resnet18-late", True), ("timm:resnet18", True), ("timm:vit_tiny_patch16_224", False)]
)
def test_other_models_are_exported_and_only_those_with_a_grid_of_features_have_a_heat_map(
    tmp_path, digits, arch, there
):
    cfg = TrainConfig(dataset="digits", arch=arch)
    write_learner(get_learner(get_dls(cfg), cfg), tmp_path / "learner.pkl", {})
    predictor = Predictor(tmp_path / "learner.pkl")
    assert (predictor.heat_map(digits[0], "3") is not None) == there and len(
        predictor.predict(digits[0])
    ) == 5


# ---- other data sets ----


def test_superclasses_and_class_names_come_along(tmp_path, tiny_cifar):
    write_cifar(tmp_path, "cifar100")
    cfg = TrainConfig(dataset="cifar100", data=str(tmp_path), arch="resnet8")
    write_learner(get_learner(get_dls(cfg), cfg), tmp_path / "learner.pkl", {})
    predictor = Predictor(tmp_path)
    assert (
        predictor.vocab[7] == "fine07"
        and predictor.superclasses[7] == "coarse01"
        and len(predictor.vocab) == len(predictor.superclasses) == 100
    )


def test_a_learner_of_ones_own_pictures_keeps_their_size(tmp_path, image_folder):
    cfg = TrainConfig(dataset=str(image_folder), data=str(tmp_path), arch="resnet8", sz=48)
    write_learner(get_learner(get_dls(cfg), cfg), tmp_path / "learner.pkl", {})
    predictor = Predictor(tmp_path)
    assert (
        predictor.read(image_folder / "train" / "cat" / "000.png").size == (48, 48)
        and predictor.vocab == ["cat", "dog"]
        and predictor.superclasses is None
    )
    assert len(predictor.predict(image_folder / "train" / "cat" / "000.png")) == 2
    seen = [predictor.read(path) for path in sorted((image_folder / "train" / "cat").iterdir())]
    data = load_data(cfg)
    np.testing.assert_array_equal(data.images[data.train[:len(seen)]], seen)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_labels(exported, digits):
    predictor = Predictor(exported[0])
    assert predictor.model.device.type == "cuda"
    np.testing.assert_allclose(
        predictor.probs(digits),
        Predictor(exported[0], "cpu").probs(digits),
        atol=1e-3,
    )
