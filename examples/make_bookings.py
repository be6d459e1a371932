"""Makes the quickstart's data set: messages to a restaurant, and the booking in each as strict JSON.

    python examples/make_bookings.py [FOLDER]     writes train.jsonl, valid.jsonl; default examples/bookings

A row is {"messages": [system, user, assistant]}. The answer always has the same five keys in the same order:

    {"name": "Mira Olsen", "guests": 4, "day": "saturday", "time": "19:30", "seating": "outside"}

`time` is on the 24-hour clock (dinner is from 17:00 to 21:45, so "half past seven" can only be 19:30);
`seating` is "inside", "outside", or null when the guest does not say. Little can be copied: numbers are words
or digits, days are shortened, times are spoken, guests count themselves ("me and three friends" are 4),
change their mind ("Friday, no, Saturday"), write in small letters, and mention other days and numbers.

Held out: no first or last name and no booking (guests, day, time) of the valid rows is in the train rows.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import NamedTuple

SEED = 7
NUM_TRAIN = 600
NUM_VALID = 100
SYSTEM = "Write the booking as JSON: name, guests, day, time, seating."

FIRST_NAMES = """
Aaron Abigail Adam Adele Agnes Ahmed Alan Albert Alice Alina Amara Amelia Amir Andrea Angela Anita Anton
Antonia Arjun Astrid Axel Barbara Beatrice Bella Ben Bernard Bianca Blake Boris Brian Callum Camila Carla
Carlos Carmen Caroline Cecilia Chiara Chloe Claire Clara Conor Cyrus Dana Daniel Daphne David Dean Deepa
Denise Derek Diana Diego Dora Duncan Edgar Edith Eileen Eleanor Elena Elias Ella Elsa Emil Emma Enzo Eric
Erica Esther Ethan Eugene Eva Farah Fatima Felix Fiona Flora Floyd Frank Gabriel Gavin Gemma George Gloria
Gordon Grace Greta Gus Hana Hannah Harold Harry Hassan Hazel Heidi Helen Henry Hilda Hugo Ian Ibrahim Ida
Igor Imran Ines Ingrid Irene Isaac Isabel Ivan Ivy Jack Jacob Jade Jamal Jana Jasmine Jasper Jerome Joan
Joanna Jonas Jorge Joseph Judith Julia Julian Karim Kate Kenji Kevin Kira Kurt Lara Laura Leah Leila Lena
Leo Leonard Liam Lila Lily Linda Lorenzo Louise Lucas Lucia Luna Lydia Mabel Magnus Malik Marcel Marco
Margot Maria Marie Marlon Marta Martin Matteo Mavis Maya Mei Melissa Milan Milo Mira Mohamed Molly Monica
Mustafa Nadia Naomi Nathan Nicole Nigel Nina Noah Noel Nora Norman Odette Olga Olive Oliver Omar Oscar Otto
Pablo Pamela Paul Paula Pedro Penny Peter Petra Philip Polly Priya Quentin Rachel Rafael Ralph Ramona Ravi
Raymond Rebecca Regina Rita Robert Roland Roman Ronan Rosa Rosie Rupert Ruth Sabine Sally Salma Samir Samuel
Sandra Sara Sean Selma Sergio Shane Silvia Simon Sofia Stefan Stella Susan Sven Sylvia Tamara Tara Teresa
Theo Thomas Tina Tobias Tomas Tony Trevor Umar Ursula Valerie Vera Victor Vincent Viola Walter Wanda Warren
Wendy Wilma Xavier Yara Yusuf Yvonne Zara Zoe
"""
LAST_NAMES = """
Abbott Acosta Adams Ahmad Allen Alvarez Andersen Archer Atkins Avila Baker Barnes Barrett Bates Bauer Becker
Bell Benson Berg Bianchi Bishop Blair Bowen Boyd Bradley Briggs Brooks Brown Bruno Burke Burns Byrne
Calderon Cameron Campbell Cannon Carr Carter Castro Chavez Chen Chung Clark Cohen Cole Conte Costa Craig
Cross Cruz Dalton Davies Dawson Decker Diaz Dixon Doyle Drake Dubois Dunn Duran Eklund Ellis Evans Farrell
Ferrari Finch Fischer Fisher Fleming Flores Flynn Ford Foster Fox Franco Frost Fuchs Gallo Garcia Gibson
Glover Gomez Gonzalez Goodwin Graham Grant Gray Green Griffin Gross Guerra Gupta Haas Haines Hall Hammond
Hansen Harris Harvey Hayes Heath Herrera Hill Hoang Hoffman Hogan Holmes Horn Howard Hughes Hunt Ibarra Ito
Ivanov Jackson Jacobs Jansen Jensen Jimenez Jones Kang Kaufman Kaya Keller Kelly Kent Khan Kim King Kirby
Klein Knight Koch Kovacs Kowalski Kruger Kumar Lambert Lane Lang Larsen Larson Lee Leon Lewis Lim Lindgren
Logan Lopez Lowe Lund Malone Mancini Marino Marsh Marshall Martinez Mason Medina Mehta Mendez Meyer Miller
Moore Moreno Morgan Morris Moss Mueller Murphy Nash Newton Nguyen Nielsen Nolan Norris Novak Okafor Olsen
Ortiz Osborne Owen Pace Palmer Park Parker Patel Payne Pearce Pereira Perez Petrov Phillips Popov Porter
Powell Price Quinn Ramos Ramsey Reed Reyes Rhodes Ricci Richter Riley Rivera Roberts Rojas Romero Rossi Rowe
Ruiz Russell Santoro Santos Sato Schmidt Schultz Scott Shah Sharma Shaw Silva Simmons Singh Smith Soto Sousa
Spencer Steele Stein Stewart Stone Sutton Suzuki Swan Tanaka Tate Taylor Thorne Torres Tran Tucker Turner
Underwood Valdez Vargas Vaughn Vega Vogel Wagner Walker Walsh Wang Ward Watson Webb Weber Wells West Wilson
Winters Wolf Wood Wright Yates Yilmaz York Young Zhang Zimmer
"""
WORDS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
SEATS = {
    "outside": [
        "On the terrace, if you can.",
        "Somewhere outside, please.",
        "We'd love to sit in the garden.",
        "Out on the patio please.",
        "A table outdoors would be great.",
        "In the open air, please.",
    ],
    "inside": [
        "Inside, please.",
        "We'd like to sit indoors.",
        "By the fireplace, if you can.",
        "Not on the terrace, please.",
        "A table in the dining room would be great.",
        "Indoors, not in the garden.",
    ],
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
    "Hoping for a table {d} {t} for {g}.",
    "{d} {t}, a table for {g}, would that work?",
]
# {n}: all guests, in words or digits; {m}: one less.
COUNTS = ["There will be {n} of us.", "We are {n}.", "We'll be {n} in all.", "It's {n} people."]
FRIENDS = ["It is me and {m} friends.", "It's myself plus {m} others."]
REQUESTS_WITHOUT_GUESTS = [
    "I'd like to book a table {d} {t}.",
    "Could we come {d} {t}?",
    "Do you have anything {t} {d}?",
    "Can we have a table {t}, {d}?",
    "We'd like to come {d} {t}.",
]
ALONE = ["It's just me.", "I'll be on my own."]
COUPLES = ["It's my wife and me.", "It's for my husband and me.", "It will be me and a friend."]
NAMES_FIRST = [
    "Hi, this is {name}.",
    "{name} here.",
    "Hello, my name is {name}.",
    "Good morning, {name} speaking.",
]
NAMES_LAST = [
    "The name is {name}.",
    "Under {name}, please.",
    "Book it for {name}.",
    "Thanks, {name}",
    "Cheers, {name}",
    "Please put it under {name}.",
    "Best wishes, {name}",
]
GREETINGS = ["Hi!", "Hello.", "Good evening.", "", "", ""]
ASIDES = [
    "We were with you last {other_day} and loved it.",
    "{other_name} told us about your place.",
    "It is my daughter's {small}th birthday.",
    "You can call me on 555-01{two_digits}.",
    "We have to leave by ten.",
    "Last time we were {small}, it was lovely.",
    "We'll come straight from the {hour} o'clock train.",
    "I tried to ring you on {other_day}.",
    "{other_name} says the soup is the best in town.",
    "My number is 555-01{two_digits}.",
]


class Booking(NamedTuple):
    """What a message means; the keys of the answer, in its order."""

    name: str
    guests: int
    day: str
    time: str
    seating: str | None


def spoken_time(rng: random.Random, time: str) -> str:
    """One of the ways to say a time of the afternoon or evening, "19:30"."""
    hour, minute = map(int, time.split(":"))
    hour12 = (hour - 1) % 12 + 1
    here = WORDS[hour12]
    words = f"{here} {['', 'fifteen', 'thirty', 'forty-five'][minute // 15]}".strip()
    # No "quarter to nine": 600 rows did not teach this model that it is 20:45; half of all errors were there.
    spoken = [f"{here} o'clock", f"quarter past {here}", f"half past {here}", words][minute // 15]
    pm = rng.choice([f"{hour12}:{minute:02} pm", f"{hour12}.{minute:02}pm"]) if minute else f"{hour12}pm"
    ways = [f"{hour}:{minute:02}", pm, spoken, words]
    return rng.choice(["at ", "at ", "for "]) + rng.choice(ways)


def spoken_day(rng: random.Random, day: str) -> str:
    """One of the ways to name a weekday, "friday"; one in ten corrects itself."""
    full = day.title()
    short = full[:3]
    if rng.random() < 0.1:
        other = rng.choice([name for name in DAYS if name != full])
        return f"on {other}, no, {rng.choice(['sorry, ', ''])}{full}"
    return rng.choice(
        [f"on {full}", f"on {full}", f"this {full}", f"this coming {full}", f"on {short}", f"this {short}"]
    )


def number(rng: random.Random, value: int) -> str:
    return rng.choice([str(value), WORDS[value], WORDS[value]])


def message(rng: random.Random, booking: Booking, other_name: str) -> str:
    """A guest's message that means `booking`; its wording is drawn from `rng`."""
    name, guests = booking.name, booking.guests
    when = {"d": spoken_day(rng, booking.day), "t": spoken_time(rng, booking.time)}
    if guests == 1 or rng.random() < 0.35:
        request = rng.choice(REQUESTS_WITHOUT_GUESTS).format(**when)
        sentences = [request, self_count(rng, guests)]
    else:
        group = number(rng, guests) + rng.choice(["", "", "", " people"])
        if rng.random() < 0.1 and guests > 2:
            group = f"{number(rng, guests - 1)}, no wait, {number(rng, guests)}"
        sentences = [rng.choice(REQUESTS).format(g=group, **when)]
    sentences = [sentence[0].upper() + sentence[1:] for sentence in sentences]
    extras = [rng.choice(SEATS[booking.seating])] if booking.seating else []
    if rng.random() < 0.25:
        extras.append(aside(rng, other_name))
    rng.shuffle(extras)
    if rng.random() < 0.5:
        sentences = [rng.choice(NAMES_FIRST).format(name=name), *sentences, *extras]
    else:
        greeting = rng.choice(GREETINGS)
        sentences = [
            *([greeting] if greeting else []),
            *sentences,
            *extras,
            rng.choice(NAMES_LAST).format(name=name),
        ]
    text = " ".join(sentences)
    if rng.random() < 0.15:  # typed in a hurry: small letters, but for the name
        text = text.lower().replace(name.lower(), name)
    return text


