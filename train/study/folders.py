"""Where a study keeps the results of its conditions."""


def folder_of(condition: str) -> str:
    """The folder of a condition in the run folder, from the condition's name."""
    return f"cells/{condition.replace(' / ', '-').replace(', ', '-').replace(' ', '-')}"
