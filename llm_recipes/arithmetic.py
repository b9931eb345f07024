"""`builtin:arithmetic`: grade-school word problems from templates of our own, with answers in GSM8K's format.

A *family* is a way to calculate, no two have the same; a *wording* is one text for it. A problem's *cell* is
(family, wording, numbers): a hash of it sends one cell in ten to the test split, so train and test share none,
while names and things vary freely. No number is below 2, so a plural is always right.

Rows depend on the arguments alone, and fewer rows are the first of more.
"""

import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import islice
from typing import NamedTuple

import numpy as np
import xxhash

from llm_recipes.errors import UserError

VIEWS = ("pretrain", "sft", "preference", "prompts", "test")
SPLITS = ("train", "test")
DIFFICULTY = 1
# difficulty: (largest value anywhere, largest smaller factor of a product and largest divisor)
LIMITS = {1: (12, 9), 2: (20, 9), 3: (50, 9), 4: (100, 10), 5: (1_000, 12)}
SMALLEST = 2
ERRORS = ("wrong_operation", "wrong_intermediate", "off_by_one", "missing_answer")
DRILL = 8  # equations in a drill
OPERATIONS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__}

# ---- words ---------------------------------------------------------------------------------------

# fmt: off
HE = ["Adam", "Ben", "Carl", "Dan", "Eric", "Finn", "Hugo", "Ian", "Jack", "Leo", "Max", "Noah", "Paul", "Sam", "Tom"]
SHE = ["Amy", "Beth", "Clara", "Dora", "Emma", "Fay", "Gina", "Hanna", "Ivy", "Jane", "Kate", "Lily", "Mia", "Nora"]
ITEMS = ["apple", "pear", "lemon", "peach", "egg", "cookie", "muffin", "carrot", "pen", "pencil", "book", "card",
         "stamp", "ball", "marble", "toy", "doll", "bead", "button", "candle", "cup", "brush", "ribbon", "flower",
         "shell", "stone"]
# fmt: on
BOXES = ["bag", "box", "basket", "crate", "pack"]
PLACES = ["market", "fair", "shop", "park", "school", "farm", "beach", "camp"]


def _plural(word: str) -> str:
    return word + ("es" if word.endswith(("ch", "sh", "x")) else "s")


def _pairs(of: list[dict]) -> list[tuple[dict, list[dict]]]:
    """(first, all that can be second), the keys of the second end in 2."""
    return [(one, [{f"{k}2": v for k, v in two.items()} for two in of if two is not one]) for one in of]


_NAMES = _pairs(
    [{"name": name, "he": "he", "He": "He", "his": "his", "His": "His"} for name in HE]
    + [{"name": name, "he": "she", "He": "She", "his": "her", "His": "Her"} for name in SHE]
)
_ITEMS = _pairs([{"item": item, "items": _plural(item)} for item in ITEMS])
_BOXES = [{"box": box, "boxes": _plural(box)} for box in BOXES]
# The number k of a family is not written as digits in the question.
TIMES = {2: "twice", 3: "three times", 4: "four times", 5: "five times"}
PART = {2: "half", 3: "a third", 4: "a quarter"}
PERCENT = {2: "50", 4: "25", 5: "20", 10: "10"}
K = {"times": TIMES, "part": PART, "percent": PERCENT}

# ---- families ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Family:
    """Letters a to e and k are numbers of the question, r to u results of the steps, in this order."""

    name: str
    steps: dict[str, str]  # "r=a*b": the sentence about it; {eq} is the equation
    wordings: tuple[str, ...]
    level: int = 1  # the lowest difficulty that leaves enough numbers
    most: int = 10_000  # the largest sensible value, e.g. of an age

    @cached_property
    def parsed(self) -> list[tuple[str, ...]]:
        """(result, left, operator, right) of every step."""
        return [re.fullmatch(r"([r-u])=(\w+)([-+*/])(\w+)", step).groups() for step in self.steps]

    @cached_property
    def inputs(self) -> list[str]:
        """Letters of the numbers in the order of their use."""
        operands = (name for _, left, _, right in self.parsed for name in (left, right))
        return list(dict.fromkeys(name for name in operands if name in "abcdek"))

    @cached_property
    def constants(self) -> dict[str, int]:
        return {name: int(name) for step in self.parsed for name in step if name.isdigit()}

    @cached_property
    def words(self) -> str | None:
        """The entry of K that says k."""
        return next((words for words in K if f"{{{words}}}" in self.wordings[0]), None)


