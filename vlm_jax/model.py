"""The whole model: vision tower -> projector -> merge -> decoder -> logits, as one pure function."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, PRNGKeyArray

from vlm_jax.acting import acting
from vlm_jax.config import Config, with_registers
from vlm_jax.errors import UserError
from vlm_jax.families import backbone_config
from vlm_jax.inputs import Inputs
from vlm_jax.mesh.sharding import constrain
from vlm_jax.nn.decoder import Decoder, Window
from vlm_jax.registers import Registers
from vlm_jax.showing import shown, table_html, titled
from vlm_jax.sites import NO_TAPS, TEXT_SITES, Context, Probe, Tap, Taps, check_sites
from vlm_jax.typing import Array, ArrayLike
from vlm_jax.vision.blocks import Features


@shown
class Output(NamedTuple):
    """The logits of every token, and the taps: site -> value, with a leading axis of layers for the sites of layers."""

    logits: Float[Array, "batch tokens vocab"]
    taps: dict[str, Any]


class Embedded(NamedTuple):
    """What enters layer 0, and what DeepStack adds after the first ``levels`` layers.

    deepstack: None without images or without DeepStack.
    """

    x: Float[Array, "batch tokens width"]
    deepstack: Float[Array, "levels batch tokens width"] | None


class Model(nnx.Module):
    """A vision-language model, or its text-only backbone. A pytree: jit, vmap, scan and differentiate it with plain
    ``jax`` transforms."""

    def __init__(self, config: Config, key: PRNGKeyArray):
        text, visual = jax.random.split(key)
        self.config = config
        self.text = Decoder(text, config.text)
        self.visual = None if config.vision is None else config.vision.tower(visual)

    def __repr__(self) -> str:
        text, vision = self.config.text, self.config.vision
        tower = "" if vision is None else f", vision tower of {vision.depth} blocks of width {vision.hidden_size}"
        count = sum(getattr(leaf, "size", 0) for leaf in jax.tree.leaves(self))
        return (
            f"Model({self.config.family}, {text.num_hidden_layers} layers of width {text.hidden_size}{tower}, "
            f"{count / 1e6:,.1f} M parameters)"
        )

    __str__ = __repr__  # nnx's own writes every submodule

    def _repr_html_(self) -> str:
        parts: dict[str, list] = {}
        for path, leaf in jax.tree.leaves_with_path(self):
            names = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
            parts.setdefault(".".join(names[:2]), []).append(leaf)
        rows = [(name, f"{sum(leaf.size for leaf in leaves):,} parameters") for name, leaves in parts.items()]
        rows.append(("dtype", ", ".join(sorted({str(leaf.dtype) for leaf in jax.tree.leaves(self)}))))
        return titled(repr(self), table_html(rows))

    def __call__(self, inputs: Inputs, interventions: Any = (), taps: Taps = ()) -> Output:
        """One forward pass.

        Args:
            interventions: a :class:`vlm_jax.Intervention`, or several, applied in order at each site (see
                :mod:`vlm_jax.sites`).
            taps: names of the sites whose values to return; or a dict from names to the layers whose values to keep,
                or to a :class:`vlm_jax.Tap`, which can also reduce each value.

        Raises:
            UserError: for an unknown tap or site, or an intervention that touches nothing.
        """
        interventions = acting(interventions, self.depths)
        checked = check_sites(interventions, taps, self.sites(inputs), self.depths, inputs.input_ids.shape)
        x, tapped = self.hidden(inputs, interventions, checked)
        probe = Probe(interventions, checked, Context())
        logits = self.text.head(x, probe)
        return Output(logits, {**tapped, **probe.taps})

    def hidden(
        self,
        inputs: Inputs,
        interventions: Sequence[Any] = (),
        taps: Mapping[str, Tap] = NO_TAPS,
        remat: bool | tuple[str, ...] = False,
    ) -> tuple[Float[Array, "batch tokens width"], dict[str, Any]]:
        """The residual stream after the last layer, before the final norm, and the taps up to there.

        This is the whole model without the unembedding, for losses and read-outs that unembed only a few tokens. Unlike
        calling the model, it does not check the interventions and taps.

        Args:
            taps: site -> :class:`vlm_jax.Tap`.
            remat: what a backward pass computes again (:meth:`vlm_jax.nn.decoder.Decoder.scan`).
        """
        interventions = jax.tree.map(jnp.asarray, tuple(interventions))  # layers index them while being traced
        embedded, outer = self.embed(inputs, interventions, taps)
        x, _, tapped = self.text.scan(
            embedded.x,
            self.window(inputs),
            deepstack=embedded.deepstack,
            interventions=interventions,
            taps=taps,
            remat=remat,
        )
        return x, {**outer, **tapped}

    def unembed(self, x: Float[ArrayLike, "*rows width"]) -> Float[Array, "*rows vocab"]:
        """The logits that vectors of the residual stream have if the model ends there: the final norm, the unembedding
        and, in models that have one, the softcap. Of the last layer's output, these are the model's own logits."""
        return self.text.logits(self.text.norm(jnp.asarray(x)))

    def backbone(self) -> "Model":
        """The text-only model inside: the same arrays, not copies, with the backbone's config.

        transformers' ``AutoModelForCausalLM`` loads the folder that saving it writes. A text-only model is its own
        backbone.
        """
        if self.visual is None:
            return self
        plain = self.with_registers(None)
        config = backbone_config(plain.config)
        shapes = jax.eval_shape(lambda: Model(config, jax.random.key(0)))
        return jax.tree.unflatten(jax.tree.structure(shapes), jax.tree.leaves(plain.text))

    def up_to(self, layers: int) -> "Model":
        """The model without the decoder's layers from number ``layers`` on: its last residual stream is
        ``text.resid_post`` of layer ``layers - 1``.

        Raises:
            UserError: if the model has no such layer.
        """
        text = self.config.text
        if not 1 <= layers <= text.num_hidden_layers:
            raise UserError(f"the model has {text.num_hidden_layers} layers, not {layers}: name a number up to that")
        text = dataclasses.replace(text, num_hidden_layers=layers, layer_types=text.layer_types[:layers])
        config = dataclasses.replace(self.config, text=text)
        shapes = jax.eval_shape(lambda: Model(config, jax.random.key(0)))
        parts = jax.tree.map(
            lambda leaf, shape: leaf[: len(shape)] if leaf.shape != shape.shape else leaf,
            jax.tree.leaves(self),
            jax.tree.leaves(shapes),
        )
        return jax.tree.unflatten(jax.tree.structure(shapes), parts)

    def with_registers(self, registers: Registers | None) -> "Model":
        """The same arrays with registers behind every image, or without. Inputs must be encoded with the new model's
        config. Embeddings of registers are kept if as many of the same token had some, else they begin as copies of the
        token's.

        Raises:
            UserError: see :func:`vlm_jax.config.with_registers`.
        """
        config = with_registers(self.config, registers)
        model = jax.eval_shape(lambda: Model(config, jax.random.key(0)))
        own = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(self)}
        paths, structure = jax.tree_util.tree_flatten_with_path(model)
        old = self.config.text.registers
        same = (
            old is not None
            and registers is not None
            and (old.count, old.token_id) == (registers.count, registers.token_id)
        )
        if registers is not None and registers.trained and not (same and old is not None and old.trained):
            (name,) = (jax.tree_util.keystr(path) for path, _ in paths if "register_embeddings" in str(path))
            weight = self.text.embed_tokens.weight[...].astype(self.text.dtype)
            own[name] = jnp.tile(weight[registers.token_id], (registers.count, 1))
        return jax.tree.unflatten(structure, [own[jax.tree_util.keystr(path)] for path, _ in paths])

    def sites(self, inputs: Inputs) -> frozenset[str]:
        """The sites that a pass over these inputs has."""
        if inputs.images is None:
            return TEXT_SITES - {"text.deepstack"}
        assert self.visual is not None, "a text-only model got images"
        deepstack = self.visual.SITES & {"projector.deepstack_merger_list"}
        return (TEXT_SITES if deepstack else TEXT_SITES - {"text.deepstack"}) | self.visual.SITES

    @property
    def depths(self) -> dict[str, int]:
        """How many layers each tower runs, and after how many of the decoder's layers DeepStack adds something."""
        levels = getattr(self.config.vision, "deepstack_visual_indexes", ())
        visual = 0 if self.visual is None else self.visual.depth
        return {"text": self.config.text.num_hidden_layers, "visual": visual, "deepstack": len(levels)}

    def window(self, inputs: Inputs, start: int = 0) -> Window:
        """The masks and rotary angles of the tokens from ``start`` on.

        Raises:
            UserError: if the prompts have registers and the model has not, or the other way round.
        """
        has = inputs.register_index is not None
        if inputs.image_index is not None and has != (self.config.text.registers is not None):
            prompts, model = ("registers", "none") if has else ("no registers", "some")
            raise UserError(f"the prompts have {prompts}, but the model has {model}: encode them with its config")
        return self.text.window(inputs.tokens, inputs.position_ids, start)

    def features(
        self,
        inputs: Inputs,
        interventions: Sequence[Any] = (),
        taps: Mapping[str, Tap] = NO_TAPS,
        frozen: int = 0,
    ) -> tuple[Features | None, dict[str, Any]]:
        """Visual features of the images (None without images) and the taps of the vision tower. A backward pass does
        not run through the first ``frozen`` vision blocks, in which no intervention may act."""
        if inputs.images is None:
            return None, {}
        assert self.visual is not None, "a text-only model got images"
        return self.visual(inputs.images, interventions, taps, frozen)

    def embed(
        self,
        inputs: Inputs,
        interventions: Sequence[Any] = (),
        taps: Mapping[str, Tap] = NO_TAPS,
        features: Features | None = None,
    ) -> tuple[Embedded, dict[str, Any]]:
        """Token embeddings with the visual tokens merged in, and the taps up to there.

        Args:
            features: the vision tower's, where they are known already; None runs the tower.
        """
        tapped: dict[str, Any] = {}
        if features is None:
            features, tapped = self.features(inputs, interventions, taps)
        probe = Probe(interventions, taps, Context())
        embedded = self.merge(inputs, features)
        return Embedded(probe("text.embeddings", embedded.x), embedded.deepstack), {**tapped, **probe.taps}

    def merge(self, inputs: Inputs, features: Features | None) -> Embedded:
        """Token embeddings, replaced by visual tokens where ``inputs.image_index`` names one."""
        x = constrain(self.text.embed(inputs.input_ids, inputs.register_index), "batch", None, None)
        if features is None:
            return Embedded(x, None)
        assert inputs.image_index is not None, "inputs without images got visual features"
        index, is_image = jnp.maximum(inputs.image_index, 0), inputs.image_index[..., None] >= 0
        width = x.shape[-1]
        x = jnp.where(is_image, features.merged.reshape(-1, width)[index], x)
        if features.deepstack is None:
            return Embedded(x, None)
        visual_tokens = features.deepstack.reshape(len(features.deepstack), -1, width)
        return Embedded(x, jnp.where(is_image, visual_tokens[:, index], 0))
