"""One sentence that tells everything in a picture."""

from collections.abc import Sequence

from vlm_jax.data.arrangements import direction, holds
from vlm_jax.data.scenes import Arrangement, Chart, Emblem, Form, Glyphs, Scene, Signs, Thing


def caption(scene: Scene) -> str:
    """A sentence with all text, values, shapes and places of a scene, in reading order.

    An arrangement begins with its leftmost thing that is inside no other. Each other thing's place is told from that
    one, by the direction in which they are further apart, or as inside the thing that it is in.
    """
    match scene:
        case Emblem(entity):
            return f"{entity.look.capitalize()}."
        case Glyphs(text):
            return f"The text {text}."
        case Form(parts):
            return f"A form with {_listed([f'{key} {value}' for _, key, value in parts])}."
        case Chart(parts):
            return f"A chart with {_listed([f'{key} {value}' for _, key, value in parts])}."
        case Signs(parts):
            return f"Signs with {_listed([f'{key} {value}' for _, key, value in parts])}."
        case Arrangement(things):
            return _arrangement(things)


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _arrangement(things: tuple[Thing, ...]) -> str:
    hosts = {thing: host for thing in things for host in things if holds("inside", thing, host)}
    first, *others = sorted(things, key=lambda thing: (thing in hosts, thing.x))
    parts = [first.look]
    for thing in others:
        other = hosts.get(thing, first)
        parts.append(f"{thing.look} {direction(thing, other)} the {other.shape}")
    return f"{_listed(parts).capitalize()}."
