"""Chat templates in Jinja, as Hugging Face folders have them: ours are written as such. A folder's
own is followed if it is one of ours; else it is compared with the one that is used in its place.
"""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

from nanomed.config import InputError
from nanomed.records import Turns
from nanomed.text.template import TEMPLATES, Template
from nanomed.text.tokenizer import Tokenizer
from nanomed.text.tokenizer_files import read_object

# (turns, whether the text goes on to where an answer begins) -> the text
Render = Callable[[Turns, bool], str]
CHAT = [("user", "Q1"), ("assistant", "A1"), ("user", "Q2"), ("assistant", "A2")]
PROBES = [(CHAT[:1], True), (CHAT, False), ([("system", "S1"), *CHAT[:3]], True)]
PROBES += [([("user", " Q3\n"), ("assistant", "\nA3 ")], False)]


def renderer(folder: Path) -> Render | None:
    """What renders chats by a folder's own template, as transformers would; None if it has none.
    Raises InputError if it is no Jinja."""
    path = folder / "tokenizer_config.json"
    settings = read_object(path) if path.exists() else {}
    text = settings.get("chat_template")
    if isinstance(text, list):  # several by name
        text = {one.get("name"): one.get("template") for one in text}.get("default")
    if (file := folder / "chat_template.jinja").exists():
        path, text = file, file.read_text(encoding="utf-8")
    if not isinstance(text, str):
        return None
    try:
        import jinja2.ext
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise InputError(f"{path} needs one more package: pip install jinja2") from None

    def fail(message: str) -> None:
        raise jinja2.TemplateError(message)

    # The markers around what an assistant says render nothing; stock Jinja does not know them.
    text = re.sub(r"\{%(-?)\s*generation\s*(-?)%\}", r"{%\1 if true \2%}", text)
    text = re.sub(r"\{%(-?)\s*endgeneration\s*(-?)%\}", r"{%\1 endif \2%}", text)
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.globals |= {"raise_exception": fail, "strftime_now": lambda form: form}
    try:
        compiled = environment.from_string(text)
    except jinja2.TemplateError as error:
        raise InputError(
            f"{path}: its chat template is no Jinja: {error}; give --template"
        ) from None
    named = {name: settings.get(name) for name in ("bos_token", "eos_token", "pad_token")}
    named = {n: v.get("content") if isinstance(v, dict) else v for n, v in named.items() if v}

    def render(turns: Turns, opens: bool) -> str:
        messages = [{"role": role, "content": content} for role, content in turns]
        try:
            return compiled.render(messages=messages, add_generation_prompt=opens, **named)
        except Exception as error:  # whatever a template's own code raises
            return f"[{type(error).__name__}: {error}]"

    return render


def like(render: Render, tokenizer: Tokenizer) -> Template | None:
    """The first of TEMPLATES that renders a question as `render` does, with the system text that
    it puts before a chat that brings none."""
    for template in TEMPLATES.values():
        template = dataclasses.replace(template, system="")
        bare, theirs = _text(template, *PROBES[0]), render(*PROBES[0])
        before, after = template.before["system"], template.after["system"]
        front = theirs.removesuffix(bare)
        if front:
            template = dataclasses.replace(
                template, system=front.removeprefix(before).removesuffix(after)
            )
        if _text(template, *PROBES[0]) == theirs and not template.missing(tokenizer):
            return template
    return None


def difference(render: Render, template: Template) -> str:
    """Where a folder's own template renders a few chats otherwise than ours, in words; "" if it
    does not."""
    for probe in PROBES:
        theirs, ours = render(*probe), _text(template, *probe)
        if theirs != ours:
            pairs = enumerate(zip(theirs, ours, strict=False))
            at = next((i for i, (a, b) in pairs if a != b), min(len(theirs), len(ours)))
            a, b = (text[max(0, at - 20) : at + 40] for text in (theirs, ours))
            return f"it has {a!r} where template {template.name!r}, which is used, has {b!r}"
    return ""


def _text(template: Template, turns: Turns, opens: bool) -> str:
    if template.system and turns[0][0] != "system":
        turns = [("system", template.system), *turns]
    text = "".join(template.before[role] + x + template.after[role] for role, x in turns)
    return text + template.before["assistant"] * opens


def jinja(template: Template) -> str:
    """The chat template that transformers and vLLM render, byte for byte what template.py builds.
    Like there, a system text can only be the first, and an empty one counts as none. What is
    trained stands between the generation markers that transformers knows."""

    def turn(role: str, content: str) -> str:
        before, after = template.before[role], template.after[role]
        if role != "assistant":
            return f"{{{{ {_quoted(before)} + {content} + {_quoted(after)} }}}}"
        end = after.index(template.turn_end) + len(template.turn_end)
        return (
            f"{{{{ {_quoted(before)} }}}}{{% generation %}}{{{{ {content} + {_quoted(after[:end])} "
            f"}}}}{{% endgeneration %}}{{{{ {_quoted(after[end:])} }}}}"
        )

    stated = "messages and messages[0]['role'] == 'system' and messages[0]['content']"
    lines = [f"{{% if {stated} %}}", turn("system", "messages[0]['content']")]
    if template.system:
        lines += ["{% else %}", turn("system", _quoted(template.system))]
    lines.append("{% endif %}{% for message in messages %}")
    for role in ("user", "assistant"):
        keyword = "if" if role == "user" else "elif"
        lines.append(f"{{% {keyword} message['role'] == '{role}' %}}")
        lines.append(turn(role, "message['content']"))
    lines.append("{% elif message['role'] != 'system' or not loop.first %}")
    lines.append("{{ raise_exception('a ' + message['role'] + ' turn cannot stand here') }}")
    lines.append("{% endif %}{% endfor %}{% if add_generation_prompt %}")
    lines.append(f"{{{{ {_quoted(template.before['assistant'])} }}}}{{% endif %}}")
    return "".join(lines)


def _quoted(text: str) -> str:
    """A string in Jinja, which reads the same escapes as JSON but no surrogate pairs."""
    return json.dumps(text, ensure_ascii=False)
