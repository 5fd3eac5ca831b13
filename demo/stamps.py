"""The stamps of Debian's tuxpaint-stamps-default that the demo draws with, and their captions in other languages."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

# What tends to be seen together: most objects of a scene come from one theme, and within a theme the first ones
# are more frequent. So some objects are popular and some pairs keep company, as in photographs.
THEMES: dict[str, dict[str, str]] = {
    "farm": {"cow": "animals/mammals/bovines/cow", "horse": "animals/mammals/equines/horse",
             "sheep": "animals/mammals/bovines/sheep", "rooster": "animals/birds/rooster",
             "pig": "animals/mammals/pig", "goat": "animals/mammals/bovines/goat"},
    "kitchen": {"apple": "food/fruit/apple_red", "teapot": "household/dishes/teapot",
                "pizza": "food/pizza", "mug": "household/dishes/mug",
                "cake": "food/dessert/cartoon/birthday_cake", "kettle": "household/kettle"},
    "street": {"car": "vehicles/auto/beetle", "bus": "vehicles/masstransit/cartoon/double_decker_bus",
               "train": "vehicles/locomotive/cartoon/toy_train", "truck": "vehicles/auto/truck",
               "balloon": "vehicles/flight/balloon360", "tractor": "vehicles/farming/cartoon/tux_tractor"},
    "savanna": {"elephant": "animals/mammals/elephant", "zebra": "animals/mammals/equines/zebra",
                "giraffe": "animals/mammals/giraffe", "lion": "animals/mammals/cats/lion",
                "camel": "animals/mammals/camel/camel", "gorilla": "animals/mammals/apes/gorilla"},
    "garden": {"rose": "plants/flowers/rose", "butterfly": "animals/insects/cartoon/butterfly",
               "ladybug": "animals/insects/cartoon/ladybug", "daffodil": "plants/flowers/daffodil",
               "snail": "animals/insects/cartoon/snail", "frog": "animals/amphibians/frog"},
    "market": {"banana": "food/fruit/cartoon/banana", "strawberry": "food/fruit/strawberry",
               "tomato": "food/vegetables/tomato", "pear": "food/fruit/cartoon/pear",
               "broccoli": "food/vegetables/broccoli", "lemon": "food/fruit/lemon"},
    "forest": {"bear": "animals/mammals/bears/bear", "deer": "animals/mammals/deer/deer",
               "owl": "animals/birds/owl", "squirrel": "animals/mammals/rodents/squirrel",
               "rabbit": "animals/mammals/rodents/rabbit", "mushroom": "food/vegetables/mushroom"},
    "sea": {"penguin": "animals/birds/cartoon/tux", "dolphin": "animals/mammals/aquatic/dolphin",
            "boat": "vehicles/ship/chineseJunk", "duck": "animals/birds/duck",
            "orca": "animals/mammals/aquatic/orca", "seahorse": "animals/fish/seahorse"},
    "village": {"tree": "plants/trees/tree336", "windmill": "town/houses/cartoon/windmill",
                "castle": "town/houses/cartoon/fairytale_castle", "tent": "town/houses/cartoon/tent",
                "snowman": "people/cartoon/snowman", "igloo": "town/houses/cartoon/igloo"},
    "workshop": {"hammer": "household/tools/hammer", "toolbox": "household/tools/toolbox",
                 "lightbulb": "household/Lightbulb", "saw": "household/tools/saw",
                 "camera": "hobbies/camera_35mm", "guitar": "hobbies/music/string/guitar_classical"},
}
OBJECTS: dict[str, str] = {name: stamp for theme in THEMES.values() for name, stamp in theme.items()}
THEME_OF: dict[str, str] = {name: theme for theme, names in THEMES.items() for name in names}

LETTERS = {letter: f"symbols/alphabets/english/filled/uppercase/{letter}_filled"
           for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"}
DIGITS = {str(digit): f"symbols/math/{digit}" for digit in range(10)}
OPERATORS = {"+": "symbols/math/operators/op0_plus", "-": "symbols/math/operators/op1_minus"}
LANDMARKS = {"the Eiffel tower": "town/monuments/cartoon/eiffel_tower", "a pyramid": "town/monuments/cartoon/pyramid",
             "an obelisk": "town/monuments/cartoon/obelisk", "a totem pole": "town/monuments/cartoon/totem",
             "an inukshuk": "town/monuments/inukshuk-photo", "a graveyard": "town/monuments/cartoon/graveyard",
             "a statue": "town/monuments/cartoon/statue", "a stone circle": "town/monuments/cartoon/magic_stones"}
LANGUAGES = {"de": "German", "es": "Spanish", "fr": "French", "it": "Italian"}


class Stamps:
    """Reads stamps from a folder, cut to what is not transparent; each is kept once read.

    Raises:
        FileNotFoundError: the folder lacks a stamp.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._pictures: dict[str, Image.Image] = {}
        self._captions: dict[str, dict[str, str]] = {}
        self._sized: dict[tuple[str, int, bool], Image.Image] = {}

    def picture(self, stamp: str, size: int, mirrored: bool = False) -> Image.Image:
        """RGBA, the longer side `size` pixels."""
        key = (stamp, size, mirrored)
        if key not in self._sized:
            if stamp not in self._pictures:
                with Image.open(self.folder / f"{stamp}.png") as file:
                    picture = file.convert("RGBA")
                self._pictures[stamp] = picture.crop(picture.getchannel("A").getbbox())
            picture = self._pictures[stamp]
            scale = size / max(picture.size)
            # Premultiplied alpha, so that the colour of transparent pixels does not bleed into the edges.
            small = picture.convert("RGBa").resize(
                tuple(max(2, round(side * scale)) for side in picture.size), Image.Resampling.BOX).convert("RGBA")
            self._sized[key] = small.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else small
        return self._sized[key]

    def captions(self, stamp: str) -> dict[str, str]:
        """The stamp's caption in each of LANGUAGES that it has, without the full stop: {"French": "Une vache"}."""
        if stamp in self._captions:
            return self._captions[stamp]
        captions = self._captions[stamp] = {}
        for line in (self.folder / f"{stamp}.txt").read_text(encoding="utf-8").splitlines():
            key, _, text = line.partition("=")
            language = LANGUAGES.get(key.removesuffix(".utf8"))
            if language and text.strip():
                captions[language] = text.strip().rstrip(".")
        return captions
