"""Whether an answer has the demanded form, and what it says without its form."""

from __future__ import annotations

import pytest

from evolora.errors import ConfigError, DataError, StreamError
from evolora.evaluation.answers.formats import (
    demanded,
    follows,
    normalised_match,
    parse_formats,
)
from evolora.evaluation.answers.majority import majority_baseline
from evolora.evaluation.answers.tally import AnswerTally
from evolora.registry import ANSWER_METRICS
from evolora.streams.task import Example, LabelSpace, Task

IN_FORM = [
    ("letter", "B"),
    ("letter:ABCD", " D "),
    ("yes-no", "yes"),
    ("yes-no", "No"),
    ("number", "150"),
    ("number", "-2.5"),
    ("words", "a red kite in the sky"),
    ("words:1", "T-shirt"),
    ("words:2", "South Korea"),
    ("phrase:2", "an insect"),
    ("phrase:2", "The red kite"),
    ("list:3", "time, watch, alarm"),
    ("list", "night sky,moon"),
    ("sentence", "A drawing of a red bird."),
    ("sentence", "Is it a bird?"),
    ("box", "[0, 250, 500, 750]"),
    ("box", "[0,0,1000,1000]"),
]
OUT_OF_FORM = [
    ("letter", "b"),
    ("letter", "B."),
    ("letter", "B. Greek"),
    ("letter:ABCD", "E"),
    ("letter", ""),
    ("yes-no", "yes."),
    ("yes-no", "yes, it is"),
    ("yes-no", "true"),
    ("number", "150 cm"),
    ("number", "two"),
    ("words", "red."),
    ("words", "red, blue"),
    ("words", ""),
    ("words:1", "red circle"),
    ("phrase:2", "insect"),
    ("phrase:2", "a"),
    ("phrase:2", "a big red kite"),
    ("list:3", "time, watch"),
    ("list:3", "time, watch, alarm."),
    ("list:3", "time watch alarm"),
    ("list", "time"),
    ("list:3", "time, , alarm"),
    ("sentence", "A drawing of a red bird"),
    ("sentence", "Red bird."),
    ("sentence", "A red bird. It flies."),
    ("box", "0, 250, 500, 750"),
    ("box", "[0, 250, 500]"),
    ("box", "[500, 250, 500, 750]"),
    ("box", "[0, 0, 1001, 1000]"),
    ("box", "[0.1, 0.2, 0.5, 0.7]"),
    ("box", "The box is [0, 250, 500, 750]"),
]


@pytest.mark.parametrize(("written", "answer"), IN_FORM)
def test_an_answer_in_form_is_seen_as_such(written: str, answer: str) -> None:
    (form,) = parse_formats(written)
    assert form.fits(answer) and str(form) == written


@pytest.mark.parametrize(("written", "answer"), OUT_OF_FORM)
def test_an_answer_out_of_form_is_seen_as_such(written: str, answer: str) -> None:
    (form,) = parse_formats(written)
    assert not form.fits(answer)


def test_a_sample_demands_the_form_of_its_own_right_answer() -> None:
    formats = parse_formats("yes-no|number|words:1")
    for reference, name in (("no", "yes-no"), ("150", "number"), ("chair", "words:1")):
        assert str(demanded(formats, [reference])) == name
    assert follows(formats, "chair", ["lamp"]) and not follows(formats, "chair", ["yes"])
    assert not follows(formats, "yes it is", ["no"]) and follows(formats, "200", ["150"])
    # a right answer in no form of the task: the first is demanded
    assert str(demanded(formats, ["a big chair"])) == "yes-no"


