"""The words that `queries` fills its templates with. Data only; every text here was written for this project."""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FIRST_NAMES = _words(
    """
    Alba Amir Anya Arlo Bianca Bruno Carla Cedric Chen Clara Dalia Dmitri Edith Elias Emeka Esther Farah Felix Gita
    Greta Hamid Hanna Hugo Irma Isaac Ivy Jamal Jonas Jun Kayla Kofi Lara Leon Lina Luca Mabel Mateo Maya Milo Nadia
    Nils Nora Omar Oscar Petra Priya Quinn Rafael Rosa Ruben Sana Selma Simon Tara Theo Tom Uma Vera Victor Wanda
    Xavier Yara Yusuf Zoe
    """
)
LAST_NAMES = _words(
    """
    Abbott Ahmadi Barlow Becker Castro Chandra Dalton Dufour Eklund Farrell Ferrari Gallagher Haas Hughes Ibarra
    Ivanov Jansen Keller Kimura Lambert Lindqvist Marsh Mendez Moreau Nakata Novak Okafor Olsen Palmer Petrov
    Quigley Ramos Reyes Rossi Santos Schulz Silva Tanaka Thorne Ueda Varga Vogel Walsh Weber Wolfe Yamada Young
    Zeller
    """
)
CITIES = _words(
    """
    Aberdeen Antwerp Bergen Bologna Boston Cardiff Chicago Cologne Cork Dakar Denver Dublin Geneva Glasgow Hanoi
    Helsinki Houston Izmir Kyoto Lagos Leeds Lima Lisbon Lyon Madrid Malaga Milan Montreal Nairobi Naples Oslo
    Ottawa Perth Porto Prague Quito Riga Rome Seattle Seville Sydney Tampa Toronto Turin Utrecht Vienna Warsaw
    Zagreb
    """
)
MASCOTS = _words(
    """
    Bears Comets Eagles Falcons Foxes Giants Hawks Kings Lions Owls Pirates Rangers Rovers Sharks Stars Tigers
    United Wanderers Wolves
    """
)
GOODS = _words(
    """
    apples balloons beads books boxes bracelets brushes buttons cakes candles cards chairs coins cookies crayons
    cups donuts eggs flowers folders games hats jars kites lamps lemons lollipops magnets marbles muffins notebooks
    oranges paintings peaches pencils pens photos pies plants plates posters puzzles ribbons roses sandwiches
    scarves shells shirts socks stamps stickers tickets tiles tomatoes towels toys vases
    """
)
PLACES = _words(
    """
    bakery bookstore cafe camp farm factory fair garden gym hotel library market museum office park school shop
    stadium theater zoo
    """
)
RELATIVES = ("brother", "sister", "cousin", "friend", "neighbor", "mother", "father", "uncle", "aunt", "teacher")
TIMES = ("day", "week", "month")

MATH_TEMPLATES = (
    "{A} has {m} {x}. {B} has {k} times as many {x} as {A}. How many {x} do they have together?",
    "{A} bought {n} {x} for ${p} each and {k} {y} for ${q} each. How much did {A} spend in total?",
    "A {place} sells {m} {x} every {time}. If each costs ${p}, how much money does the {place} make in {k} {time}s?",
    "{A} had {b} {x}. {A} gave {n} of them to a {kin} and half of the rest to {B}. How many {x} does {A} have left?",
    "There are {m} rows of {x} on a shelf with {n} {x} in each row. {A} takes away {k} rows. How many {x} are left?",
    "{A} reads {m} pages on Monday and {k} times as many on Tuesday. The book has {b} pages. How many pages are left?",
    "{A} earns ${p} an hour at the {place} and works {n} hours a day. How much does {A} earn in {k} days?",
    "A box holds {m} {x}. {A} filled {k} boxes and had {n} {x} left over. How many {x} did {A} have at first?",
    "{A} and {B} share {b} {x} with {k} other friends equally. How many {x} does each of them get?",
    "It takes {A} {n} minutes to make one of the {x}. How many hours does {A} need to make {m} of them?",
    "{A} saves ${p} every {time}. After {n} {time}s, {A} spends ${q} on {x}. How much money does {A} have left?",
    "The {place} had {b} visitors on Saturday and {k} times fewer on Sunday. How many visitors came on both days?",
    "{A} is {n} years old. {B} is {k} times as old as {A}. How old will {B} be in {m} years?",
    "A bag of {x} costs ${p} and a bag of {y} ${q}. {A} buys {n} of each. How much change does {A} get from $500?",
    "{A} drives {m} miles each day to the {place} and back. How many miles does {A} drive in {k} weeks of {n} days?",
    "Of the {b} {x} at the {place}, {pct}% are red and the rest are blue. How many {x} are blue?",
    "{A} planted {m} {x} in the first year and {n} more in each of the next {k} years. How many {x} are there now?",
    "A {place} ordered {b} {x}. {pct}% of them were broken, and {n} were sold. How many {x} remain?",
    "{A}'s {kin} is {n} inches taller than {B}, who is {m} inches tall. How tall are they together in inches?",
    "{A} bakes {m} {x} an hour. {B} bakes {n} fewer {x} an hour. How many {x} do both bake in {k} hours?",
    "{A} wants to buy {n} {x} at ${p} each but has only ${q}. How much more money does {A} need?",
    "Each of the {m} students at {A}'s school brings {k} {x}. The teacher adds {n} more. How many {x} are there?",
    "{A} ran {n} miles on Monday, twice as far on Tuesday, and {k} miles on Friday. How many miles did {A} run?",
    "A discount of {pct}% is given on {x} that cost ${p} each. How much does {A} pay for {n} of them?",
    "{A} collects {x}. {A} found {n} at the {place}, {k} times that number at home, and lost {m}. How many are left?",
    "{B} has {m} more {x} than {A}. If {A} has {b} {x}, how many {x} do {A} and {B} have altogether?",
    "A train to {city} carries {b} people. At the first stop {n} get off and {m} get on. How many are on it now?",
    "{A} cuts {b} feet of rope into pieces of {k} feet. {B} takes {n} pieces. How many pieces are left?",
)

