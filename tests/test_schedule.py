import math

import pytest

from sifar import TrainConfig, get_dls, get_learner
from sifar.training.schedule import warmup_cosine


def formula(step, steps, lr, warmup):
    t = step / steps
    return lr * t / warmup if t < warmup else lr * (1 + math.cos(math.pi * (t - warmup) / (1 - warmup))) / 2


@pytest.mark.parametrize("warmup", [0.05, 0.2, 1 / 3, 0.5])
def test_the_values_of_the_formula(warmup):
    sched = warmup_cosine(0.4, warmup)
    for step in range(1000):
        assert sched(step / 1000) == pytest.approx(formula(step, 1000, 0.4, warmup), abs=1e-6)
    assert sched(0) == 0 and sched(warmup) == pytest.approx(0.4) and sched(1) == pytest.approx(0, abs=1e-8)


def test_a_linear_fall():
    sched = warmup_cosine(0.4, 0.2, "linear")
    for t, lr in ((0, 0), (0.1, 0.2), (0.2, 0.4), (0.6, 0.2), (1, 0)):
        assert sched(t) == pytest.approx(lr, abs=1e-6)
    assert warmup_cosine(0.4, 0, "linear")(0.25) == pytest.approx(0.3)


def test_every_length_of_warmup_fits():
    for n in range(1, 120):
        for w in (0, 0.05 * n, 0.2 * n, 0.37 * n, n / 3):
            warmup_cosine(0.1, w / n)(0.5)


def test_without_warmup_it_starts_at_the_top():
    assert warmup_cosine(0.3, 0)(0) == pytest.approx(0.3)


def test_a_fit_sets_it_for_each_batch_and_leaves_momentum_alone():
    cfg = TrainConfig(dataset="digits", arch="resnet8", bs=256, sizes="8", valid_pct=0.0)
    learn = get_learner(get_dls(cfg), cfg)
    with learn.no_bar(), learn.no_logging():
        learn.fit_warmup_cosine(3, 0.2, warmup=1)
    steps = 3 * len(learn.dls.train)
    assert learn.recorder.lrs == pytest.approx(
        [formula(i, steps, 0.2, 1 / 3) for i in range(steps)], abs=1e-6
    )
    with learn.no_bar(), learn.no_logging():
        learn.fit_warmup_cosine(2, 0.2, warmup=0, fall="linear")
    assert learn.recorder.lrs == pytest.approx(
        [0.2 * (1 - i / (2 * steps / 3)) for i in range(2 * steps // 3)], abs=1e-6
    )
    assert (
        learn.opt.hypers[0]["mom"] == 0.9
        and learn.opt.opt.param_groups[0]["nesterov"]
        and learn.opt.hypers[0]["wd"] == 5e-4
    )


def test_a_warmup_longer_than_the_fit_is_refused():
    cfg = TrainConfig(dataset="digits", arch="resnet8")
    with pytest.raises(ValueError, match="smaller warmup"):
        get_learner(get_dls(cfg), cfg).fit_warmup_cosine(3, 0.1)
