"""Loading a model and generating with it: the library's face."""

from __future__ import annotations

import secrets
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dgemma.cache import check_cache_type
from dgemma.chat.infill import StartCanvas, is_parts, read_canvas
from dgemma.chat.media import parts_in, place_media, put_first, show
from dgemma.chat.messages import normalise_messages, normalise_tools
from dgemma.chat.pictures import PICTURE_TOKENS, Picture, with_picture_tokens
from dgemma.chat.reply import ReplyReader, inside_thought
from dgemma.chat.thoughts import CLOSE, OPEN
from dgemma.chat.tokenizer import Tokenizer
from dgemma.config import GenerationConfig, ModelConfig, load_generation_config, load_model_config
from dgemma.constrain.choice import ToolChoice, calls_of, read_tool_choice, shown_tools, usable_tools
from dgemma.diffusion.events import Event, Finished, Generation
from dgemma.diffusion.request import Request, SamplingParams, Thoughts
from dgemma.engine import Engine, PrefixStore
from dgemma.engine.pictures import PictureEncoder
from dgemma.errors import CheckpointError, ContextLengthError, DgemmaError
from dgemma.fields import is_whole
from dgemma.memory.inference import request_memory
from dgemma.nn import DiffusionTransformer

if TYPE_CHECKING:
    from dgemma.weights.gguf_model import GGUFModel
    from dgemma.weights.hub.transfer import Downloads
    from dgemma.weights.towers import Tower

Prompt = str | Sequence[dict[str, Any]] | Sequence[int] | torch.Tensor | np.ndarray


