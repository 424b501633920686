"""LiteLLM with the openai/ and hosted_vllm/ prefixes. Prints one JSON object of what it saw."""

import json
import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
import litellm

BASE, KEY, MODEL, EMBEDDER = os.environ["BASE_URL"], os.environ["KEY"], os.environ["MODEL"], os.environ["EMBEDDER"]
litellm.telemetry = False
SERVER = {"api_base": f"{BASE}/v1", "api_key": KEY, "num_retries": 0}
ASK = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "enum": ["Paris"]}}, "required": ["city"]},
    },
}


def run() -> dict:
    seen = {}
    for prefix in ("openai", "hosted_vllm"):
        name = f"{prefix}/{MODEL}"
        answer = litellm.completion(model=name, messages=ASK, temperature=0, max_tokens=16, **SERVER)
        seen[f"{prefix} chat"] = answer.choices[0].message.content
        stream = litellm.completion(
            model=name, messages=ASK, temperature=0, max_tokens=16, stream=True, stream_options={"include_usage": True}, **SERVER
        )
        chunks = list(stream)
        seen[f"{prefix} stream"] = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        called = litellm.completion(model=name, messages=ASK, tools=[TOOL], tool_choice="required", temperature=0, max_tokens=64, **SERVER)
        seen[f"{prefix} tool"] = json.loads(called.choices[0].message.tool_calls[0].function.arguments)
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"],
        "additionalProperties": False,
    }
    shaped = litellm.completion(
        model=f"openai/{MODEL}",
        messages=ASK,
        response_format={"type": "json_schema", "json_schema": {"name": "city", "strict": True, "schema": schema}},
        temperature=0,
        max_tokens=100,
        **SERVER,
    )
    seen["json"] = sorted(json.loads(shaped.choices[0].message.content))
    seen["width"] = len(litellm.embedding(model=f"openai/{EMBEDDER}", input=["a cat"], **SERVER).data[0]["embedding"])
    seen["response"] = type(litellm.responses(model=f"openai/{MODEL}", input="Hello", max_output_tokens=16, **SERVER)).__name__
    attempts = {
        "context": lambda: litellm.completion(model=f"openai/{MODEL}", messages=[{"role": "user", "content": "word " * 20_000}], **SERVER),
        "key": lambda: litellm.completion(model=f"openai/{MODEL}", messages=ASK, **{**SERVER, "api_key": "wrong"}),
        "model": lambda: litellm.completion(model="openai/none", messages=ASK, **SERVER),
        "value": lambda: litellm.completion(model=f"openai/{MODEL}", messages=ASK, top_p=7, **SERVER),
    }
    seen["errors"] = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except Exception as error:
            seen["errors"][name] = type(error).__name__
    return seen


print(json.dumps(run()))
