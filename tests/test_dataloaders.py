import copy
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from conftest import COLD, write_cifar
from fastai.vision.all import Resize, TensorCategory, TensorImage, ToTensor, load_learner
from PIL import Image

from sifar import TrainConfig, get_dls, get_learner
from sifar.data import loaders
from sifar.data.augment import get_tfms, seed_tfms
from sifar.data.loaders import BatchAugment
from sifar.errors import explain

matplotlib.use("agg")


def digits(**kwargs):
    return TrainConfig(dataset="digits", arch="resnet8", **kwargs)


def epoch(dls, seed=0):
    "All batches of one training epoch, its random numbers starting at `seed`."
    dls.train.rng = random.Random(seed)
    return [(x.clone(), y.clone()) for x, y in dls.train]


def equal(a, b):
    return len(a) == len(b) and all((x == u).all() and (y == v).all() for (x, y), (u, v) in zip(a, b))


def test_a_training_batch():
    dls = get_dls(digits(bs=64))
    x, y = dls.one_batch()
    assert type(x) is TensorImage and type(y) is TensorCategory
    assert (
        x.shape == (64, 3, 32, 32)
        and x.dtype == torch.float32
        and y.shape == (64,)
        and x.is_contiguous(memory_format=torch.channels_last)
    )
    assert dls.c == 10 and dls.vocab == list("0123456789")
    assert len(dls.train) == len(dls.data.train) // 64


def test_an_epoch_takes_every_image_once_in_another_order():
    dls = get_dls(digits(bs=5))
    a, b = ([y for _, y in epoch(dls, i)] for i in (1, 2))
    assert (
        sorted(torch.cat(a).tolist()) == sorted(dls.data.labels[dls.data.train].tolist())
        and torch.cat(a).tolist() != torch.cat(b).tolist()
    )


def test_validation_and_test_are_only_normalised():
    dls = get_dls(digits())
    mean, std = (np.array(o, np.float32).reshape(3, 1, 1) for o in dls.data.stats())
    for dl, rows in ((dls.valid, dls.data.valid), (dls[2], dls.data.test)):
        x = torch.cat([o[0] for o in dl])
        assert torch.cat([o[1] for o in dl]).tolist() == dls.data.labels[rows].tolist()
        assert np.allclose(x, (dls.data.images[rows].transpose(0, 3, 1, 2) / 255 - mean) / std, atol=1e-5)


def test_augmentation_is_repeatable_and_differs_by_epoch_and_batch():
    dls = get_dls(digits())
    assert equal(epoch(dls, 1), epoch(dls, 1)) and not equal(epoch(dls, 1), epoch(dls, 2))
    dls.train.rng = random.Random(1)
    a, b = list(dls.train), list(dls.train)
    assert not equal(a, b), "the next epoch is another one"
    assert equal(epoch(get_dls(digits())), epoch(get_dls(digits()))) and not equal(
        list(get_dls(digits(seed=1)).train), list(get_dls(digits(seed=2)).train)
    )


def test_the_same_image_is_augmented_in_many_ways(tmp_path, tiny_cifar):
    write_cifar(tmp_path, "cifar100")
    dls = get_dls(TrainConfig(data=str(tmp_path), bs=50))
    seen = set()
    for _ in range(20):
        dls.train.before_iter()
        seen.add(dls.train.read([int(dls.data.train[0])])[0].numpy().tobytes())
    assert len(seen) == 20
    assert (dls.data.images == get_dls(TrainConfig(data=str(tmp_path))).data.images).all(), (
        "the stored images stay as they are"
    )


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing_but_who_does_the_work(workers):
    assert equal(epoch(get_dls(digits(bs=64))), epoch(get_dls(digits(bs=64, workers=workers))))


def test_a_folder_smaller_than_a_batch_trains(image_folder, tmp_path):
    dls = get_dls(TrainConfig(dataset=str(image_folder), data=str(tmp_path), sz=24, bs=128))
    ((x, y),) = dls.train
    assert x.shape == (48, 3, 24, 24) and sorted(y.tolist()) == [0] * 24 + [1] * 24


@pytest.mark.parametrize("augment", ["item", "batch"])
@pytest.mark.parametrize("bs", [47, 40, 32, 25, 16, 5])
def test_a_small_set_is_used_whole(image_folder, tmp_path, bs, augment):
    cfg = TrainConfig(dataset=image_folder, data=tmp_path, bs=bs, augment=augment)
    sizes = [len(y) for _, y in get_dls(cfg).train]
    assert sum(sizes) >= 45 and max(sizes) <= bs, "of 48 images, hardly any waits for the next epoch"


