"""The datasets that are known by name: where each lies on the hub, what its columns mean, and what to watch out for.

A dataset has a plain name (``docvqa``), whose examples come in the splits trace, train, eval and test of
:mod:`vlm_jax.data.splits`, or all those that its benchmark scores as the split ``all``. lmms-eval's names
(``docvqa_val``) stand for all rows that the task scores, whatever the split; where a name is both (``pope``), the split
counts. Rows and columns are those of the datasets' pages as of 2026.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal, NamedTuple

from vlm_jax.errors import UserError, nearest

AnswerForm = Literal["texts", "text", "index", "letter", "shown_letter", "class", "yes_no", "conversation"]
"""What a row gives for an answer.

texts: acceptable texts, as a list, as a list written out as a string, or as a list of ``{"answer": text}``.
text: one text. index, letter: which of the choices is right (no choices: an open question's texts). shown_letter: the
same, but the choices are written into the question already. class: a ClassLabel, whose names are the choices.
yes_no: the word, or 0 for no and 1 for yes. conversation: turns of ``{"from", "value"}``, question and answer.
"""


class Split(NamedTuple):
    """So many examples out of one of the hub's splits."""

    hub: str
    size: int


@dataclasses.dataclass(frozen=True, eq=False)
class DatasetSpec:
    """A dataset as data.

    ``columns`` says which columns play which role: id, question, hint, image, image_id (what rows of one image share;
    by default the digest of its bytes), answers, choices, gold, subtask, group. ``ask`` is the question as it is put.
    Strings in the image column are file names in ``image_folder`` of a local copy, or else base64.
    """

    name: str
    title: str
    hub_ids: tuple[str, ...]
    rows: Mapping[str, int]
    columns: Mapping[str, str | tuple[str, ...]]
    answers: AnswerForm
    metric: str
    splits: Mapping[str, Split]
    config: str | None = None
    family: str | None = None
    lmms: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """lmms-eval's task names, and the hub's split that each scores."""
    hidden: tuple[str, ...] = ()
    """Splits of the hub whose answers are withheld."""
    skip_unanswered: bool = False
    """Rows without an answer are left out rather than refused."""
    ask: str = "{question}"
    only: tuple[str, str] | None = None
    """Only the rows with this value in this column."""
    head: int | None = None
    """Only the first so many rows, so that a streamed run reads few files."""
    data_files: Mapping[str, str] | None = None
    field: str | None = None
    """Where in a JSON file the rows are."""
    image_folder: str | None = None
    licence: str = "see its page"
    gotchas: str = ""

    def used(self, *roles: str) -> tuple[str, ...]:
        """The columns of some roles, or of all of them."""
        found = [self.columns[role] for role in roles or self.columns if role in self.columns]
        return tuple(dict.fromkeys(c for part in found for c in ([part] if isinstance(part, str) else part)))


#: The split that is all rows which the benchmark scores, in their order.
ALL = "all"
#: P0's sizes; its evaluation set is our test split, and eval is for choosing among methods.
P0_SIZES = {"trace": 1000, "train": 3000, "eval": 1000, "test": 1000}


def _splits(hub: str, rows: int) -> dict[str, Split]:
    """All splits out of one of the hub's: of P0's sizes, or scaled down to what 95 % of the rows allow."""
    scale = min(1, 0.95 * rows / sum(P0_SIZES.values()))
    return {name: Split(hub, int(size * scale) // 10 * 10) for name, size in P0_SIZES.items()}


def _three(train: str, held: str, test: str) -> dict[str, Split]:
    """P0's sizes where the hub has splits for training and for evaluation."""
    return {name: Split(hub, P0_SIZES[name]) for name, hub in zip(P0_SIZES, (train, train, held, test), strict=True)}


def _lmms(name: str) -> tuple[str, str]:
    """lmms-eval's copy moved in July 2026; the old name normally redirects."""
    return f"lmms-lab-encoder/{name}", f"lmms-lab/{name}"


_VQA = {"id": "question_id", "question": "question", "image": "image", "answers": "answers"}
_ALL = (
    DatasetSpec(
        "ok-vqa",
        "OK-VQA",
        _lmms("OK-VQA"),
        {"val2014": 5046},
        _VQA | {"subtask": "question_type"},
        "texts",
        "vqa_accuracy",
        {"trace": Split("val2014", 1000), "train": Split("val2014", 3000), "test": Split("val2014", 1000)},
        family="knowledge",
        lmms={"ok_vqa_val2014": "val2014"},
        gotchas="ten answers; the repository has no train split: all come from val2014, which leaves none for eval",
    ),
    DatasetSpec(
        "a-okvqa",
        "A-OKVQA",
        ("HuggingFaceM4/A-OKVQA",),
        {"train": 17056, "validation": 1145, "test": 6702},
        _VQA | {"answers": "direct_answers", "choices": "choices", "gold": "correct_choice_idx"},
        "index",
        "multiple_choice",
        _three("train", "train", "validation"),
        family="knowledge",
        hidden=("test",),
        gotchas="direct_answers is a list written out as a string; with choices hidden they are the answers, by VQA "
        "accuracy",
    ),
    DatasetSpec(
        "scienceqa",
        "ScienceQA",
        (*_lmms("ScienceQA"), "derek-thomas/ScienceQA"),
        {"train": 6218, "validation": 2097, "test": 2017},
        {
            "question": "question",
            "hint": "hint",
            "image": "image",
            "choices": "choices",
            "gold": "answer",
            "subtask": "category",
        },
        "index",
        "multiple_choice",
        _three("train", "validation", "test"),
        config="ScienceQA-IMG",
        family="knowledge",
        lmms={"scienceqa_img": "test"},
        licence="CC BY-NC-SA 4.0",
        gotchas="two to five choices; the same picture may occur in several of the hub's splits",
    ),
    DatasetSpec(
        "docvqa",
        "DocVQA",
        _lmms("DocVQA"),
        {"validation": 5349, "test": 5188},
        _VQA
        | {"id": "questionId", "image_id": ("ucsf_document_id", "ucsf_document_page_no"), "subtask": "question_types"},
        "texts",
        "anls",
        {
            "trace": Split("validation", 1000),
            "train": Split("validation", 3000),
            "eval": Split("validation", 250),
            "test": Split("validation", 1000),
        },
        config="DocVQA",
        family="perception",
        lmms={"docvqa_val": "validation", "docvqa_test": "test"},
        hidden=("test",),
        gotchas="all come from validation; pages of about 2k x 1.7k pixels: set --max-pixels",
    ),
    DatasetSpec(
        "infographicvqa",
        "InfographicVQA",
        _lmms("DocVQA"),
        {"validation": 2801, "test": 3288},
        _VQA | {"id": "questionId", "image_id": "image_url", "subtask": "answer_type"},
        "texts",
        "anls",
        {
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
        "textvqa",
        "TextVQA",
        _lmms("textvqa"),
        {"train": 34602, "validation": 5000, "test": 5734},
        _VQA | {"image_id": "image_id"},
        "texts",
        "vqa_accuracy",
        _three("train", "train", "validation"),
        family="perception",
        lmms={"textvqa_val": "validation", "textvqa_test": "test"},
        hidden=("test",),
        skip_unanswered=True,
        gotchas="ten answers; rows whose ten answers are all empty (the test split's) are left out",
    ),
    DatasetSpec(
        "mmbench",
        "MMBench",
        (*_lmms("MMBench"),),
        {"dev": 4329, "test": 6666},
        {
            "id": "index",
            "question": "question",
            "hint": "hint",
            "image": "image",
            "choices": ("A", "B", "C", "D"),
            "gold": "answer",
            "subtask": "category",
            "group": "index",
        },
        "letter",
        "circular",
        _splits("dev", 4329),
        config="en",
        lmms={"mmbench_en_dev": "dev", "mmbench_en_test": "test"},
        hidden=("test",),
        gotchas='missing options and hints are NaN or "nan"; index is a number or a string; an index of a million and '
        "more is a rotation of the question index % 1,000,000, and is kept with it as one group",
    ),
    DatasetSpec(
        "vqav2",
        "VQAv2",
        _lmms("VQAv2"),
        {"validation": 214354, "testdev": 107394, "test": 447793},
        _VQA | {"image_id": "image_id", "subtask": "answer_type"},
        "texts",
        "vqa_accuracy",
        _splits("validation", 20000),
        lmms={"vqav2_val": "validation", "vqav2_test": "test"},
        hidden=("testdev", "test"),
        head=20000,
        licence="CC BY 4.0",
        gotchas="44.8 GB: use --stream; splits come from the first 20,000 rows of validation; answers are a list of "
        "objects",
    ),
    DatasetSpec(
        "vsr",
        "VSR (random)",
        ("cambridgeltl/vsr_random",),
        {"train": 7680, "dev": 1097, "test": 2195},
        {"question": "caption", "image": "image", "image_id": "image", "gold": "label", "subtask": "relation"},
        "yes_no",
        "yes_no",
        {
            "trace": Split("train", 1000),
            "train": Split("train", 3000),
            "eval": Split("dev", 500),
            "test": Split("test", 1000),
        },
        ask="{question} Please answer yes or no.",
        data_files={"train": "train.jsonl", "dev": "dev.jsonl", "test": "test.jsonl"},
        image_folder="images",
        licence="CC BY 4.0",
        gotchas="rows name COCO files and hold no pictures: put these in the copy's folder `images`",
    ),
    DatasetSpec(
        "pope",
        "POPE",
        _lmms("POPE"),
        {"test": 9000},
        {
            "question": "question",
            "image": "image",
            "image_id": "image_source",
            "gold": "answer",
            "subtask": "category",
        },
        "yes_no",
        "pope",
        _splits("test", 9000),
        lmms={"pope": "test"},
        gotchas="18 questions an image",
    ),
    DatasetSpec(
        "mme",
        "MME",
        _lmms("MME"),
        {"test": 2374},
        {
            "question": "question",
            "image": "image",
            "image_id": "question_id",
            "gold": "answer",
            "subtask": "category",
            "group": "question_id",
        },
        "yes_no",
        "mme",
        _splits("test", 2374),
        lmms={"mme": "test"},
        gotchas="question_id names the image; its two questions are one group",
    ),
    DatasetSpec(
        "mmstar",
        "MMStar",
        ("Lin-Chen/MMStar",),
        {"val": 1500},
        {"id": "index", "question": "question", "image": "image", "gold": "answer", "subtask": "category"},
        "shown_letter",
        "multiple_choice",
        _splits("val", 1500),
        lmms={"mmstar": "val"},
        gotchas="the choices stand in the question, with letters, whatever --choices says",
    ),
    DatasetSpec(
        "mmmu",
        "MMMU",
        _lmms("MMMU"),
        {"dev": 150, "validation": 900, "test": 10500},
        {
            "id": "id",
            "question": "question",
            "image": tuple(f"image_{i}" for i in range(1, 8)),
            "choices": "options",
            "gold": "answer",
            "subtask": "subfield",
        },
        "letter",
        "multiple_choice",
        _splits("validation", 900),
        lmms={"mmmu_val": "validation", "mmmu_test": "test"},
        hidden=("test",),
        gotchas="up to seven images, which come before the question in the order of its marks `<image 1>`...; options "
        "are a list written out as a string; open questions have none",
    ),
    DatasetSpec(
        "seedbench",
        "SEED-Bench",
        _lmms("SEED-Bench"),
        {"test": 17990},
        {
            "question": "question",
            "image": "image",
            "choices": ("choice_a", "choice_b", "choice_c", "choice_d"),
            "gold": "answer",
            "subtask": "question_type_id",
        },
        "letter",
        "multiple_choice",
        _splits("test", 14000),
        lmms={"seedbench": "test"},
        only=("data_type", "image"),
        gotchas="the image column is a list; rows about videos are left out",
    ),
    DatasetSpec(
        "snli-ve",
        "SNLI-VE",
        ("Multimodal-Fatima/SNLI-VE_test",),
        {"test": 17901},
        {"question": "hypothesis", "image": "image", "image_id": "filename", "gold": "label"},
        "class",
        "multiple_choice",
        _splits("test", 17901),
        ask="Does the image entail this sentence, contradict it, or neither? {question}",
        licence="Flickr30k's: research use",
        gotchas="the choices are the label's names; all splits come from this repository's test split",
    ),
    *(
        DatasetSpec(
            name,
            title,
            (hub_id,),
            {"train": train, "test": 10000},
            {"image": image, "gold": label},
            "class",
            "multiple_choice",
            _three("train", "train", "test"),
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
        "vision-flan",
        "Vision-Flan (191 tasks)",
        ("Vision-Flan/vision-flan_191-task_1k",),
        {"train": 186000},
        {"id": "id", "question": "conversations", "image": "image", "image_id": "image", "subtask": "task_name"},
        "conversation",
        "exact_match",
        _splits("train", 186000),
        data_files={"train": "annotation_191-task_1k.json"},
        image_folder="image_191-task_1k",
        licence="of each task",
        gotchas="about 186,000 rows; a JSON file and a zip of 36.3 GB: unpack it in a local copy as the folder "
        "`image_191-task_1k`",
    ),
    DatasetSpec(
        "cc-sbu-align",
        "cc_sbu_align",
        ("Vision-CAIR/cc_sbu_align",),
        {},
        {"id": "image_id", "image": "image_id", "image_id": "image_id", "gold": "caption"},
        "text",
        "exact_match",
        _splits("train", 3400),
        ask="Describe this image in detail.",
        data_files={"train": "filter_cap.json"},
        field="annotations",
        image_folder="image",
        gotchas="the hub's copy is no training set: needs a local folder with `filter_cap.json` and `image/ID.jpg`",
    ),
)
DATASETS = {spec.name: spec for spec in _ALL}

#: 500 rows each of other datasets, with their columns; by lmms-eval's task names only.
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

#: Three datasets in turn, the same number from each.
FAMILY_TASKS = {
    f"p0-{family}": tuple(spec.name for spec in _ALL if spec.family == family) for family in ("knowledge", "perception")
}


def names() -> list[str]:
    """All names under which these datasets are known."""
    return list(dict.fromkeys([*FAMILY_TASKS, *DATASETS, *LMMS_TASKS]))


def split_of(spec: DatasetSpec, split: str) -> Split:
    """Where a split's examples come from."""
    if split not in spec.splits:
        if split in P0_SIZES:
            rows = ", ".join(f"{part} {size:,}" for part, (_, size) in spec.splits.items())
            raise UserError(f"{spec.name} has too few labelled rows for a split {split!r}: use {rows}, or {ALL}")
        raise UserError(f"unknown split {split!r} of {spec.name}{nearest(split, [*spec.splits, ALL])}")
    return spec.splits[split]


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
