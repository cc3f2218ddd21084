"""The console script: ``vlm-jax trace --task ...`` is ``python -m interventions.trace --task ...``."""

import ast
import contextlib
import importlib
import importlib.metadata
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from vlm_jax.errors import nearest

#: The name of each command -> its module.
COMMANDS = {
    "trace": "interventions.trace",
    "flow": "interventions.flow",
    "lens": "interventions.lens",
    "talo": "interventions.talo",
    "diff": "interventions.diff",
    "compare": "interventions.compare",
    "figures": "interventions.figures",
    "accuracy": "eval.accuracy",
    "page": "eval.page",
    "lora": "train.lora",
    "tune": "train.tune",
    "edit": "train.edit",
    "register": "train.register",
    "sae": "train.sae",
    "study": "train.study",
    "pretrain": "train.pretrain",
    "plan": "train.plan",
    "info": "vlm_jax.info",
    "convert": "vlm_jax.convert",
}


def main(words: Sequence[str] | None = None) -> None:
    """Runs the command that the first word names with the other words as its options.

    Args:
        words: the words behind ``vlm-jax``; None: those of the command line.
    """
    words = sys.argv[1:] if words is None else list(words)
    if words[:1] == ["--version"]:
        print(f"vlm-jax {importlib.metadata.version('vlm-jax')}")
        return
    if not words or words[0] in ("--help", "-h"):
        with contextlib.suppress(BrokenPipeError):  # of a reader that has enough, such as head
            print(usage(), flush=True)
        return
    name, *options = words
    if name not in COMMANDS:
        print(f"error: there is no command {name!r}{nearest(name, COMMANDS)}: see vlm-jax --help", file=sys.stderr)
        raise SystemExit(2)
    module = importlib.import_module(_module(name))
    program = f"vlm-jax {name}"
    sys.argv = [program, *options]
    described = module.options() if hasattr(module, "options") else module.Args
    module.main(tyro.cli(described, prog=program))


def usage() -> str:
    """The commands, each with the first paragraph of its documentation."""
    width = max(map(len, COMMANDS))
    lines = ["usage: vlm-jax COMMAND [OPTIONS]", "       vlm-jax --version", ""]
    for name, module in COMMANDS.items():
        lines.append(f"  {name:{width}s}  {_first_paragraph(_file(name))} ({module})")
    return "\n".join([*lines, "", "vlm-jax COMMAND --help explains the options of a command."])


def _file(name: str) -> Path:
    """The file of a command. It is read, not imported, because importing all commands takes seconds."""
    path = Path(__file__).parents[1].joinpath(*COMMANDS[name].split("."))
    return path / "__main__.py" if path.is_dir() else path.with_suffix(".py")


def _module(name: str) -> str:
    return f"{COMMANDS[name]}.__main__" if _file(name).name == "__main__.py" else COMMANDS[name]


def _first_paragraph(file: Path) -> str:
    text = " ".join((ast.get_docstring(ast.parse(file.read_text())) or "").split("\n\n")[0].split())
    return text.removesuffix(".")
