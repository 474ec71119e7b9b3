"""A checker of config.pbtxt: protobuf's text format, and the fields of Triton's ModelConfig.

Names, kinds and nesting are those of model_config.proto as far as a Python model needs them; an
unknown field is an error, as it is for the server.
"""

import re
from typing import Any

TOKEN = re.compile(
    r'\s*(?:#[^\n]*\n\s*)*("(?:\\.|[^"\\])*"|[A-Za-z_]\w*|-?\d+(?:\.\d+)?|[{}\[\]:,;])'
)
TYPES = "BOOL UINT8 UINT16 UINT32 UINT64 INT8 INT16 INT32 INT64 FP16 FP32 FP64 STRING BF16".split()
DTYPES = [f"TYPE_{name}" for name in TYPES]
POLICY = {
    "timeout_action": ["REJECT", "DELAY"],
    "default_timeout_microseconds": int,
    "allow_timeout_override": bool,
    "max_queue_size": int,
}
INPUT = {"name": str, "data_type": DTYPES, "dims": [[int]], "optional": bool}
# A type, a list of an enum's names, a dict for a message; in a list of one: repeated.
CONFIG: dict[str, Any] = {
    "name": str,
    "backend": str,
    "max_batch_size": int,
    "input": [INPUT],
    "output": [{"name": str, "data_type": DTYPES, "dims": [[int]]}],
    "instance_group": [
        {"count": int, "kind": ["KIND_AUTO", "KIND_GPU", "KIND_CPU", "KIND_MODEL"], "gpus": [[int]]}
    ],
    "dynamic_batching": {
        "preferred_batch_size": [[int]],
        "max_queue_delay_microseconds": int,
        "default_queue_policy": POLICY,
    },
    "parameters": [{"key": str, "value": {"string_value": str}}],
}


def parse(text: str) -> dict[str, Any]:
    """config.pbtxt as a dict, repeated fields as lists; ValueError where it is none."""
    tokens, end = [], 0
    stripped = text.rstrip()
    while end < len(stripped):
        found = TOKEN.match(text, end)
        if found is None:
            raise ValueError(f"no token at {text[end : end + 30]!r}")
        tokens.append(found[1])
        end = found.end()
    tokens.append("}")
    answer = message(tokens, CONFIG, "")
    if tokens:
        raise ValueError(f"{tokens[0]!r} after the end")
    return answer


def message(tokens: list[str], fields: dict[str, Any], where: str) -> dict[str, Any]:
    """Fields up to the closing brace."""
    answer: dict[str, Any] = {}
    while (name := tokens.pop(0)) != "}":
        if name not in fields:
            raise ValueError(f"{where} has no field {name!r}")
        kind, here = fields[name], f"{where}.{name}"
        repeated = isinstance(kind, list) and not isinstance(kind[0], str)
        if tokens[0] == ":":
            tokens.pop(0)
        elif tokens[0] not in "{[":
            raise ValueError(f"{here} is followed by {tokens[0]!r}")
        if not repeated and name in answer:
            raise ValueError(f"{here} is given twice")
        if repeated and tokens[0] == "[":
            tokens.pop(0)
            while tokens[0] != "]":
                answer.setdefault(name, []).append(value(tokens, inner(kind), here))
                if tokens[0] == ",":
                    tokens.pop(0)
            tokens.pop(0)
        elif repeated:
            answer.setdefault(name, []).append(value(tokens, inner(kind), here))
        else:
            answer[name] = value(tokens, kind, here)
        if tokens[0] in ",;":
            tokens.pop(0)
    return answer


def inner(kind: list[Any]) -> Any:
    """What a repeated field repeats."""
    return kind[0][0] if isinstance(kind[0], list) else kind[0]


def value(tokens: list[str], kind: Any, where: str) -> Any:
    """One value of a field."""
    token = tokens.pop(0)
    if isinstance(kind, dict) and token == "{":
        return message(tokens, kind, where)
    if isinstance(kind, list) and token in kind:
        return token
    if kind is str and token[0] == '"':
        return re.sub(r"\\(.)", r"\1", token[1:-1])
    if kind is int and re.fullmatch(r"-?\d+", token):
        return int(token)
    if kind is bool and token in ("true", "false"):
        return token == "true"
    raise ValueError(f"{where} is {token!r}")


def check(config: dict[str, Any], folder: str) -> None:
    """What the server asks of a Python model's configuration beyond its fields."""
    assert config["name"] == folder and config["backend"] == "python"
    assert config["max_batch_size"] >= 1  # or there is no dynamic batching
    for side in ("input", "output"):
        names = [row["name"] for row in config[side]]
        assert len(set(names)) == len(names) > 0
        for row in config[side]:
            assert row["dims"] and all(dim == -1 or dim > 0 for dim in row["dims"])
    assert any(not row.get("optional") for row in config["input"])
    assert all(group["count"] >= 1 for group in config["instance_group"])
    keys = [row["key"] for row in config["parameters"]]
    assert len(set(keys)) == len(keys)
