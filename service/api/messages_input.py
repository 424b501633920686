"""Anthropic's conversations as chat requests: blocks into messages, its tools and choices into OpenAI's.

Plain data in, plain data out; the chat schema checks what comes of it. Called by `messages`.
"""

from __future__ import annotations

import json
from typing import Any

from service.api.messages_schema import ConversationFields, DocumentBlock, MessageParam, MessagesRequest, TextBlock, ToolResultBlock
from service.errors import RequestError

_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


# What has no meaning here: the field, and what is said about it.
Ignored = list[tuple[str, str]]


def chat_request(wanted: ConversationFields) -> tuple[dict[str, Any], Ignored]:
    """The body of the chat request that means the same, and what is ignored. Raises: RequestError."""
    messages, ignored = _messages(wanted)
    body: dict[str, Any] = {"model": wanted.model, "messages": messages, **_tools(wanted), **_thinking(wanted, ignored)}
    if messages[-1]["role"] == "assistant":
        _check_open(messages[-1])
        body["continue_final_message"] = True
        body["add_generation_prompt"] = False
    if wanted.output_config is not None and wanted.output_config.format is not None:
        schema = {"name": "answer", "schema": wanted.output_config.format.schema_, "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    if isinstance(wanted, MessagesRequest):
        body |= _sampling(wanted)
    return body, ignored


def _sampling(wanted: MessagesRequest) -> dict[str, Any]:
    given = {"temperature": wanted.temperature, "top_p": wanted.top_p, "top_k": wanted.top_k, "stop": wanted.stop_sequences or None}
    user = wanted.metadata.user_id if wanted.metadata is not None else None
    body = {"max_tokens": wanted.max_tokens, "stream": wanted.stream, "user": user, **given}
    return {key: value for key, value in body.items() if value is not None}


def _tools(wanted: ConversationFields) -> dict[str, Any]:
    body: dict[str, Any] = {}
    if wanted.tools:
        body["tools"] = [
            {
                "type": "function",
                "function": {
                    "name": tool.name,
                    **({"description": tool.description} if tool.description is not None else {}),
                    "parameters": tool.input_schema,
                    "strict": tool.strict,
                },
            }
            for tool in wanted.tools
        ]
    if (choice := wanted.tool_choice) is not None:
        body["tool_choice"] = {"type": "function", "function": {"name": choice.name}} if choice.type == "tool" else _CHOICES[choice.type]
        body["parallel_tool_calls"] = not choice.disable_parallel_tool_use
    return body


def _thinking(wanted: ConversationFields, ignored: Ignored) -> dict[str, Any]:
    """Mutates: ignored."""
    effort = wanted.output_config.effort if wanted.output_config is not None else None
    if (thinking := wanted.thinking) is None:
        return {} if effort is None else {"reasoning_effort": effort}
    if thinking.type == "disabled":
        return {"reasoning_effort": "none"}
    if thinking.budget_tokens is not None:
        param = "thinking.budget_tokens"
        ignored.append((param, f"{param} is not enforced: max_tokens is the only limit"))
    return {"chat_template_kwargs": {"enable_thinking": True}} if effort is None else {"reasoning_effort": effort}


def _messages(wanted: ConversationFields) -> tuple[list[dict[str, Any]], Ignored]:
    messages: list[dict[str, Any]] = []
    ignored: Ignored = []
    system = [wanted.system] if isinstance(wanted.system, str) else [block.text for block in wanted.system]
    if any(system):
        messages.append({"role": "system", "content": _parts(system)})
    called: set[str] = set()
    for index, message in enumerate(wanted.messages):
        param = f"messages[{index}]"
        if message.role == "assistant":
            _append(messages, _assistant(message, called, param, ignored))
        else:
            _append_turn(messages, message, called, param)
    return messages, ignored


def _parts(texts: list[str]) -> str | list[dict[str, str]]:
    return texts[0] if len(texts) == 1 else [{"type": "text", "text": text} for text in texts]


def _assistant(message: MessageParam, called: set[str], param: str, ignored: Ignored) -> dict[str, Any]:
    """One turn of the model's own. Mutates: called, with the ids of its calls; ignored."""
    texts, thoughts, calls = [], [], []
    for index, block in enumerate(message.blocks):
        if block.type == "text":
            texts.append(block.text)
        elif block.type == "thinking":
            thoughts.append(block.thinking)
        elif block.type == "redacted_thinking":
            where = f"{param}.content[{index}]"
            ignored.append((where, f"{where} was ignored: redacted thinking can't be read here"))
        else:
            called.add(block.id)
            arguments = json.dumps(block.input, ensure_ascii=False)
            calls.append({"id": block.id, "type": "function", "function": {"name": block.name, "arguments": arguments}})
    turn: dict[str, Any] = {"role": "assistant"}
    if texts or not calls:
        turn["content"] = _parts(texts or [""])
    if thoughts:
        turn["reasoning_content"] = "\n".join(thoughts)
    return {**turn, "tool_calls": calls} if calls else turn


def _append_turn(messages: list[dict[str, Any]], message: MessageParam, called: set[str], param: str) -> None:
    """A user's or system's turn: results of tools become messages of their own, in the order of the blocks. Mutates: messages."""
    for index, block in enumerate(message.blocks):
        if isinstance(block, ToolResultBlock):
            if block.tool_use_id not in called:
                where = f"{param}.content[{index}].tool_use_id"
                raise RequestError(f"{where}: no tool_use block before it has the id {block.tool_use_id}", param=where)
            _append(messages, {"role": "tool", "tool_call_id": block.tool_use_id, "content": _result(block)})
        else:
            _append(messages, {"role": message.role, "content": _text(block)})


def _result(block: ToolResultBlock) -> str:
    text = block.content if isinstance(block.content, str) else "\n".join(map(_text, block.content))
    return text or ("The tool failed." if block.is_error else "")


def _text(block: TextBlock | DocumentBlock) -> str:
    if isinstance(block, TextBlock):
        return block.text
    return "\n".join(each for each in (block.title, block.context, block.source.data) if each)


def _append(messages: list[dict[str, Any]], message: dict[str, Any]) -> None:
    """Turns of one role in a row are one turn: that is Anthropic's rule, and many templates refuse them. Mutates: messages."""
    last = messages[-1] if messages else {}
    if message["role"] == "tool" or last.get("role") != message["role"] or (last.get("tool_calls") and message["role"] == "assistant"):
        messages.append(message)
        return
    if "content" in message:
        # In place: a new list for every block would make many blocks cost the square of their number.
        last["content"] = content if isinstance(content := last.get("content"), list) else _listed(content)
        last["content"].extend(_listed(message["content"]))
    if "reasoning_content" in message:
        last["reasoning_content"] = "\n".join(filter(None, (last.get("reasoning_content"), message["reasoning_content"])))
    if "tool_calls" in message:
        last["tool_calls"] = message["tool_calls"]


def _listed(content: str | list[dict[str, str]] | None) -> list[dict[str, str]]:
    if content is None:
        return []
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def _check_open(last: dict[str, Any]) -> None:
    """An assistant's turn at the end is a beginning that the answer goes on with. Raises: RequestError when it can't be one."""
    if last.get("tool_calls"):
        raise RequestError("the last message calls tools: a user message with their tool_result blocks must follow", param="messages")
