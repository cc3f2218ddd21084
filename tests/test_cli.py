"""Every mistake a user can make ends with one sentence on stderr, exit code 2 and nothing written."""

import dataclasses
import inspect
import json
import re
from collections import defaultdict
from pathlib import Path

import pytest
import tyro
from PIL import Image

import eval.accuracy
import interventions.diff.options
import interventions.flow.__main__
import interventions.lens.options
import interventions.talo.options
import interventions.trace.__main__
import train.edit
import train.lora
import train.plan
import train.pretrain
import train.register
import train.sae
import train.study.control.options
import train.study.diffing.options
import train.study.editing.options
import train.study.placement.options
import train.study.registering.options
import train.tune
from eval.evaluation import AnswerOptions
from interventions import Gate, digest, save_interventions
from interventions.trace.options import TraceOptions
from vlm_jax.data.miniworld import make_example
from vlm_jax.runs.options import ModelOptions
from vlm_jax.runs.ranges import Range, flag

LINE = {"id": "1", "image": "a.png", "question": "What is it?", "answers": ["sun"]}


def write_jsonl(folder: Path, *lines: str) -> str:
    Image.new("RGB", (64, 64), "white").save(folder / "a.png")
    (folder / "broken.png").write_bytes(b"not an image")
    path = folder / "data.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture
def refused(capsys, tmp_path):
    """Runs a command that must refuse, and returns its sentence."""

    def run(command, **options) -> str:
        out = options.pop("out", tmp_path / "out")
        before = sorted(out.rglob("*")) if out.exists() else None
        with pytest.raises(SystemExit) as stop:
            command.main(command.Args(**options, out=out))
        assert stop.value.code == 2
        captured = capsys.readouterr()
        lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and captured.err.rstrip().endswith(lines[0]), captured.err
        after = sorted(out.rglob("*")) if out.exists() else None
        assert after == before, "something was written"
        return lines[0]

    return run


COMMANDS = [interventions.trace.__main__, eval.accuracy]


@pytest.mark.parametrize("command", [*COMMANDS, train.lora], ids=lambda c: c.__name__)
def test_unknown_model(refused, command):
    assert "did you mean 'mini-qwen3-vl'" in refused(command, model="mini-qwen3")


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.__name__)
def test_unknown_task(refused, command):
    assert "did you mean 'mini-okvqa'" in refused(command, task="mini-okvq")


@pytest.mark.parametrize(
    "line, says",
    [
        ("{not json", "line 2"),
        (json.dumps({k: v for k, v in LINE.items() if k != "answers"}), "answers"),
        (json.dumps({**LINE, "id": "2", "image": "none.png"}), "none.png"),
        (json.dumps({**LINE, "id": "2", "image": "broken.png"}), "broken.png"),
    ],
    ids=["not JSON", "lacks a field", "missing image", "broken image"],
)
@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.__name__)
def test_bad_line(refused, tmp_path, command, line, says):
    error = refused(command, task=write_jsonl(tmp_path, json.dumps(LINE), line))
    assert says in error and "line 2" in error


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.__name__)
def test_empty_task(refused, tmp_path, command):
    assert "data.jsonl" in refused(command, task=write_jsonl(tmp_path, ""))
    assert "--limit is 0: give at least 1" in refused(command, limit=0)


def test_question_that_does_not_fit(refused, tmp_path):
    long = {**LINE, "question": "word " * 600}
    for command in COMMANDS:
        assert "'1' has" in refused(command, task=write_jsonl(tmp_path, json.dumps(long)))


