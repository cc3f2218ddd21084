"""How much faster LoRA trains here than with PEFT and transformers, on the same weights in one process.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python benchmarks/lora.py --json runs/lora_speed.json

Both sides train the same adapters of a random Qwen3 text model on the same tokens, with gradient checkpointing (P0) and
AdamW. They take turns, step by step, so that other work on the machine slows both alike. Times are medians of the steps
after the first. Memory is measured afterwards, each side in a separate process.
"""

import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro


@dataclasses.dataclass(frozen=True)
class Args:
    """Time a training step: LoRA on every linear, and on every linear of the upper layers."""

    layers: int = 28
    width: int = 1024
    heads: int = 16
    """Query heads; half as many key-value heads. Heads are 128 wide."""
    ffn: int = 3072
    vocabulary: int = 8192
    """Small, because transformers computes the logits of every token, this library only those of the answer."""
    batch: int = 4
    tokens: int = 300
    answer: int = 6
    """Tokens at the end of each row that the loss counts."""
    upper: int = 10
    """Layers of the second placement, counted from the top."""
    r: int = 64
    dropout: float = 0.0
    """Dropout of LoRA's inputs. Losses can be compared only at 0."""
    remat: Literal["full", "some", "none"] = "some"
    """What this library recomputes in the backward pass (PEFT recomputes whole layers)."""
    epochs: int = 3
    """Over how many epochs the frozen trunk is reused, for placements with a trunk (P0: 3)."""
    repeats: int = 5
    placements: tuple[Literal["all", "upper"], ...] = ("all", "upper")
    ours: tuple[Literal["ours", "ours-over-bfloat16", "ours-bfloat16"], ...] = (
        "ours",
        "ours-over-bfloat16",
        "ours-bfloat16",
    )
    """This library in float32, in float32 over bfloat16 weights, in bfloat16. Others are compared with the first."""
    peers: tuple[Literal["peft", "peft-lean", "peft-bfloat16"], ...] = ("peft", "peft-lean", "peft-bfloat16")
    """What to compare with: PEFT with its defaults; PEFT without gradients below the adapters (by default its gradient
    checkpointing computes those of the embeddings); PEFT with bfloat16 weights."""
    memory: bool = True
    """Also measure the peak memory of each side, in separate processes."""
    json: Path | None = None
    """Where to write the figures."""


def modules(args: Args, placement: str) -> list[str]:
    first = 0 if placement == "all" else args.layers - args.upper
    return [f"L{layer}-{module}" for layer in range(first, args.layers) for module in ("attn", "mlp")]


def tokens(args: Args) -> np.ndarray:
    return np.random.default_rng(0).integers(0, args.vocabulary, (args.batch, args.tokens))


def write_model(args: Args, folder: Path) -> None:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=args.vocabulary,
        hidden_size=args.width,
        intermediate_size=args.ffn,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads // 2,
        head_dim=128,
        tie_word_embeddings=True,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    # In bfloat16, so that every side has the same weights in every precision.
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "model")


def write_adapter(args: Args, folder: Path, placement: str) -> None:
    """The adapter that both sides start from: B is not zero, so that it changes the loss."""
    import jax

    import vlm_jax
    from interventions.placement.adapters import init_lora, save_peft

    model, _ = vlm_jax.load(folder / "model", dtype="float32")
    key = jax.random.key(0)
    lora = init_lora(model, modules(args, placement), r=args.r, alpha=16.0, dropout=args.dropout, key=key)
    shake = lambda b: 0.01 * jax.random.normal(jax.random.fold_in(key, b.shape[-1]), b.shape)  # noqa: E731
    lora = lora.replace(weights={site: (a, shake(b)) for site, (a, b) in lora.weights.items()})
    save_peft(lora, model, folder / placement)


#: The precisions of this library's sides.
_OURS: dict[str, dict[str, Any]] = {
    "ours": {"dtype": "float32"},
    "ours-over-bfloat16": {"dtype": "float32", "weights": "bfloat16"},
    "ours-bfloat16": {"dtype": "bfloat16"},
}


