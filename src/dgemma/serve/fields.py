"""What every route takes, under whatever name a client knows it, and what becomes of the fields that it does not take.

A field that this server knows is never passed over in silence. Either it is honoured on every route it could be sent
to (`AnswerFields`), or it is refused by name (`REFUSED`, and whatever another route honours), or it has no effect and
the answer's header says so (`NO_EFFECT`). Unknown fields are told in that header, too; ``--strict-fields`` refuses all
that has no effect.

Works on: JSON bodies. Knows nothing of: the engine.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from fastapi import Request as HttpRequest
from pydantic import Field

from dgemma.constrain.choice import ToolChoice, ToolsError, read_tool_choice, shown_tools
from dgemma.serve.ask import Ask, client_of
from dgemma.serve.bodies import (
    Body,
    CacheSalt,
    Length,
    Listed,
    LogitBias,
    SamplerFields,
    Stop,
    Temperature,
    TopK,
    TopP,
    Whole,
)
from dgemma.serve.errors import ApiError, shown
from dgemma.serve.forms import answer_form
from dgemma.serve.settings import Settings

if TYPE_CHECKING:
    from dgemma.model import Prompt
    from dgemma.nn.loaded import LoadedAdapter

Words = Literal["none", "auto", "required", "any"]

# Names of one thing; the first one that is given counts. -1 is no limit, as in llama.cpp.
BUDGETS = ("reasoning_budget_tokens", "reasoning_budget", "thinking_budget_tokens", "thinking_token_budget",
            "thinking_budget")
_INNER_BUDGETS = ("budget_tokens", "max_tokens")  # of thinking and reasoning
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Penalty = Annotated[float, Field(allow_inf_nan=False, description="Has no effect here.")]

IGNORED_HEADER = "x-dgemma-ignored"
_MOST_TOLD = 20  # names in that header
_TELLABLE = re.compile(r"[A-Za-z0-9_.-]{1,64}")

# Fields of OpenAI, Anthropic, vLLM and llama.cpp that change what an answer is, or its form, and cannot be honoured on
# any route, with the values that ask for nothing.
REFUSED: dict[str, tuple[Any, ...]] = {
    "min_tokens": (0,), "min_new_tokens": (0,), "ignore_eos": (False,), "stop_token_ids": ([],),
    "include_stop_str_in_output": (False,), "use_beam_search": (False,), "num_beams": (1, 0), "best_of": (1,),
    "bad_words": ([],), "allowed_token_ids": (), "prompt_logprobs": (), "n_probs": (0,), "functions": ([],),
    "function_call": ("none", "auto"), "audio": (), "modalities": (["text"],), "web_search_options": (),
    "grammar": ("",), "guided_grammar": ("",), "ebnf": ("",), "structural_tag": (),
    "chat_template": (), "documents": ([],), "add_generation_prompt": (True,), "continue_final_message": (False,),
    "logits_processors": ([],), "prompt_embeds": (), "lora": ([],), "mcp_servers": ([],), "container": (),
    "compaction": (), "truncate_prompt_tokens": (), "images": ([],), "videos": ([],), "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,), "input_prefix": ("",), "input_suffix": ("",), "plugins": ([],),
}

# Other samplers' settings, with the values that ask for nothing. Popular programs send them with every request, so
# that they are told rather than refused.
NO_EFFECT: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,), "frequency_penalty": (0,), "repetition_penalty": (1, 0), "repeat_penalty": (1, 0),
    "penalty_alpha": (0,), "penalize_nl": (False,), "penalty_range": (0,), "repetition_penalty_range": (0,),
    "repeat_last_n": (0,), "no_repeat_ngram_size": (0,), "encoder_repetition_penalty": (1,), "length_penalty": (1,),
    "early_stopping": (False,), "min_p": (0,), "typical_p": (1,), "typical": (1,), "tfs": (1,), "tfs_z": (1,),
    "top_a": (0,), "epsilon_cutoff": (0,), "eta_cutoff": (0,), "top_n_sigma": (-1, 0), "min_keep": (0,),
    "mirostat": (0,), "mirostat_mode": (0,), "mirostat_tau": (), "mirostat_eta": (), "dry_multiplier": (0,),
    "dry_base": (), "dry_allowed_length": (), "dry_penalty_last_n": (), "dry_sequence_breakers": (),
    "xtc_probability": (0,), "xtc_threshold": (), "dynatemp_range": (0,), "dynatemp_exponent": (1,),
    "dynamic_temperature": (False,), "smoothing_factor": (0,), "smoothing_curve": (1,), "temperature_last": (False,),
    "samplers": (), "sampler_order": (), "sampler_priority": (), "do_sample": (True,), "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,), "guided_decoding_backend": (), "guided_whitespace_pattern": (),
    "structural_outputs_backend": (), "context_management": (), "moderation": (), "include_reasoning": (True,),
    "stream_options": ({},), "options": ({},), "repetition_detection": (),
    "messages": (), "input": (), "prompt": (),  # of another route, beside this one's own
}

# What changes nothing about an answer wherever it is sent: not worth telling.
HARMLESS = frozenset((
    "metadata", "store", "service_tier", "prompt_cache_key", "prompt_cache_options",
    "prompt_cache_retention", "prediction", "verbosity", "truncation", "include", "cache_control", "cache_prompt",
    "inference_geo", "speed", "diagnostics", "billing_policy", "fallbacks", "fallback_credit_token",
    "betas", "anthropic_version", "priority", "request_id", "keep_alive", "id_slot", "slot_id",
    "timings_per_token", "return_progress", "max_tool_calls", "background_options", "access_programs", "timeout",
    "provider", "route", "transforms", "usage", "session_id", "trace", "stream_usage", "custom_llm_provider",
    "num_ctx", "num_gpu", "num_thread", "num_batch", "user_profile_id", "client_metadata", "num_retries", "max_retries",
    "parallel_tool_calls", "add_special_tokens", "strict",
))

# Where to say what a field of another route says.
_INSTEAD = {
    "system": "send a message of the role system", "instructions": "send a message of the role system",
    "tools": "send it to /v1/chat/completions, /v1/responses or /v1/messages",
    "tool_choice": "send it to /v1/chat/completions, /v1/responses or /v1/messages",
    "logprobs": "send it to /v1/chat/completions, /v1/completions or /v1/responses",
    "top_logprobs": "send it to /v1/chat/completions or /v1/responses",
    "echo": "send it to /v1/completions", "suffix": "send it to /v1/completions",
    "canvas": "send it to /v1/chat/completions", "pinned": "send it to /v1/chat/completions",
    "prefix": "send it to /v1/chat/completions", "from_step": "send it to /v1/chat/completions",
    "previous_response_id": "answers are not stored here: send the whole conversation",
    "conversation": "answers are not stored here: send the whole conversation",
    "background": "answers are not stored here, so none can be made in the background",
}


class ChosenTools(Body):
    """A function by name, or some of the tools: {"type": "function", "function": {"name"}}, {"type": "function",
    "name"}, {"type": "tool", "name"}, {"type": "allowed_tools", "allowed_tools": {"mode", "tools"}}, or the same flat.
    """

    type: Literal["function", "tool", "allowed_tools", "none", "auto", "required", "any"]
    disable_parallel_tool_use: bool | None = None


class Thinking(Body):
    """Anthropic's and DeepSeek's spelling of the switch.

    ``budget_tokens``: the most tokens to think, marks included; a thought that would have more is closed there.
    ``display``: whether thoughts are shown, where an answer has a place for them.
    """

    type: Literal["enabled", "disabled", "adaptive", "auto"]
    budget_tokens: Any = None
    display: Literal["summarized", "omitted"] | None = None


class ReasoningConfig(Body):
    """Any effort but none and minimal lets the model think; how long is its own choice. ``enabled`` says it alone."""

    effort: Effort | None = None
    enabled: bool | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None


class TextConfig(Body):
    """``format`` is the answer's form, as in response_format; ``verbosity`` is accepted and changes nothing."""

    format: dict[str, Any] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class OutputConfig(Body):
    """``format`` is the answer's form, as in response_format; ``effort`` is accepted and changes nothing."""

    format: dict[str, Any] | None = None


