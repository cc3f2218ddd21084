"""Every public dataset, through the code that reads the hub's, on synthetic copies of the repositories."""

import dataclasses
import io
import itertools
import json
import shutil
from pathlib import Path

import datasets
import hub_folders
import numpy as np
import pytest
from datasets import Features, Image, Value
from PIL import Image as Pictures

from vlm_jax.data import catalogue, load_task, loading, source, specs, task_names
from vlm_jax.data.images import LazyImages
from vlm_jax.data.options import DataOptions
from vlm_jax.data.overlap import check_disjoint
from vlm_jax.data.records import as_texts, commonest_first, missing
from vlm_jax.data.splits import SplitRow, deal
from vlm_jax.errors import UserError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """All synthetic copies."""
    folder = tmp_path_factory.mktemp("root")
    for write in dict.fromkeys(hub_folders.WRITERS.values()):
        write(folder)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """A cache of the tests' own, and no way to the network."""
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "cache")
    assert datasets.config.HF_HUB_OFFLINE
    loading._opened.cache_clear()
    loading._index.cache_clear()


def pixels(images):
    return [np.asarray(image) for image in images]


def drawn(seed, **how):
    """What :func:`hub_folders.picture` shows, decoded here."""
    return np.asarray(Pictures.open(io.BytesIO(hub_folders.picture(seed, **how))).convert("RGB"))


