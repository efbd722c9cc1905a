"""Training rows to conversations: from JSONL, JSON, Parquet, folders of them, saved datasets and the hub.

Works on: files and plain dictionaries. Knows nothing of: tokens, templates, canvases. JSONL and JSON need no library;
Parquet and the hub need `datasets`.

A row has one of four forms, told apart by its columns: chat messages, a prompt and its response, ShareGPT's list of
turns, or pictures with what was said of them. All of them become messages as a user would send them to the model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgemma.chat.messages import normalise_messages, normalise_tools
from dgemma.errors import DgemmaError
from dgemma.train.data.columns import has_media, of_image_folder, with_media

PROMPTS = ("prompt", "instruction", "question")
RESPONSES = ("response", "output", "answer", "completion")
INPUTS = ("input", "context")
CAPTIONS = ("text", "caption")  # what is to be said of pictures that nothing is asked about
SYSTEMS = ("system", "system_prompt")
THOUGHTS = ("reasoning", "reasoning_content", "thinking")
_SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
             "function_call": "assistant", "system": "system", "tool": "tool", "observation": "tool"}
_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")

Row = tuple[str, Any]  # where it stands, and what stands there; an exception when it cannot be read


@dataclass(frozen=True)
class Conversation:
    """What was said, thoughts included. ``trained`` are the indices of the assistant's messages that are learnt from;
    ``where`` names the row."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    trained: tuple[int, ...]
    where: str


@dataclass(frozen=True)
class Conversations:
    """All that could be read, in order, and a line for every row that was left out."""

    rows: list[Conversation]
    bad: list[str]


def read_conversations(sources: str | Path | Sequence[str | Path], split: str = "train", skip_bad: bool = False,
                       image_tokens: int | None = None) -> Conversations:
    """Read conversations from files, folders and names on the hub (``org/name`` or ``org/name:config``).

    ``split`` is for datasets. A bad row raises `DgemmaError` naming file, row and what is wrong with it; with
    ``skip_bad`` it is counted instead. ``image_tokens`` are the most soft tokens of a picture that has no "tokens" of
    its own (None: as its words need).
    """
    rows: list[Conversation] = []
    bad: list[str] = []
    for source in [sources] if isinstance(sources, (str, Path)) else sources:
        for where, row, folder in _rows(source, split):
            try:
                if isinstance(row, Exception):
                    raise DgemmaError(f"{where}: {row}") from row
                rows.append(conversation_of(row, where, folder, image_tokens))
            except DgemmaError as error:
                if not skip_bad:
                    raise
                bad.append(str(error))
    if not rows:
        first = f"; the first: {bad[0]}" if bad else ""
        raise DgemmaError(f"{_listed(sources)}: no conversation to train on ({len(bad)} bad rows{first})")
    return Conversations(rows, bad)


def conversation_of(row: Any, where: str = "row", folder: Path | None = None,
                    image_tokens: int | None = None) -> Conversation:
    """The conversation in one row, pictures' paths being relative to ``folder`` (None: the working directory).

    Raises `DgemmaError`, beginning with ``where``, when it cannot be trained on.
    """
    try:
        if not isinstance(row, Mapping):
            raise DgemmaError(f"a row is an object with named columns, not {type(row).__name__}")
        messages = with_media(_messages(row), row, folder, image_tokens)
        tools = normalise_tools(_from_json(row.get("tools"), "tools"))
        kept = [{key: value for key, value in message.items() if key not in ("weight", "train")}
                for message in messages]
        return Conversation(kept, tools, _check(messages), where)
    except DgemmaError as error:
        raise DgemmaError(f"{where}: {error}") from error


# ---- forms -----------------------------------------------------------------------------------------


