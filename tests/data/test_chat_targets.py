"""Which tokens are the assistant's: as transformers' own mask says it, with tags and without."""

from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from megagpt.data.byte_level_bpe import (
    ByteLevelTokenizer,
    bytes_only,
    save_encoding,
    train_byte_level_bpe,
)
from megagpt.data.chat.answers import Conversation, Rendered, rendered
from megagpt.data.chat.records import ChatRows
from megagpt.data.chat.targets import count, cut, target_bounds
from megagpt.data.chat.template import (
    ChatTemplate,
    ChatTokens,
    TemplateUnusableError,
    choose_template,
)
from megagpt.data.tokenizer import Tokenizer, load_tokenizer
from tests.data.chat_tokenizers import (
    CONVERSATIONS,
    TEMPLATES,
    THINKING,
    TOOLS,
    WITH_CALLS,
    WITH_SYSTEM,
    Messages,
    of_transformers,
    turns,
    without_tags,
    write_chat_tokenizer,
)
from tests.data.model_tokenizers import CORPUS

# Form of template, kind of tokenizer: those that belong together, and awkward ones.
PAIRS = [
    ("chatml", "qwen"),
    ("chatml", "gpt2_with_space"),
    ("llama3", "llama3"),
    ("plain", "llama2"),
    ("inst", "llama2"),
    ("inst", "mistral"),
    ("gemma", "gemma"),
]


def mask(tokenizer: Tokenizer, found: Rendered) -> tuple[list[int], list[int]]:
    """Ids, and 1 for each that is a target."""
    ((ids, starts, ends),) = tokenizer.encode_with_places([found.text])
    targets = np.zeros(len(ids), int)
    for start, end in target_bounds(starts, ends, found.answers).reshape(-1, 2):
        targets[start:end] = 1
    return ids.tolist(), targets.tolist()


def assert_as_transformers(
    directory: Path, template: str, messages: Messages, tools: list | None = None
) -> None:
    """With the template, and with it as it is without tags, the reference having them."""
    expected = of_transformers(directory).apply_chat_template(
        messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True
    )
    assert any(expected["assistant_masks"])
    for form in (template, without_tags(template)):
        (directory / "chat_template.jinja").write_text(form)
        rows = ChatRows(choose_template(None, directory), messages="messages")
        found = rows.text({"messages": messages, "tools": tools})
        assert mask(load_tokenizer(directory), found) == (
            expected["input_ids"],
            expected["assistant_masks"],
        )
    (directory / "chat_template.jinja").write_text(template)


@pytest.mark.parametrize(("form", "kind"), PAIRS)
def test_ids_and_targets_are_those_of_transformers(tmp_path, form, kind):
    directory = write_chat_tokenizer(tmp_path, kind, TEMPLATES[form])
    for messages in CONVERSATIONS:
        assert_as_transformers(directory, TEMPLATES[form], messages)


def test_system_messages_tools_calls_and_reasoning_are_read_as_transformers_reads_them(tmp_path):
    directory = write_chat_tokenizer(tmp_path, "qwen", TEMPLATES["calls"])
    assert_as_transformers(directory, TEMPLATES["calls"], WITH_SYSTEM)
    assert_as_transformers(directory, TEMPLATES["calls"], WITH_CALLS, TOOLS)


def test_an_answer_that_is_written_in_another_way_if_others_follow_is_found(tmp_path):
    """As Qwen 3's: the text of the first messages does not begin the whole text."""
    directory = write_chat_tokenizer(tmp_path, "qwen", THINKING)
    plain = ChatTemplate("thinking", without_tags(THINKING), ChatTokens.of_directory(directory))
    messages = CONVERSATIONS[1]
    assert not plain.text(messages).startswith(plain.text(messages[:2]))
    for conversation in CONVERSATIONS:
        assert_as_transformers(directory, THINKING, conversation)


