"""Makes the quickstart's data set: messages to a restaurant, and the booking in each as strict JSON.

    python examples/make_bookings.py [FOLDER]      writes train.jsonl and valid.jsonl; default examples/bookings

A row is {"messages": [system, user, assistant]}. The answer has always the same five keys in the same order:

    {"name": "Mira Olsen", "guests": 4, "day": "saturday", "time": "19:30", "seating": "outside"}

guests is a number, time is on the 24-hour clock (the kitchen serves from 12:00 to 21:45, so "half past seven" can
only be 19:30), seating is "inside", "outside" or null when the guest does not say. The message never holds the answer
as such: numbers are words or digits, days are shortened, times are spoken, guests count themselves ("me and three
friends" are 4), change their mind ("Friday, no, Saturday"), write all in small letters, and mention other days, people
and numbers that are no part of the booking.

Held out: no name, first or last, and no booking (guests, day, time) of the valid rows is in the train rows.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

SEED = 7
NUM_TRAIN = 640
NUM_VALID = 100
KEYS = ("name", "guests", "day", "time", "seating")
SYSTEM = "Write the booking as JSON: name, guests, day, time, seating."

# fmt: off
FIRST_NAMES = (
    "Aaron Abigail Adam Agnes Ahmed Alice Amara Amir Andrea Anita Anton Arjun Astrid Beatrice Ben Bianca Boris Brian "
    "Camila Carlos Carmen Caroline Cecilia Chloe Claire Clara Conor Dana Daniel David Deepa Diana Diego Edith Elena "
    "Elias Emil Emma Eric Esther Ethan Eva Farah Fatima Felix Fiona Frank Gabriel George Grace Greta Hana Hannah Harry "
    "Hassan Helen Henry Hugo Ian Ibrahim Ida Ines Ingrid Irene Isaac Ivan Jack Jana Jasmine Joanna Jonas Joseph Julia "
    "Karim Kate Kenji Kevin Laura Lena Leo Liam Lila Linda Lucas Lucia Magnus Marco Maria Marta Martin Maya Mei Mira "
    "Mohamed Nadia Naomi Nina Noah Nora Oliver Olga Omar Oscar Paul Paula Pedro Peter Petra Priya Rachel Rafael Ravi "
    "Rebecca Robert Rosa Ruth Samir Samuel Sara Sean Simon Sofia Stefan Susan Tara Theo Thomas Tina Tomas Vera Victor "
    "Walter Wendy Yara Yusuf Zoe"
).split()
LAST_NAMES = (
    "Adams Ahmad Allen Alvarez Andersen Baker Bauer Becker Bell Berg Bianchi Brooks Brown Bruno Campbell Carter Castro "
    "Chen Clark Cohen Cole Costa Cruz Davies Diaz Dubois Duran Evans Fischer Fisher Flores Foster Fox Garcia Gomez "
    "Gonzalez Graham Gray Green Gupta Haas Hall Hansen Harris Hayes Hill Hoffman Hughes Ito Jackson Jansen Jensen Jones "
    "Kaya Keller Kelly Khan Kim King Klein Kowalski Kumar Lang Larsen Lee Lewis Lopez Marino Marshall Martinez Mason "
    "Mehta Meyer Miller Moore Morgan Morris Murphy Nguyen Nielsen Novak Olsen Ortiz Owen Park Parker Patel Perez Petrov "
    "Phillips Popov Price Ramos Reed Reyes Ricci Rivera Roberts Romero Rossi Russell Santos Schmidt Scott Shah Silva "
    "Singh Smith Sousa Stewart Stone Suzuki Tanaka Taylor Torres Turner Vargas Vogel Walker Wang Ward Watson Weber Wilson "
    "Wolf Wright Yilmaz Young Zhang"
).split()
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
SHORT_DAYS = ["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"]
SEATS: dict[str | None, list[str]] = {
    "outside": [
        "On the terrace, if you can.", "Somewhere outside, please.", "We'd love to sit in the garden.",
        "Out on the patio please.", "A table outdoors would be great.", "We'd rather sit out in the open air.",
    ],
    "inside": [
        "Inside, please.", "We'd like to sit indoors.", "By the fireplace, if you can.",
        "Not on the terrace, please.", "A table in the dining room would be great.",
        "We'd rather be indoors than in the garden.",
    ],
    None: [""],
}
# {g}: "four", "4", "four people"; {d}: "on Friday", "this Fri"; {t}: "at half past seven", "for 7:30 pm".
REQUESTS = [
    "I'd like to book a table for {g} {d} {t}.",
    "Could we get a table for {g} {d} {t}?",
    "Do you have space for {g} {t} {d}?",
    "We need a table {d} {t} for {g}, please.",
    "A table for {g} please, {d} {t}.",
    "Is anything free {d} {t} for {g}?",
    "Can you fit in {g} {d} {t}?",
    "Please reserve a table {t} {d} for {g}.",
    "Hoping to have dinner at your place {d} {t}, a table for {g}.",
    "{d} {t}, a table for {g}, would that work?",
]
# The guests count themselves; {n} is the whole number in words or digits, {m} is one less.
SELF_COUNTS = [
    "There will be {n} of us.", "We are {n}.", "We'll be {n} in all.", "It's {n} people.", "It is me and {m} friends.",
    "It's myself plus {m} others.",
]
REQUESTS_WITHOUT_GUESTS = [
    "I'd like to book a table {d} {t}.",
    "Could we come {d} {t}?",
    "Do you have anything {t} {d}?",
    "Can we have a table {t}, {d}?",
    "We would like to eat with you {d} {t}.",
]
ALONE = ["It's just me.", "I'll be on my own."]
COUPLE = ["It's my wife and me.", "It's for my husband and me.", "It will be me and a friend."]
NAMES_FIRST = ["Hi, this is {name}.", "{name} here.", "Hello, my name is {name}.", "Good morning, {name} speaking."]
NAMES_LAST = [
    "The name is {name}.", "Under {name}, please.", "Book it for {name}.", "Thanks, {name}", "Cheers, {name}",
    "Please put it under {name}.", "Best wishes, {name}",
]
GREETINGS = ["Hi!", "Hello.", "Good evening.", "", "", ""]
ASIDES = [
    "We were with you last {other_day} and loved it.", "{other_name} told us about your place.",
    "It is my daughter's {small}th birthday.", "You can call me on 555-01{two_digits}.", "We have to leave by ten.",
    "Last time we were {small}, it was lovely.", "We'll come straight from the {hour} o'clock train.",
    "I tried to ring you on {other_day}.", "{other_name} says the soup is the best in town.",
    "My number is 555-01{two_digits}.",
]
# fmt: on


def spoken_time(rng: random.Random, hour: int, minute: int) -> str:
    """One of the ways to say a time of day; without am or pm where a guest would leave it out."""
    hour12 = (hour - 1) % 12 + 1
    after = WORDS[hour12 % 12 + 1]
    here = WORDS[hour12]
    ways = [
        f"{hour}:{minute:02}",
        f"{hour12}:{minute:02} pm" if minute else f"{hour12} pm",
        f"{hour12}.{minute:02}pm" if minute else f"{hour12}pm",
        {0: f"{here} o'clock", 15: f"quarter past {here}", 30: f"half past {here}", 45: f"quarter to {after}"}[minute],
        {0: here, 15: f"{here} fifteen", 30: f"{here} thirty", 45: f"{here} forty-five"}[minute],
    ]
    return rng.choice(["at ", "at ", "for "]) + rng.choice(ways)


def spoken_day(rng: random.Random, day: int) -> str:
    """One of the ways to name a weekday."""
    full, short = DAYS[day], SHORT_DAYS[day]
    if rng.random() < 0.1:
        other = rng.choice([name for name in DAYS if name != full])
        return f"on {other}, no, {rng.choice(['sorry, ', ''])}{full}"
    return rng.choice([f"on {full}", f"on {full}", f"this {full}", f"this coming {full}", f"on {short}", f"this {short}"])


def number(rng: random.Random, value: int) -> str:
    return rng.choice([str(value), WORDS[value], WORDS[value]])


def message(rng: random.Random, booking: dict[str, str | int | None], other_name: str) -> str:
    """A guest's message that means `booking`; its wording is drawn from `rng`."""
    guests, day = int(booking["guests"] or 0), DAYS.index(str(booking["day"]).title())
    hour, minute = map(int, str(booking["time"]).split(":"))
    slots = {"d": spoken_day(rng, day), "t": spoken_time(rng, hour, minute)}
    if guests == 1 or rng.random() < 0.35:
        counts = ALONE if guests == 1 else [*SELF_COUNTS, *(COUPLE if guests == 2 else [])]
        if guests == 2:
            counts = [text for text in counts if "{m}" not in text]
        count = rng.choice(counts).format(n=number(rng, guests), m=number(rng, guests - 1))
        parts = [rng.choice(REQUESTS_WITHOUT_GUESTS).format(**slots), count]
    else:
        group = number(rng, guests) + rng.choice(["", "", " people", " of us"])
        if rng.random() < 0.1 and guests < 12:
            group = f"{number(rng, guests - 1)}, no wait, {number(rng, guests)}"
        parts = [rng.choice(REQUESTS).format(g=group, **slots)]
    parts = [part[0].upper() + part[1:] for part in parts]
    aside = rng.choice(ASIDES).format(
        other_day=rng.choice(DAYS),
        other_name=other_name,
        small=rng.randrange(4, 10),
        two_digits=f"{rng.randrange(100):02}",
        hour=WORDS[rng.randrange(2, 8)],
    )
    extras = [text for text in (rng.choice(SEATS[_seating(booking)]), aside if rng.random() < 0.3 else "") if text]
    rng.shuffle(extras)
    parts += extras
    if rng.random() < 0.5:
        parts.insert(0, rng.choice(NAMES_FIRST).format(name=booking["name"]))
    else:
        parts = [rng.choice(GREETINGS), *parts, rng.choice(NAMES_LAST).format(name=booking["name"])]
    text = " ".join(part for part in parts if part)
    if rng.random() < 0.15:  # typed in a hurry: small letters but for the name
        text = text.lower().replace(str(booking["name"]).lower(), str(booking["name"]))
    return text