class Ours:
    """This library's training step, as ``train.trunk`` runs it."""

    def __init__(self, args: Args, folder: Path, placement: str, side: str):
        import jax

        import vlm_jax
        from interventions.placement.adapters import load_peft
        from train import trunk
        from train.adapter import ADAPTER_LABELS, adapter_label
        from train.objective import adamw, linear_decay
        from train.step import Step, update
        from train.subsets import partitioned, split
        from vlm_jax.prompts import Batch

        self.jax, self.update, self.trunk = jax, update, trunk
        model, _ = vlm_jax.load(folder / "model", **_OURS[side])
        lora = load_peft(model, folder / placement).replace(dropout=args.dropout)
        ids = tokens(args)
        answer = np.zeros(ids.shape, bool)
        answer[:, -args.answer :] = True
        self.batch = Batch(vlm_jax.Inputs.from_hf(model.config, input_ids=ids), {"answer": answer, "end": answer}, 0)
        self.model, self.size = model, args.batch
        params = trunk.prepared(model, lora, len(modules(args, placement)), args.remat)
        transforms = dict.fromkeys(ADAPTER_LABELS, adamw(linear_decay(2e-4, 1000)))
        self.program = Step(trunk.adapter_loss, partitioned(transforms, adapter_label))
        self.lowest = params.lowest
        trained, self.rest = split(params, adapter_label)
        self.state = self.program.begin(trained)
        self.read()

    def read(self) -> None:
        """Runs the frozen trunk: once per example, or once per step if it is not reused."""
        data = self.trunk.trunk(self.model, self.batch, self.lowest, size=self.size)
        self.data = self.jax.tree.map(lambda a: a[None], data)

    def step(self) -> float:
        key = self.jax.random.key(0)
        self.state, metrics = self.update(self.state, self.rest, self.data, key, step=self.program)
        return float(metrics["loss"])


class Peft:
    """The other side: PEFT on transformers, gradient checkpointing, torch's AdamW."""

    def __init__(self, args: Args, folder: Path, placement: str, kind: str):
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        dtype = torch.bfloat16 if kind == "peft-bfloat16" else torch.float32
        base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=dtype)
        base.config.use_cache = False
        base.gradient_checkpointing_enable()
        model = PeftModel.from_pretrained(base, folder / placement, is_trainable=True)
        if kind == "peft-lean":
            base.disable_input_require_grads()
        self.model = model.to(torch_device()).train()
        self.ids = torch.tensor(tokens(args), device=torch_device())
        self.labels = torch.full_like(self.ids, -100)
        self.labels[:, -args.answer :] = self.ids[:, -args.answer :]
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0)
        self.schedule = torch.optim.lr_scheduler.LinearLR(self.optimiser, 1.0, 0.0, 1000)

    def read(self) -> None:
        """PEFT keeps nothing from step to step, so there is no trunk to run."""

    def step(self) -> float:
        out = self.model(input_ids=self.ids, labels=self.labels)
        out.loss.backward()
        self.optimiser.step()
        self.schedule.step()
        self.optimiser.zero_grad(set_to_none=True)
        return float(out.loss.detach())


def make(args: Args, folder: Path, placement: str, side: str):
    return (Ours if side in _OURS else Peft)(args, folder, placement, side)


def timed(call) -> tuple[float, float, float | None]:
    """Wall-clock seconds, and CPU seconds of all cores."""
    begun, work = time.perf_counter(), time.process_time()
    value = call()
    return time.perf_counter() - begun, time.process_time() - work, value


