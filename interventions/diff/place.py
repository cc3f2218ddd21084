"""Where a dictionary belongs: the site and layer whose activations it reads, and the model."""

import re
from typing import NamedTuple

from vlm_jax.errors import UserError
from vlm_jax.sites import layered, stage

#: Site -> its name in TransformerLens, which SAELens folders use.
HOOKS = {
    "text.resid_pre": "hook_resid_pre",
    "text.resid_post": "hook_resid_post",
    "text.attn_out": "hook_attn_out",
    "text.mlp_out": "hook_mlp_out",
    "text.head_out": "attn.hook_z",
}
_SITE = re.compile(r"(?P<site>[a-z_]+\.[a-z_0-9.]+?)(?:\.(?P<layer>\d+))?(?:\.seed-(?P<seed>\d+))?")


class Place(NamedTuple):
    """A site and a layer; ``layer`` is None at a site outside of the layers. ``seed`` tells several dictionaries of a
    place apart; None if there is one."""

    site: str
    layer: int | None
    seed: int | None = None

    def __str__(self) -> str:
        """The name of the dictionary's folder: ``SITE.LAYER`` or ``SITE.LAYER.seed-S``."""
        parts = [self.site, *([] if self.layer is None else [str(self.layer)])]
        return ".".join([*parts, *([] if self.seed is None else [f"seed-{self.seed}"])])

    @classmethod
    def parse(cls, name: str) -> "Place":
        """The place that a folder's name tells.

        Raises:
            UserError: for a name of another form or an unknown site.
        """
        match = _SITE.fullmatch(name)
        if match is None:
            raise UserError(f"{name!r} is no name of a dictionary: it must be SITE.LAYER, such as text.resid_post.4")
        site, layer, seed = match["site"], match["layer"], match["seed"]
        stage(site)
        if layered(site) != (layer is not None):
            raise UserError(f"{name!r}: {site} {'needs' if layered(site) else 'has no'} layer, as in text.resid_post.4")
        return cls(site, None if layer is None else int(layer), None if seed is None else int(seed))

    @property
    def hook(self) -> str | None:
        """The name in TransformerLens; None if it has none."""
        return None if self.site not in HOOKS else f"blocks.{self.layer}.{HOOKS[self.site]}"

    @classmethod
    def of_hook(cls, hook: str) -> "Place | None":
        """The place of a name in TransformerLens; None for one that has no site here."""
        match = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook)
        sites = [site for site, name in HOOKS.items() if match and name == match[2]]
        return cls(sites[0], int(match[1])) if match and sites else None
