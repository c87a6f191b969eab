import pytest
from torch import nn

from vidtrain.optim.groups import decay_groups
from vidtrain.optim.schedules import adamw, rate, rmsprop, sgd
from vidtrain.types import UserError


def test_cosine_with_warmup_by_hand():
    rates = [rate(step, 100, "cosine", 0.1, (), 0.1) for step in range(101)]
    assert rates[0] == pytest.approx(1 / 11)
    assert rates[9] == pytest.approx(10 / 11)
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0.0, abs=1e-9)
    assert sorted(rates[10:], reverse=True) == rates[10:]


def test_warmup_may_begin_above_zero():
    rates = [rate(step, 100, "cosine", 0.1, (), 0.1, warmup_from=0.1) for step in range(11)]
    assert rates[0] == pytest.approx(0.1 + 0.9 / 11)
    assert rates[10] == 1.0
    with pytest.raises(UserError, match=r"optim.warmup_from is 2"):
        sgd(nn.Linear(2, 2), 10, lr=0.5, warmup=0.1, warmup_from=2)


def test_a_cosine_may_end_above_zero():
    rates = [rate(step, 100, "cosine", 0.1, (), 0.1, floor=0.2) for step in range(101)]
    assert rates[0] == pytest.approx(1 / 11) and rates[10] == 1.0
    assert rates[55] == pytest.approx(0.6) and rates[100] == pytest.approx(0.2)
    built = adamw(nn.Linear(2, 2), 10, lr=0.5, schedule="cosine", floor=0.2)
    optimizer, scheduler = built["optimizer"], built["lr_scheduler"]["scheduler"]
    for _ in range(10):
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


def test_it_ends_there_at_another_pace_too():
    def pace(step):
        return (step / 10) ** 0.5, 1.0

    pace.total = 10
    built = sgd(nn.Linear(2, 2), 10, lr=0.5, schedule="cosine", floor=0.2, pace=pace)
    optimizer, scheduler = built["optimizer"], built["lr_scheduler"]["scheduler"]
    for _ in range(10):
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


def test_a_floor_that_cannot_be_is_named():
    with pytest.raises(UserError, match=r"optim\.floor is 1\.5; it is a share of lr"):
        adamw(nn.Linear(2, 2), 10, lr=0.1, schedule="cosine", floor=1.5)
    for schedule in ("step", "constant", "one_cycle"):
        with pytest.raises(UserError, match=rf"schedule={schedule} has none: set it to 0"):
            sgd(nn.Linear(2, 2), 10, lr=0.1, schedule=schedule, floor=0.1)


def test_steps_and_constant_by_hand():
    rates = [rate(step, 90, "step", 0.0, (2 / 3, 8 / 9), 0.1) for step in (0, 59, 60, 79, 80, 89)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert rate(50, 90, "constant", 0.0, (), 0.1) == 1.0


def test_biases_and_norms_do_not_decay():
    module = nn.Sequential(nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4), nn.Flatten(), nn.Linear(4, 2))
    decay, rest = decay_groups(module, 0.1)
    assert [tuple(p.shape) for p in decay["params"]] == [(4, 3, 3, 3, 3), (2, 4)]
    assert decay["weight_decay"] == 0.1 and rest["weight_decay"] == 0.0
    assert len(rest["params"]) == 4


@pytest.mark.parametrize("make", [sgd, adamw, rmsprop])
def test_the_schedule_moves_the_optimizers_rate(make):
    built = make(nn.Linear(2, 2), 10, lr=0.5, schedule="cosine", warmup=0.2)
    optimizer, scheduler = built["optimizer"], built["lr_scheduler"]["scheduler"]
    seen = []
    for _ in range(10):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert max(seen) == 0.5 and seen[0] < 0.2 and seen[-1] < 0.05
    assert built["lr_scheduler"]["interval"] == "step"


def test_a_wrong_schedule_is_named_before_the_first_step():
    with pytest.raises(UserError, match=r"optim\.schedule is 'cosin'"):
        sgd(nn.Linear(2, 2), 10, lr=0.1, schedule="cosin")
    with pytest.raises(UserError, match=r"optim\.warmup"):
        sgd(nn.Linear(2, 2), 10, lr=0.1, warmup=1.0)
