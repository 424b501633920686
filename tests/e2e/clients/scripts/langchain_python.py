"""LangChain's ChatOpenAI and OpenAIEmbeddings. Prints one JSON object of what it saw."""

import json
import os

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel

BASE, KEY, MODEL, EMBEDDER = os.environ["BASE_URL"], os.environ["KEY"], os.environ["MODEL"], os.environ["EMBEDDER"]
SERVER = {"base_url": f"{BASE}/v1", "api_key": KEY}
QUESTION = "What is the capital of France? Answer in one word."


class Person(BaseModel):
    """Somebody."""

    name: str
    age: int


@tool
def add(first: int, second: int) -> int:
    """Adds two numbers."""
    return first + second


def run() -> dict:
    seen = {}
    chat = ChatOpenAI(model=MODEL, temperature=0, max_tokens=16, max_retries=0, **SERVER)
    answer = chat.invoke(QUESTION)
    seen["chat"] = answer.content
    seen["tokens"] = answer.usage_metadata["output_tokens"]
    seen["stream"] = "".join(chunk.content for chunk in chat.stream(QUESTION))
    able = ChatOpenAI(model=MODEL, max_tokens=96, temperature=0, max_retries=0, **SERVER)
    asked = able.bind_tools([add], tool_choice="add").invoke("Add 2 and 3.")
    seen["tool"] = asked.tool_calls[0]["name"]
    seen["arguments"] = sorted(asked.tool_calls[0]["args"])
    result = ToolMessage(content=str(add.invoke(asked.tool_calls[0]["args"])), tool_call_id=asked.tool_calls[0]["id"])
    seen["after"] = type(able.bind_tools([add]).invoke([HumanMessage("Add 2 and 3."), asked, result])).__name__
    streamed = None
    for chunk in able.bind_tools([add], tool_choice="required", parallel_tool_calls=False).stream("Add 2 and 3."):
        streamed = chunk if streamed is None else streamed + chunk
    seen["tool_stream"] = streamed.tool_calls[0]["name"]
    for method in ("json_schema", "function_calling"):
        person = (
            ChatOpenAI(model=MODEL, max_tokens=160, seed=3, **SERVER).with_structured_output(Person, method=method).invoke("Name somebody.")
        )
        seen[method] = type(person).__name__
    seen["responses"] = ChatOpenAI(model=MODEL, max_tokens=16, temperature=0, use_responses_api=True, **SERVER).invoke(QUESTION).text
    near = OpenAIEmbeddings(model=EMBEDDER, check_embedding_ctx_length=False, **SERVER).embed_documents(["a cat", "a dog"])
    seen["width"] = [len(vector) for vector in near]
    try:
        chat.invoke("word " * 20_000)
    except Exception as error:
        seen["context"] = type(error).__name__
    return seen


print(json.dumps(run()))
