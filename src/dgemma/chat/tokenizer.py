"""A checkpoint's tokenizer: text to token ids and back, conversations to prompts.

Works on: `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`, with the `tokenizers` library and
Jinja. Knows nothing of: the network; `transformers`, which is never imported.
"""

from __future__ import annotations

import functools
import json
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgemma.chat import template as templates
from dgemma.chat.messages import normalise_messages, normalise_tools
from dgemma.errors import DgemmaError
from dgemma.tokenizer_files import ROLE_KEYS, ROLES, byte_symbols, read_tokenizer_files, special_roles

if TYPE_CHECKING:
    import tokenizers

Conversation = str | Sequence[Mapping[str, Any]]

# The chat format's own: what a template writes and a model answers with.
MARKS = ("<|turn>", "<turn|>", "<|think|>", "<|channel>", "<channel|>", "<|tool>", "<tool|>", "<|tool_call>",
         "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>', "<|image>", "<image|>", "<|image|>",
         "<|audio>", "<audio|>", "<|audio|>", "<|video|>")

# Spellings in a conversation are stood in for by single characters of this private plane while it is rendered.
_STAND_INS = range(0xF0000, 0xFFFFE)


class Tokenizer:
    """Encodes, decodes and renders for one checkpoint. Safe to share between threads."""

    def __init__(self, backend: tokenizers.Tokenizer, chat_template: str | Mapping[str, str] | None = None,
                 special_tokens: Mapping[str, str] | None = None, source: str = "this checkpoint") -> None:
        """From parts; `from_folder` is the usual way.

        `chat_template`: one template, or several by name ("default", "tool_use"). `special_tokens`: their roles,
        such as `{"bos_token": "<bos>"}`; templates see them under these names. `source` names the checkpoint in
        errors. Tokens with a role and the chat format's marks become special in `backend`, whatever it says of them.
        """
        self.backend = backend
        self.source = source
        self.special_tokens = dict(special_tokens or {})
        _make_special(backend, self.special_tokens)
        self.chat_templates = (
            {"default": chat_template} if isinstance(chat_template, str) else dict(chat_template or {}))
        self.bos_id = self._role_id("bos")
        self.eos_id = self._role_id("eos")
        self.pad_id = self._role_id("pad")
        specials = {token_id: token.content for token_id, token in backend.get_added_tokens_decoder().items()
                    if token.special}
        self._special = set(specials.values())
        self._special_ids = frozenset(specials)
        self._decoder = _decoder_steps(backend.decoder)
        by_length = sorted(self._special, key=len, reverse=True)  # the longest spelling wins
        self._any_special = re.compile("|".join(map(re.escape, by_length)) or r"(?!)")
        # Whether special tokens are parsed is a switch on the backend, not an argument of its encode.
        self._switch = threading.Lock()

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """The tokenizer of the checkpoint in `folder`.

        `read_tokenizer_files` says which files that takes. Raises `CheckpointError`, for a template that does not
        compile, too.
        """
        files = read_tokenizer_files(Path(folder), "copy tokenizer.json, tokenizer_config.json and chat_template.jinja"
                                     " there from the checkpoint that the weights came from")
        tokenizer = cls(files.backend, files.templates, special_roles(files.config), str(folder))
        for text in tokenizer.chat_templates.values():
            templates.compiled(text, str(files.templates_from))
        return tokenizer

    @property
    def vocab_size(self) -> int:
        """How many tokens there are, special ones included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def end_of_text_id(self) -> int | None:
        """The token that ends a text and fills what is left of a canvas: `<eos>` where the vocabulary has it.

        Not `eos_id`: of a chat model that often is the end of a turn, which is to stand once, where the turn ends.
        """
        found = self.token_to_id("<eos>")
        return self.eos_id if found is None else found

    @property
    def padding_id(self) -> int | None:
        """The token that means nothing: `<pad>` where the vocabulary has it, whatever else is used as padding."""
        found = self.token_to_id("<pad>")
        return self.pad_id if found is None else found

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be rendered at all."""
        return bool(self.chat_templates)

    def token_to_id(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it; None when there is none."""
        return self.backend.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        """The vocabulary's spelling of an id; None when it is out of range."""
        return self.backend.id_to_token(token_id) if token_id >= 0 else None

    def encode(self, text: str, specials: bool = True) -> list[int]:
        """The token ids of `text`; nothing is added before or after.

        With `specials`, "<turn|>" in the text is that special token; without, it is seven ordinary characters.
        """
        # A lone surrogate (JSON can carry one) has no UTF-8 form, and so no bytes to encode.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        with self._switch:
            self.backend.encode_special_tokens = not specials
            return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of token ids; bytes that are no UTF-8 become U+FFFD."""
        return self.backend.decode([int(token_id) for token_id in ids], skip_special_tokens=skip_special_tokens)

    def is_special(self, token_id: int) -> bool:
        """Whether an id is a special token, which `decode` can skip."""
        return token_id in self._special_ids

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token contributes to decoded text; none for an id out of range.

        A character may be spread over several tokens, so only their bytes together are sure to be UTF-8. A special
        token contributes its spelling.
        """
        token = self.id_to_token(token_id)
        if token is None:
            return b""
        if token_id in self._special_ids or not self._decoder:
            return token.encode()
        text = token
        for step in self._decoder:
            if step["type"] == "ByteLevel":
                table = _byte_of_symbol()
                if all(char in table for char in text):  # a token added as plain text may not be
                    return bytes(table[char] for char in text)
            elif step["type"] == "ByteFallback" and (byte := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", text)):
                return bytes.fromhex(byte[1])
            elif step["type"] == "Replace":
                pattern = step["pattern"]
                if "String" in pattern:
                    text = text.replace(pattern["String"], step["content"])
                else:
                    try:
                        text = re.sub(pattern["Regex"], lambda _, new=step["content"]: new, text)
                    except re.error:  # the library's expressions are another dialect
                        return self.backend.decode([token_id], skip_special_tokens=False).encode()
            elif step["type"] == "Metaspace":
                text = text.replace(step["replacement"], " ")
            elif step["type"] not in ("ByteFallback", "Fuse", "Strip"):  # Strip is about the text as a whole
                return self.backend.decode([token_id], skip_special_tokens=False).encode()
        return text.encode()

    def render(self, messages: Conversation, thinking: bool = False,
               tools: Sequence[Mapping[str, Any]] | None = None, add_generation_prompt: bool = True) -> str:
        """The prompt of a conversation as text, by the checkpoint's own template.

        To get token ids use `apply_chat_template`: it keeps special tokens that a user typed from having effect.
        Raises `DgemmaError` for a malformed conversation or a checkpoint without a template.
        """
        self._require_template()
        return self._render(normalise_messages(messages), thinking, normalise_tools(tools), add_generation_prompt)

    def apply_chat_template(self, messages: Conversation, thinking: bool = False,
                            tools: Sequence[Mapping[str, Any]] | None = None,
                            add_generation_prompt: bool = True) -> list[int]:
        """The prompt of a conversation as token ids.

        What is spelt like a special token inside the messages or tools is ordinary text: only the template's own
        special tokens count. Raises as `render` does.
        """
        self._require_template()
        # Normalised first: that may still join text or decode JSON, and so spell a special token.
        conversation, declared = normalise_messages(messages), normalise_tools(tools)
        typed = _Typed(self._any_special, [conversation, declared])
        conversation, declared = templates.plain([conversation, declared], typed.hide)
        prompt = self._render(conversation, thinking, declared, add_generation_prompt)
        return [token_id for text, plain in typed.split(prompt) for token_id in self.encode(text, specials=not plain)]

    def _render(self, messages: list[dict], thinking: bool, tools: list[dict] | None,
                add_generation_prompt: bool) -> str:
        name = "tool_use" if tools and "tool_use" in self.chat_templates else "default"
        name = name if name in self.chat_templates else next(iter(self.chat_templates))
        variables = {
            **self.special_tokens,
            "messages": messages,
            "tools": tools,
            "documents": None,
            "enable_thinking": thinking,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return templates.render(self.chat_templates[name], variables, self.source)
        except DgemmaError:
            # Not every template knows of arguments that stayed text because they were broken.
            mended = [_without_text_arguments(message) for message in messages]
            if mended == messages:
                raise
            return templates.render(self.chat_templates[name], {**variables, "messages": mended}, self.source)

    def _require_template(self) -> None:
        if not self.chat_templates:
            raise DgemmaError(f"{self.source} has no chat template (chat_template.jinja), so messages cannot be "
                              "rendered: give the prompt as token ids instead")

    def _role_id(self, role: str) -> int | None:
        return self.token_to_id(self.special_tokens.get(f"{role}_token", f"<{role}>"))


class _Typed:
    """Special tokens' spellings that somebody typed, each stood in for by a character that nobody typed.

    Rendering yields one string, in which a typed "<turn|>" and the template's own look the same. The stand-ins
    go through the template like any letter, and mark afterwards what is to be encoded as plain text.
    """

    def __init__(self, any_special: re.Pattern[str], conversation: Any) -> None:
        self._any_special = any_special
        spellings: set[str] = set()
        used: set[str] = set()

        def note(string: str) -> str:
            spellings.update(any_special.findall(string))
            used.update(char for char in string if ord(char) in _STAND_INS)
            return string

        templates.plain(conversation, note)
        free = (chr(code) for code in _STAND_INS if chr(code) not in used)
        self._stand_ins = dict(zip(sorted(spellings), free, strict=False))
        self._spellings = {char: spelling for spelling, char in self._stand_ins.items()}

    def hide(self, text: str) -> str:
        """`text` with every special spelling in it replaced."""
        if not self._stand_ins:
            return text
        return self._any_special.sub(lambda found: self._stand_ins.get(found.group(), found.group()), text)

    def split(self, prompt: str) -> Iterator[tuple[str, bool]]:
        """The prompt in stretches: the text, and whether it is to be encoded as plain text."""
        if not self._spellings:
            yield prompt, False
            return
        for stretch in re.split(f"([{''.join(self._spellings)}])", prompt):
            if stretch:
                yield self._spellings.get(stretch, stretch), stretch in self._spellings


def _make_special(backend: tokenizers.Tokenizer, roles: Mapping[str, str]) -> None:
    """Make special the tokens with a role and the chat format's marks, as far as the vocabulary has them.

    Files disagree about them: one whose `eos_token` is "<turn|>" may well leave `<eos>` an ordinary token, and then it
    is shown, and a user who types it is heard.
    """
    from tokenizers import AddedToken

    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    named = [roles[key] for key in ROLE_KEYS if roles.get(key)]
    wanted = dict.fromkeys([*(f"<{role}>" for role in ROLES), *MARKS, *named])
    # Of a token that is not there a new one would be made, which the network does not know.
    new = [token for token in wanted if token not in special and backend.token_to_id(token) is not None]
    if new:
        backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in new])


def _without_text_arguments(message: dict) -> dict:
    """The message with no arguments in its tool calls where they are text."""
    if "tool_calls" not in message:
        return message
    calls = [{**call, "function": {**call["function"], "arguments": {}}}
             if isinstance(call["function"]["arguments"], str) else call for call in message["tool_calls"]]
    return {**message, "tool_calls": calls}


def _decoder_steps(decoder: Any) -> list[dict[str, Any]]:
    """What a backend's decoder does to a token, step by step, as `tokenizer.json` spells it."""
    if decoder is None:
        return []
    steps = [json.loads(decoder.__getstate__())]
    while any(step["type"] == "Sequence" for step in steps):
        steps = [inner for step in steps for inner in step.get("decoders", [step])]
    return steps


@functools.cache
def _byte_of_symbol() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for."""
    return {symbol: byte for byte, symbol in enumerate(byte_symbols())}