@pytest.mark.parametrize(
    "options, says",
    [
        ({"window": 9}, "choose 1 to 8"),
        ({"corruption": "mean_image", "replicates": 2}, "drop --replicates"),
        ({"positions": ("questoin",)}, "did you mean 'question'"),
        ({"noise_scale": -1.0}, "above 0"),
        ({"limit": 1, "corruption": "swapped_image"}, "another image"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_trace_options(refused, options, says):
    assert says in refused(interventions.trace.__main__, **options)


@pytest.mark.parametrize(
    "options, says",
    [
        ({"placement": "task_dif"}, "did you mean 'task_diff'"),
        ({"k": 17}, "16 modules"),
        ({"k": 0}, "at least 1"),
        ({"lr": float("nan")}, "--lr is nan: give a number above 0"),
        ({"lr": 1e30}, "--lr is 1e+30: give at most 100"),
        ({"alpha": 0.0}, "--alpha is 0.0: give a number above 0"),
        ({"trunk_gib": -1.0}, "--trunk-gib is -1.0: give at least 0"),
        ({"seed": 2**63}, "--seed is 9223372036854775808: give at most"),
        ({"batch": 10**9}, "--batch is 1000000000: give at most 65536"),
        ({"train": "0"}, "at least one"),
        ({"train": "mini-okvq"}, "did you mean 'mini-okvqa'"),
        ({"trace": "mini-okvqa"}, "needs traced examples of perception"),
        ({"train": "mini-okvqa", "eval": "mini-docvqa"}, "share no family"),
        ({"r": 0}, "at least 1"),
        ({"placement": "nowhere.json"}, "nowhere.json"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_lora_options(refused, options, says):
    assert says in refused(train.lora, **options)


@pytest.mark.parametrize(
    "change, says",
    [
        ({}, "has the id of training example '1'"),
        ({"id": "2"}, "has the question and image of training example '1'"),
        ({"id": "2", "image": "same.png"}, "has the question and image"),
        ({"question": "What else is it?"}, "has the id"),
        ({"id": "2", "question": "What else is it?"}, None),
        ({"id": "2", "image": "b.png"}, None),
    ],
    ids=["all", "another id", "another file", "another question", "another id and question", "another image"],
)
def test_examples_to_train_and_to_evaluate_on(refused, tmp_path, change, says):
    """Whatever is not refused for that is refused for its placement, which comes later."""
    line = {**LINE, "family": "knowledge"}
    train_file = write_jsonl(tmp_path, json.dumps(line))
    (tmp_path / "same.png").write_bytes((tmp_path / "a.png").read_bytes())
    Image.new("RGB", (64, 64), "black").save(tmp_path / "b.png")
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(json.dumps(line | change) + "\n")
    error = refused(train.lora, train=train_file, eval=str(held_out), placement="nowhere.json")
    assert (f"example {(line | change)['id']!r} " in error and says in error) if says else "nowhere.json" in error


@pytest.mark.parametrize(
    "content, says",
    [
        ('["L9-attn"]', "L9-attn"),
        ('["L3-atn"]', "did you mean 'L3-attn'"),
        ("[]", "list of module names"),
        ("{", "JSON"),
    ],
)
def test_placement_file(refused, tmp_path, content, says):
    (tmp_path / "placement.json").write_text(content)
    assert says in refused(train.lora, placement=str(tmp_path / "placement.json"))


@pytest.mark.parametrize("command", [*COMMANDS, train.lora], ids=lambda c: c.__name__)
def test_folder_of_something_else(refused, tmp_path, command):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("dear reader")
    assert "not a run folder" in refused(command, out=tmp_path / "thesis")


def test_occupied_folder_is_refused_before_the_model_is_loaded(refused, tmp_path, monkeypatch):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("dear reader")
    monkeypatch.setattr(ModelOptions, "load", lambda self: pytest.fail("the model was loaded"))
    assert "not a run folder" in refused(eval.accuracy, out=tmp_path / "thesis")


def test_unknown_adapter(refused, tmp_path):
    assert "adapter_config.json" in refused(eval.accuracy, adapter=(tmp_path,))


def test_weights_without_adapters(refused):
    assert "--adapter names none" in refused(eval.accuracy, adapter_weights=(0.5,))


def run_accuracy(out: Path, limit: int = 3) -> None:
    eval.accuracy.main(eval.accuracy.Args(task="mini-docvqa", limit=limit, batch=4, max_new_tokens=3, out=out))


def test_accuracy_folder(refused, tmp_path):
    """The records account for the score, the same run may be repeated, and another run is refused."""
    out = tmp_path / "run"
    run_accuracy(out)
    records = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    results = json.loads((out / "results.json").read_text())
    assert [r["id"] for r in records] == [make_example("mini-docvqa", "test", i).id for i in range(3)]
    assert results["accuracy"] == sum(r["correct"] for r in records) / 3
    run_accuracy(out)
    assert "limit 3 there, 4 here" in refused(
        eval.accuracy, task="mini-docvqa", limit=4, batch=4, max_new_tokens=3, out=out
    )


def test_saved_intervention_that_does_not_fit(refused, tmp_path):
    file = tmp_path / "cut.safetensors"
    assert "no saved interventions" in refused(eval.accuracy, intervention=(file,))
    save_interventions(file, (Gate.cut(4, [1]),))
    assert "has 8 layers" in refused(eval.accuracy, intervention=(file,), limit=2)


def test_accuracy_under_a_saved_intervention(tmp_path, capsys):
    """The answers change with the attention of layer 1 cut, and the run says under what they were given."""
    cut = (Gate.cut(8, [1]),)
    save_interventions(tmp_path / "cut.safetensors", cut)

    def predictions(name, **options):
        args = eval.accuracy.Args(task="mini-docvqa", limit=8, batch=8, out=tmp_path / name, **options)
        eval.accuracy.main(args)
        lines = (tmp_path / name / "samples.jsonl").read_text().splitlines()
        return [json.loads(line)["prediction"] for line in lines]

    base, under = predictions("base"), predictions("cut", intervention=(tmp_path / "cut.safetensors",))
    assert base != under
    assert json.loads((tmp_path / "cut" / "results.json").read_text())["interventions"] == digest(cut)
    assert "text.attn_out L1" in capsys.readouterr().out


# What options are called

#: The options that all commands take from shared dataclasses, by their field, and the flag that they have in each.
NAMES = {
    "TraceOptions.batch": "--trace-batch",
    "TraceOptions.seed": "--trace-seed",
    "TraceOptions.metric": "--trace-metric",
    "TraceOptions.noise_scale": "--noise-scale",
    "MetricOptions.metric": "--metric",
    "AnswerOptions.batch": "--answer-batch",
    "AnswerOptions.max_new_tokens": "--max-new-tokens",
    "LoRAOptions.batch": "--batch",
    "LoRAOptions.accumulation": "--accumulation",
    "DataOptions.data_root": "--data-root",
    "DeviceOptions.mesh": "--mesh",
    "DeviceOptions.processes": "--processes",
}
ARGS = {
    "interventions.trace": interventions.trace.__main__.Args,
    "interventions.flow": interventions.flow.__main__.Args,
    "interventions.lens": interventions.lens.options.Args,
    "interventions.talo": interventions.talo.options.Args,
    "eval.accuracy": eval.accuracy.Args,
    "train.lora": train.lora.Args,
    "train.tune": train.tune.Args,
    "train.edit": train.edit.Args,
    "train.register": train.register.Args,
    "train.sae": train.sae.Args,
    "interventions.diff": interventions.diff.options.Args,
    "train.study": train.study.placement.options.Args,
    "train.study --recipe p1": train.study.registering.options.Args,
    "train.study --recipe p2": train.study.diffing.options.Args,
    "train.study --recipe p4": train.study.editing.options.Args,
    "train.study --recipe p4-control": train.study.control.options.Args,
    "train.plan": train.plan.Args,
    "train.pretrain": train.pretrain.Args,
}
#: Flags that other tools call each command with.
EXPECTED = {
    "interventions.trace": "--task --limit --out --noise-scale --trace-batch --mesh --processes --data-root",
    "interventions.flow": "--task --limit --out --batch --max-new-tokens",
    "interventions.lens": "--task --limit --split --top --against --maps --out --batch --intervention",
    "interventions.talo": "--task --limit --out --batch",
    "eval.accuracy": "--task --limit --out --adapter --adapter-weights --intervention --metric --answer-batch",
    "train.lora": "--placement --where --use-dora --use-rslora --batch --accumulation --out --train --eval --trace "
    "--lr --epochs --r --noise-scale",
    "train.tune": "--train --eval --eval-limit --parts --batch --lr --epochs --answer-batch --out",
    "train.edit": "--model --preset --train --eval --limit --eval-limit --epochs --kind --suffix --answer-batch --out",
    "train.register": "--model --registers --mask --train --eval --limit --eval-limit --epochs --out",
    "train.sae": "--model --sites --layers --latents --k --init --task --out",
    "interventions.diff": "--base --adapted --model --out",
    "train.study --recipe p4": "--recipe --model --train --eval --limit --eval-limit --seeds --conditions --out",
    "train.study": "--recipe --models --batch --lr --epochs --noise-scale --answer-batch --trace --train --eval --out",
}


def options_of(cls: type) -> dict[str, str]:
    """The options of a command: ``CLASS.field``, where CLASS first has the field, and its flag."""
    options = {}
    for field in dataclasses.fields(cls):
        nested = field.default_factory() if field.default_factory is not dataclasses.MISSING else None
        if dataclasses.is_dataclass(nested):
            options |= options_of(type(nested))
        else:
            owner = next(c for c in reversed(cls.__mro__) if field.name in getattr(c, "__dataclass_fields__", ()))
            options[f"{owner.__name__}.{field.name}"] = flag(field)
    return options


def flags_in_help(cls: type, capsys) -> set[str]:
    with pytest.raises(SystemExit):
        tyro.cli(cls, args=["--help"])
    return set(re.findall(r"^[│ ]*(--[\w.-]+)", capsys.readouterr().out, re.MULTILINE))


@pytest.mark.parametrize("name", ARGS)
def test_flags_are_the_fields_and_carry_no_prefix(name, capsys):
    options, shown = options_of(ARGS[name]), flags_in_help(ARGS[name], capsys)
    assert set(options.values()) <= shown | {"--json"}, set(options.values()) - shown
    assert not [shown_flag for shown_flag in shown if "." in shown_flag.rstrip(".")]  # a sentence may end behind one
    assert len(set(options.values())) == len(options), "two options of one command have the same flag"
    assert set(EXPECTED.get(name, "").split()) <= shown


def test_an_option_has_one_name_in_every_command():
    flags = defaultdict(set)
    for cls in ARGS.values():
        for option, name in options_of(cls).items():
            flags[option].add(name)
    assert {option: names for option, names in flags.items() if len(names) > 1} == {}
    assert {option: flags[option] for option in NAMES} == {option: {name} for option, name in NAMES.items()}


def test_a_flag_means_the_same_in_every_command():
    """Short flags belong to what a command is about; those of the shared groups are nowhere another option's."""
    owners = defaultdict(set)
    for cls in ARGS.values():
        for option, name in options_of(cls).items():
            owners[name].add(option.partition(".")[0])
    shared = {"TraceOptions", "MetricOptions", "AnswerOptions", "DataOptions", "DeviceOptions"}
    #: Names that flow, plan, pretrain and a study have for the same thing, though not from the shared classes.
    same = {"--answer-batch", "--max-new-tokens", "--window", "--mesh"}
    mixed = {name for name, classes in owners.items() if len(classes) > 1 and classes & shared}
    assert mixed <= same, mixed


@pytest.mark.parametrize("name", ARGS)
def test_no_two_groups_of_options_share_a_field(name):
    """One would silently take the other's values. A command may define an option of its groups anew."""
    owners = defaultdict(set)
    for cls in ARGS[name].__mro__[1:]:
        for field in inspect.get_annotations(cls):
            owners[field].add(cls)
    unrelated = {
        field: classes
        for field, classes in owners.items()
        if field not in inspect.get_annotations(ARGS[name])
        and not any(all(issubclass(one, other) for other in classes) for one in classes)
    }
    assert unrelated == {}


def numbers_without_range(cls: type):
    """The number fields of a command's options that accept any number, in groups too."""
    for field in dataclasses.fields(cls):
        kind, notes = field.type, getattr(field.type, "__metadata__", ())
        kind = getattr(kind, "__origin__", kind) if notes else kind
        if dataclasses.is_dataclass(kind):
            yield from numbers_without_range(kind)
        elif re.search(r"\b(int|float)\b", str(kind)) and not any(isinstance(note, Range) for note in notes):
            yield field.name


@pytest.mark.parametrize("cls", ARGS.values(), ids=ARGS)
def test_every_number_has_a_range(cls):
    assert not list(numbers_without_range(cls))


def test_the_command_line_reaches_the_groups():
    line = "--batch 8 --trace-batch 4 --answer-batch 2 --trace-seed 3 --seed 5 --metric anls"
    args = tyro.cli(train.lora.Args, args=[*line.split(), "--trace-metric", "log_probability"])
    assert (args.batch, args.tracing.batch, args.answering.batch) == (8, 4, 2)
    assert (args.seed, args.tracing.seed) == (5, 3)
    assert (args.metric.metric, args.tracing.metric) == ("anls", "log_probability")


@pytest.mark.parametrize(
    "options, says",
    [
        ({"tracing": TraceOptions(batch=0)}, "--trace-batch is 0"),
        ({"answering": AnswerOptions(batch=0)}, "--answer-batch is 0"),
        ({"dropout": 1.0}, "--dropout is 1.0"),
        ({"random_seeds": (1, -1)}, "--random-seeds is -1"),
        ({"mesh": "data=4096"}, "4096"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refused_before_anything_is_read(refused, monkeypatch, options, says):
    monkeypatch.setattr(train.lora, "load_examples", lambda *args, **kwargs: pytest.fail("read"))
    assert says in refused(train.lora, **options)


@pytest.mark.parametrize(
    "placement, family, says",
    [
        ("fisher", "knowledge", "--traces gives restoration rates, but placement 'fisher' needs the score fisher"),
        ("first", "knowledge", "placement 'first' needs no score: drop --traces"),
        ("shared", "knowlege", "'knowlege', which is not placed; did you mean 'knowledge'?"),
    ],
)
def test_traces_that_would_not_be_read_or_be_taken_for_another_score(refused, tmp_path, placement, family, says):
    options = {"train": "4", "eval": "4", "trace": "4", "traces": {family: tmp_path}}
    assert says in refused(train.lora, placement=placement, **options)


def test_one_trace_for_two_families(refused, tmp_path):
    traces = {"knowledge": tmp_path, "perception": tmp_path / "." / ""}
    says = refused(train.lora, train="4", eval="4", trace="4", traces=traces)
    assert "--traces gives knowledge and perception the same folder" in says