class AnswerFields(SamplerFields):
    """What asks for an answer, the same on every route. Of several names of one thing the first one counts.

    ``known`` is what the routes take whose bodies are ``is_known``: elsewhere such a field is a mistake.

    Length: ``max_completion_tokens``, ``max_output_tokens``, ``max_tokens``, ``max_new_tokens``, ``n_predict``,
    ``num_predict``; none of them, or -1: to the end of the context; more than fits is what fits. Form: the fields of
    `forms`. Thinking: ``thinking``, ``enable_thinking``, ``think``, ``chat_template_kwargs``, ``reasoning``,
    ``reasoning_effort``. How long a thought may be: the fields of `reasoning_budget`. Stop strings: ``stop``
    and ``stop_sequences`` together.
    """

    known: ClassVar[set[str]] = set()
    is_known: ClassVar[bool] = True
    prompt_param: ClassVar[str] = "messages"  # the field that holds what is to be answered

    stream: bool | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    logit_bias: LogitBias | None = None
    n: Annotated[Whole, Field(ge=1, le=128)] | None = None
    stop: Stop | None = None
    stop_sequences: Stop | None = None

    max_tokens: Length | None = None
    max_completion_tokens: Length | None = None
    max_output_tokens: Length | None = None
    max_new_tokens: Length | None = None
    n_predict: Length | None = None
    num_predict: Length | None = None

    response_format: Annotated[dict[str, Any] | None, Field(
        description="The answer's form: type is text, json_object, json_schema, regex or choice.")] = None
    text: TextConfig | None = None
    output_config: OutputConfig | None = None
    output_format: Annotated[dict[str, Any] | None, Field(description="Like response_format.")] = None
    format: Annotated[str | dict[str, Any] | None, Field(description='"json", or a JSON schema.')] = None
    json_schema: Annotated[dict[str, Any] | str | None, Field(description="A JSON schema.")] = None
    structured_outputs: Annotated[dict[str, Any] | None, Field(
        description="One of json, regex, choice and json_object.")] = None
    response_schema: Annotated[dict[str, Any] | str | None, Field(description="A JSON schema.")] = None
    guided_decoding: Annotated[dict[str, Any] | None, Field(description="Like structured_outputs.")] = None
    guided_json: Annotated[dict[str, Any] | str | None, Field(description="A JSON schema.")] = None
    guided_regex: str | None = None
    guided_choice: Listed[str] | None = None
    guided_json_object: bool | None = None
    regex: str | None = None

    thinking: bool | Thinking | None = None
    enable_thinking: bool | None = None
    think: bool | Effort | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning: ReasoningConfig | None = None
    reasoning_effort: Effort | None = None

    reasoning_budget_tokens: Annotated[Any, Field(
        description="Most tokens to think, marks included; 0: no thinking, -1: no limit.")] = None
    reasoning_budget: Annotated[Any, Field(description="Like reasoning_budget_tokens.")] = None
    thinking_budget: Annotated[Any, Field(description="Like reasoning_budget_tokens.")] = None
    thinking_budget_tokens: Annotated[Any, Field(description="Like reasoning_budget_tokens.")] = None
    thinking_token_budget: Annotated[Any, Field(description="Like reasoning_budget_tokens.")] = None

    cache_salt: CacheSalt | None = None
    user: str | None = None
    safety_identifier: str | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        if cls.is_known:
            AnswerFields.known |= cls.model_fields.keys()

    def check(self, http: HttpRequest, settings: Settings) -> None:
        """Refuse what cannot be honoured, and note what has no effect for the answer's header.

        Raises `ApiError` naming the first field at fault.
        """
        given = {name: getattr(self, name) for name in ("presence_penalty", "frequency_penalty")
                 if name in self.model_fields_set} | (self.model_extra or {})
        told = [name for name, value in given.items()
                if value is not None and name not in HARMLESS and not _asks_nothing(name, value, http, settings)]
        names = [name for name in told if _TELLABLE.fullmatch(name)]
        if names:
            http.scope["dgemma.ignored"] = ", ".join(names[:_MOST_TOLD])

    def ask(self, http: HttpRequest, prompt: Prompt, adapter: LoadedAdapter | None) -> Ask:
        """What is asked for. Raises `ApiError`."""
        form, format_param = answer_form(self)
        max_tokens, max_tokens_param = self.length_limit()
        return Ask(prompt=prompt, adapter=adapter, client=client_of(http, self.named_user(), self.cache_salt),
                   max_tokens=max_tokens, seed=self.seed, temperature=self.temperature, top_k=self.top_k,
                   top_p=self.top_p, logit_bias=self.logit_bias,
                   options={"stop": self.stops(), "response_format": form, "logprobs": self.wanted_logprobs(),
                            **self.ask_options(), **self.sampler()},
                   prompt_param=self.prompt_param, max_tokens_param=max_tokens_param, format_param=format_param)

    def ask_options(self) -> dict[str, Any]:
        """What one kind of body asks for beyond the fields of all, as arguments of `Model.request`."""
        return {}

    def wanted_logprobs(self) -> int | None:
        """How many alternatives beside each token's log-probability; None: no log-probabilities. Raises `ApiError`."""
        return None

    def named_user(self) -> str | None:
        """For whom the client asks."""
        return self.user or self.safety_identifier

    def length_limit(self) -> tuple[int | None, str]:
        """The most tokens to answer with, None for as many as there is room for, and the field that says so."""
        for name in ("max_completion_tokens", "max_output_tokens", "max_tokens", "max_new_tokens", "n_predict",
                     "num_predict"):
            if (value := getattr(self, name)) is not None:
                return (None if value < 1 else value), name
        return None, "max_tokens"

    def stops(self) -> tuple[str, ...]:
        """The strings to end before. Empty ones, which would end every answer at once, mean that there is none."""
        given = (value for value in (self.stop, self.stop_sequences) if value is not None)
        texts = (text for value in given for text in ([value] if isinstance(value, str) else value))
        return tuple(dict.fromkeys(text for text in texts if text))

    def thinking_switch(self) -> tuple[bool, str]:
        """Whether the model shall think first, and the field that says so. Raises `ApiError`.

        Any one of the spellings may say so, the plainest wins; who says nothing but how long it may think wants it to.
        """
        template = _template_switch(self.chat_template_kwargs or {})
        if isinstance(self.thinking, bool):
            return self.thinking, "thinking"
        if self.thinking is not None:
            return self.thinking.type != "disabled", "thinking"
        if self.enable_thinking is not None:
            return self.enable_thinking, "enable_thinking"
        if self.think is not None:
            return (self.think if isinstance(self.think, bool) else _thinks(self.think)), "think"
        if template is not None:
            return template, "chat_template_kwargs"
        if self.reasoning is not None and (self.reasoning.enabled is not None or self.reasoning.effort is not None):
            enabled = self.reasoning.enabled
            return (_thinks(self.reasoning.effort) if enabled is None else enabled), "reasoning"
        if self.reasoning_effort is not None:
            return _thinks(self.reasoning_effort), "reasoning_effort"
        return (reasoning_budget(self) or 0) > 0, "reasoning_budget_tokens"

    def one_answer(self) -> None:
        """Raises `ApiError` if several answers are asked for."""
        if (self.n or 1) > 1:
            raise ApiError(400, "n must be 1 here: several answers are made at /v1/chat/completions", "n",
                           "unsupported_parameter")


