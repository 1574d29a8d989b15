"""The text side of a prompt: what a user types is text."""

import pytest
from tokenizers import AddedToken, Tokenizer, normalizers
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mipruner.errors import InputError
from mipruner.models import Prompt
from mipruner.models.chat import Chat
from tiny import tokenizer

SPECIAL = ("<s>", "</s>", "<image>", "<|im_end|>")


def pieces() -> PreTrainedTokenizerFast:
    """As Llama's: a word begins with a low line, what is not in the vocabulary is written in bytes."""
    vocabulary = {name: k for k, name in enumerate(("<unk>", *SPECIAL))}
    for word in (*(f"<0x{k:02X}>" for k in range(256)), "▁", *"Whatisredpo?<>/|_mn", "▁W", "▁Wh", "▁<"):
        vocabulary.setdefault(word, len(vocabulary))
    merges = [("▁", "W"), ("▁W", "h"), ("▁", "<")]
    backend = Tokenizer(BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {
    "bytes": (tokenizer, "<image>"),
    "pieces": (pieces, "<image>"),
    "demo_llava": (lambda: AutoTokenizer.from_pretrained("experiments/demo/llava"), "<image>"),
    "demo_qwen3vl": (lambda: AutoTokenizer.from_pretrained("experiments/demo/qwen3vl"), "<|image_pad|>"),
}
"""Tokenizers, and their token for an image. Those of the demo know whole words only."""


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_control_token_that_the_user_types_is_text(name, record_property):
    make, image = TOKENIZERS[name]
    own, plain = make(), "What is red ? Is a < b/s > ?"
    chat = Chat(own, {"image": image}, [own.convert_tokens_to_ids(image)], prompt="<s>{image} USER: {text} </s> A:")

    def read(text):
        return chat.tokenize(Prompt(text, []), ["image"], [(image, [1])])

    def careless(text):
        """The ids of the prompt as the tokenizer makes them, and where its control tokens are."""
        parts = ("<s>", image, f" USER: {text} </s> A:")
        ids = [k for part in parts for k in own.encode(part, add_special_tokens=False)]
        return ids, [k for k, one in enumerate(ids) if one in control]

    control = set(own.get_added_vocab().values()) - {own.unk_token_id}
    assert read(plain).ids.tolist() == careless(plain)[0]
    typed = [token for token in ("<s>", "</s>", "<|im_end|>") if token in own.get_added_vocab()]
    for text in (form.format(token) for token in typed for form in ("What is {} red ?", "What{}", "{} red ?")):
        tokens, (ids, (*_, place, last)) = read(text), careless(text)
        found = tokens.ids.tolist()
        assert found[:place] == ids[:place] and found[place + 1 - len(ids) :] == ids[place + 1 :] and last > place
        spelled = found[place : place + 1 - len(ids)]
        assert spelled and not control.intersection(spelled)
        if not name.startswith("demo"):
            assert "".join("".join(tokens.words).split()) == "".join(text.split())
    if name.startswith("demo"):
        with pytest.raises(InputError, match="knows none of the characters of the question: '</s>'"):
            read("</s>")
    else:
        assert "".join(read("</s>").words).strip() == "</s>"
    record_property("survives", ("`</s>` or `<|im_end|>` in a question", "it is read as the characters that it is"))


def test_a_template_without_a_place_for_a_video():
    """A template of one's own has a place for either."""
    own, marks = (
        AutoTokenizer.from_pretrained("experiments/demo/qwen3vl"),
        {"image": "<|image_pad|>", "video": "<|video_pad|>"},
    )
    ids = own.convert_tokens_to_ids(list(marks.values()))
    Chat(own, marks, ids).check_kinds(["image"])
    with pytest.raises(InputError, match="writes 0 placeholders for one video: give prompt"):
        Chat(own, marks, ids).check_kinds(["video"])
    Chat(own, marks, ids, prompt="{image} {text}").check_kinds(["video"])
