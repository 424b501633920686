"""LlamaIndex's OpenAILike and OpenAILikeEmbedding. Prints one JSON object of what it saw."""

import json
import os

from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel

BASE, KEY, MODEL, EMBEDDER = os.environ["BASE_URL"], os.environ["KEY"], os.environ["MODEL"], os.environ["EMBEDDER"]
SERVER = {"api_base": f"{BASE}/v1", "api_key": KEY}
ASK = [ChatMessage(role="user", content="What is the capital of France? Answer in one word.")]


class City(BaseModel):
    """A city."""

    name: str


def add(first: int, second: int) -> int:
    """Adds two numbers."""
    return first + second


def run() -> dict:
    seen = {}
    chat = OpenAILike(
        model=MODEL, is_chat_model=True, is_function_calling_model=True, temperature=0, max_tokens=16, max_retries=0, **SERVER
    )
    seen["chat"] = chat.chat(ASK).message.content
    seen["stream"] = "".join(chunk.delta or "" for chunk in chat.stream_chat(ASK))
    plain = OpenAILike(model=MODEL, is_chat_model=False, temperature=0, max_tokens=8, max_retries=0, **SERVER)
    seen["complete"] = plain.complete("The capital of France is").text
    seen["complete_stream"] = "".join(chunk.delta or "" for chunk in plain.stream_complete("The capital of France is"))
    shaped = OpenAILike(
        model=MODEL, is_chat_model=True, is_function_calling_model=True, temperature=0, max_tokens=160, max_retries=0, **SERVER
    )
    seen["structured"] = type(shaped.as_structured_llm(City).chat(ASK).raw).__name__
    asked = shaped.chat_with_tools([FunctionTool.from_defaults(fn=add)], user_msg="Add 2 and 3.", tool_required=True)
    call = shaped.get_tool_calls_from_response(asked)[0]
    seen["tool"] = [call.tool_name, sorted(call.tool_kwargs)]
    seen["width"] = len(OpenAILikeEmbedding(model_name=EMBEDDER, **SERVER).get_text_embedding("a cat"))
    return seen


print(json.dumps(run()))
