"""What others generate clients from: the API's document names calls as a person would."""

import re
from typing import Any

from tests.serve.conftest import Service, Start


def operations(service: Service) -> dict[str, tuple[str, dict[str, Any]]]:
    """By id, each operation with its path."""
    document = service.ask("GET", "/openapi.json").json
    found = [(path, each) for path, methods in document["paths"].items() for each in methods.values()]
    named = {each["operationId"]: (path, each) for path, each in found}
    assert len(named) == len(found), "an id is given twice"
    return named


def test_calls_have_the_names_that_a_person_would_choose(service: Service) -> None:
    named = operations(service)
    assert set(named) == {
        "list_models",
        "allocate",
        "create_checkpoint",
        "list_checkpoints",
        "get_checkpoint",
        "delete_checkpoint",
        "download_file",
        "follow_checkpoint",
        "get_health",
        "get_readiness",
    }
    for name, (_, operation) in named.items():
        # Nothing of the path or of the method, as the framework would append.
        assert re.fullmatch(r"[a-z]+(_[a-z]+)?", name)
        assert operation["tags"] in (["models"], ["checkpoints"], ["health"])


def test_a_token_is_asked_for_where_one_is_needed(service: Service, start: Start) -> None:
    document = service.ask("GET", "/openapi.json").json
    assert "securitySchemes" not in document["components"]
    assert not any("security" in operation for _, operation in operations(service).values())
    for path, operation in operations(start(keys=["k" * 16])).values():
        assert operation.get("security") == ([{"key": []}] if path.startswith("/v1/") else None)
