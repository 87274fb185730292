#!/usr/bin/env python3
"""Write the quickstart dataset: short support messages and the one-line JSON ticket for each.

Usage::

    python scripts/make_quickstart_data.py                  # (re)write data/quickstart/*.jsonl
    python scripts/make_quickstart_data.py --output-dir DIR # write them somewhere else
    python scripts/make_quickstart_data.py --check          # exit 1 if the files are out of date

The task
--------
A customer writes one short message; the answer is exactly one line of compact JSON::

    {"category":"billing","priority":"high","order":"4821"}

Nothing in the message explains that format, so an untrained model does not produce it. A person
can label any message with these rules:

``category``
    ``billing`` (charges, invoices, receipts, prices), ``delivery`` (where the parcel is or
    should go), ``defect`` (the product is broken), ``return`` (a working product goes back or is
    exchanged) or ``account`` (login, password, profile).
``priority``
    ``high`` when the message says that it is urgent, ``normal`` when it does not.
``order``
    the four-digit order number as a string, or ``null`` when the message has none.

The split
---------
The held-out file measures generalisation, not memory. Its rows are built only from wordings that
the training file never uses: other problem sentences, other urgency phrases, other ways to state
the order number, other products, other greetings, names and closings. Its order numbers are also
disjoint from those in the training file. :func:`validate` enforces this on every run.

All sentences, names and products were made up for this project.

Reproducibility
---------------
The standard library only, and one seeded generator. Every draw goes through
:meth:`random.Random.random`, the only method whose sequence Python promises to keep across
versions, so ``--check`` gives the same verdict on any of them.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

SEED = 20240613
TRAIN_ROWS = 300
HELDOUT_ROWS = 60

PRIORITIES = ("high", "normal")

DEFAULT_OUTPUT_DIR = Path(__file__).resolve().parent.parent / "data" / "quickstart"

T = TypeVar("T")


@dataclass(frozen=True)
class Wordings:
    """Everything that one split's messages are put together from.

    In ``problems``, ``{p}`` stands for a product and ``{d}`` for a number of days; in
    ``order_before`` and ``order_after``, ``{n}`` stands for the order number.
    """

    problems: dict[str, tuple[str, ...]]
    urgency: dict[str, tuple[str, ...]]
    order_before: tuple[str, ...]
    order_after: tuple[str, ...]
    makes: tuple[str, ...]
    products: tuple[str, ...]
    greetings: tuple[str, ...]
    names: tuple[str, ...]


TRAIN = Wordings(
    problems={
        "billing": (
            "I was charged twice for the {p}.",
            "The invoice for my {p} shows the wrong amount.",
            "You took the money for the {p} from my card two times.",
            "My discount code was not applied to the price of the {p}.",
            "I never got a receipt for the {p}, can you send one?",
            "There is a payment to your shop on my card that I don't recognise.",
            "Why did I pay full price for a {p} that was on sale?",
            "The bill for the {p} includes a fee nobody told me about.",
            "Can you put our company name on the invoice for the {p}?",
            "I cancelled the {p} but the payment still went through.",
            "The tax on my {p} bill looks wrong.",
            "My bank still shows a charge for the {p} after {d} days.",
            "Can I pay for the {p} in two parts?",
            "I was promised 10% off the {p} but paid the full amount.",
        ),
        "delivery": (
            "My {p} has not arrived yet.",
            "Where is the parcel with my {p}?",
            "The tracking page has not changed for {d} days.",
            "The courier left the {p} at the wrong house.",
            "The app says it was delivered, but there is no {p} here.",
            "When will the {p} be shipped?",
            "I need to change the delivery address for the {p}.",
            "The package with the {p} is stuck at the depot.",
            "According to the tracking my {p} is in another country.",
            "Nobody was home, can you deliver the {p} again?",
            "I have been waiting {d} days for the {p} to arrive.",
            "Is it possible to ship the {p} to my office instead?",
            "Can you tell me which day the {p} will be delivered?",
            "Half of the shipment is missing, only the {p} came.",
        ),
        "defect": (
            "The {p} doesn't turn on any more.",
            "My new {p} has a cracked case.",
            "The {p} makes a loud grinding noise.",
            "The {p} stopped working after {d} days.",
            "One button on the {p} is broken.",
            "My {p} gets far too hot and smells of smoke.",
            "The {p} keeps switching itself off.",
            "The handle of the {p} snapped off.",
            "The display of the {p} flickers all the time.",
            "The cable of my {p} is loose and it sparks.",
            "The {p} is faulty, it only works half of the time.",
            "My {p} just beeps and does nothing.",
            "The {p} broke the second time I used it.",
            "The power light on the {p} stays off.",
        ),
        "return": (
            "I changed my mind and want to send the {p} back.",
            "How do I return the {p}?",
            "The {p} is too big for my kitchen, may I return it?",
            "I would like to swap the {p} for a smaller one.",
            "I picked the wrong {p} by mistake and want to exchange it.",
            "Please send me a return label for the {p}.",
            "I don't like the colour of the {p}, can I give it back?",
            "The {p} was a gift and I have one already, so it should go back.",
            "Can I exchange the unopened {p} for the blue one?",
            "How many days do I have to send back a {p}?",
            "I no longer want the {p}, where do I send it?",
            "I'd like to return the {p}, it is still in the box.",
            "Is it ok to send the {p} back after {d} days?",
            "My wife prefers the white {p}, can we swap?",
        ),
        "account": (
            "I can't log in to my account.",
            "I forgot my password and the reset mail never comes.",
            "Please change the email address of my account.",
            "My account is locked after too many wrong passwords.",
            "The login code for the app is never accepted.",
            "How do I delete my profile?",
            "I want to update the phone number in my profile.",
            "My user name has a spelling mistake, can you fix it?",
            "I get an error whenever I sign in.",
            "The password reset link has expired.",
            "I think someone else logged in to my account.",
            "How do I turn on two-step login?",
            "I have two accounts, can you merge them?",
            "I can't sign in to register my {p}.",
        ),
    },
    urgency={
        "high": (
            "This is urgent.",
            "Please reply today!",
            "I need this solved right now.",
            "Please hurry.",
            "This can't wait.",
            "I need an answer asap.",
            "It's an emergency.",
            "Help me quickly, it is urgent!",
            "I need help within the hour.",
            "Urgent, please!",
            "Please fix it immediately.",
            "Get back to me as soon as you can.",
            "Very urgent.",
            "Please sort this out today, it's urgent.",
            "I can't wait any longer.",
            "Please call me right away.",
            "We have no time left, hurry!",
            "It has to be solved by tonight.",
            "I have to know today.",
            "There is no time to wait.",
        ),
        "normal": (
            "",
            "",
            "",
            "",
            "Thanks.",
            "Can you help?",
            "Please let me know.",
            "Thank you.",
            "Thanks for looking into this.",
            "Please help.",
            "What should I do?",
            "Many thanks for your help.",
            "Please advise.",
            "Could you check, please?",
        ),
    },
    order_before=("Order {n}:", "Order {n}.", "About order #{n}:", "My order is {n}.", "#{n} -"),
    order_after=(
        "Order {n}.",
        "My order number is {n}.",
        "(order {n})",
        "Order no. {n}.",
        "It's order #{n}.",
        "Ref {n}.",
    ),
    makes=("Velpo", "Tarnwick", "Osprin", "Nubrix", "Zafferly", "Plumtide"),
    products=(
        "kettle",
        "lamp",
        "speaker",
        "blender",
        "toaster",
        "vacuum",
        "radio",
        "heater",
        "printer",
        "coffee maker",
    ),
    greetings=("Hi,", "Hello,", "Hey,", "Good morning,", "Hello team,"),
    names=("Mira", "Jonas", "Priya", "Tom", "Aisha", "Ben", "Lucia", "Olek"),
)

HELDOUT = Wordings(
    problems={
        "billing": (
            "I have been billed three times for one {p}.",
            "The receipt for the {p} lists the wrong total.",
            "Could you send a corrected invoice for the {p}?",
            "My credit card was debited twice for the {p}.",
            "You charged me more for the {p} than the listed price.",
            "There is an extra fee on the bill for my {p}.",
        ),
        "delivery": (
            "I think the parcel with my {p} got lost.",
            "My {p} should have arrived on Monday and is still not here.",
            "Can the courier bring the {p} after six in the evening?",
            "Has my {p} left your warehouse yet?",
            "The tracking link for the {p} shows nothing.",
            "Please deliver the {p} to my neighbour's address.",
        ),
        "defect": (
            "The switch of my {p} is stuck and nothing happens.",
            "The plug of the {p} is broken.",
            "My {p} died after {d} days and will not start.",
            "The {p} rattles and then shuts down.",
            "There is a crack in the side of my {p}.",
            "The light on the {p} blinks red and it doesn't work.",
        ),
        "return": (
            "I want to give the {p} back, it doesn't suit us.",
            "May I exchange the {p} for another colour?",
            "What is the way to return the {p}?",
            "I bought two by accident and want to send one {p} back.",
            "We don't need the {p} after all, can we return it?",
            "Can you email me the return form for the {p}?",
        ),
        "account": (
            "The site rejects my password every time.",
            "Can you unlock my account?",
            "I need a new password, the old one is gone.",
            "How can I change the name in my profile?",
            "I'm logged out each time I open my account page.",
            "Please close my account and erase my data.",
        ),
    },
    urgency={
        "high": (
            "Please answer as soon as possible.",
            "This is very urgent!",
            "I need help immediately.",
            "It is urgent, please call today.",
            "Please hurry up with this.",
            "I need a reply right away.",
        ),
        "normal": (
            "",
            "",
            "",
            "Could you look into it?",
            "Thanks for your help.",
            "Please let me know what to do.",
            "I hope you can help.",
        ),
    },
    order_before=("Order number {n}:", "This is about order {n}."),
    order_after=("The order number is {n}.", "Order: {n}.", "(my order: {n})"),
    makes=("Quillbee", "Dorvane", "Wexling"),
    products=("fan", "mixer", "alarm clock", "rice cooker", "iron"),
    greetings=("Hi there,", "Good evening,"),
    names=("Hana", "Milo", "Greta", "Idris"),
)

# Small slips that people make in a hurry; none of them touches an order number.
TYPOS = (
    ("receipt", "reciept"),
    ("address", "adress"),
    ("wrong", "worng"),
    ("tracking", "traking"),
    ("password", "pasword"),
    ("broken", "borken"),
    ("account", "acount"),
    ("please", "pls"),
    ("Please", "Pls"),
    ("working", "workin"),
    ("would", "woud"),
    ("payment", "paymnt"),
    ("return", "retrun"),
    ("number", "numer"),
)

ORDER_NUMBER = re.compile(r"\b\d{4}\b")


@dataclass(frozen=True)
class Ticket:
    """The three values of an answer."""

    category: str
    priority: str
    order: str | None

    def to_json(self) -> str:
        """Return the ticket as the one-line answer."""
        fields = {"category": self.category, "priority": self.priority, "order": self.order}
        return json.dumps(fields, separators=(",", ":"))


@dataclass(frozen=True)
class Row:
    """One message with its ticket."""

    message: str
    ticket: Ticket

    def to_json(self) -> str:
        """Return the row as one line of the JSONL file."""
        messages = [
            {"role": "user", "content": self.message},
            {"role": "assistant", "content": self.ticket.to_json()},
        ]
        return json.dumps({"messages": messages}, ensure_ascii=False)


class Dice:
    """Seeded draws that give the same values on every Python version."""

    def __init__(self, seed: int) -> None:
        """Start the sequence at ``seed``."""
        self._random = random.Random(seed)

    def below(self, limit: int) -> int:
        """Return an integer from 0 up to, but not including, ``limit``."""
        return int(self._random.random() * limit)

    def chance(self, probability: float) -> bool:
        """Return ``True`` with the given probability."""
        return self._random.random() < probability

    def pick(self, items: Sequence[T]) -> T:
        """Return one of ``items``."""
        return items[self.below(len(items))]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """Return ``items`` in a new order."""
        result = list(items)
        for last in range(len(result) - 1, 0, -1):
            other = self.below(last + 1)
            result[last], result[other] = result[other], result[last]
        return result


def add_slips(dice: Dice, message: str) -> str:
    """Make some messages look typed in a hurry: one typo, no capitals or no apostrophes."""
    if dice.chance(0.15):
        possible = [(right, slip) for right, slip in TYPOS if right in message]
        if possible:
            right, slip = dice.pick(possible)
            message = message.replace(right, slip, 1)
    if dice.chance(0.2):
        message = message.lower()
    if dice.chance(0.1):
        message = message.replace("'", "")
    return message


def write_message(dice: Dice, wordings: Wordings, problem: str, ticket: Ticket) -> str:
    """Put one message together around ``problem`` so that it says what ``ticket`` says."""
    product = dice.pick(wordings.products)
    if dice.chance(0.5):
        product = f"{dice.pick(wordings.makes)} {product}"
    parts = [problem.format(p=product, d=3 + dice.below(17))]
    urgency = dice.pick(wordings.urgency[ticket.priority])
    urgency_first = ticket.priority != "normal" and dice.chance(0.25)
    if urgency and not urgency_first:
        parts.append(urgency)
    if ticket.order is not None:
        if dice.chance(0.35):
            parts.insert(0, dice.pick(wordings.order_before).format(n=ticket.order))
        else:
            # Straight after the problem, or at the end of the message.
            place = 1 if dice.chance(0.6) else len(parts)
            parts.insert(place, dice.pick(wordings.order_after).format(n=ticket.order))
    if urgency and urgency_first:
        parts.insert(0, urgency)
    if dice.chance(0.3):
        parts.insert(0, dice.pick(wordings.greetings))
    if dice.chance(0.2):
        parts.append(f"- {dice.pick(wordings.names)}")
    return add_slips(dice, " ".join(parts))


def make_rows(dice: Dice, wordings: Wordings, count: int, orders: Sequence[str], taken: set[str]) -> list[Row]:
    """Write ``count`` rows whose messages are not in ``taken``, and add their messages to it.

    Categories and priorities are balanced, and every problem sentence is used about equally
    often. ``orders`` must hold at least ``count`` numbers.
    """
    categories = tuple(wordings.problems)
    decks: dict[str, list[str]] = {category: [] for category in categories}
    rows: list[Row] = []
    for index in range(count):
        category = categories[index % len(categories)]
        priority = PRIORITIES[(index // len(categories)) % len(PRIORITIES)]
        has_order = dice.chance(0.5 if category == "account" else 0.85)
        ticket = Ticket(category, priority, orders[index] if has_order else None)
        if not decks[category]:
            decks[category] = dice.shuffled(wordings.problems[category])
        problem = decks[category].pop()
        message = write_message(dice, wordings, problem, ticket)
        while message.lower() in taken:
            message = write_message(dice, wordings, problem, ticket)
        taken.add(message.lower())
        rows.append(Row(message, ticket))
    return dice.shuffled(rows)


def validate(train: Sequence[Row], heldout: Sequence[Row]) -> None:
    """Raise ``ValueError`` unless the labels fit the messages and the splits are disjoint."""
    for first, second in zip(
        (
            *TRAIN.problems.values(),
            *TRAIN.urgency.values(),
            (*TRAIN.order_before, *TRAIN.order_after),
            TRAIN.makes,
            TRAIN.products,
            TRAIN.greetings,
            TRAIN.names,
        ),
        (
            *HELDOUT.problems.values(),
            *HELDOUT.urgency.values(),
            (*HELDOUT.order_before, *HELDOUT.order_after),
            HELDOUT.makes,
            HELDOUT.products,
            HELDOUT.greetings,
            HELDOUT.names,
        ),
        strict=True,
    ):
        shared = (set(first) & set(second)) - {""}
        if shared:
            raise ValueError(f"wordings in both splits: {sorted(shared)}")
    messages = [row.message.lower() for row in (*train, *heldout)]
    if len(set(messages)) != len(messages):
        raise ValueError("two rows have the same message")
    for row in (*train, *heldout):
        numbers = ORDER_NUMBER.findall(row.message)
        if numbers != ([] if row.ticket.order is None else [row.ticket.order]):
            raise ValueError(f"the order number does not fit the message: {row.message!r}")
    train_orders = {row.ticket.order for row in train} - {None}
    heldout_orders = {row.ticket.order for row in heldout} - {None}
    if train_orders & heldout_orders:
        raise ValueError("an order number is in both splits")


def build_files() -> dict[str, str]:
    """Return the text of each dataset file by its name."""
    dice = Dice(SEED)
    orders = dice.shuffled([str(number) for number in range(1000, 10000)])
    taken: set[str] = set()
    train = make_rows(dice, TRAIN, TRAIN_ROWS, orders[:TRAIN_ROWS], taken)
    heldout = make_rows(dice, HELDOUT, HELDOUT_ROWS, orders[TRAIN_ROWS:], taken)
    validate(train, heldout)
    return {
        f"{name}.jsonl": "".join(made + "\n" for made in rows)
        for name, rows in {
            "train": map(Row.to_json, train),
            "heldout": map(Row.to_json, heldout),
            "pairs-train": map(pair_to_json, train),
            "pairs-heldout": map(pair_to_json, heldout),
        }.items()
    }


def pair_to_json(row: Row) -> str:
    """A preference that the rows above don't have: ``order`` stands in a ticket only if the message has a number."""
    whole = row.ticket.to_json()
    short = re.sub(r',"order":[^}]*', "", whole)
    chosen, rejected = (short, whole) if row.ticket.order is None else (whole, short)
    pair = {
        "prompt": [{"role": "user", "content": row.message}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }
    return json.dumps(pair, ensure_ascii=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the files, or compare them with ``--check``; return the exit code."""
    parser = argparse.ArgumentParser(description="Write the quickstart dataset.")
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=DEFAULT_OUTPUT_DIR,
        help="folder of train.jsonl and heldout.jsonl (default: data/quickstart in the repo)",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing; exit 1 if the files differ from what would be written",
    )
    args = parser.parse_args(argv)
    output_dir: Path = args.output_dir
    files = build_files()
    if args.check:
        stale = [
            name
            for name, text in files.items()
            if not (output_dir / name).is_file() or (output_dir / name).read_bytes() != text.encode("utf-8")
        ]
        if stale:
            names = ", ".join(str(output_dir / name) for name in stale)
            print(f"out of date: {names}; run scripts/make_quickstart_data.py", file=sys.stderr)
            return 1
        return 0
    output_dir.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (output_dir / name).write_bytes(text.encode("utf-8"))
        print(f"wrote {output_dir / name} ({text.count(chr(10))} rows)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
