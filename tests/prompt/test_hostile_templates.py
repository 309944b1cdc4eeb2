"""A chat template is foreign code: it ends soon, in little memory, with one clear error or harmless text."""

import json
import subprocess
import sys
import time

import pytest

from mlx_qwen.errors import CheckpointError, MLXQwenError, PromptError
from mlx_qwen.prompt import Processor, metered
from mlx_qwen.prompt.template import ChatTemplate
from tests.support.tokenizers import tiny_tokenizer

MESSAGES = [{"role": "user", "content": "Hi there, how are you today?"}]
NEST = "{% for i in range(99999) %}"
GROW = "{% set ns = namespace(s='ab') %}" + NEST
HOSTILE = {
    # Time.
    "nested_loops": NEST * 4 + "{% endfor %}" * 4,
    "nested_loops_with_output": NEST * 3 + "x" + "{% endfor %}" * 3,
    "loop_over_generator": "{% for i in range(99999)|map('string') %}" + NEST * 2 + "{% endfor %}" * 3,
    "quadratic_map": NEST + "{{ range(99999)|map('string')|list|length }}{% endfor %}",
    "exponential_macro": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "endless_recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "mutual_recursion": "{% macro f() %}{{ g() }}{% endmacro %}{% macro g() %}{{ f() }}{% endmacro %}{{ f() }}",
    "recursive_loop": "{% for a in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
    "block_in_itself": "{% block a %}{{ self.a() }}{% endblock %}",
    "caller_recursion": "{% macro f() %}{% call f() %}{{ caller() }}{% endcall %}{% endmacro %}{{ f() }}",
    "sorted_in_loops": NEST + "{{ range(99999)|sort|length }}{% endfor %}",
    "sum_of_lists": NEST + "{{ ([[1]] * 9999)|sum(start=[])|length }}{% endfor %}",
    "unique_in_loops": NEST + "{{ range(99999)|unique|list|length }}{% endfor %}",
    "power": "{{ 10 ** (10 ** 9) }}",
    "tower_of_powers": "{% set x = 9 ** 9 ** 9 %}{{ x ** x }}",
    "repeated_squares": "{% set ns = namespace(x=9) %}" + NEST + "{% set ns.x = ns.x * ns.x %}{% endfor %}{{ ns.x }}",
    "striptags": "{{ ('<' * 99999)|striptags }}",
    "urlize": "{{ ('http://a.b ' * 99999)|urlize }}",
    "wordwrap": "{{ ('a ' * 999999)|wordwrap(1) }}",
    "lipsum": "{{ lipsum(n=10**9) }}",
    # Memory.
    "times": "{{ 'x' * 10 ** 10 }}",
    "times_reversed": "{{ (10 ** 10) * 'x' }}",
    "list_times": "{{ ([0] * 10 ** 9)|length }}",
    "tuple_times": "{{ ((0, 1) * 10 ** 9)|length }}",
    "set_by_times": "{% set x = 'x' * 10 ** 9 %}ok",
    "constant_in_if": "{% if 'x' * 10 ** 10 %}ok{% endif %}",
    "doubled_by_plus": GROW + "{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s|length }}",
    "doubled_by_tilde": GROW + "{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s|length }}",
    "doubled_by_block": GROW + "{% set x %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = x %}{% endfor %}",
    "doubled_by_macro": "{% macro f(s) %}{{ s }}{{ s }}{% endmacro %}" + GROW + "{% set ns.s = f(ns.s) %}{% endfor %}",
    "doubled_by_join": GROW + "{% set ns.s = [ns.s, ns.s]|join %}{% endfor %}",
    "doubled_by_method_join": GROW + "{% set ns.s = ''.join([ns.s, ns.s]) %}{% endfor %}",
    "doubled_by_format": GROW + "{% set ns.s = '%s%s' % (ns.s, ns.s) %}{% endfor %}",
    "doubled_by_format_filter": GROW + "{% set ns.s = '%s%s'|format(ns.s, ns.s) %}{% endfor %}",
    "doubled_by_format_method": GROW + "{% set ns.s = '{0}{0}'.format(ns.s) %}{% endfor %}",
    "doubled_by_replace": GROW + "{% set ns.s = ns.s|replace('a', 'aa') %}{% endfor %}",
    "doubled_by_replace_method": GROW + "{% set ns.s = ns.s.replace('', 'aa') %}{% endfor %}",
    "doubled_list": "{% set ns = namespace(s=[1]) %}" + NEST + "{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "laughs": "{% set ns = namespace(s=['lol']) %}" + NEST + "{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s }}",
    "laughing_dict": "{% set ns = namespace(s=1) %}" + NEST + "{% set ns.s = {'a': ns.s, 'b': ns.s} %}{% endfor %}",
    "laughing_dict_call": "{% set ns = namespace(s=1) %}" + NEST + "{% set ns.s = dict(a=ns.s, b=ns.s) %}{% endfor %}",
    "laughing_batch": "{% set ns = namespace(s=1) %}" + NEST
    + "{% for b in [ns.s]|batch(2, ns.s) %}{% set ns.s = b %}{% endfor %}{% endfor %}",
    "laughing_json": "{% set ns = namespace(s=['lol']) %}" + NEST + "{% set ns.s = (ns.s, ns.s) %}{% endfor %}"
    "{{ ns.s|tojson }}",
    "namespace_laughs": "{% set a = namespace() %}{% set b = namespace() %}{% set a.x = b %}{% set b.x = a %}{{ a }}",
    "map_center": "{{ range(99999)|map('center', 99999)|list|length }}",
    "center": "{{ 'x'|center(10 ** 9) }}",
    "center_method": "{{ 'x'.center(10 ** 9) }}",
    "ljust": "{{ 'x'.ljust(10 ** 9) }}",
    "zfill": "{{ 'x'.zfill(10 ** 9) }}",
    "expandtabs": "{{ ('\t' * 9999).expandtabs(99999) }}",
    "translate": "{{ ('a' * 99999).translate({97: 'b' * 99999}) }}",
    "indent": "{{ ('x\n' * 9999)|indent(99999) }}",
    "indent_by_text": "{{ ('x\n' * 99999)|indent('y' * 99999) }}",
    "json_indent": "{{ [[[[[[[[1]]]]]]]]|tojson(indent=10 ** 8) }}",
    "batch": "{{ [1]|batch(10 ** 9, 'x')|list }}",
    "slice": "{{ [1]|slice(10 ** 9)|list }}",
    "percent_width": "{{ '%1000000000d' % 1 }}",
    "percent_star": "{{ '%*d' % (10 ** 9, 1) }}",
    "percent_precision": "{{ '%.1000000000f' % 1.5 }}",
    "percent_dictionary": "{{ ('%(a)s' * 99999) % {'a': 'x' * 99999} }}",
    "format_width": "{{ '{:1000000000}'.format(1) }}",
    "format_nested": "{{ '{:{}}'.format(1, '1000000000') }}",
    "format_deep": "{{ '{0:{1[0]}}'.format(1, [10 ** 9]) }}",
    "format_map": "{{ '{a:1000000000}'.format_map({'a': 1}) }}",
    "format_filter": "{{ '%1000000000d'|format(1) }}",
    "format_repeated": "{{ ('{0}' * 99999).format('x' * 99999) }}",
    "join_long": "{{ range(99999)|join('x' * 99999) }}",
    "join_long_method": "{{ ('x' * 99999).join(['a'] * 99999) }}",
    "replace_long": "{{ ('x' * 99999)|replace('x', 'y' * 99999) }}",
    "replace_long_method": "{{ ('x' * 99999).replace('x', 'y' * 99999) }}",
    "letters": "{{ ('ü' * 3999999)|list|length }}",
    "kept_ranges": "{% set ns = namespace(k=[]) %}" + NEST + "{% set ns.k = [range(99999)|list, ns.k] %}{% endfor %}",
    "endless_output": NEST * 3 + "{{ 'x' * 9999 }}" + "{% endfor %}" * 3,
    "tojson_in_loop": NEST * 2 + "{{ messages|tojson }}" + "{% endfor %}" * 2,
    "huge_range": "{{ range(10 ** 12)|list }}",
    # Errors.
    "raise_none": "{{ raise_exception(none) }}",
    "raise_list": "{{ raise_exception([messages, 1]) }}",
    "raise_nothing": "{{ raise_exception() }}",
    "raise_undefined": "{{ raise_exception(nothing) }}",
    "raise_long": "{{ raise_exception('x' * 99999) }}",
    "raise_two": "{{ raise_exception('a', 'b') }}",
    "undefined_attribute": "{{ nothing.at.all }}",
    "undefined_call": "{{ nothing() }}",
    "text_and_number": "{{ 'a' + 1 }}",
    "division": "{{ 1 / 0 }}",
    "modulo": "{{ 1 % 0 }}",
    "not_callable": "{{ messages() }}",
    "wrong_arguments": "{{ 'a'.split(1, 2, 3) }}",
    "empty_separator": "{{ 'a'.split('') }}",
    "bad_index": "{{ [].index(3) }}",
    "unpacking": "{% for a, b in messages[0].content %}{% endfor %}",
    "loop_over_number": "{% for a in 3 %}{% endfor %}",
    "bad_json": "{{ namespace()|tojson }}",
    "function_as_json": "{{ raise_exception|tojson }}",
    "strftime_of_list": "{{ strftime_now([]) }}",
    "attribute_of_type": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals_of_function": "{{ raise_exception.__globals__ }}",
    "attr_filter": "{{ messages|attr('__class__')|attr('__init__') }}",
    "format_escape": "{{ '{0.__class__.__mro__}'.format(1) }}",
    "changes_messages": "{{ messages.append(1) }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import '/etc/passwd' as x %}",
    "extends": "{% extends 'x' %}",
    "half_a_character": "{{ '\\ud800' }}",
    # Sources.
    "no_such_filter": "{{ 'a'|nothing }}",
    "no_such_test": "{{ 'a' is nothing }}",
    "unclosed": "{% for a in b %}",
    "deep_parentheses": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "deep_attributes": "{{ messages" + ".a" * 20000 + " }}",
    "deep_not": "{{ " + "not " * 20000 + "1 }}",
    "deep_blocks": "{% for a in [1] %}" * 200 + "{% endfor %}" * 200,
    "deep_ifs": "{% if 1 %}" * 500 + "{% endif %}" * 500,
    "deep_lists": "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    "long_source": "x" * 1_000_001,
}  # fmt: skip
MAY_RENDER = {"attribute_of_type", "attr_filter", "format_escape", "deep_ifs", "bad_json", "namespace_laughs"}
MAY_RENDER |= {"center_method", "set_by_times", "globals_of_function", "raise_undefined"}


