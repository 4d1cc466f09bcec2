"""Template files of prompts.

Invariants: a template is checked when it is loaded, and the key that is missing, unknown or no text is named; a wording
is a text with plain fields that its task fills, so that formatting it cannot fail, run code or fill the memory.
"""

import pytest
import yaml

from data import DEFAULT_TEMPLATE, TASKS, Prompts
from minionerec.common.errors import UserError
from minionerec.language_model.prompt_template import fields_of, read_template

FIELD_OF = {name: task.field for name, task in TASKS.items()}


def test_fields():
    assert fields_of("{history} of {category}") == {"history", "category"}
    assert fields_of("{{x}}") == fields_of("") == set()
    assert fields_of("{a:>9}") is fields_of("{a!r}") is fields_of("{") is fields_of(5) is None


@pytest.mark.parametrize("name", ["prompt.yaml", "prompt_upstream.yaml"])
def test_our_templates_word_every_task(name):
    assert set(read_template(DEFAULT_TEMPLATE.parent / name, FIELD_OF)["tasks"]) == set(TASKS)


def change(**changes):
    """A function that sets keys of a template; `__` leads into a mapping, None removes."""

    def changed(template):
        for path, value in changes.items():
            *folders, key = path.split("__")
            inner = template
            for folder in folders:
                inner = inner[folder]
            if value is None:
                del inner[key]
            else:
                inner[key] = value

    return changed


TEMPLATES = {
    "a missing key": (change(response_marker=None), "response_marker is 'missing', expected a text"),
    "an unknown key": (change(respons_marker="x"), "respons_marker is 'x', expected no such key"),
    "a number": (change(sid_separator=5), "sid_separator is '5', expected a text"),
    "an empty value": (change(input_marker=[]), "input_marker is '[]', expected a text"),
    "no tasks": (change(tasks=["sid_seq"]), "tasks is \"['sid_seq']\", expected keys and values"),
    "a category that is a number": (change(categories__Books=5), "categories: Books is '5', expected a text"),
    "a category named by a number": (change(categories={5: "x"}), "categories: 5 is 'x', expected a text for a name"),
    "a task without input": (change(tasks__sid_seq__input=None), "tasks: sid_seq is"),
    "a task with more": (change(tasks__sid_seq__output="x"), "tasks: sid_seq is"),
    "a task that is a text": (change(tasks__sid_seq="x"), "tasks: sid_seq is 'x', expected the keys instruction and input"),
    "an unknown field": (change(tasks__sid_seq__input="{histroy}"), "tasks: sid_seq: input is '{histroy}'"),
    "another task's field": (change(tasks__sid_seq__input="{item}"), "tasks: sid_seq: input is '{item}'"),
    "no field": (change(tasks__sid_seq__input="x"), "expected a text with {history}, and no other field but {category}"),
    "a number as wording": (change(tasks__sid_seq__input=5), "tasks: sid_seq: input is '5'"),
    "a field in an instruction": (change(tasks__sid_seq__instruction="{history}"), "tasks: sid_seq: instruction is"),
    "an attribute": (change(tasks__sid_seq__input="{history.__class__}"), "tasks: sid_seq: input is"),
    "an index": (change(tasks__sid_seq__input="{history[0]}"), "tasks: sid_seq: input is"),
    "a width": (change(tasks__sid_seq__input="{history:>9999999999}"), "tasks: sid_seq: input is"),
    "a conversion": (change(tasks__sid_seq__input="{history!r}"), "tasks: sid_seq: input is"),
    "a nameless field": (change(tasks__sid_seq__input="{history} {}"), "tasks: sid_seq: input is"),
    "a brace": (change(tasks__sid_seq__input="{history"), "tasks: sid_seq: input is '{history'"),
}  # fmt: skip


@pytest.mark.parametrize("case", TEMPLATES)
def test_a_bad_template_names_the_key(tmp_path, case):
    changed, found = TEMPLATES[case]
    template = yaml.safe_load(DEFAULT_TEMPLATE.read_text())
    changed(template)
    path = tmp_path / "template.yaml"
    path.write_text(yaml.safe_dump(template))
    with pytest.raises(UserError) as refused:
        Prompts(path)
    message = str(refused.value)
    assert message.startswith(f"{path}: not a prompt template: ") and found in message and "\n" not in message


@pytest.mark.parametrize("content", [b"", b"- x", b"a: b: c", b"\xff", b"x: !!python/object:os.system ls", b"[" * 9999])
def test_a_file_that_is_no_template(tmp_path, content):
    (tmp_path / "template.yaml").write_bytes(content)
    with pytest.raises(UserError, match="template.yaml"):
        Prompts(tmp_path / "template.yaml")


def test_a_template_may_word_more_tasks_and_name_the_category_anywhere(tmp_path):
    template = yaml.safe_load(DEFAULT_TEMPLATE.read_text())
    template["tasks"]["mine"] = {"instruction": "{category}", "input": "{item} of {category} {{x}}"}
    (tmp_path / "template.yaml").write_text(yaml.safe_dump(template), encoding="utf-8-sig")
    prompt = Prompts(tmp_path / "template.yaml", category="toys").render("mine", item="Ball")
    assert prompt == "toys\nBall of toys {x}\n"
