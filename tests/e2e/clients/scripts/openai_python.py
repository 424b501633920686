"""The official openai SDK for Python. Prints one JSON object of what it saw."""

import asyncio
import base64
import json
import os
import time

import openai
from pydantic import BaseModel

BASE, KEY, MODEL, EMBEDDER = os.environ["BASE_URL"], os.environ["KEY"], os.environ["MODEL"], os.environ["EMBEDDER"]
client = openai.OpenAI(base_url=f"{BASE}/v1", api_key=KEY, max_retries=0, _strict_response_validation=True)
# The client asks for base64 unasked, and its own type of the answer, which is checked before that is decoded, has only lists.
lenient = openai.OpenAI(base_url=f"{BASE}/v1", api_key=KEY, max_retries=0)
ASK = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 7}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}


class Person(BaseModel):
    name: str
    age: int
    is_member: bool


def run() -> dict:
    seen = {}
    seen["models"] = [model.id for model in client.models.list()]
    answer = client.chat.completions.create(model=MODEL, messages=ASK, temperature=0, max_tokens=16)
    seen["chat"] = answer.choices[0].message.content
    stream = client.chat.completions.create(model=MODEL, messages=ASK, temperature=0, max_tokens=16, stream=True)
    seen["stream"] = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    forced = client.chat.completions.create(
        model=MODEL,
        messages=ASK,
        tools=[TOOL],
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        temperature=0,
        max_tokens=64,
    )
    call = forced.choices[0].message.tool_calls[0]
    seen["tool"] = {"name": call.function.name, "arguments": json.loads(call.function.arguments)}
    with client.chat.completions.stream(
        model=MODEL, messages=ASK, tools=[TOOL], tool_choice="required", parallel_tool_calls=False, temperature=0, max_tokens=64
    ) as events:
        for _ in events:
            pass
        final = events.get_final_completion().choices[0]
    seen["tool_stream"] = {
        "calls": len(final.message.tool_calls),
        "name": final.message.tool_calls[0].function.name,
        "parsed": final.message.tool_calls[0].function.parsed_arguments,
        "finish": final.finish_reason,
    }
    parsed = client.chat.completions.parse(model=MODEL, messages=ASK, response_format=Person, max_tokens=200, seed=1)
    seen["parsed"] = parsed.choices[0].message.parsed.model_dump()
    vectors = client.embeddings.create(model=EMBEDDER, input=["a cat", "a kitten", "a train"], encoding_format="float")
    cat, kitten, train = (item.embedding for item in vectors.data)
    seen["nearer"] = sum(a * b for a, b in zip(cat, kitten, strict=True)) > sum(a * b for a, b in zip(cat, train, strict=True))
    seen["same"] = lenient.embeddings.create(model=EMBEDDER, input="a cat").data[0].embedding == cat
    raw = lenient.embeddings.create(model=EMBEDDER, input="a cat", encoding_format="base64").data[0].embedding
    seen["width"] = len(base64.b64decode(raw)) // 4
    with client.responses.stream(model=MODEL, input="What is the capital of France?", max_output_tokens=32, temperature=0) as events:
        kinds = [event.type for event in events]
        seen["response"] = events.get_final_response().output_text
    seen["kinds"] = [kinds[0], kinds[-1]]
    first = client.responses.create(model=MODEL, input="My name is Ada.", max_output_tokens=16, temperature=0)
    second = client.responses.create(
        model=MODEL, input="What is my name?", previous_response_id=first.id, max_output_tokens=16, temperature=0
    )
    seen["chain"] = [second.previous_response_id == first.id, second.usage.input_tokens > first.usage.input_tokens]
    seen["stored"] = client.responses.retrieve(second.id).output_text == second.output_text
    shaped = client.responses.parse(model=MODEL, input="Describe somebody.", text_format=Person, max_output_tokens=200, temperature=0)
    seen["response_parsed"] = type(shaped.output_parsed).__name__
    seen["completion"] = (
        client.completions.create(model=MODEL, prompt="The capital of France is", max_tokens=8, temperature=0).choices[0].text
    )
    seen["batch"] = batch()
    seen["asynchronous"] = asyncio.run(alone())
    seen["errors"] = errors()
    return seen


def batch() -> dict:
    """Two questions as a file; the answers' contents by their own ids."""
    lines = [
        {
            "custom_id": name,
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": MODEL, "messages": ASK, "max_tokens": 16, **more},
        }
        for name, more in (("good", {"temperature": 0}), ("bad", {"temperature": 9}))
    ]
    source = client.files.create(file=("in.jsonl", "\n".join(map(json.dumps, lines)).encode()), purpose="batch")
    work = client.batches.create(input_file_id=source.id, endpoint="/v1/chat/completions", completion_window="24h")
    for _ in range(240):
        if work.status in ("completed", "failed", "expired", "cancelled"):
            break
        time.sleep(0.25)
        work = client.batches.retrieve(work.id)
    good, bad = (json.loads(client.files.content(file).text) for file in (work.output_file_id, work.error_file_id))
    return {
        "status": work.status,
        "counts": [work.request_counts.completed, work.request_counts.failed],
        good["custom_id"]: good["response"]["body"]["choices"][0]["message"]["content"],
        bad["custom_id"]: [bad["response"]["status_code"], bad["response"]["body"]["error"]["param"]],
        "deleted": client.files.delete(work.output_file_id).deleted,
    }


async def alone() -> str:
    async with openai.AsyncOpenAI(base_url=f"{BASE}/v1", api_key=KEY, max_retries=0) as other:
        answer = await other.chat.completions.create(model=MODEL, messages=ASK, temperature=0, max_tokens=16)
        return answer.choices[0].message.content


def errors() -> dict:
    attempts = {
        "model": lambda: client.chat.completions.create(model="none", messages=ASK),
        "key": lambda: client.with_options(api_key="wrong").models.list(),
        "value": lambda: client.chat.completions.create(model=MODEL, messages=ASK, temperature=9),
        "context": lambda: client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "word " * 20_000}]),
    }
    found = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except openai.APIStatusError as error:
            found[name] = [type(error).__name__, error.code, error.param]
    return found


print(json.dumps(run()))