class ConversationFields(AnswerFields):
    """What asks for an answer to a conversation: thoughts and calls of tools are a part of it."""

    tool_choice: Words | ChosenTools | None = None
    parallel_tool_calls: bool | None = None

    def declared_tools(self) -> list[dict[str, Any]] | None:
        """The declarations of the tools, as the library reads them."""
        raise NotImplementedError

    def prompt_messages(self) -> list[dict[str, Any]]:
        """The conversation as the library reads it. Raises `ApiError` naming the field that cannot be read."""
        raise NotImplementedError

    def one_call(self) -> bool:
        """Whether the answer may have one tool call only."""
        choice = self.tool_choice
        return self.parallel_tool_calls is False or (isinstance(choice, ChosenTools)
                                                     and bool(choice.disable_parallel_tool_use))

    def ask_options(self) -> dict[str, Any]:
        return {"thinking": self.thinking_switch()[0], "reasoning_budget": reasoning_budget(self),
                "tools": self.declared_tools() or [], "tool_choice": self._choice(),
                "parallel_tool_calls": not self.one_call()}

    def prompt_options(self) -> dict[str, Any]:
        """What the prompt depends on beside the messages, as arguments of `ask.prompt_tokens`."""
        try:
            choice = read_tool_choice(self._choice())
        except ToolsError:  # only a prompt's tokens are counted: `Model.request` refuses it
            choice = ToolChoice()
        return {"thinking": self.thinking_switch()[0] and reasoning_budget(self) != 0,
                "tools": shown_tools(self.declared_tools(), choice)}

    def _choice(self) -> Any:
        """``tool_choice`` as `read_tool_choice` reads it."""
        choice = self.tool_choice
        return choice.model_dump(exclude_unset=True) if isinstance(choice, ChosenTools) else choice


