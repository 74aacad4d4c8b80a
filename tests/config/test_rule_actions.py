"""Actions of rules, as defaults and recipes give them."""

from __future__ import annotations

from posttrain.config.preparation import RULES, Action, PrepareConfig, rule_actions


def test_a_rule_keeps_its_default_though_it_is_a_filter() -> None:
    actions = rule_actions(PrepareConfig(languages=["en"]), [*RULES, "mine"])
    assert actions == {**RULES, "mine": Action.count}
    assert rule_actions(PrepareConfig(), ["mine"]).keys() == actions.keys() - {"language"}  # it needs their names
    assert actions["repetition"] is Action.drop


def test_a_recipe_has_the_last_word() -> None:
    actions = rule_actions(PrepareConfig(rules={"repetition": "count", "mine": {"action": "drop"}}), ["mine"])
    assert (actions["repetition"], actions["mine"]) == (Action.count, Action.drop)
