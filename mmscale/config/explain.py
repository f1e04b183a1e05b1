"""What is wrong with a configuration, one sentence for each setting at fault."""

import difflib
from collections.abc import Iterable, Iterator
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from mmscale.config.evaluation import EvalSetConfig
from mmscale.config.foreign import FOREIGN_NAMES
from mmscale.config.loss import AnyTerm
from mmscale.config.paths import FAULT
from mmscale.config.schema import Config

TERMS = ["loss", "terms"]
SETS = ["eval", "sets"]
KINDS = {get_args(term.model_fields["kind"].annotation)[0]: term for term in get_args(AnyTerm)}


def known_settings() -> dict[str, FieldInfo]:
    """Dotted path and field of every setting."""
    return dict(_paths(Config))


def _paths(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        yield prefix + name, field
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from _paths(annotation, f"{prefix}{name}.")


def explain(error: ValidationError) -> list[str]:
    """One sentence for each setting at fault, its unions' alternatives put together."""
    known = known_settings()
    rules: dict[str, tuple[Any, list[str]]] = {}
    terms: dict[str, str] = {}
    about_paths: dict[str, str] = {}
    for fault in error.errors():
        parts = [str(part) for part in fault["loc"]]
        if parts[:2] == TERMS and len(parts) > 2:
            path, sentence = _about_term(parts, fault)
            terms.setdefault(path, sentence)
            continue
        if parts[:2] == SETS and len(parts) > 2:
            path = ".".join(parts[:4])
            about_paths.setdefault(path, _about_set(path, parts, fault))
            continue
        if fault["type"] == "extra_forbidden":
            value = fault["input"]
            # `trian.duration=...` fails at `trian`; the whole path has the better neighbour.
            while isinstance(value, dict) and len(value) == 1:
                ((name, value),) = value.items()
                parts.append(str(name))
            rules[".".join(parts)] = (value, ["unknown"])
            continue
        length = max((n for n in range(len(parts) + 1) if ".".join(parts[:n]) in known), default=0)
        tail = [part for part in parts[length:] if part.isdigit()]
        path = ".".join(parts[:length] + tail) or ".".join(parts)
        if fault["type"] == FAULT:
            about_paths.setdefault(path, f"{path}={fault['msg']}")
            continue
        rules.setdefault(path, (fault["input"], []))[1].append(_rule(fault))
    found = [_sentence(path, value, found, known) for path, (value, found) in rules.items()]
    return found + list(about_paths.values()) + list(terms.values())


def first_fault(error: ValidationError) -> str:
    """Where the first fault of somebody's file is, and which rule it breaks, in one line."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))} {first['msg']}".strip()


def _about_term(parts: list[str], fault: Any) -> tuple[str, str]:
    """Path and sentence of a fault in an entry of `loss.terms`; its tag follows the number."""
    path, value = ".".join([*parts[:3], *parts[4:5]]), fault["input"]
    if fault["type"] in ("union_tag_invalid", "union_tag_not_found"):
        named = value.get("kind") if isinstance(value, dict) else value
        close = difflib.get_close_matches(str(named), KINDS, 1)
        hint = f"did you mean {close[0]}?" if close else "name one"
        return path, f"{path}.kind={in_yaml(named)} must be one of {', '.join(KINDS)}; {hint}"
    if fault["type"] == "extra_forbidden":
        options = [name for name in KINDS[parts[3]].model_fields if name != "kind"]
        close = difflib.get_close_matches(parts[4], options, 1)
        hint = f"did you mean {close[0]}?" if close else "remove it"
        return path, f"{path} is no option of {parts[3]} ({', '.join(options)}); {hint}"
    if len(parts) < 5:
        return (
            path,
            f"{path}={in_yaml(value)} must be {_rule(fault)}; write for example {{kind: infonce}}",
        )
    field = KINDS[parts[3]].model_fields[parts[4]]
    about = (field.description or "").rstrip(".").replace(chr(10), " ")
    if fault["type"] == FAULT:
        return path, f"{path}={fault['msg']}"
    if fault["type"] == "missing":
        return path, f"{path} is not set: it has no default ({about}); add it"
    default = "it has no default" if field.is_required() else f"its default is {field.default}"
    return path, f"{path}={in_yaml(value)} must be {_rule(fault)} ({about}); {default}"


def _about_set(path: str, parts: list[str], fault: Any) -> str:
    """Sentence of a fault in an entry of `eval.sets`; a name follows them."""
    known = {
        f"{'.'.join(parts[:3])}.{name}": field for name, field in EvalSetConfig.model_fields.items()
    }
    if fault["type"] == FAULT:
        return f"{path}={fault['msg']}"
    rules = {"extra_forbidden": "unknown", "missing": "missing"}
    return _sentence(path, fault["input"], [rules.get(fault["type"]) or _rule(fault)], known)


def in_yaml(value: Any) -> str:
    """A value as it stands in YAML; text in quotes."""
    if isinstance(value, str):
        return repr(value)
    try:
        plain = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6)
    except yaml.YAMLError:
        return str(value)
    return str(plain).removesuffix("\n").removesuffix("\n...")


def _rule(fault: Any) -> str:
    kind, context = fault["type"], fault.get("ctx", {})
    fixed = {
        "float_parsing": "a number, like 3e-4",
        "float_type": "a number, like 3e-4",
        "finite_number": "a finite number",
        "int_parsing": "a whole number",
        "int_type": "a whole number",
        "int_from_float": "a whole number",
        "bool_parsing": "true or false",
        "bool_type": "true or false",
        "string_type": "text",
        "none_required": "null",
        "missing": "missing",
        **dict.fromkeys(("list_type", "tuple_type"), "a list, like [a, b]"),
        **dict.fromkeys(
            ("dict_type", "model_type", "model_attributes_type"), "settings, like {name: value}"
        ),
    }
    if kind in fixed:
        return fixed[kind]
    if kind == "literal_error":
        return str(context["expected"])
    if kind == "value_error":
        return str(context["error"]).removeprefix("must be ")
    return str(fault["msg"]).removeprefix("Input should be ").lower()


def _sentence(path: str, value: Any, rules: list[str], known: dict[str, Any]) -> str:
    if rules == ["unknown"]:
        return _unknown(path, value, known)
    doc = getattr(known.get(path), "description", None) or ""
    about = f" ({doc.rstrip('.').replace(chr(10), ' ')})" if doc else ""
    if "missing" in rules:
        return f"{path} is not set: it has no default{about}; add {path}=VALUE"
    wanted = " or ".join(dict.fromkeys(rules))
    example = f"write for example {path}={_example(path, known)}"
    return f"{path}={in_yaml(value)} must be {wanted}{about}; {example}"


def _example(path: str, known: dict[str, Any]) -> str:
    field = known.get(path)
    default = getattr(field, "default", None)
    choices = [arg for arg in get_args(getattr(field, "annotation", None)) if isinstance(arg, str)]
    if isinstance(default, (int, float, str)) and not isinstance(default, bool):
        return str(default)
    text = in_yaml(default) if isinstance(default, tuple) else str(default)
    return f"'{text}'" if " " in text and "=" not in text else choices[0] if choices else "VALUE"


def meant_by(name: str, known: Iterable[str] | None = None) -> str | None:
    """The setting that a name is close to, also by the words of other trainers."""
    known = known_settings() if known is None else known
    leaf = name.rsplit(".", 1)[-1]
    if meant := FOREIGN_NAMES.get(leaf.lower()):
        return meant
    leaves = {path.rsplit(".", 1)[-1]: path for path in known}
    close = difflib.get_close_matches(name, known, 1, 0.75)
    near = difflib.get_close_matches(leaf, leaves, 1, 0.75)
    return close[0] if close else leaves[near[0]] if near else None


def _unknown(path: str, value: Any, known: dict[str, Any]) -> str:
    meant = meant_by(path, known)
    if meant is None:
        return f"{path} is not a setting; remove it (docs/settings.md lists them all)"
    if meant == "train.duration" and isinstance(value, (int, float)):
        unit = "steps" if "step" in path.rsplit(".", 1)[-1].lower() else "epochs"
        return f"{path} is not a setting; did you mean train.duration='{value} {unit}'?"
    return f"{path} is not a setting; did you mean {meant}?"