class ProbabilityFields(ConversationFields):
    """Log-probabilities as chat asks for them: a switch, and how many alternatives beside each token's."""

    logprobs: bool | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None

    def wanted_logprobs(self) -> int | None:
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


def function_tool(name: str, description: str | None, parameters: dict[str, Any] | None,
                  strict: bool | None) -> dict[str, Any]:
    """The declaration of a tool as the library reads it."""
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters,
                                             "strict": strict}}


def reasoning_budget(body: Body) -> int | None:
    """The most tokens to think; None where nothing is said. Raises `ApiError`."""
    for name in BUDGETS:
        if (value := _field(body, name)) is not None:
            return _budget(value, name)
    for outer in ("reasoning", "thinking", "chat_template_kwargs"):
        for name in (*_INNER_BUDGETS, *BUDGETS):
            if (value := _field(_field(body, outer), name)) is not None:
                return _budget(value, f"{outer}.{name}")
    return None


def _field(said: Any, name: str) -> Any:
    if isinstance(said, Body):
        return getattr(said, name, None)  # what no field is declared for is kept, too
    return said.get(name) if isinstance(said, Mapping) else None


def _budget(value: Any, name: str) -> int | None:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not int or value < -1:
        raise ApiError(400, f"{name} must be a whole number of tokens (0: no thinking, -1: no limit), got {value!r}",
                       name)
    return None if value < 0 else value


