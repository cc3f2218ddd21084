"""The order of examples, learning rates, and options by label."""

import dataclasses

import numpy as np
import pytest
import tyro

from train.objective import Epochs, LabelOptions, adamw, linear_decay, scaled_rate, warmup_cosine, warmup_linear
from vlm_jax import UserError
from vlm_jax.runs.ranges import check_ranges


def test_every_epoch_reads_all_examples_in_a_new_order():
    epochs = Epochs(12, epochs=2, batch=2, accumulation=3, seed=1)
    assert (epochs.steps, epochs.per_epoch, epochs.step_size) == (4, 2, 6)
    steps = [epochs.rows(step) for step in range(4)]
    assert all(rows.shape == (3, 2) for rows in steps)
    first, second = np.concatenate(steps[:2]).ravel(), np.concatenate(steps[2:]).ravel()
    assert sorted(first) == sorted(second) == list(range(12)) and first.tolist() != second.tolist()
    np.testing.assert_array_equal(epochs.rows(3), Epochs(12, 2, 2, 3, 1).rows(3))
    assert not np.array_equal(epochs.rows(3), Epochs(12, 2, 2, 3, seed=2).rows(3))


def test_examples_that_fill_no_step():
    left_out = Epochs(7, epochs=1, batch=3)
    assert left_out.steps == 2 and len(set(np.concatenate([left_out.rows(i).ravel() for i in (0, 1)]))) == 6
    too_few = Epochs(3, epochs=1, batch=4)
    assert too_few.steps == 1 and set(too_few.rows(0).ravel()) == {0, 1, 2}


def test_schedules_and_rates():
    rate = linear_decay(1.0, 10)
    assert [float(rate(step)) for step in (0, 5, 10)] == [1, 0.5, 0]
    rate = warmup_cosine(1.0, 30, 10, 0.1)
    assert [round(float(rate(step)), 6) for step in (0, 5, 10, 20, 30)] == [0, 0.5, 1, 0.55, 0.1]
    assert [round(float(warmup_linear(1.0, 12, 2)(step)), 6) for step in (0, 1, 2, 7, 12)] == [0, 0.5, 1, 0.5, 0]
    for steps in (1, 2):  # too few for the warm-up
        assert np.isfinite([float(warmup_cosine(1.0, steps, 5)(step)) for step in range(steps)]).all()
        assert np.isfinite([float(warmup_linear(1.0, steps, 5)(step)) for step in range(steps)]).all()
    assert float(warmup_cosine(1.0, 1, 1)(0)) == 1.0
    assert scaled_rate(6e-4, 128, 4096) == pytest.approx(6e-4 * 32)
    assert scaled_rate(2e-4, 2560) == 2e-4 and scaled_rate(2e-4, 1280) == pytest.approx(4e-4)


@dataclasses.dataclass(frozen=True)
class Args(LabelOptions):
    seed: int = 0


def test_rates_and_decays_by_label():
    options = tyro.cli(Args, args=["--label-lr", "lora_b", "3e-3", "--label-decay", "lora_a", "0.1"])
    transforms, rates = options.optimisers(("lora_a", "lora_b"), 1e-3, lambda peak: linear_decay(peak, 10))
    assert rates == {"lora_a": linear_decay(1e-3, 10), "lora_b": linear_decay(3e-3, 10)}
    assert transforms == {"lora_a": adamw(linear_decay(1e-3, 10), 0.1), "lora_b": adamw(linear_decay(3e-3, 10), 0.0)}


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"label_lr": {"lora_c": 1e-3}}, r"--label-lr names 'lora_c': use a label of this training \(lora_a, lora_b\)"),
        ({"label_decay": {"psi_V": 0.1}}, r"--label-decay names 'psi_V': use a label .*\(lora_a, lora_b\)"),
        ({"label_lr": {"lora_a": -1.0}}, "--label-lr is -1.0: give at least 0 and at most 100"),
        ({"label_decay": {"lora_a": float("nan")}}, "--label-decay is nan: give at least 0"),
    ],
)
def test_refusals(changed, says):
    with pytest.raises(UserError, match=says):
        check_ranges(Args(**changed))
        Args(**changed).check_labels(("lora_a", "lora_b"))