def test_a_tokenizer_of_ours_gives_what_transformers_makes_of_its_file(tmp_path):
    save_encoding(train_byte_level_bpe(CORPUS, 420), tmp_path)
    reference = PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), eos_token="<|endoftext|>"
    )
    rows = ChatRows(choose_template("plain", None), messages="messages")
    for messages in [*CONVERSATIONS, WITH_SYSTEM]:
        expected = reference.apply_chat_template(
            messages,
            chat_template=TEMPLATES["plain"],
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        found = mask(load_tokenizer(tmp_path), rows.text({"messages": messages}))
        assert found == (expected["input_ids"], expected["assistant_masks"])
        assert 420 - 1 in found[0]


@pytest.mark.parametrize(
    "template",
    [
        # the header of an answer is another one than the prompt's
        "{%- for m in messages %}{{- m.role + ': ' + m.content }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- 'Model: ' }}{%- endif %}",
        # what stands in front depends on how many messages follow
        "{{- messages | length }}{%- for m in messages %}{{- m.content }}{%- endfor %}",
        # an answer is written twice, once among later ones
        "{%- for m in messages %}{{- m.content }}{%- if not loop.last %}|{%- endif %}{%- endfor %}"
        "{%- for m in messages %}{{- m.content }}{%- endfor %}",
    ],
)
def test_a_template_that_does_not_show_the_answers_is_refused(template):
    hidden = ChatTemplate("FILE", template, ChatTokens.of_directory(None))
    with pytest.raises(TemplateUnusableError, match=r"chat template FILE does not show which text"):
        rendered(hidden, Conversation(tuple(turns("a", "b", "c", "d"))))


def test_nested_and_empty_tags_and_filters_around_them_keep_the_text():
    template = ChatTemplate(
        "nested",
        "{% set whole %}{%- for m in messages %}{{ m.role }}:{% generation %}{{ m.content }}"
        "{% generation %}!{% endgeneration %}{% endgeneration %}"
        "{% generation %}{% endgeneration %};{%- endfor %}{% endset %}{{ whole | upper }}",
        ChatTokens.of_directory(None),
    )
    found = rendered(template, Conversation(tuple(turns("a", "bc"))))
    assert found.text == "USER:A!;ASSISTANT:BC!;"
    assert [found.text[slice(*span)] for span in found.answers] == ["A!", "BC!"]


def test_tokens_of_bytes_are_told_by_their_characters():
    """Also the last of several tokens of one character, of which transformers has the first."""
    tokenizer = ByteLevelTokenizer(bytes_only())
    text = "é: 🙂ü<|endoftext|>é"
    ids, targets = mask(tokenizer, Rendered(text, ((3, 5), (6, 18))))
    assert ids == [*"é: 🙂ü".encode(), 256, *"é".encode()]
    #                      é     :  space 🙂            ü     end é
    assert targets == [*[0, 0], 0, 0, *[1, 1, 1, 1], *[1, 1], 1, *[0, 0]]


def test_bounds_are_of_whole_runs_and_the_first_token_is_no_target():
    places = np.arange(10)
    bounds = target_bounds(places, places + 1, ((0, 3), (3, 5), (7, 7), (8, 12)))
    assert bounds.tolist() == [1, 5, 8, 10]
    assert count(bounds) == 6


@pytest.mark.parametrize(
    ("length", "bounds", "lost"),
    [(None, [1, 5, 8, 10], 0), (9, [1, 5, 8, 9], 1), (8, [1, 5], 2), (3, [1, 3], 4), (1, [], 6)],
)
def test_a_cut_keeps_the_targets_before_it(length, bounds, lost):
    kept = cut(np.arange(10, dtype=np.uint32), np.array([1, 5, 8, 10]), length)
    assert kept.bounds.tolist() == bounds
    assert (len(kept.ids), kept.targets_left_out) == (length or 10, lost)
    assert kept.tokens_left_out == 10 - len(kept.ids)