class Model:
    """A network with its tokenizer and settings; `load` makes one.

    Attributes: ``network``, ``tokenizer``, ``config`` (the network's shape), ``generation_config``, ``name``,
    ``pictures`` (what sees them; None for a model that cannot).
    """

    def __init__(self, network: DiffusionTransformer, tokenizer: Tokenizer, generation_config: GenerationConfig,
                 name: str, pictures: PictureEncoder | None = None):
        self.network, self.tokenizer, self.name, self.pictures = network, tokenizer, name, pictures
        self.generation_config = generation_config
        self.prefixes = PrefixStore(self.request_memory() // 4)  # what a conversation's earlier turns have read
        self._engines: list[weakref.ref[Engine]] = []  # replaced, never changed: `cancel` may come at any moment
        self._adding = threading.Lock()

    @property
    def config(self) -> ModelConfig:
        return self.network.config

    def request_memory(self, available: int | None = None) -> int:
        """Memory for requests and for what they leave to be read again, bytes: what seeing needs is not among it.

        ``available`` as in `memory.inference.request_memory`.
        """
        return request_memory(self.network, available, 0 if self.pictures is None else self.pictures.ahead)

    def generate(self, prompt: Prompt, *, max_tokens: int | None = None, seed: int | None = None,
                 thinking: bool = False, system: str | None = None, tools: list[dict[str, Any]] | None = None,
                 images: Sequence[Any] | None = None, video: Any = None, **options: Any) -> Generation:
        """Answer ``prompt``: a user message, a list of chat messages, or token ids that are used as they are.

        Without ``max_tokens`` an answer may go on to the end of the model's context; ``finish_reason`` tells "length"
        where it got there. ``options`` are those of `request`, sampler settings under the checkpoint's names
        (`GenerationConfig`) among them. Raises DgemmaError on a bad argument.
        """
        options["drafts"] = False  # nobody hears of them
        for event in self.stream(prompt, max_tokens=max_tokens, seed=seed, thinking=thinking, system=system,
                                 tools=tools, images=images, video=video, **options):
            if isinstance(event, Finished):
                return event.generation
        raise RuntimeError("the engine stopped without finishing the request")

    def stream(self, prompt: Prompt, *, max_tokens: int | None = None, seed: int | None = None,
               thinking: bool = False, system: str | None = None, tools: list[dict[str, Any]] | None = None,
               images: Sequence[Any] | None = None, video: Any = None, **options: Any) -> Iterator[Event]:
        """`generate` as it happens: CanvasStarted, Denoised, CanvasCommitted, …, Finished.

        Closing the iterator stops the work before the next denoising step; `cancel` does too, and still yields
        Finished with what was committed.
        """
        return self._run([self.request(prompt, max_tokens=max_tokens, seed=seed, thinking=thinking, system=system,
                                       tools=tools, images=images, video=video, **options)])

    def generate_batch(self, prompts: Sequence[Prompt], *, seeds: Sequence[int] | None = None,
                       max_tokens: int | None = None, thinking: bool = False, **options: Any) -> list[Generation]:
        """Answer many prompts in shared forward passes; answer i depends on prompt i and seed i only."""
        if seeds is not None and len(seeds) != len(prompts):
            raise DgemmaError(f"there are {len(prompts)} prompts but {len(seeds)} seeds")
        requests = []
        options["drafts"] = False  # nobody hears of them
        for index, prompt in enumerate(prompts):
            seed = None if seeds is None else _plain_number(seeds[index])
            request = self.request(prompt, max_tokens=max_tokens, seed=seed, thinking=thinking, **options)
            requests.append(replace(request, id=index))
        finished = {event.request: event.generation for event in self._run(requests) if isinstance(event, Finished)}
        return [finished[index] for index in range(len(requests))]

    def cancel(self) -> None:
        """Stop what runs before its next denoising step; may be called from another thread."""
        for reference in self._engines:
            if (engine := reference()) is not None:
                engine.cancel_all()

    def prompt_ids(self, prompt: Prompt, *, thinking: bool = False, system: str | None = None,
                   tools: list[dict[str, Any]] | None = None, **media: Any) -> list[int]:
        """The token ids that a prompt becomes: through the checkpoint's chat template unless it is ids already.

        ``media``: its pictures and film, as in `request`. Raises DgemmaError.
        """
        return self._prompt(prompt, thinking, system, shown_tools(normalise_tools(tools), ToolChoice()), **media).ids

    def _prompt(self, prompt: Prompt, thinking: bool, system: str | None, tools: list[dict[str, Any]] | None, *,
                images: Sequence[Any] | None = None, video: Any = None, image_tokens: int | None = None,
                fps: float | None = None) -> _PromptIds:
        """A prompt with room for its pictures, which the tower has not seen yet."""
        if images is not None and not isinstance(images, (list, tuple)):
            raise DgemmaError(f"images must be a list of pictures, not {type(images).__name__}")
        media = list(images or ()), [] if video is None else [video]
        ids = _ids_of(prompt) if _is_ids(prompt) else None
        if ids is not None:
            messages = put_first([{"role": "user", "content": ""}], *media)
        elif isinstance(prompt, (str, list, tuple)):
            conversation: Any = prompt if isinstance(prompt, str) else list(prompt)
            messages = put_first(normalise_messages(conversation, system=system), *media)
        else:
            raise DgemmaError(f"a prompt is text, a list of messages or a list of token ids, not "
                              f"{type(prompt).__name__}")
        parts = parts_in(messages)
        if parts and self.pictures is None:
            raise DgemmaError("this model sees no pictures: it has no vision tower")
        if ids is None:
            ids = self.tokenizer.apply_chat_template(messages, thinking=thinking, tools=tools)
        if not parts or self.pictures is None:
            return _PromptIds(ids)
        config = self.pictures.config
        shown = [show(part, config, _plain_number(image_tokens), _plain_number(fps), words, f"{part['type']} {number}")
                 for number, (part, words) in enumerate(parts, 1)]
        ids, starts = place_media(ids, shown, config, self.tokenizer.encode)
        return _PromptIds(ids, [picture for part in shown for picture in part.pictures], starts)

    def request(self, prompt: Prompt, *, max_tokens: int | None = None, seed: int | None = None,
                thinking: bool = False, system: str | None = None, tools: list[dict[str, Any]] | None = None,
                images: Sequence[Any] | None = None, video: Any = None, image_tokens: int | None = None,
                fps: float | None = None, canvas: str | Sequence[Any] | None = None,
                pinned: Sequence[bool] | None = None, prefix: str | Sequence[int] | None = None, from_step: int = 0,
                candidates: int = 0, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
                logit_bias: Mapping[int, float] | None = None, logprobs: int | None = None,
                response_format: Mapping[str, Any] | None = None, tool_choice: Any = None,
                parallel_tool_calls: bool = True, reasoning_budget: int | None = None, redraw_empty: bool = True,
                stop: str | Sequence[str] = (), drafts: bool = True, client: str = "", **settings: Any) -> Request:
        """What `generate` asks of the engine, checked.

        ``max_tokens`` None: to the end of the context, whatever the checkpoint's own default
        (``generation_config.max_tokens``) is. ``seed`` fixes all randomness (drawn and reported when None).
        ``temperature``, ``top_k``, ``top_p`` and ``logit_bias`` narrow the draw (`SamplingParams`). ``logprobs`` asks
        for every answer token's log-probability beside that many alternatives. ``response_format`` is a form that the
        answer will have: {"type": "json_object"}, {"type": "json_schema", "json_schema": {"schema": …}},
        {"type": "regex", "regex": …} or {"type": "choice", "choice": […]}. ``stop``: the answer ends before any of
        these strings. ``settings`` are sampler settings under the checkpoint's names (`GenerationConfig`). Raises
        DgemmaError on a bad argument.

        ``tool_choice`` is "auto", "none" (the model is not told of the tools), "required", a tool by name ({"name": …})
        or some of them ({"type": "allowed_tools", "mode": "auto" or "required", "tools": […]}). What must be called is
        called once, or, without a name and with ``parallel_tool_calls``, as often as the model likes; its arguments
        satisfy the tool's schema. So do those of tools declared ``strict``, whenever they are called. Beside a
        ``response_format`` the answer is calls, or that.

        ``images`` (paths, bytes of files or PIL.Images) and a ``video`` (a path or bytes) stand before the words of the
        last user message, or for the image and video tokens of a prompt of ids; parts of messages may be pictures, too:
        {"type": "image", "image": …}. Each picture has at most ``image_tokens`` soft tokens, 70, 140, 280, 560 or 1120
        (None: as what is asked needs). A film is ``fps`` frames a second, at most 60 (None: one a second, or 60 over
        all of it); its sound is not heard.

        ``canvas`` is what denoising starts from, as parts in their order: text that stays, {"text": …, "pinned": False}
        for text that may change, {"blank": n} for n tokens to be filled in, and {"end": True} where the answer ends
        (`dgemma.chat.infill.read_canvas`); or as token ids (None: noise), of which ``pinned`` marks those that stay.
        What is behind them is open. It is the answer's first canvas; ``prefix``, text or token ids, is what the answer
        has said before it, and is not told again. ``from_step``: the canvas has so many steps behind it, as
        `Denoised.canvas_ids` has, so that ``max_denoising_steps`` less these are left. ``candidates``: `Denoised`
        events tell so many of the most probable tokens at every place, which takes another walk over the vocabulary
        at every step.

        ``reasoning_budget``: the most tokens that thoughts have together, their marks included; then the thought is
        closed, and the answer follows. 0: no thinking. Thoughts always leave a canvas for the answer (half of
        ``max_tokens`` where that is less than two). ``redraw_empty``: an answer that comes out empty at its first
        canvas is drawn once more, narrower and from other noise.
        """
        given = (seed, max_tokens, temperature, top_k, top_p, logprobs, reasoning_budget)
        seed, max_tokens, temperature, top_k, top_p, logprobs, reasoning_budget = map(_plain_number, given)
        settings = {name: _plain_number(value) for name, value in settings.items()}
        bias = [(_plain_number(token), _plain_number(value)) for token, value in (logit_bias or {}).items()]
        if isinstance(stop, str):
            stop = (stop,)
        elif not (isinstance(stop, Sequence) and all(isinstance(text, str) for text in stop)):
            raise DgemmaError(f"stop must be a string or a list of strings, got {stop!r}")
        if seed is not None and not (is_whole(seed) and 0 <= seed < 2**63):
            raise DgemmaError(f"seed must be an integer from 0 to 2^63 - 1, got {seed!r}")
        if reasoning_budget is not None and (type(reasoning_budget) is not int or reasoning_budget < 0):
            raise DgemmaError(f"reasoning_budget must be a whole number of at least 0, got {reasoning_budget!r}")
        thinking = thinking and reasoning_budget != 0
        choice, declared = read_tool_choice(tool_choice), normalise_tools(tools)
        given_prompt = self._prompt(prompt, thinking, system, shown_tools(declared, choice), images=images, video=video,
                                    image_tokens=image_tokens, fps=fps)
        prefix_ids = self._prefix_ids(prefix)
        prompt_ids = given_prompt.ids + prefix_ids
        constraint = None
        try:
            # A default of the checkpoint's, 256 in Google's, would cut every longer answer.
            room = max(self.config.max_position_embeddings - len(prompt_ids), 1)
            merged = self.generation_config.replace(max_tokens=room if max_tokens is None else max_tokens, **settings)
        except ValueError as error:
            raise DgemmaError(str(error)) from error
        start = self._start(canvas, pinned, merged)
        formed = response_format is not None and response_format != {"type": "text"}
        calls = calls_of(declared, choice, parallel_tool_calls, formed)
        thought_open = inside_thought(self.tokenizer, prompt_ids)
        if (formed or calls is not None) and prefix_ids:
            raise DgemmaError(f"prefix must not be given with {'response_format' if formed else 'tool_choice'}: a form "
                              "is that of the whole answer")
        if formed or calls is not None:
            if self.tokenizer.vocab_size > self.config.vocab_size:
                raise DgemmaError(f"{'response_format' if formed else 'tool_choice'} cannot be kept: the tokenizer has "
                                  f"{self.tokenizer.vocab_size} tokens, the network {self.config.vocab_size}")
            from dgemma.constrain import constraint_of

            constraint = constraint_of(response_format, self.tokenizer, merged.eos_token_id, thinking=thinking,
                                       inside_thought=thought_open, calls=calls)
        try:
            request = Request(
                0, prompt_ids, merged,
                secrets.randbits(32) if seed is None else seed, start and start.token_ids, start and start.pinned,
                SamplingParams(temperature, top_k, top_p, tuple(bias)), logprobs, constraint, tuple(stop), drafts,
                client,
                tools=None if tools is None and _is_ids(prompt) else tuple(usable_tools(declared, choice) or ()),
                held=calls is not None,
                thoughts=self._thoughts(thought_open, reasoning_budget), redraw_empty=redraw_empty,
                from_step=_plain_number(from_step), candidates=_plain_number(candidates))
            request.check(self.config)
        except ContextLengthError:
            raise
        except (TypeError, ValueError) as error:
            raise DgemmaError(str(error)) from error
        if self.pictures is not None and given_prompt.pictures:  # now that it is known that they can be read
            request = replace(request, spans=self.pictures.spans(given_prompt.pictures, given_prompt.starts))
        return request

    def _prefix_ids(self, prefix: str | Sequence[int] | None) -> list[int]:
        """What was said before the canvas, as token ids. Raises DgemmaError."""
        if prefix is None or isinstance(prefix, str):
            return self.tokenizer.encode(prefix or "", specials=False)
        vocabulary = self.config.vocab_size
        ids = _plain_numbers(prefix, "prefix must be text or token ids")
        for wrong in (item for item in ids if not (is_whole(item) and 0 <= item < vocabulary)):
            raise DgemmaError(f"prefix must be text or token ids below {vocabulary}, got {wrong!r}")
        return ids

    def _start(self, canvas: Any, pinned: Sequence[bool] | None, settings: GenerationConfig) -> StartCanvas | None:
        """The canvas that an answer starts from, None for noise. Raises DgemmaError."""
        if canvas is None:
            if pinned is not None:
                raise DgemmaError("pinned needs canvas: the tokens that are to stay")
            return None
        if is_parts(canvas):
            if pinned is not None:
                raise DgemmaError('pinned is for a canvas of token ids: say {"text": …, "pinned": …} in the parts')
            return read_canvas(canvas, self.tokenizer, self.config.canvas_length, settings.eos_token_id)
        ids = _plain_numbers(canvas, "canvas must be parts or token ids")
        return StartCanvas(ids, [False] * len(ids) if pinned is None else [bool(pin) for pin in pinned])

    def _thoughts(self, inside: bool, budget: int | None) -> Thoughts | None:
        """How this model's thoughts are told from what it says; None where it has no marks for them."""
        opened, closed = self.tokenizer.token_to_id(OPEN), self.tokenizer.token_to_id(CLOSE)
        return None if opened is None or closed is None else Thoughts(opened, closed, inside, budget)

    def _run(self, requests: list[Request]) -> Iterator[Event]:
        # An engine of its own for every call: a caller who stops listening leaves nothing behind in another's batch.
        # It is known before the first event is asked for, so that a cancel can never come too early.
        # What prefixes take is measured as used, or is theirs to take yet.
        memory = self.request_memory() + self.prefixes.spare
        memory = max(memory - self.prefixes.budget, memory // 2)
        engine = Engine(self.network, self.reader, prefixes=self.prefixes, memory=memory)
        with self._adding:
            self._engines = [*(known for known in self._engines if known() is not None), weakref.ref(engine)]
        return engine.run(requests)

    def reader(self, request: Request) -> ReplyReader:
        """What reads a request's answer: its text, reasoning and tool calls, and where a stop string ends it."""
        return ReplyReader(self.tokenizer, request.prompt_ids, **request.reading)


@dataclass(frozen=True)
class _PromptIds:
    """A prompt's token ids, its pictures, and where their soft tokens start."""

    ids: list[int]
    pictures: list[Picture] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)


def _ids_of(prompt: Any) -> list[int]:
    """A prompt of token ids as a list. Raises DgemmaError for what are none."""
    if isinstance(prompt, (torch.Tensor, np.ndarray)):
        if prompt.ndim != 1 or "int" not in str(prompt.dtype):
            raise DgemmaError(f"a prompt of token ids is one-dimensional integers, got {tuple(prompt.shape)} of "
                              f"{prompt.dtype}")
        return prompt.tolist()
    numbers = [_plain_number(item) for item in prompt]
    if not all(map(is_whole, numbers)):
        raise DgemmaError("a prompt of token ids holds whole numbers only")
    return numbers


def _is_ids(prompt: Any) -> bool:
    """Whether a prompt is token ids, or was meant to be."""
    if isinstance(prompt, (torch.Tensor, np.ndarray)):
        return True
    return isinstance(prompt, (list, tuple, range)) and len(prompt) > 0 and isinstance(
        prompt[0], (int, float, np.generic, np.ndarray, torch.Tensor))


def _plain_number(value: Any) -> Any:
    """A number of numpy's or torch's as Python's own; anything else as it is."""
    if isinstance(value, np.generic) or (isinstance(value, (torch.Tensor, np.ndarray)) and value.ndim == 0):
        return value.item()
    return value


def _plain_numbers(values: Any, rule: str) -> list[Any]:
    """A list, array or tensor as a list of Python's own numbers; raises DgemmaError with the rule for anything else."""
    try:
        return [_plain_number(item) for item in values]
    except TypeError as error:
        raise DgemmaError(f"{rule}, got {values!r}") from error


def parse_device(name: str | torch.device | None) -> torch.device:
    """The device of that name, the GPU if there is one for None; raises DgemmaError when it cannot be used."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise DgemmaError(f"device {str(name)!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def load(name: str | Path, *, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None,
         cache_type: str | None = None, adapter: str | Path | None = None, mmproj: str | Path | None = None,
         vision: str | Path | None = None,
         progress: Callable[[int, int], None] | None = None, downloads: Downloads | None = None) -> Model:
    """Load a model: a bundled name ("sudoku"), a checkpoint folder, a GGUF file, or a hub id.

    ``device`` defaults to the GPU if there is one, ``dtype`` ("float32", "bfloat16", "float16") to the checkpoint's
    own; it is not for a quantised GGUF on the CPU, whose weights stay packed. ``cache_type`` is what keys and values
    are kept in ("f32", "f16", "bf16", "q8_0"; None: what they are computed in, "bf16" for packed weights).
    ``adapter`` is one for this model in PEFT's format: its folder, or the .safetensors file in it.

    What sees pictures is the checkpoint's own vision tower, or for a GGUF file what lies beside it: of several
    ``mmproj*.gguf`` that fit, the one named after the model (mmproj-NAME.gguf for NAME.gguf), else BF16 before F16,
    F32 and Q8_0. ``mmproj`` is another such file, ``vision`` a checkpoint folder or hub repository of which the tower
    is taken and nothing else. It is read when the first picture comes, with ``vision`` at once.

    ``progress(done_bytes, total_bytes)`` is called while weights are read; ``downloads()`` makes who is told of what
    is fetched from the hub (None: lines on stderr). Raises CheckpointError, naming file
    and cause, when it cannot be used.
    """
    from dgemma.weights.load import load_network

    try:
        check_cache_type(cache_type)
    except ValueError as error:
        raise DgemmaError(str(error)) from error
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype is not None and dtype not in dtypes and dtype not in dtypes.values():
        raise DgemmaError(f"dtype must be one of {', '.join(dtypes)}, got {dtype!r}")
    dtype = dtypes[dtype] if isinstance(dtype, str) else dtype
    target = parse_device(device)
    parts = read_parts(name, downloads)
    assert parts.source is not None
    config, tower = seeing(parts, mmproj, vision, downloads)
    if parts.gguf is not None:
        from dgemma.weights.gguf_model import load_gguf_network

        network = load_gguf_network(replace(parts.gguf, config=config), device=target, dtype=dtype, progress=progress,
                                    cache_type=cache_type)
    else:
        network = load_network(parts.source, config, device=target, dtype=dtype, progress=progress,
                               cache_type=cache_type)
    pictures = None
    if tower is not None and config.vision is not None:
        # With ``vision`` it is asked for, so it is there before the first picture.
        asked = None if vision is None else tower.load(target, dtype)
        as_stored = target.type == "cpu" and dtype is None
        pictures = PictureEncoder(network, config.vision,
                                  lambda: tower.load(target, dtype) if asked is None else asked,
                                  vision=asked, nbytes=tower.nbytes if as_stored else None)
    if adapter is not None:
        from dgemma.weights.adapters import adapts_tower, load_adapter

        if pictures is not None and adapts_tower(adapter):
            network.attach_vision(pictures.load())
            pictures = PictureEncoder.of(network)
        load_adapter(network, adapter)
    return Model(network, parts.tokenizer, parts.generation_config, str(name), pictures)


def seeing(parts: Parts, mmproj: str | Path | None = None, vision: str | Path | None = None,
           downloads: Downloads | None = None) -> tuple[ModelConfig, Tower | None]:
    """The model's config with that of the vision tower it sees with, and the tower; as they are without one."""
    from dgemma.weights.towers import find_tower

    assert parts.source is not None
    tower = find_tower(parts.source, parts.config, mmproj, vision, downloads)
    if tower is None:
        return parts.config, None
    own = parts.config.vision
    known = with_picture_tokens(tower.config, parts.tokenizer.token_to_id) if own is None else replace(
        tower.config, **{name: getattr(own, name) for name in PICTURE_TOKENS})
    if known is not None:
        return replace(parts.config, vision=known), tower
    why = f"{tower.path}: this vision tower cannot be used: the model's tokenizer has no tokens for pictures"
    if mmproj is not None or vision is not None:
        raise CheckpointError(why)
    warnings.warn(why, stacklevel=3)
    return parts.config, None


@dataclass(frozen=True)
class Parts:
    """What is known of a model without its weights.

    ``source`` is its checkpoint (None: it has yet to be made), ``gguf`` what was read of it where that is a GGUF file.
    """

    tokenizer: Tokenizer
    config: ModelConfig
    generation_config: GenerationConfig
    source: Path | None
    gguf: GGUFModel | None = None


def read_parts(name: str | Path, downloads: Downloads | None = None) -> Parts:
    """The parts of a bundled name, a checkpoint folder, a GGUF file or a hub id; raises CheckpointError.

    ``downloads`` as in `load`.
    """
    from dgemma.weights.hub.locate import locate

    source = locate(name, downloads)
    if source.is_file():
        from dgemma.chat.gguf_tokenizer import tokenizer_from_gguf
        from dgemma.weights.gguf_model import open_gguf

        gguf = open_gguf(source)
        return Parts(tokenizer_from_gguf(gguf.file.metadata, str(source)), gguf.config, gguf.generation, source, gguf)
    config = load_model_config(source)
    return Parts(Tokenizer.from_folder(source), config, load_generation_config(source, config), source)
