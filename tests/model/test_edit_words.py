"""Instructions read into captions: what is understood, and one line for what is not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.edit_words import Instruction, is_instruction, read_instruction
from model.errors import ModelError

ONE = "a red circle at the top left on a white background"
TWO = "a white triangle above a blue square on a red background"
LIST = "a red star, a blue cross and a green circle on a white background"


@pytest.mark.parametrize(
    ("instruction", "caption", "operation", "prompt"),
    [
        ("change the circle to blue", ONE, "local",
         "a blue circle at the top left on a white background"),
        ("Change the red circle to orange.", ONE, "local",
         "an orange circle at the top left on a white background"),
        ("make the circle blue", ONE, "local",
         "a blue circle at the top left on a white background"),
        ("replace the red circle with a yellow star", ONE, "local",
         "a yellow star at the top left on a white background"),
        ("turn the circle into a star", ONE, "local",
         "a star at the top left on a white background"),
        ("turn the circle into apple", ONE, "local",
         "an apple at the top left on a white background"),
        ("make the background green", ONE, "background",
         "a red circle at the top left on a green background"),
        ("change the white background to a black one", ONE, "background",
         "a red circle at the top left on a black one"),
        ("make the circle striped", ONE, "texture",
         "a red striped circle at the top left on a white background"),
        ("remove the white triangle", TWO, "remove", "a blue square on a red background"),
        ("delete the blue square", TWO, "remove", "a white triangle on a red background"),
        ("remove the circle", ONE, "remove", "a white background"),
        ("erase the star", LIST, "remove", "a blue cross and a green circle on a white background"),
        ("remove the cross", LIST, "remove", "a red star and a green circle on a white background"),
        ("make the sky dark blue", "a bird in a light red sky", "local",
         "a bird in a dark blue sky"),
        ("change the car to be green", "a red car on a road", "local", "a green car on a road"),
        ("change the background to a beach", "a red car", "background",
         "a red car, with a beach in the background"),
        ("make the background pale green", "a red car", "background",
         "a red car, on a pale green background"),
        ("change the background to a beach", "a dog on a grey background", "background",
         "a dog on a beach"),
        ("turn the day into night", "a road in a town", "global", "a road in a town, at night"),
        ("turn day to night", "a road by day.", "global", "a road at night"),
        ("turn the summer into winter", "a summer meadow", "global", "a winter meadow"),
        ("add a hat to the dog", "a dog on the grass", "add", "a dog with a hat on the grass"),
        ("add a tree to the picture", "a house", "add", "a house and a tree"),
        ("add a tree to the left", "a house", "add", "a house and a tree to the left"),
        ("add a tree", "a house", "add", "a house and a tree"),
        ("make it snow", "a house.", "global", "a house, snow"),
        ("make it look like a woodcut", "a house", "style", "a house, in the style of a woodcut"),
        ("in the style of Klimt", "a house", "style", "a house, in the style of Klimt"),
    ],
)  # fmt: skip
def test_what_is_understood(instruction: str, caption: str, operation: str, prompt: str) -> None:
    assert read_instruction(instruction, caption) == Instruction(operation, prompt)


@pytest.mark.parametrize(
    ("instruction", "caption", "line"),
    [
        ("remove the dog", ONE, "the caption does not name 'dog'"),
        ("change the (.*+ to blue", ONE, "the caption does not name"),
        ("improve it somehow", ONE, "is not understood"),
        ("make the man smile", "a man on a road", "is not understood"),
        ("make the car bigger", "a car on a road", "is not understood"),
        ("make the grass taller", "a dog on the grass", "is not understood"),
        ("change the car to be bigger", "a car on a road", "is not understood"),
        ("add a hat to the cat", "a dog on the grass", "does not name 'cat'"),
        ("", ONE, "is not understood"),
        ("remove the circle", " ", "needs a caption"),
    ],
)
def test_what_is_not(instruction: str, caption: str, line: str) -> None:
    with pytest.raises(ModelError, match=line) as caught:
        read_instruction(instruction, caption)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "words",
    ["make the man smile", "make the car bigger", "move the car to the left", "give her a hat"],
)
def test_what_is_told_but_not_understood_is_no_caption(words: str) -> None:
    assert is_instruction(words)


@pytest.mark.parametrize("words", [ONE, TWO, LIST, "painting of a dog", "a man makes the bed"])
def test_captions_tell_nothing(words: str) -> None:
    assert not is_instruction(words)


@given(st.text(max_size=60), st.text(max_size=60))
def test_any_text_is_read_or_refused(instruction: str, caption: str) -> None:
    try:
        read = read_instruction(f"change the {instruction} to red", caption)
    except ModelError:
        return
    assert read.prompt
    assert "  " not in read.prompt
