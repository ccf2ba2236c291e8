"""What can be cut out of a model: the neurons of its MLPs, its attention heads; how many there are, and where.

A kind of units is one object with one question for each thing that a cut must know. A new kind (experts, say) is
another subclass of `Units`; whatever counts, scores, chooses, repairs or cuts units takes the kind as it takes these.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from llmbrain._validation import InputError
from llmbrain.anatomy.layers import Anatomy, LayerAnatomy, Projection


class Units(ABC):
    """A kind of units.

    Attributes
    ----------
    name : str
        What texts call them.
    option : str
        The parameter that says what share of them goes, for errors.
    """

    name: str
    option: str

    def __repr__(self) -> str:
        return self.name

    @abstractmethod
    def output(self, layer: LayerAnatomy) -> Projection | None:
        """The projection that a layer's units enter, unit by unit along its inputs; None where it has none."""

    @abstractmethod
    def inputs(self, layer: LayerAnatomy) -> tuple[Projection, ...]:
        """What makes them: every other weight that holds rows of a unit; empty where they can not be cut."""

    @abstractmethod
    def fixed(self, layer: LayerAnatomy) -> str:
        """Why they can not be cut, where that is known; else ""."""

    def projections(self, layer: LayerAnatomy) -> tuple[Projection, ...]:
        """Every weight that holds a part of a unit."""
        output = self.output(layer)
        return () if output is None else (*self.inputs(layer), output)

    def count(self, layer: LayerAnatomy) -> int:
        """How many of them a layer has."""
        output = self.output(layer)
        return 0 if output is None else output.units

    def is_gone(self, layer: LayerAnatomy) -> bool:
        """Whether a layer had them, and all were taken: see `llmbrain.anatomy.surgery.drop`."""
        output = self.output(layer)
        return output is not None and not output.units

    def counts(self, body: Anatomy) -> tuple[int, ...]:
        """How many of them each layer has."""
        return tuple(self.count(layer) for layer in body.layers)

    def parameters(self, layer: LayerAnatomy) -> int:
        """Parameters that go with one unit of a layer."""
        return sum(_of_one(p) for p in self.projections(layer))

    def check(self, body: Anatomy, share: float) -> None:
        """Refuse a model whose units can not be cut.

        Raises
        ------
        InputError
            Naming the share that was asked for.
        """
        for layer in body.layers:
            if self.is_gone(layer):
                continue
            why = self.fixed(layer)
            if why or not self.inputs(layer) or self.output(layer) is None:
                why = why or f"none were found in layer {layer.index}"
                raise InputError(
                    f"{self.option}={share}: the {self.name} of this {body.family} model cannot be cut: {why}"
                )


class Neurons(Units):
    """Hidden units of an MLP: inputs of the down projection."""

    name, option = "neurons", "ratio"

    def output(self, layer: LayerAnatomy) -> Projection | None:
        """The down projection."""
        return layer.down

    def inputs(self, layer: LayerAnatomy) -> tuple[Projection, ...]:
        """``(up,)`` or ``(gate, up)``."""
        return layer.inputs

    def fixed(self, layer: LayerAnatomy) -> str:
        """Something takes all neurons of the layer together."""
        return layer.neurons_fixed


class Heads(Units):
    """Attention heads by key/value group, each with all its query heads: inputs of the output projection."""

    name, option = "heads", "head_ratio"

    def output(self, layer: LayerAnatomy) -> Projection | None:
        """The attention's output projection."""
        return layer.out

    def inputs(self, layer: LayerAnatomy) -> tuple[Projection, ...]:
        """Query, key and value rows."""
        return layer.heads

    def fixed(self, layer: LayerAnatomy) -> str:
        """Something takes all heads of the layer or the model together."""
        return layer.heads_fixed


NEURONS, HEADS = Neurons(), Heads()
KINDS: tuple[Units, ...] = (HEADS, NEURONS)
"""All kinds, in the order in which a block runs them."""


def _of_one(projection: Projection) -> int:
    if not projection.units:
        return 0
    bias = projection.bias()
    return (projection.weight().numel() + (0 if bias is None else bias.numel())) // projection.units
