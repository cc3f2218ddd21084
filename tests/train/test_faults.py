"""Trainings that something befalls: damaged and half-written checkpoints, no room, no numbers."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from full_disk import no_file_larger_than

from train.checkpoints import Checkpoints, checkpoint_folder
from train.loop import LoopOptions, fit, forget
from train.meter import About
from vlm_jax import UserError

ADAM = optax.adam(0.1)


def loss(w, batch, key):
    return jnp.mean((batch @ w - 2) ** 2) + 0 * jax.random.uniform(key)


def numbers(step: int) -> np.ndarray:
    return np.random.default_rng(step).normal(size=(1, 4, 1000)).astype(np.float32)


def train(folder=None, steps=6, batches=numbers, about=None, **changed):
    options = LoopOptions(**{"save_every": 2, **changed})
    how = {"steps": steps, "folder": folder, "options": options, "about": about}
    return fit(loss, jnp.ones(1000), batches, {"train": ADAM}, **how).params


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    """A training that ended after step 4, with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("kept")
    train(folder, steps=4)
    assert steps_in(folder) == [2, 4]
    return folder


@pytest.fixture
def stopped(kept, tmp_path) -> Path:
    return shutil.copytree(kept, tmp_path / "stopped")


@pytest.fixture(scope="module")
def whole() -> np.ndarray:
    return np.asarray(train())


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir())


def data_of(folder: Path, step: int) -> Path:
    """The file that holds a checkpoint's numbers."""
    files = [path for path in (folder / "checkpoints" / str(step)).rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def emptied(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def removed(file: Path) -> None:
    file.unlink()


@pytest.mark.parametrize("damage", [cut_short, emptied, removed])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken_when_told(damage, stopped, whole):
    damage(data_of(stopped, 4))
    with pytest.raises(UserError) as raised:
        train(stopped)
    said = str(raised.value)
    assert "checkpoints/4 cannot be read (" in said and "--fall-back goes on from the one before it, of step 2" in said
    assert "\n" not in said
    assert steps_in(stopped) == [2, 4]  # refused, nothing touched
    np.testing.assert_array_equal(train(stopped, fall_back=True), whole)
    assert steps_in(stopped) == [4, 6]


def test_numbers_that_changed_are_seen_by_their_checksum(stopped):
    """A file that reads well but is not what was saved: here a checkpoint with another's sums."""
    state = jnp.arange(3.0)
    at = checkpoint_folder(stopped / "other", None)
    with Checkpoints(at) as checkpoints:
        checkpoints.save(1, state)
    with Checkpoints(at) as checkpoints:
        np.testing.assert_array_equal(checkpoints.restore(state)[0], state)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("train.checkpoints._sums", lambda leaves: np.zeros((len(leaves), 2), np.uint32))
            with pytest.raises(UserError, match="an array is not what was saved"):
                checkpoints.restore(state)


def test_nothing_to_fall_back_to(tmp_path):
    train(tmp_path, steps=2)
    cut_short(data_of(tmp_path, 2))
    with pytest.raises(UserError, match="delete it to begin again"):
        train(tmp_path, fall_back=True)


def test_a_half_written_checkpoint_is_not_there(stopped, whole):
    """What a process leaves that was killed while it wrote step 6: files under a name that is not its final one."""
    shutil.copytree(stopped / "checkpoints/4", stopped / "checkpoints/6.orbax-checkpoint-tmp-1")
    cut_short(max((stopped / "checkpoints/6.orbax-checkpoint-tmp-1").rglob("*"), key=lambda p: p.stat().st_size))
    np.testing.assert_array_equal(train(stopped), whole)


def test_a_loss_that_is_no_number_names_its_examples_and_the_state_before_is_kept(stopped, whole):
    """Step 6 is given a number that is none; nothing is logged before the end, yet the right step is named."""

    def poisoned(step):
        return numbers(step) * (np.nan if step == 4 else 1)

    about = About(ids=lambda step: [f"q{step}", f"r{step}"])
    with pytest.raises(UserError) as raised:
        train(stopped, batches=poisoned, about=about)
    said = str(raised.value)
    assert "the loss is nan at step 5 (examples q4, r4)" in said and said.endswith("; the checkpoint of step 4 is kept")
    assert steps_in(stopped) == [2, 4]
    np.testing.assert_array_equal(train(stopped), whole)


def test_no_room_for_a_checkpoint(stopped, whole):
    with no_file_larger_than(2000), pytest.raises(UserError, match=r"cannot write a checkpoint to .*: free the disk"):
        train(stopped)
    np.testing.assert_array_equal(train(stopped), whole)


def test_no_room_for_the_log(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"cannot write .*metrics.jsonl \(No space left on device\)"):
        train(tmp_path)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write checkpoints to .*/file/checkpoints"):
        train(tmp_path / "file")


def test_checkpoints_elsewhere(tmp_path, whole, capsys):
    """A bucket is a folder of another kind: both go through etils and TensorStore."""
    folder, elsewhere = tmp_path / "run", tmp_path / "bucket"
    folder.mkdir()
    options = {"checkpoints": f"{elsewhere}"}
    train(folder, steps=4, **options)
    assert not (folder / "checkpoints").exists()
    np.testing.assert_array_equal(train(folder, **options), whole)
    found = list(elsewhere.rglob("checkpoints"))
    assert len(found) == 1 and str(folder).strip("/") in str(found[0])
    forget(folder, LoopOptions(**options))
    assert not found[0].exists()
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [4, 6]
    assert "begins at step 0" not in capsys.readouterr().err
    np.testing.assert_array_equal(train(folder, **options), whole)  # nobody is left to wonder why
    assert f"no checkpoint in {found[0]}, begins at step 0" in capsys.readouterr().err