FAMILIES = (
    Family("total", {"r=a+b": "There are {eq} {items} in all."}, (
        "{name} has {a} {items} and {name2} has {b}. How many {items} do they have together?",
        "{name} finds {a} {items} at the {place}. {name2} finds {b}. How many do they find in all?",
        "A {box} holds {a} {items}. {name} puts in {b} more. How many {items} are in it now?",
    )),
    Family("difference", {"r=a-b": "The difference is {eq} {items}."}, (
        "{name} has {a} {items}. {name2} has {b}. How many more {items} does {name} have?",
        "{name} sells {a} {items} and {name2} sells {b}. How many fewer does {name2} sell?",
        "One {box} holds {a} {items} and another holds {b}. How many more are in the first {box}?",
    )),
    Family("groups", {"r=a*b": "That makes {eq} {items}."}, (
        "{name} has {a} {boxes} of {b} {items}. How many {items} does {he} have?",
        "Each {box} holds {b} {items}. How many {items} are in {a} {boxes}?",
        "{name} collects {b} {items} a day. How many does {he} collect in {a} days?",
    )),
    Family("sharing", {"r=a/b": "Each one gets {eq} {items}."}, (
        "{name} shares {a} {items} equally among {b} friends. How many does each friend get?",
        "{name} puts {a} {items} into {b} {boxes}, the same number in each. How many {items} does each {box} get?",
        "The {b} children at the {place} split {a} {items} equally. How many does each child get?",
    )),
    Family("three parts", {
        "r=a+b": "The first two make {eq} {items}.",
        "s=r+c": "In all there are {eq} {items}.",
    }, (
        "{name} finds {a} {items} on Monday, {b} on Tuesday and {c} on Friday. How many does {he} find in all?",
        "Three {boxes} hold {a}, {b} and {c} {items}. How many {items} are there in all?",
        "There are {a} {items} in a {box}. {name} adds {b}, then {c} more. How many {items} are there now?",
    )),
    Family("gain, loss", {
        "r=a+b": "First there are {eq} {items}.",
        "s=r-c": "Then {eq} are left.",
    }, (
        "{name} has {a} {items}, buys {b} more and gives away {c}. How many {items} are left?",
        "{name} finds {a} {items} in the morning and {b} at night. {He} loses {c}. How many are left?",
        "A {box} holds {a} {items}. {name} puts in {b} and takes out {c}. How many {items} does it hold now?",
    )),
    Family("loss, gain", {
        "r=a-b": "First {eq} {items} are left.",
        "s=r+c": "Then there are {eq} {items}.",
    }, (
        "{name} has {a} {items}. {He} sells {b} and then buys {c}. How many does {he} have now?",
        "There are {a} {items} in a {box}. {name} takes out {b} and puts in {c}. How many are there now?",
        "{name} gives {b} of {his} {a} {items} to {name2} and finds {c} more. How many {items} does {name} have now?",
    )),
    Family("two losses", {
        "r=a-b": "First {eq} {items} are left.",
        "s=r-c": "Then {eq} are left.",
    }, (
        "{name} has {a} {items}. {He} gives {b} to {name2} and loses {c}. How many are left?",
        "A shop has {a} {items}. It sells {b} on Monday and {c} on Tuesday. How many {items} remain?",
        "{name} takes {b} {items} out of a {box} of {a}. {name2} takes {c}. How many {items} stay in the {box}?",
    )),
    Family("groups and loose ones", {
        "r=a*b": "First there are {eq} {items}.",
        "s=r+c": "In all there are {eq} {items}.",
    }, (
        "{name} has {a} {boxes} of {b} {items} and {c} loose ones. How many {items} does {he} have?",
        "{name} buys {a} {boxes} with {b} {items} each. {He} already has {c} {items}. How many does {he} have now?",
        "{name} gets {b} {items} from each of {a} friends and {c} from {name2}. How many {items} does {he} get?",
    )),
    Family("groups less some", {
        "r=a*b": "First there are {eq} {items}.",
        "s=r-c": "Then {eq} are left.",
    }, (
        "{name} has {a} {boxes} of {b} {items}. {He} gives away {c}. How many {items} are left?",
        "{name} buys {a} {boxes} with {b} {items} each, but {c} get lost. How many {items} does {he} still have?",
        "There are {a} rows of {b} {items} on a table. {name} takes {c}. How many {items} stay there?",
    )),
    Family("change", {
        "r=a*b": "The {items} cost {eq} dollars.",
        "s=c-r": "That leaves {eq} dollars.",
    }, (
        "{name} buys {a} {items} for ${b} each and pays with ${c}. How much change does {he} get?",
        "One {item} costs ${b}. {name} has ${c} and buys {a} {items}. How many dollars are left?",
        "{name} takes ${c} to the {place} and buys {a} {items} at ${b} each. How much money is left?",
    )),
    Family("groups of groups", {
        "r=a*b": "There are {eq} {boxes}.",
        "s=r*c": "They hold {eq} {items}.",
    }, (
        "{name} has {a} shelves with {b} {boxes} each. Each {box} holds {c} {items}. How many {items} does {he} have?",
        "A shop gets {a} deliveries of {b} {boxes}, with {c} {items} in each {box}. How many {items} does it get?",
        "Each of {a} children has {b} {boxes} of {c} {items}. How many {items} do the children have?",
    ), level=2),
    Family("groups shared", {
        "r=a*b": "There are {eq} {items}.",
        "s=r/c": "Each one gets {eq} {items}.",
    }, (
        "{name} shares {a} {boxes} of {b} {items} equally among {c} friends. How many {items} does each friend get?",
        "There are {a} rows of {b} {items}. {name} sorts them into {c} equal piles. How many {items} does each pile get?",
        "A class gets {a} {boxes} of {b} {items} and splits them equally among {c} tables. "
        "How many {items} does each table get?",
    )),
    Family("sums repeated", {
        "r=a+b": "Each time it is {eq} {items}.",
        "s=r*c": "In all that is {eq} {items}.",
    }, (
        "{name} gives {a} big and {b} small {items} to each of {c} friends. How many {items} does {he} give away?",
        "Every day {name} finds {a} {items} in the morning and {b} at night. How many does {he} find in {c} days?",
        "Each {box} holds {a} new and {b} old {items}. How many {items} are in {c} {boxes}?",
    ), level=2),
    Family("cheaper", {
        "r=a-b": "One {item} now costs {eq} dollars.",
        "s=r*c": "Together they cost {eq} dollars.",
    }, (
        "One {item} costs ${a}, but today it is ${b} cheaper. How much do {c} {items} cost today?",
        "With a coupon {name} saves ${b} on each ${a} {item}. How much does {he} pay for {c} {items}?",
        "A shop lowers the price of one {item} from ${a} by ${b}. How much do {c} {items} cost now?",
    )),
    Family("pooled and shared", {
        "r=a+b": "Together there are {eq} {items}.",
        "s=r/c": "Each one gets {eq} {items}.",
    }, (
        "{name} has {a} {items} and {name2} has {b}. They share them all equally among {c} friends. "
        "How many does each friend get?",
        "{name} sorts {a} big and {b} small {items} into {c} equal piles. How many {items} does each pile get?",
        "A {box} of {a} {items} and a {box} of {b} are split equally among {c} children. How many does each child get?",
    )),
    Family("saving", {
        "r=a-b": "That leaves {eq} dollars.",
        "s=r/c": "So it takes {eq} weeks.",
    }, (
        "{name} wants a bike for ${a} and has ${b}. {He} saves ${c} a week. How many weeks must {he} save?",
        "A game costs ${a}. {name} has ${b} and earns ${c} a week. After how many weeks can {he} buy it?",
        "{name} owes {name2} ${a}. {He} pays ${b} now and then ${c} a week. How many weeks does {he} pay?",
    )),
    Family("share and more", {
        "r=a/b": "Each one gets {eq} {items}.",
        "s=r+c": "Now each one has {eq} {items}.",
    }, (
        "{name} splits {a} {items} equally into {b} {boxes}, then adds {c} to each. How many {items} are in each?",
        "At the {place} {b} children share {a} {items} equally. Then each gets {c} more. "
        "How many does each child have?",
        "{name} deals {a} {items} evenly to {b} players. Each player already has {c}. How many does each have now?",
    )),
    Family("share and less", {
        "r=a/b": "Each one gets {eq} {items}.",
        "s=r-c": "Then each one has {eq} left.",
    }, (
        "At the {place} {b} children share {a} {items} equally. Then each loses {c}. "
        "How many does each child have left?",
        "{name} splits {a} {items} equally into {b} {boxes}, then takes {c} out of each. How many are left in each?",
        "{name} gives {a} {items} to {b} friends in equal shares. Each friend gives back {c}. "
        "How many does each friend keep?",
    ), level=2),
    Family("price of one", {
        "r=a/b": "One {item} costs {eq} dollars.",
        "s=r*c": "So they cost {eq} dollars.",
    }, (
        "If {b} {items} cost ${a}, how much do {c} {items} cost?",
        "{name} pays ${a} for {b} {items}. How much must {name2} pay for {c} {items}?",
        "A {box} with {b} {items} costs ${a}. At the same price for each, how much are {c} {items}?",
    )),
    Family("days needed", {
        "r=a+b": "Each day it is {eq} pages.",
        "s=c/r": "That takes {eq} days.",
    }, (
        "{name} reads {a} pages each morning and {b} each night. How many days does {he} need for {c} pages?",
        "Each day {name} writes {a} pages and {name2} writes {b}. How many days do they need for {c} pages?",
        "A book has {c} pages. Every day {name} reads {a} at school and {b} at home. How many days does it take?",
    ), level=2),
    Family("machines", {
        "r=a*b": "In an hour they make {eq} toys.",
        "s=c/r": "They need {eq} hours.",
    }, (
        "Each of {a} machines makes {b} toys an hour. How many hours do they need for {c} toys?",
        "One worker makes {b} toys an hour. How many hours do {a} such workers need to make {c} toys?",
        "{name} has an order for {c} toys. {His} {a} helpers make {b} toys an hour each. How many hours do they need?",
    ), level=2),
    Family("times as many, together", {
        "r=a*k": "{Times} as many is {eq}.",
        "s=a+r": "In all there are {eq} {items}.",
    }, (
        "{name} has {a} {items}. {name2} has {times} as many. How many {items} do they have together?",
        "{name} sells {a} {items} on Monday and {times} as many on Tuesday. How many does {he} sell in all?",
        "There are {a} big {items} and {times} as many small ones in a {box}. How many {items} are in the {box}?",
    ), level=2),
    Family("part given", {
        "r=a/k": "{Part} of them is {eq}.",
        "s=a-r": "Then {eq} are left.",
    }, (
        "{name} has {a} {items} and gives {part} of them to {name2}. How many {items} are left?",
        "A shop has {a} {items} and sells {part} of them. How many {items} does it still have?",
        "There are {a} {items} in a {box}. {name} takes out {part} of them. How many stay in the {box}?",
    )),
    Family("ages", {
        "r=a+b": "{name2} is {eq} years old.",
        "s=a+r": "Their ages add up to {eq}.",
    }, (
        "{name} is {a} years old and {name2} is {b} years older. What is the sum of their ages?",
        "{name2} is {b} years older than {name}, who is {a}. How old are they together?",
        "{name} was born {b} years after {name2} and is {a} now. What do their ages add up to?",
    ), most=150),
    Family("fewer, together", {
        "r=a-b": "The second number is {eq}.",
        "s=a+r": "In all there are {eq} {items}.",
    }, (
        "{name} has {a} {items}. {name2} has {b} fewer. How many {items} do they have together?",
        "{name} finds {a} {items} on Monday and {b} fewer on Tuesday. How many does {he} find in all?",
        "One {box} holds {a} {items} and another holds {b} fewer. How many {items} are in both?",
    )),
    Family("perimeter", {
        "r=a*2": "Two sides make {eq} feet.",
        "s=b*2": "The others make {eq} feet.",
        "t=r+s": "All around it is {eq} feet.",
    }, (
        "A rectangular garden has sides of {a} and {b} feet. How many feet of fence go around it?",
        "What is the perimeter of a rectangle with sides of {a} feet and {b} feet?",
        "{name} walks once around a field of {a} by {b} feet. How many feet does {he} walk?",
    ), level=2),
    Family("two kinds", {
        "r=a*b": "The {items} cost {eq} dollars.",
        "s=c*d": "The {items2} cost {eq} dollars.",
        "t=r+s": "Together they cost {eq} dollars.",
    }, (
        "{name} buys {a} {items} at ${b} each and {c} {items2} at ${d} each. How much does {he} pay?",
        "One {item} costs ${b} and one {item2} costs ${d}. How much do {a} {items} and {c} {items2} cost together?",
        "A class orders {a} {items} for ${b} each and {c} {items2} for ${d} each. How many dollars does it pay?",
    )),
    Family("groups compared", {
        "r=a*b": "{name} has {eq} {items}.",
        "s=c*d": "{name2} has {eq} {items}.",
        "t=r-s": "The difference is {eq} {items}.",
    }, (
        "{name} has {a} {boxes} of {b} {items}. {name2} has {c} {boxes} of {d}. How many more {items} does {name} have?",
        "{name} gets {b} {items} a day for {a} days. {name2} gets {d} a day for {c} days. "
        "How many more does {name} get?",
        "{name} lays {a} rows of {b} {items} and {name2} lays {c} rows of {d}. "
        "How many fewer {items} does {name2} have?",
    )),
    Family("change of a longer bill", {
        "r=a*b": "The {items} cost {eq} dollars.",
        "s=r+c": "In all {he} pays {eq} dollars.",
        "t=d-s": "That leaves {eq} dollars.",
    }, (
        "{name} buys {a} {items} at ${b} each and a hat for ${c}. {He} pays with ${d}. How much change does {he} get?",
        "{name} has ${d}. {He} pays ${b} for each of {a} {items} and ${c} for lunch. How many dollars are left?",
        "{name} has ${d}, pays ${c} for the bus and buys {a} {items} for ${b} each. How much money is left?",
    )),
    Family("the rest sold", {
        "r=a*b": "There are {eq} {items}.",
        "s=r-c": "That leaves {eq} {items} to sell.",
        "t=s*d": "They bring {eq} dollars.",
    }, (
        "{name} has {a} {boxes} of {b} {items}. {He} keeps {c} and sells the rest for ${d} each. "
        "How many dollars does {he} get?",
        "{name} buys {a} {boxes} with {b} {items} each, loses {c} and sells the others at ${d} each. "
        "How many dollars does {he} get for them?",
        "There are {a} rows of {b} {items}. {name} gives away {c} and sells the rest for ${d} each. "
        "How much money does {he} get?",
    )),
    Family("average of three", {
        "r=a+b": "The first two add up to {eq}.",
        "s=r+c": "All three add up to {eq}.",
        "t=s/3": "The average is {eq}.",
    }, (
        "{name} scores {a}, {b} and {c} points in three games. What is {his} average score?",
        "Three {boxes} hold {a}, {b} and {c} {items}. What is the average number of {items} in a {box}?",
        "On three days {name} reads {a}, {b} and {c} pages. How many pages is that a day on average?",
    )),
    Family("average of two", {
        "r=a+b": "The second number is {eq}.",
        "s=a+r": "Both add up to {eq}.",
        "t=s/2": "The average is {eq}.",
    }, (
        "{name} scores {a} points in one game and {b} more than that in the next. What is {his} average score?",
        "{name} has {a} {items} and {name2} has {b} more. How many {items} do they have on average?",
        "{name} walks {a} miles on Monday and {b} more than that on Tuesday. "
        "How many miles is that a day on average?",
    )),
    Family("part and more", {
        "r=a/k": "{Part} of them is {eq}.",
        "s=r+b": "So far that is {eq} pages.",
        "t=a-s": "Then {eq} are left.",
    }, (
        "{name} must read {a} pages. {He} reads {part} of them on Monday and {b} on Tuesday. How many pages are left?",
        "A book has {a} pages. {name} reads {part} of them, then {b} more. How many pages are still to read?",
        "{name} has to write {a} pages. {He} writes {part} of them at school and {b} at home. How many pages remain?",
    )),
    Family("weeks", {
        "r=a+b": "Each day it is {eq} pages.",
        "s=c*7": "There are {eq} days.",
        "t=r*s": "In all that is {eq} pages.",
    }, (
        "{name} reads {a} pages each morning and {b} each night. How many pages does {he} read in {c} weeks?",
        "Every day {name} writes {a} pages and {name2} writes {b}. How many pages do they write in {c} weeks?",
        "For {c} weeks {name} reads {a} pages at school and {b} at home every day. How many pages is that?",
    ), level=5),
    Family("dozens", {
        "r=a*12": "First there are {eq} {items}.",
        "s=r-b": "Then {eq} are left.",
        "t=s+c": "Now there are {eq} {items}.",
    }, (
        "{name} has {a} dozen {items}. {He} sells {b} and buys {c} more. How many {items} does {he} have now?",
        "A shop has {a} dozen {items}. It sells {b} and gets {c} new ones. How many {items} does it have now?",
        "There are {a} dozen {items} in a {box}. {name} takes out {b} and puts in {c}. How many are there now?",
    ), level=3),
    Family("minutes", {
        "r=a*60": "The whole time is {eq} minutes.",
        "s=r-b": "Then {eq} are left.",
        "t=s-c": "In the end {eq} are left.",
    }, (
        "{name} has {a} hours. {He} spends {b} minutes on math and {c} minutes on art. How many minutes are left?",
        "A trip takes {a} hours. {name} sleeps for {b} minutes and reads for {c} minutes. How many minutes are left?",
        "A show lasts {a} hours. After {b} minutes of music and {c} minutes of dance, how many minutes are left?",
    ), level=5),
    Family("two speeds", {
        "r=a*c": "{name} goes {eq} miles.",
        "s=b*c": "{name2} goes {eq} miles.",
        "t=r-s": "The difference is {eq} miles.",
    }, (
        "{name} bikes {a} miles an hour and {name2} bikes {b}. How many more miles does {name} bike in {c} hours?",
        "For {c} hours {name} goes {a} miles an hour and {name2} goes {b}. How many more miles does {name} go?",
        "{name} goes {a} miles an hour and {name2} follows at {b}. How many miles is {name} ahead after {c} hours?",
    )),
    Family("rest of a trip", {
        "r=a*b": "{name} goes {eq} miles.",
        "s=c-r": "Then {eq} miles are left.",
        "t=s/d": "The rest takes {eq} hours.",
    }, (
        "A trip is {c} miles. {name} goes {a} miles an hour for {b} hours, then {d} miles an hour. "
        "How many more hours does {he} need?",
        "{name} wants to go {c} miles. {He} goes {a} miles an hour for {b} hours. "
        "How many hours does the rest take at {d} miles an hour?",
        "{name} lives {c} miles from {name2}. {He} goes {a} miles an hour for {b} hours, then {d} miles an hour. "
        "How many hours does the second part take?",
    )),
    Family("catching up", {
        "r=a*b": "The lead is {eq} miles.",
        "s=c-a": "It shrinks by {eq} miles an hour.",
        "t=r/s": "That takes {eq} hours.",
    }, (
        "{name} goes {a} miles an hour. After {b} hours {name2} follows at {c} miles an hour. "
        "How many hours does {name2} need to catch up?",
        "{name2} starts {b} hours after {name}. {name} goes {a} miles an hour and {name2} goes {c}. "
        "How many hours does {name2} need to catch {name}?",
        "A bus goes {a} miles an hour. A car starts {b} hours later and goes {c}. "
        "How many hours does the car need to catch the bus?",
    )),
    Family("discount", {
        "r=a*b": "The full price is {eq} dollars.",
        "s=r/k": "The discount is {eq} dollars.",
        "t=r-s": "That leaves {eq} dollars.",
    }, (
        "{name} buys {a} {items} at ${b} each and gets {percent}% off. How much does {he} pay?",
        "One {item} costs ${b}. Today all prices are {percent}% lower. How much do {a} {items} cost today?",
        "{name} orders {a} {items} for ${b} each with a discount of {percent}%. How many dollars does {he} pay?",
    ), level=4),
    Family("wages", {
        "r=a+b": "{name} works {eq} hours.",
        "s=r*c": "{He} earns {eq} dollars.",
        "t=s-d": "That leaves {eq} dollars.",
    }, (
        "{name} works {a} hours in May and {b} in June for ${c} an hour. {He} spends ${d}. How much money is left?",
        "{name} earns ${c} an hour. {He} works {a} hours, then {b} more, and pays ${d} for lunch. "
        "How many dollars are left?",
        "{name} gets ${c} an hour. After {a} hours at a shop and {b} at a farm {he} buys a ${d} gift. "
        "How much money is left?",
    )),
    Family("more, then fewer, together", {
        "r=a+b": "The second number is {eq}.",
        "s=r-c": "The third number is {eq}.",
        "t=a+r": "The first two make {eq}.",
        "u=t+s": "In all there are {eq} {items}.",
    }, (
        "{name} has {a} {items} and {name2} has {b} more. A friend has {c} fewer than {name2}. "
        "How many do all three have?",
        "{name} sells {a} {items} on Monday, {b} more than that on Tuesday and on Friday {c} fewer than on Tuesday. "
        "How many does {he} sell in all?",
        "A red {box} holds {a} {items} and a blue one {b} more. A green one holds {c} fewer than the blue one. "
        "How many {items} are in all three?",
    )),
    Family("more than times as many", {
        "r=a*k": "{Times} as many is {eq}.",
        "s=r+b": "The second number is {eq}.",
        "t=a+s": "In all there are {eq} {items}.",
    }, (
        "{name} has {a} {items}. {name2} has {b} more than {times} as many. How many do they have together?",
        "{name} sells {a} {items} on Monday and {b} more than {times} as many on Friday. "
        "How many does {he} sell in all?",
        "A red {box} holds {a} {items}. A blue one holds {times} as many and {b} more. How many {items} are in both?",
    )),
    Family("change of two kinds", {
        "r=a*b": "The {items} cost {eq} dollars.",
        "s=c*d": "The {items2} cost {eq} dollars.",
        "t=r+s": "Together they cost {eq} dollars.",
        "u=e-t": "That leaves {eq} dollars.",
    }, (
        "{name} buys {a} {items} at ${b} each and {c} {items2} at ${d} each. {He} pays with ${e}. "
        "How much change does {he} get?",
        "One {item} costs ${b} and one {item2} costs ${d}. {name} has ${e} and buys {a} {items} and {c} {items2}. "
        "How much money is left?",
        "{name} takes ${e} to the {place} and buys {a} {items} for ${b} each and {c} {items2} for ${d} each. "
        "How many dollars are left?",
    ), level=2),
    Family("part sold, some given", {
        "r=a*b": "There are {eq} {items}.",
        "s=r/k": "{Part} of them is {eq}.",
        "t=r-s": "Then {eq} are left.",
        "u=t-c": "In the end {eq} are left.",
    }, (
        "{name} has {a} {boxes} of {b} {items}. {He} sells {part} of them and gives away {c}. "
        "How many {items} are left?",
        "There are {a} rows of {b} {items}. {name} takes {part} of them and {name2} takes {c}. "
        "How many {items} are left?",
        "{name} buys {a} {boxes} with {b} {items} each, gives {part} of the {items} to {name2} and loses {c}. "
        "How many are left?",
    )),
    Family("ages of three", {
        "r=a+b": "{name2} is {eq} years old.",
        "s=r*k": "The oldest is {eq} years old.",
        "t=s-a": "The difference is {eq} years.",
    }, (
        "{name} is {a} and {name2} is {b} years older. Their aunt is {times} as old as {name2}. "
        "How many years older than {name} is the aunt?",
        "{name2} is {b} years older than {name}, who is {a}. Their father is {times} as old as {name2}. "
        "How many years older than {name} is the father?",
        "{name} is {a} years old, {b} years younger than {name2}. Their coach is {times} as old as {name2}. "
        "How many years younger is {name} than the coach?",
    ), level=3, most=90),
)  # fmt: skip

