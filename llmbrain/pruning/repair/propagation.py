"""How much of the error that earlier layers left a layer's repair takes on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmbrain._validation import InputError, check_range
from llmbrain.anatomy.families import Anatomy
from llmbrain.anatomy.offload import present
from llmbrain.anatomy.units import NEURONS
from llmbrain.hooks.change import saying
from llmbrain.hooks.text import evaluating
from llmbrain.pruning.calibrate.steps import Propagation
from llmbrain.pruning.calibrate.stream import Stream, stream_of
from llmbrain.pruning.criteria.networks import DEEP

SHARE = 0.5  # what deep models get where nothing is said
PROBE = 64  # tokens on which it is seen how a block takes the output of its MLP
LINEAR = 0.05  # of a block's change, what may come by another way than a multiple of the MLP's


def propagation_of(
    model: nn.Module, body: Anatomy, windows: Tensor | None, asked: float | None, *, compensate: str | None,
    sequential: bool, functions: bool = False,
) -> Propagation | None:  # fmt: skip
    """What each layer's repair takes on of the error of the hidden states; None for nothing.

    A repair that follows the pruned model meets hidden states that are off already. Its target is what the layer made
    of them uncut, plus a share of what is missing after the block to what was there in the dense model (QEP, Arai &
    Ichikawa 2025, arXiv 2504.09629, the share there alpha; for quantization, of every projection. Here the MLP's
    output alone takes it on, since the block adds that to the hidden states).

    Parameters
    ----------
    asked : float or None
        The share, 0 to 1. None: `SHARE` with models of 20 layers and more whose blocks allow it, else 0.
    functions : bool
        Whether the plan keeps or forgets functions: then nothing is restored that was to go.

    Raises
    ------
    InputError
        If a share is asked for that can not be.
    """
    check_propagation(asked, compensate, sequential=sequential, functions=functions)
    if asked == 0:
        return None
    fits = compensate == "least-squares" and sequential and not functions
    if asked is None and (not fits or len(body.layers) < DEEP):
        return None
    assert windows is not None  # without them nothing is repaired
    gains = gains_of(model, body, windows)
    if gains is None:
        if asked is None:
            return None
        raise InputError(
            f"propagation={asked}: the blocks of {type(model).__name__} do not add a multiple of their MLP's output to "
            "the hidden states: use propagation=0"
        )
    share = SHARE if asked is None else asked
    return Propagation(share, [share / gain if gain else 0.0 for gain in gains])


def check_propagation(
    asked: float | None, compensate: str | None, *, sequential: bool = True, functions: bool = False
) -> None:
    """Refuse a share that is none, or that the repair asked for can not take on; parameters as above."""
    if asked is None:
        return
    check_range("propagation", asked, 0, 1)
    if asked and (compensate != "least-squares" or not sequential or functions):
        raise InputError(
            f"propagation={asked} needs compensate='least-squares', sequential=True and a plan that keeps and forgets "
            f"no functions: use propagation=0"
        )


def gains_of(model: nn.Module, body: Anatomy, windows: Tensor) -> list[float] | None:
    """By which factor each block adds its MLP's output (0 where it has none); None where one does something else.

    Seen on a few tokens: the MLP is made to say something more, as large as the hidden states, so that it is seen with
    16 bits too, and where the MLP says nothing.
    """
    with evaluating(model):
        stream = stream_of(model, body, windows[:1, :PROBE])
        if not isinstance(stream, Stream):
            return None
        gains = []
        for layer in body.layers:
            output = NEURONS.output(layer)
            with present(layer.block):
                if output is None or NEURONS.is_gone(layer):
                    gains.append(0.0)
                    stream.advance()
                    continue
                (_, said), after = stream.run(0, output)
                said = said.view(*after.shape[:-1], -1)
                told = said + _noise(after).to(said.device, said.dtype)
                more = (told.double() - said.double()).flatten(0, -2)  # as rounded; Falcon adds to `told` in place
                with saying(output.module, told):
                    came = (stream.through(0).double() - after.double()).flatten(0, -2)
                stream.advance([after])
            more = more.to(came.device)
            gain = float((came * more).sum() / more.square().sum().clamp_min(1e-30))
            if not gain > 0 or float((came - gain * more).norm()) > LINEAR * float(came.norm()):
                return None
            gains.append(gain)
    return gains


def _noise(hidden: Tensor) -> Tensor:
    """Something as large as each token's hidden states, and the same in every call; float32."""
    drawn = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)).to(hidden.device)
    return drawn * (hidden.float().norm(dim=-1, keepdim=True) / hidden.shape[-1] ** 0.5)
