"""Recipes: bounds, rules, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sliplm.errors import RecipeError
from sliplm.shares.recipe import GroupChoice, Recipe, Rule

QKV = "model.layers.0.self_attn.q_proj+k_proj+v_proj"
MEMBERS = tuple(f"model.layers.0.self_attn.{x}_proj" for x in "qkv")


def test_defaults_are_those_of_the_paper_and_the_measurements() -> None:
    assert Recipe().for_group(QKV, MEMBERS) == GroupChoice(16, 12, "fast", "split")


def test_a_rule_matches_the_group_or_any_member_and_the_last_match_wins() -> None:
    recipe = Recipe(
        rules=(
            Rule(pattern="*.k_proj", rank=3, precision=8),
            Rule(pattern=QKV, rank=4),
            Rule(pattern="lm_head", placement="vault"),
            Rule(pattern="*.layers.1.*", rotation="none"),
        )
    )
    assert recipe.for_group(QKV, MEMBERS) == GroupChoice(4, 8, "fast", "split")
    assert recipe.for_group("lm_head", ("lm_head",)).placement == "vault"
    assert recipe.unmatched([QKV, *MEMBERS, "lm_head"]) == ("*.layers.1.*",)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"rank": -1}, "rank"),
        ({"rank": 1.0}, "rank"),
        ({"rank": True}, "rank"),
        ({"precision": 3}, "precision"),
        ({"precision": 13}, "precision"),
        ({"rotation": "Fast"}, "rotation"),
        ({"placement": "worker"}, "placement"),
        ({"ranks": 3}, "ranks: there is no such field"),
        ({"rules": [{"pattern": "x", "rank": -2}]}, "rules.0.rank"),
        ({"rules": [{"rank": 2}]}, "rules.0.pattern: this field is required"),
        ({"rules": [{"pattern": ""}]}, "rules.0.pattern"),
        ({"rules": "lm_head"}, "rules"),
    ],
)
def test_a_bad_field_is_named(fields: dict[str, Any], word: str) -> None:
    with pytest.raises(RecipeError, match=word) as caught:
        Recipe(**fields)
    assert len(str(caught.value).splitlines()) == 1


def test_every_problem_has_its_line() -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe(rank=-1, precision=2, rotation="x")  # type: ignore[arg-type]
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [
        "rank",
        "precision",
        "rotation",
    ]


def test_a_rule_on_its_own_is_checked_too() -> None:
    with pytest.raises(RecipeError, match="precision"):
        Rule(pattern="x", precision=99)


@given(
    st.builds(
        Recipe,
        rank=st.integers(0, 500),
        precision=st.integers(4, 12),
        rotation=st.sampled_from(["fast", "haar", "none"]),
        placement=st.sampled_from(["split", "vault"]),
        rules=st.lists(
            st.builds(Rule, pattern=st.text(min_size=1), rank=st.none() | st.integers(0, 9)), max_size=3
        ).map(tuple),
    )
)
def test_json_round_trip(recipe: Recipe) -> None:
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_read_json_and_toml(tmp_path: Path) -> None:
    expected = Recipe(rank=8, rules=(Rule(pattern="lm_head", placement="vault"),))
    (tmp_path / "r.json").write_text(expected.model_dump_json())
    (tmp_path / "r.toml").write_text('rank = 8\n[[rules]]\npattern = "lm_head"\nplacement = "vault"\n')
    assert Recipe.read(tmp_path / "r.json") == Recipe.read(str(tmp_path / "r.toml")) == expected


@pytest.mark.parametrize(
    ("name", "text", "word"),
    [
        ("r.json", '{"rank": -3}', "rank"),
        ("r.json", '{"rank": 3', "not valid JSON"),
        ("r.json", "[1]", "table of fields"),
        ("r.json", "[" * 100_000, "not valid JSON"),
        ("r.toml", "rank = = 3", "not valid TOML"),
        ("r.toml", "rank = 2026-01-01", "rank"),
        ("r.toml", "[[rules]]\nrank = 3", "rules.0.pattern"),
        ("r.json", " " * (1 << 21), "longer than"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, name: str, text: str, word: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(RecipeError, match=word) as caught:
        Recipe.read(tmp_path / name)
    assert name in str(caught.value)


def test_an_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        Recipe.read(tmp_path / "absent.json")
    (tmp_path / "r.json").write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match="UTF-8"):
        Recipe.read(tmp_path / "r.json")
