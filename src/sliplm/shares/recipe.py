"""What the owner chooses: how far each group is split, and where it lives (SPEC, the split).

    Recipe(rank=16, precision=12, rotation="fast", placement="split",
           rules=(Rule(pattern="lm_head", placement="vault"),))

A rule's pattern is a shell glob (`*`, `?`, `[abc]`; case matters).  It is matched on a group's name and on
its members' module names; where several rules match, the last one that sets a field wins.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sliplm.errors import RecipeError
from sliplm.reading import read_bounded

RotationKind = Literal["fast", "haar", "none"]
Placement = Literal["split", "vault"]
Tail = Literal["drop", "worker"]

MAX_RECIPE_BYTES = 1 << 20


class _Strict(BaseModel):
    """A frozen model without coercion whose constructor raises RecipeError, one line per problem."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    if not TYPE_CHECKING:  # the type checker keeps the fields' signature

        def __init__(self, **fields: Any) -> None:
            try:
                super().__init__(**fields)
            except ValidationError as error:
                raise RecipeError(problems(error)) from error


class Rule(_Strict):
    """Overrides for the groups that a glob pattern matches; None leaves a choice as it is."""

    pattern: str = Field(min_length=1, max_length=1024)
    rank: int | None = Field(default=None, ge=0)
    energy: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    precision: int | None = Field(default=None, ge=4, le=12)
    rotation: RotationKind | None = None
    placement: Placement | None = None

    def matches(self, names: Iterable[str]) -> bool:
        """Whether the pattern matches any of the names."""
        return any(fnmatchcase(name, self.pattern) for name in names)


@dataclass(frozen=True)
class GroupChoice:
    """What a recipe says about one group; `energy`, where there is one, decides the rank (until then 0)."""

    rank: int
    precision: int
    rotation: RotationKind
    placement: Placement
    energy: float | None = None


class Recipe(_Strict):
    """How to split a model.

    Attributes:
        rank: singular triplets of each group, or of its difference to a public base, that stay in the vault
            (k of SPEC split step 1); at least 0.
        precision: bits of the worker's integers (b of SPEC split step 3), 4 to 12; up to 8 take a byte each.
        rotation: secret basis (SPEC split step 2): "fast", "haar" (n*n work in the vault) or "none", which is
            what a split against a public base has.
        placement: "split" (vault and worker) or "vault" (the whole matrix stays in the vault).
        energy: only for a full fine-tune of a public base, and there in the place of `rank`: the smallest
            rank that keeps this part of the difference's squared Frobenius norm, above 0 and up to 1.
        tail: only for a full fine-tune of a public base: what the rank leaves out is dropped ("drop"), or
            goes to the worker ("worker"), **where whoever has the base reads it**.
        rules: exceptions by name; the last match wins.

    Raises:
        RecipeError: a field is out of bounds, unknown or of the wrong type; one line per problem.
    """

    rank: int = Field(default=16, ge=0)
    precision: int = Field(default=12, ge=4, le=12)
    rotation: RotationKind = "fast"
    placement: Placement = "split"
    energy: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    tail: Tail = "drop"
    rules: tuple[Rule, ...] = Field(default=(), strict=False, fail_fast=True)

    def for_group(self, name: str, member_names: Sequence[str] = ()) -> GroupChoice:
        """The choice for the group `name` whose linear layers are `member_names`."""
        names = (name, *member_names)
        choice: dict[str, Any] = self.model_dump(exclude={"rules", "tail"})
        for rule in self.rules:
            if rule.matches(names):
                fields = rule.model_dump(exclude={"pattern"}, exclude_none=True)
                choice.update({"energy": None} | fields if "rank" in fields else fields)
        if choice["energy"] is not None:
            choice["rank"] = 0
        return GroupChoice(**choice)

    def unmatched(self, names: Iterable[str]) -> tuple[str, ...]:
        """The rules' patterns that match none of the names: most likely misspelt."""
        known = tuple(names)
        return tuple(rule.pattern for rule in self.rules if not rule.matches(known))

    @classmethod
    def read(cls, path: Path | str) -> Recipe:
        """Read a recipe from a JSON file, or a TOML file if its name ends in `.toml`.

        Raises:
            RecipeError: the file cannot be read or parsed, or a field is wrong; the message names both.
        """
        path = Path(path)
        fields = _parse(path, _read_text(path))
        if not isinstance(fields, dict):
            raise RecipeError(f'{path}: a recipe is a table of fields, such as {{"rank": 16}}')
        try:
            return cls(**fields)
        except RecipeError as error:
            raise RecipeError(f"{path}:\n{error}") from error


def problems(error: ValidationError) -> str:
    """One line per problem of a pydantic error, twenty at most: `field: what is wrong (got ...)`."""
    lines = [line for entry in error.errors(include_url=False) for line in _lines(dict(entry))]
    return "\n".join(lines[:20] + ([f"and {len(lines) - 20} more"] if len(lines) > 20 else []))


def _lines(entry: dict[str, Any]) -> list[str]:
    where = ".".join(str(part) for part in entry["loc"]) or "recipe"
    nested = entry.get("ctx", {}).get("error")
    if isinstance(nested, RecipeError):  # raised by a nested constructor: its lines are already clear
        return [f"{where}.{line}" for line in str(nested).splitlines()]
    if entry["type"] == "missing":
        return [f"{where}: this field is required"]
    if entry["type"] == "extra_forbidden":
        return [f"{where}: there is no such field"]
    message = entry["msg"][:1].lower() + entry["msg"][1:]
    return [f"{where}: {message} (got {_short(entry['input'])})"]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _read_text(path: Path) -> str:
    try:
        data = read_bounded(path, MAX_RECIPE_BYTES)
    except OSError as error:
        raise RecipeError(f"{path}: the recipe cannot be read ({error.strerror})") from error
    if len(data) > MAX_RECIPE_BYTES:
        raise RecipeError(f"{path}: longer than {MAX_RECIPE_BYTES} bytes; this is no recipe")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not a UTF-8 text; a recipe is a JSON or TOML file") from error


def _parse(path: Path, text: str) -> object:
    try:
        return tomllib.loads(text) if path.suffix.lower() == ".toml" else json.loads(text)
    except (ValueError, RecursionError) as error:  # both decoders' errors are ValueErrors
        kind = "TOML" if path.suffix.lower() == ".toml" else "JSON"
        raise RecipeError(f"{path}: not valid {kind}: {error}") from error
