from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evals import formatting as fmt


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (fmt.percent(0.97641), "97.6 %"),
        (fmt.percent(0.9997), "99.97 %"),
        (fmt.percent(0.0002), "0.02 %"),
        (fmt.percent(1.0), "100.0 %"),
        (fmt.percent(None), "–"),
        (fmt.points(-0.0374), "−3.7"),
        (fmt.points(0.0004), "0.0"),
        (fmt.points(0.02), "+2.0"),
        (fmt.parameters(211_072), "211 k"),
        (fmt.parameters(61_312), "61.3 k"),
        (fmt.parameters(2_300_000), "2.3 M"),
        (fmt.size(870), "870 B"),
        (fmt.size(402_000), "402 kB"),
        (fmt.size(12_345_678), "12.3 MB"),
        (fmt.milliseconds(7.4), "7.40 ms"),
        (fmt.milliseconds(12_345.0), "12 s"),
        (fmt.seconds(59.7), "1 min 00 s"),
        (fmt.seconds(811), "13 min 31 s"),
        (fmt.seconds(3599.9), "1 h 00 min"),
        (fmt.seconds(9.97), "10 s"),
        (fmt.significant(0.00012345), "0.000123"),
        (fmt.significant(1234.5), "1,230"),
        (fmt.significant(-0.5, 2), "−0.50"),
        (fmt.significant(4.1e-5, 2), "4.1e−5"),
        (fmt.significant(9.996), "10.0"),
        (fmt.p_value(0.0004), "p < 0.001"),
        (fmt.p_value(0.0412), "p = 0.041"),
        (fmt.times(2.68), "2.7×"),
    ],
)
def test_examples(text: str, wanted: str) -> None:
    assert text.replace(fmt.THIN, " ") == wanted


@given(st.floats(1e-4, 0.9e6))
def test_significant_keeps_three_digits(value: float) -> None:
    shown = float(fmt.significant(value).replace(",", ""))
    assert shown == pytest.approx(value, rel=0.00501)


@given(st.integers(1, 9672))
def test_percent_never_claims_all_or_nothing_falsely(right: int) -> None:
    shown = float(fmt.percent(right / 9673).split(fmt.THIN)[0])
    assert 0 < shown < 100
