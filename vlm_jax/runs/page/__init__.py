"""The report page: one HTML file that shows a run folder, without a network.

It reads ``artifacts.json`` and the files that this lists, so it knows no analysis. A type of artifact has a view
(:mod:`vlm_jax.runs.page.views`); a new type needs one view and nothing else.
"""

from vlm_jax.runs.page.document import write_page

__all__ = ["write_page"]