# ---- numbers -------------------------------------------------------------------------------------


def _hash(text: str) -> int:
    """The same in every process, unlike Python's."""
    return xxhash.xxh32_intdigest(text.encode())


def _ceiling(family: Family, difficulty: int) -> int:
    return min(family.most, LIMITS[difficulty][0])


@cache
def numbers_of(family: Family, difficulty: int, tries: int = 1 << 16) -> list[list[tuple[int, ...]]]:
    """Numbers for a family: at low difficulties nearly all that there are, else a sample; none twice.

    A list for every answer, because all are equally likely: or "2" would be right for one problem in eight.

    Numbers are tried at once for all, more small ones than large ones. One that is divided is drawn as the
    quotient, one that is subtracted from as the difference, so most tries are good.
    """
    ceiling, factor = _ceiling(family, difficulty), LIMITS[difficulty][1]
    # The stream of RandomState is frozen, that of numpy's newer generators is not.
    uniform = np.random.RandomState(_hash(f"{family.name} {difficulty}")).random_sample
    values, good = {name: np.int64(value) for name, value in family.constants.items()}, np.ones(tries, bool)

    def draw(name):
        if name == "k":
            return np.array(list(K[family.words]))[(len(K[family.words]) * uniform(tries)).astype(int)]
        u = uniform(tries)
        return SMALLEST + ((ceiling - SMALLEST + 1) * (u * u * u)).astype(int)

    for result, left, operator, right in family.parsed:
        y = values[right] = values[right] if right in values else draw(right)
        if left not in values:
            x = draw(left)
            values[left] = x * y if operator == "/" else x + y if operator == "-" else x
        x = values[left]
        if operator == "/":
            values[result], rest = np.divmod(x, np.maximum(y, SMALLEST))  # a smaller y was found bad before
            good &= (rest == 0) & (y <= factor)
        else:
            values[result] = {"+": np.add, "-": np.subtract, "*": np.multiply}[operator](x, y)
            good &= (operator != "*") | (np.minimum(x, y) <= factor)
        for value in (x, y, values[result]):
            good &= (value >= SMALLEST) & (value <= ceiling)
    found = {}
    for answer, *numbers in zip(*(values[name][good].tolist() for name in (result, *family.inputs)), strict=True):
        found.setdefault(answer, {})[tuple(numbers)] = None
    return [list(numbers) for numbers in found.values()]


