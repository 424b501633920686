"""Every error that can reach a client or end the program, as one tree. Messages say what was wrong and what is allowed; no paths.

BraidError
├── RequestError            400  the client's fault; `param` names the field
│   ├── ContextLengthError  400  context_length_exceeded
│   ├── ModelNotFoundError  404  model_not_found
│   ├── RouteNotFoundError  404
│   ├── NotFoundError       404  not_found: something stored, or somebody else's
│   ├── MethodError         405
│   ├── BodyTooLargeError   413
│   ├── MediaTypeError      415
│   ├── HostError           421  host_not_allowed
│   └── HeaderTooLargeError 431
├── AuthenticationError     401  invalid_api_key
├── ForbiddenError          403  the key is known and may not do this
├── ConflictError           409  the state of what is stored forbids it
├── OverloadedError         429  rate_limit_exceeded, with a Retry-After
├── DeadlineError           408  the request's own timeout passed before anything was sent
├── EngineError             500  a fault of ours that concerned this request alone
├── UnavailableError        503  server_is_overloaded: loading, draining, stalled or dead
├── StorageError            507  the data folder is full or broken
└── StartupError            -    the program can't start: a bad file, flag or config; exit status 1
    └── WeightsError        -    a checkpoint is truncated, lies about itself, or does not fit its config
"""

from __future__ import annotations


class BraidError(Exception):
    """status: of the HTTP answer. type and code: of OpenAI's error body. retry: may a client send the same again?"""

    status = 500
    type = "server_error"
    code: str | None = None
    retry = False

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or type(self).code
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, dict[str, str | None]]:
        """The error in OpenAI's shape: all four keys, `code` a string or null."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class RequestError(BraidError):
    status = 400
    type = "invalid_request_error"


class ContextLengthError(RequestError):
    code = "context_length_exceeded"


class ModelNotFoundError(RequestError):
    status = 404
    code = "model_not_found"


class RouteNotFoundError(RequestError):
    status = 404


class NotFoundError(RequestError):
    status = 404
    code = "not_found"


class MethodError(RequestError):
    status = 405


class BodyTooLargeError(RequestError):
    status = 413


class MediaTypeError(RequestError):
    status = 415


class HostError(RequestError):
    status = 421
    code = "host_not_allowed"


class HeaderTooLargeError(RequestError):
    status = 431


class AuthenticationError(BraidError):
    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class ForbiddenError(BraidError):
    status = 403
    type = "permission_error"


class ConflictError(BraidError):
    status = 409
    type = "conflict_error"


class OverloadedError(BraidError):
    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"
    retry = True


class DeadlineError(BraidError):
    status = 408
    type = "timeout_error"
    code = "deadline_exceeded"


class EngineError(BraidError):
    pass


class UnavailableError(BraidError):
    status = 503
    type = "service_unavailable_error"
    code = "server_is_overloaded"
    retry = True


class StorageError(BraidError):
    status = 507


class StartupError(BraidError):
    pass


class WeightsError(StartupError):
    pass
