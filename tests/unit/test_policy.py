"""The policy table: specificity, rules that match nothing, the table of what trains."""

import dataclasses

import pytest

from omniloom.config import LoraConfig, PolicyRule
from omniloom.training.policy import check_rates, resolve_policy, table_lines, trainable_table

COMPONENTS = {
    "vision.blocks.0.w": "vision",
    "vision.merger.w": "vision.merger",
    "vision.deepstack.0.w": "vision.deepstack",
    "text.layers.0.w": "text",
    "text.layers.0.moe.router.w": "text.router",
    "text.loss_head.w": "lm_head",
}


ROOTS = ("vision", "text")


def resolve(rules, **others):
    return resolve_policy(rules, COMPONENTS, learning_rate=1e-4, weight_decay=0.1, roots=ROOTS, **others)


def test_a_longer_name_overrides_a_shorter_field_by_field() -> None:
    policies = resolve(
        {
            "vision.merger": PolicyRule(freeze=False, learning_rate=1e-3),
            "vision": PolicyRule(freeze=True, weight_decay=0.0),
        }
    )
    assert not policies["vision.blocks.0.w"].trainable
    assert not policies["vision.deepstack.0.w"].trainable  # freezing the tower takes the deepstack mergers along
    merger = policies["vision.merger.w"]
    assert (merger.trainable, merger.learning_rate, merger.weight_decay) == (True, 1e-3, 0.0)
    assert policies["text.layers.0.w"].learning_rate == 1e-4


def test_freezing_the_merger_leaves_the_deepstack_mergers_alone() -> None:
    policies = resolve({"vision.merger": PolicyRule(freeze=True)})
    assert not policies["vision.merger.w"].trainable
    assert policies["vision.deepstack.0.w"].trainable


def test_text_does_not_reach_the_head() -> None:
    assert resolve({"text": PolicyRule(freeze=True)})["text.loss_head.w"].trainable


def test_a_rule_that_matches_nothing_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ValueError, match=r"policy\.vision\.mergr matches no component.*did you mean vision\.merger\?"):
        resolve({"vision.mergr": PolicyRule(freeze=True)})


def test_freezing_everything_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing would train"):
        resolve({name: PolicyRule(freeze=True) for name in ("vision", "text", "lm_head")})


def test_the_table_counts_what_trains() -> None:
    rows = trainable_table(resolve({"vision": PolicyRule(freeze=True)}), dict.fromkeys(COMPONENTS, 10))
    by_name = {row.component: row for row in rows}
    assert by_name["vision"].num_parameters == 10
    assert by_name["vision"].num_trainable == 0
    assert by_name["text.router"].num_trainable == 10


def test_full_weights_adapters_and_neither_are_one_choice_of_the_longest_name() -> None:
    lora = LoraConfig(rank=4)
    policies = resolve(
        {
            "text": PolicyRule(lora=lora),
            "text.router": PolicyRule(freeze=False),
            "vision": PolicyRule(freeze=True),
            "vision.merger": PolicyRule(lora=lora),
            "vision.deepstack": PolicyRule(learning_rate=1e-3),
            "lm_head": PolicyRule(freeze=True, lora=lora),
        }
    )
    found = {name: (policy.trainable, policy.lora) for name, policy in policies.items()}
    assert found == {
        "vision.blocks.0.w": (False, None),
        "vision.merger.w": (False, lora),
        "vision.deepstack.0.w": (False, None),
        "text.layers.0.w": (False, lora),
        "text.layers.0.moe.router.w": (True, None),
        "text.loss_head.w": (False, lora),
    }


def test_the_printed_table_tells_the_rank_where_adapters_train() -> None:
    policies = resolve({"text": PolicyRule(lora=LoraConfig(rank=4)), "text.router": PolicyRule(freeze=True)})
    policies["text.layers.0.lora_a"] = dataclasses.replace(policies["text.layers.0.w"], trainable=True)
    table = trainable_table(policies, dict.fromkeys(policies, 10))
    (text,) = [row for row in table if row.component == "text"]
    assert (text.num_parameters, text.num_trainable, text.lora_rank, text.learning_rate) == (20, 10, 4, 1e-4)
    heading, *lines = table_lines(table)
    assert heading.endswith("LoRA rank")
    assert [line.split() for line in lines if line.startswith("text ")] == [["text", "20", "10", "1.0e-04", "4"]]
    assert {len(line.split()) for line in lines if not line.startswith("text ")} == {4}


def test_beside_adapters_only_what_a_rule_asks_for_trains() -> None:
    policies = resolve({"text": PolicyRule(lora=LoraConfig()), "vision.merger": PolicyRule(learning_rate=1e-3)})
    assert [name for name, policy in policies.items() if policy.trainable] == ["vision.merger.w"]
    assert not policies["text.loss_head.w"].trainable
    assert all(policy.trainable for policy in resolve({"vision": PolicyRule(learning_rate=1e-3)}).values())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vision.merger", "only vision, text can be recomputed, each as a whole; set policy.vision.recompute"),
        ("lm_head", "can be recomputed, each as a whole; remove it"),
    ],
)
def test_recomputing_less_than_a_root_is_refused(name: str, words: str) -> None:
    resolve({root: PolicyRule(recompute=True) for root in ROOTS})
    with pytest.raises(ValueError, match=rf"policy\.{name}\.recompute: .*{words}"):
        resolve({name: PolicyRule(recompute=False)})


def test_a_rule_for_a_tied_weight_names_the_one_it_shares() -> None:
    with pytest.raises(ValueError, match=r"policy\.lm_head: .* it uses text\.embed's"):
        resolve({"lm_head": PolicyRule(freeze=True)}, tied={"lm_head": "text.embed"})


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        (
            {"text": PolicyRule(lora=LoraConfig()), "text.router": PolicyRule(learning_rate=1.0)},
            r"text\.router\.learning_rate: .* frozen by policy\.text\.lora; add policy\.text\.router\.freeze: false",
        ),
        (
            {"text": PolicyRule(lora=LoraConfig()), "vision.merger": PolicyRule(weight_decay=1.0)},
            r"vision\.merger\.weight_decay: .* frozen by policy\.text\.lora; .* or remove weight_decay",
        ),
        (
            {"vision": PolicyRule(freeze=True), "vision.merger": PolicyRule(learning_rate=1.0)},
            r"frozen by policy\.vision\.freeze; add policy\.vision\.merger\.freeze: false",
        ),
    ],
)
def test_a_rate_for_what_does_not_train_is_refused_with_the_reason(rules: dict[str, PolicyRule], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_rates(rules, resolve(rules))


def test_a_rate_for_what_trains_in_part_is_accepted() -> None:
    rules = {
        "vision": PolicyRule(freeze=True, learning_rate=1e-3, weight_decay=0.0),
        "vision.merger": PolicyRule(freeze=False),
    }
    check_rates(rules, resolve(rules))