def _messages(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    turns = row.get("conversations")
    spoken = isinstance(turns, list) and turns and isinstance(turns[0], Mapping) and "role" in turns[0]
    if row.get("messages") is not None or spoken:
        return _mappings(turns if row.get("messages") is None else row["messages"], "messages")
    if turns is not None:
        return _sharegpt_messages(row)
    if any(row.get(name) is not None for name in PROMPTS) and any(row.get(name) is not None for name in RESPONSES):
        return _prompt_messages(row)
    if has_media(row) and (row.get("texts") is not None or any(row.get(name) is not None for name in CAPTIONS)):
        return _picture_messages(row)
    raise DgemmaError(f"columns {', '.join(map(str, row))} are no known form: give messages; or one of "
                      f"{', '.join(PROMPTS)} with one of {', '.join(RESPONSES)}; or conversations; or pictures with "
                      f"texts or one of {', '.join(CAPTIONS)}")


def _prompt_messages(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    prompt, response = _column(row, PROMPTS, "the prompt"), _column(row, RESPONSES, "the response")
    if isinstance(prompt, list) and isinstance(response, list):  # both are messages: what the prompt says is given
        given = [dict(message, weight=0) if message.get("role") in ("assistant", "model") else message
                 for message in _mappings(prompt, "the prompt")]
        return given + _mappings(response, "the response")
    if not isinstance(prompt, str) or not isinstance(response, str):
        raise DgemmaError("the prompt and the response must be text, or both lists of messages")
    more = _column(row, INPUTS, "the input", needed=False)
    system = _column(row, SYSTEMS, "the system message", needed=False)
    thought = _column(row, THOUGHTS, "the thought", needed=False)
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": f"{prompt}\n\n{more}" if more else prompt})
    messages.append({"role": "assistant", "content": response, **({"reasoning": thought} if thought else {})})
    return messages


def _picture_messages(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Pairs of questions and answers about a row's pictures ("texts", as The Cauldron and FineVision have them), or a
    caption: the answer to the pictures alone."""
    if row.get("texts") is None:
        return [{"role": "user", "content": []},
                {"role": "assistant", "content": _column(row, CAPTIONS, "the caption")}]
    return [{"role": role, "content": turn.get(role)} for turn in _mappings(row["texts"], "texts")
            for role in ("user", "assistant")]


def _sharegpt_messages(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    system = _column(row, SYSTEMS, "the system message", needed=False)
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    called: list[str] = []  # the tools that the last turn called and that have not answered
    for index, turn in enumerate(_mappings(row.get("conversations"), "conversations")):
        speaker, value = turn.get("from"), turn.get("value")
        if speaker not in _SPEAKERS:
            raise DgemmaError(f"turn {index}: unknown `from` {speaker!r}: use one of {', '.join(_SPEAKERS)}")
        message: dict[str, Any] = {"role": _SPEAKERS[speaker], "content": value}
        message |= {key: turn[key] for key in ("weight", "train", "name", *THOUGHTS) if turn.get(key) is not None}
        if speaker == "function_call":
            calls = _from_json(value, f"turn {index}")
            calls = calls if isinstance(calls, list) else [calls]
            message |= {"content": None, "tool_calls": calls}
            called = [str(call["name"]) for call in calls if isinstance(call, Mapping) and "name" in call]
        elif message["role"] == "tool" and "name" not in message:
            if not called:
                raise DgemmaError(f"turn {index}: a tool's answer needs a `name`, or a function_call before it")
            message["name"] = called.pop(0)
        messages.append(message)
    return messages


def _column(row: Mapping[str, Any], names: Sequence[str], what: str, needed: bool = True) -> Any:
    found = [name for name in names if row.get(name) not in (None, "")]
    if len(found) > 1:
        raise DgemmaError(f"both {found[0]!r} and {found[1]!r} could be {what}: keep one")
    if not found and needed:
        raise DgemmaError(f"{what} is missing or empty: it is one of the columns {', '.join(names)}")
    return row[found[0]] if found else None


def _mappings(value: Any, what: str) -> list[dict[str, Any]]:
    value = _from_json(value, what)
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        raise DgemmaError(f"{what} must be a list of objects")
    return [dict(item) for item in value]


def _from_json(value: Any, what: str) -> Any:
    """Datasets often keep lists and objects as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as error:
        raise DgemmaError(f"{what} is text, but no JSON: {error}") from error


def _check(messages: list[dict[str, Any]]) -> tuple[int, ...]:
    """The indices of the messages to learn from; raises when there is nothing to learn or no way to learn it."""
    normal = normalise_messages(messages, strict=True)
    trained = []
    for index, message in enumerate(normal):
        if message["role"] != "assistant":
            continue
        if isinstance(message["content"], list) and any(part["type"] != "text" for part in message["content"]):
            raise DgemmaError(f"message {index}: the assistant cannot show images and videos, only write text")
        if index == 0:
            raise DgemmaError("message 0: the assistant speaks first, and nothing asks it to; drop it or make it a "
                              "system message")
        weight = message.get("weight", message.get("train", 1))
        if weight not in (0, 1):
            raise DgemmaError(f"message {index}: weight must be 0 or 1, got {weight!r}")
        if not weight:
            continue
        alone = normalise_messages(messages[: index + 1])[index]  # with its thought, which a later question drops
        if not (text_of(alone["content"]).strip() or alone.get("tool_calls") or alone.get("reasoning")):
            raise DgemmaError(f"message {index}: the assistant says nothing")
        trained.append(index)
    if not trained:
        raise DgemmaError("no assistant message to learn from")
    return tuple(trained)


def text_of(content: str | Sequence[Mapping[str, Any]]) -> str:
    """What a message's content says, in a string or in parts."""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


# ---- sources ---------------------------------------------------------------------------------------


def _rows(source: str | Path, split: str) -> Iterator[tuple[str, Any, Path | None]]:
    """All rows of a source, each with the folder of the file that it is in."""
    path = Path(source).expanduser()
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            data = _saved_dataset(path, split)
            yield from ((where, row, path) for where, row in _dataset_rows(data, f"{path} ({split})"))
            return
        files = sorted(file for file in path.rglob("*") if file.suffix in _SUFFIXES and file.is_file()
                       and not any(part.startswith(".") for part in file.relative_to(path).parts))
        if not files:
            raise DgemmaError(f"{path}: no {', '.join(_SUFFIXES)} file in this folder")
        for file in files:
            yield from ((where, row, file.parent) for where, row in _file_rows(file))
    elif path.is_file():
        yield from ((where, row, path.parent) for where, row in _file_rows(path))
    elif isinstance(source, str) and path.suffix not in _SUFFIXES and source.count("/") == 1 and source[0] not in "./~":
        yield from ((where, row, None) for where, row in _dataset_rows(_hub_dataset(source, split),
                                                                       f"{source} ({split})"))
    else:
        raise DgemmaError(f"{source}: no such file or folder, and no name on the hub (org/name)")


def _file_rows(path: Path) -> Iterator[Row]:
    for where, row in _rows_in(path):
        described = path.stem == "metadata" and isinstance(row, Mapping)
        yield where, of_image_folder(row) if described else row


def _rows_in(path: Path) -> Iterator[Row]:
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
        return
    if path.suffix not in _SUFFIXES:
        raise DgemmaError(f"{path}: unknown kind of file: use one of {', '.join(_SUFFIXES)}")
    try:
        if path.suffix != ".json":
            with path.open("rb") as lines:
                yield from _json_lines(lines, path)
            return
        data = path.read_bytes()
    except OSError as error:
        raise DgemmaError(f"{path}: cannot be read ({error})") from error
    try:
        rows = json.loads(data)
    except (ValueError, RecursionError) as error:
        lines = [line for line in data.splitlines() if line.strip()]
        if len(lines) < 2 or isinstance(_json_line(lines[0]), Exception):
            raise DgemmaError(f"{path}: not valid JSON: {error}") from error
        yield from _json_lines(data.splitlines(), path)  # JSON lines by another name
        return
    if isinstance(rows, dict) and isinstance(rows.get("data"), list):
        rows = rows["data"]
    for index, row in enumerate(rows if isinstance(rows, list) else [rows]):
        yield f"{path}: row {index + 1}", row


def _json_lines(lines: Iterable[bytes], path: Path) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield f"{path}:{number}", _json_line(line)


def _json_line(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        return ValueError(f"not valid JSON: {error}")


def _parquet_rows(path: Path) -> Iterator[Row]:
    _need_datasets(path)
    import pyarrow
    from pyarrow import parquet

    index = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(1024):
                for row in batch.to_pylist():
                    index += 1
                    yield f"{path}: row {index}", without_nulls(row)
    except (pyarrow.ArrowException, OSError) as error:
        raise DgemmaError(f"{path}: cannot be read as Parquet ({error})") from error


def _saved_dataset(path: Path, split: str) -> Any:
    _need_datasets(path)
    from datasets import DatasetDict, load_from_disk

    data = load_from_disk(str(path))
    if isinstance(data, DatasetDict) and split not in data:
        raise DgemmaError(f"{path}: no split {split!r}; there are {', '.join(map(str, data))}")
    return data[split] if isinstance(data, DatasetDict) else data


def _hub_dataset(name: str, split: str) -> Any:
    _need_datasets(name)
    from datasets import load_dataset

    repo, _, config = name.partition(":")
    try:
        return load_dataset(repo, config or None, split=split)
    except Exception as error:  # the library raises dozens of kinds, of its own and of what it is built on
        raise DgemmaError(f"{name}: no such file or folder here, and the dataset cannot be had from the hub: "
                          f"{type(error).__name__}: {error}") from error


def _dataset_rows(data: Any, name: str) -> Iterator[Row]:
    """Rows as Arrow holds them: pictures as the bytes of their files, which are a part of their pixels."""
    index = 0
    for batch in data.with_format("arrow").iter(1024):
        for row in batch.to_pylist():
            index += 1
            yield f"{name}: row {index}", without_nulls(row)


def without_nulls(value: Any) -> Any:
    """Arrow gives every object the keys of all objects in its column, null where a row had none: take those out."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _need_datasets(source: str | Path) -> None:
    try:
        import datasets  # noqa: F401  (brings pyarrow)
    except ImportError as error:
        raise DgemmaError(f"{source}: only JSONL and JSON can be read without the `datasets` library: "
                          "pip install 'dgemma[train]'") from error


def _listed(sources: str | Path | Sequence[str | Path]) -> str:
    return str(sources) if isinstance(sources, (str, Path)) else ", ".join(map(str, sources))