@pytest.mark.parametrize(
    ("written", "prediction", "references", "right"),
    [
        ("letter", "b) Greek", ["B", "Greek"], 1),
        ("letter", "The answer is B.", ["B", "Greek"], 1),
        ("letter", "greek", ["B", "Greek"], 1),
        ("letter", "A or B", ["B", "Greek"], 0),
        ("yes-no", "Yes, it is.", ["yes"], 1),
        ("yes-no", "Yes and no", ["yes"], 0),
        ("yes-no", "it is", ["yes"], 0),
        ("number", "about 150 cm", ["150"], 1),
        ("number", "two", ["2"], 1),
        ("number", "150 or 200", ["150"], 0),
        ("words", "It is a cat.", ["cat"], 1),
        ("words", "The answer is South Korea!", ["South Korea"], 1),
        ("words", "Korea", ["South Korea"], 0),
        ("words", "", ["cat"], 0),
        ("phrase:2", "cat", ["a cat"], 1),
        ("list:3", "alarm, watch and time.", ["time, watch, alarm"], 1),
        ("list:3", "time, watch", ["time, watch, alarm"], 0),
        ("sentence", "a drawing of a red bird", ["A drawing of a red bird."], 1),
        ("box", "(0,250),(500,750)", ["[0, 250, 500, 750]"], 1),
        ("box", "nowhere", ["[0, 250, 500, 750]"], 0),
    ],
)
def test_the_normalised_score_puts_the_form_aside(
    written: str, prediction: str, references: list[str], right: int
) -> None:
    assert normalised_match(parse_formats(written), prediction, references) == right


def test_what_is_right_as_it_stands_is_right_whatever_its_form() -> None:
    for written, answer in IN_FORM:
        if not written.startswith("letter"):
            assert normalised_match(parse_formats(written), answer, [answer.strip()]) == 1.0


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("yesno", "unknown answer format 'yesno'; did you mean 'yes-no'?"),
        ("words:many", "words takes a number from 1 to 99 after the colon; got 'many'"),
        ("words:0", "got '0'"),
        ("box:4", "box takes nothing after it; got '4'"),
        ("letter:abc", "letter takes capital letters after the colon; got 'abc'"),
        ("yes-no|", "unknown answer format ''"),
    ],
)
def test_a_format_that_is_none_is_named(written: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_formats(written)
    assert expected in str(caught.value)


def tally(metric: str, written: str, answers: list[tuple[str, str]]) -> AnswerTally:
    found = AnswerTally(ANSWER_METRICS.get(metric), parse_formats(written))
    for row, (prediction, reference) in enumerate(answers):
        found.add([row], [prediction], [[reference]])
    return found


def test_a_test_set_has_raw_and_normalised_accuracy_and_its_share_in_form() -> None:
    given = [("red", "red"), ("It is red.", "red"), ("blue", "red"), ("", "red")]
    counted = tally("exact-match", "words:1", given)
    assert (counted.score(), counted.normalised(), counted.following()) == (0.25, 0.5, 0.5)
    assert tally("token-f1", "words:1", given).normalised() is None
    without = tally("exact-match", "", given)
    assert without.normalised() is None and without.following() is None


class Asked:
    """Questions and answers; the images are not looked at."""

    def __init__(self, *rows: tuple[str, str]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        question, answer = self.rows[index]
        return Example(inputs={"text": question}, label=(answer,), key=str(index))


def task(train: Asked, test: Asked, **options: str) -> Task:
    space = LabelSpace.of_texts()
    return Task(
        name="t", train=train, val=Asked(), test=test, labels=space,
        **{"metric": "exact-match", **options},  # type: ignore[arg-type]
    )  # fmt: skip


def test_the_majority_answers_each_wording_by_its_own_commonest_answer() -> None:
    train = Asked(
        ("color?", "red"), ("color?", "blue"), ("color?", "blue"),
        ("is it?", "yes"), ("is it?", "no"),
    )  # fmt: skip
    test = Asked(("color?", "blue"), ("color?", "red"), ("is it?", "no"), ("new?", "blue"))
    found = majority_baseline(task(train, test))
    # blue, blue, no (before yes), and for a new wording blue
    assert found.score == 0.75 and found.samples == 4
    assert found.commonest == "blue" and found.answers == 2


def test_formats_and_majority_are_of_texts_only() -> None:
    data = Asked(("a", "b"))
    with pytest.raises(ConfigError, match="unknown answer format 'word'; did you mean 'words'"):
        task(data, data, answer_format="word")
    classes = LabelSpace(classes=("a", "b"))
    with pytest.raises(StreamError, match="formats are of texts"):
        Task(name="t", train=data, val=data, test=data, labels=classes, answer_format="words")
    with pytest.raises(DataError, match="a majority answer needs texts"):
        majority_baseline(Task(name="t", train=data, val=data, test=data, labels=classes))
