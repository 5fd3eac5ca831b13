"""Pictures that are not scenes, for MME's other subtasks: letters, sums, landmarks, captions in other languages."""

from __future__ import annotations

import io
import random

from PIL import Image

from demo.questions import YES_OR_NO, Turn
from demo.scenes import COLORS, ground, paste
from demo.stamps import DIGITS, LANDMARKS, LANGUAGES, LETTERS, OBJECTS, OPERATORS, Stamps

SUBTASKS = ("OCR", "numerical_calculation", "landmark", "text_translation")
LONGEST_TRANSLATION = 3  # words; some stamps have a joke for a caption


class Sign:
    """One picture of a subtask, with an open question and a pair of yes/no questions (answers Yes, No)."""

    def __init__(self, subtask: str, key: str, stamps: Stamps, size: int):
        self.rng = random.Random(key)
        self.size = size
        self.picture = ground(self.rng, self.rng.choice(list(COLORS)), size)
        self.stamps = stamps
        {"OCR": self._letter, "numerical_calculation": self._sum, "landmark": self._landmark,
         "text_translation": self._translation}[subtask]()

    def turns(self) -> list[Turn]:
        """The three questions in an order of chance, for training."""
        pairs = [self.open, (self.pair[0], "Yes"), (self.pair[1], "No")]
        self.rng.shuffle(pairs)
        return pairs

    def _show(self, stamp: str, share: float, corner: tuple[int, int], box: int) -> None:
        paste(self.picture, self.stamps.picture(stamp, round(self.size * share)), corner, box, self.rng)

    def _ask(self, open_turn: Turn, yes: str, no: str) -> None:
        self.open, self.pair = open_turn, (yes + YES_OR_NO, no + YES_OR_NO)

    def _letter(self) -> None:
        letter, other = self.rng.sample(list(LETTERS), 2)
        self._show(LETTERS[letter], self.rng.uniform(0.4, 0.7), (0, 0), self.size)
        self._ask(("What letter is in the image?", letter), f'Is the letter in the image "{letter}"?',
                  f'Is the letter in the image "{other}"?')

    def _sum(self) -> None:
        sign = self.rng.choice(list(OPERATORS))
        one, two = self.rng.randint(0, 9), self.rng.randint(0, 9)
        if sign == "-" and one < two:
            one, two = two, one
        result = one + two if sign == "+" else one - two
        wrong = self.rng.choice([n for n in range(max(0, result - 3), result + 4) if n != result])
        third = self.size // 3
        for i, stamp in enumerate((DIGITS[str(one)], OPERATORS[sign], DIGITS[str(two)])):
            self._show(stamp, 0.28, (i * third, third), third)
        words = "the answer to the arithmetic question in the image"
        self._ask((f"What is {words}?", str(result)), f"Is {words} {result}?", f"Is {words} {wrong}?")

    def _landmark(self) -> None:
        name, other = self.rng.sample(list(LANDMARKS), 2)
        self._show(LANDMARKS[name], self.rng.uniform(0.5, 0.8), (0, 0), self.size)
        self._ask(("What is this a picture of?", name.capitalize()), f"Is this a picture of {name}?",
                  f"Is this a picture of {other}?")

    def _translation(self) -> None:
        language = self.rng.choice(list(LANGUAGES.values()))
        words = {name: caption for name in OBJECTS
                 if len((caption := self.stamps.captions(OBJECTS[name]).get(language, "")).split())
                 in range(1, LONGEST_TRANSLATION + 1) and "!" not in caption}
        name = self.rng.choice(list(words))
        other = self.rng.choice([n for n in words if words[n] != words[name]])
        self._show(OBJECTS[name], self.rng.uniform(0.4, 0.7), (0, 0), self.size)
        question = f"the {language} for the object in the image"
        self._ask((f"What is {question}?", words[name]), f'Is "{words[name]}" {question}?',
                  f'Is "{words[other]}" {question}?')


def image_bytes(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "PNG", compress_level=3)
    return stream.getvalue()
