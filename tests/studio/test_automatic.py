"""What is chosen for a question where nobody chose, and the presets."""

import pytest

from dgemma.config import GenerationConfig
from dgemma.studio.asking import settings_of
from dgemma.studio.automatic import LONG, SHORT, THOUGHT, chosen_for
from dgemma.studio.presets import PRESETS, keep_system_prompt, preset_of, system_prompts, with_preset
from support.studio import PUZZLE


@pytest.mark.parametrize(("question", "chosen"), [
    (PUZZLE, {}),
    ("Write a poem about fog.", {}),
    ("Prove that there are infinitely many primes.", {"thinking": True}),
    ("x" * (LONG + 1), {"thinking": True}),
    ("Answer in one sentence: what is fog?", {"max_tokens": SHORT}),
    ("Fog in 500 words, please", {"max_tokens": 1000}),
    ("A story of 20 words", {"max_tokens": SHORT}),
    ("Solve 3x = 6, just the answer", {"thinking": True, "max_tokens": SHORT + THOUGHT}),
    ("The theorem was disproved by planetary reasons", {}),
])
def test_thinking_and_length_are_chosen_from_the_question(question, chosen):
    assert chosen_for(question) == chosen


def test_what_was_set_holds_and_the_last_question_decides_the_rest():
    messages = [{"role": "user", "content": "Prove it."}, {"role": "assistant", "content": "Why?"},
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Explain it in one word."}]}]
    assert settings_of({"seed": 3, "tools": {"web": "ask"}}, messages) == {"seed": 3, "max_tokens": SHORT}
    assert settings_of({"max_tokens": 9, "thinking": False}, messages[:1]) == {"max_tokens": 9, "thinking": False}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_found_again_and_leaves_other_settings_alone(name):
    options = with_preset({"seed": 3, "entropy_bound": 9.0, "t_max": 0.7}, name)
    assert preset_of(options) == name and (options["seed"], options["t_max"]) == (3, 0.7)
    GenerationConfig().replace(**PRESETS[name])
    assert preset_of({**options, "entropy_bound": 0.7}) is None


def test_system_prompts_are_kept_by_name(store):
    keep_system_prompt(store, "Kind", "Be kind.")
    keep_system_prompt(store, "Kind", "Be very kind.")
    keep_system_prompt(store, "Brief", "Be brief.")
    assert system_prompts(store) == {"Kind": "Be very kind.", "Brief": "Be brief."}
    keep_system_prompt(store, "Kind", None)
    assert list(system_prompts(store)) == ["Brief"]
