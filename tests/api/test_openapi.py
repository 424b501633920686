"""openapi.yaml and the app held to each other, both ways: routes, request fields with their bounds, statuses, and every answer's form.

With OPENAI_SCHEMAS set (a JSON file of OpenAI's own response schemas) answers are held to those as well.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
import yaml
from pydantic import BaseModel

from service.api import (
    batches,
    messages_schema,
    responses_schema,
    schema,
    schema_chat,
    schema_completion,
    schema_format,
    schema_tools,
    schema_vectors,
    tokenize,
)
from service.api.auth import is_public
from service.errors import BraidError, OverloadedError
from tests.api.fakes import MODEL, Running, Script
from tests.api.test_auth import routes
from tests.api.test_chat import events

CONTRACT: dict[str, Any] = yaml.safe_load((Path(__file__).parents[2] / "openapi.yaml").read_text(encoding="utf-8"))
SCHEMAS: dict[str, Any] = CONTRACT["components"]["schemas"]
HI = [{"role": "user", "content": "hi"}]
REQUESTS: list[type[schema.Strict]] = [
    schema_chat.ChatRequest,
    schema_completion.CompletionRequest,
    schema.StreamOptions,
    schema_chat.Message,
    schema_chat.TextPart,
    schema_chat.RefusalPart,
    schema_chat.FunctionToolCall,
    schema_chat.CalledFunction,
    schema_chat.CustomToolCall,
    schema_chat.CalledCustom,
    schema_chat.Prediction,
    schema_format.ResponseFormat,
    schema_format.JsonSchemaFormat,
    schema_format.StructuredOutputs,
    schema_tools.FunctionTool,
    schema_tools.FunctionDefinition,
    schema_tools.CustomTool,
    schema_tools.CustomDefinition,
    schema_tools.CustomFormat,
    schema_tools.CustomGrammar,
    schema_tools.NamedOnly,
    schema_tools.NamedFunction,
    schema_tools.NamedCustom,
    schema_tools.AllowedChoice,
    schema_tools.AllowedTools,
    messages_schema.MessagesRequest,
    messages_schema.CountTokensRequest,
    messages_schema.MessageParam,
    messages_schema.TextBlock,
    messages_schema.DocumentBlock,
    messages_schema.TextSource,
    messages_schema.ThinkingBlock,
    messages_schema.RedactedThinkingBlock,
    messages_schema.ToolUseBlock,
    messages_schema.ToolResultBlock,
    messages_schema.MessagesTool,
    messages_schema.MessagesToolChoice,
    messages_schema.Thinking,
    messages_schema.OutputConfig,
    messages_schema.OutputFormat,
    messages_schema.MessagesMetadata,
    tokenize.TokenizeRequest,
    tokenize.DetokenizeRequest,
    batches.BatchRequest,
    batches.OutputExpiry,
    schema_vectors.EmbeddingRequest,
    schema_vectors.RerankRequest,
    schema_vectors.ScoreRequest,
    schema_vectors.ClassifyRequest,
    responses_schema.ResponsesRequest,
    responses_schema.InputTokensRequest,
    responses_schema.ResponseStreamOptions,
    responses_schema.MessageItem,
    responses_schema.FunctionCallItem,
    responses_schema.FunctionOutputItem,
    responses_schema.CustomCallItem,
    responses_schema.CustomOutputItem,
    responses_schema.ReasoningItem,
    responses_schema.ItemReference,
    responses_schema.InputText,
    responses_schema.OutputText,
    responses_schema.OutputRefusal,
    responses_schema.ReasoningText,
    responses_schema.SummaryText,
    responses_schema.FlatFunction,
    responses_schema.FlatFormat,
    responses_schema.FlatCustom,
    responses_schema.FlatNamed,
    responses_schema.FlatAllowed,
    responses_schema.TextFormat,
    responses_schema.TextOptions,
    responses_schema.ReasoningOptions,
]
# name in the contract, name in OpenAI's
OFFICIAL = {
    "ChatCompletion": "CreateChatCompletionResponse",
    "ChatCompletionChunk": "CreateChatCompletionStreamResponse",
    "Completion": "CreateCompletionResponse",
    "EmbeddingList": "CreateEmbeddingResponse",
    "ModelList": "ListModelsResponse",
    "File": "OpenAIFile",
    "FilePage": "ListFilesResponse",
    "Model": "Model",
    "Error": "ErrorResponse",
}
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "minLength", "maxLength", "minItems", "maxItems", "maxProperties")


def validator(written: dict[str, Any]) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator({**written, "components": CONTRACT["components"]})


def check(data: Any, name: str) -> None:
    validator({"$ref": f"#/components/schemas/{name}"}).validate(data)
    path = os.environ.get("OPENAI_SCHEMAS")
    if path and name in OFFICIAL:
        official = json.loads(Path(path).read_text(encoding="utf-8"))
        # Every chunk of a completions stream but the last of a choice has a null here, also OpenAI's; their schema forgets it.
        relaxed = json.loads(json.dumps(official["$defs"]))
        choice = relaxed["CreateCompletionResponse"]["properties"]["choices"]["items"]["properties"]
        choice["finish_reason"] = {"anyOf": [choice["finish_reason"], {"type": "null"}]}
        jsonschema.Draft202012Validator({"$ref": f"#/$defs/{OFFICIAL[name]}", "$defs": relaxed}).validate(data)


def test_the_contract_is_whole() -> None:
    jsonschema.Draft202012Validator.check_schema({"$defs": SCHEMAS})
    text = json.dumps(CONTRACT)
    used = {part.split('"')[0] for part in text.split('"#/components/schemas/')[1:]}
    answers = {part.split('"')[0] for part in text.split('"#/components/responses/')[1:]}
    assert used == set(SCHEMAS)
    assert answers == set(CONTRACT["components"]["responses"])


def test_examples_have_the_form_written_down() -> None:
    answers = [answer for item in CONTRACT["paths"].values() for operation in item.values() for answer in operation["responses"].values()]
    num_checked = 0
    for answer in [*answers, *CONTRACT["components"]["responses"].values()]:
        for content in answer.get("content", {}).values():
            examples = [content["example"]] if "example" in content else [each["value"] for each in content.get("examples", {}).values()]
            for example in examples:
                validator(content["schema"]).validate(example)
                num_checked += 1
    assert num_checked > 6


def test_routes_are_the_same(server: Running) -> None:
    ours = {(method, path.replace(":path}", "}")) for method, path in routes(server) if method != "HEAD"}
    theirs = {(method.upper(), path) for path, item in CONTRACT["paths"].items() for method in item}
    assert ours == theirs
    public = {path for path, item in CONTRACT["paths"].items() for operation in item.values() if operation.get("security") == []}
    assert public == {path for path in CONTRACT["paths"] if is_public(path)}


def _merged(node: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """pydantic's schema of a field without references and without the null that stands for absent."""
    if "$ref" in node:
        return definitions[node["$ref"].rpartition("/")[2]]
    some = [each for each in node.get("anyOf", ()) if each.get("type") != "null"]
    return _merged(some[0], definitions) if len(some) == 1 else node


