"""A task that is no Sudoku: short business texts to JSON records, made up endlessly and reproducibly.

Works on plain text: a user turn is an order confirmation, an appointment, a delivery note, a job advert or an invoice,
the assistant's turn a record of fixed keys. Knows nothing of tokens, networks or metrics. Names, numbers and codes are
copied; months and ways to write an amount are brought to one form; what a text does not say is null.

What is held out is held out twice over: every sentence that carries a field of a held-out text has a wording that no
training text has (`HELD_OUT`), and every value in it (names, codes, days, amounts, times,
addresses) is one that no training text can contain (`_Values`).
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable, Sequence
from typing import Any

KEYS = ("type", "date", "ref", "sum", "who", "time", "place", "mail")
MOST_DISTRACTORS = 3  # sentences of a text that say nothing of its record

# How often a text does not say something: usual, and where it differs.
_MISSING = {"date": 0.1, "ref": 0.12, "sum": 0.12, "who": 0.1, "time": 0.2, "place": 0.2, "mail": 0.2}
_MISSING_SUM = {"visit": 0.5, "parcel": 0.5, "job": 0.25}

_MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
           "November", "December")
_DAYS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
# Short ones, so that a record of few keys fits a small canvas.
_FIRST = ("Ada Alan Amir Anna Bea Ben Cem Dora Edda Elif Emil Emma Enno Eva Fay Finn Gia Hugo Ida Ilse Ines Ivan Jana "
          "Jim Jon Karl Kim Kofi Lea Leo Lena Luca Lutz Mara Max Mia Mona Nele Nils Nora Olga Omar Otto Paul Pia Ravi "
          "Rosa Ruth Sam Sara Sven Tim Tina Tom Uma Ute Vera Wim Yara Zoë").split()
_FIRST_HELD_OUT = "Abe Cleo Dina Eric Faye Gus Hans Iris Kai Lou Milo Noah Pam René Tess Vito".split()
_HEADS = ("Al Ber Bo Bra Cor Da Del Do El Fal Fen Ga Gil Ha Hal Hol Ing Ja Kel Ko Lan Li Lor Mal Me Mor No Ol Pa Pel "
          "Ro Sal San Ste Ta Tor Ul Va Ver Wal Wi").split()
_TAILS = "au berg by den dal fors ga ham holm ic ini ka ler lo man mer nes oso ova rup sen sky ter tin vik".split()
_STREETS = "Mill Park Church Station Garden River Bridge School Market Forest Harbour Castle".split()
_STREETS_HELD_OUT = "Abbey Orchard Quarry".split()
_WAYS = "Street Lane Road Way".split()
_TOWNS = "Leeds Bonn Graz Turin Ghent Basel Porto Lyon Bath Riga Delft Malmö York Essen Cork Aachen".split()
_TOWNS_HELD_OUT = "Derby Siena Ulm Bruges".split()
_HOSTS = "nordmail.net posteo.org inbox.eu webpost.com".split()
_LETTERS = "ABCDEFGHKLMNPRSTUVWXYZ"


Phrases = dict[tuple[str, str], tuple[str, ...]]  # (kind of text, or "any"; what is said) -> wordings


def _read(table: str) -> Phrases:
    """A table of wordings: below a kind of text what is said (a key of the record, the "opening", something "beside")
    and how, with slashes between wordings.

    ``{}`` is the field's value as the text writes it, names in braces are values that the record does not have.
    """
    found: Phrases = {}
    kind = ""
    for line in table.splitlines():
        said, colon, wordings = line.partition(": ")
        if colon:
            found[kind, said] = (*found.get((kind, said), ()), *wordings.split(" / "))
        else:
            kind = line
    return found


TRAINING = _read("""\
order
opening: Thank you for your order! / Your order is confirmed. / Order confirmation. / We have received your order.
opening: Good news: your order is being packed. / This confirms your order. / Your order went through.
opening: Thanks for ordering with us.
date: It arrives on {}. / Delivery date: {}. / Expect it on {}. / You get it by {}. / Delivery on {}.
date: It will be with you on {}.
ref: Order no. {}. / Your order number is {}. / Order #{}. / Order code {}. / Please quote {}. / Number: {}.
sum: Total: {}. / You paid {}. / The total is {}. / Order total {}. / In all {}. / We charged {} in total.
who: Dear {}, / Ship to: {}. / Ordered by {}. / Recipient: {}. / It goes to {}. / Customer: {}.
bill
opening: Invoice. / Please find your invoice below. / This is your invoice. / A new invoice is ready.
opening: We send you our invoice. / Your monthly invoice has arrived. / Invoice for services.
opening: Reminder: an invoice is open.
date: Due on {}. / Please pay by {}. / Payment is due {}. / Due date: {}. / Pay until {}. / We expect payment by {}.
ref: Invoice no. {}. / Invoice number: {}. / Invoice #{}. / Reference {}. / Quote {} when you pay. / Number: {}.
sum: Amount due: {}. / Total: {}. / Please transfer {}. / The total is {}. / To pay: {}. / It comes to {} in total.
who: Dear {}, / Bill to: {}. / Customer: {}. / Issued to {}. / For {}. / Billed to {}.
visit
opening: Your appointment is booked. / Appointment reminder. / We confirm your appointment.
opening: You have a new appointment. / Your appointment has been moved. / See you soon at your appointment!
opening: A reminder of your next appointment. / Thank you for booking an appointment.
date: It is on {}. / Date: {}. / Please come on {}. / We see you on {}. / The new date is {}. / Be here on {}.
ref: Booking {}. / Booking code: {}. / Your booking number is {}. / Please quote {}. / Reference {}. / Number: {}.
sum: The fee is {}. / Fee: {}. / It costs {}. / Price: {}. / Please bring {}. / You pay {} on site.
who: Dear {}, / With Dr. {}. / You will see {}. / Your doctor is {}. / Patient: {}. / Booked for {}.
parcel
opening: Delivery note. / Your parcel is on its way. / A parcel is coming to you. / We have shipped your parcel.
opening: Your parcel left our depot. / Parcel notice. / We tried to deliver your parcel.
opening: Our driver has a parcel for you.
date: It arrives on {}. / Delivery on {}. / We come on {}. / Delivery date: {}. / Pick it up by {}. / Planned for {}.
ref: Tracking no. {}. / Tracking code {}. / Track it with {}. / Parcel {}. / Shipment {}. / Number: {}.
sum: Cash on delivery: {}. / Please pay {} to the driver. / Customs due: {}. / You pay {} at the door. / To pay: {}.
sum: It costs {}.
who: Dear {}, / Recipient: {}. / Addressed to {}. / For {}. / To: {}. / Only {} may sign for it.
job
opening: We are hiring a driver. / Job offer: baker wanted. / Now hiring: night nurse. / Join our team as a cook.
opening: Vacancy: warehouse clerk. / We are looking for a gardener. / Job opening for a welder.
opening: Become a barista with us.
date: Start: {}. / You start on {}. / Starting {}. / Apply by {}. / From {} on. / First day: {}.
ref: Job code {}. / Job no. {}. / Reference {}. / Please quote {}. / Ad {}. / Number: {}.
sum: Pay: {} per hour. / We pay {}. / You earn {} a month. / Salary: {}. / The pay is {}. / It pays {} a week.
who: Contact: {}. / Ask for {}. / Write to {}. / Your contact is {}. / Apply to {}. / {} answers your questions.
any
time: Time: {}. / At {}. / {} sharp. / Around {}. / Not before {}.
place: Address: {}. / Where: {}. / Place: {}. / Our address is {}. / At {}.
mail: E-mail: {}. / Reply to {}. / Mail us at {}. / Contact {}. / Questions to {}.
beside: Sent on {date}. / Shipping of {sum} is included. / Call {phone} for help. / Hotline: {phone}. / Regards, {first}
beside: Bring your ID. / Thank you! / Doors open at {time}. / We are at {place}. / No reply needed. / You saved {sum}.
beside: Printed {date}. / {first} says hello. / Terms apply. / Office hours start at {time}. / Have a nice day!
beside: A discount of {sum} was applied. / Phone {phone}.""")

HELD_OUT = _read("""\
order
opening: We confirm your order. / Many thanks, your order has arrived. / Here is your order confirmation.
date: Expect delivery on {}. / It should arrive by {}.
ref: The order number: {}. / Please quote order {}.
sum: Your total: {}. / The order comes to a total of {}.
who: Dear customer {}, / Ordered for {}.
bill
opening: Your invoice is ready. / Here is our invoice. / Attached you find the invoice.
date: Payment due on {}. / Please pay it until {}.
ref: The invoice number is {}. / Please quote {} with payment.
sum: The amount to pay is {}. / Please pay a total of {}.
who: Invoice to: {}. / Issued for {}.
visit
opening: This confirms your appointment. / Your next appointment is set. / Reminder: you have an appointment.
date: We expect you on {}. / The date is {}.
ref: The booking code is {}. / Please bring booking {}.
sum: The price is {}. / It costs a fee of {}.
who: Your appointment is with {}. / Patient name: {}.
parcel
opening: A parcel has been shipped to you. / Your parcel is with our driver. / Notice: a parcel is on its way.
date: Delivery is planned for {}. / It comes on {}.
ref: Your tracking code: {}. / Track parcel {}.
sum: Please pay the driver {}. / Due on delivery: {}.
who: The recipient is {}. / It is addressed to {}.
job
opening: We are looking for a teacher to join our team. / Now hiring a painter. / Job opening: waiter wanted.
date: Start date: {}. / The job starts on {}.
ref: The job code is {}. / Please quote job {}.
sum: We offer pay of {}. / The salary is {}.
who: Please contact {}. / Send it to {}.
any
time: The time is {}. / From {}.
place: The address: {}. / You find it at {}.
mail: Our e-mail is {}. / Please reply to {}.
beside: Written on {date}. / It includes {sum} for shipping. / For help call {phone}. / Yours, {first}
beside: Please keep this message. / We open at {time}. / Find us at {place}. / A saving of {sum}. / Thanks a lot!""")

KINDS = [kind for kind, said in TRAINING if said == "opening"]


def conversations(count: int, seed: int, held_out: bool = False, *, keys: Sequence[str] = KEYS,
                  distractors: int = MOST_DISTRACTORS) -> list[list[dict[str, str]]]:
    """The messages of the first ``count`` conversations of the endless row of that seed.

    Records have ``keys``, of `KEYS` and in that order: the kind of text, month and day of what is announced (MM-DD),
    the document's own code, what is to be paid or earned in all, the person it is about, the time of day (HH:MM), house
    number with street and town, the e-mail address. A text has up to ``distractors`` sentences beside those that say
    them; without any, what a value looks like tells which one it is.
    """
    made = []
    for index in range(count):
        rng = random.Random(f"extraction {seed} {held_out} {' '.join(keys)} {distractors} {index}")
        text, record = _document(rng, held_out, keys, distractors)
        made.append([{"role": "user", "content": text}, {"role": "assistant", "content": answer_of(record)}])
    return made


def answer_of(record: dict[str, Any]) -> str:
    """The record as the assistant writes it: on one line, spaced as ``response_format`` spaces JSON, amounts with two
    decimals."""
    texts = {key: f"{value:.2f}" if key == "sum" and value is not None else json.dumps(value, ensure_ascii=False)
             for key, value in record.items()}
    return "{" + ", ".join(f'"{key}": {text}' for key, text in texts.items()) + "}"


def _document(rng: random.Random, held_out: bool, keys: Sequence[str],
              distractors: int) -> tuple[str, dict[str, Any]]:
    """A text and the record that stands in it."""
    values = _Values(rng, held_out)
    kind, phrases = rng.choice(KINDS), HELD_OUT if held_out else TRAINING
    record: dict[str, Any] = {}
    shown: dict[str, str] = {}  # as the text writes it
    for key in keys:
        if key == "type":
            record[key] = kind
            continue
        chance = _MISSING_SUM.get(kind, _MISSING[key]) if key == "sum" else _MISSING[key]
        value, text = values.draw(key)
        record[key] = None if rng.random() < chance else value
        if record[key] is not None:
            shown[key] = text

    def worded(said: str) -> str:
        return rng.choice(phrases[kind if (kind, said) in phrases else "any", said])

    said = [worded(key).format(text) for key, text in shown.items()]
    rng.shuffle(said)
    parts = [worded("opening"), *said]
    count = min(distractors, rng.choice((0, 1, 1, 2, 2, 3)))
    # Of the others those that say nothing which could be taken for a field.
    others = [phrase for phrase in phrases["any", "beside"]
              if not any(f"{{{key}}}" in phrase for key in ("time", "place") if key in keys)]
    for phrase in rng.sample(others, count):
        parts.insert(rng.randint(1, len(parts)), phrase.format_map(_Distracting(values)))
    parts.sort(key=lambda part: not part.startswith("Dear "))  # who is greeted is greeted first
    return rng.choice((" ", " ", "\n")).join(parts), record


class _Distracting(dict[str, str]):
    """Values that are in a text and not in its record, drawn when a phrase asks for one."""

    def __init__(self, values: _Values):
        self._values = values

    def __missing__(self, key: str) -> str:
        return self._values.draw(key)[1]


class _Values:
    """Draws values. What the text writes otherwise than the record is two: (what the record says, how it is written).

    None is both for training and held out: first names, streets and towns have two lists each, and of what is made of
    letters and digits a sixth is held out, told by its check sum.
    """

    def __init__(self, rng: random.Random, held_out: bool):
        self._rng, self._held_out = rng, held_out

    def draw(self, key: str) -> tuple[Any, str]:
        """What the record says under a key, and how the text writes it."""
        value = getattr(self, key)()
        return value if isinstance(value, tuple) else (value, value)

    def _own(self, draw: Callable[[], str]) -> str:
        """A text that may be used on this side."""
        while True:
            text = draw()
            if (zlib.crc32(text.encode()) % 6 == 0) == self._held_out:
                return text

    def _surname(self) -> str:
        return self._own(lambda: self._rng.choice(_HEADS) + self._rng.choice(_TAILS))

    def first(self) -> str:
        return self._rng.choice(_FIRST_HELD_OUT if self._held_out else _FIRST)

    def who(self) -> str:
        return f"{self.first()} {self._surname()}"

    def ref(self) -> str:
        def draw() -> str:
            letters = "".join(self._rng.choice(_LETTERS) for _ in range(self._rng.choice((1, 1, 2))))
            return f"{self._rng.choice((letters, letters + '-', ''))}{self._rng.randrange(100, 10_000)}"

        return self._own(draw)

    def date(self) -> tuple[str, str]:
        def draw() -> str:
            month = self._rng.randrange(12)
            return f"{month + 1:02}-{self._rng.randint(1, _DAYS[month]):02}"

        date = self._own(draw)
        month, day = (int(part) for part in date.split("-"))
        name = _MONTHS[month - 1]
        return date, self._rng.choice((f"{day} {name}", f"{name} {day}", f"{day} {name[:3]}", f"{name[:3]} {day}",
                                       f"2026-{date}"))

    def sum(self) -> tuple[float, str]:
        most, cents = self._rng.choice((100, 1000)), 0 if self._rng.random() < 0.15 else None
        number = self._own(lambda: f"{self._rng.randrange(5, most)}."
                                   f"{self._rng.randrange(1, 100) if cents is None else cents:02}")
        shown = number.removesuffix(".00")
        if self._rng.random() < 0.25:
            shown = shown.replace(".", ",")
        return float(number), self._rng.choice(("EUR {}", "{} EUR", "{} euros", "${}", "GBP {}", "€{}")).format(shown)

    def time(self) -> str:
        return self._own(lambda: f"{self._rng.randrange(8, 19):02}:{self._rng.randrange(0, 60, 5):02}")

    def place(self) -> str:
        streets, towns = (_STREETS_HELD_OUT, _TOWNS_HELD_OUT) if self._held_out else (_STREETS, _TOWNS)
        return (f"{self._rng.randint(1, 199)} {self._rng.choice(streets)} {self._rng.choice(_WAYS)}, "
                f"{self._rng.choice(towns)}")

    def mail(self) -> str:
        return f"{self._rng.choice(_LETTERS)}.{self._surname()}@{self._rng.choice(_HOSTS)}".lower()

    def phone(self) -> str:
        return self._own(lambda: f"0{self._rng.randrange(100, 1000)} {self._rng.randrange(1000):03}")
