"""Recipes of studies: the placements to compare, and the numbers that the paper reports."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A study, and the paper's results to show beside it.

    source: the place in the paper. placements: those that are compared at one k. swept: those that are compared at
    every k. reported: model -> condition -> family -> accuracy in the paper. selected: placement -> family -> the
    modules that it chose in the paper. modules: the number of modules of the paper's model.
    """

    source: str
    placements: tuple[str, ...]
    swept: tuple[str, ...]
    reported: dict[str, dict[str, dict[str, float]]]
    selected: dict[str, dict[str, tuple[str, ...]]]
    modules: int


def _both(knowledge: float, perception: float) -> dict[str, float]:
    return {"knowledge": knowledge, "perception": perception}


RECIPES = {
    "p0": Recipe(
        source="P0, tables 1 to 3 (k = 10; one run for each of the top-k placements, three for random-k)",
        placements=(
            *("all", "random", "random_matched", "random_stratified", "shared", "task_diff"),
            *("gradient_norm", "fisher", "attribution", "page", "lora_drop", "talo"),
            *("first", "middle", "last"),
        ),
        swept=("random", "task_diff"),
        reported={
            "Qwen3-VL-4B": {
                "baseline": _both(0.417, 0.765),
                "all": _both(0.614, 0.818),
                "random": _both(0.599, 0.798),
                "shared": _both(0.586, 0.783),
                "task_diff": _both(0.596, 0.797),
            },
            "Gemma-3-4B": {
                "baseline": _both(0.433, 0.539),
                "all": _both(0.550, 0.588),
                "random": _both(0.547, 0.566),
                "shared": _both(0.526, 0.544),
                "task_diff": _both(0.542, 0.559),
            },
        },
        selected={
            "shared": {
                "knowledge": (
                    *("L23-mlp", "L24-attn", "L28-mlp", "L29-mlp", "L30-mlp"),
                    *("L31-mlp", "L32-mlp", "L33-mlp", "L34-mlp", "L35-mlp"),
                ),
                "perception": (
                    *("L0-attn", "L19-attn", "L24-attn", "L29-attn", "L32-attn"),
                    *("L32-mlp", "L33-mlp", "L34-attn", "L34-mlp", "L35-mlp"),
                ),
            },
            "task_diff": {
                "knowledge": (
                    *("L30-mlp", "L28-mlp", "L29-mlp", "L31-mlp", "L23-mlp"),
                    *("L25-attn", "L27-mlp", "L9-mlp", "L22-attn", "L24-mlp"),
                ),
                "perception": (
                    *("L29-attn", "L24-attn", "L32-attn", "L19-attn", "L30-attn"),
                    *("L33-attn", "L32-mlp", "L34-attn", "L0-mlp", "L20-attn"),
                ),
            },
        },
        modules=72,
    )
}