class Step(NamedTuple):
    left: int
    operator: str
    right: int
    result: int


def solve(family: Family, numbers: tuple[int, ...], difficulty: int, at: int = -1, operator: str = "", shift: int = 0):
    """Steps of the solution; None unless all results are whole and within the limits.

    At step `at` there is a mistake, which the later steps carry on: another `operator`, or a result `shift` off.
    """
    ceiling = _ceiling(family, difficulty)
    values, steps = {**family.constants, **dict(zip(family.inputs, numbers, strict=True))}, []
    for i, (result, left, sign, right) in enumerate(family.parsed):
        x, y = values[left], values[right]
        if i == at:
            sign = operator or sign
        if sign == "/" and x % y:
            return None
        value = OPERATIONS[sign](x, y) + (shift if i == at else 0)
        if not SMALLEST <= value <= ceiling:
            return None
        values[result] = value
        steps.append(Step(x, sign, y, value))
    return steps


# ---- problems ------------------------------------------------------------------------------------


class Problem(NamedTuple):
    family: Family
    wording: int
    numbers: tuple[int, ...]
    question: str
    steps: list[Step]
    fields: dict

    @property
    def cell(self) -> tuple:
        return self.family.name, self.wording, self.numbers

    @property
    def answer(self) -> str:
        return str(self.steps[-1].result)

    def lines(self, annotated: bool = True, steps: list[Step] | None = None) -> list[str]:
        """The sentences of the solution, or of the other `steps`."""
        said = []
        for sentence, (x, sign, y, value) in zip(self.family.steps.values(), steps or self.steps, strict=True):
            note = f"<<{x}{sign}{y}={value}>>" if annotated else ""
            said.append(sentence.format_map({**self.fields, "eq": f"{x}{sign}{y}={note}{value}"}))
        return said

    def gsm8k(self, steps: list[Step] | None = None) -> str:
        return "\n".join([*self.lines(True, steps), f"#### {(steps or self.steps)[-1].result}"])


