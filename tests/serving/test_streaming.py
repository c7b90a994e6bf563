from hypothesis import given
from hypothesis import strategies as st

from forge_harness.serving.streaming import TokenText, text_of


@given(st.lists(st.integers(0, 300)))
def test_a_stream_adds_up_to_the_text_of_all_its_tokens(tokens):
    text = TokenText()
    pieces = [text.add(token) for token in tokens]
    whole = bytes(t for t in tokens if t < 256).decode("utf-8", "replace")
    assert "".join(pieces) + text.end() == whole == text_of(tokens)


def test_a_character_comes_when_its_last_byte_is_there():
    text = TokenText()
    assert [text.add(byte) for byte in "aé€".encode()] == ["a", "", "é", "", "", "€"]
    assert text.end() == ""