def self_count(rng: random.Random, guests: int) -> str:
    """A sentence in which the guests count themselves."""
    if guests == 1:
        return rng.choice(ALONE)
    ways = [*COUNTS, *(COUPLES if guests == 2 else []), *(FRIENDS if guests in (3, 4, 5) else [])]
    return rng.choice(ways).format(n=number(rng, guests), m=number(rng, guests - 1))


def aside(rng: random.Random, other_name: str) -> str:
    """A sentence with a day, a name or a number that is no part of the booking."""
    return rng.choice(ASIDES).format(
        other_day=rng.choice(DAYS),
        other_name=other_name,
        small=rng.randrange(4, 10),
        two_digits=f"{rng.randrange(100):02}",
        hour=WORDS[rng.randrange(2, 8)],
    )


def draw_booking(rng: random.Random, first_names: list[str], last_names: list[str]) -> Booking:
    return Booking(
        name=f"{rng.choice(first_names)} {rng.choice(last_names)}",
        guests=rng.choices(range(1, 9), weights=[2, 5, 4, 4, 3, 3, 2, 2])[0],
        day=rng.choice(DAYS).lower(),
        time=f"{rng.randrange(17, 22)}:{rng.choice([0, 15, 30, 45]):02}",
        seating=rng.choice(["inside", "outside", None]),
    )