#: name -> (row of the split "all", seed of its picture, what the example is)
EXPECTED = {
    "ok-vqa": (1, [1], {
        "id": "ok-vqa/val2014/1001", "question": "What is number 1?",
        "answers": ("answer 1",) * 6 + ("other",) * 3 + ("rare",),
        "metric": "vqa_accuracy", "subtask": "four", "family": "knowledge",
    }),
    "a-okvqa": (2, [202], {
        "id": "a-okvqa/validation/validation2", "question": "Which one is 2?\nChoices:\n- red\n- green\n- blue\n- grey",
        "answers": ("blue",), "choices": ("red", "green", "blue", "grey"), "gold": 2, "family": "knowledge",
        "metric": "multiple_choice",
    }),
    "scienceqa": (3, [503], {
        "id": "scienceqa/test/3", "question": "Look closely.\nWhich is fact 3?\nChoices:\n- yes, it is\n- no",
        "answers": ("no",), "gold": 1, "subtask": "Maps", "family": "knowledge",
    }),
    "docvqa": (5, [401], {
        "id": "docvqa/validation/5", "question": "What is on line 5?", "answers": ("line 5", "Line 5"),
        "metric": "anls", "image_id": "docvqa/doc0/1", "subtask": "handwritten, form", "family": "perception",
    }),
    "infographicvqa": (7, [501], {
        "id": "infographicvqa/validation/7", "answers": ("7",), "metric": "anls", "family": "perception",
        "image_id": "infographicvqa/https://example.org/1.png",
    }),
    "textvqa": (0, [700], {
        "id": "textvqa/validation/100", "answers": ("sign 0",) * 6 + ("stop",) * 3 + ("rare",),
        "image_id": "textvqa/64", "family": "perception", "metric": "vqa_accuracy",
    }),
    "mmbench": (0, [700], {
        "id": "mmbench/dev/0", "question": "A hint.\nWhere is 0?\nChoices:\n- left\n- right", "answers": ("left",),
        "choices": ("left", "right"), "gold": 0, "group": "0", "metric": "circular", "subtask": "spatial",
    }),
    "vqav2": (4, [801], {
        "id": "vqav2/validation/7004", "answers": ("2",) * 6 + ("3",) * 3 + ("rare",), "image_id": "vqav2/71",
        "subtask": "number", "metric": "vqa_accuracy",
    }),
    "vsr": (3, [963], {
        "id": "vsr/test/3", "question": "The cat is left of dog 3. Please answer yes or no.", "answers": ("yes",),
        "image_id": "vsr/000000000063.jpg", "subtask": "left of", "metric": "yes_no",
    }),
    "pope": (7, [1001], {
        "id": "pope/test/7", "answers": ("yes",), "image_id": "pope/COCO_val2014_1", "subtask": "random",
        "metric": "pope",
    }),
    "mme": (3, [1101], {
        "id": "mme/test/3", "question": "Is it 3? Please answer yes or no.", "answers": ("No",), "metric": "mme",
        "group": "code_reasoning/0001.png", "subtask": "code_reasoning",
    }),
    "mmstar": (4, [1204], {
        "id": "mmstar/val/4", "question": "Which colour?\nOptions: A: red, B: green, blue, C: grey, D: none",
        "answers": ("C",), "choices": None, "gold": 2, "metric": "multiple_choice", "subtask": "math",
    }),
    "mmmu": (5, [1351, 1352, 1353], {
        "id": "mmmu/validation/validation_Art_5", "answers": ("the second",), "gold": 1,
        "choices": ("it's \"A\"", "the second", "<image 3>"), "subtask": "History",
        "question": "Compare <image 1> and <image 2>.\nChoices:\n- it's \"A\"\n- the second\n- <image 3>",
    }),
    "seedbench": (3, [1605], {
        "id": "seedbench/test/5", "question": "How many?\nChoices:\n- one\n- two\n- three\n- four",
        "answers": ("four",), "gold": 3, "subtask": "5",
    }),
    "snli-ve": (4, [1802], {
        "id": "snli-ve/test/4", "answers": ("neutral",), "gold": 1, "image_id": "snli-ve/2.jpg",
        "choices": ("entailment", "neutral", "contradiction"),
    }),
    "cifar-10": (2, [3002], {"id": "cifar-10/test/2", "answers": ("bird",), "gold": 2}),
    "cifar-100": (9, [3009], {"answers": ("class 9",), "gold": 9}),
    "mnist": (7, [], {"answers": ("7",), "choices": tuple("0123456789"), "gold": 7}),
    "vision-flan": (6, [4006], {
        "id": "vision-flan/train/task_6", "question": "Where is box 6?", "answers": ("[0.1, 0.2]",),
        "subtask": "boxes", "image_id": "vision-flan/task_6.png",
    }),
    "cc-sbu-align": (8, [], {
        "id": "cc-sbu-align/train/8", "question": "Describe this image in detail.",
        "answers": ("Picture 8 shows noise.",),
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", catalogue.DATASETS)
def test_every_dataset_is_read(root, name):
    row, seeds, expected = EXPECTED[name]
    options = DataOptions(data_root=root)
    whole = load_task(name, split="all", options=options)
    example = whole[row]
    assert {field: getattr(example, field) for field in expected} == expected
    assert example.task == name and len(example.images) == len(seeds or [0])
    assert {image.mode for image in example.images} == {"RGB"}
    kind = "JPEG" if name == "vsr" else "PNG"
    for image, seed in zip(example.images, seeds, strict=bool(seeds)):
        np.testing.assert_array_equal(np.asarray(image), drawn(seed, kind=kind))
    # Our splits are made of the same examples, share no image, and are the same when the dataset is streamed.
    found = {}
    for split, (_, size) in catalogue.DATASETS[name].splits.items():
        count = len(loading._index(catalogue.DATASETS[name], root, False).numbers[split])
        found[split] = load_task(name, split=split, limit=min(count, size), options=options)
        streamed = load_task(name, split=split, limit=min(count, 4), options=dataclasses.replace(options, stream=True))
        for one, other in zip(found[split], streamed, strict=False):
            assert dataclasses.replace(one, images=()) == dataclasses.replace(other, images=())
            assert all((a == b).all() for a, b in zip(pixels(one.images), pixels(other.images), strict=True))
    by_id = {e.id: e for e in whole}
    same = [e for part in found.values() for e in part if e.id in by_id]
    assert len(same) >= len(found["test"])
    for e in same:
        assert dataclasses.replace(e, images=()) == dataclasses.replace(by_id[e.id], images=())
        assert all((a == b).all() for a, b in zip(pixels(e.images), pixels(by_id[e.id].images), strict=True))
    for one, other in itertools.combinations(found.values(), 2):
        assert not {e.image_id for e in one} & {e.image_id for e in other}
        check_disjoint(one, other)
    assert len({e.id for part in found.values() for e in part}) == sum(map(len, found.values())) > 10


def test_the_table_covers_every_dataset():
    assert EXPECTED.keys() == hub_folders.WRITERS.keys() == catalogue.DATASETS.keys()
    for spec in catalogue.DATASETS.values():
        assert sum(size for _, size in spec.splits.values()) <= (sum(spec.rows.values()) or 10**6)
        assert set(spec.splits) <= set(specs.P0_SIZES) and spec.splits["test"]
    six = [spec for spec in catalogue.DATASETS.values() if spec.family]
    assert len(six) == 6
    p0 = {"trace": 1000, "train": 3000, "test": 1000}
    assert all({k: spec.splits[k].size for k in p0} == p0 for spec in six if spec.name != "infographicvqa")
    assert catalogue.DATASETS["infographicvqa"].splits["train"].size == 1500


# How choices are shown.


@pytest.mark.parametrize(
    "name, row, choices, question, answers, metric",
    [
        ("a-okvqa", 1, "hidden", "Which one is 1?", ("green",) * 6 + ("lime",) * 3 + ("rare",), "vqa_accuracy"),
        ("scienceqa", 1, "hidden", "Which is fact 1?", ("no",), "exact_match"),
        (
            "scienceqa", 0, "lettered",
            "Look closely.\nWhich is fact 0?\nA. a\nB. b\nC. c\nD. d\nE. e\n"
            "Answer with the option's letter from the given choices directly.",
            ("A",), "multiple_choice",
        ),
        (
            "mmbench", 1, "lettered",
            "A hint.\nWhere is 0?\nA. right\nB. left\nAnswer with the option's letter from the given choices directly.",
            ("B",), "circular",
        ),
        ("mmmu", 0, "lettered", "Compare <image 1> and <image 2>.", ("4", "four"), "exact_match"),
        ("mmstar", 0, "hidden", "Which colour?\nOptions: A: red, B: green, blue, C: grey, D: none", ("C",),
         "multiple_choice"),
    ],
)  # fmt: skip
def test_choices(root, name, row, choices, question, answers, metric):
    example = load_task(name, split="all", options=DataOptions(root, choices))[row]
    assert (example.question, example.answers, example.metric) == (question, answers, metric)


def test_a_hundred_choices_have_no_letters(root):
    with pytest.raises(UserError, match="100 choices, too many for letters"):
        load_task("cifar-100", split="test", limit=1, options=DataOptions(root, "lettered"))


# Oddities.


@pytest.mark.parametrize("index", [hub_folders.WHOLE, hub_folders.TEXT], ids=["numbers", "strings"])
def test_rotations_are_one_group(tmp_path, index):
    hub_folders.mmbench(tmp_path, index)
    options = DataOptions(tmp_path, "lettered")
    found = load_task("mmbench", split="all", options=options)
    groups = {e.group for e in found}
    assert groups == {str(i) for i in range(8)} and len({e.id for e in found}) == len(found) == 24
    for group in groups:
        rotations = [e for e in found if e.group == group]
        assert len(rotations) == len(rotations[0].choices) == (4 if int(group) % 2 else 2)
        assert len({e.choices[e.gold] for e in rotations}) == 1
        assert {e.answers[0] for e in rotations} == set("ABCD"[: len(rotations)])
    # No split has a part of a group.
    parts = loading._index(catalogue.DATASETS["mmbench"], tmp_path, False).numbers
    for numbers in parts.values():
        rows = [found[number].group for number in numbers]
        assert all(rows.count(group) == (4 if int(group) % 2 else 2) for group in rows)


def test_base64_images(tmp_path):
    hub_folders.mmbench_base64(tmp_path)
    example = load_task("mmbench_en_dev", options=DataOptions(tmp_path))[0]
    np.testing.assert_array_equal(np.asarray(example.images[0]), drawn(9))
    assert example.choices == ("up", "down") and example.question.startswith("Where?\n")


def test_unusual_modes(root):
    """CMYK in a JPEG, and grey pictures."""
    first = load_task("ok-vqa", split="all", limit=1, options=DataOptions(root))[0]
    np.testing.assert_array_equal(np.asarray(first.images[0]), drawn(0, mode="CMYK", kind="JPEG"))
    digit = load_task("mnist", split="all", limit=1, options=DataOptions(root))[0]
    np.testing.assert_array_equal(np.asarray(digit.images[0]), drawn(3000, mode="L"))


def test_images_are_decoded_when_read():
    read = []

    def file():
        read.append(1)
        return hub_folders.picture(0)

    images = LazyImages([file, file], "here")
    assert len(images) == 2 and read == []
    assert images[1].size == (6, 4) and len(read) == 1
    assert len(images[:1]) == 1 and len(list(images)) == 2 and len(read) == 3
    with pytest.raises(IndexError):
        images[2]
    for broken, says in ((b"", "no image"), (b"no picture", "no image"), (hub_folders.picture(0)[:60], "truncated")):
        with pytest.raises(UserError, match=f"^here, image 2: .*{says}"):
            LazyImages([file, lambda broken=broken: broken], "here")[1]


def test_pictures_are_upright():
    """A camera's orientation is applied, as by datasets."""
    out = io.BytesIO()
    picture = Pictures.open(io.BytesIO(hub_folders.picture(0)))
    exif = Pictures.Exif()
    exif[0x0112] = 6
    picture.save(out, "PNG", exif=exif)
    assert LazyImages([out.getvalue], "here")[0].size == (4, 6)


def test_texts_of_every_form():
    assert as_texts(["a", None, "b"]) == ("a", "b")
    assert as_texts("['it\\'s', \"b\"]", written=True) == ("it's", "b")
    assert as_texts('["a", "b"]', written=True) == as_texts([{"answer": "a"}, {"answer": "b"}]) == ("a", "b")
    assert as_texts("['a", written=True) == ("['a",) and as_texts("12") == ("12",) and as_texts(None) == ()
    assert as_texts('["a", "b"]') == ('["a", "b"]',)  # a text that looks like a list
    assert as_texts([3, 0, 2.5, True, False]) == ("3", "0", "2.5", "true", "false")
    assert as_texts(0) == ("0",) and as_texts(2.5) == ("2.5",) and as_texts(True) == ("true",)
    with pytest.raises(TypeError):
        as_texts([["a"]])
    assert commonest_first(["b", "a", "", "", "", "a", "b", "c"]) == ("b", "b", "a", "a", "c", "", "", "")
    assert [missing(v) for v in (None, "", " ", "nan", float("nan"))] == [True] * 5
    assert not any(missing(v) for v in (0, "no", "banana"))


# Splits.


def rows_of(images, first=0):
    return [SplitRow(first + n, f"id{first + n}", image, f"id{first + n}") for n, image in enumerate(images)]


def test_splits_fill_and_share_no_image():
    rows = rows_of([f"image{n // 4}" for n in range(400)])
    sizes = {"trace": 50, "train": 150, "test": 50}
    dealt = deal(rows, sizes, {})
    assert {name: len(numbers) for name, numbers in dealt.items()} == sizes
    shown = {name: {n // 4 for n in numbers} for name, numbers in dealt.items()}
    assert not (shown["trace"] & shown["train"] or shown["trace"] & shown["test"] or shown["train"] & shown["test"])
    assert deal(rows[::-1], sizes, {}).keys() == dealt.keys()
    assert {n: sorted(x // 4 for x in p)[:9] for n, p in deal(rows[::-1], sizes, {}).items()} == {
        n: sorted(x // 4 for x in p)[:9] for n, p in dealt.items()
    }  # fmt: skip
    # An image that another pool has given away goes nowhere else.
    kept = deal(rows, sizes, {f"image{n}": "test" for n in shown["train"]})
    assert not {n // 4 for n in kept["train"] + kept["trace"]} & shown["train"]


def test_a_small_pool_fills_all_splits_in_proportion():
    dealt = deal(rows_of(map(str, range(100))), {"trace": 1000, "train": 3000, "test": 1000}, {})
    assert {name: len(numbers) for name, numbers in dealt.items()} == {"trace": 20, "train": 60, "test": 20}


def test_another_seed_deals_anew(monkeypatch):
    rows, sizes = rows_of(map(str, range(100))), {"trace": 20, "test": 20}
    before = deal(rows, sizes, {})
    assert deal(rows, sizes, {}) == before
    monkeypatch.setattr("vlm_jax.data.splits.SPLIT_SEED", 1)
    assert deal(rows, sizes, {}) != before


def test_splits_do_not_change():
    """These are anybody's splits: a change of the rule would make results incomparable."""
    dealt = deal(rows_of(map(str, range(12))), {"trace": 2, "test": 2}, {})
    assert dealt == {"trace": [7, 9], "test": [10, 4]}


def test_pictures_shared_by_the_hubs_splits(root):
    """ScienceQA's synthetic copy shows one picture in all three: whichever split got it, no other did."""
    first = load_task("scienceqa", split="all", limit=1, options=DataOptions(root))[0]
    owners = {
        split
        for split in ("trace", "train", "eval", "test")
        for e in load_task("scienceqa", split=split, limit=8, options=DataOptions(root))
        if e.image_id == first.image_id
    }
    assert owners <= {"test"}
    index = loading._index(catalogue.DATASETS["scienceqa"], root, False)
    assert sum(len(part) for part in index.numbers.values()) == 10 + 9 + 29


# Names.


def test_lmms_tasks_are_all_rows_in_order(root):
    options = DataOptions(root)
    whole = load_task("docvqa_val", split="nonsense", options=options)
    assert [e.id for e in whole] == [f"docvqa/validation/{i}" for i in range(80)]
    assert {e.task for e in whole} == {"docvqa_val"}
    assert [e.id for e in load_task("docvqa_val", limit=2, options=options)] == [e.id for e in whole[:2]]
    lite = load_task("ok_vqa_val2014_lite", options=options)
    assert len(lite) == 3 and lite[0].answers[0] == "answer 0"
    # The names of a dataset and of its task may be the same: then the split counts.
    assert len(load_task("pope", split="all", options=options)) == 36
    assert len(load_task("pope", split="test", limit=5, options=options)) == 5


def test_p0_families_take_their_datasets_in_turn(root):
    options = DataOptions(root)
    found = load_task("p0-knowledge", split="trace", limit=7, options=options)
    assert [e.task for e in found] == ["ok-vqa", "a-okvqa", "scienceqa"] * 2 + ["ok-vqa"]
    assert {e.family for e in found} == {"knowledge"}
    found = load_task("p0-perception", split="test", limit=6, options=options)
    assert [e.task for e in found] == ["docvqa", "infographicvqa", "textvqa"] * 2
    assert found[0].id == load_task("docvqa", split="test", limit=1, options=options)[0].id
    with pytest.raises(UserError, match="ok-vqa has too few labelled rows for a split 'eval': use trace 1,000"):
        load_task("p0-knowledge", split="eval", options=options)


def test_families_are_cut_to_the_smallest(monkeypatch):
    asked = []

    def read(spec, split, limit, options, bad):
        asked.append((spec.name, limit))
        return [spec.name] * limit

    monkeypatch.setattr(loading, "_read_split", read)
    assert len(loading.load_named("p0-perception", "train", None, DataOptions())) == 4500
    assert asked == [("docvqa", 1500), ("infographicvqa", 1500), ("textvqa", 1500)]
    assert len(loading.load_named("p0-perception", "train", 9999, DataOptions())) == 4500
    assert len(loading.load_named("p0-perception", "train", 100, DataOptions())) == 100


def test_what_resolved_is_told(root, tmp_path):
    options = DataOptions(root)
    found = source("ok-vqa", options=options)
    assert found["dataset"] == str(root / "lmms-lab-encoder/OK-VQA") and found["revision"] is None
    assert found["rows"] == {"val2014": 40} and found["splits"] == {"trace": 8, "train": 24, "test": 8}
    assert source("docvqa_val", options=options)["rows"] == {"validation": 80}
    assert source("p0-knowledge", split="test", options=options)["ok-vqa"] == found
    hub_folders.ok_vqa(tmp_path)  # the same rows elsewhere
    assert source("ok-vqa", options=DataOptions(tmp_path))["fingerprint"] == found["fingerprint"]
    assert source("mini-okvqa")["dataset"] == "miniworld"
    assert source("docvqa", options=options)["fingerprint"] != found["fingerprint"]


def test_a_name_without_its_owner_will_do(root, tmp_path):
    (tmp_path / "OK-VQA").symlink_to(root / "lmms-lab-encoder/OK-VQA")
    assert len(load_task("ok-vqa", split="test", limit=8, options=DataOptions(tmp_path))) == 8


def test_revision_is_read_off_the_files():
    class Builder:
        hash = "0" * 64

        class config:
            data_files = {"train": ["hf://datasets/a/b@0123456789abcdef0123456789abcdef01234567/x.parquet"]}  # noqa: RUF012

    from vlm_jax.data.hub import _revision

    assert _revision(Builder, None) == "0123456789abcdef0123456789abcdef01234567"
    Builder.config.data_files = None
    assert _revision(Builder, None) is None
    Builder.hash = "f" * 40  # a cached copy is named by its commit
    assert _revision(Builder, None) == "f" * 40


# Bad input.


def test_unknown_names(root):
    with pytest.raises(UserError, match="unknown task 'docvq'; did you mean 'docvqa'"):
        load_task("docvq")
    with pytest.raises(UserError, match="unknown split 'trian' of docvqa; did you mean 'train'"):
        load_task("docvqa", split="trian", options=DataOptions(root))
    assert {"ok-vqa", "docvqa_val", "p0-knowledge", "easy-vqa", "mini-okvqa"} <= set(task_names())
    assert len(set(task_names())) == len(task_names())


@pytest.mark.parametrize("stream", [False, True])
def test_a_hub_that_cannot_be_reached(stream):
    with pytest.raises(UserError) as error:
        load_task("docvqa", split="test", options=DataOptions(stream=stream))
    message = str(error.value)
    for part in ("lmms-lab-encoder/DocVQA (", "lmms-lab/DocVQA (", "HF_HUB_OFFLINE", "HF_DATASETS_CACHE"):
        assert part in message
    assert "--data-root ROOT" in message and "ROOT/lmms-lab-encoder/DocVQA" in message and "\n" not in message


def test_a_local_copy_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"docvqa is not under --data-root: put a copy .*lmms-lab-encoder/DocVQA or "):
        load_task("docvqa", split="test", options=DataOptions(tmp_path))
    (tmp_path / "DocVQA").mkdir()
    with pytest.raises(UserError, match=r"docvqa could not be read from .*DocVQA \(.*\): repair the copy"):
        load_task("docvqa", split="test", options=DataOptions(tmp_path))


@pytest.mark.parametrize("name", ["vsr", "vision-flan", "cc-sbu-align"])
def test_images_that_are_not_on_the_hub(name):
    with pytest.raises(UserError, match=f"{name}'s images are not in its repository: give --data-root ROOT"):
        load_task(name, split="test")


def test_a_missing_file_is_named(tmp_path):
    hub_folders.vsr(tmp_path)
    (tmp_path / "cambridgeltl/vsr_random/images/000000000060.jpg").unlink()
    example = load_task("vsr", split="all", limit=1, options=DataOptions(tmp_path))[0]
    with pytest.raises(UserError, match=r"^vsr/test/0, image 1: .*images/000000000060.jpg does not exist: put"):
        example.images[0]


def test_another_schema(tmp_path):
    row = {"question_id": "1", "image": hub_folders.embedded(0), "text": "What?", "answers": "a"}
    features = {"question_id": Value("string"), "image": Image(), "text": Value("string"), "answers": Value("string")}
    hub_folders.write(tmp_path, "lmms-lab-encoder/OK-VQA", {"val2014": [row]}, features)
    with pytest.raises(UserError) as error:
        load_task("ok-vqa", split="test", limit=1, options=DataOptions(tmp_path))
    message = str(error.value)
    assert "expected columns answers, image, question, question_id, question_type" in message
    assert "found question_id, image, text, answers, lacks question, question_type" in message


def test_a_label_that_is_no_class(tmp_path):
    row = {"image": hub_folders.embedded(0), "label": 3}
    for split in ("train", "test"):
        hub_folders.write(tmp_path / split, "ylecun/mnist", {"test": [row]}, {"image": Image(), "label": Value("int8")})
    with pytest.raises(UserError, match="expected a ClassLabel in the column label, found"):
        load_task("mnist", split="all", options=DataOptions(tmp_path / "test"))


def test_a_cell_of_another_type(tmp_path):
    row = dict.fromkeys(("question_id", "question", "choices", "correct_choice_idx", "direct_answers"), "x")
    row["choices"] = "['a', 'b']"
    features = dict.fromkeys(row, Value("string")) | {"image": Image()}
    rows = [row | {"image": hub_folders.embedded(0)}]
    hub_folders.write(tmp_path, "HuggingFaceM4/A-OKVQA", {"validation": rows}, features)
    with pytest.raises(UserError, match=r"row 0 of .*A-OKVQA, split 'validation': its choices is .*, not a list"):
        load_task("a-okvqa", split="all", options=DataOptions(tmp_path))


def test_a_split_that_is_not_there(tmp_path):
    hub_folders.docvqa(tmp_path)
    readme = tmp_path / "lmms-lab-encoder/DocVQA/README.md"
    readme.write_text(readme.read_text().replace("split: validation", "split: val"))
    with pytest.raises(UserError, match=r"docvqa: .* has no split 'validation'; known: test, val"):
        load_task("docvqa", split="test", options=DataOptions(tmp_path))


def test_withheld_answers(root):
    options = DataOptions(root)
    with pytest.raises(UserError, match=r"row 0 of .*DocVQA, split 'test', has no answer .*choose a split"):
        load_task("docvqa_test", options=options)
    with pytest.raises(UserError, match=r"textvqa_test: no row of .* has an answer"):
        load_task("textvqa_test", options=options)
    # One row of the validation split has ten empty answers, and is left out.
    assert len(load_task("textvqa_val", options=options)) == 11
    # The test split of A-OKVQA, as anybody who edits its spec would read it.
    spec = dataclasses.replace(catalogue.DATASETS["a-okvqa"], splits={"test": specs.Split("test", 4)})
    with pytest.raises(UserError, match=r"row 0 of .*A-OKVQA, split 'test', has no answer"):
        loading._read_split(spec, "test", 1, options)


def test_too_few_rows(root):
    with pytest.raises(UserError, match="40 labelled rows in its split 'val2014', which gives 8 examples for 'test' i"):
        load_task("ok-vqa", split="test", options=DataOptions(root))
    with pytest.raises(UserError, match="8 examples for 'test' instead of 9: ask for fewer"):
        load_task("ok-vqa", split="test", limit=9, options=DataOptions(root))
    assert len(load_task("ok-vqa", split="test", limit=8, options=DataOptions(root))) == 8


# Folders.


def test_a_folder_of_parquet(tmp_path):
    rows = [
        {"id": i, "image": hub_folders.embedded(i), "question": f"Q{i}?", "choices": ["x", "y"], "answer": "AB"[i % 2]}
        for i in range(4)
    ]
    features = {"id": Value("int64"), "image": Image(), "question": Value("string"), "answer": Value("string")}
    features["choices"] = Features({"c": [Value("string")]})["c"]
    folder = hub_folders.write(tmp_path, "mine", {"test": rows, "train": rows[:2]}, features)
    found = load_task(folder, split="test", options=DataOptions(choices="lettered"))
    assert [(e.task, e.id, e.answers) for e in found[:2]] == [
        ("mine", "mine/test/0", ("A",)),
        ("mine", "mine/test/1", ("B",)),
    ]
    np.testing.assert_array_equal(np.asarray(found[3].images[0]), drawn(3))
    assert len(load_task(folder, split="train")) == 2
    with pytest.raises(UserError, match=r"unknown split 'trace' of .*mine"):
        load_task(folder, split="trace")
    assert source(folder, split="test")["rows"] == {"test": 4}


def test_a_folder_of_lines(tmp_path):
    """With the names of image files; the only split will do for any."""
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/a.png").write_bytes(hub_folders.picture(5))
    hub_folders.write_lines(
        tmp_path / "data.jsonl", [{"question": "What?", "answers": ["noise", "Noise"], "image": "pictures/a.png"}]
    )
    (example,) = load_task(str(tmp_path), split="trace")
    assert (example.answers, example.metric) == (("noise", "Noise"), "exact_match")
    np.testing.assert_array_equal(np.asarray(example.images[0]), drawn(5))


ANIMALS = ["Cat", "Dog", "Bear", "Ape"]


def folder_of(folder, rows):
    """The examples of a folder with these rows as JSON lines."""
    hub_folders.write_lines(folder / "data.jsonl", [{"question": "What?"} | row for row in rows])
    return load_task(folder)


@pytest.mark.parametrize(
    "choices, answer, right",
    [
        (ANIMALS, "Bear", ["Bear"]),
        (ANIMALS, "bear ", ["Bear"]),
        (ANIMALS, "B", ["Dog"]),
        (ANIMALS, "(b)", ["Dog"]),
        (ANIMALS, 2, ["Bear"]),
        (ANIMALS, "2", ["Bear"]),
        (ANIMALS, ["B", "D"], ["Dog", "Ape"]),
        (ANIMALS, [1, 3], ["Dog", "Ape"]),
        (["red", "", "blue", "green"], "C", ["blue"]),
        (["red", "", "blue", "green"], 2, ["blue"]),
        (["red", None, "blue", "green"], "blue", ["blue"]),
        (["red", "blue", ""], "B", ["blue"]),
        (["10", "20", "30"], "20", ["20"]),
        (["x", "X", "y"], "X", ["X"]),
        ([10, 20, 30], 2, ["30"]),
        ([1.5, 2.5], "A", ["1.5"]),
    ],
)
def test_a_users_right_options(tmp_path, choices, answer, right):
    """The reading that is the only one possible, whatever the form."""
    (example,) = folder_of(tmp_path, [{"choices": choices, "answer": answer}])
    assert list(example.answers) == right
    assert example.metric == ("multiple_choice" if len(right) == 1 else "exact_match")
    assert example.gold is None or example.choices[example.gold] == right[0]
    assert "- \n" not in example.question and not example.question.endswith("- ")


def test_all_rows_together_decide_the_form(tmp_path):
    """ "2" is one option's text and another's index: only the other row tells which is meant."""
    options = ["1", "2", "3", "4"]
    texts = folder_of(tmp_path / "texts", [{"choices": options, "answer": a} for a in ("2", "4")])
    assert [e.answers for e in texts] == [("2",), ("4",)]
    indices = folder_of(tmp_path / "indices", [{"choices": options, "answer": a} for a in ("2", "0")])
    assert [e.answers for e in indices] == [("3",), ("1",)]


@pytest.mark.parametrize(
    "rows, says",
    [
        ([(ANIMALS, "Bear"), (ANIMALS, "BD")], "row 1 of .*'BD' is neither .* options .* letter, nor its index"),
        ([(ANIMALS, "E")], "row 0 of .*'E' is neither"),
        ([(ANIMALS, "4")], "row 0 of .*'4' is neither"),
        ([(ANIMALS, "-1")], "row 0 of .*'-1' is neither"),
        ([(ANIMALS, "Be")], "row 0 of .*'Be' is neither"),
        ([(["red", "", "blue"], "B")], "row 0 of .*'B' is neither"),
        ([(["x", "x", "y"], "x")], "row 0 of .*several of its options have the text 'x': write its letter"),
        ([(ANIMALS, ["B", "Dog"])], "row 0 of .* states its answers 'B', 'Dog' in several ways"),
        ([(ANIMALS, "Bear"), (ANIMALS, "B")], "row 1 of .*'B' in another way than the rows before"),
        ([(["1", "2", "3"], "1"), (["1", "2", "3"], "2")], "row 0 of .*'1' can be read as index or option"),
        ([(ANIMALS, [1, 9])], "row 0 of .*1, 9 is neither"),
        ([("A. cat\nB. dog", "A")], "row 0 of .*: its choices is 'A. cat.*', not a list: write a list of texts"),
        ([({"text": ["cat", "dog"], "label": ["A", "B"]}, "A")], "row 0 of .*: its choices is .*, not a list"),
        ([({"A": "cat", "B": "dog"}, "A")], "row 0 of .*: its choices is .*, not a list"),
    ],
)  # fmt: skip
def test_answers_that_cannot_be_read(tmp_path, rows, says):
    with pytest.raises(UserError, match=says) as error:
        folder_of(tmp_path, [{"choices": choices, "answer": answer} for choices, answer in rows])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "value, text",
    [
        ("['a', 'b']", "['a', 'b']"),
        (3, "3"),
        (0, "0"),
        (2.5, "2.5"),
        (3.0, "3"),
        (True, "true"),
    ],
)
def test_folders_and_lines_agree_on_answers(tmp_path, value, text):
    (example,) = folder_of(tmp_path / "folder", [{"answer": value}])
    line = {"id": 7, "image": [], "question": "What?", "answers": value}
    (tmp_path / "lines.jsonl").write_text(json.dumps(line))
    (other,) = load_task(tmp_path / "lines.jsonl")
    assert example.answers == other.answers == (text,) and other.id == "7"


def test_whole_numbers_beside_others(tmp_path):
    """The column becomes one of floating point numbers."""
    assert [e.answers for e in folder_of(tmp_path, [{"answer": 3}, {"answer": 2.5}])] == [("3",), ("2.5",)]


def test_an_answer_as_an_object(tmp_path):
    assert folder_of(tmp_path, [{"answer": {"answer": "x"}}])[0].answers == ("x",)


@pytest.mark.parametrize(
    "row, says",
    [
        ({"question": 5}, "its question is '5', not a text"),
        ({"question": ["a"]}, "its question is .*, not a text"),
        ({"question": [{"role": "user"}]}, "its question is empty"),
        ({"question": [{"from": "human", "value": 5}]}, "its question is '5', not a text"),
        ({"question": ""}, "its question is empty"),
        ({"image": {"url": "https://a.org/b.png"}}, "holds neither bytes nor a path"),
        ({"answer": {"text": "x"}}, "cannot be read as .*correct it"),
    ],
)
def test_a_users_row_that_cannot_be_read(tmp_path, row, says):
    """It is named, or left out and listed."""
    good = {"question": "What?", "answer": "x"}
    hub_folders.write_lines(tmp_path / "bad/data.jsonl", [good | row])
    with pytest.raises(UserError, match=rf"row 0 of .*{says}"):
        list(load_task(tmp_path / "bad")[0].images)
    bad: dict[str, str] = {}
    with pytest.raises(UserError, match="no row of"):
        load_task(tmp_path / "bad", bad=bad)
    assert len(bad) == 1


def test_rows_that_are_left_out(tmp_path):
    """Those whose answers fit no option, that state them in another way than most, and that have another's id."""
    rows = [{"id": number, "question": "What?", "choices": ANIMALS} for number in (0, 1, 2, 3, 3)]
    answers = ["Bear", "Lion", "B", "Ape", "Dog"]
    hub_folders.write_lines(
        tmp_path / "data.jsonl", [row | {"answer": answer} for row, answer in zip(rows, answers, strict=True)]
    )
    bad: dict[str, str] = {}
    assert [e.answers for e in load_task(tmp_path, bad=bad)] == [("Bear",), ("Ape",)]
    assert len(bad) == 3 and "an earlier row has its id" in bad[max(bad)]


def test_two_rows_with_one_id(tmp_path):
    with pytest.raises(UserError, match=r"row 1 of .*: an earlier row has its id '.*/7': give each row its own"):
        folder_of(tmp_path, [{"id": 7, "answer": "x"}, {"id": 7, "answer": "y"}])


def test_csv_is_refused(tmp_path):
    """It would make 7 of 007."""
    (tmp_path / "data.csv").write_text("question,answer\nWhat?,007\n")
    with pytest.raises(UserError, match="holds CSV, which does not tell texts from numbers"):
        load_task(tmp_path)


def test_pictures_by_their_path(tmp_path):
    Pictures.new("RGB", (9, 5)).save(tmp_path / "a.png")
    (example,) = folder_of(tmp_path, [{"image_path": "a.png", "answer": "x"}])
    assert example.images[0].size == (9, 5)


def test_an_empty_question_is_named(tmp_path):
    with pytest.raises(UserError, match=r"row 1 of .*: its question is empty"):
        folder_of(tmp_path, [{"answer": "x"}, {"question": None, "answer": "y"}])


@pytest.mark.parametrize("values", [("a", ["b", "c"]), (1, "b"), ({"x": 1}, "b")])
def test_a_column_of_several_types_is_refused(tmp_path, values):
    """The datasets library would give such cells as JSON, with quotes and brackets."""
    with pytest.raises(UserError, match="column answers mixes types"):
        folder_of(tmp_path, [{"answers": value} for value in values])


def test_a_folder_with_a_task(tmp_path):
    hub_folders.docvqa(tmp_path)
    task = tmp_path / "my_docvqa.yaml"
    task.write_text(
        "task: my_docvqa\ndataset_path: lmms-lab-encoder/DocVQA\ndataset_name: InfographicVQA\n"
        "test_split: validation\ndoc_to_visual: !function utils.doc_to_visual\n"
        'metric_list:\n  - metric: anls\n    aggregation: !function "os.system"\n'
    )
    found = load_task(tmp_path, limit=2)
    assert [(e.task, e.id) for e in found] == [("my_docvqa", f"infographicvqa/validation/{i}") for i in range(2)]
    hub_folders.write_lines(tmp_path / "rows/test.jsonl", [{"question": "What?", "answer": "x", "question_id": 4}])
    task.write_text("task: mine\ndataset_path: rows\ntest_split: test\n")
    (example,) = load_task(tmp_path)
    assert (example.task, example.id, len(example.images)) == ("mine", "rows/test/4", 0)


@pytest.mark.parametrize(
    "text, says",
    [
        ("task: a\n", "lacks dataset_path"),
        ("include: _default\ndataset_path: x\n", "lacks test_split"),
        ("- a\n", "is not a task"),
        ("a: [\n", "is not a YAML file"),
        ("task: &a b\ndataset_path: *a\ntest_split: test\n", "it has aliases"),
        ("a: &a [1]\nb: &b [*a, *a]\nc: &c [*b, *b]\ntask: *c\n", "it has aliases"),
        ("dataset_path: nowhere\ntest_split: test\n", "is no folder"),
        ("dataset_path: lmms-lab/POPE\ntest_split: test\n", "use the task name pope"),
    ],
)
def test_a_bad_task(tmp_path, text, says):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match=says) as error:
        load_task(tmp_path)
    assert "\n" not in str(error.value)


def test_bad_folders(tmp_path):
    with pytest.raises(UserError, match="holds no dataset that can be read"):
        load_task(tmp_path)
    hub_folders.write_lines(tmp_path / "data.jsonl", [{"prompt": "What?", "reply": "x"}])
    with pytest.raises(UserError, match="has the columns prompt, reply: a task needs question and answers"):
        load_task(tmp_path)
    for name in ("a.yaml", "b.yaml"):
        (tmp_path / name).write_text("task: a\n")
    with pytest.raises(UserError, match="holds 2 YAML files"):
        load_task(tmp_path)


# Pages.


def test_the_docs_have_the_table():
    page = (Path(__file__).parents[3] / "docs/data.md").read_text()
    assert page.split("a test compares -->\n")[1].split("\n<!-- end -->")[0] == catalogue.dataset_table()
    for task, (spec, _) in catalogue.LMMS_TASKS.items():
        assert f"`{task}`" in page and f"`{spec.name}`" in page


def test_the_overlap_check_reads_no_image_that_has_a_name(root):
    """Named images are compared by name; others, as in JSON Lines, by their pixels."""
    options = DataOptions(root)
    train, test = (load_task("docvqa", split=split, limit=8, options=options) for split in ("train", "test"))
    shut = [dataclasses.replace(e, images=None) for e in (*train, *test)]
    check_disjoint(shut[:8], shut[8:])
    twin = dataclasses.replace(shut[8], id="another")
    with pytest.raises(UserError, match="'another' of the evaluation has the question and image of training example"):
        check_disjoint(shut[8:], [twin])
    check_disjoint(shut[8:], [dataclasses.replace(twin, image_id="docvqa/another")])
    check_disjoint(shut[8:], [dataclasses.replace(twin, question="Another?")])
    unnamed = [dataclasses.replace(e, image_id=None) for e in test]
    with pytest.raises(UserError, match="question and image"):
        check_disjoint(unnamed, [dataclasses.replace(unnamed[0], id="another")])
    other = dataclasses.replace(unnamed[0], id="another", images=[Pictures.new("RGB", (6, 4))])
    check_disjoint(unnamed, [other])


def test_an_edited_copy_is_read_anew(tmp_path):
    """datasets alone would take the old rows out of its cache."""
    for count in (3, 5):
        folder = tmp_path / "lmms-lab-encoder/OK-VQA"
        rows = [
            {"question_id": str(i), "image": hub_folders.embedded(i), "question": "Q?", "answers": [f"{count}"]}
            for i in range(count)
        ]
        features = {"question_id": hub_folders.TEXT, "image": Image(), "question": hub_folders.TEXT}
        features |= {"answers": datasets.List(hub_folders.TEXT), "question_type": hub_folders.TEXT}
        shutil.rmtree(folder, ignore_errors=True)
        rows = [row | {"question_type": "x"} for row in rows]
        hub_folders.write(tmp_path, "lmms-lab-encoder/OK-VQA", {"val2014": rows}, features)
        loading._opened.cache_clear()
        found = load_task("ok_vqa_val2014", options=DataOptions(tmp_path))
        assert [e.answers for e in found] == [(str(count),)] * count
