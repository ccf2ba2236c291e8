"""Options with several values, as people type them: ``--text a b``, ``--text a --text b``, and commas for names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from typer.core import TyperCommand

from llmbrain._validation import InputError

LARGEST = 2**40


class ListCommand(TyperCommand):
    """A command whose repeatable options take several values one after the other, too; its numbers are finite."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse `args` after every value of a repeatable option has got the option's name before it."""
        repeatable, single, n_arguments = set(), set(), 0
        for parameter in self.params:
            if parameter.param_type_name == "argument":
                n_arguments += bool(parameter.required)
            elif getattr(parameter, "multiple", False):
                repeatable.update(parameter.opts)
            elif not getattr(parameter, "is_flag", False):
                single.update(parameter.opts)
        rest = list(super().parse_args(ctx, spread(args, repeatable, single, n_arguments)))
        for name, value in ctx.params.items():
            for number in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(number, (int, float)) and not abs(number) <= LARGEST:  # nan is neither
                    option = f"--{name.replace('_', '-')}"
                    raise InputError(f"{option}={number} is no number that could be meant: at most {LARGEST:,}")
        return rest


def spread(args: Sequence[str], repeatable: set[str], single: set[str], n_arguments: int) -> list[str]:
    """``--text a b`` as ``--text a --text b``.

    Values that follow are taken up to the next option; the last ones are given back where the command would else lack
    one of the `n_arguments` arguments that it must have: ``lesion --text a b MODEL``.

    Examples
    --------
    >>> spread(["--text", "a", "b", "MODEL", "--seed", "1"], {"--text"}, {"--seed"}, 1)
    ['--text', 'a', '--text', 'b', 'MODEL', '--seed', '1']
    """
    groups: list[tuple[str | None, list[str]]] = []  # an option and its values; what else there is has no option
    left = list(args)
    while left:
        word = left.pop(0)
        if word in repeatable:
            values: list[str] = []
            while left and not left[0].startswith("--"):
                values.append(left.pop(0))
            groups.append((word, values))
        else:
            groups.append((None, [word, *(left[:1] if word in single else [])]))
            left = left[1:] if word in single else left
    missing = n_arguments - sum(len(v) == 1 and not v[0].startswith("-") for option, v in groups if option is None)
    found: list[str] = []
    for option, values in reversed(groups):
        if option is None:
            found = values + found
            continue
        spare = max(0, min(missing, len(values) - 1))
        missing -= spare
        kept = values[: len(values) - spare]
        named = [word for value in kept for word in (option, value)] or [option]  # no value: the parser says so
        found = named + values[len(values) - spare :] + found
    return found


def parts(values: Sequence[str] | None) -> list[str]:
    """Names that may have been typed with commas between them."""
    return [part.strip() for value in values or [] for part in value.split(",") if part.strip()]
