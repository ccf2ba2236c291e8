"""`Family`: what a row of `FAMILIES` says of one model family."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Paths inside one block. ``gate`` and ``up`` of a gated MLP may be one fused module (gate rows first).

    ``qkv_layout`` says how a fused attention projection is ordered: ``"split"`` is all queries, all keys, all values;
    ``"grouped"`` is one run of rows a key/value group (its queries, its key, its value). ``per_head`` names what the
    attention holds for each head beside these: parameters, linear layers or lists of modules. ``reads_config`` says
    that its forward pass asks the config for the number of heads; ``gives`` how many values it returns (0: one tensor,
    not in a tuple). ``attention`` is empty where there is none.
    """

    name: str
    down: str
    up: str
    gate: str | None = None
    act: str | None = None
    attention: str = "self_attn"
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    qkv_layout: str = "split"
    out: str = "o_proj"
    per_head: tuple[str, ...] = ()
    reads_config: bool = False
    gives: int = 2

    def mlp_paths(self) -> list[str]:
        """What the MLP of a block of this family must have."""
        return [p for p in (self.gate, self.up, self.down, self.act) if p]

    def attention_paths(self) -> list[str]:
        """What its attention must have, where it has one."""
        return [f"{self.attention}.{p}" for p in (*self.qkv, self.out)] if self.attention else []
