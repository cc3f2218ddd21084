"""The public datasets that are known by name. To add a dataset, add a :class:`~vlm_jax.data.specs.DatasetSpec` here.

Rows and columns are those of the datasets' pages as of 2026.

A dataset's examples come in the splits trace, train, eval and test (:mod:`vlm_jax.data.splits`); the split ``all`` has
the rows that its benchmark scores. lmms-eval's task names (``docvqa_val``) stand for all rows that the task scores, so
``split`` is ignored for them. A name that is both (``pope``) is read as the dataset's.
"""

import dataclasses

from vlm_jax.data.specs import P0_SIZES, DatasetSpec, Split


def _splits(hub: str, rows: int) -> dict[str, Split]:
    """All splits from one of the hub's, with P0's sizes. If these exceed 95 % of the rows, all are scaled down."""
    scale = min(1, 0.95 * rows / sum(P0_SIZES.values()))
    return {name: Split(hub, int(size * scale) // 10 * 10) for name, size in P0_SIZES.items()}


def _three(train: str, held: str, test: str) -> dict[str, Split]:
    """P0's sizes, from the hub's splits for training and for evaluation."""
    return {name: Split(hub, P0_SIZES[name]) for name, hub in zip(P0_SIZES, (train, train, held, test), strict=True)}


def _lmms(name: str) -> tuple[str, str]:
    """The ids of lmms-eval's copy. It moved in July 2026; the old id normally redirects."""
    return f"lmms-lab-encoder/{name}", f"lmms-lab/{name}"


_VQA = {"id": "question_id", "question": "question", "image": "image", "answers": "answers"}
_ALL = (
    DatasetSpec(
        name="ok-vqa",
        title="OK-VQA",
        hub_ids=_lmms("OK-VQA"),
        rows={"val2014": 5046},
        columns=_VQA | {"subtask": "question_type"},
        answers="texts",
        metric="vqa_accuracy",
        splits={"trace": Split("val2014", 1000), "train": Split("val2014", 3000), "test": Split("val2014", 1000)},
        family="knowledge",
        lmms={"ok_vqa_val2014": "val2014"},
        gotchas="ten answers; the repository has no train split, so all splits come from val2014 and none is left for "
        "eval",
    ),
    DatasetSpec(
        name="a-okvqa",
        title="A-OKVQA",
        hub_ids=("HuggingFaceM4/A-OKVQA",),
        rows={"train": 17056, "validation": 1145, "test": 6702},
        columns=_VQA | {"answers": "direct_answers", "choices": "choices", "gold": "correct_choice_idx"},
        answers="index",
        metric="multiple_choice",
        splits=_three("train", "train", "validation"),
        written=("direct_answers",),
        family="knowledge",
        hidden=("test",),
        gotchas="direct_answers is a list written as a string; with choices hidden they are the answers, scored by VQA "
        "accuracy",
    ),
    DatasetSpec(
        name="scienceqa",
        title="ScienceQA",
        hub_ids=(*_lmms("ScienceQA"), "derek-thomas/ScienceQA"),
        rows={"train": 6218, "validation": 2097, "test": 2017},
        columns={
            "question": "question",
            "hint": "hint",
            "image": "image",
            "choices": "choices",
            "gold": "answer",
            "subtask": "category",
        },
        answers="index",
        metric="multiple_choice",
        splits=_three("train", "validation", "test"),
        config="ScienceQA-IMG",
        family="knowledge",
        lmms={"scienceqa_img": "test"},
        licence="CC BY-NC-SA 4.0",
        gotchas="two to five choices; the same picture may occur in several of the hub's splits",
    ),
    DatasetSpec(
        name="docvqa",
        title="DocVQA",
        hub_ids=_lmms("DocVQA"),
        rows={"validation": 5349, "test": 5188},
        columns=_VQA
        | {"id": "questionId", "image_id": ("ucsf_document_id", "ucsf_document_page_no"), "subtask": "question_types"},
        answers="texts",
        metric="anls",
        splits={
            "trace": Split("validation", 1000),
            "train": Split("validation", 3000),
            "eval": Split("validation", 250),
            "test": Split("validation", 1000),
        },
        config="DocVQA",
        family="perception",
        lmms={"docvqa_val": "validation", "docvqa_test": "test"},
        hidden=("test",),
        gotchas="all splits come from validation; pages of about 2k x 1.7k pixels: set --max-pixels",
    ),
    DatasetSpec(
        name="infographicvqa",
        title="InfographicVQA",
        hub_ids=_lmms("DocVQA"),
        rows={"validation": 2801, "test": 3288},
        columns=_VQA | {"id": "questionId", "image_id": "image_url", "subtask": "answer_type"},
        answers="texts",
        metric="anls",
        splits={
            "trace": Split("validation", 500),
            "train": Split("validation", 1500),
            "eval": Split("validation", 250),
            "test": Split("validation", 500),
        },
        config="InfographicVQA",
        family="perception",
        lmms={"infovqa_val": "validation", "infovqa_test": "test"},
        hidden=("test",),
        gotchas="only 2,801 labelled rows: half of P0's sizes",
    ),
    DatasetSpec(
        name="textvqa",
        title="TextVQA",
        hub_ids=_lmms("textvqa"),
        rows={"train": 34602, "validation": 5000, "test": 5734},
        columns=_VQA | {"image_id": "image_id"},
        answers="texts",
        metric="vqa_accuracy",
        splits=_three("train", "train", "validation"),
        family="perception",
        lmms={"textvqa_val": "validation", "textvqa_test": "test"},
        hidden=("test",),
        skip_unanswered=True,
        gotchas="ten answers; rows without any answer (the test split's) are left out",
    ),
    DatasetSpec(
        name="mmbench",
        title="MMBench",
        hub_ids=_lmms("MMBench"),
        rows={"dev": 4329, "test": 6666},
        columns={
            "id": "index",
            "question": "question",
            "hint": "hint",
            "image": "image",
            "choices": ("A", "B", "C", "D"),
            "gold": "answer",
            "subtask": "category",
            "group": "index",
        },
        answers="letter",
        metric="circular",
        splits=_splits("dev", 4329),
        config="en",
        lmms={"mmbench_en_dev": "dev", "mmbench_en_test": "test"},
        hidden=("test",),
        gotchas='missing options and hints are NaN or "nan"; index is a number or a string; from 1,000,000 on it is a '
        "rotation of the question index % 1,000,000; all rotations of a question are one group",
    ),
    DatasetSpec(
        name="vqav2",
        title="VQAv2",
        hub_ids=_lmms("VQAv2"),
        rows={"validation": 214354, "testdev": 107394, "test": 447793},
        columns=_VQA | {"image_id": "image_id", "subtask": "answer_type"},
        answers="texts",
        metric="vqa_accuracy",
        splits=_splits("validation", 20000),
        lmms={"vqav2_val": "validation", "vqav2_test": "test"},
        hidden=("testdev", "test"),
        head=20000,
        licence="CC BY 4.0",
        gotchas="44.8 GB: use --stream; splits come from the first 20,000 rows of validation; answers are a list of "
        "objects",
    ),
    DatasetSpec(
        name="vsr",
        title="VSR (random)",
        hub_ids=("cambridgeltl/vsr_random",),
        rows={"train": 7680, "dev": 1097, "test": 2195},
        columns={"question": "caption", "image": "image", "image_id": "image", "gold": "label", "subtask": "relation"},
        answers="yes_no",
        metric="yes_no",
        splits={
            "trace": Split("train", 1000),
            "train": Split("train", 3000),
            "eval": Split("dev", 500),
            "test": Split("test", 1000),
        },
        ask="{question} Please answer yes or no.",
        data_files={"train": "train.jsonl", "dev": "dev.jsonl", "test": "test.jsonl"},
        image_folder="images",
        licence="CC BY 4.0",
        gotchas="rows contain the names of COCO files, not pictures: put the files in the folder `images` of a local "
        "copy",
    ),
    DatasetSpec(
        name="pope",
        title="POPE",
        hub_ids=_lmms("POPE"),
        rows={"test": 9000},
        columns={
            "question": "question",
            "image": "image",
            "image_id": "image_source",
            "gold": "answer",
            "subtask": "category",
        },
        answers="yes_no",
        metric="pope",
        splits=_splits("test", 9000),
        lmms={"pope": "test"},
        gotchas="18 questions for each image",
    ),
    DatasetSpec(
        name="mme",
        title="MME",
        hub_ids=_lmms("MME"),
        rows={"test": 2374},
        columns={
            "question": "question",
            "image": "image",
            "image_id": "question_id",
            "gold": "answer",
            "subtask": "category",
            "group": "question_id",
        },
        answers="yes_no",
        metric="mme",
        splits=_splits("test", 2374),
        lmms={"mme": "test"},
        gotchas="question_id names the image; its two questions are one group",
    ),
    DatasetSpec(
        name="mmstar",
        title="MMStar",
        hub_ids=("Lin-Chen/MMStar",),
        rows={"val": 1500},
        columns={"id": "index", "question": "question", "image": "image", "gold": "answer", "subtask": "category"},
        answers="shown_letter",
        metric="multiple_choice",
        splits=_splits("val", 1500),
        lmms={"mmstar": "val"},
        gotchas="the question contains the choices with letters, so --choices has no effect",
    ),
    DatasetSpec(
        name="mmmu",
        title="MMMU",
        hub_ids=_lmms("MMMU"),
        rows={"dev": 150, "validation": 900, "test": 10500},
        columns={
            "id": "id",
            "question": "question",
            "image": tuple(f"image_{i}" for i in range(1, 8)),
            "choices": "options",
            "gold": "answer",
            "subtask": "subfield",
        },
        answers="letter",
        metric="multiple_choice",
        splits=_splits("validation", 900),
        written=("options", "answer"),
        lmms={"mmmu_val": "validation", "mmmu_test": "test"},
        hidden=("test",),
        gotchas="up to seven images; they come before the question, in the order of its marks `<image 1>`...; options "
        "are a list written as a string; open questions have none",
    ),
    DatasetSpec(
        name="seedbench",
        title="SEED-Bench",
        hub_ids=_lmms("SEED-Bench"),
        rows={"test": 17990},
        columns={
            "question": "question",
            "image": "image",
            "choices": ("choice_a", "choice_b", "choice_c", "choice_d"),
            "gold": "answer",
            "subtask": "question_type_id",
        },
        answers="letter",
        metric="multiple_choice",
        splits=_splits("test", 14000),
        lmms={"seedbench": "test"},
        only=("data_type", "image"),
        gotchas="the image column is a list; rows about videos are left out",
    ),
    DatasetSpec(
        name="snli-ve",
        title="SNLI-VE",
        hub_ids=("Multimodal-Fatima/SNLI-VE_test",),
        rows={"test": 17901},
        columns={"question": "hypothesis", "image": "image", "image_id": "filename", "gold": "label"},
        answers="class",
        metric="multiple_choice",
        splits=_splits("test", 17901),
        ask="Does the image entail this sentence, contradict it, or neither? {question}",
        licence="Flickr30k's: research use",
        gotchas="the choices are the label's names; all splits come from this repository's test split",
    ),
    *(
        DatasetSpec(
            name=name,
            title=title,
            hub_ids=(hub_id,),
            rows={"train": train, "test": 10000},
            columns={"image": image, "gold": label},
            answers="class",
            metric="multiple_choice",
            splits=_three("train", "train", "test"),
            ask=ask,
            gotchas=gotchas,
        )
        for name, title, hub_id, train, image, label, ask, gotchas in (
            ("cifar-10", "CIFAR-10", "uoft-cs/cifar10", 50000, "img", "label", "What is in the image?", "32 x 32"),
            (
                "cifar-100",
                "CIFAR-100",
                "uoft-cs/cifar100",
                50000,
                "img",
                "fine_label",
                "What is in the image?",
                "32 x 32; 100 choices are too many for letters",
            ),
            (
                "mnist",
                "MNIST",
                "ylecun/mnist",
                60000,
                "image",
                "label",
                "Which digit is in the image?",
                "28 x 28, grey",
            ),
        )
    ),
    DatasetSpec(
        name="vision-flan",
        title="Vision-Flan (191 tasks)",
        hub_ids=("Vision-Flan/vision-flan_191-task_1k",),
        rows={"train": 186000},
        columns={
            "id": "id",
            "question": "conversations",
            "image": "image",
            "image_id": "image",
            "subtask": "task_name",
        },
        answers="conversation",
        metric="exact_match",
        splits=_splits("train", 186000),
        data_files={"train": "annotation_191-task_1k.json"},
        image_folder="image_191-task_1k",
        licence="of each task",
        gotchas="about 186,000 rows; a JSON file and a zip of 36.3 GB: unpack the zip in a local copy as the folder "
        "`image_191-task_1k`",
    ),
    DatasetSpec(
        name="cc-sbu-align",
        title="cc_sbu_align",
        hub_ids=("Vision-CAIR/cc_sbu_align",),
        rows={},
        columns={"id": "image_id", "image": "image_id", "image_id": "image_id", "gold": "caption"},
        answers="text",
        metric="exact_match",
        splits=_splits("train", 3400),
        ask="Describe this image in detail.",
        data_files={"train": "filter_cap.json"},
        field="annotations",
        image_folder="image",
        gotchas="the hub's copy cannot be loaded: it needs a local folder with `filter_cap.json` and `image/ID.jpg`",
    ),
)
DATASETS = {spec.name: spec for spec in _ALL}

#: lmms-eval's small tasks -> their dataset. Each has 500 rows with the dataset's columns.
_LITE = {
    "ok_vqa_val2014": "ok-vqa",
    "docvqa_val": "docvqa",
    "infovqa_val": "infographicvqa",
    "textvqa_val": "textvqa",
    "vqav2_val": "vqav2",
    "mmbench_en_dev": "mmbench",
    "seedbench": "seedbench",
}
LMMS_TASKS: dict[str, tuple[DatasetSpec, str]] = {
    task: (spec, split) for spec in _ALL for task, split in spec.lmms.items()
} | {
    f"{config}_lite": (
        dataclasses.replace(
            DATASETS[name], hub_ids=_lmms("LMMs-Eval-Lite"), config=config, rows={"lite": 500}, splits={}, head=None
        ),
        "lite",
    )
    for config, name in _LITE.items()
}
"""lmms-eval's task name -> its dataset and the hub's split that it scores. Such a task has no other splits."""

#: P0's families of tasks -> their three datasets. A family gives one example of each dataset in turn.
FAMILY_TASKS = {
    f"p0-{family}": tuple(spec.name for spec in _ALL if spec.family == family) for family in ("knowledge", "perception")
}


def names() -> list[str]:
    """All names of datasets, of families of datasets, and of lmms-eval's tasks."""
    return list(dict.fromkeys([*FAMILY_TASKS, *DATASETS, *LMMS_TASKS]))


def dataset_table() -> str:
    """The datasets as a Markdown table."""
    lines = ["| task | dataset | rows (*withheld*) | trace / train / eval / test | metric | family | licence | note |"]
    lines.append("|---" * 8 + "|")
    for spec in _ALL:
        rows = ", ".join(f"*{part} {n:,}*" if part in spec.hidden else f"{part} {n:,}" for part, n in spec.rows.items())
        sizes = " / ".join(f"{spec.splits[part].size:,}" if part in spec.splits else "-" for part in P0_SIZES)
        others = "".join(f", `{task}`" for task in spec.lmms if task != spec.name)
        lines.append(
            f"| `{spec.name}`{others} | {spec.title} | {rows or 'unknown'} | {sizes} | {spec.metric} | "
            f"{spec.family or '-'} | {spec.licence} | {spec.gotchas} |"
        )
    return "\n".join(lines)
