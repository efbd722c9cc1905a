"""Presets: the sampler's settings under three names, whose numbers are measured, and system prompts of one's own.

Works on: options of answers, a store's settings. Knows nothing of: pages.
"""

from __future__ import annotations

from typing import Any

from dgemma.studio.store import Store

# docs/studio.md has the measurement; what is not here is as the checkpoint has it.
PRESETS: dict[str, dict[str, Any]] = {
    "Fast": {"max_denoising_steps": 16, "entropy_bound": 0.3},
    "Balanced": {},
    "Quality": {"max_denoising_steps": 96, "entropy_bound": 0.05},
}
PRESET_ABOUT = {
    "Fast": "Half the looks at a hard canvas, and bolder ones.",
    "Balanced": "The checkpoint's own settings.",
    "Quality": "Believes less in a step and may look twice as often.",
}
_SET = tuple(dict.fromkeys(name for settings in PRESETS.values() for name in settings))


def with_preset(options: dict[str, Any], preset: str) -> dict[str, Any]:
    """Options with a preset's sampler settings in place of theirs."""
    return {name: value for name, value in options.items() if name not in _SET} | PRESETS[preset]


def preset_of(options: dict[str, Any]) -> str | None:
    """The preset that options are; None for settings of somebody's own."""
    own = {name: options[name] for name in _SET if options.get(name) is not None}
    return next((name for name, settings in PRESETS.items() if settings == own), None)


_SETTING = "system_prompts"


def system_prompts(store: Store) -> dict[str, str]:
    """Those that were kept, by their names."""
    return store.setting(_SETTING, {})


def keep_system_prompt(store: Store, name: str, text: str | None) -> None:
    """Keep a system prompt under a name, in place of another one of that; None forgets it."""
    kept = {other: said for other, said in system_prompts(store).items() if other != name}
    store.set_setting(_SETTING, kept if text is None else {**kept, name: text})
