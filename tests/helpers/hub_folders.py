"""Synthetic copies of hub repositories: a few invented rows each, with the schema and the oddities of the originals.

No row is real data: pictures are plain colours and noise, questions are placeholders.
"""

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as Pictures

TEXT, WHOLE = Value("string"), Value("int64")
LABEL = "Synthetic rows for tests, in the shape of a public dataset; not its data.\n"
#: Name of a dataset -> the function that writes its synthetic repository under a folder.
WRITERS: dict[str, Callable[[Path], None]] = {}


def copies(*names: str) -> Callable:
    """Registers the function that writes the synthetic repository of these datasets."""

    def register(write: Callable[[Path], None]) -> Callable[[Path], None]:
        WRITERS.update(dict.fromkeys(names, write))
        return write

    return register


def picture(seed: int, mode: str = "RGB", kind: str = "PNG") -> bytes:
    """A file with 6 x 4 pixels of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 6, 4), np.uint8)
    out = io.BytesIO()
    Pictures.fromarray(pixels, "RGBA").convert(mode).save(out, kind)
    return out.getvalue()


def embedded(seed: int, **how) -> dict:
    return {"bytes": picture(seed, **how), "path": None}


def write(root: Path, hub_id: str, splits: dict[str, list[dict]], features: dict, config: str = "default") -> Path:
    """A repository, or one more config of it: parquet files and the README that lists them."""
    folder = root / hub_id
    folder.mkdir(parents=True, exist_ok=True)
    readme = folder / "README.md"
    old = readme.read_text().split("---\n")[1] if readme.exists() else "configs:\n"
    lines = [f"- config_name: {config}", "  data_files:"]
    for split, rows in splits.items():
        file = f"{config}/{split}-00000-of-00001.parquet"
        lines += [f"  - split: {split}", f"    path: {file}"]
        (folder / config).mkdir(exist_ok=True)
        columns = {name: [row[name] for row in rows] for name in features}
        Dataset.from_dict(columns, Features(features)).to_parquet(folder / file)
    readme.write_text("---\n" + old + "\n".join(lines) + "\n---\n" + LABEL)
    return folder


def write_lines(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def ten(answer: str, other: str) -> list[str]:
    """Ten answers of which ``other`` comes first but ``answer`` is the commonest."""
    return [other, *[answer] * 6, *[other] * 2, "rare"]


@copies("ok-vqa")
def ok_vqa(root: Path) -> None:
    rows = [
        {
            "question_id": str(1000 + i),
            "image": embedded(i, mode="CMYK", kind="JPEG") if i == 0 else embedded(i),
            "question": f"What is number {i}?",
            "answers": ten(f"answer {i}", "other"),
            "question_type": "four",
            "answer_type": "other",
        }
        for i in range(40)
    ]
    features = {"question_id": TEXT, "image": Image(), "question": TEXT, "answers": List(TEXT), "question_type": TEXT}
    write(root, "lmms-lab-encoder/OK-VQA", {"val2014": rows}, features)
    write(root, "lmms-lab-encoder/LMMs-Eval-Lite", {"lite": rows[:3]}, features, "ok_vqa_val2014")


@copies("a-okvqa")
def a_okvqa(root: Path) -> None:
    """direct_answers is written out as a string, and withheld in the test split."""

    def rows(split, count):
        return [
            {
                "image": embedded(100 + i if split == "train" else 200 + i),
                "question_id": f"{split}{i}",
                "question": f"Which one is {i}?",
                "choices": ["red", "green", "blue", "grey"],
                "correct_choice_idx": None if split == "test" else i % 4,
                "direct_answers": None if split == "test" else str(ten("green", "lime")),
            }
            for i in range(count)
        ]

    features = {
        "image": Image(),
        "question_id": TEXT,
        "question": TEXT,
        "choices": List(TEXT),
        "correct_choice_idx": Value("int8"),
        "direct_answers": TEXT,
    }
    splits = {split: rows(split, count) for split, count in (("train", 30), ("validation", 10), ("test", 4))}
    write(root, "HuggingFaceM4/A-OKVQA", splits, features)


@copies("scienceqa")
def scienceqa(root: Path) -> None:
    """The first picture of the test split is in the train split too."""

    def rows(first, count):
        return [
            {
                "image": embedded(300 + (0 if i == 0 else first + i)),
                "question": f"Which is fact {i}?",
                "choices": ["yes, it is", "no"] if i % 2 else ["a", "b", "c", "d", "e"],
                "answer": i % 2,
                "hint": "" if i % 3 else "Look closely.",
                "category": "Maps" if i % 2 else "Rocks",
            }
            for i in range(count)
        ]

    features = {
        "image": Image(),
        "question": TEXT,
        "choices": List(TEXT),
        "answer": Value("int8"),
        "hint": TEXT,
        "category": TEXT,
    }
    splits = {"train": rows(0, 30), "validation": rows(100, 10), "test": rows(200, 10)}
    write(root, "lmms-lab-encoder/ScienceQA", splits, features, "ScienceQA-IMG")


@copies("docvqa", "infographicvqa")
def docvqa(root: Path) -> None:
    """Several questions a page; the test split's answers are withheld; a slash in a column's name."""
    doc = [
        {
            "questionId": str(i),
            "question": f"What is on line {i}?",
            "question_types": ["handwritten", "form"],
            "image": embedded(400 + i // 4),
            "ucsf_document_id": f"doc{i // 8}",
            "ucsf_document_page_no": str(i // 4 % 2),
            "answers": [f"line {i}", f"Line {i}"],
        }
        for i in range(80)
    ]
    features = {
        "questionId": TEXT,
        "question": TEXT,
        "question_types": List(TEXT),
        "image": Image(),
        "ucsf_document_id": TEXT,
        "ucsf_document_page_no": TEXT,
        "answers": List(TEXT),
    }
    hidden = [{**row, "answers": None} for row in doc[:4]]
    write(root, "lmms-lab-encoder/DocVQA", {"validation": doc, "test": hidden}, features, "DocVQA")
    graphic = [
        {
            "questionId": str(i),
            "question": f"How many of {i}?",
            "answers": [str(i)],
            "answer_type": ["non-extractive"],
            "image": embedded(500 + i // 5),
            "image_url": f"https://example.org/{i // 5}.png",
            "operation/reasoning": [],
        }
        for i in range(60)
    ]
    features = {
        "questionId": TEXT,
        "question": TEXT,
        "answers": List(TEXT),
        "answer_type": List(TEXT),
        "image": Image(),
        "image_url": TEXT,
        "operation/reasoning": List(TEXT),
    }
    write(root, "lmms-lab-encoder/DocVQA", {"validation": graphic}, features, "InfographicVQA")


@copies("textvqa")
def textvqa(root: Path) -> None:
    """Ten answers; the test split's are ten empty strings."""

    def rows(first, count):
        return [
            {
                "image_id": f"{first + i // 2:x}",
                "question_id": first + i,
                "question": f"what does sign {i} say?",
                "image": embedded(600 + first + i // 2),
                "answers": ten(f"sign {i}", "stop"),
            }
            for i in range(count)
        ]

    features = {
        "image_id": TEXT,
        "question_id": Value("int32"),
        "question": TEXT,
        "image": Image(),
        "answers": List(TEXT),
    }
    validation = rows(100, 12)
    validation[3]["answers"] = [""] * 10
    hidden = [{**row, "answers": [""] * 10} for row in rows(200, 4)]
    write(root, "lmms-lab-encoder/textvqa", {"train": rows(0, 40), "validation": validation, "test": hidden}, features)


@copies("mmbench")
def mmbench(root: Path, index: Value = WHOLE) -> None:
    """Four questions with their rotations, the index of which is a million more; "nan" for what is missing."""
    rows = []
    for question in range(8):
        options = ["north", "south", "east", "west"] if question % 2 else ["left", "right"]
        for turn in range(len(options)):
            shown = options[turn:] + options[:turn]
            number = question + 1_000_000 * turn
            rows.append(
                {
                    "index": str(number) if index is TEXT else number,
                    "question": f"Where is {question}?",
                    "hint": "nan" if question % 2 else "A hint.",
                    "answer": "ABCD"[shown.index(options[0])],
                    **dict(zip("ABCD", shown + ["nan"] * (4 - len(shown)), strict=True)),
                    "category": "spatial",
                    "image": embedded(700 + question),
                }
            )
    features = {"index": index, **dict.fromkeys(("question", "hint", "answer", *"ABCD", "category"), TEXT)}
    write(root, "lmms-lab-encoder/MMBench", {"dev": rows}, features | {"image": Image()}, "en")


def mmbench_base64(root: Path) -> None:
    """HuggingFaceM4/MMBench's form, under the usual id: images are base64 text."""
    row = {
        "index": 5,
        "question": "Where?",
        "hint": None,
        "answer": "B",
        **dict(zip("ABCD", ["up", "down", None, None], strict=True)),
        "category": "spatial",
        "image": base64.b64encode(picture(9)).decode(),
    }
    features = {"index": WHOLE, **dict.fromkeys(("question", "hint", "answer", *"ABCD", "category", "image"), TEXT)}
    write(root, "lmms-lab-encoder/MMBench", {"dev": [row]}, features, "en")


@copies("vqav2")
def vqav2(root: Path) -> None:
    """answers is a list of objects."""
    rows = [
        {
            "question_id": 7000 + i,
            "image_id": 70 + i // 3,
            "question": f"How many are {i}?",
            "answer_type": "number",
            "multiple_choice_answer": "2",
            "answers": [
                {"answer": text, "answer_confidence": "yes", "answer_id": n + 1} for n, text in enumerate(ten("2", "3"))
            ],
            "image": embedded(800 + i // 3),
        }
        for i in range(24)
    ]
    given = {"answer": TEXT, "answer_confidence": TEXT, "answer_id": WHOLE}
    features = {
        "question_id": WHOLE,
        "image_id": WHOLE,
        "question": TEXT,
        "answer_type": TEXT,
        "answers": List(given),
        "image": Image(),
    }
    write(root, "lmms-lab-encoder/VQAv2", {"validation": rows}, features)


@copies("vsr")
def vsr(root: Path) -> None:
    """JSON Lines that name COCO files, which lie in a folder of the user's."""
    folder = root / "cambridgeltl/vsr_random"
    for split, first in (("train", 0), ("dev", 40), ("test", 60)):
        rows = [
            {
                "image": f"{first + i:012d}.jpg",
                "image_link": f"http://images.cocodataset.org/{first + i:012d}.jpg",
                "caption": f"The cat is left of dog {i}.",
                "label": i % 2,
                "relation": "left of",
                "vote_true_validator_id": "[1, 2]",
            }
            for i in range(20)
        ]
        write_lines(folder / f"{split}.jsonl", rows)
        (folder / "images").mkdir(exist_ok=True)
        for i in range(20):
            (folder / "images" / f"{first + i:012d}.jpg").write_bytes(picture(900 + first + i, kind="JPEG"))


@copies("pope")
def pope(root: Path) -> None:
    rows = [
        {
            "id": str(i),
            "question_id": str(i % 6),
            "question": "Is there a snowboard in the image?",
            "answer": "yes" if i % 2 else "no",
            "image_source": f"COCO_val2014_{i // 6}",
            "image": embedded(1000 + i // 6),
            "category": "random",
        }
        for i in range(36)
    ]
    features = dict.fromkeys(("id", "question_id", "question", "answer", "image_source", "category"), TEXT)
    write(root, "lmms-lab-encoder/POPE", {"test": rows}, features | {"image": Image()})


@copies("mme")
def mme(root: Path) -> None:
    """Two questions an image, which share a question_id."""
    rows = [
        {
            "question_id": f"code_reasoning/{i // 2:04d}.png",
            "image": embedded(1100 + i // 2),
            "question": f"Is it {i}? Please answer yes or no.",
            "answer": "No" if i % 2 else "Yes",
            "category": "code_reasoning",
        }
        for i in range(24)
    ]
    features = dict.fromkeys(("question_id", "question", "answer", "category"), TEXT)
    write(root, "lmms-lab-encoder/MME", {"test": rows}, features | {"image": Image()})


@copies("mmstar")
def mmstar(root: Path) -> None:
    """The choices stand in the question."""
    rows = [
        {
            "index": i,
            "question": "Which colour?\nOptions: A: red, B: green, blue, C: grey, D: none",
            "image": embedded(1200 + i),
            "answer": "C",
            "category": "math",
        }
        for i in range(20)
    ]
    features = {"index": WHOLE, "question": TEXT, "image": Image(), "answer": TEXT, "category": TEXT}
    write(root, "Lin-Chen/MMStar", {"val": rows}, features)


@copies("mmmu")
def mmmu(root: Path) -> None:
    """Several images with marks in the question; options written out as a string, none for an open question."""
    rows = [
        {
            "id": f"validation_Art_{i}",
            "question": "Compare <image 1> and <image 2>.",
            "options": "['it\\'s \"A\"', 'the second', '<image 3>']" if i % 2 else "[]",
            "answer": "B" if i % 2 else "['4', 'four']",
            "subfield": "History",
            **{f"image_{n}": embedded(1300 + 10 * i + n) if n <= 1 + i % 3 else None for n in range(1, 8)},
        }
        for i in range(20)
    ]
    features = dict.fromkeys(("id", "question", "options", "answer", "subfield"), TEXT)
    features |= {f"image_{n}": Image() for n in range(1, 8)}
    write(root, "lmms-lab-encoder/MMMU", {"validation": rows}, features)


@copies("seedbench")
def seedbench(root: Path) -> None:
    """The image column is a list; some rows are about videos."""
    rows = [
        {
            "answer": "D",
            "choice_a": "one",
            "choice_b": "two",
            "choice_c": "three",
            "choice_d": "four",
            "data_type": "video" if i % 4 == 0 else "image",
            "question": "How many?",
            "question_type_id": 5,
            "image": [embedded(1600 + i), embedded(1700 + i)] if i % 4 == 0 else [embedded(1600 + i)],
        }
        for i in range(28)
    ]
    features = dict.fromkeys(("answer", "choice_a", "choice_b", "choice_c", "choice_d", "data_type", "question"), TEXT)
    features |= {"question_type_id": WHOLE, "image": List(Image())}
    write(root, "lmms-lab-encoder/SEED-Bench", {"test": rows}, features)


@copies("snli-ve")
def snli_ve(root: Path) -> None:
    names = ["entailment", "neutral", "contradiction"]
    rows = [
        {
            "image": embedded(1800 + i // 2),
            "filename": f"{i // 2}.jpg",
            "premise": "unused",
            "hypothesis": f"Dog {i} runs.",
            "label": i % 3,
        }
        for i in range(24)
    ]
    features = {"image": Image(), "filename": TEXT, "hypothesis": TEXT, "label": ClassLabel(names=names)}
    write(root, "Multimodal-Fatima/SNLI-VE_test", {"test": rows}, features)


@copies("cifar-10", "cifar-100", "mnist")
def classes(root: Path) -> None:
    """CIFAR's column is ``img``; CIFAR-100 has two labels; MNIST's pictures are grey."""
    for hub_id, image, label, names, mode in (
        ("uoft-cs/cifar10", "img", "label", ["airplane", "automobile", "bird"], "RGB"),
        ("uoft-cs/cifar100", "img", "fine_label", [f"class {i}" for i in range(100)], "RGB"),
        ("ylecun/mnist", "image", "label", list("0123456789"), "L"),
    ):
        features = {image: Image(), label: ClassLabel(names=names)}
        if label == "fine_label":
            features["coarse_label"] = ClassLabel(names=["x", "y"])
        splits = {
            split: [
                {image: embedded(first + i, mode=mode), label: i % len(names), "coarse_label": 0} for i in range(24)
            ]
            for split, first in (("train", 2000), ("test", 3000))
        }
        write(root, hub_id, splits, features)


@copies("vision-flan")
def vision_flan(root: Path) -> None:
    folder = root / "Vision-Flan/vision-flan_191-task_1k"
    rows = []
    for i in range(20):
        said = [{"from": "human", "value": f"<image>\nWhere is box {i}?"}, {"from": "gpt", "value": "[0.1, 0.2]"}]
        rows.append({"id": f"task_{i}", "image": f"task_{i}.png", "conversations": said, "task_name": "boxes"})
        file = folder / "image_191-task_1k" / f"task_{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture(4000 + i))
    (folder / "annotation_191-task_1k.json").write_text(json.dumps(rows))


@copies("cc-sbu-align")
def cc_sbu_align(root: Path) -> None:
    folder = root / "cc_sbu_align"  # without its owner
    (folder / "image").mkdir(parents=True)
    rows = [{"image_id": str(i), "caption": f"Picture {i} shows noise. "} for i in range(20)]
    (folder / "filter_cap.json").write_text(json.dumps({"annotations": rows}))
    for i in range(20):
        (folder / "image" / f"{i}.jpg").write_bytes(picture(5000 + i, kind="JPEG"))
