"""What a loss may return, and what a step may change besides the trained leaves: metrics, counters, members."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from train.loop import LoopOptions, fit
from vlm_jax import UserError

SGD, ADAM = {"train": optax.sgd(0.1)}, {"train": optax.adam(0.1)}


def batches(step: int) -> np.ndarray:
    """Two micro-batches."""
    return np.random.default_rng(step).normal(size=(2, 4, 3)).astype(np.float32)


def plain(w, batch, key):
    return jnp.mean((batch @ w - 2) ** 2)


def records(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_metrics_are_averaged_over_micro_batches_and_logged(tmp_path):
    def loss(w, batch, key):
        return plain(w, batch, key), {"largest": batch.max(), "ratio": batch.sum() / 0}

    trained = fit(loss, jnp.ones(3), batches, SGD, steps=2, folder=tmp_path, log_every=1)
    np.testing.assert_array_equal(trained.params, fit(plain, jnp.ones(3), batches, SGD, steps=2).params)
    for step, record in enumerate(records(tmp_path)):
        assert record["largest"] == pytest.approx(batches(step).max((1, 2)).mean())
        assert record["ratio"] is None  # not a number, which ends no training and is no JSON


def test_counters_pass_from_micro_batch_to_micro_batch_and_are_resumed(tmp_path):
    def loss(w, batch, key, counters):
        counters = {"rows": counters["rows"] + len(batch), "last": batch.max()}
        return plain(w, batch, key), {"rows": counters["rows"]}, counters

    def train(steps, folder=None):
        start = {"rows": jnp.int32(0), "last": jnp.float32(0)}
        options = LoopOptions(save_every=2) if folder else None
        return fit(loss, jnp.ones(3), batches, SGD, steps=steps, counters=start, folder=folder, options=options)

    whole = train(4)
    assert whole.counters["rows"] == 4 * 2 * 4 and whole.counters["last"] == batches(3)[1].max()
    np.testing.assert_array_equal(whole.params, fit(plain, jnp.ones(3), batches, SGD, steps=4).params)
    train(2, tmp_path)
    resumed = train(4, tmp_path)
    assert resumed.counters == whole.counters
    np.testing.assert_array_equal(resumed.params, whole.params)


def test_a_projection_follows_every_update():
    def unit(params):
        rows = params["w"] / jnp.linalg.norm(params["w"], axis=-1, keepdims=True)
        return {"w": rows, "frozen": params["frozen"] + 1}

    def loss(params, batch, key):
        return jnp.mean((batch @ params["w"].T - params["frozen"]) ** 2)

    def label(path):
        return "freeze" if path == "frozen" else "train"

    start = {"w": jnp.ones((5, 3)), "frozen": jnp.float32(2)}
    free = fit(loss, start, batches, SGD, label, steps=3).params["w"]
    after = fit(loss, start, batches, SGD, label, steps=3, project=unit).params
    np.testing.assert_allclose(np.linalg.norm(after["w"], axis=-1), 1, rtol=1e-6)
    assert np.abs(np.linalg.norm(free, axis=-1) - 1).min() > 0.1, "the control: rows change their norm"
    assert after["frozen"] == 2, "a projection cannot move what is frozen"
    once = fit(loss, start, batches, SGD, label, steps=1).params["w"]
    np.testing.assert_allclose(
        fit(loss, start, batches, SGD, label, steps=1, project=unit).params["w"],
        once / np.linalg.norm(once, axis=-1, keepdims=True),
        rtol=1e-6,
    )


MEMBERS = 4
#: A scale for each member's data, so that their gradients differ.
SCALES = jnp.array([1.0, 2.0, 3.0, 30.0])


def member_losses(w, batch, key):
    """A loss for each member: from ``w (M, 3)`` and data ``(4, M, 3)``."""
    return jax.vmap(lambda w, x, scale: jnp.mean((scale * x @ w - 2) ** 2), (0, 1, 0))(w, batch, SCALES)


def member_batches(step: int) -> np.ndarray:
    return np.random.default_rng(step).normal(size=(2, 4, MEMBERS, 3)).astype(np.float32)


def poisoned(step: int) -> np.ndarray:
    """Member 1 gets no number at one micro-batch of step 2 (the third), and good data again after it."""
    batch = member_batches(step)
    if step == 2:
        batch[1, 0, 1] = np.nan
    return batch


def train_members(data=member_batches, steps=6, transforms=ADAM, **changed):
    return fit(member_losses, jnp.ones((MEMBERS, 3)), data, transforms, steps=steps, members=MEMBERS, **changed)


def test_a_member_that_stops_being_a_number_does_not_disturb_the_others(tmp_path, capsys):
    healthy, hurt = train_members(), train_members(poisoned, folder=tmp_path, log_every=1)
    others = [0, 2, 3]
    np.testing.assert_array_equal(hurt.params[np.array(others)], healthy.params[np.array(others)])
    np.testing.assert_array_equal(hurt.params[1], train_members(steps=2).params[1])  # as before its third step
    assert np.abs(hurt.params[1] - healthy.params[1]).max() > 0
    assert hurt.alive.tolist() == [True, False, True, True] and healthy.alive.all()
    error = capsys.readouterr().err
    assert error.count("member 1 is not a number at step 3") == error.count("member") == 1
    log = records(tmp_path)
    assert [record["alive"] for record in log] == [4, 4, 3, 3, 3, 3]
    assert log[2]["losses"][1] is None and all(np.isfinite(log[2]["losses"][i]) for i in others)
    assert log[2]["loss"] == pytest.approx(np.mean([log[2]["losses"][i] for i in others]))


def test_a_lost_member_stays_lost_when_the_training_goes_on(tmp_path):
    options = LoopOptions(save_every=4)
    train_members(poisoned, steps=4, folder=tmp_path, options=options)
    resumed = train_members(poisoned, folder=tmp_path, options=options)
    whole = train_members(poisoned)
    np.testing.assert_array_equal(resumed.params, whole.params)
    assert resumed.alive.tolist() == whole.alive.tolist()


def test_without_members_the_training_ends():
    def loss(w, batch, key):
        return member_losses(w, batch, key).sum()

    with pytest.raises(UserError, match="the loss is nan at step 3"):
        fit(loss, jnp.ones((MEMBERS, 3)), poisoned, ADAM, steps=6, log_every=1)


def test_all_members_lost_end_the_training():
    def data(step):
        return member_batches(step) * (np.nan if step == 1 else 1)

    with pytest.raises(UserError, match="no member has a finite loss and gradient any more at step 2"):
        train_members(data)


def test_members_are_trainings_of_their_own():
    """The slow twin: each by itself, with clipping, which would couple them if the norm were of all."""
    together = train_members(clip=0.1, transforms=SGD).params
    for member in range(MEMBERS):

        def loss(w, batch, key, scale=SCALES[member]):
            return jnp.mean((scale * batch @ w - 2) ** 2)

        def data(step, member=member):
            return member_batches(step)[:, :, member]

        alone = fit(loss, jnp.ones(3), data, SGD, steps=6, clip=0.1).params
        np.testing.assert_allclose(together[member], alone, rtol=1e-5)

    def total(w, batch, key):
        return member_losses(w, batch, key).sum()

    coupled = fit(total, jnp.ones((MEMBERS, 3)), member_batches, SGD, steps=6, clip=0.1).params
    assert np.abs(coupled - together).max() > 1e-2, "the control: one norm of all members is another training"


def one_loss(w, batch, key):
    return jnp.mean(batch @ w.T)


def taken_name(w, batch, key):
    return one_loss(w, batch, key), {"loss": 1.0}


@pytest.mark.parametrize(
    ("loss", "members", "says"),
    [
        (member_losses, None, r"the loss has shape \(4,\) where \(\) is needed"),
        (one_loss, MEMBERS, r"the loss has shape \(\) where \(4,\) is needed"),
        (member_losses, 3, r"has shape \(4, 3\): give it a first axis of 3"),
        (taken_name, None, "a metric 'loss', a name that the log uses"),
    ],
)
def test_refusals(loss, members, says):
    with pytest.raises(UserError, match=says):
        fit(loss, jnp.ones((MEMBERS, 3)), member_batches, SGD, steps=1, members=members)