def test_where_batches_are_many_they_have_the_size_that_was_asked_for():
    dls = get_dls(digits(bs=31))
    assert len(dls.data.train) % 31, "some images fill no batch"
    assert {len(y) for _, y in dls.train} == {31}


IN_LITTLE_SHARED_MEMORY = """
import ctypes, os, sys
ctypes.CDLL(None).unshare(0x20000)      # a namespace of its own for mounts: CLONE_NEWNS
os.system("mount --make-rprivate / && mount -t tmpfs -o size=64k tmpfs /dev/shm")
from sifar import TrainConfig, get_dls
dls = get_dls(TrainConfig(dataset="digits", bs=128, workers=2))
print(sum(len(y) for _, y in dls.train), os.statvfs("/dev/shm").f_blocks * 4096)
"""


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounts need root")
def test_workers_need_no_shared_memory():
    done = subprocess.run([sys.executable, "-c", IN_LITTLE_SHARED_MEMORY], capture_output=True, text=True)
    assert done.stdout.split() == ["1280", "65536"] and not done.stderr, done.stderr


def test_a_batch_that_a_worker_cannot_send_is_missed(monkeypatch, capfd):
    def fail(storage):
        raise OSError("No space left on device")

    monkeypatch.setattr(loaders, "by_value", fail)
    with pytest.raises(RuntimeError) as e:
        epoch(get_dls(digits(bs=512, workers=1)))
    assert "exited unexpectedly" in explain(e.value) and "--workers 0" in explain(e.value)
    assert "Traceback" not in capfd.readouterr().err


KILLED = """
import os, signal, time
from sifar import TrainConfig, get_dls
batches = iter(get_dls(TrainConfig(dataset="digits", bs=128, workers=2)).train)
next(batches)
time.sleep(1)                           # the workers have made the next ones, and wait for a reader
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_with_a_training_that_is_killed():
    # which is over where nobody is left that could write
    done = subprocess.run([sys.executable, "-c", KILLED], capture_output=True, timeout=60)
    assert done.returncode == -signal.SIGKILL


def test_an_epoch_counts_its_batches():
    dls = get_dls(digits(bs=128))
    batches = dls.train.create_batches
    dls.train.create_batches = lambda rows: list(batches(rows))[1:]
    with pytest.raises(RuntimeError, match="9 of 10 batches came") as e:
        epoch(dls)
    assert "--workers 0" in explain(e.value)


SPAWNED = """
import sys
if __name__ == "__main__":
    from sifar.log import quiet_imports
    quiet_imports()
    import torch
    torch.multiprocessing.set_start_method("spawn")
    from sifar import TrainConfig, get_dls, load_learner
    dls = get_dls(TrainConfig(dataset="digits", bs=128, workers=1))
    print(sum(len(y) for _, y in dls.train))
    learn, images = load_learner(sys.argv[1]), list(dls.data.images[:40])
    alone, spawned = (learn.dls.test_dl(images, rm_type_tfms=0, num_workers=n) for n in (0, 1))
    print(torch.equal(learn.get_preds(dl=alone)[0], learn.get_preds(dl=spawned)[0]))
"""


@pytest.mark.slow
def test_workers_that_are_started_anew_are_quiet_and_predict_the_same(exported, tmp_path):
    (tmp_path / "script.py").write_text(SPAWNED)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = COLD, tmp_path / "script.py", exported[0] / "learner.pkl"
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.stdout == "1280\nTrue\n" and not done.stderr


TRAINED = """
import sys
if __name__ == "__main__":
    import torch
    torch.multiprocessing.set_start_method("spawn")
    import train
    flags = "--dataset digits --arch resnet8 --epochs 1 --sizes 8 --workers 1 --data data --runs runs --name"
    train.main([*flags.split(), sys.argv[1]])