def in_test(cell: tuple) -> bool:
    return _hash(repr(cell)) % 10 == 0


def problems(view: str, seed: int = 0, difficulty: int = DIFFICULTY, split: str = "train") -> Iterator[Problem]:
    """The endless stream of problems that `generate` takes a view's rows from."""
    draw = random.Random(f"{view} {seed} {difficulty} {split}").random  # noqa: S311  (frozen across versions, unlike choice)
    families = [family for family in FAMILIES if family.level <= difficulty]
    wanted = split == "test"

    def pick(of):
        return of[int(draw() * len(of))]

    while True:
        family = pick(families)
        wording, numbers = int(draw() * len(family.wordings)), pick(pick(numbers_of(family, difficulty)))
        if in_test((family.name, wording, numbers)) != wanted:
            continue
        (name, name2), (item, item2) = pick(_NAMES), pick(_ITEMS)
        fields = {**name, **pick(name2), **item, **pick(item2), **pick(_BOXES), "place": pick(PLACES)}
        fields.update(zip(family.inputs, numbers, strict=True))
        if family.words:
            said = K[family.words][fields["k"]]
            fields |= {family.words: said, family.words.capitalize(): said.capitalize()}
        question = family.wordings[wording].format_map(fields)
        yield Problem(family, wording, numbers, question, solve(family, numbers, difficulty), fields)


