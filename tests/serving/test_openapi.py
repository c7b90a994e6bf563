"""The description is valid OpenAPI, and what a server takes and answers is what it says."""

import jsonschema
import pytest
from openapi_spec_validator import validate

from .support import ROW


@pytest.fixture(scope="module", params=["digits_server", "lm_server"])
def described(request):
    server = request.getfixturevalue(request.param)
    return server, server.client.get("/openapi.json").json()


def schema(document, name):
    return {"$ref": f"#/components/schemas/{name}", "components": document["components"]}


def test_it_is_valid_and_has_every_route(described):
    server, document = described
    validate(document)
    for path, operations in document["paths"].items():
        ((method, operation),) = operations.items()
        if path != "/v1/drain":  # it would end the server
            status = server.client.request(method, path).status_code
            assert str(status) in operation["responses"], (path, status)
    assert set(document["paths"]) == {
        "/v1/predict",
        "/v1/completions",
        "/v1/models",
        "/v1/drain",
        "/openapi.json",
        "/metrics",
        "/healthz",
        "/readyz",
    }


REQUESTS = [
    ("/v1/predict", "PredictRequest", {"inputs": [ROW]}, "Prediction"),
    ("/v1/predict", "PredictRequest", {"inputs": [ROW[:-1]]}, None),
    ("/v1/predict", "PredictRequest", {"inputs": []}, None),
    ("/v1/predict", "PredictRequest", {"inputs": [ROW], "x": 1}, None),
    ("/v1/completions", "CompletionRequest", {"prompt": "a", "max_tokens": 3}, "Completion"),
    ("/v1/completions", "CompletionRequest", {"prompt": [1, 2]}, "Completion"),
    ("/v1/completions", "CompletionRequest", {"prompt": ""}, None),
    ("/v1/completions", "CompletionRequest", {"prompt": "a", "max_tokens": 0}, None),
    ("/v1/completions", "CompletionRequest", {"prompt": "a", "max_tokens": 1000}, None),
    ("/v1/completions", "CompletionRequest", {"prompt": "a", "temperature": -1}, None),
    ("/v1/completions", "CompletionRequest", {"prompt": "a", "stream": 1}, None),
]


@pytest.mark.parametrize(("path", "request_name", "body", "answer_name"), REQUESTS)
def test_the_server_takes_what_the_schema_takes_and_answers_as_described(
    digits_server, lm_server, path, request_name, body, answer_name
):
    server = digits_server if path == "/v1/predict" else lm_server
    document = server.client.get("/openapi.json").json()
    valid = jsonschema.Draft202012Validator(schema(document, request_name)).is_valid(body)
    answer = server.client.post(path, json=body)
    assert valid == (answer_name is not None)
    assert answer.status_code == (200 if answer_name else 422)
    jsonschema.validate(answer.json(), schema(document, answer_name or "Problem"))