def make_rows(
    rng: random.Random,
    first_names: list[str],
    last_names: list[str],
    size: int,
    held_out: set[tuple[int, str, str]],
) -> dict[str, Booking]:
    """`size` different messages and what they mean; no booking whose (guests, day, time) is in `held_out`."""
    rows: dict[str, Booking] = {}
    while len(rows) < size:
        booking = draw_booking(rng, first_names, last_names)
        if (booking.guests, booking.day, booking.time) not in held_out:
            rows[message(rng, booking, rng.choice(first_names))] = booking
    return rows


def write(file: Path, rows: dict[str, Booking]) -> None:
    """One chat a line: system, user, assistant."""
    lines = []
    for text, booking in rows.items():
        answer = json.dumps(booking._asdict())
        roles = {"system": SYSTEM, "user": text, "assistant": answer}
        lines.append(
            json.dumps({"messages": [{"role": r, "content": content} for r, content in roles.items()]})
        )
    file.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


def make(folder: Path) -> None:
    """Write the two files; the same bytes on every machine and Python."""
    rng = random.Random(SEED)
    first_names, last_names = FIRST_NAMES.split(), LAST_NAMES.split()
    rng.shuffle(first_names)
    rng.shuffle(last_names)
    # The valid rows are drawn first, so that they stay the same when NUM_TRAIN changes.
    valid = make_rows(rng, first_names[:80], last_names[:80], NUM_VALID, set())
    held_out = {(booking.guests, booking.day, booking.time) for booking in valid.values()}
    train = make_rows(rng, first_names[80:], last_names[80:], NUM_TRAIN, held_out)
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "train.jsonl", train)
    write(folder / "valid.jsonl", valid)


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "bookings")