def wrong(problem: Problem, error: str, difficulty: int, draw) -> str | None:
    """The answer with one mistake of the kind `error`; None if this problem has no such wrong answer."""
    if error == "missing_answer":
        return "\n".join(problem.lines())
    shifts = {"off_by_one": (-1, 1), "wrong_intermediate": (*range(-9, -1), *range(2, 10))}
    mistakes = [(i, "", shift) for i in range(len(problem.steps)) for shift in shifts.get(error, ())]
    if error == "wrong_operation":
        mistakes = [(i, sign, 0) for i, s in enumerate(problem.steps) for sign in OPERATIONS if sign != s.operator]
    for mistake in sorted(mistakes, key=lambda _: draw()):
        steps = solve(problem.family, problem.numbers, difficulty, *mistake)
        if steps and steps[-1].result != problem.steps[-1].result:
            return problem.gsm8k(steps)
    return None


# ---- views ---------------------------------------------------------------------------------------


def _user(problem: Problem) -> dict:
    return {"role": "user", "content": problem.question}


def _assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def _pretrain(stream, draw, difficulty):
    """Problems in prose; drills of annotated equations, and annotated solutions, of both half of the lines wrong and marked.

    So the model learns to tell a right equation from a wrong one, which a reward model builds on.
    """

    def marked(step: Step) -> tuple[Step, str]:
        near = [
            step.result + shift for shift in (-1, 1, *range(-9, -1), *range(2, 10)) if step.result + shift >= SMALLEST
        ]
        if draw() < 0.5:
            return step, "right"
        return Step(*step[:3], near[int(draw() ** 2 * len(near))]), "wrong"  # near ones more often

    for problem in stream:
        kind = draw()
        if kind < 0.4:
            lines = [problem.question, *problem.lines(False), f"The answer is {problem.answer}."]
        elif kind < 0.7:
            steps = [p.steps[int(draw() * len(p.steps))] for p in (problem, *islice(stream, DRILL - 1))]
            lines = [f"<<{x}{sign}{y}={z}>> {mark}" for (x, sign, y, z), mark in map(marked, steps)]
        else:
            steps, marks = zip(*map(marked, problem.steps), strict=True)
            lines = [f"{line} {mark}" for line, mark in zip(problem.lines(True, list(steps)), marks, strict=True)]
            lines = [problem.question, *lines]
        yield {"text": "\n".join(lines)}