@pytest.mark.parametrize("model", REQUESTS, ids=lambda model: model.__name__)
def test_request_fields_are_the_same(model: type[BaseModel]) -> None:
    generated = model.model_json_schema()
    ours, theirs = generated["properties"], SCHEMAS[model.__name__]["properties"]
    assert set(ours) == set(theirs)
    assert set(generated.get("required", ())) == set(SCHEMAS[model.__name__].get("required", ()))
    for name, field in ours.items():
        written = theirs[name]
        merged = _merged(field, generated.get("$defs", {}))
        if "anyOf" in written or "oneOf" in merged or "$ref" in written:
            continue  # a union; the tests of validation go through its members
        limit = {key: merged[key] for key in BOUNDS if key in merged and merged[key] != schema.MAX_CHARS}
        assert limit == {key: written[key] for key in BOUNDS if key in written}, name
        assert merged.get("type", written.get("type")) == written.get("type", merged.get("type")), name


@pytest.mark.parametrize("model", [schema_chat.ChatRequest, schema_completion.CompletionRequest])
def test_unsupported_fields_are_the_same(model: type[schema.SamplingFields]) -> None:
    written = SCHEMAS[model.__name__]
    assert sorted(model.unbuilt) == written["x-unsupported"]
    assert not set(model.unbuilt) & set(written["properties"])


def kinds_of(error: type[BraidError]) -> set[str]:
    return {error.type}.union(*(kinds_of(each) for each in error.__subclasses__()))


def test_error_types_are_the_same() -> None:
    assert set(SCHEMAS["Error"]["properties"]["error"]["properties"]["type"]["enum"]) == kinds_of(BraidError)


@pytest.mark.parametrize("more", [{}, {"n": 3, "stop": "wör"}, {"logprobs": True, "top_logprobs": 2}, {"max_tokens": 3, "unknown": 1}])
def test_answers_have_the_form_written_down(server: Running, more: dict[str, Any]) -> None:
    for options in (None, {"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True}):
        streamed = {**more, "stream": True, "stream_options": options}
        for chunk in events(server.chat(**streamed)):
            check(chunk, "ChatCompletionChunk")
        if "top_logprobs" not in more:
            for chunk in events(server.post("/v1/completions", prompt=["a", "b"], **streamed)):
                check(chunk, "CompletionChunk")
    check(server.chat(**more).json(), "ChatCompletion")
    numbers = {"logprobs": 2} if "logprobs" in more else more
    check(server.post("/v1/completions", prompt="a", **numbers).json(), "Completion")
    for chunk in events(server.post("/v1/completions", prompt="a", **numbers, stream=True)):
        check(chunk, "CompletionChunk")


def test_other_answers_have_the_form_written_down(server: Running) -> None:
    check(httpx.get(f"{server.url}/v1/models").json(), "ModelList")
    check(httpx.get(f"{server.url}/v1/models/{MODEL}").json(), "Model")
    for state in ("ready", "loading", "dead"):
        server.engine.state = state
        for path in ("/health", "/ready", "/ping"):
            check(httpx.get(f"{server.url}{path}").json(), "State")
        check(httpx.get(f"{server.url}/v1/models").json(), "ModelList")


def test_errors_have_a_status_written_down(server: Running) -> None:
    found = {}
    for path, question in (("/v1/chat/completions", {"messages": HI}), ("/v1/completions", {"prompt": "a"})):
        url = f"{server.url}{path}"
        server.engine.script = Script()
        found[path] = [
            server.post(path),
            server.post(path, **question, model="nobody"),
            httpx.post(url, content=b"x"),
            httpx.post(url, content=b"x" * (33 << 20), headers={"content-type": "application/json"}),
        ]
        server.engine.refusal = OverloadedError("full")
        found[path].append(server.post(path, **question))
        server.engine.refusal = None
        for status in (408, 500, 503):
            server.engine.script = Script(error_after=0, error_status=status)
            found[path].append(server.post(path, **question))
    for path, answers in found.items():
        for answer in answers:
            check(answer.json(), "Error")
        written = CONTRACT["paths"][path]["post"]["responses"]
        assert {str(answer.status_code) for answer in answers} | {"200", "401"} == set(written)
