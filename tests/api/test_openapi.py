"""openapi.yaml and the app held to each other, both ways: routes, request fields with their bounds, statuses, and every answer's form.

What pictures and videos are answered with is made by the routes' own shapes, without an engine. Long: every model and form of the contract.

With OPENAI_SCHEMAS set (a JSON file of OpenAI's own response schemas) answers are held to those as well.
"""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
import yaml
from pydantic import BaseModel

from service.api import (
    batches,
    images_schema,
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
from service.api.chat import ChatForm
from service.api.choice import Piece
from service.api.easel import Errand, Order, Preview
from service.api.gallery import Gallery
from service.api.images_shape import ImagesShape, Result
from service.api.listing import page
from service.api.media import Media
from service.api.videos import Job
from service.codec.pixels import Pixels
from service.engine.messages import Usage
from service.errors import BraidError, ConflictError, OverloadedError
from service.scheduling.picture_grammar import PictureRule
from service.scheduling.sampling import SamplingParams
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
    schema_chat.ImagePart,
    schema_chat.ImageUrl,
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
    images_schema.ImageRequest,
    images_schema.ImageSource,
    images_schema.EditRequest,
    images_schema.VideoRequest,
]
# Written down only: a request without some of its fields, and with files in a form. What each lacks of the first, and has besides.
FORMS = [
    ("EditRequest", "EditForm", {"images", "mask"}, {"image", "image[]", "mask"}),
    ("EditRequest", "VariationRequest", {"prompt", "mask"}, set[str]()),
    ("EditRequest", "VariationForm", {"prompt", "mask", "images"}, {"image", "image[]"}),
    ("VideoRequest", "VideoForm", {"input_reference"}, {"input_reference"}),
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
    "ImageList": "ImagesResponse",
    "ImageEvent": "AnyImageEvent",
    "Video": "VideoResource",
    "VideoPage": "VideoListResource",
    "DeletedVideo": "DeletedVideoResource",
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
        _free_pictures(relaxed)
        jsonschema.Draft202012Validator({"$ref": f"#/$defs/{OFFICIAL[name]}", "$defs": relaxed}).validate(data)


def _free_pictures(official: dict[str, Any]) -> None:
    """Sizes, models and a quality that OpenAI's own do not have. Mutates: official."""
    events = ("ImageGenPartialImageEvent", "ImageGenCompletedEvent", "ImageEditPartialImageEvent", "ImageEditCompletedEvent")
    for name in ("ImagesResponse", *events):
        official[name]["properties"] |= {"size": {"type": "string"}, "quality": {"type": "string"}}
    official |= {"VideoSize": {"type": "string"}, "VideoModel": {"type": "string"}}
    official["AnyImageEvent"] = {"oneOf": [{"$ref": f"#/$defs/{name}"} for name in events]}


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


def _values(node: dict[str, Any]) -> set[tuple[str, Any]] | None:
    """Those that a field may have, told apart by type; None where they are not listed."""
    listed = node.get("enum", [node["const"]] if "const" in node else None)
    return None if listed is None else {(type(value).__name__, value) for value in listed}


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
        assert _values(merged) == _values(written), name
        assert field.get("default") in (None, [], {}, written.get("default")), name


@pytest.mark.parametrize(("whole", "name", "less", "more"), FORMS, ids=lambda value: value if isinstance(value, str) else "")
def test_forms_have_the_fields_of_their_requests(whole: str, name: str, less: set[str], more: set[str]) -> None:
    ours, theirs = SCHEMAS[whole]["properties"], SCHEMAS[name]["properties"]
    assert set(theirs) == set(ours) - less | more
    assert all(theirs[field] == ours[field] for field in set(ours) - less)
    assert SCHEMAS[name].get("x-unsupported") == SCHEMAS[whole].get("x-unsupported")


@pytest.mark.parametrize(
    "model",
    [
        schema_chat.ChatRequest,
        schema_completion.CompletionRequest,
        images_schema.ImageRequest,
        images_schema.ImageSource,
        images_schema.EditRequest,
        images_schema.VideoRequest,
    ],
)
def test_unsupported_fields_are_the_same(model: type[schema.Strict]) -> None:
    written = SCHEMAS[model.__name__]
    assert sorted(model.unbuilt) == written.get("x-unsupported", [])
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


PIXELS = Pixels(2, 2, bytes(12))
ORDER = Order(MODEL, (1,), (), PictureRule(4), SamplingParams(max_tokens=8, seed=3), Errand("", 0.0))


@pytest.mark.parametrize("is_edit", [False, True])
@pytest.mark.parametrize(("scores", "caption"), [(None, None), ([-2.0, -1.5], -0.25)])
def test_pictures_have_the_form_written_down(is_edit: bool, scores: list[float] | None, caption: float | None) -> None:
    wanted = images_schema.ImageRequest(prompt="a cat", size="4x6")
    shape = ImagesShape(wanted, (2, 2), 1, Media(), is_edit=is_edit, num_seen=1)
    result = Result(0, 5, (1, 2), PIXELS, Usage(3, 0, 2, 0.0, 0.0, 0.0), 2, scores)
    for url_of in (None, lambda data, kind: "http://x" + Gallery().keep(data, kind)):
        check(asyncio.run(shape.whole([result, replace(result, caption_score=caption)], url_of)), "ImageList")
    name = "image_edit" if is_edit else "image_generation"
    for event in (asyncio.run(shape.preview(Preview(0, 1, PIXELS))), asyncio.run(shape.completed(result))):
        head, data = event.decode().splitlines()[:2]
        told = json.loads(data.removeprefix("data: "))
        assert head == f"event: {told['type']}"
        assert told["type"].startswith(name)
        check(told, "ImageEvent")


def test_videos_have_the_form_written_down() -> None:
    wanted = images_schema.VideoRequest(prompt="it moves", seconds=4)
    job = Job(f"video_{0:032x}", "", wanted, ORDER, (32, 32), "webp", 1)
    check(job.view(), "Video")
    job.status, job.completed_at, job.error = "failed", 2, ConflictError("no")
    check(job.view(), "Video")
    check(page([job.view()], None, 1), "VideoPage")
    check(page([], None, 1), "VideoPage")


def test_pictures_of_chats_have_the_form_written_down() -> None:
    class Generation:
        choices = (None,)

    form = ChatForm(None, schema_chat.ChatRequest.model_validate({"messages": HI}), Generation())  # type: ignore[arg-type]
    piece = Piece(0, "so:", images=(b"one", b"two"))
    for name, whole in (("message", [form.message(0, [piece, piece])]), ("delta", [*form.deltas(piece), *form.deltas(piece)])):
        answer = SCHEMAS["ChatCompletion" if name == "message" else "ChatCompletionChunk"]
        written = answer["properties"]["choices"]["items"]["properties"][name]
        found = [index for each in whole for index in [image["index"] for image in each[name].get("images", ())]]
        assert found == [0, 1, 2, 3]
        for each in whole:
            validator(written).validate(each[name])