def _sft(stream, draw, difficulty):
    return ({"messages": [_user(problem), _assistant(problem.gsm8k())]} for problem in stream)


def _preference(stream, draw, difficulty):
    while True:
        for error in ERRORS:
            problem, rejected = next(
                (problem, text) for problem in stream if (text := wrong(problem, error, difficulty, draw))
            )
            yield {
                "prompt": [_user(problem)],
                "chosen": [_assistant(problem.gsm8k())],
                "rejected": [_assistant(rejected)],
                "error": error,
            }


def _prompts(stream, draw, difficulty):
    return ({"prompt": [_user(problem)], "answer": problem.answer} for problem in stream)


def _test(stream, draw, difficulty):
    return ({"question": problem.question, "answer": problem.gsm8k()} for problem in stream)


def generate(
    view: str, rows: int, seed: int = 0, difficulty: int = DIFFICULTY, split: str = "train"
) -> dict[str, list]:
    """Columns for `Dataset.from_dict`; the view `test` is of the test split always."""
    for what, value, known in (("view", view, VIEWS), ("difficulty", difficulty, LIMITS), ("split", split, SPLITS)):
        if value not in known:
            raise UserError(f"builtin:arithmetic: there is no {what} {value!r}; there is {', '.join(map(str, known))}")
    if rows < 1:
        raise UserError(f"builtin:arithmetic: rows is {rows}; it must be at least 1")
    split = "test" if view == "test" else split
    writer = {"pretrain": _pretrain, "sft": _sft, "preference": _preference, "prompts": _prompts, "test": _test}[view]
    draw = random.Random(f"{view} {seed} extras").random  # noqa: S311
    written = list(islice(writer(problems(view, seed, difficulty, split), draw, difficulty), rows))
    return {column: [row[column] for row in written] for column in written[0]}


# ---- answers and overlap -------------------------------------------------------------------------


def final_answer(text: str) -> str | None:
    """The number after the first `#### `, without commas, as GSM8K's own script takes it."""
    found = re.search(r"#### (\-?[0-9\.\,]+)", text)
    return found and found[1].replace(",", "")


def is_correct(completion: str, gold: str) -> bool:
    """Whether the final answer of `completion` is the number `gold`."""
    return final_answer(completion) == gold.replace(",", "")


def overlap(train: Iterable[Problem], test: Iterable[Problem]) -> dict[str, float]:
    """Cells and question texts in both, and the share of test problems whose numbers training has for the family."""
    train, test = list(train), list(test)
    numbers = {(problem.family.name, problem.numbers) for problem in train}
    return {
        "cells": len({p.cell for p in train} & {p.cell for p in test}),
        "questions": len({p.question for p in train} & {p.question for p in test}),
        "numbers": sum((p.family.name, p.numbers) in numbers for p in test) / len(test),
    }
