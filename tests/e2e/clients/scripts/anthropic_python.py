"""The official Anthropic SDK for Python. Prints one JSON object of what it saw."""

import json
import os

import anthropic

BASE, KEY, MODEL = os.environ["BASE_URL"], os.environ["KEY"], os.environ["MODEL"]
client = anthropic.Anthropic(base_url=BASE, api_key=KEY, max_retries=0)
ASK = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
# A field of the API that this SDK has no argument for any more.
GREEDY = {"extra_body": {"temperature": 0}}
TOOL = {
    "name": "get_weather",
    "description": "The weather of a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}}, "required": ["city"]},
}


def run() -> dict:
    seen = {}
    answer = client.messages.create(model=MODEL, max_tokens=16, messages=ASK, **GREEDY, system="Be brief.")
    seen["chat"] = answer.content[0].text
    seen["stop"] = answer.stop_reason
    seen["usage"] = [answer.usage.input_tokens > 0, answer.usage.output_tokens > 0]
    with client.messages.stream(model=MODEL, max_tokens=16, messages=ASK, **GREEDY, system="Be brief.") as stream:
        seen["stream"] = "".join(stream.text_stream)
        seen["final"] = stream.get_final_message().content[0].text
    only = {"type": "any", "disable_parallel_tool_use": True}
    with client.messages.stream(model=MODEL, max_tokens=64, messages=ASK, tools=[TOOL], tool_choice=only, **GREEDY) as stream:
        final = stream.get_final_message()
    use = next(block for block in final.content if block.type == "tool_use")
    seen["tool"] = {"name": use.name, "input": use.input, "stop": final.stop_reason}
    follow = client.messages.create(
        model=MODEL,
        max_tokens=16,
        **GREEDY,
        tools=[TOOL],
        messages=[
            *ASK,
            {"role": "assistant", "content": [{"type": "tool_use", "id": use.id, "name": use.name, "input": use.input}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use.id, "content": "Sunny."}]},
        ],
    )
    seen["follow"] = follow.type
    seen["count"] = client.messages.count_tokens(model=MODEL, messages=ASK).input_tokens
    seen["errors"] = {}
    attempts = {
        "model": lambda: client.messages.create(model="none", max_tokens=4, messages=ASK),
        "key": lambda: client.with_options(api_key="wrong").messages.create(model=MODEL, max_tokens=4, messages=ASK),
        "value": lambda: client.messages.create(model=MODEL, max_tokens=0, messages=ASK),
    }
    for name, attempt in attempts.items():
        try:
            attempt()
        except anthropic.APIStatusError as error:
            seen["errors"][name] = [type(error).__name__, error.body["error"]["type"]]
    return seen


print(json.dumps(run()))