"""


@pytest.mark.slow
def test_a_training_with_spawned_workers_is_the_same_as_with_forked_ones(tmp_path):
    (tmp_path / "script.py").write_text(TRAINED)
    (tmp_path / "forked.py").write_text(TRAINED.replace("spawn", "fork"))
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    for script, name in (("script.py", "spawned"), ("forked.py", "forked")):
        command = COLD, tmp_path / script, name
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr, done.stderr
    spawned, forked = (
        torch.load(tmp_path / "runs/digits" / name / "models/last.pth", weights_only=True)["model"]
        for name in ("spawned", "forked")
    )
    assert all(torch.equal(spawned[k], v) for k, v in forked.items())


IN_A_NOTEBOOK = """
import matplotlib
matplotlib.use("agg")
from matplotlib import pyplot
from sifar import TrainConfig, get_dls, get_learner
cfg = TrainConfig(dataset="digits", arch="resnet8")
dls = get_dls(cfg)
dls.show_batch()
learn = get_learner(dls, cfg)
with learn.no_bar(): learn.show_results()
print(*(len(pyplot.figure(i).axes) for i in pyplot.get_fignums()))
"""


@pytest.mark.slow
def test_pictures_are_shown_in_one_figure_without_an_import_of_fastai():
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = COLD, "-W", "ignore", "-c", IN_A_NOTEBOOK
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.stdout == "9 9\n", done.stderr


def test_what_a_notebook_does_works(tmp_path, image_folder):
    cfg = TrainConfig(
        dataset=str(image_folder), data=str(tmp_path), arch="resnet8", lr=0.02, precision="fp32"
    )
    dls = get_dls(cfg)
    learn = get_learner(dls, cfg, path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        learn.fit_warmup_cosine(8, warmup=2)
        dls.show_batch(max_n=4)
        learn.show_results(max_n=4)
        picture = image_folder / "test" / "dog" / "000.png"
        raw, rows = np.array(Image.open(picture)), dls.data.test
        name, index, probs = learn.predict(picture)
        assert name == "dog" and index == 1 and probs.shape == (2,) and abs(probs.sum() - 1) < 1e-5
        for o in (str(picture), raw, Image.open(picture), dls.data.images[rows[6]], int(rows[6])):
            assert torch.allclose(learn.predict(o)[2], probs, atol=1e-5), type(o)
        probs_of_test, _ = learn.get_preds(dl=dls[2])
        named, _ = learn.get_preds(dl=dls.test_dl(sorted((image_folder / "test").rglob("*.png"))))
        assert torch.allclose(probs_of_test, named, atol=1e-5)
        learn.export("l.pkl")
        loaded = load_learner(tmp_path / "l.pkl")
        with loaded.no_bar():
            assert torch.allclose(loaded.predict(picture)[2], probs, atol=1e-5)
    assert os.path.getsize(tmp_path / "l.pkl") < 1_000_000, "no images in the learner file"


def test_other_item_transforms_are_used(tmp_path, tiny_cifar):
    write_cifar(tmp_path, "cifar100")
    cfg = TrainConfig(data=str(tmp_path), arch="resnet8")
    dls = get_dls(cfg)
    x, _ = dls.valid.new(after_item=[Resize(16), ToTensor()]).one_batch()
    assert x.shape[-2:] == (16, 16)
    learn = get_learner(dls, cfg)
    with learn.no_bar():
        assert learn.tta(n=2)[0].shape == (100, 100)


def test_a_copied_data_set_keeps_its_images():
    dls = copy.deepcopy(get_dls(digits(bs=128)))
    assert dls.one_batch()[0].shape[0] == 128


def test_a_dry_run_takes_one_batch_of_each_split():
    dls = get_dls(digits(bs=16, dry_run=True))
    assert [len(o) for o in (dls.train, dls.valid, dls[2])] == [1, 1, 1]


def batch_augment(x, mirror=True, seed=0, fill=(1, 2, 3), hole=True):
    "x (n,32,32,3) uint8 augmented as one batch."
    tfm = BatchAugment(mirror, fill, hole)
    tfm.generator = torch.Generator().manual_seed(seed)
    return tfm.encodes(TensorImage(torch.from_numpy(x).permute(0, 3, 1, 2))).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("aug", ["light", "standard"])
def test_a_batch_is_augmented_by_the_distributions_of_the_items(aug):
    "An image whose pixels tell where they come from, 10,000 times by each way."
    y, x = np.mgrid[:32, :32]
    img, n = np.stack([10 + y, 10 + x, np.full_like(x, 9)], -1).astype(np.uint8), 10_000
    tfms = get_tfms(aug, fill=(1, 2, 3))
    seed_tfms(tfms, 0)
    items = np.stack([tfms(image=img)["image"] for _ in range(n)])
    batch = batch_augment(np.broadcast_to(img, (n, 32, 32, 3)).copy(), hole=aug == "standard")
    filled_i, filled_b = ((o == (1, 2, 3)).all(-1) for o in (items, batch))
    assert abs(filled_i.mean(0) - filled_b.mean(0)).max() < 0.03, "borders and holes"
    for a, b in ((items.mean(0), batch.mean(0)), (items.std(0), batch.std(0))):
        assert abs(a - b).max() < 0.8, "what is seen where"
    a, b = offsets(items, filled_i), offsets(batch, filled_b)
    assert a.shape == b.shape == (81 * 2,) and abs(a - b).max() < 0.005 and min(a.min(), b.min()) > 0.003, (
        "each shift, mirrored or not"
    )
    assert 0.45 < a[81:].sum() < 0.55 and 0.45 < b[81:].sum() < 0.55
    holes_i, holes_b = (np.bincount(o.sum((1, 2)), minlength=600) / n for o in (filled_i, filled_b))
    assert abs(np.cumsum(holes_i) - np.cumsum(holes_b)).max() < 0.03, "pixels filled in an image"


def offsets(images, filled):
    "The share of images with each of the 81 shifts, not mirrored and mirrored."
    rows, cols = (images[..., i].astype(np.int16) - 10 for i in (0, 1))
    straight, mirrored = cols - np.arange(32), cols + np.arange(32) - 31

    def seen(o, extreme):
        "The least or the largest of what is not filled, which are one number where all of it moved alike."
        return extreme(o, axis=(1, 2), where=~filled, initial=99 if extreme is np.min else -99)

    is_mirrored = seen(straight, np.min) != seen(straight, np.max)
    shift = np.where(is_mirrored, seen(mirrored, np.min), seen(straight, np.min))
    down = seen(rows - np.arange(32)[:, None], np.min)
    assert (down == seen(rows - np.arange(32)[:, None], np.max)).all()
    return np.bincount((down + 4) * 9 + shift + 4 + 81 * is_mirrored, minlength=162) / len(images)


def test_a_batch_of_digits_is_not_mirrored():
    x = np.zeros((500, 32, 32, 3), np.uint8)
    x[:, :, :16] = 200
    left, right = (
        batch_augment(x, mirror=False)[:, :, o].astype(int).sum() for o in (slice(0, 10), slice(22, 32))
    )
    assert left > 20 * right


def test_whole_batches_follow_the_seed_and_leave_the_images_alone():
    cfg = digits(augment="batch", bs=64)
    dls = get_dls(cfg)
    before = dls.data.images.copy()
    assert equal(epoch(dls, 1), epoch(dls, 1)) and not equal(epoch(dls, 1), epoch(dls, 2))
    assert (
        equal(epoch(dls), epoch(get_dls(digits(augment="batch", bs=64, workers=2))))
        and (dls.data.images == before).all()
    )
    x, y = dls.one_batch()
    assert (
        type(x) is TensorImage
        and x.dtype == torch.float32
        and x.is_contiguous(memory_format=torch.channels_last)
    )
    assert all((a == b).all() for (a, _), (b, _) in zip(dls.valid, get_dls(digits(bs=64)).valid)), (
        "validation is not augmented"
    )


@pytest.mark.parametrize("augment", ["item", "batch"])
def test_weak_mirrors_each_image_in_every_second_epoch_and_moves_it_by_2_pixels(
    tmp_path, tiny_cifar, augment
):
    write_cifar(tmp_path, "cifar100")
    cfg = TrainConfig(data=str(tmp_path), arch="resnet8", aug="weak", augment=augment, bs=20)
    dls = get_dls(cfg)
    rows, (mean, std) = dls.data.train[:20], (torch.tensor(o).view(3, 1, 1) for o in dls.stats)

    def seen():
        dls.train.before_iter()
        x = (
            dls.after_batch(dls.train.read(rows.tolist()))[0]
            if augment == "batch"
            else dls.train.read(rows.tolist())[0]
        )
        return (x * std + mean) * 255 if augment == "batch" else x

    def place(out, image):
        "How far `out` is moved, and whether it is mirrored."
        padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), "reflect")
        for mirrored in (False, True):
            for y, x in np.ndindex(5, 5):
                crop = padded[y : y + 32, x : x + 32][:, :: -1 if mirrored else 1]
                if np.abs(out - crop).max() < 1:
                    return y, x, mirrored

    first, second, third = (
        [place(o.permute(1, 2, 0).float().numpy(), dls.data.images[r]) for o, r in zip(seen(), rows)]
        for _ in range(3)
    )
    mirrored = [[o[2] for o in epoch] for epoch in (first, second, third)]
    assert mirrored[0] == mirrored[2] == [not o for o in mirrored[1]] and 3 < sum(mirrored[0]) < 17
    assert len({o[:2] for o in first + second + third}) > 15