def render(source: str) -> str:
    one = Processor(tiny_tokenizer(), template=ChatTemplate({"default": source}), end_token_ids=frozenset())
    return one.decode(one.chat_ids(MESSAGES))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_ends_in_one_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metered, "SECONDS", 0.5)
    started = time.thread_time()
    try:
        text = render(HOSTILE[name])
    except (PromptError, CheckpointError) as error:
        assert "chat template" in str(error) or "UTF-8" in str(error)
        assert len(str(error)) < 1000
    else:
        assert name in MAY_RENDER
        assert len(text) < 500
    assert time.thread_time() - started < 4


def test_hostile_templates_take_little_memory() -> None:
    program = (
        "import json, resource, sys\n"
        "from tests.prompt.test_hostile_templates import HOSTILE, metered, render\n"
        "metered.SECONDS = 0.5\n"
        "from mlx_qwen.errors import MLXQwenError\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for name in json.loads(sys.argv[1]):\n"
        "    try:\n"
        "        render(HOSTILE[name])\n"
        "    except MLXQwenError:\n"
        "        pass\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    command = [sys.executable, "-c", program, json.dumps(list(HOSTILE))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(done.stdout) * unit < 400e6


def test_a_long_chat_is_rendered_as_ever() -> None:
    messages = [
        {"role": role, "content": f"{i} " + "word " * 400} for i in range(500) for role in ("user", "assistant")
    ]
    from tests.prompt.test_chat_template import processor, reference

    expected = reference().apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert processor().apply_chat_template(messages) == expected


def test_no_template_runs_before_it_is_needed(tmp_path) -> None:
    from mlx_qwen.config import ModelConfig
    from tests.support.configs import text_config
    from tests.support.tokenizers import add_tokenizer

    add_tokenizer(tmp_path, template="{{ raise_exception('ran') }}")
    loaded = Processor.from_directory(tmp_path, ModelConfig.from_dict(text_config()))
    assert loaded.encode("plain text works")
    with pytest.raises(MLXQwenError, match="ran"):
        loaded.apply_chat_template(MESSAGES)