PERSON, TEAM, CITY, DATE, YEAR, SCORE, SMALL, LARGE, TITLE = range(9)
"""Kinds of value that a column of a table holds."""

SQL_TABLES: tuple[tuple[tuple[str, int], ...], ...] = (
    (("home team", TEAM), ("away team", TEAM), ("venue", CITY), ("date", DATE), ("crowd", LARGE), ("score", SCORE)),
    (("player", PERSON), ("college", CITY), ("position", SMALL), ("team", TEAM), ("pick", SMALL), ("weight", LARGE)),
    (("candidate", PERSON), ("votes", LARGE), ("district", CITY), ("first elected", YEAR), ("result", SCORE)),
    (("title", TITLE), ("directed by", PERSON), ("written by", PERSON), ("air date", DATE), ("episode", SMALL)),
    (("driver", PERSON), ("constructor", TEAM), ("laps", SMALL), ("grid", SMALL), ("points", SMALL), ("year", YEAR)),
    (("nation", CITY), ("gold", SMALL), ("silver", SMALL), ("bronze", SMALL), ("rank", SMALL), ("total", LARGE)),
    (("song", TITLE), ("artist", PERSON), ("label", TEAM), ("release date", DATE), ("peak position", SMALL)),
    (("tournament", CITY), ("winner", PERSON), ("runner-up", PERSON), ("score", SCORE), ("surface", TITLE)),
    (("station", CITY), ("platform", SMALL), ("opened", YEAR), ("passengers", LARGE), ("line", TITLE)),
    (("opponent", TEAM), ("record", SCORE), ("location", CITY), ("attendance", LARGE), ("week", SMALL), ("date", DATE)),
    (("coach", PERSON), ("club", TEAM), ("season", YEAR), ("wins", SMALL), ("losses", SMALL), ("stadium", TITLE)),
    (("mountain", TITLE), ("county", CITY), ("height", LARGE), ("first climbed", YEAR), ("climber", PERSON)),
)
TITLE_WORDS = _words(
    """
    amber anchor autumn blue bridge broken castle crimson crystal distant echo ember empty final forest frozen
    garden golden harbor hidden hollow iron island last lost midnight mirror morning north ocean open paper quiet
    red river road salt second secret shadow silent silver sky small stone storm summer thunder velvet white wild
    winter
    """
)
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip

SQL_LOOKUPS = (
    "What is the {a} when the {b} is {v}?",
    "Which {a} has a {b} of {v}?",
    "What is the {a} with {v} as the {b}?",
    "Name the {a} for {b} of {v}",
    "What {a} has {v} for the {b}?",
    "What was the {a} when {v} was the {b}?",
    "Tell me the {a} that has {b} of {v}",
    "What is the {a} when the {b} is {v}, and the {c} is {w}?",
    "Which {a} has a {b} of {v}, and a {c} of {w}?",
    "Name the {a} when {b} is {v} and {c} is {w}",
    "I want the {a} for {b} {v} and {c} of {w}",
    "What {a} had a {c} of {w} and a {b} of {v}?",
)
SQL_AGGREGATES = (
    "How many {a} have a {b} of {v}?",
    "How many {a} have a {b} of {v} and a {n} larger than {k}?",
    "What is the highest {n} with a {b} of {v}?",
    "What is the lowest {n} that has {v} as the {b}, and {c} of {w}?",
    "What is the average {n} when the {b} is {v}?",
    "What is the total number of {n} for {b} of {v}?",
    "Which {a} has a {n} smaller than {k}, and a {b} of {v}?",
    "What is the {a} with a {n} greater than {k}?",
)