def _thinks(effort: str | None) -> bool:
    return effort not in (None, "none", "minimal")


def _template_switch(given: dict[str, Any]) -> bool | None:
    """What chat_template_kwargs say of thinking; other arguments that ask for something are refused."""
    switch = None
    for name, value in given.items():
        if name in ("enable_thinking", "thinking") and isinstance(value, bool):
            switch = bool(switch) or value
        elif name == "reasoning_effort" and isinstance(value, str):
            switch = bool(switch) or _thinks(value)
        elif name not in BUDGETS and value not in (None, False, "", [], {}):
            raise ApiError(400, f"chat_template_kwargs takes enable_thinking, thinking (true or false), "
                           f"reasoning_effort and thinking_budget, not {shown(name)}",
                           "chat_template_kwargs", "unsupported_parameter")
    return switch


def _asks_nothing(name: str, value: Any, http: HttpRequest, settings: Settings) -> bool:
    """Whether a field that is not taken asks for nothing; False: it is to be told of. Raises `ApiError`."""
    if name in REFUSED:
        if value not in REFUSED[name]:
            raise ApiError(400, f"{name} is not supported here: leave it out", name, "unsupported_parameter")
        return True
    if value in NO_EFFECT.get(name, ()):
        return True
    if name not in NO_EFFECT and name in AnswerFields.known:
        if value in (False, "", [], {}):
            return True
        instead = _INSTEAD.get(name, "leave it out")
        raise ApiError(400, f"{name} is no field of {http.url.path}: {instead}", name, "unsupported_parameter")
    if settings.strict_fields:
        known = name in NO_EFFECT
        why = "has no effect here, and this server was told to say so (--strict-fields): leave it out" if known \
            else "is not known here, and this server takes known fields only (--strict-fields)"
        raise ApiError(400, f"{name} {why}", name, "unsupported_parameter" if known else "unknown_parameter")
    return False
