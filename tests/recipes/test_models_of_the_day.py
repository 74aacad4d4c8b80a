"""Published models and recipes on configuration and tokenizer alone: composed, planned, rendered, masks proven."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib.metadata import distribution
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from posttrain.chat_template import render_pinned, variable_problems
from posttrain.commands.estimate import estimates, machine_of
from posttrain.config.compose import compose
from posttrain.config.paths import shipped
from posttrain.cost.architecture import find_architecture
from posttrain.data.records import Conversation, Message
from posttrain.errors import BadInput
from posttrain.host import plugins
from posttrain.host.plugins import Host
from posttrain.launch.shape import needs_of
from posttrain.plan import Plan, make_plan
from posttrain.tokens.chat import ChatRenderer
from tests.support.chat_templates import PHI4, make_tokenizer
from tests.support.recipes import GIVEN, MODELS_OF_THE_DAY, SIZED

GB = 1e9
OTHERS = ["<|start|>", "<|channel|>", "<|message|>", "<|return|>", "<|call|>", "<|end_of_turn|>", "<|end_of_question|>"]
"""Special tokens that the tokenizer of the other tests lacks."""
MISTRAL_SMALL = """
{{- bos_token }}
{%- if messages[0].role == 'system' %}
    {%- set system, turns = messages[0].content, messages[1:] %}
{%- else %}
    {%- set system, turns = 'Today is ' + strftime_now('%Y-%m-%d') + '.', messages %}
{%- endif %}
{{- '[SYSTEM_PROMPT]' + system + '[/SYSTEM_PROMPT]' }}
{%- for message in turns %}
    {{- '[INST]' + message.content + '[/INST]' if message.role == 'user' else message.content + eos_token }}
{%- endfor %}
"""
SMOLLM3 = """
{%- set system = messages[0].content if messages[0].role == 'system' else 'A helpful assistant' %}
{{- '<|im_start|>system\\nToday Date: ' + strftime_now('%d %B %Y') + '\\n' }}
{{- ('/think' if enable_thinking else '/no_think') + '\\n' + system + '<|im_end|>\\n' }}
{%- for message in messages if message.role != 'system' %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>assistant\\n' + ('<think>\\n\\n</think>\\n' if loop.last and not enable_thinking else '') }}
        {{- message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' + ('' if enable_thinking else '<think>\\n\\n</think>\\n') }}
{%- endif %}
"""
OLMO2 = """
{{- bos_token }}
{%- for message in messages %}
    {{- '<|' + message.role + '|>\\n' + message.content }}
    {{- (eos_token + ('' if loop.last else '\\n')) if message.role == 'assistant' else '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\\n' }}
{%- endif %}
"""


def published(name: str) -> str:
    return Path(str(distribution("trl").locate_file(f"trl/chat_templates/{name}.jinja"))).read_text()


# template in the model's form, what the model writes, and True when a chat is one row with all of its answers trained
MODELS: dict[str, tuple[str, str, bool]] = {
    "llama31_8b": (published("llama3_1"), "{}<|eot_id|>", True),
    "llama32_1b": (published("llama3_2"), "{}<|eot_id|>", True),
    "llama32_3b": (published("llama3_2"), "{}<|eot_id|>", True),
    "qwen3_8b": (published("qwen3"), "{}<|im_end|>", False),
    "qwen3_30b_a3b": (published("qwen3"), "{}<|im_end|>", False),
    "gemma3_1b": (published("gemma3"), "{}<end_of_turn>", True),
    "mistral_small_24b": (MISTRAL_SMALL, "{}</s>", True),
    "phi4": (PHI4, "{}<|im_end|>", True),
    "smollm3_3b": (SMOLLM3, "{}<|im_end|>", False),
    "gpt_oss_20b": (published("gptoss"), "<|channel|>final<|message|>{}<|return|>", False),
    "olmo2_7b": (OLMO2, "{}</s>", True),
}
TALK: tuple[Message, ...] = (
    {"role": "user", "content": "Which flag flies over Norden?"},
    {"role": "assistant", "content": "The brown one."},
    {"role": "user", "content": "And over Bergen?"},
    {"role": "assistant", "content": "A green one."},
)


@pytest.fixture(scope="module")
def host() -> Host:
    return plugins.load()


def planned(host: Host, *words: str) -> Plan:
    for file in ("a.json", "a.jsonl"):
        Path(file).write_text("[]")
    return make_plan(compose(host, [*words]), host)


def tokenizer_of(template: str | None) -> Any:
    tokenizer = make_tokenizer(template)
    tokenizer.add_special_tokens({"additional_special_tokens": OTHERS}, replace_extra_special_tokens=False)
    return tokenizer


def renderer(template: str, variables: Mapping[str, Any]) -> ChatRenderer:
    tokenizer = tokenizer_of(template)
    tokenizer.apply_chat_template = functools.partial(render_pinned, tokenizer.apply_chat_template, variables)
    return ChatRenderer(tokenizer)


def trained(found: ChatRenderer, *messages: Message, last_only: bool = False) -> list[str]:
    rendered = found.conversation(Conversation(messages=messages, where="chats.jsonl:1"), last_only=last_only)
    tokenizer = tokenizer_of(None)
    runs = groupby(zip(rendered.ids, rendered.mask, strict=True), key=lambda pair: pair[1])
    return [tokenizer.decode([token for token, _ in run]) for on, run in runs if on]


def test_every_model_has_a_recipe_and_its_template_is_known() -> None:
    assert set(MODELS) == set(MODELS_OF_THE_DAY)
    assert {path.stem for path in (shipped("conf") / "model").glob("*.yaml")} >= set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_a_recipe_is_planned_by_the_sizes_of_its_model_alone(host: Host, name: str, working_folder: Path) -> None:
    plan = planned(host, f"recipe={name}", *GIVEN[name])
    machine = machine_of(plan, "B200")
    needs = needs_of(plan, machine)["sft"]
    assert find_architecture(plan.model.path) is not None
    assert needs.memory.total < 0.9 * needs.device  # type: ignore[operator]
    said = (shipped("recipes") / f"{name}.yaml").read_text()
    promised = int(said.split("One GPU with ")[1].split(" GB")[0])
    assert needs.memory.total < 0.9 * promised * GB
    assert not variable_problems(plan.model.template_variables, MODELS[name][0])


@pytest.mark.parametrize("name", MODELS)
def test_the_masks_of_a_model_hold_or_are_rejected_with_the_way_out(
    host: Host, name: str, working_folder: Path
) -> None:
    template, form, every = MODELS[name]
    plan = planned(host, f"recipe={name}", *GIVEN[name])
    found = renderer(template, {**plan.model.template_variables, "date": "2026-01-31"})
    answers = [form.format(turn["content"]) for turn in TALK if turn["role"] == "assistant"]
    assert trained(found, *TALK[:2]) == answers[:1]
    assert trained(found, *TALK, last_only=True) == answers[1:]
    system = {"role": "system", "content": "Be brief and kind"}
    assert trained(found, system, *TALK[:2]) == answers[:1]
    config: Any = plan.steps[0].config
    if every:
        assert trained(found, *TALK) == answers
        assert config.train_on.value == "all"
        return
    assert config.train_on.value == "each"
    with pytest.raises(BadInput, match="train_on=each"):
        trained(found, *TALK)


@pytest.mark.parametrize("name", ["tulu3_8b", "lima"])
def test_the_templates_of_published_recipes_train_every_answer(name: str) -> None:
    template = (shipped("recipes") / name / "chat_template.jinja").read_text()
    stop = "</s>" if name == "tulu3_8b" else "<|end_of_turn|>"
    answers = [f"{turn['content']}{stop}" for turn in TALK if turn["role"] == "assistant"]
    assert trained(renderer(template, {}), *TALK) == answers


def test_tulu_3_and_lima_have_the_published_settings(host: Host, working_folder: Path) -> None:
    sft, dpo, grpo = (step.config for step in planned(host, "recipe=tulu3_8b", *GIVEN["tulu3_8b"]).steps)
    settings: list[Any] = [sft, dpo, grpo]
    assert [each.lr for each in settings] == [5e-6, 5e-7, 3e-7]
    assert [each.per_device_batch_size * each.gradient_accumulation for each in settings] == [128, 128, 32]
    assert [each.epochs for each in settings[:2]] == [2, 1]
    assert [each.sequence_length for each in settings[:2]] == [4096, 2048]
    assert (settings[1].loss_type, settings[1].beta, settings[1].warmup_ratio) == (["sigmoid_norm"], 5.0, 0.1)
    assert (settings[2].beta, settings[2].temperature, settings[2].max_tokens, settings[2].k) == (0.05, 1.0, 2048, 7)
    lima: Any = planned(host, "recipe=lima", *GIVEN["lima"]).steps[0].config
    assert (lima.lr, lima.lr * lima.min_lr_ratio, lima.epochs) == (1e-5, pytest.approx(1e-6), 15)
    assert (lima.weight_decay, lima.adam_beta1, lima.adam_beta2, lima.warmup_ratio) == (0.1, 0.9, 0.95, 0.0)
    assert lima.per_device_batch_size * lima.gradient_accumulation == 32


# recipe, devices, gigabytes of each and tokens a second of all that others published for about these settings
TABLE: dict[str, tuple[str, float | None, float | None]] = {
    "sized_8b_lora": ("RTX 4090", 17.4, 3083),
    "sized_8b_qlora": ("RTX 4090", 7.9, 2413),
    "sized_8b_full": ("8 x H100", None, 8 * 6600 * 7.3 / 8.03),
    "sized_13b_qlora": ("24GB", 12.0, None),
    "sized_70b_qlora": ("A100", 48.0, None),
    "sized_70b_lora": ("8 x A100", 29.6, 3497),
}


@pytest.mark.parametrize("name", SIZED)
def test_a_sized_workload_plans_within_half_of_what_was_published(host: Host, name: str, working_folder: Path) -> None:
    on, gigabytes, speed = TABLE[name]
    plan = planned(host, f"recipe={name}")
    machine = machine_of(plan, on)
    needs, found = needs_of(plan, machine)["sft"], estimates(plan, machine)["sft"]
    assert needs.memory.total < 0.9 * needs.device  # type: ignore[operator]
    if gigabytes is not None:
        assert 1 / 1.5 < needs.memory.total / GB / gigabytes < 1.5
    if speed is not None:
        assert found.seconds is not None
        assert 1 / 1.5 < found.tokens.likely / found.seconds.likely / speed < 1.5


def test_all_weights_take_eighteen_bytes_each(host: Host, working_folder: Path) -> None:
    plan = planned(host, "recipe=sized_8b_full")
    memory = needs_of(plan, machine_of(plan, "8 x H100"))["sft"].memory
    state = 8 * (memory.weights + memory.gradients + memory.moments)
    assert state / 8.03e9 == pytest.approx(18, rel=0.05)