def _seating(booking: dict[str, str | int | None]) -> str | None:
    seating = booking["seating"]
    assert seating is None or isinstance(seating, str)
    return seating


def make_rows(rng: random.Random, names: tuple[list[str], list[str]], size: int, taken: set[tuple[object, ...]]) -> list[str]:
    """`size` lines of JSON, no two of the same message; bookings in `taken` are left out, and those made join it."""
    first_names, last_names = names
    lines: dict[str, str] = {}
    made: set[tuple[object, ...]] = set()
    while len(lines) < size:
        booking: dict[str, str | int | None] = {
            "name": f"{rng.choice(first_names)} {rng.choice(last_names)}",
            "guests": rng.choices(range(1, 13), weights=[2, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1])[0],
            "day": rng.choice(DAYS).lower(),
            "time": f"{rng.randrange(17, 22)}:{rng.choice([0, 15, 30, 30, 45]):02}",
            "seating": rng.choice(["inside", "outside", None]),
        }
        key = (booking["guests"], booking["day"], booking["time"])
        if key in taken:
            continue
        made.add(key)
        prompt = message(rng, booking, rng.choice(first_names))
        chat = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": json.dumps(booking)},
        ]
        lines.setdefault(prompt, json.dumps({"messages": chat}))
    taken |= made
    return list(lines.values())


def make(folder: Path) -> None:
    """Write the two files; the same bytes on every machine and Python."""
    rng = random.Random(SEED)
    first_names, last_names = list(FIRST_NAMES), list(LAST_NAMES)
    rng.shuffle(first_names)
    rng.shuffle(last_names)
    taken: set[tuple[object, ...]] = set()
    # The valid rows draw first, so that they stay the same when NUM_TRAIN changes.
    valid = make_rows(rng, (first_names[:30], last_names[:30]), NUM_VALID, taken)
    train = make_rows(rng, (first_names[30:], last_names[30:]), NUM_TRAIN, taken)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.jsonl").write_text("\n".join(train) + "\n", encoding="utf-8")
    (folder / "valid.jsonl").write_text("\n".join(valid) + "\n", encoding="utf-8")


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "bookings")
