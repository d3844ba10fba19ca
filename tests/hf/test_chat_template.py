"""A folder's own chat template: followed where it is one of ours, named where it is not."""

import json

import pytest

from nanomed import hf
from nanomed.config import InputError
from nanomed.hf import chat_template, pretrained
from nanomed.text import tokenizer
from nanomed.text.template import CHATML
from tests.folders import write_model, write_rank_file

TURN = "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}"
OPEN = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
PLAIN = "{% for m in messages %}" + TURN + "{% endfor %}" + OPEN
# With a system text of its own, over several lines and with Jinja's usual spacing.
OWN_SYSTEM = """{%- if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nYou are Q.<|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
MARKED = PLAIN.replace(TURN, "{% generation %}" + TURN + "{%- endgeneration -%}")
TRIMMED = PLAIN.replace("m['content']", "m['content'] | trim")
THINKS = PLAIN.replace(
    "m['content']",
    "('<think></think>' if m.role == 'assistant' and loop.last else '') + m['content']",
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    + PLAIN
)
BEGINS = "{{ bos_token }}" + PLAIN
COLONS = PLAIN.replace("'\\n' + m['content']", "': ' + m['content']")
# name -> (template, the system text that is taken over, what the warning says; "" for none)
TEMPLATES = {
    "plain": (PLAIN, "", ""),
    "a system text of its own": (OWN_SYSTEM, "You are Q.", ""),
    "marked": (MARKED, "", ""),
    "trims": (TRIMMED, "", "|im_start|>user\\nQ3<|im_end|>"),
    "thinks": (THINKS, "", "<think></think>"),
    "no system turn": (NO_SYSTEM, "", "it has '[TemplateError: no system turn]'"),
    "begins": (BEGINS, CHATML.system, "it has '<s><|im_start|>user"),
    "colons": (COLONS, CHATML.system, "is not followed"),
    "raises": ("{{ messages.a.b }}", CHATML.system, "[UndefinedError"),
}


@pytest.fixture
def folder(tmp_path):
    write_model(tmp_path, "qwen2")
    write_rank_file(tmp_path)
    return tmp_path


def put(folder, template):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({"chat_template": template, "bos_token": {"content": "<s>"}}))


@pytest.mark.parametrize("name", TEMPLATES)
def test_it_is_followed_or_named(name, folder, capsys):
    text, system, warning = TEMPLATES[name]
    put(folder, text)
    template = pretrained.describe(folder)[1].template
    assert (template.name, template.system) == ("chatml", system)
    said = capsys.readouterr().out
    assert (warning in said and "chat template is not followed" in said) if warning else not said
    assert pretrained.describe(folder, "", "chatml")[1].template is CHATML
    assert capsys.readouterr().out == ""  # it was named


@pytest.mark.parametrize("name", sorted(TEMPLATES.keys() - {"raises", "no system turn"}))
def test_it_is_rendered_as_transformers_does(name, folder):
    from transformers import AutoTokenizer

    hf.export(pretrained.load(folder), tokenizer.load(folder), folder / "out")
    theirs = AutoTokenizer.from_pretrained(folder / "out")
    theirs.chat_template, theirs.bos_token = TEMPLATES[name][0], "<s>"
    put(folder, TEMPLATES[name][0])
    render = chat_template.renderer(folder)
    for turns, opens in chat_template.PROBES:
        messages = [{"role": role, "content": text} for role, text in turns]
        wanted = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=opens)
        assert render(turns, opens) == wanted


def test_an_export_says_nothing_until_its_template_is_changed(folder, capsys):
    hf.export(pretrained.load(folder), tokenizer.load(folder), folder / "out")
    assert pretrained.describe(folder / "out")[1].template == CHATML
    assert capsys.readouterr().out == ""
    (folder / "out/chat_template.jinja").write_text(COLONS)  # it comes before the settings
    assert pretrained.describe(folder / "out")[1].template == CHATML
    assert "is not followed" in capsys.readouterr().out


def test_of_several_the_default_one_counts(folder):
    put(folder, [{"name": "tools", "template": COLONS}, {"name": "default", "template": PLAIN}])
    assert pretrained.describe(folder)[1].template.system == ""
    put(folder, [{"name": "tools", "template": COLONS}])
    assert pretrained.describe(folder)[1].template == CHATML


def test_what_is_no_jinja_is_an_error(folder):
    put(folder, "{% for %}")
    with pytest.raises(InputError, match=r"tokenizer_config\.json: its chat template is no Jinja"):
        pretrained.describe(folder)
    pretrained.describe(folder, "", "chatml")
