from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pybpfthrottle.errors import Error, LimitError
from pybpfthrottle.model import (
    ACCEPTED,
    BLOCKED,
    MAX_RATE,
    MIN_RATE,
    RANGE,
    Counters,
    Direction,
    Rate,
    Verdict,
    format_bytes,
    format_rate,
)

K, M, G = 1024, 1024**2, 1024**3
IN_RANGE = st.integers(MIN_RATE.bytes_per_s, MAX_RATE.bytes_per_s)


@pytest.mark.parametrize(
    ("text", "bytes_per_s"),
    [
        ("2048", 2048),
        ("500K", 500 * K),
        ("500KB", 500 * K),
        ("500KiB", 500 * K),
        ("1M", M),
        ("1mb", M),
        ("1MiB", M),
        ("2G", 2 * G),
        ("2gB", 2 * G),
        ("2gib", 2 * G),
        ("1.5M", 3 * M // 2),
        (".5M", M // 2),
        ("2.M", 2 * M),
        ("0.001G", G // 1000),
        (" 5 MB ", 5 * M),
        ("100G", 100 * G),
        ("1K", K),
        ("1000", 1000),
        ("1M/s", M),
        ("1m/s", M),
        ("1MB/s", M),
        ("1.0 MB/s", M),
        ("1MiB/s", M),
        ("500 KB /s", 500 * K),
        ("2000 B/s", 2000),
        ("2000/s", 2000),
        ("0000000001M", M),
    ],
)
def test_byte_units_count_in_1024(text, bytes_per_s):
    """A number with a byte unit, in any case, is that many times a power of 1024."""
    assert Rate.parse(text) == Rate(bytes_per_s)


@pytest.mark.parametrize(
    ("text", "bytes_per_s"),
    [
        ("80kbit", 10_000),
        ("8mbit", 1_000_000),
        ("8Mbit", 1_000_000),
        ("1GBIT", 125_000_000),
        ("0.5mbit", 62_500),
        ("8 mbit", 1_000_000),
        ("8Mbit/s", 1_000_000),
        ("8kbit", 1000),
    ],
)
def test_bit_units_count_in_1000(text, bytes_per_s):
    """A number with a bit unit is an eighth of that many times a power of 1000."""
    assert Rate.parse(text) == Rate(bytes_per_s)


@pytest.mark.parametrize(
    "text",
    [
        *("banana", "", " ", ".", "-1", "-1M", "+1M", "1e3", "1e6", "nan", "inf", "1.2.3", "1..5M"),
        *("M", "5T", "5 M B", "0x10", "1_000_000", "1,5M", "5MM", "5M\0", "8bit"),
    ],
)
def test_nonsense_is_refused_with_what_is_accepted(text):
    """What is no number with a known unit is refused, with what is accepted."""
    with pytest.raises(LimitError) as caught:
        Rate.parse(text)
    assert ACCEPTED in str(caught.value)


@pytest.mark.parametrize("text", ["\u0665\u0660\u0660K", "\uff15\uff10\uff10K", "1.\u0665M"])
def test_digits_of_other_scripts_are_refused(text):
    """Only the digits 0 to 9 make a number."""
    with pytest.raises(LimitError):
        Rate.parse(text)


def test_the_kelvin_sign_is_no_k():
    """Only ASCII letters make a unit, though the Kelvin sign's lower case is k."""
    with pytest.raises(LimitError):
        Rate.parse("500\u212a")


@pytest.mark.parametrize(
    "text",
    ["0", "0M", "0.0", "1", "999", "0.5K", "7.9kbit", "100.1G", "101G", "1" + "0" * 30, "9" * 6000],
)
def test_out_of_range_is_refused_with_the_range(text):
    """A limit below 1000 B/s or above 100 GB/s is refused with that range."""
    with pytest.raises(LimitError) as caught:
        Rate.parse(text)
    assert RANGE in str(caught.value)


@pytest.mark.parametrize(
    ("text", "bits", "bytes_"),
    [
        ("8mbps", "8mbit", "8MB"),
        ("500Kbps", "500kbit", "500KB"),
        ("1Gb/s", "1gbit", "1GB"),
        ("1mib/s", "1mbit", "1MB"),
    ],
)
def test_an_ambiguous_unit_is_refused_with_both_spellings(text, bits, bytes_):
    """A unit that may mean bits or bytes is refused, and both ways to write it are shown."""
    with pytest.raises(LimitError) as caught:
        Rate.parse(text)
    assert f" {bits} " in str(caught.value)
    assert f" {bytes_} " in str(caught.value)


@pytest.mark.parametrize("number", ["1.5", "0.25", ".5"])
def test_an_ambiguous_unit_keeps_the_fraction_in_the_suggestions(number):
    """The spellings that are suggested for an ambiguous unit have the whole number."""
    with pytest.raises(LimitError) as caught:
        Rate.parse(f"{number}mbps")
    assert f" {number}mbit " in str(caught.value)
    assert f" {number}MB " in str(caught.value)


@pytest.mark.parametrize("text", ["block", " Block "])
def test_block_lets_nothing_pass(text):
    """It is a rate of its own, below all others, which reads back the same."""
    rate = Rate.parse(text)
    assert rate == BLOCKED < MIN_RATE
    assert rate.is_blocked
    assert not MIN_RATE.is_blocked
    assert (str(rate), rate.written()) == ("blocked", "block")


def test_a_limit_error_is_a_value_error_of_ours():
    """LimitError is both a ValueError and one of the package's own errors."""
    assert issubclass(LimitError, ValueError)
    assert issubclass(LimitError, Error)


@given(IN_RANGE)
def test_a_bare_number_is_read_as_it_is(bytes_per_s):
    """A bare number in range is bytes per second, and reads back the same."""
    assert Rate.parse(str(bytes_per_s)).bytes_per_s == bytes_per_s


@given(IN_RANGE, st.sampled_from("kKmMgG"), st.sampled_from(["", "b", "B", "ib", "iB"]))
def test_a_unit_multiplies(count, letter, rest):
    """A number with a unit is the same rate as that number times the unit, or both are refused."""
    text = f"{count}{letter}{rest}"
    scale = {"k": K, "m": M, "g": G}[letter.lower()]
    if count * scale > MAX_RATE.bytes_per_s:
        with pytest.raises(LimitError):
            Rate.parse(text)
    else:
        assert Rate.parse(text) == Rate(count * scale)


@given(st.integers(8, 800_000_000))
def test_kilobits_are_125_bytes(count):
    """A kilobit is exactly 125 bytes."""
    if not MIN_RATE.bytes_per_s <= count * 125 <= MAX_RATE.bytes_per_s:
        with pytest.raises(LimitError):
            Rate.parse(f"{count}kbit")
    else:
        assert Rate.parse(f"{count}kbit").bytes_per_s == count * 125


@given(st.text(max_size=20))
def test_any_text_is_a_rate_in_range_or_a_limit_error(text):
    """Whatever is given, the answer is a rate in range or a LimitError."""
    try:
        rate = Rate.parse(text)
    except LimitError:
        return
    assert MIN_RATE <= rate <= MAX_RATE


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KB"),
        (49_664, "48.5 KB"),
        (3 * M // 2, "1.5 MB"),
        (5 * G, "5.0 GB"),
        (5000 * G, "5000.0 GB"),
    ],
)
def test_bytes_are_shown_in_the_largest_unit_that_fits(count, text):
    """Bytes are shown with one decimal in the largest unit that they fill."""
    assert format_bytes(count) == text


def test_a_rate_is_shown_a_second():
    """A rate reads as its bytes a second."""
    assert str(Rate.parse("50K")) == format_rate(50 * K) == "50.0 KB/s"


def test_a_direction_is_shown_in_lower_case():
    """A direction's text is its name in lower case."""
    assert [str(direction) for direction in Direction] == ["download", "upload"]


def test_counters_are_shown_with_the_share_that_was_dropped():
    """Counters read as the words that people search logs for."""
    counters = Counters(5234, 5000, 7_000_000, 4500, 6_500_000)
    assert str(counters) == (
        "program_calls=5234, packets=5000, dropped=4500 (90.0%),"
        " bytes=7000000, dropped_bytes=6500000"
    )


def test_counters_without_packets_are_shown_without_a_division():
    """Counters of no packets show a share of 0.0%."""
    assert "dropped=0 (0.0%)" in str(Counters())


def test_passed_bytes_are_those_that_were_not_dropped():
    """The bytes that passed are the total less the dropped."""
    assert Counters(bytes_total=100, bytes_dropped=30).bytes_passed == 70


@pytest.mark.parametrize(
    ("ratio", "verdict"),
    [
        (0.0, Verdict.IDLE),
        (0.0001, Verdict.THROTTLED),
        (0.97, Verdict.THROTTLED),
        (1.1, Verdict.THROTTLED),
        (1.1001, Verdict.OVER_LIMIT),
        (1.5, Verdict.OVER_LIMIT),
        (1.5001, Verdict.NOT_WORKING),
        (100.0, Verdict.NOT_WORKING),
    ],
)
def test_the_verdict_changes_above_its_bounds(ratio, verdict):
    """A ratio above 1.1 is over the limit, one above 1.5 means no limit, and 0 no traffic."""
    assert Verdict.of(ratio) is verdict


def test_the_verdicts_read_as_in_the_log():
    """The verdicts read as the words that people search logs for."""
    verdicts = (Verdict.THROTTLED, Verdict.OVER_LIMIT, Verdict.NOT_WORKING)
    assert [verdict.value for verdict in verdicts] == [
        "✅ THROTTLED",
        "⚠️ OVER LIMIT",
        "⚠️ THROTTLE NOT WORKING",
    ]