def compare(args: Args, folder: Path, placement: str) -> dict:
    """For every side: seconds of the trunk and of a step, measured in turns, and the losses."""
    sides = {side: make(args, folder, placement, side) for side in (*args.ours, *args.peers)}
    rows: dict = {side: {"seconds": [], "trunk_seconds": [], "core_seconds": [], "losses": []} for side in sides}
    for side, it in sides.items():
        rows[side]["first_seconds"] = timed(it.step)[0]
    for turn in range(args.repeats):
        for side, it in sides.items():
            read, read_work, _ = timed(it.read)
            step, step_work, loss = timed(it.step)
            values = {"seconds": step, "trunk_seconds": read, "core_seconds": read_work + step_work, "losses": loss}
            for name, value in values.items():
                rows[side][name].append(value)
            print(f"{placement}, turn {turn + 1}, {side}: {read:.2f} + {step:.2f} s, loss {loss:.5f}", flush=True)
    first = next(iter(rows.values()))
    for row in rows.values():
        row |= {name: statistics.median(row[name]) for name in ("seconds", "trunk_seconds", "core_seconds")}
        gaps = [abs(a - b) for a, b in zip(row["losses"], first["losses"], strict=True)]
        row["loss_difference"] = max(gaps)
    return rows


def peak(args: Args, folder: Path, placement: str, side: str) -> float:
    """Peak resident memory in GiB during three steps of one side, in a separate process."""
    code = (
        "import sys, json; sys.path.insert(0, sys.argv[1]); from pathlib import Path; import lora;"
        "args = lora.Args(**json.loads(sys.argv[2])); lora.watch(args, Path(sys.argv[3]), *sys.argv[4:])"
    )
    plain = {k: v for k, v in dataclasses.asdict(args).items() if k != "json"}
    command = [sys.executable, "-c", code, str(Path(__file__).parent), json.dumps(plain), folder, placement, side]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def watch(args: Args, folder: Path, placement: str, side: str) -> None:
    it = make(args, folder, placement, side)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of loading
    for _ in range(3):
        it.read()
        it.step()
    print(int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20)


def report(args: Args, results: dict) -> str:
    """The Markdown table."""
    count = args.batch * args.tokens
    lines = [
        "| LoRA on | trained with | seconds a step | tokens a second | times ours | times ours, trunk reused "
        "| core-seconds | peak memory (GiB) | loss differs by |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for placement, rows in results.items():
        ours = next(iter(rows.values()))
        where = "all linears" if placement == "all" else f"the linears of the upper {args.upper} layers"
        whole = ours["trunk_seconds"] + ours["seconds"]
        reused = ours["trunk_seconds"] / args.epochs + ours["seconds"]
        shown = []
        for side, row in rows.items():
            shown.append((side, row["trunk_seconds"] + row["seconds"], row))
            if placement != "all" and side in _OURS:
                spent = row["trunk_seconds"] / args.epochs + row["seconds"]
                shown.append((f"{side}, trunk reused over {args.epochs} epochs", spent, row))
        for name, spent, row in shown:
            memory = f"{row['memory_gib']:.2f}" if "memory_gib" in row else ""
            lines.append(
                f"| {where} | {name} | {spent:.2f} | {count / spent:.0f} | {spent / whole:.2f} | {spent / reused:.2f} "
                f"| {row['core_seconds']:.1f} | {memory} | {row['loss_difference']:.1e} |"
            )
    return "\n".join(lines)


def torch_device() -> str:
    """The device of the other side."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def machine() -> str:
    """The processor's name and the number of its cores."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1] for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    )
    return f"{(names or [platform.machine()])[0].strip()}, {os.cpu_count()} cores"


def main(args: Args) -> None:
    results: dict = {}
    print(machine())
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_model(args, folder)
        for placement in args.placements:
            write_adapter(args, folder, placement)
            results[placement] = compare(args, folder, placement)
            if args.memory:
                for side, row in results[placement].items():
                    row["memory_gib"] = peak(args, folder, placement, side)
            print(report(args, results), flush=True)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        options = json.loads(json.dumps(dataclasses.asdict(args), default=str))
        args.json.write_text(
            json.dumps({"machine": machine(), "options": options, "results": results}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main(tyro.cli(Args))
